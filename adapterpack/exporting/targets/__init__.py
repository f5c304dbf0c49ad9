"""Who serves a bundle: one small file a product, which registers it."""

from .base import TARGETS, Target, default_slot_name

__all__ = ["TARGETS", "Target", "default_slot_name"]
