"""No graph leaves unproved: the exported session against torch, base and every adapter, on a ragged padded batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ParityError
from ..pack.pack import Pack
from ..runtime.session import Session, pad, positions
from ..tasks import Task

RELATIVE_TOLERANCE = 1e-4
"""float32 on two runtimes differs by about 1e-6 of the largest logit; every wrong graph seen so far by 1e-3 of it or more."""
LENGTHS = (11, 4, 7)


def prove(folder: Path, base: Path, task: Task, packs: list[Pack]) -> dict[str, Any]:
    """The largest difference for the base, each adapter and a mixed batch; decoders also take one step on their cache.

    Raises:
        ParityError: a difference is over the tolerance.
    """
    from ..train.inject import attach, detach  # noqa: PLC0415 - torch only where a graph is proved
    from ..train.train import load_model  # noqa: PLC0415

    session = Session(folder, provider="cpu")
    model = load_model(task, base).eval()
    rng = np.random.default_rng(7)
    rows = [[int(i) for i in rng.integers(1, model.config.vocab_size, length)] for length in LENGTHS]
    batch = pad(rows, 0, left=task.generates)
    compare = _with_cache if task.generates else _plain
    report: dict[str, Any] = {"tolerance": RELATIVE_TOLERANCE, "batch": list(LENGTHS), "max_abs": {}}
    single: dict[str | None, np.ndarray] = {}
    for pack in (None, *packs):
        name = None if pack is None else pack.name
        if pack is not None:
            attach(model, pack, check_base=False)
        error, scale, single[name] = compare(session, model, batch, [name] * len(rows))
        report["max_abs"][name or "base"] = error
        if not error <= RELATIVE_TOLERANCE * max(1.0, scale):
            raise ParityError(f"the graph disagrees with torch for {name or 'the base'}", where=folder.name,
                              expected=f"at most {RELATIVE_TOLERANCE * max(1.0, scale):.2g}", found=f"{error:.2g}")
        if pack is not None:
            detach(model, pack.name)
    report["mixed"] = _mixed(session, batch, single)
    return report


def _plain(session: Session, model: Any, batch: dict[str, np.ndarray], names: list[str | None]) -> tuple[float, float, np.ndarray]:
    import torch  # noqa: PLC0415

    with torch.no_grad():
        reference = model(**{key: torch.from_numpy(value) for key, value in batch.items()})[0].float().numpy()
    output = next(iter(session.run(batch, names).values()))
    return (*_difference(output[..., : reference.shape[-1]], reference, batch["attention_mask"]), output)


def _with_cache(session: Session, model: Any, batch: dict[str, np.ndarray], names: list[str | None]) -> tuple[float, float, np.ndarray]:
    import torch  # noqa: PLC0415

    mask = batch["attention_mask"]
    with torch.no_grad():
        first = model(input_ids=torch.from_numpy(batch["input_ids"]), attention_mask=torch.from_numpy(mask),
                      position_ids=torch.from_numpy(positions(mask)), use_cache=True)
        outputs = session.run(batch, names)
        error, scale = _difference(outputs["logits"], first.logits.float().numpy(), mask)
        token = np.full((len(names), 1), 5, np.int64)
        longer = np.concatenate([mask, np.ones_like(token)], axis=1)
        place = positions(longer)[:, -1:]
        second = model(input_ids=torch.from_numpy(token), attention_mask=torch.from_numpy(longer), position_ids=torch.from_numpy(place),
                       past_key_values=first.past_key_values, use_cache=True)
    past = {name.replace("present.", "past_key_values."): value for name, value in outputs.items() if name.startswith("present.")}
    after = session.run({"input_ids": token, "attention_mask": longer, "position_ids": place, **past}, names)
    step_error, step_scale = _difference(after["logits"], second.logits.float().numpy(), np.ones_like(token))
    return max(error, step_error), max(scale, step_scale), outputs["logits"]


def _difference(output: np.ndarray, reference: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Largest error and largest size over real positions."""
    if reference.ndim == 3:
        output, reference = output[mask > 0], reference[mask > 0]
    return float(np.abs(output - reference).max()), float(np.abs(reference).max())


def _mixed(session: Session, batch: dict[str, np.ndarray], single: dict[str | None, np.ndarray]) -> float | None:
    """Rows that each use another adapter, against the same rows of the single runs."""
    if session.bundle.mode == "folded":
        return None
    names: list[str | None] = [*single]
    chosen = [names[number % len(names)] for number in range(batch["input_ids"].shape[0])]
    mixed = next(iter(session.run(batch, chosen).values()))
    real: Callable[[int], Any] = lambda row: batch["attention_mask"][row] > 0  # noqa: E731
    worst = 0.0
    for row, name in enumerate(chosen):
        alone, together = single[name][row], mixed[row]
        if alone.ndim == 2:
            alone, together = alone[real(row)], together[real(row)]
        worst = max(worst, float(np.abs(together[..., : alone.shape[-1]] - alone).max()))
    return worst
