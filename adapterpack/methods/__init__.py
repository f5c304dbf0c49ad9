"""Adapter methods: one small file each, registered here."""

from .._stage import callable_package
from .adalora import AdaLoRA, adalora
from .base import AttachForm, Method, Params, PeftForm, Progress, Shared, Site, Trained, Traits, complete, evaluate, fold, row_blocks, run
from .bat import Bat, bat
from .blocks import BlockConfig, BlockForm, evaluate_block, run_block
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
from .inits import INITS, Init, Seen
from .kasa import KaSA, kasa
from .loha import LoHa, loha
from .lokr import LoKr, lokr
from .lora import LoRA, lora
from .loreft import LoReFT, loreft
from .miss import MiSS, miss
from .miss_mini import MiSSMini, miss_mini
from .mora import MoRA, mora
from .multitask_prompt_tuning import MultitaskPromptTuning, multitask_prompt_tuning
from .operators import BlockDiagonal, Chain, Dense, Deviation, Diagonal, Kronecker, Operator, Repeat, Sums
from .p_tuning import PTuning, p_tuning
from .prefix_tuning import PrefixTuning, prefix_tuning
from .prompt import PROMPT, PromptForm, PromptSite
from .prompt_tuning import PromptTuning, prompt_tuning
from .registry import get, method_of, methods, register

for _method in (
    adalora,
    bat,
    bottleneck,
    cartridge,
    compacter,
    cpt,
    deft,
    delora,
    dora,
    gralora,
    hira,
    kasa,
    loha,
    lokr,
    lora,
    loreft,
    miss,
    miss_mini,
    mora,
    multitask_prompt_tuning,
    p_tuning,
    prefix_tuning,
    prompt_tuning,
):
    register(_method)
callable_package(__name__, "methods", "registry")

__all__ = [
    "CPT",
    "DEFT",
    "INITS",
    "PROMPT",
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
    "Params",
    "PeftForm",
    "PrefixTuning",
    "Progress",
    "PromptForm",
    "PromptSite",
    "PromptTuning",
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
