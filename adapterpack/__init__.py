"""adapterpack: train, pack, verify, merge, compose, quantize, export and run adapters for large pretrained models.

Names are imported on first use, so that looking at a pack never costs an import of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_STAGES = ("compose", "convert", "demo", "export", "extract", "merge", "methods", "quantize", "train")
"""Subpackages that are called like functions; see :mod:`adapterpack._stage`."""

_PUBLIC = {
    "ALoRA": "methods",
    "AdaLoRA": "methods",
    "AdapterpackError": "errors",
    "BEFT": "methods",
    "BOFT": "methods",
    "Bat": "methods",
    "Bottleneck": "methods",
    "C3A": "methods",
    "CPT": "methods",
    "Cartridge": "methods",
    "Compacter": "methods",
    "DEFT": "methods",
    "DeLoRA": "methods",
    "DoRA": "methods",
    "FourierFT": "methods",
    "GLoRA": "methods",
    "GraLoRA": "methods",
    "HRA": "methods",
    "HiRA": "methods",
    "IA3": "methods",
    "KaSA": "methods",
    "LLaMAAdapter": "methods",
    "LNTuning": "methods",
    "LoHa": "methods",
    "LoKr": "methods",
    "LoRA": "methods",
    "LoReFT": "methods",
    "MiSS": "methods",
    "MiSSMini": "methods",
    "MoRA": "methods",
    "MultitaskPromptTuning": "methods",
    "OFT": "methods",
    "PSOFT": "methods",
    "PTuning": "methods",
    "Pack": "pack.pack",
    "PrefixTuning": "methods",
    "PromptTuning": "methods",
    "RandLoRA": "methods",
    "RoAd": "methods",
    "SHiRA": "methods",
    "Session": "runtime.session",
    "Store": "pack.store",
    "TinyLoRA": "methods",
    "TrainableTokens": "methods",
    "UniLoRA": "methods",
    "VBLoRA": "methods",
    "VeRA": "methods",
    "WaveFT": "methods",
    "active": "train.inject",
    "adapt": "train.inject",
    "attach": "train.inject",
    "audit": "compose.audit",
    "declare": "pack.declare",
    "detach": "train.inject",
    "inspect": "artifacts",
    "load": "pack.validate",
    "measure": "train.measuring",
    "pull": "hub.pull",
    "push": "hub.push",
    "resize": "compose.resize",
    "rules": "compose.rules",
    "run": "runtime.run",
    "save": "train.save",
    "sign": "pack.sign",
    "unmerge": "merge.unmerge",
    "validate": "artifacts",
    "verify": "pack.sign",
}

__all__ = ["__version__", "hub", *_STAGES, *_PUBLIC]  # noqa: PLE0604 - the names are strings


def __getattr__(name: str) -> Any:
    if name in {*_STAGES, "hub"}:
        return import_module(f"adapterpack.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'adapterpack' has no attribute '{name}'")
    return getattr(import_module(f"adapterpack.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
