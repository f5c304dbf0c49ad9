"""Runs a graph and its torch model on the same batch, and then on one more token with the cache from that
run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutput

from ...adapter_methods import Tensors
from ...adapter_methods.core.token_positions import has_acted
from ...bundle import ADAPTER_POSITIONS, ENCODED
from ...pack import Pack
from ...runtime import Session, positions
from ...runtime.adapters import Names
from ...runtime.media import GRIDS, IMAGES, OFFSETS, PIXELS, take_images
from ...runtime.sessions.decoder import next_cache
from ...tasks import FRAMES, REREADS, SPANS, Arrays, Task
from ...torch_adapters import attach, detach
from ...torch_adapters.canaries.inputs import token_types
from ..tracing.layer_state import is_recurrent, own_mask, whole_cache
from ..tracing.torch_parts import first_position

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STEP = 5
"""The id of the token to step with."""
BARE = (1,)
"""The rows of the batch without an image, where images come with text."""


STEP = "step"
"""The name of the logits ``[rows, 1, vocabulary]`` of one more token, among the outputs of a model that
generates.
"""


def run_graph(session: Session, batch: Arrays, names: Names) -> Arrays:
    """Runs the graph on the batch with one adapter, one for each row, or none; and one more token."""
    return run_step(session, batch, session.run(batch, names), names)


def run_step(session: Session, batch: Arrays, outputs: Arrays, names: Names) -> Arrays:
    """Runs one more token of each row on the caches in ``outputs``, and returns both."""
    if not session.task.generates:
        return outputs
    ids, token, step_inputs = _next(batch)
    encoded = {key: array for key, array in outputs.items() if key.startswith(ENCODED)}
    acting = _acting(session, batch, token, names) if ids == "input_ids" else {}
    fed = {key: array for key, array in step_inputs.items() if key in session.inputs}
    if OFFSETS in outputs:
        fed[OFFSETS] = outputs[OFFSETS][:, -1:]
    more = session.run({ids: token, **fed, **encoded, **acting, **next_cache(outputs)}, names)
    return {**outputs, STEP: more["logits"]}


def run_torch(
    task: Task, model: PreTrainedModel, batch: Arrays, packs: Sequence[Pack]
) -> Iterator[tuple[str | None, Arrays]]:
    """Runs the torch model on the batch, without an adapter and then with each of ``packs``."""
    yield None, _run_model(task, model, batch)
    for pack in packs:
        attach(model, pack, check_base=False)
        yield pack.name, _run_model(task, model, batch)
        detach(model, pack.name)


def run_alone(
    task: Task, model: PreTrainedModel, rows: Sequence[Arrays], packs: Sequence[Pack | None], kept: int
) -> list[Arrays]:
    """Runs the torch model on each row by itself, with its pack; returns logits of the last ``kept``
    positions, or of all.
    """
    found: dict[int, Arrays] = {}
    for pack in {id(pack): pack for pack in packs}.values():
        if pack is not None:
            attach(model, pack, check_base=False)
        found |= {
            number: _run_model(task, model, rows[number], kept)
            for number, own in enumerate(packs)
            if own is pack
        }
        if pack is not None:
            detach(model, pack.name)
    return [found[number] for number in range(len(rows))]


def _reread(model: PreTrainedModel, ids: np.ndarray, kept: int) -> Arrays:
    """Runs a row without a cache, and again with one more token."""
    longer = np.concatenate([ids, np.full((1, 1), _STEP)], 1)
    plain = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}
    found = [_torch(model, {"input_ids": one}, **plain).logits.float().numpy() for one in (ids, longer)]
    return {"logits": found[0][:, -kept:], STEP: found[1][:, -1:]}


def _run_model(task: Task, model: PreTrainedModel, batch: Arrays, kept: int = 0) -> Arrays:
    if task.main.form == REREADS:
        shown = batch["attention_mask"]
        rows = [_reread(model, row_of(batch, row)["input_ids"], kept) for row in range(len(shown))]
        return {key: _pad_rows([row[key] for row in rows], shown) for key in rows[0]}
    mask = batch.get("attention_mask")
    parameters = signature(model.forward).parameters
    apart = is_recurrent(model) or "position_ids" not in parameters or _counts_itself(model)
    if task.pads_left and mask is not None and not mask.all() and apart:
        # padding gets into the states or the positions of some models, so each row runs alone
        token = model.config.image_token_id if "image_features" in task.main.inputs else None
        rows = [_run_model(task, model, row_of(batch, row, token), kept) for row in range(len(mask))]
        return {key: _pad_rows([row[key] for row in rows], mask) for key in rows[0]}
    # with grids the model counts in time, height and width by itself
    counted = "position_ids" in parameters and GRIDS not in batch
    first = batch
    if "image_features" in task.main.inputs:
        types = token_types(model, torch.from_numpy(batch["input_ids"]))
        first = {**batch, **{key: one.numpy() for key, one in types.items()}}
    if task.generates and counted and "decoder_input_ids" not in batch:
        first = {**first, "position_ids": positions(batch["attention_mask"]) + first_position(model)}
    keeping = {"logits_to_keep": kept} if kept and "logits_to_keep" in parameters else {}
    caching: dict[str, Any] = {"use_cache": True} if task.generates else {}
    if task.generates and not task.has_encoder and (whole := whole_cache(model)) is not None:
        caching["cache" if "cache" in parameters else "past_key_values"] = whole
    result = _torch(model, first, **caching, **keeping)
    outputs = {key: value.float().numpy() for key, value in result.items() if isinstance(value, torch.Tensor)}
    if not task.generates:
        return outputs
    ids, token, step_inputs = _next(batch)
    # the name depends on the version of transformers
    cache = "cache" if "cache" in result else "past_key_values"
    more = {cache: result[cache], "use_cache": True}
    if ids != "input_ids":
        more["encoder_outputs"] = BaseModelOutput(result["encoder_last_hidden_state"])
    else:
        step_inputs["attention_mask"] = own_mask(result[cache], step_inputs["attention_mask"], 1)
    if "position_ids" in step_inputs:
        step_inputs["position_ids"] += first_position(model)
    feed = {key: array for key, array in step_inputs.items() if counted or key != "position_ids"}
    if GRIDS in batch:
        moved = step_inputs["position_ids"] + model.base_model.rope_deltas.numpy()
        feed["position_ids"] = np.broadcast_to(moved, (3, *moved.shape)).copy()
    outputs[STEP] = _torch(model, {ids: token, **feed}, **more).logits.float().numpy()
    return outputs


def _counts_itself(model: PreTrainedModel) -> bool:
    """Whether layers also count positions by their cache, which has the padding in it (Llama 4)."""
    return any(getattr(module, "attn_temperature_tuning", False) for module in model.modules())


def _pad_rows(rows: Sequence[np.ndarray], mask: np.ndarray) -> np.ndarray:
    """Returns outputs of rows that ran alone at the places of their tokens in a batch with this mask."""
    if len({row.shape for row in rows}) == 1:  # one output for each row
        return np.concatenate(rows)
    together = np.zeros((*mask.shape, *rows[0].shape[2:]), rows[0].dtype)
    for row, (array, shown) in enumerate(zip(rows, mask > 0, strict=True)):
        together[row, shown] = array[0]
    return together


def _torch(model: PreTrainedModel, batch: Tensors, **more: Any) -> Any:
    with torch.no_grad():
        return model(**{key: torch.from_numpy(value) for key, value in batch.items()}, **more)


def _next(batch: Arrays) -> tuple[str, np.ndarray, Arrays]:
    """Returns the name of the step's ids input, the step's token, and its other inputs."""
    ids = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    token = np.full((batch[ids].shape[0], 1), _STEP, np.int64)
    if ids != "input_ids":
        return ids, token, {key: batch[key] for key in ("attention_mask",) if key in batch}
    mask = np.concatenate([batch["attention_mask"], np.ones_like(token)], axis=1)
    return ids, token, {"attention_mask": mask, "position_ids": positions(mask)[:, -1:]}


def _acting(session: Session, batch: Arrays, token: np.ndarray, names: Names) -> Arrays:
    """Returns the adapter positions of a step after the batch, if the graph has that input."""
    if ADAPTER_POSITIONS not in session.inputs:
        return {}
    by_row = [names] * len(token) if names is None or isinstance(names, str) else list(names)
    before = has_acted(session.acting(batch, by_row), None)
    return {
        ADAPTER_POSITIONS: session.acting(
            {"input_ids": token, "attention_mask": np.ones_like(token)}, by_row, before
        )
    }


def row_of(batch: Arrays, row: int, token: int | None = None) -> Arrays:
    """Returns one row of a batch with all of its inputs, without its padding. ``token`` is that of images in
    texts: each image has its tokens in a run of its own.

    Example:
        >>> mask = np.array([[1, 1], [0, 1]])
        >>> row_of({"input_ids": np.array([[3, 4], [0, 5]]), "attention_mask": mask}, 1)["input_ids"].tolist()
        [[5]]
    """
    images = IMAGES if token is not None else ()
    single = {key: array[row : row + 1] for key, array in batch.items() if key not in images}
    if "attention_mask" in batch:
        real = batch["attention_mask"][row] > 0
        single |= {
            key: array[:, real]
            for key, array in single.items()
            if array.shape[1] == len(real) and key != "decoder_input_ids"
        }
    if token is not None and PIXELS in batch:
        seen = np.pad(batch["input_ids"] == token, ((0, 0), (1, 0))).astype(int)
        ends = (np.diff(seen) == 1).sum(1).cumsum()
        numbers = range(ends[row - 1] if row else 0, ends[row])
        single |= take_images(batch, numbers) if numbers else {}
    return single


def real_positions(key: str, output: np.ndarray, batch: Arrays) -> np.ndarray | None:
    """Returns which positions of an output are not padding, ``[rows, positions]``; None where each row has
    one vector.
    """
    mask = batch.get("attention_mask")
    frames = batch.get(FRAMES)
    if frames is not None and output.ndim == 3:
        return np.asarray(np.arange(output.shape[1]) < frames)
    if key in SPANS and mask is not None:
        return np.asarray(mask > 0)
    if output.ndim < 3:
        return None
    if "decoder_input_ids" in batch or mask is None or output.shape[:2] != mask.shape:
        return np.ones(output.shape[:2], bool)
    return mask > 0
