"""Asks what runs a model in this process: transformers, with PEFT or a merged checkpoint, onnxruntime-genai,
and MLX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import Module

from ..bundle import GENAI_FILE
from ..errors import ConfigError, MissingExtra
from ..hub import folder_of
from ..paths import StrPath
from ..tasks import get_task
from ..torch_adapters.models.load import load_model, stored_dtype
from .targets import Ask, Logprobs, Responder, require_adapter

_SHOWN = 64
"""How many of the likeliest tokens are looked at."""


def last_logits(model: Any, ids: Sequence[int]) -> np.ndarray:
    """Returns the logits ``[vocabulary]`` that a model of transformers' gives after some tokens."""
    device = next(model.parameters()).device
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(ids)], device=device)).logits[0, -1]
    result: np.ndarray = logits.float().cpu().numpy()
    return result


def open_model(model: Module) -> Responder:
    """Asks a model of transformers' as it is; with PEFT's ``disable_adapter`` also without its adapter."""
    plain = getattr(model, "disable_adapter", None)
    name = type(model).__name__

    def ask(without: Callable[[], Any]) -> Ask:
        def logits(ids: Sequence[int]) -> np.ndarray:
            with without():
                return last_logits(model, ids)

        return _answers(logits)

    model.eval()
    return Responder(name, ask(nullcontext), None if plain is None else ask(plain))


def open_target(target: StrPath | Module, model: str, base: Path | None) -> Responder:
    """Opens a model of this process, the folder of a library, or a checkpoint into which an adapter was
    merged; ``model`` is the adapter's name there.

    Raises:
        MissingExtra: the library is not installed.
        UnknownAdapter: the folder has no adapter of that name.
        ConfigError: the folder is MLX's, and there is no base.
    """
    if isinstance(target, Module):
        return open_model(target)
    folder = folder_of(target)
    opened = (opens for file, opens in _FOLDERS.items() if (folder / file).is_file())
    return next(opened, _open_checkpoint)(folder, model, base)


def _open_checkpoint(folder: Path, model: str, base: Path | None) -> Responder:
    return open_model(load_model(get_task("text-generation"), folder, dtype=stored_dtype(folder)))._replace(
        name=str(folder)
    )


def _open_genai(folder: Path, model: str, base: Path | None) -> Responder:
    og = _library("onnxruntime_genai", "onnxruntime-genai")
    files = {path.stem: path for path in (folder / "adapters").glob("*.onnx_adapter")}
    require_adapter(model, files, folder)
    opened = og.Model(str(folder))
    adapters = og.Adapters(opened)
    adapters.load(str(files[model]), model)

    def ask(active: bool) -> Ask:
        def logits(ids: Sequence[int]) -> np.ndarray:
            parameters = og.GeneratorParams(opened)
            parameters.set_search_options(max_length=len(ids) + 1)
            generator = og.Generator(opened, parameters)
            if active:
                generator.set_active_adapter(adapters, model)
            generator.append_tokens(list(ids))
            return np.asarray(generator.get_logits(), np.float32).reshape(-1)

        return _answers(logits)

    return Responder(f"onnxruntime-genai on {folder}", ask(True), ask(False))


def _open_mlx(folder: Path, model: str, base: Path | None) -> Responder:
    if base is None:
        raise ConfigError("MLX runs this adapter on a base", where=folder, remedy="give the base with --base")
    mx, mlx_lm = _library("mlx.core", "mlx"), _library("mlx_lm", "mlx-lm")

    def ask(adapter: str | None) -> Ask:
        opened, _ = mlx_lm.load(str(base), adapter_path=adapter)
        # half precision throughout, logits and all, hides smaller adapters
        opened.set_dtype(mx.float32)
        return _answers(lambda ids: np.array(opened(mx.array([list(ids)]))[0, -1]))

    return Responder(f"MLX on {folder}", ask(str(folder)), ask(None))


_FOLDERS: Mapping[str, Callable[[Path, str, Path | None], Responder]] = {
    GENAI_FILE: _open_genai,
    "adapters.safetensors": _open_mlx,
}
"""A file by which the folder of a library is known, and what opens it."""


def _answers(logits_of: Callable[[Sequence[int]], np.ndarray]) -> Ask:
    """Makes a function that gives log-probabilities of one that gives logits ``[vocabulary]``."""

    def ask(ids: Sequence[int], wanted: Iterable[int]) -> Logprobs:
        logprobs = torch.from_numpy(logits_of(ids)).log_softmax(0)
        shown = [*wanted, *logprobs.topk(min(_SHOWN, len(logprobs))).indices.tolist()]
        return {token: float(logprobs[token]) for token in shown}

    return ask


def _library(name: str, package: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"asking this folder needs {package}, which is not installed", remedy=f"pip install {package}"
        ) from error
