"""Makes a Hugging Face trainer's checkpoints hold only the adapters of a model, not its frozen base."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..errors import Unsupported
from ..paths import StrPath
from .layers import Wrapper, adapter_names
from .layers.tensors import gather
from .save import save

FILE = "model.safetensors"
"""The file from which transformers trainers load weights on resuming; parameters missing from it keep their
values.
"""
_FIXED = frozenset({"base", "fixed"})
"""Children of a wrapper that training does not change: the base module, and constants derived from the
config.
"""


def adapter_tensors(model: nn.Module, state: Mapping[str, Any] | None) -> dict[str, torch.Tensor]:
    """Returns the tensors that training changes, keyed as in the model's state dict, on the CPU.

    A parameter that several sites share appears once, under the first of its names.
    """
    state = model.state_dict() if state is None else state
    owned = tuple(
        f"{path}.{leaf}.".lstrip(".")
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Wrapper)
        for leaf in module._modules
        if leaf not in _FIXED
    )
    places: dict[int, str] = {}
    for name, value in state.items():
        if name.startswith(owned) and isinstance(value, torch.Tensor):
            places.setdefault(value.data_ptr() or id(value), name)
    return {name: gather(state[name]).detach().cpu().contiguous().clone() for name in places.values()}


def _save_pretrained(
    model: nn.Module, save_directory: StrPath, is_main_process: bool = True, **options: Any
) -> None:
    """Replaces ``save_pretrained`` of an adapted model.

    Called by a user, it writes the adapter as a pack (which is a PEFT folder too), or one pack per adapter,
    each in a subfolder of its name. Called by a trainer, which passes ``state_dict``, it writes the file to
    resume from.

    Raises:
        OutputExists: a user's folder is there already.
        Unsupported: a user asks for more than to write it.
    """
    if "state_dict" not in options or "save_function" in options:
        _write_packs(model, Path(save_directory), is_main_process, options)
        return
    tensors = adapter_tensors(model, options["state_dict"])
    if is_main_process:
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        save_file(tensors, Path(save_directory) / FILE, {"format": "pt"})


def _write_packs(model: nn.Module, folder: Path, is_main_process: bool, options: Mapping[str, Any]) -> None:
    """Writes a pack of each adapter; other processes than the main one only take part in gathering the
    tensors.
    """
    if options.get("push_to_hub"):
        raise Unsupported(
            "the adapter of a model is not pushed while it is saved",
            where="save_pretrained",
            found="push_to_hub",
            remedy=f"write it, then: adapterpack push {folder} hf://org/name",
        )
    names = adapter_names(model)
    for name in names:
        out = folder if len(names) == 1 else folder / name
        save(model, out if is_main_process else None, adapter=name)


def follow(model: nn.Module) -> None:
    """Updates what trainers see of a model after its adapters have changed: checkpoints hold the adapters
    alone, and a quantized base may be trained.

    On an adapted transformers model both are instance attributes; once its last adapter is gone, they are
    deleted and those of the class apply again.
    """
    if not hasattr(type(model), "save_pretrained"):
        return
    if adapter_names(model):
        model.save_pretrained = partial(_save_pretrained, model)
        # Trainers refuse to train a quantized model without adapters, and recognise only PEFT's by this flag.
        if getattr(model, "is_quantized", False):
            model._hf_peft_config_loaded = True
    else:
        for name in ("save_pretrained", "_hf_peft_config_loaded"):
            model.__dict__.pop(name, None)
