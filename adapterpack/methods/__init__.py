"""Adapter methods: one small file each, registered here."""

from .._stage import callable_package
from .base import AttachForm, Method, Params, PeftForm, Shared, Site, Traits, complete, evaluate, fold, row_blocks, run
from .config import SiteConfig
from .dora import DoRA, dora
from .lora import LoRA, lora
from .operators import BlockDiagonal, Chain, Dense, Deviation, Diagonal, Kronecker, Operator
from .registry import get, method_of, methods, register

for _method in (dora, lora):
    register(_method)
callable_package(__name__, "methods", "registry")

__all__ = [
    "AttachForm",
    "BlockDiagonal",
    "Chain",
    "Dense",
    "Deviation",
    "Diagonal",
    "DoRA",
    "Kronecker",
    "LoRA",
    "Method",
    "Operator",
    "Params",
    "PeftForm",
    "Shared",
    "Site",
    "SiteConfig",
    "Traits",
    "complete",
    "evaluate",
    "fold",
    "get",
    "method_of",
    "methods",
    "register",
    "row_blocks",
    "run",
]
