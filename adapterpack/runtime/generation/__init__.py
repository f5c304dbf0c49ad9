"""Chooses the tokens of an answer: sampling, beam search, logits processors and grammars, and the answer's
text.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
