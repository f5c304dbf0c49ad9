"""Adapter methods: one small file each, registered here."""

from .._stage import callable_package
from .base import (
    AttachForm,
    Method,
    Params,
    PeftForm,
    PeftLayer,
    Shared,
    Site,
    Traits,
    complete,
    evaluate,
    fold,
    look_up,
    row_blocks,
    run,
)
from .config import SiteConfig
from .inits import INITS, Init, Seen
from .layouts import LAYOUTS, Layout, from_matrix, is_bare, is_stacked, layout_of, matrix_shape, takes_ids, to_matrix
from .lora import LoRA, lora
from .operators import BlockDiagonal, Chain, Dense, Deviation, Diagonal, Kronecker, Operator, columns
from .registry import get, method_of, methods, register

register(lora)
callable_package(__name__, "methods", "registry")

__all__ = [
    "INITS",
    "LAYOUTS",
    "AttachForm",
    "BlockDiagonal",
    "Chain",
    "Dense",
    "Deviation",
    "Diagonal",
    "Init",
    "Kronecker",
    "Layout",
    "LoRA",
    "Method",
    "Operator",
    "Params",
    "PeftForm",
    "PeftLayer",
    "Seen",
    "Shared",
    "Site",
    "SiteConfig",
    "Traits",
    "columns",
    "complete",
    "evaluate",
    "fold",
    "from_matrix",
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
    "takes_ids",
    "to_matrix",
]
