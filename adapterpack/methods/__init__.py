"""Adapter methods: one small file each, registered here."""

from .._stage import callable_package
from .base import AttachForm, Method, Params, PeftForm, Shared, Site, Traits, complete, evaluate, fold, row_blocks, run
from .blocks import BlockConfig, BlockForm, evaluate_block, run_block
from .bottleneck import Bottleneck, bottleneck
from .compacter import Compacter, compacter
from .config import SiteConfig
from .inits import INITS, Init, Seen
from .lora import LoRA, lora
from .loreft import LoReFT, loreft
from .operators import BlockDiagonal, Chain, Dense, Deviation, Diagonal, Kronecker, Operator
from .registry import get, method_of, methods, register

register(lora)
register(bottleneck)
register(compacter)
register(loreft)
callable_package(__name__, "methods", "registry")

__all__ = [
    "INITS",
    "AttachForm",
    "BlockConfig",
    "BlockDiagonal",
    "BlockForm",
    "Bottleneck",
    "Chain",
    "Compacter",
    "Dense",
    "Deviation",
    "Diagonal",
    "Init",
    "Kronecker",
    "LoRA",
    "LoReFT",
    "Method",
    "Operator",
    "Params",
    "PeftForm",
    "Seen",
    "Shared",
    "Site",
    "SiteConfig",
    "Traits",
    "complete",
    "evaluate",
    "evaluate_block",
    "fold",
    "get",
    "method_of",
    "methods",
    "register",
    "row_blocks",
    "run",
    "run_block",
]
