"""Compares the graph for steps on a static cache with the ordinary one: the same rows, adapters and tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle.manifest import STEP, graph_file
from ...errors import ParityError
from ...runtime.generation.decoder import DecoderOnly
from ...runtime.session import Session
from ...slots.precision import precision
from ..example_inputs import LENGTHS
from ..graph.static_cache import write_step

_STEPS = 20
"""So many that a buffer is made anew on the way: 11 tokens have room for 16 more."""
_VOCABULARY = 64
"""Ids of the rows, which every model has."""


def with_steps(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Writes the graph for steps into the bundle's folder, and proves it; what the parity report says of it.

    Raises:
        Unsupported: an attention of the graph is of no known build.
        ParityError: the two graphs disagree.
    """
    write_step(folder)
    session = Session(folder, provider="cpu", verify="off")  # its weights laid out as users have them, since speeds are reported
    tolerance, rng = precision(session.bundle.dtype).tolerance, np.random.default_rng(11)
    rows = [[int(token) for token in rng.integers(1, _VOCABULARY, length)] for length in LENGTHS]
    tokens = rng.integers(1, _VOCABULARY, (_STEPS, len(rows)))
    worst, seconds = 0.0, [0.0, 0.0]
    session.graph(STEP)  # opened before anything is timed
    for names in _names(session):
        grown, placed = (_logits(session, rows, names, tokens, in_place) for in_place in (False, True))
        error, size = float(np.abs(grown[0] - placed[0]).max()), max(1.0, float(np.abs(grown[0]).max()))
        if not error <= tolerance * size:
            raise ParityError("the graph for steps in place disagrees with the ordinary one", where=f"{folder.name}/{graph_file(STEP)}",
                              expected=f"at most {tolerance * size:.2g}", found=f"{error:.2g}", remedy="leave --static-cache out")
        worst, seconds = max(worst, error / size), [so_far + more for so_far, more in zip(seconds, (grown[1], placed[1]), strict=True)]
    slow, fast = (len(rows) * _STEPS * len(_names(session)) / total for total in seconds)
    say(f"steps in place agree with the ordinary graph: {worst:.1g} of the largest output; {fast:.0f} tokens a second, {slow:.0f} without")
    return {"max_relative": worst, "steps": _STEPS}


def _names(session: Session) -> list[list[str | None]]:
    """The base, and every adapter among others where rows of a batch can have their own, else by itself."""
    choices: list[str | None] = [session.default, *session.adapters]
    count = len(LENGTHS)
    if session.bundle.mode == "bank":
        return [[choices[(start + row) % len(choices)] for row in range(count)] for start in range(0, len(choices), count)]
    return [[name] * count for name in dict.fromkeys(choices)]


def _logits(
    session: Session, rows: Sequence[Sequence[int]], names: list[str | None], tokens: np.ndarray, in_place: bool
) -> tuple[np.ndarray, float]:
    """The logits of every step, and the seconds that the steps took."""
    going = DecoderOnly(session, rows, names, {}, in_place)
    outputs = going.prefill()
    started, logits = time.perf_counter(), list[np.ndarray]()
    for step_tokens in tokens:
        outputs = going.step(step_tokens, outputs)
        logits.append(outputs["logits"].numpy().astype(np.float32))
    return np.stack(logits), time.perf_counter() - started
