"""Who serves a bundle: one small file a product, which registers it."""

from .base import TARGETS, Target

__all__ = ["TARGETS", "Target"]
