"""Adapter methods: one small file each, registered here."""

from .._stage import callable_package
from .base import (
    AttachForm,
    Method,
    Params,
    PeftContent,
    PeftForm,
    Shared,
    Site,
    Traits,
    complete,
    evaluate,
    fold,
    row_blocks,
    run,
    settled,
)
from .c3a import C3A, c3a
from .config import SiteConfig
from .fourierft import FourierFT, fourierft
from .lora import LoRA, lora
from .operators import BlockCirculant, BlockDiagonal, Chain, Dense, Deviation, Diagonal, Kronecker, Operator, Scaled
from .randlora import RandLoRA, randlora
from .registry import get, method_of, methods, register
from .shira import SHiRA, shira
from .tinylora import TinyLoRA, tinylora
from .unilora import UniLoRA, unilora
from .vblora import VBLoRA, vblora
from .vera import VeRA, vera
from .waveft import WaveFT, waveft

register(c3a)
register(fourierft)
register(lora)
register(randlora)
register(shira)
register(tinylora)
register(unilora)
register(vblora)
register(vera)
register(waveft)
callable_package(__name__, "methods", "registry")

__all__ = [
    "C3A",
    "AttachForm",
    "BlockCirculant",
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
    "PeftContent",
    "PeftForm",
    "RandLoRA",
    "SHiRA",
    "Scaled",
    "Shared",
    "Site",
    "SiteConfig",
    "TinyLoRA",
    "Traits",
    "UniLoRA",
    "VBLoRA",
    "VeRA",
    "WaveFT",
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
