"""Targets, the products that run a bundle; each module here registers one."""

from .base import TARGETS, Target

__all__ = ["TARGETS", "Target"]
