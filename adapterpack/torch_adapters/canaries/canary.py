"""Records the canary of an adapter in a torch model when it is packed, and replays it when it is attached."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ...adapter_methods import Acts, Arrays
from ...errors import NothingToDo
from ...manifest import Canary
from ...pack import Pack, canary
from ...tasks import sound_of
from ..layers import adapted_layers, base_modules, device_of, evaluating, is_loaded
from .inputs import image_of, inputs_of, misfit, texts_alone, token_types

log = logging.getLogger(__name__)

_ROUNDINGS = 8
"""How many rounding errors of its precision a model's logits may be off."""

_MATMUL = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}
"""Maps the setting of ``torch.set_float32_matmul_precision`` to the relative error that it permits: none,
TensorFloat32's, or bfloat16's.
"""

Rows = list[np.ndarray]
Outputs = list[Arrays]


def make_canary(model: nn.Module, name: str) -> Canary | None:
    """Records a canary of one adapter; returns None for a model that takes neither token ids, images nor
    speech, or whose outputs differ from run to run.

    Some models need further inputs that their config does not describe. If such a model refuses images or
    speech alone, it gets a canary of texts, or none where the adapter does not change these; the log says
    so.
    """
    acts = next((layer._held[name].config.acts for layer in adapted_layers(model, name)), None)
    inputs = inputs_of(model, acts)
    if inputs is None:
        return None
    try:
        base, adapted = _outputs(model, name, inputs)
    except Exception as error:
        if texts_alone(model):
            raise
        found = _of_texts(model, name, inputs, acts)
        log.warning(
            "'%s' has %s: the model does not run on %s: %s",
            name,
            "no canary" if found is None else "a canary of texts alone",
            ", ".join(sorted(canary.input_names(inputs))),
            error,
        )
        if found is None:
            return None
        inputs, base, adapted = found
    if (inputs.pixels is not None or inputs.features is not None) and _draws(model, name, inputs, adapted):
        log.info("'%s' has no canary: the model gives other outputs for the same image", name)
        return None
    rows = _rows(base), _rows(adapted)
    return canary.record(
        inputs,
        *rows,
        places=canary.places(adapted[0], *rows),
        coarse=coarse(model),
        dtype={torch.bfloat16: "bfloat16", torch.float16: "float16"}.get(_coarsest(model), "float32"),
    )


def _of_texts(
    model: nn.Module, name: str, inputs: Canary, acts: Acts | None
) -> tuple[Canary, Outputs, Outputs] | None:
    """Returns a canary of texts for a model that did not run on ``inputs`` with images, with its outputs;
    None if it does not run on these either, or the adapter does not change them.
    """
    alone = None if inputs.pixels is None else inputs_of(model, acts, seeing=False)
    if alone is None:
        return None
    try:
        base, adapted = _outputs(model, name, alone)
    except Exception:  # the model's own code may raise anything on generated inputs
        return None
    return None if all(map(np.array_equal, _rows(base), _rows(adapted))) else (alone, base, adapted)


def verify_canary(model: nn.Module, pack: Pack, name: str | None = None) -> float:
    """Replays the canary of ``pack`` on a model that it is attached to, without and with the adapter, and
    returns the largest error.

    ``name`` is the adapter's name in the model, by default the pack's. Leaves the model as it was. The
    tolerance grows with what half precision rounds away, and on a quantized base up to half of the largest
    logit; an adapter without any effect is detected all the same.

    Raises:
        UnknownAdapter: the pack is not attached under its name.
        NothingToDo: the pack carries no canary, or one of inputs that the model does not take; or the adapter
            has no effect.
        BaseMismatch: without the adapter the model already gives other logits.
        ParityError: with the adapter it gives other logits.
    """
    recorded = pack.manifest.canary
    if recorded is None:
        raise NothingToDo(
            "the pack carries no canary",
            where=pack.name,
            remedy="save it from a model that takes token ids, images or speech",
        )
    if (reason := misfit(model, recorded)) is not None:
        raise NothingToDo(
            f"the canary cannot be replayed on this model: {reason}",
            where=pack.name,
            found=type(model).__name__,
            expected=pack.manifest.task.architecture,
            remedy="replay it on the model that the pack was made for",
        )
    base, adapted = _outputs(model, name or pack.name, recorded)
    return canary.check(
        canary.widen(recorded, coarse=coarse(model)), _rows(base), _rows(adapted), where=pack.name
    )


def verify_attached(model: nn.Module, pack: Pack, name: str) -> float | None:
    """Replays the canary like :func:`verify_canary` if this model can replay it; otherwise logs why not and
    returns None.

    Raises:
        NothingToDo, BaseMismatch, ParityError: see :func:`verify_canary`.
    """
    reason = _not_replayable(model, pack)
    if reason is None:
        return verify_canary(model, pack, name)
    log.info("the canary of '%s' is not replayed: %s", pack.name, reason)
    return None


def coarse(model: nn.Module) -> float:
    """Returns which share of the largest logit the model's own arithmetic may round away: a few rounding
    errors, or more on a quantized base.
    """
    if (
        getattr(getattr(model, "config", None), "quantization_config", None)
        or not _coarsest(model).is_floating_point
    ):
        return canary.QUANTIZED
    return min(
        canary.QUANTIZED,
        _ROUNDINGS
        * max(float(torch.finfo(_coarsest(model)).eps), _MATMUL[torch.get_float32_matmul_precision()]),
    )


def _not_replayable(model: nn.Module, pack: Pack) -> str | None:
    """Returns why this model cannot replay the canary of ``pack``, or None if it can."""
    recorded = pack.manifest.canary
    architecture = pack.manifest.task.architecture
    if recorded is None:
        return "the pack carries none"
    if architecture is not None and architecture not in {kind.__name__ for kind in type(model).__mro__}:
        return f"it was recorded on {architecture}, this is {type(model).__name__}"
    if not is_loaded(model):
        return "the model's weights are not loaded"
    return misfit(model, recorded)


def _coarsest(model: nn.Module) -> torch.dtype:
    """Returns the least precise dtype of the base's parameters; an integer dtype, as of quantized weights,
    counts as less precise than any float.
    """
    dtypes = {
        parameter.dtype for _, module in base_modules(model) for parameter in module.parameters(recurse=False)
    }
    whole = [dtype for dtype in dtypes if not dtype.is_floating_point]
    return whole[0] if whole else max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _outputs(model: nn.Module, name: str, inputs: Canary) -> tuple[Outputs, Outputs]:
    """Returns the model's outputs without and with the adapter; modules that it trained in full, such as a
    head, are active in both.
    """
    with evaluating(model, name):
        adapted = _run(model, inputs)
        for layer in adapted_layers(model):
            layer._active = ()
        return _run(model, inputs), adapted


def _draws(model: nn.Module, name: str, inputs: Canary, adapted: Outputs) -> bool:
    """Whether the model is random even in evaluation mode, as one that masks random patches of an image
    is.
    """
    with evaluating(model, name):
        return not all(map(np.array_equal, _rows(adapted), _rows(_run(model, inputs))))


def examples_of(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yields inputs that a model can be called with, one row each; none for a model whose inputs no canary
    covers.
    """
    inputs = inputs_of(model)
    return iter(()) if inputs is None else _tensors(model, inputs)


def _tensors(model: nn.Module, inputs: Canary) -> Iterator[dict[str, Tensor]]:
    """Yields the inputs row by row, on the model's device and in its precision."""
    dtype = next(
        (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), torch.float32
    )
    device = device_of(model)
    sound = sound_of(model)
    for feed in canary.feeds(inputs, image_of(model, inputs), None if sound is None else sound.name):
        tensors = {key: torch.from_numpy(value).to(device) for key, value in feed.items()}
        if "input_ids" in tensors:
            tensors |= token_types(model, tensors["input_ids"])
        yield {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}


def _run(model: nn.Module, inputs: Canary) -> Outputs:
    """Runs the rows one at a time and returns the model's outputs by name, as float32."""
    outputs = []
    for tensors in _tensors(model, inputs):
        with torch.no_grad():
            output = model(**tensors)
        plain = {"logits": getattr(output, "logits", output[0] if isinstance(output, tuple) else output)}
        named = output if isinstance(output, Mapping) else plain
        outputs.append(
            {key: value.float().cpu().numpy() for key, value in named.items() if isinstance(value, Tensor)}
        )
    return outputs


def _rows(outputs: Outputs) -> Rows:
    return [canary.row_of(output) for output in outputs]
