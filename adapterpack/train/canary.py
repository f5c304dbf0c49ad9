"""The canary of an adapter in a torch model: recorded when it is packed, replayed when it is attached."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ..errors import NothingToDo
from ..pack import canary
from ..pack.manifest import Canary
from ..pack.pack import Pack
from .inject import active
from .layer import Adapted, Wrapper, own_modules

log = logging.getLogger(__name__)

_ROUNDINGS = 8
"""How many roundings of its precision a model's logits are allowed."""

_MATMUL = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}
"""``torch.set_float32_matmul_precision`` -> what it may round away: nothing of float32, down to TensorFloat32, down to bfloat16."""

Rows = list[np.ndarray]
Outputs = list[dict[str, np.ndarray]]


def make_canary(model: nn.Module, name: str) -> Canary | None:
    """A canary of one adapter, or None for a model that does not take token ids alone."""
    vocabulary = _vocabulary(model)
    if not vocabulary:
        return None
    holders = (module for module in model.modules() if isinstance(module, Adapted) and name in module.methods)
    acts = next((holder.methods[name][1].acts for holder in holders), None)
    ids = canary.inputs(vocabulary, acts)
    base, adapted = _outputs(model, name, ids)
    first = adapted[0]
    features = first["last_hidden_state"].shape[-1] if "last_hidden_state" in first and "logits" not in first else None
    coarsest = _coarsest(model)
    return canary.record(ids, _rows(base), _rows(adapted), features=features, coarse=coarse(model),
                         dtype={torch.bfloat16: "bfloat16", torch.float16: "float16"}.get(coarsest, "float32"))


def verify_canary(model: nn.Module, pack: Pack, name: str | None = None) -> float:
    """Replays the canary of ``pack`` on a model that it is attached to, without and with the adapter; the largest error.

    ``name`` is what the adapter is called in the model, the pack's name by default. The model is afterwards as it was. In half precision
    the tolerance grows by what that precision rounds away, on a quantized base to half of the largest logit; an adapter that changes
    nothing at all is still seen.

    Raises:
        UnknownAdapter: the pack is not attached under its name.
        NothingToDo: the pack carries no canary; or the adapter has no effect.
        BaseMismatch: without the adapter the model already gives other logits.
        ParityError: with the adapter it gives other logits.
    """
    recorded = pack.manifest.canary
    if recorded is None or canary.needs_more(recorded):
        raise NothingToDo("the pack carries no canary of token ids", where=pack.name, remedy="save it from a model that takes token ids")
    base, adapted = _outputs(model, name or pack.name, recorded.input_ids)
    return canary.check(canary.widened(recorded, coarse=coarse(model)), _rows(base), _rows(adapted), where=pack.name)


def verify_attached(model: nn.Module, pack: Pack, name: str) -> None:
    """As :func:`verify_canary` where the canary can be replayed on this model; where it cannot, the log says why.

    Raises:
        NothingToDo, BaseMismatch, ParityError: see :func:`verify_canary`.
    """
    reason = _not_replayable(model, pack)
    if reason is None:
        verify_canary(model, pack, name)
    else:
        log.info("the canary of '%s' is not replayed: %s", pack.name, reason)


def coarse(model: nn.Module) -> float:
    """The share of the largest logit that the model's own arithmetic may round away: a few roundings, or more for a quantized base."""
    if getattr(getattr(model, "config", None), "quantization_config", None) or not _coarsest(model).is_floating_point:
        return canary.QUANTIZED
    return min(canary.QUANTIZED, _ROUNDINGS * max(float(torch.finfo(_coarsest(model)).eps), _MATMUL[torch.get_float32_matmul_precision()]))


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


def _not_replayable(model: nn.Module, pack: Pack) -> str | None:
    """Why the canary of ``pack`` says nothing about this model, or None."""
    recorded, architecture = pack.manifest.canary, pack.manifest.task.architecture
    if recorded is None:
        return "the pack carries none"
    if canary.needs_more(recorded):
        return "it has inputs that are not replayed"
    if architecture is not None and architecture not in {kind.__name__ for kind in type(model).__mro__}:
        return f"it was recorded on {architecture}, this is {type(model).__name__}"
    if max(map(max, recorded.input_ids)) >= _vocabulary(model):
        return "the model does not take its token ids"
    if any(parameter.is_meta for parameter in model.parameters()):
        return "the model's weights are not loaded"
    return None


def _vocabulary(model: nn.Module) -> int:
    """The size of the vocabulary of a model that token ids are enough for, else 0."""
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", "input_ids") != "input_ids" or getattr(config, "is_encoder_decoder", False):
        return 0
    return getattr(config, "vocab_size", None) or 0


def _coarsest(model: nn.Module) -> torch.dtype:
    """The dtype of the model's own parameters that holds least: integers, as quantized weights are, before any float."""
    dtypes = {parameter.dtype for _, module in own_modules(model) for parameter in module.parameters(recurse=False)}
    whole = [dtype for dtype in dtypes if not dtype.is_floating_point]
    return whole[0] if whole else max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _outputs(model: nn.Module, name: str, ids: tuple[tuple[int, ...], ...]) -> tuple[Outputs, Outputs]:
    """The outputs without and with the adapter; its trained head is on in both."""
    with only(model, name):
        adapted = _run(model, ids)
        for module in model.modules():
            if isinstance(module, Adapted):
                module.active = ()
        return _run(model, ids), adapted


def _run(model: nn.Module, ids: tuple[tuple[int, ...], ...]) -> Outputs:
    """The model's outputs by name for each row of ids, run one by one, as float32."""
    device = next(model.parameters()).device
    found = []
    for row in ids:
        with torch.no_grad():
            output = model(input_ids=torch.tensor([row], device=device))
        plain = {"logits": getattr(output, "logits", output[0] if isinstance(output, tuple) else output)}
        named = output if isinstance(output, Mapping) else plain
        found.append({key: value.float().cpu().numpy() for key, value in named.items() if isinstance(value, torch.Tensor)})
    return found


def _rows(outputs: Outputs) -> Rows:
    return [canary.row_of(one) for one in outputs]
