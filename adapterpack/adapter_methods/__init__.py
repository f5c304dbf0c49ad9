"""Adapter methods: one small file each, named in the catalogue and imported when it is asked for."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .._stage import Stage, callable_package
from .catalogue import CONFIGS
from .core.base import (
    AttachForm,
    Method,
    Progress,
    Shared,
    Trained,
    Traits,
    amount,
    complete,
    evaluate,
    fold,
    frozen,
    look_up,
    row_blocks,
    run,
    settled,
)
from .core.columns import columns
from .core.config import SiteConfig
from .core.layouts import LAYOUTS, Layout, from_matrix, is_bare, is_stacked, layout_of, matrix_shape, takes_ids, to_matrix
from .core.operators import (
    BlockCirculant,
    BlockDiagonal,
    Chain,
    Dense,
    Deviation,
    Diagonal,
    Kronecker,
    Operator,
    Pairs,
    Permutation,
    Repeat,
    Scaled,
    Sums,
)
from .core.peft_form import Completed, Factorise, PeftBeside, PeftContent, PeftForm, PeftLayer
from .core.site import PROMPT, Params, Site
from .inits import INITS, Init, Seen
from .registry import broken_plugins, built_in, get, method_of, methods, register

if TYPE_CHECKING:
    from .adalora import AdaLoRA, adalora
    from .alora import ALoRA, alora
    from .bat import Bat, bat
    from .beft import BEFT, beft
    from .boft import BOFT, boft
    from .bottleneck import Bottleneck, bottleneck
    from .c3a import C3A, c3a
    from .cartridge import Cartridge, cartridge
    from .compacter import Compacter, compacter
    from .core.sparse import Sparse
    from .core.token_positions import Acts, Ends, Invoked, acted
    from .cpt import CPT, cpt
    from .deft import DEFT, deft
    from .delora import DeLoRA, delora
    from .dora import DoRA, dora
    from .forms.attention import AttentionForm, attend
    from .forms.blocks import BlockConfig, BlockForm, evaluate_block, run_block
    from .forms.prompt import PromptForm
    from .forms.prompt_config import PromptSite
    from .fourierft import FourierFT, fourierft
    from .glora import GLoRA, glora
    from .gralora import GraLoRA, gralora
    from .hira import HiRA, hira
    from .hra import HRA, hra
    from .ia3 import IA3, ia3
    from .kasa import KaSA, kasa
    from .llama_adapter import LLaMAAdapter, llama_adapter
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
    from .p_tuning import PTuning, p_tuning
    from .prefix_tuning import PrefixTuning, prefix_tuning
    from .prompt_tuning import PromptTuning, prompt_tuning
    from .psoft import PSOFT, psoft
    from .randlora import RandLoRA, randlora
    from .road import RoAd, road
    from .shira import SHiRA, shira
    from .tinylora import TinyLoRA, tinylora
    from .trainable_tokens import TrainableTokens, trainable_tokens
    from .unilora import UniLoRA, unilora
    from .vblora import VBLoRA, vblora
    from .vera import VeRA, vera
    from .waveft import WaveFT, waveft

_KINDS = {
    "acting": ("Acts", "Ends", "Invoked", "acted"),
    "attention": ("AttentionForm", "attend"),
    "blocks": ("BlockConfig", "BlockForm", "evaluate_block", "run_block"),
    "prompt": ("PromptForm", "PromptSite"),
    "sparse": ("Sparse",),
}
"""What only some methods are made of: the file, and its names here; imported when one of them is asked for."""


class _Methods(Stage):
    def __setattr__(self, name: str, value: Any) -> None:
        """Importing the file ``lora.py`` binds it to ``lora`` here, which is the name of the method in it."""
        super().__setattr__(name, getattr(value, name) if isinstance(value, ModuleType) and name in CONFIGS else value)


def __getattr__(name: str) -> Any:
    file = next((file for file, names in _KINDS.items() if name in names), None)
    if file is not None:
        return getattr(import_module(f"{__name__}.{file}"), name)
    method = name if name in CONFIGS else next((method for method, config in CONFIGS.items() if config == name), None)
    if method is None:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    found = get(method)
    return found if name == method else found.config


callable_package(__name__, "methods", "registry")
sys.modules[__name__].__class__ = _Methods

__all__ = [
    "BEFT",
    "BOFT",
    "C3A",
    "CPT",
    "DEFT",
    "HRA",
    "IA3",
    "INITS",
    "LAYOUTS",
    "OFT",
    "PROMPT",
    "PSOFT",
    "ALoRA",
    "Acts",
    "AdaLoRA",
    "AttachForm",
    "AttentionForm",
    "Bat",
    "BlockCirculant",
    "BlockConfig",
    "BlockDiagonal",
    "BlockForm",
    "Bottleneck",
    "Cartridge",
    "Chain",
    "Compacter",
    "Completed",
    "DeLoRA",
    "Dense",
    "Deviation",
    "Diagonal",
    "DoRA",
    "Ends",
    "Factorise",
    "FourierFT",
    "GLoRA",
    "GraLoRA",
    "HiRA",
    "Init",
    "Invoked",
    "KaSA",
    "Kronecker",
    "LLaMAAdapter",
    "LNTuning",
    "Layout",
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
    "PeftBeside",
    "PeftContent",
    "PeftForm",
    "PeftLayer",
    "Permutation",
    "PrefixTuning",
    "Progress",
    "PromptForm",
    "PromptSite",
    "PromptTuning",
    "RandLoRA",
    "Repeat",
    "RoAd",
    "SHiRA",
    "Scaled",
    "Seen",
    "Shared",
    "Site",
    "SiteConfig",
    "Sparse",
    "Sums",
    "TinyLoRA",
    "TrainableTokens",
    "Trained",
    "Traits",
    "UniLoRA",
    "VBLoRA",
    "VeRA",
    "WaveFT",
    "acted",
    "amount",
    "attend",
    "broken_plugins",
    "built_in",
    "columns",
    "complete",
    "evaluate",
    "evaluate_block",
    "fold",
    "from_matrix",
    "frozen",
    "get",
    "is_bare",
    "is_stacked",
    "layout_of",
    "look_up",
    "matrix_shape",
    "method_of",
    "methods",
    "register",
    "row_blocks",
    "run",
    "run_block",
    "settled",
    "takes_ids",
    "to_matrix",
]
