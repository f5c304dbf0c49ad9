"""Adapter methods: one small file each, registered here."""

from .._stage import callable_package
from .adalora import AdaLoRA, adalora
from .base import (
    AttachForm,
    Method,
    Params,
    PeftForm,
    Progress,
    Shared,
    Site,
    Trained,
    Traits,
    as_matrix,
    complete,
    evaluate,
    fold,
    row_blocks,
    run,
)
from .bat import Bat, bat
from .beft import BEFT, beft
from .blocks import BlockConfig, BlockForm, evaluate_block, run_block
from .boft import BOFT, boft
from .bottleneck import Bottleneck, bottleneck
from .cartridge import Cartridge, cartridge
from .compacter import Compacter, compacter
from .config import SiteConfig
from .cpt import CPT, cpt
from .deft import DEFT, deft
from .delora import DeLoRA, delora
from .dora import DoRA, dora
from .gralora import GraLoRA, gralora
from .hira import HiRA, hira
from .hra import HRA, hra
from .ia3 import IA3, ia3
from .inits import INITS, Init, Seen
from .kasa import KaSA, kasa
from .ln_tuning import LNTuning, ln_tuning
from .loha import LoHa, loha
from .lokr import LoKr, lokr
from .lora import LoRA, lora
from .loreft import LoReFT, loreft
from .miss import MiSS, miss
from .miss_mini import MiSSMini, miss_mini
from .mora import MoRA, mora
from .multitask_prompt_tuning import MultitaskPromptTuning, multitask_prompt_tuning
from .oft import OFT, oft
from .operators import BlockDiagonal, Chain, Dense, Deviation, Diagonal, Kronecker, Operator, Pairs, Permutation, Repeat, Sums
from .p_tuning import PTuning, p_tuning
from .prefix_tuning import PrefixTuning, prefix_tuning
from .prompt import PROMPT, PromptForm, PromptSite
from .prompt_tuning import PromptTuning, prompt_tuning
from .psoft import PSOFT, psoft
from .registry import get, method_of, methods, register
from .road import RoAd, road
from .trainable_tokens import TrainableTokens, trainable_tokens

for _method in (
    adalora,
    bat,
    beft,
    boft,
    bottleneck,
    cartridge,
    compacter,
    cpt,
    deft,
    delora,
    dora,
    gralora,
    hira,
    hra,
    ia3,
    kasa,
    ln_tuning,
    loha,
    lokr,
    lora,
    loreft,
    miss,
    miss_mini,
    mora,
    multitask_prompt_tuning,
    oft,
    p_tuning,
    prefix_tuning,
    prompt_tuning,
    psoft,
    road,
    trainable_tokens,
):
    register(_method)
callable_package(__name__, "methods", "registry")

__all__ = [
    "BEFT",
    "BOFT",
    "CPT",
    "DEFT",
    "HRA",
    "IA3",
    "INITS",
    "OFT",
    "PROMPT",
    "PSOFT",
    "AdaLoRA",
    "AttachForm",
    "Bat",
    "BlockConfig",
    "BlockDiagonal",
    "BlockForm",
    "Bottleneck",
    "Cartridge",
    "Chain",
    "Compacter",
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
    "LNTuning",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoReFT",
    "Method",
    "MiSS",
    "MiSSMini",
    "MoRA",
    "MultitaskPromptTuning",
    "Operator",
    "PTuning",
    "Pairs",
    "Params",
    "PeftForm",
    "Permutation",
    "PrefixTuning",
    "Progress",
    "PromptForm",
    "PromptSite",
    "PromptTuning",
    "Repeat",
    "RoAd",
    "Seen",
    "Shared",
    "Site",
    "SiteConfig",
    "Sums",
    "TrainableTokens",
    "Trained",
    "Traits",
    "as_matrix",
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
