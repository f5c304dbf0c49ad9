"""Compares a bundle with plain transformers: row by row without padding, every adapter next to every other,
whole and on a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapterpack.bundle.manifest import ENCODED
from adapterpack.runtime.media.image_layouts import OFFSETS, TOKEN_TYPES
from adapterpack.slots.precision import PRECISIONS
from adapterpack.tasks.sounds import FRAMES
from adapterpack.tasks.task import Task
from adapterpack.testing import require

LENGTHS = (9, 1, 6)
"""Rows of the batch; one has a single token."""
Arrays = dict[str, np.ndarray]


class Reference:
    """Plain transformers with one adapter folded into its checkpoint, or, where it does not fold, attached in
    torch; in float64, or in float32 unless it is ``double``.
    """

    def __init__(
        self, task: Task, base: Path, pack: Any = None, folded: Path | None = None, *, double: bool = True
    ) -> None:
        from adapterpack.torch_adapters.adapt import attach
        from adapterpack.torch_adapters.models.load import load_model

        if folded is not None:
            from adapterpack.merging.pipeline import merge

            merge(base, [pack], folded)
        self.task = task
        self.model, self.double = load_model(task, folded or base).eval(), double
        if double:
            self.model.double()
        if pack is not None and folded is None:
            attach(self.model, pack, check_base=False)
        if not double:
            return
        self.model.double()
        if hasattr(self.model, "set_experts_implementation"):
            self.model.set_experts_implementation("eager")  # the fused one knows no float64

    def __call__(self, row: Arrays) -> Arrays:
        """The outputs of a batch of one without padding."""
        import torch

        from adapterpack.torch_adapters.canaries.inputs import token_types

        given = {key: torch.from_numpy(value) for key, value in row.items()}
        if "image_features" in self.task.main.inputs:
            given |= token_types(self.model, given["input_ids"])
        if self.double:
            given = {key: one.double() if one.is_floating_point() else one for key, one in given.items()}
        with torch.no_grad():
            found = self.model(**given)
        return {key: value.numpy() for key, value in found.items() if isinstance(value, torch.Tensor)}


def check(
    session: Any,
    known: Mapping[str | None, Reference],
    lengths: Sequence[int] = LENGTHS,
    tolerance: float | None = None,
) -> None:
    """Every row of ragged batches, with every adapter next to every other, equals plain transformers on that
    row alone, within ``tolerance`` of the largest output, by default that of the bundle's dtype.
    """
    from adapterpack.exporting.proof.parity_runs import row_of
    from adapterpack.exporting.tracing.example_inputs import example

    first, names = next(iter(known.values())), list(known)
    near = PRECISIONS[session.bundle.dtype].tolerance if tolerance is None else tolerance
    config, bare = first.model.config, (1,) if len(lengths) > 1 else ()
    batch = example(session.task, config, lengths, model=lambda: first.model, bare=bare, seed=3)
    token = config.image_token_id if "image_features" in session.task.main.inputs else None
    # in a lone row two images may lie side by side, which row_of takes for one
    rows = [batch] if len(lengths) == 1 else [row_of(batch, row, token) for row in range(len(lengths))]
    expected = {name: [reference(row) for row in rows] for name, reference in known.items()}
    for padded in [batch, *([_other_side(batch)] if session.task.pads_left else [])]:
        for start in range(len(names)):
            chosen = [names[(start + row) % len(names)] for row in range(len(lengths))]
            found = session.run(padded, chosen)
            for row, name in enumerate(chosen):
                _require(
                    near,
                    found,
                    row,
                    padded,
                    expected[name][row],
                    f"{session.bundle.mode}, {name}, row {row}",
                )
    # a lone row of less has no three pieces, and none may end within an image (one lies before the third token)
    # or a prompt that sees itself
    pieced = max(lengths) > (3 if token is None else 4)
    if session.task.generates and pieced and TOKEN_TYPES not in session.inputs:
        for start in range(len(names)):
            chosen = [names[(start + row) % len(names)] for row in range(len(lengths))]
            whole = [expected[name][row]["logits"][0] for row, name in enumerate(chosen)]
            _in_pieces(session, batch, chosen, whole, near)


def _other_side(batch: Arrays) -> Arrays:
    """Rows padded on the right that were padded on the left."""
    found = dict(batch)
    for key in ("input_ids", "attention_mask"):
        padding = (batch["attention_mask"] == 0).sum(1)
        found[key] = np.stack(
            [np.roll(row, -int(count)) for row, count in zip(batch[key], padding, strict=True)]
        )
    return found


def _require(near: float, found: Arrays, row: int, batch: Arrays, expected: Arrays, what: str) -> None:
    from adapterpack.exporting.proof.parity_runs import real_positions

    for key in found.keys() & expected.keys():
        real = real_positions(key, found[key], batch)
        one = found[key][row] if real is None else found[key][row][real[row]]
        if FRAMES in found and one.ndim > 1:
            one = one[: int(found[FRAMES][row, 0])]
        right = expected[key][0]
        _close(near, one[..., : right.shape[-1]], right, f"{what}, {key}")
    require(bool(found.keys() & expected.keys()), f"{what}: the graph has none of the model's outputs")


def _close(near: float, found: np.ndarray, right: np.ndarray, what: str) -> None:
    require(found.shape == right.shape, f"{what}: shape {found.shape}, not {right.shape}")
    error, size = float(np.abs(found - right).max()), float(np.abs(right).max())
    require(
        error <= near * size,
        f"{what}: off by {error:.2g}, of {size:.2g}",
    )


def _in_pieces(
    session: Any, batch: Arrays, names: Sequence[str | None], whole: Sequence[np.ndarray], near: float
) -> None:
    """The same tokens three, one and then all the others at a time, each piece on the cache of those
    before.
    """
    from adapterpack.runtime.sessions.decoder import next_cache

    ids = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    length, carried, moved = batch[ids].shape[1], Arrays(), Arrays()
    for start, stop in ((0, length - 3), (length - 3, length - 2), (length - 2, length)):
        piece = {ids: batch[ids][:, start:stop], **carried}
        if "attention_mask" in batch:
            piece["attention_mask"] = (
                batch["attention_mask"] if ids != "input_ids" else batch["attention_mask"][:, :stop]
            )
        if start == 0:
            piece = {**batch, **piece}
        found = session.run(piece, names)
        if OFFSETS in found:  # of the tokens after the images, which the first piece has
            moved = {OFFSETS: found[OFFSETS][:, -1:].repeat(2, 1)}
        carried = {
            **moved,
            **{key: value for key, value in (carried | found).items() if key.startswith(ENCODED)},
            **next_cache(found),
        }
        for row, right in enumerate(whole):
            take = min(stop - start, len(right) - (length - stop))  # a row padded on the left may begin later
            if take > 0:
                end = len(right) - (length - stop)
                _close(
                    near,
                    found["logits"][row][-take:],
                    right[end - take : end],
                    f"tokens {start} to {stop} on a cache, row {row}",
                )
