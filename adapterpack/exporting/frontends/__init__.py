"""Who makes the base graph: one small file a frontend, tried in this order."""

from .base import BaseGraph, Frontend
from .mobius import mobius
from .transformers import transformers

FRONTENDS: tuple[Frontend, ...] = (mobius, transformers)

__all__ = ["FRONTENDS", "BaseGraph", "Frontend"]
