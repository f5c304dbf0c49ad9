"""Adapter methods: one small file each, registered here."""

from .._stage import callable_package
from .base import AttachForm, Method, Params, PeftForm, Shared, Site, Traits, complete, evaluate, fold, row_blocks, run, settled
from .config import SiteConfig
from .fourierft import FourierFT, fourierft
from .lora import LoRA, lora
from .operators import BlockDiagonal, Chain, Dense, Deviation, Diagonal, Kronecker, Operator, Scaled
from .registry import get, method_of, methods, register
from .shira import SHiRA, shira
from .vera import VeRA, vera

for _method in (fourierft, lora, shira, vera):
    register(_method)
callable_package(__name__, "methods", "registry")

__all__ = [
    "AttachForm",
    "BlockDiagonal",
    "Chain",
    "Dense",
    "Deviation",
    "Diagonal",
    "FourierFT",
    "Kronecker",
    "LoRA",
    "Method",
    "Operator",
    "Params",
    "PeftForm",
    "SHiRA",
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
