"""Frontends, which build the base graph; each module here registers one."""

from .base import FRONTENDS, BaseGraph, ExportSource, Frontend

__all__ = ["FRONTENDS", "BaseGraph", "ExportSource", "Frontend"]
