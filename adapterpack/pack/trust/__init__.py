"""Detached signatures of packs: keys, signed statements, envelopes, and the keys that a runtime trusts."""
