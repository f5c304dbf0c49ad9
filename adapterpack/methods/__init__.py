"""Adapter methods: one small file each, registered here."""

from .._stage import callable_package
from .acting import Acts, Ends, Invoked, acted
from .adalora import AdaLoRA, adalora
from .alora import ALoRA, alora
from .attention import AttentionForm, attend
from .base import (
    AttachForm,
    Completed,
    Factorise,
    Method,
    Params,
    PeftBeside,
    PeftContent,
    PeftForm,
    PeftLayer,
    Progress,
    Shared,
    Site,
    Trained,
    Traits,
    complete,
    evaluate,
    fold,
    frozen,
    look_up,
    row_blocks,
    run,
    settled,
)
from .bat import Bat, bat
from .beft import BEFT, beft
from .blocks import BlockConfig, BlockForm, evaluate_block, run_block
from .boft import BOFT, boft
from .bottleneck import Bottleneck, bottleneck
from .c3a import C3A, c3a
from .cartridge import Cartridge, cartridge
from .columns import columns
from .compacter import Compacter, compacter
from .config import SiteConfig
from .cpt import CPT, cpt
from .deft import DEFT, deft
from .delora import DeLoRA, delora
from .dora import DoRA, dora
from .fourierft import FourierFT, fourierft
from .glora import GLoRA, glora
from .gralora import GraLoRA, gralora
from .hira import HiRA, hira
from .hra import HRA, hra
from .ia3 import IA3, ia3
from .inits import INITS, Init, Seen
from .kasa import KaSA, kasa
from .layouts import LAYOUTS, Layout, from_matrix, is_bare, is_stacked, layout_of, matrix_shape, takes_ids, to_matrix
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
from .operators import (
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
from .p_tuning import PTuning, p_tuning
from .prefix_tuning import PrefixTuning, prefix_tuning
from .prompt import PROMPT, PromptForm, PromptSite
from .prompt_tuning import PromptTuning, prompt_tuning
from .psoft import PSOFT, psoft
from .randlora import RandLoRA, randlora
from .registry import get, method_of, methods, register
from .road import RoAd, road
from .shira import SHiRA, shira
from .sparse import Sparse
from .tinylora import TinyLoRA, tinylora
from .trainable_tokens import TrainableTokens, trainable_tokens
from .unilora import UniLoRA, unilora
from .vblora import VBLoRA, vblora
from .vera import VeRA, vera
from .waveft import WaveFT, waveft

for _method in (
    adalora,
    alora,
    bat,
    beft,
    boft,
    bottleneck,
    c3a,
    cartridge,
    compacter,
    cpt,
    deft,
    delora,
    dora,
    fourierft,
    glora,
    gralora,
    hira,
    hra,
    ia3,
    kasa,
    llama_adapter,
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
    randlora,
    road,
    shira,
    tinylora,
    trainable_tokens,
    unilora,
    vblora,
    vera,
    waveft,
):
    register(_method)
callable_package(__name__, "methods", "registry")

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
    "attend",
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
