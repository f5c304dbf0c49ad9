"""Makes the base graph: one small file a frontend, which registers it."""

from .base import FRONTENDS, BaseGraph, Frontend, Source

__all__ = ["FRONTENDS", "BaseGraph", "Frontend", "Source"]
