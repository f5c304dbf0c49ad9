"""Detached signatures of packs: keys, statements and envelopes."""
