"""Adapter methods: one small file each, registered here."""

from .._stage import callable_package
from .base import AttachForm, Method, Params, PeftForm, Site, Traits, evaluate, fold, row_blocks, run
from .lora import LoRA, lora
from .operators import Dense, Diagonal, Operator
from .registry import get, method_of, methods, register

register(lora)
callable_package(__name__, "methods", "registry")

__all__ = [
    "AttachForm",
    "Dense",
    "Diagonal",
    "LoRA",
    "Method",
    "Operator",
    "Params",
    "PeftForm",
    "Site",
    "Traits",
    "evaluate",
    "fold",
    "get",
    "method_of",
    "methods",
    "register",
    "row_blocks",
    "run",
]
