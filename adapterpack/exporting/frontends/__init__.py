"""Makes the base graph: one small file a frontend, which registers it."""

from .base import FRONTENDS, BaseGraph, ExportSource, Frontend

__all__ = ["FRONTENDS", "BaseGraph", "ExportSource", "Frontend"]
