"""No graph leaves unproved: the exported session against torch, base and every adapter, on a ragged padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import ParityError
from ..methods import acted
from ..pack.pack import Pack
from ..runtime import canary
from ..runtime.bundle import ADAPTER_POSITIONS, PRESENT
from ..runtime.decoding import grown
from ..runtime.feeds import ENCODED
from ..runtime.precision import NONE_BELOW, precision
from ..runtime.session import Arrays, Session, positions
from ..tasks import SPANS, Task
from .examples import LENGTHS, example

BARE = (1,)
"""The rows of the batch that have no image, where images go with text."""
_STEP = 5
"""The token of a step on a cache."""


class Found(NamedTuple):
    """How a graph compares with torch: the largest error, the largest size, and the share of real positions with the same argmax."""

    error: float
    scale: float
    agreement: float

    @property
    def relative(self) -> float:
        """The error as a share of the size, or as it is where that is below one."""
        return self.error / max(1.0, self.scale)


def prove(folder: Path, model: Any, task: Task, packs: list[Pack]) -> dict[str, Any]:
    """What the parity report says of the bundle in ``folder`` beside ``model``, its reference in torch: for the base and each adapter
    the largest error, absolute and relative, and the agreement of argmax.

    Models that generate also take one step on their cache. ``mixed`` is the largest difference between rows that each use another adapter
    and the same rows of a batch with one; ``alone`` that between rows of a batch and the same rows by themselves, without padding. The
    canaries that the packs bring are replayed as well, on the graph alone: they know the base and the adapter from when the pack was
    made, which the torch model of this machine does not.

    Raises:
        ParityError: a difference is over the tolerance, or a canary fails.
        BaseMismatch: by its canary, a pack was made for another base.
        NothingToDo: by its canary, an adapter has no effect.
    """
    from ..train.inject import attach, detach  # noqa: PLC0415 - torch only where a graph is proved

    session = Session(folder, provider="cpu", mapped=True)
    tolerance = precision(session.bundle.dtype).tolerance
    rules = [rule for rule in {pack.acts for pack in packs} if rule is not None]
    batch = example(task, model, acts=rules, bare=BARE, left=session.left)
    single: dict[str | None, Arrays] = {}
    found: dict[str, Found] = {}
    for pack in (None, *packs):
        name = None if pack is None else pack.name
        if pack is not None:
            attach(model, pack, check_base=False)
        one, single[name] = _compare(session, model, batch, name)
        found[name or _base_name(session)] = one
        _require(one.error, one.scale, tolerance, f"torch for {name or 'the base'}", folder)
        if pack is not None:
            detach(model, pack.name)
    scale = max(one.scale for one in found.values())
    mixed = _mixed(session, batch, single)
    _require(mixed or 0.0, scale, tolerance, "itself when rows of one batch use different adapters", folder)
    alone = _alone(session, batch, single)
    _require(alone, scale, tolerance, "itself when a row runs alone", folder)
    return {
        "tolerance": tolerance,
        "batch": list(LENGTHS),
        "max_abs": {name: one.error for name, one in found.items()},
        "max_relative": {name: one.relative for name, one in found.items()},
        "argmax_agreement": {name: one.agreement for name, one in found.items()},
        "mixed": mixed,
        "alone": alone,
        "canary": canary.verify(session),
    }


def _require(error: float, scale: float, tolerance: float, other: str, folder: Path) -> None:
    allowed = tolerance * max(1.0, scale)
    if not error <= allowed:  # NaN is no agreement either
        raise ParityError(f"the graph disagrees with {other}", where=folder.name, expected=f"at most {allowed:.2g}", found=f"{error:.2g}")


def _base_name(session: Session) -> str:
    """What rows without an adapter have: the base, or whatever was folded into it."""
    return "+".join(session.packs) if session.bundle.mode == "folded" and session.packs else "base"


def _compare(session: Session, model: Any, batch: Arrays, name: str | None) -> tuple[Found, Arrays]:
    """One pass, and of a model that generates the next one on its cache."""
    expected = _torch(model, batch, use_cache=True) if session.task.generates else _torch(model, batch)
    outputs = session.run(batch, name)
    pairs = [(key, outputs[key], expected[key].float().numpy()) for key in outputs if key in expected]
    if not pairs:
        raise ParityError("the graph has none of the model's outputs", where=session.folder.name, expected=", ".join(expected),
                          found=", ".join(outputs))
    found = [_difference(output, reference, _real(key, output, batch)) for key, output, reference in pairs]
    if session.task.generates:
        found.append(_step(session, model, batch, name, outputs, expected))
    inner = {key for graph in session.graphs.values() for key in graph.inputs}
    return _worst(found), {key: array for key, array in outputs.items() if key not in inner and not key.startswith(PRESENT)}


def _torch(model: Any, batch: Mapping[str, np.ndarray], **more: Any) -> Any:
    import torch  # noqa: PLC0415 - see above

    given = {key: torch.from_numpy(value) for key, value in batch.items()}
    if more and "input_ids" in batch and "decoder_input_ids" not in batch and "position_ids" in signature(model.forward).parameters:
        given.setdefault("position_ids", torch.from_numpy(positions(batch["attention_mask"])))
    with torch.no_grad():
        return model(**given, **more)


def _step(session: Session, model: Any, batch: Arrays, name: str | None, outputs: Arrays, expected: Any) -> Found:
    """The logits of one more token on the cache that the first pass gave."""
    ids = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    token = np.full((batch[ids].shape[0], 1), _STEP, np.int64)
    known = {key: array for key, array in outputs.items() if key.startswith(ENCODED)}
    cache = "cache" if "cache" in expected else "past_key_values"  # its name in newer and older versions of transformers
    more: dict[str, Any] = {cache: expected[cache], "use_cache": True}
    given = {key: batch[key] for key in ("attention_mask",) if key in batch}
    if ids == "input_ids":
        given = {"attention_mask": np.concatenate([batch["attention_mask"], np.ones_like(token)], axis=1)}
        given["position_ids"] = positions(given["attention_mask"])[:, -1:]
        known |= _acting(session, batch, token, name)
    else:
        from transformers.modeling_outputs import BaseModelOutput  # noqa: PLC0415 - see above

        more["encoder_outputs"] = BaseModelOutput(expected["encoder_last_hidden_state"])
    counted = ids != "input_ids" or "position_ids" in signature(model.forward).parameters
    feed = {key: array for key, array in given.items() if counted or key != "position_ids"}
    second = _torch(model, {ids: token, **feed}, **more)
    taken = {key: array for key, array in given.items() if key in session.inputs}
    after = session.run({ids: token, **taken, **known, **grown(outputs)}, name)
    return _difference(after["logits"], second.logits.float().numpy(), np.ones(token.shape, bool))


def _acting(session: Session, batch: Arrays, token: np.ndarray, name: str | None) -> Arrays:
    """Where the adapter acts in a step after the batch, if the graph asks."""
    if ADAPTER_POSITIONS not in session.inputs:
        return {}
    names: list[str | None] = [name] * len(token)
    before = acted(session.acting(batch, names), None)
    return {ADAPTER_POSITIONS: session.acting({"input_ids": token, "attention_mask": np.ones_like(token)}, names, before)}


def _real(key: str, output: np.ndarray, batch: Arrays) -> np.ndarray | None:
    """Which positions of an output are no padding, ``[rows, positions]``; None where each row has one vector."""
    mask = batch.get("attention_mask")
    if key in SPANS and mask is not None:
        return np.asarray(mask > 0)
    if output.ndim < 3:
        return None
    if "decoder_input_ids" in batch or mask is None or output.shape[:2] != mask.shape:
        return np.ones(output.shape[:2], bool)
    real: np.ndarray = mask > 0
    return real


def _worst(found: Sequence[Found]) -> Found:
    """The largest errors and the smallest agreement; NaN stays NaN, which ``max`` would lose."""
    error, scale, _ = np.max(found, axis=0)
    return Found(float(error), float(scale), min(one.agreement for one in found))


def _difference(output: np.ndarray, reference: np.ndarray, real: np.ndarray | None) -> Found:
    """Over real positions; another shape, or a label too many that is not switched off, is all wrong."""
    wide = reference.shape[-1]
    if output.shape[:-1] != reference.shape[:-1] or output.shape[-1] < wide or (output[..., wide:] > NONE_BELOW).any():
        return Found(float("inf"), 0.0, 0.0)
    output = output[..., :wide]
    if real is not None and real.ndim == output.ndim:  # one number a position: the best of each row is one choice
        agreement = float(np.mean([one[row].argmax() == two[row].argmax() for one, two, row in zip(output, reference, real, strict=True)]))
        return Found(float(np.abs(output - reference)[real].max()), float(np.abs(reference[real]).max()), agreement)
    if real is not None:
        output, reference = output[real], reference[real]
    agreement = float((output.argmax(-1) == reference.argmax(-1)).mean())
    return Found(float(np.abs(output - reference).max()), float(np.abs(reference).max()), agreement)


def _mixed(session: Session, batch: Arrays, single: dict[str | None, Arrays]) -> float | None:
    """Rows that each use another adapter, against the same rows of the single runs; None where rows cannot choose."""
    if session.bundle.mode == "folded" or len(single) < 2:
        return None
    names: list[str | None] = [*single]
    count = len(LENGTHS)
    errors = []
    for start in range(0, len(names), count):  # every adapter takes part, even where there are more than rows
        chosen = [names[(start + row) % len(names)] for row in range(count)]
        mixed = session.run(batch, chosen)
        for row, name in enumerate(chosen):
            for key, together in single[name].items():
                real = _real(key, together, batch)
                apart = mixed[key][row][..., : together.shape[-1]]
                errors.append(np.abs(apart - together[row])[slice(None) if real is None else real[row]].max())
    return float(np.max(errors))


def _alone(session: Session, batch: Arrays, single: dict[str | None, Arrays]) -> float:
    """Rows by themselves, without padding, against the same rows of the batch; every row and every adapter takes part."""
    names: list[str | None] = [*single]
    errors = []
    for number in range(max(len(names), len(LENGTHS))):
        row, name = number % len(LENGTHS), names[number % len(names)]
        own = session.run(row_of(batch, row), name)
        for key, together in single[name].items():
            real = _real(key, together, batch)
            expected = together[row] if real is None else together[row][real[row]]
            if own[key][0].shape != expected.shape:
                return float("inf")
            errors.append(np.abs(own[key][0] - expected).max())
    return float(np.max(errors))


def row_of(batch: Arrays, row: int) -> Arrays:
    """One row of a batch with what belongs to it, without its padding.

    Example:
        >>> mask = np.array([[1, 1], [0, 1]])
        >>> row_of({"input_ids": np.array([[3, 4], [0, 5]]), "attention_mask": mask}, 1)["input_ids"].tolist()
        [[5]]
    """
    found = {key: array[row : row + 1] for key, array in batch.items() if key != "pixel_values"}
    if "attention_mask" in batch:
        real = batch["attention_mask"][row] > 0
        found |= {key: found[key][:, real] for key in ("input_ids", "attention_mask", "token_type_ids") if key in found}
    if "pixel_values" in batch:
        fewer = len(batch["pixel_values"]) < len(LENGTHS)  # rows without an image come with text
        place = row - sum(bare < row for bare in BARE) if fewer else row
        if not (fewer and row in BARE):
            found["pixel_values"] = batch["pixel_values"][place : place + 1]
    return found
