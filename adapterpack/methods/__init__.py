"""Adapter methods: one small file each, registered here."""

from .._stage import callable_package
from .adalora import AdaLoRA, adalora
from .base import AttachForm, Method, Params, PeftForm, Progress, Shared, Site, Trained, Traits, complete, evaluate, fold, row_blocks, run
from .bat import Bat, bat
from .config import SiteConfig
from .deft import DEFT, deft
from .delora import DeLoRA, delora
from .dora import DoRA, dora
from .gralora import GraLoRA, gralora
from .hira import HiRA, hira
from .inits import INITS, Init, Seen
from .kasa import KaSA, kasa
from .loha import LoHa, loha
from .lokr import LoKr, lokr
from .lora import LoRA, lora
from .miss import MiSS, miss
from .miss_mini import MiSSMini, miss_mini
from .mora import MoRA, mora
from .operators import BlockDiagonal, Chain, Dense, Deviation, Diagonal, Kronecker, Operator, Repeat, Sums
from .registry import get, method_of, methods, register

for _method in (adalora, bat, deft, delora, dora, gralora, hira, kasa, loha, lokr, lora, miss, miss_mini, mora):
    register(_method)
callable_package(__name__, "methods", "registry")

__all__ = [
    "DEFT",
    "INITS",
    "AdaLoRA",
    "AttachForm",
    "Bat",
    "BlockDiagonal",
    "Chain",
    "DeLoRA",
    "Dense",
    "Deviation",
    "Diagonal",
    "DoRA",
    "GraLoRA",
    "HiRA",
    "Init",
    "KaSA",
    "Kronecker",
    "LoHa",
    "LoKr",
    "LoRA",
    "Method",
    "MiSS",
    "MiSSMini",
    "MoRA",
    "Operator",
    "Params",
    "PeftForm",
    "Progress",
    "Repeat",
    "Seen",
    "Shared",
    "Site",
    "SiteConfig",
    "Sums",
    "Trained",
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
