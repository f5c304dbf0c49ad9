"""Who serves a bundle: one small file a product, which registers it."""

from .base import TARGETS, Target, own_name

__all__ = ["TARGETS", "Target", "own_name"]
