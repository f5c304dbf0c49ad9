"""Adapter methods: one small file each, registered here."""

from .._stage import callable_package
from .base import AttachForm, Method, Params, PeftForm, Shared, Site, Traits, as_matrix, complete, evaluate, fold, row_blocks, run
from .beft import BEFT, beft
from .boft import BOFT, boft
from .config import SiteConfig
from .hra import HRA, hra
from .ia3 import IA3, ia3
from .ln_tuning import LNTuning, ln_tuning
from .lora import LoRA, lora
from .oft import OFT, oft
from .operators import BlockDiagonal, Chain, Dense, Deviation, Diagonal, Kronecker, Operator, Pairs, Permutation
from .psoft import PSOFT, psoft
from .registry import get, method_of, methods, register
from .road import RoAd, road
from .trainable_tokens import TrainableTokens, trainable_tokens

register(beft)
register(boft)
register(hra)
register(ia3)
register(ln_tuning)
register(lora)
register(oft)
register(psoft)
register(road)
register(trainable_tokens)
callable_package(__name__, "methods", "registry")

__all__ = [
    "BEFT",
    "BOFT",
    "HRA",
    "IA3",
    "OFT",
    "PSOFT",
    "AttachForm",
    "BlockDiagonal",
    "Chain",
    "Dense",
    "Deviation",
    "Diagonal",
    "Kronecker",
    "LNTuning",
    "LoRA",
    "Method",
    "Operator",
    "Pairs",
    "Params",
    "PeftForm",
    "Permutation",
    "RoAd",
    "Shared",
    "Site",
    "SiteConfig",
    "TrainableTokens",
    "Traits",
    "as_matrix",
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
