"""Layers that a shadow state runs beside, and the second model that begins it."""
