"""OpenAI's API: the structs of requests, responses, streams and errors, and their conversion to and from the
engine.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
