"""The canary: fixed inputs and the logits that they must give, so that a wrong base or an adapter without
effect is seen on any runtime.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from msgspec.structs import replace

from ..adapter_methods.core.token_positions import Acts
from ..errors import BaseMismatch, NonFinite, NothingToDo, ParityError
from ..manifest.structs import Canary, TopLogits
from ..manifest.synthetic_inputs import make_row

TOP = 8
LENGTHS = (9, 5)
"""How many ids a row has; of a decoder's, too, because some heads look where the encoder's ids end."""
SEED = 20260101
RELATIVE_TOLERANCE = 2e-3
"""float32 on another runtime moves logits by about 1e-6 of their size; a wrong base moves them by its
size.
"""
SMALLEST_TOLERANCE = 2e-5
"""Relative too: what a weak adapter's canary, which must still tell the adapter from the base, is never
below.
"""
QUANTIZED = 0.5
"""Relative too: 4-bit weights move logits by a tenth to a fifth of their size; noise of a third of the
weights by three quarters of it.
"""
MOST = 1 << 24
"""How many numbers a row by recipe may have: 64 MiB. A manifest from a stranger may ask for any number."""
LARGEST_IMAGE, LARGEST_SPEECH = 2048, 65536
"""The largest extents that the manifest's schema has for them."""
VISIBLE = 2.0**-7
"""The share of the largest logit that even bfloat16 shows: a larger effect cannot be rounded away."""
_TOWERS = ("text_embeds", "image_embeds")
_RECORDED = (("logits",), ("last_hidden_state", "pooler_output"), _TOWERS)
"""Outputs that a canary knows; the first of a group tells that the model has them."""


def inputs(vocab_size: int, acts: Acts | None = None) -> tuple[tuple[int, ...], ...]:
    """The token ids of the canary: the same pseudo-random rows for every model of that vocabulary.

    Of an adapter that acts at some positions only (``acts``), the first row is one that it acts in, and the
    second is as it is.
    """
    rng = np.random.default_rng(SEED)
    first, *rest = (tuple(int(i) for i in rng.integers(1, vocab_size, length)) for length in LENGTHS)
    return (first if acts is None else acts.woven(first), *rest)


def decoder_inputs(vocab_size: int, start: int | None) -> tuple[tuple[int, ...], ...]:
    """The ids that go into a decoder, one row for each of the encoder's: from the ``start`` token, if it has
    one, then pseudo-random.
    """
    rng = np.random.default_rng(SEED + 1)
    rows = (tuple(int(i) for i in rng.integers(1, vocab_size, length)) for length in LENGTHS)
    return tuple(row if start is None else (start, *row[1:]) for row in rows)


def feeds(inputs: Canary, image: tuple[int, int] | None = None) -> Iterator[dict[str, np.ndarray]]:
    """What a model is given for each row, a batch of one, by the names of transformers: int64 ids and float32
    pixels, made one by one.

    ``image`` is the token of an image and how many positions the model has for one, where a model takes ids
    and images.

    Example:
        >>> recorded = Canary(((3, 4),), (), (), 0.1, decoder_input_ids=((2,),))
        >>> [{name: value.tolist() for name, value in feed.items()} for feed in feeds(recorded)]
        [{'input_ids': [[3, 4]], 'decoder_input_ids': [[2]]}]
        >>> next(feeds(recorded, (4, 3)))["input_ids"].tolist()
        [[3, 4, 4, 4]]
    """
    token, positions = image or (-1, 1)
    for number in range(max(_counts(inputs).values())):
        feed = {}
        if inputs.input_ids:
            ids = np.array(inputs.input_ids[number], np.int64)
            feed["input_ids"] = np.repeat(ids, np.where(ids == token, positions, 1))[None]
        if inputs.pixels is not None:
            feed["pixel_values"] = make_row(inputs.pixels, number)
        if inputs.features is not None:
            feed["input_features"] = make_row(inputs.features, number)
        if inputs.decoder_input_ids is not None:
            feed["decoder_input_ids"] = np.array([inputs.decoder_input_ids[number]], np.int64)
        yield feed


def flaw(recorded: Canary) -> str | None:
    """Why a canary cannot be replayed anywhere, as only a foreign manifest has it, or None. Nothing has been
    made of it by then.
    """
    counts = _counts(recorded)
    if not counts or {*counts.values(), len(recorded.base), len(recorded.adapter)} != {len(recorded.adapter)}:
        return "its inputs and what they must give are not one to one"
    if any(
        math.prod(recipe.shape[1:]) > MOST
        for recipe in (recorded.pixels, recorded.features)
        if recipe is not None
    ):
        return f"a row of its inputs has more than {MOST} numbers"
    return None


def _counts(inputs: Canary) -> dict[str, int]:
    """How many rows there are of each input, by the names of transformers."""
    counts = {"input_ids": len(inputs.input_ids), "decoder_input_ids": len(inputs.decoder_input_ids or ())}
    recipes = {"pixel_values": inputs.pixels, "input_features": inputs.features}
    counts |= {name: recipe.shape[0] for name, recipe in recipes.items() if recipe is not None}
    return {name: count for name, count in counts.items() if count}


def row_of(outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """What a canary knows of a model's outputs on one sequence (a batch of one), as one float32 vector.

    The logits, at the last position where there are several; else the last hidden state there with the pooled
    output behind it; else the embeddings of two towers; else the first output. Of a map over an image, all of
    it.

    Example:
        >>> row_of({"last_hidden_state": np.array([[[1, 2], [3, 4]]]), "pooler_output": np.array([[5, 6]])})
        array([3., 4., 5., 6.], dtype=float32)
    """
    names = next((names for names in _RECORDED if names[0] in outputs), tuple(outputs)[:1])
    parts = [outputs[name] for name in names if name in outputs]
    return np.concatenate([part[0, -1] if part.ndim == 3 else part[0].ravel() for part in parts]).astype(
        np.float32
    )


def input_names(recorded: Canary) -> set[str]:
    """The names of a canary's inputs, as transformers calls them."""
    return set(_counts(recorded))


def record(
    inputs: Canary,
    base: list[np.ndarray],
    adapter: list[np.ndarray],
    *,
    places: np.ndarray | None = None,
    coarse: float = 0.0,
    dtype: str = "float32",
) -> Canary:
    """A canary from its inputs and the rows (:func:`row_of`, one a sequence) that they gave without and with
    the adapter.

    Its tolerance is :data:`RELATIVE_TOLERANCE` of the largest logit, or a quarter of what the adapter changes
    where that is less, but never below ``coarse``, the share that the arithmetic of the model rounds away.
    ``places`` (:func:`places`) are the components that are kept where the rows are no logits, instead of the
    largest.

    Raises:
        NonFinite: a logit is NaN or infinite.
    """
    if not all(np.isfinite(row).all() for row in [*base, *adapter]):
        raise NonFinite(
            "the adapted model gives NaN or infinity",
            where="canary",
            remedy="lower the learning rate, or train in float32",
        )
    kept, adapted = (
        tuple(_keep(row, _largest(row) if places is None else places) for row in rows)
        for rows in (base, adapter)
    )
    size = max(float(np.abs(row).max()) for row in [*base, *adapter])
    tolerance = max(
        min(RELATIVE_TOLERANCE * size, _worst(kept, adapter) / 4), SMALLEST_TOLERANCE * size, coarse * size
    )
    return replace(
        inputs,
        base=kept,
        adapter=adapted,
        tolerance=max(tolerance, float(np.finfo(np.float32).tiny)),
        dtype=dtype,
    )


def places(
    outputs: Mapping[str, np.ndarray], base: list[np.ndarray], adapter: list[np.ndarray]
) -> np.ndarray | None:
    """Which components of rows are kept that are no logits, by one row's ``outputs``: evenly spaced ones;
    None for the largest.

    Of hidden states they lie in the last one; in the pooled output behind it if the adapter moves only that,
    since many checkpoints do not hold its weights, and every load draws others. Of two towers they lie in
    both embeddings.

    Example:
        >>> places({"text_embeds": np.zeros((1, 3)), "image_embeds": np.zeros((1, 2))}, [], [])
        array([0, 1, 2, 3, 4])
    """
    if "logits" in outputs:
        return None
    if _TOWERS[0] in outputs and "last_hidden_state" not in outputs:
        width = row_of({_TOWERS[0]: outputs[_TOWERS[0]]}).size
        return np.concatenate([_even(0, width), _even(width, row_of(outputs).size)])
    if "last_hidden_state" not in outputs:
        return None
    width = row_of({"last_hidden_state": outputs["last_hidden_state"]}).size
    hidden = all(
        np.array_equal(without[:width], with_adapter[:width])
        for without, with_adapter in zip(base, adapter, strict=True)
    )
    pooled = hidden and not all(map(np.array_equal, base, adapter))
    return _even(width, len(base[0])) if pooled else _even(0, width)


def _even(first: int, stop: int) -> np.ndarray:
    return np.unique(np.linspace(first, stop - 1, TOP).round().astype(int))


def widen(canary: Canary, *, coarse: float = 0.0, moved: float = 0.0) -> Canary:
    """The canary for a replay whose arithmetic rounds away the share ``coarse`` of the largest logit.

    ``moved`` is by how much the model that replays it is known to differ from the one that it was recorded
    on.
    """
    return replace(canary, tolerance=max(canary.tolerance, coarse * size(canary)) + moved)


def size(canary: Canary) -> float:
    """The largest logit that was recorded."""
    return max(abs(float(value)) for row in (*canary.base, *canary.adapter) for value in row["logits"])


def check(canary: Canary, base: list[np.ndarray] | None, adapter: list[np.ndarray], where: object) -> float:
    """The largest error of a replay, if it is within tolerance; ``base`` is None where there is nothing
    without the adapter.

    Raises:
        BaseMismatch: without the adapter the logits already differ.
        NothingToDo: with the adapter the logits are those of the base alone.
        ParityError: neither explains it; the tolerance was exceeded, or there is a NaN.
    """
    error, before = _worst(canary.adapter, adapter), 0.0 if base is None else _worst(canary.base, base)
    if not before <= canary.tolerance:
        raise BaseMismatch(
            "the canary fails: this is not the base that the pack was made for",
            where=where,
            expected=f"within {canary.tolerance:.2g}",
            found=f"{before:.2g}",
            remedy="use the base that the pack names; a module that neither it nor the pack holds, such as "
            "a head that was not saved, makes another base too",
        )
    sides = {"expected": f"within {canary.tolerance:.2g}", "found": f"{error:.2g}"}
    unmoved = (
        base is not None
        and all(map(np.array_equal, base, adapter))
        and _effect(canary) > VISIBLE * size(canary)
    )
    if unmoved or (not error <= canary.tolerance and _worst(canary.base, adapter) <= canary.tolerance):
        raise NothingToDo(
            "the canary fails: the adapter has no effect",
            where=where,
            remedy="check that its sites were matched",
            **sides,
        )
    if not error <= canary.tolerance:
        raise ParityError("the canary fails: the adapted model gives other logits", where=where, **sides)
    return max(error, before)


def _effect(canary: Canary) -> float:
    """What the adapter changed when the canary was recorded, as far as the same components were kept;
    infinite where none was.
    """
    pairs = [
        (
            dict(zip(base["ids"], base["logits"], strict=True)),
            zip(adapter["ids"], adapter["logits"], strict=True),
        )
        for base, adapter in zip(canary.base, canary.adapter, strict=True)
    ]
    return max(
        max((abs(value - before[i]) for i, value in row if i in before), default=float("inf"))
        for before, row in pairs
    )


def _largest(row: np.ndarray) -> np.ndarray:
    return np.argsort(-row, kind="stable")[:TOP]


def _keep(row: np.ndarray, ids: Iterable[Any]) -> TopLogits:
    return {"ids": [int(i) for i in ids], "logits": [float(np.float32(row[i])) for i in ids]}


def _worst(expected: tuple[Any, ...], rows: list[np.ndarray]) -> float:
    """The largest error over the rows; NaN if there is one, which Python's own ``max`` would lose."""
    return float(
        np.max([_error(expected_row, row) for expected_row, row in zip(expected, rows, strict=True)])
    )


def _error(expected: Any, row: np.ndarray) -> float:
    if max(expected["ids"]) >= row.shape[0]:
        return float("inf")
    return float(np.abs(row[expected["ids"]] - np.asarray(expected["logits"])).max())
