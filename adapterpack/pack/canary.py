"""The canary: fixed inputs with the logits that they must give, which exposes a wrong base or an ineffective
adapter on any runtime.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from msgspec.structs import replace

from ..adapter_methods import Acts, Tensors
from ..errors import BaseMismatch, NonFinite, NothingToDo, ParityError
from ..manifest import Canary, TopLogits, make_row
from ..tasks import Arrays

TOP = 8
LENGTHS = (9, 5)
"""The number of ids in each row; also in a decoder's rows, because some heads read the position where the
encoder's ids end.
"""
SEED = 20260101
RELATIVE_TOLERANCE = 2e-3
"""Relative to the largest logit. float32 on another runtime changes logits by about 1e-6 of their size, a
wrong base by their entire size.
"""
SMALLEST_TOLERANCE = 2e-5
"""Also relative: the lower limit for the tolerance of a weak adapter's canary, which must still distinguish
the adapter from the base.
"""
QUANTIZED = 0.5
"""Also relative: 4-bit weights change logits by a tenth to a fifth of their size; noise of a third of the
weights by three quarters.
"""
MOST = 1 << 24
"""The most numbers in a row generated from a recipe (64 MiB), because an untrusted manifest may ask for any
number.
"""
LARGEST_IMAGE, LARGEST_SPEECH = 2048, 65536
"""The largest sizes of images and speech in the manifest's schema."""
VISIBLE = 2.0**-7
"""A share of the largest logit that even bfloat16 resolves: an effect larger than this cannot be rounded
away.
"""
_TOWERS = ("text_embeds", "image_embeds")
_RECORDED = (("logits",), ("last_hidden_state", "pooler_output"), _TOWERS)
"""Groups of outputs that a canary can record; the first name of a group shows whether the model has it."""


def inputs(vocab_size: int, acts: Acts | None = None) -> tuple[tuple[int, ...], ...]:
    """Returns the token ids of the canary: the same pseudo-random rows for every model with that vocabulary
    size.

    For an adapter that acts only at some positions (``acts``), the first row is changed so that the adapter
    acts in it.
    """
    rng = np.random.default_rng(SEED)
    first, *rest = (tuple(int(i) for i in rng.integers(1, vocab_size, length)) for length in LENGTHS)
    return (first if acts is None else acts.woven(first), *rest)


def decoder_inputs(vocab_size: int, start: int | None) -> tuple[tuple[int, ...], ...]:
    """Returns the ids for a decoder, one row for each row of the encoder: pseudo-random, after the ``start``
    token if there is one.
    """
    rng = np.random.default_rng(SEED + 1)
    rows = (tuple(int(i) for i in rng.integers(1, vocab_size, length)) for length in LENGTHS)
    return tuple(row if start is None else (start, *row[1:]) for row in rows)


def feeds(inputs: Canary, image: tuple[int, int] | None = None, sound: str | None = None) -> Iterator[Arrays]:
    """Yields the model's inputs for each row as a batch of one, under transformers' names: int64 ids and
    float32 pixels, generated one row at a time.

    ``image`` is the image token and the number of positions that the model uses for one image, for models
    that take ids and images. ``sound`` is the name of the model's input for sound, ``input_features`` if not
    given; samples are features of a single band.

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
            row = make_row(inputs.features, number)
            feed[sound or "input_features"] = row[:, 0] if inputs.features.shape[1] == 1 else row
        if inputs.decoder_input_ids is not None:
            feed["decoder_input_ids"] = np.array([inputs.decoder_input_ids[number]], np.int64)
        yield feed


def flaw(recorded: Canary) -> str | None:
    """Returns why a canary cannot be replayed (which only a malformed manifest of someone else's can cause),
    or None. It generates no inputs.
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
    """Returns the number of rows of each input, by transformers' names."""
    counts = {"input_ids": len(inputs.input_ids), "decoder_input_ids": len(inputs.decoder_input_ids or ())}
    recipes = {"pixel_values": inputs.pixels, "input_features": inputs.features}
    counts |= {name: recipe.shape[0] for name, recipe in recipes.items() if recipe is not None}
    return {name: count for name, count in counts.items() if count}


def row_of(outputs: Tensors) -> np.ndarray:
    """Returns the part of a model's outputs on one sequence (a batch of one) that a canary records, as one
    float32 vector.

    These are the logits, at the last position if there are several; otherwise the last hidden state there
    followed by the pooled output; otherwise the embeddings of two towers; otherwise the first output. A map
    over an image is used in full.

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
    """Returns the names of a canary's inputs in transformers."""
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
    """Creates a canary from its inputs and the rows (:func:`row_of`, one per sequence) that they gave without
    and with the adapter.

    Its tolerance is :data:`RELATIVE_TOLERANCE` of the largest logit, or a quarter of the adapter's effect if
    that is smaller, but at least ``coarse``, the share that the model's arithmetic rounds away. ``places``
    (:func:`places`) are the components to record instead of the largest ones, for rows that are not logits.

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


def places(outputs: Tensors, base: list[np.ndarray], adapter: list[np.ndarray]) -> np.ndarray | None:
    """Returns which components to record of rows that are not logits, given one row's ``outputs``: evenly
    spaced ones; None means the largest.

    For hidden states they are taken from the last one. They are taken from the pooled output after it if the
    adapter changes only that, because many checkpoints lack the pooler's weights, and every load initialises
    them differently. For two towers they are taken from both embeddings.

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
    """Returns the canary with a tolerance for a replay whose arithmetic rounds away the share ``coarse`` of
    the largest logit.

    ``moved`` is how much the replaying model is known to differ from the one on which the canary was
    recorded.
    """
    return replace(canary, tolerance=max(canary.tolerance, coarse * size(canary)) + moved)


def size(canary: Canary) -> float:
    """Returns the largest recorded logit."""
    return max(abs(float(value)) for row in (*canary.base, *canary.adapter) for value in row["logits"])


def check(canary: Canary, base: list[np.ndarray] | None, adapter: list[np.ndarray], where: object) -> float:
    """Returns the largest error of a replay if it is within tolerance; ``base`` is None if there was no run
    without the adapter.

    Raises:
        BaseMismatch: the logits differ even without the adapter.
        NothingToDo: with the adapter the logits are those of the base alone.
        ParityError: neither explains the error; the tolerance was exceeded, or a logit is NaN.
    """
    error = _worst(canary.adapter, adapter)
    before = 0.0 if base is None else _worst(canary.base, base)
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
    # Exactly equal logits mean that the adapter was not applied, if its recorded effect is large enough to be
    # visible.
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
    """Returns the adapter's effect at the time of recording, on the components recorded both without and with
    it; infinite if a row has none.
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
    """Returns the largest error over the rows; NaN if there is one, which Python's own ``max`` would lose."""
    return float(
        np.max([_error(expected_row, row) for expected_row, row in zip(expected, rows, strict=True)])
    )


def _error(expected: Any, row: np.ndarray) -> float:
    if max(expected["ids"]) >= row.shape[0]:
        return float("inf")
    return float(np.abs(row[expected["ids"]] - np.asarray(expected["logits"])).max())
