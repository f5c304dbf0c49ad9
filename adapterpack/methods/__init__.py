"""Adapter methods: one small file each, registered here."""

from .._stage import callable_package
from .base import AttachForm, Method, Params, PeftForm, Shared, Site, Traits, complete, evaluate, fold, row_blocks, run
from .cartridge import Cartridge, cartridge
from .config import SiteConfig
from .cpt import CPT, cpt
from .lora import LoRA, lora
from .multitask_prompt_tuning import MultitaskPromptTuning, multitask_prompt_tuning
from .operators import BlockDiagonal, Chain, Dense, Deviation, Diagonal, Kronecker, Operator
from .p_tuning import PTuning, p_tuning
from .prefix_tuning import PrefixTuning, prefix_tuning
from .prompt import PROMPT, PromptForm, PromptSite
from .prompt_tuning import PromptTuning, prompt_tuning
from .registry import get, method_of, methods, register

register(lora)
register(prompt_tuning)
register(p_tuning)
register(prefix_tuning)
register(cartridge)
register(multitask_prompt_tuning)
register(cpt)
callable_package(__name__, "methods", "registry")

__all__ = [
    "CPT",
    "PROMPT",
    "AttachForm",
    "BlockDiagonal",
    "Cartridge",
    "Chain",
    "Dense",
    "Deviation",
    "Diagonal",
    "Kronecker",
    "LoRA",
    "Method",
    "MultitaskPromptTuning",
    "Operator",
    "PTuning",
    "Params",
    "PeftForm",
    "PrefixTuning",
    "PromptForm",
    "PromptSite",
    "PromptTuning",
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
