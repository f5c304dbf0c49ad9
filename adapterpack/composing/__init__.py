"""Packs combined into one pack, exactly, in factor space; without torch."""
