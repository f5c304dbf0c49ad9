"""Composes several packs into one pack, exactly and in factor space, without torch."""
