"""A trained adapter out of a model and into a pack: fingerprint, canary, tensors."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import AdapterpackError, NothingToDo
from ..hub.resolve import folder_of
from ..methods import is_bare
from ..pack import canary, identity
from ..pack import fingerprint as fp
from ..pack import manifest as m
from ..pack.atomic import refuse_existing
from ..pack.checkpoint import Checkpoint
from ..pack.pack import Pack, build
from ..pack.safetensors import DTYPES
from ..tasks import task_of
from .inject import active, adapter_names, labels_of, parts_of
from .layer import Adapted, Wrapper, own_modules

DTYPE_NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
"""numpy's and torch's name of a dtype -> that of safetensors."""


def save(
    model: nn.Module,
    out: str | os.PathLike[str] | None,
    *,
    adapter: str | None = None,
    base: str | os.PathLike[str] | None = None,
    name: str | None = None,
    training: Mapping[str, Any] | None = None,
    metrics: tuple[Mapping[str, Any], ...] = (),
) -> Pack:
    """Packs an adapter of ``model`` into the new folder ``out`` (None: in memory only) and returns the pack.

    ``adapter`` defaults to the only one; ``base`` to where the model was loaded from; ``name`` to the folder's. The pack carries the
    fingerprint of the base and, for models with a vocabulary, a canary.

    Raises:
        NonFinite: a trained tensor, or what the adapted model gives, holds NaN or infinity.
        OutputExists: ``out`` is taken.
        UnknownAdapter: the model has no adapter of that name.
    """
    if out is not None:
        refuse_existing(Path(out))
    names = adapter_names(model)
    if adapter is None and len(names) != 1:
        raise AdapterpackError("the model holds several adapters or none", found=", ".join(names) or "none",
                               remedy="name one with adapter=")
    chosen = adapter or names[0]
    parts = parts_of(model, chosen)
    checkpoint = _checkpoint(model, base)
    config = getattr(model, "config", None)
    task = task_of(type(model).__name__)
    labels = labels_of(model, chosen)
    if labels is None and task.labelled and config is not None and parts.full:
        labels = tuple(config.id2label[i] for i in sorted(config.id2label))
    pack = build(
        name or (Path(out).name if out is not None else chosen),
        parts.method,
        parts.adapters,
        shared=parts.shared,
        full=parts.full,
        task=m.Task(task.name, type(model).__name__ if config is not None else None, labels),
        base=_base(model, checkpoint),
        weights={**{site.path: site.path if is_bare(site.kind) else f"{site.path}.weight" for site in parts.adapters},
                 **{path: f"{path}.weight" for path in parts.full}} if checkpoint is None
        else {path: checkpoint.weight_name(path) for path in [*(site.path for site in parts.adapters), *parts.full]},
        canary=make_canary(model, chosen),
        training=dict(training or {}),
        metrics=metrics,
    )
    return pack if out is None else pack.write(out)


def verify_canary(model: nn.Module, pack: Pack) -> float:
    """Replays the canary of ``pack`` on a model that it is attached to (by its name), without and with the adapter; the largest error.

    The model is afterwards as it was. In half precision the tolerance grows by what that precision rounds away.

    Raises:
        UnknownAdapter: the pack is not attached under its name.
        NothingToDo: the pack carries no canary; or the adapter has no effect.
        BaseMismatch: without the adapter the model already gives other logits.
        ParityError: with the adapter it gives other logits.
    """
    recorded = pack.manifest.canary
    if recorded is None:
        raise NothingToDo("the pack carries no canary", where=pack.name, remedy="save it from a model that takes token ids")
    size = max(abs(value) for row in (*recorded.base, *recorded.adapter) for value in row["logits"])
    rounding = 8 * torch.finfo(next(model.parameters()).dtype).eps * size  # a few roundings of the largest logit
    allowed = dataclasses.replace(recorded, tolerance=max(recorded.tolerance, rounding))
    plain, adapted = _replay(model, pack.name, recorded.input_ids)
    return canary.check(allowed, plain, adapted, where=pack.name)


def require_model_base(model: nn.Module, pack: Pack) -> None:
    """Checks that ``model`` holds the base that ``pack`` was made for: by the checkpoint it came from, else by its own tensors.

    Raises:
        BaseMismatch: it does not.
    """
    checkpoint = _checkpoint(model, None)
    if checkpoint is not None:
        pack.require_base(checkpoint)
    elif any(identity.levels(pack.manifest.base)):
        pack.require_levels(_model_fingerprint(model), name=None, where=type(model).__name__)


def make_canary(model: nn.Module, name: str) -> m.Canary | None:
    """A canary of one adapter, or None for a model that takes no token ids."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if not vocabulary:
        return None
    ids = canary.inputs(vocabulary)
    return canary.record(ids, *_replay(model, name, ids))


def _replay(model: nn.Module, name: str, ids: tuple[tuple[int, ...], ...]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The rows without and with the adapter; its trained head is on in both."""
    with only(model, name):
        adapted = canary_rows(model, ids)
        for module in model.modules():
            if isinstance(module, Adapted):
                module.active = ()
        return canary_rows(model, ids), adapted


def canary_rows(model: nn.Module, ids: tuple[tuple[int, ...], ...]) -> list[np.ndarray]:
    """The model's logits at the last position for each row of ids, run one by one, as float32."""
    device = next(model.parameters()).device
    rows = []
    for row in ids:
        with torch.no_grad():
            output = model(input_ids=torch.tensor([row], device=device))
        values = output.logits if hasattr(output, "logits") else output[0]
        rows.append((values[0, -1] if values.ndim == 3 else values[0]).float().cpu().numpy())
    return rows


@contextmanager
def only(model: nn.Module, name: str | None) -> Iterator[None]:
    """The model in evaluation mode with one adapter (or none) active; as it was before afterwards."""
    modes = {module: module.training for module in model.modules()}
    before = {module: module.active for module in modes if isinstance(module, Wrapper)}
    try:
        active(model, name)
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for wrapper, names in before.items():
            wrapper.active = names


def _checkpoint(model: nn.Module, base: str | os.PathLike[str] | None) -> Checkpoint | None:
    source = base or getattr(getattr(model, "config", None), "_name_or_path", None)
    return Checkpoint(folder_of(source)) if source else None


def _base(model: nn.Module, checkpoint: Checkpoint | None) -> m.Base:
    config = getattr(model, "config", None)
    found = checkpoint.fingerprint() if checkpoint else _model_fingerprint(model)
    name, commit = (checkpoint.name, checkpoint.commit) if checkpoint else (None, None)
    return m.Base(name, commit, getattr(config, "model_type", None), found.structure, found.content)


def _model_fingerprint(model: nn.Module) -> fp.Fingerprint:
    """The fingerprint of a model that came from no checkpoint: that of the checkpoint which it would give, tied weights once."""
    tensors, seen = [], set()
    for path, module in own_modules(model):
        passing = module._non_persistent_buffers_set
        own = [*module._parameters.items(), *((leaf, value) for leaf, value in module._buffers.items() if leaf not in passing)]
        for leaf, value in own:
            if value is None or id(value) in seen:
                continue
            seen.add(id(value))
            raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            name = str(value.dtype).removeprefix("torch.")
            tensors.append((f"{path}.{leaf}".lstrip("."), DTYPE_NAMES.get(name, name), tuple(value.shape), memoryview(raw)))
    return fp.in_memory(tensors)
