"""Chooses the tokens of an answer: sampling, beam search, logits processors and grammars, and the answer's
text.
"""
