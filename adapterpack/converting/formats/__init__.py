"""Adapter formats: one file a format, which registers it."""
