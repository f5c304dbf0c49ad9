"""Quantizes keys and values of the engine's graph to int8: one scale for each channel of each head, measured
on the model's own answers.

``GroupQueryAttention`` writes ``round(x / scale)`` into the cache and multiplies by the scale when it reads.
The scales are constants of the graph, measured on the base and on every adapter of the bundle; a number
beyond the range of its channel's scale saturates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ..adapter_methods import Tensors
from ..bundle import DECODER, graph_file
from ..errors import ParityError, Unsupported
from ..graph_passes import make_int8
from ..io import Json
from ..runtime import Session, context_of
from ..runtime.engine import AdapterReader, ModelRunner, SequenceState
from ..runtime.sessions.measured_texts import texts
from ..tasks import Arrays

_TOLERANCE = 0.1
"""How far the logits may move, as a share of the largest; the same as for int8 weights."""
_MARGIN, _LEAST = 1.25, 1e-6
"""The headroom of a channel's range above the largest measured number, and the smallest scale."""
_STEPS, _ROOM = 24, 32
"""Tokens generated after each prompt, and positions reserved for the prompts of adapters."""
_MIXED, _LENGTH = 4, 64
"""Number and length of rows of random tokens that are measured too, since answers repeat themselves."""


class _Run(NamedTuple):
    """The results of one run: logits ``[adapters, rows, 1 + steps, vocabulary]``, the tokens of the steps,
    and for each cache the largest magnitude of each channel.
    """

    logits: np.ndarray
    tokens: np.ndarray
    largest: Tensors


def quantize_cache(folder: Path) -> Json:
    """Makes the caches of the engine's graph int8, measures how much that moves its logits, and returns the
    manifest's entry.

    Raises:
        Unsupported: the model has no keys and values, or more than ONNX Runtime's attention reads them.
        ParityError: the logits move too far.
    """
    before = _run(folder)
    model = ir.load(folder / graph_file(DECODER))
    scales = {name: np.maximum(_MARGIN / 127 * most, _LEAST) for name, most in before.largest.items()}
    if not make_int8(model, {name: scale.astype(np.float32) for name, scale in scales.items()}):
        raise Unsupported(
            "caches in eight bits hold keys and values that attention alone reads, and this model keeps none",
            where=folder.name,
            remedy="leave --cache out",
        )
    ir.save(model, folder / graph_file(DECODER))
    change = _run(folder, before.tokens).logits - before.logits
    moved = float(np.abs(change).max()) / float(np.abs(before.logits).max())
    if not moved <= _TOLERANCE:
        raise ParityError(
            "caches in eight bits move the logits too far",
            where=folder.name,
            found=f"{moved:.2g} of the largest",
            expected=f"at most {_TOLERANCE}",
            remedy="leave --cache out",
        )
    same = np.argmax(before.logits + change, axis=-1) == np.argmax(before.logits, axis=-1)
    return {
        "type": "int8",
        "max_relative": moved,
        "label_agreement": float(same.mean()),
        "relative": float(np.sqrt(np.square(change).mean() / np.square(before.logits).mean())),
    }


def _run(folder: Path, tokens: np.ndarray | None = None) -> _Run:
    """Runs the base and every adapter on the measuring rows: once followed by their likeliest tokens, and
    once by random tokens, which do not count for the scales; or by the given ``tokens``.
    """
    session = Session(folder, provider="cpu", verify="off", mapped=True)
    reader = AdapterReader(session)
    prompts = texts(session)
    prompts, natural, rng = [*prompts, *prompts], len(prompts), np.random.default_rng(7)
    longest = max(map(len, prompts))
    room = (context_of(session) or _LENGTH + _ROOM) - _ROOM
    length = max(1, min(_LENGTH, room))
    count = max(1, min(_STEPS, room - longest))
    batch = ModelRunner(session, reader, len(prompts), max(length, longest + count) + _ROOM)
    packs = [None, *(session.packs.values() if session.bundle.mode == "bank" else ())]
    logits = []
    chosen = []
    largest = dict[str, np.ndarray]()
    for number, pack in enumerate(packs):
        adapter = None if pack is None else reader.read(pack)
        rows = [SequenceState(prompt=prompt, adapter=adapter) for prompt in prompts]
        steps = _answer(batch, rows, natural, rng, [None] * count if tokens is None else tokens[number])
        logits.append([one for one, _ in steps])
        chosen.append([one for _, one in steps[1:]])
        _enlarge(largest, batch, rows[:natural])
        for row in rows:
            batch.remove(row)
        if tokens is None:
            mixed = [
                SequenceState(prompt=ids.tolist(), adapter=adapter)
                for ids in rng.integers(1, steps[0][0].shape[-1], (_MIXED, length))
            ]
            for row in mixed:
                batch.admit(row)
                batch.prefill(len(row.prompt))
            _enlarge(largest, batch, mixed)
            for row in mixed:
                batch.remove(row)
    return _Run(np.array(logits, np.float32), np.array(chosen), largest)


def _enlarge(largest: Arrays, batch: ModelRunner, rows: Sequence[SequenceState]) -> None:
    """Raises the largest magnitudes to those in the caches of the batch's first rows."""
    for place, row in enumerate(rows):
        for name, numbers in batch.read_cache(place, row.kv_len).items():
            largest[name] = np.maximum(largest.get(name, 0), np.abs(numbers).max(axis=1).astype(np.float32))


def _answer(
    batch: ModelRunner,
    rows: Sequence[SequenceState],
    natural: int,
    rng: np.random.Generator,
    tokens: Sequence[np.ndarray | None],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Yields after the prompts and after each step the logits ``[rows, vocabulary]`` and the tokens that were
    fed (none for the prompts).
    """
    for row in rows:
        batch.admit(row)
    logits = np.stack([batch.prefill(len(row.prompt)).copy() for row in rows])
    steps = [(logits, np.empty(0))]
    for given in tokens:
        random = rng.integers(1, logits.shape[-1], len(rows) - natural)
        chosen = np.append(logits[:natural].argmax(-1), random) if given is None else given
        for row, token in zip(rows, chosen, strict=True):
            row.next_token = int(token)
        logits = batch.decode()
        steps.append((logits, chosen))
    return steps
