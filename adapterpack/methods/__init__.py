"""Adapter methods: one small file each, registered here."""

from .._stage import callable_package
from .base import AttachForm, Method, Params, PeftForm, Shared, Site, Traits, complete, evaluate, fold, row_blocks, run, settled
from .config import SiteConfig
from .lora import LoRA, lora
from .operators import BlockDiagonal, Chain, Dense, Deviation, Diagonal, Kronecker, Operator
from .registry import get, method_of, methods, register

register(lora)
callable_package(__name__, "methods", "registry")

__all__ = [
    "AttachForm",
    "BlockDiagonal",
    "Chain",
    "Dense",
    "Deviation",
    "Diagonal",
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
    "settled",
]
