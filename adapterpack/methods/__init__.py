"""Adapter methods: one small file each, registered here."""

from .._stage import callable_package
from .base import AttachForm, Method, Params, PeftForm, Shared, Site, Traits, complete, evaluate, fold, row_blocks, run, settled
from .config import SiteConfig
from .lora import LoRA, lora
from .operators import BlockDiagonal, Chain, Dense, Deviation, Diagonal, Kronecker, Operator, Scaled
from .registry import get, method_of, methods, register
from .vera import VeRA, vera

register(lora)
register(vera)
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
    "Scaled",
    "Shared",
    "Site",
    "SiteConfig",
    "Traits",
    "VeRA",
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
