"""No graph leaves unproved: the exported session against torch, base and every adapter, on a ragged padded batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ParityError
from ..methods import acted
from ..pack.pack import Pack
from ..runtime import canary
from ..runtime.bundle import ADAPTER_POSITIONS
from ..runtime.session import Arrays, Session, pad, positions
from ..runtime.slots import NO_LABEL
from ..tasks import Task

RELATIVE_TOLERANCE = 1e-4
"""float32 on two runtimes differs by about 1e-6 of the largest logit; every wrong graph seen so far by 1e-3 of it or more."""
LENGTHS = (11, 4, 7)


def prove(folder: Path, base: Path, task: Task, packs: list[Pack]) -> dict[str, Any]:
    """The largest difference for the base, each adapter and a mixed batch; decoders also take one step on their cache.

    The canaries that the packs bring are replayed as well, on the graph alone: they know the base and the adapter from when the pack was
    made, which the torch model of this machine does not.

    Raises:
        ParityError: a difference is over the tolerance, or a canary fails.
        BaseMismatch: by its canary, a pack was made for another base.
        NothingToDo: by its canary, an adapter has no effect.
    """
    from ..train.inject import attach, detach  # noqa: PLC0415 - torch only where a graph is proved
    from ..train.train import load_model  # noqa: PLC0415

    session = Session(folder, provider="cpu")
    model = load_model(task, base).eval()
    rng = np.random.default_rng(7)
    rows = [tuple(int(i) for i in rng.integers(1, model.config.vocab_size, length)) for length in LENGTHS]
    for acts in {pack.acts for pack in packs} - {None}:  # in the first and the last row every adapter acts
        rows = [acts.woven(rows[0]), *rows[1:-1], acts.woven(rows[-1])]  # type: ignore[union-attr]
    batch = pad(rows, 0, left=task.generates and session.bundle.padding == "left")
    compare = _with_cache if task.generates else _plain
    report: dict[str, Any] = {"tolerance": RELATIVE_TOLERANCE, "batch": list(LENGTHS), "max_abs": {}}
    single: dict[str | None, Arrays] = {}
    scales = []
    for pack in (None, *packs):
        name = None if pack is None else pack.name
        if pack is not None:
            attach(model, pack, check_base=False)
        error, scale, single[name] = compare(session, model, batch, name)
        scales.append(scale)
        report["max_abs"][name or _base_name(session)] = error
        _require(error, scale, f"torch for {name or 'the base'}", folder)
        if pack is not None:
            detach(model, pack.name)
    report["mixed"] = _mixed(session, batch, single)
    _require(report["mixed"] or 0.0, max(scales), "itself when rows of one batch use different adapters", folder)
    report["canary"] = canary.verify(session)
    return report


def _require(error: float, scale: float, other: str, folder: Path) -> None:
    allowed = RELATIVE_TOLERANCE * max(1.0, scale)
    if not error <= allowed:  # NaN is no agreement either
        raise ParityError(f"the graph disagrees with {other}", where=folder.name, expected=f"at most {allowed:.2g}", found=f"{error:.2g}")


def _base_name(session: Session) -> str:
    """What rows without an adapter have: the base, or whatever was folded into it."""
    return "+".join(session.packs) if session.bundle.mode == "folded" and session.packs else "base"


def _plain(session: Session, model: Any, batch: Arrays, name: str | None) -> tuple[float, float, Arrays]:
    import torch  # noqa: PLC0415

    with torch.no_grad():
        answer = model(**{key: torch.from_numpy(value) for key, value in batch.items()})
    outputs = session.run(batch, name)
    pairs = [(outputs[key], answer[key].float().numpy()) for key in session.outputs if key in answer]
    if not pairs:
        raise ParityError("the graph has none of the model's outputs", where=session.folder.name, expected=", ".join(answer),
                          found=", ".join(session.outputs))
    error, scale = _worst(*(_difference(output, reference, batch["attention_mask"]) for output, reference in pairs))
    return error, scale, outputs


def _with_cache(session: Session, model: Any, batch: Arrays, name: str | None) -> tuple[float, float, Arrays]:
    import torch  # noqa: PLC0415

    mask = batch["attention_mask"]
    with torch.no_grad():
        first = model(input_ids=torch.from_numpy(batch["input_ids"]), attention_mask=torch.from_numpy(mask),
                      position_ids=torch.from_numpy(positions(mask)), use_cache=True)
        outputs = session.run(batch, name)
        prefill = _difference(outputs["logits"], first.logits.float().numpy(), mask)
        token = np.full((mask.shape[0], 1), 5, np.int64)
        longer = np.concatenate([mask, np.ones_like(token)], axis=1)
        place = positions(longer)[:, -1:]
        cache = "cache" if "cache" in first else "past_key_values"  # its name in newer and older versions of transformers
        second = model(input_ids=torch.from_numpy(token), attention_mask=torch.from_numpy(longer), position_ids=torch.from_numpy(place),
                       use_cache=True, **{cache: first[cache]})
    past = {key.replace("present.", "past_key_values."): value for key, value in outputs.items() if key.startswith("present.")}
    more = {"position_ids": place} if "position_ids" in session.inputs else {}
    if ADAPTER_POSITIONS in session.inputs:
        names: list[str | None] = [name] * len(mask)
        before = acted(session.acting(batch, names), None)
        more[ADAPTER_POSITIONS] = session.acting({"input_ids": token, "attention_mask": np.ones_like(token)}, names, before)
    after = session.run({"input_ids": token, "attention_mask": longer, **past, **more}, name)
    step = _difference(after["logits"], second.logits.float().numpy(), np.ones_like(token))
    return *_worst(prefill, step), {"logits": outputs["logits"]}


def _worst(*found: tuple[float, float]) -> tuple[float, float]:
    """The largest of each; NaN stays NaN, which ``max`` would lose."""
    error, scale = np.max(found, axis=0)
    return float(error), float(scale)


def _difference(output: np.ndarray, reference: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Largest error and largest size over real positions; another shape, or a label too many that is not switched off, is all wrong."""
    wide = reference.shape[-1]
    if output.shape[:-1] != reference.shape[:-1] or output.shape[-1] < wide or (output[..., wide:] > NO_LABEL / 2).any():
        return float("inf"), 0.0
    output = output[..., :wide]
    if reference.ndim == 3:
        output, reference = output[mask > 0], reference[mask > 0]
    return float(np.abs(output - reference).max()), float(np.abs(reference).max())


def _mixed(session: Session, batch: Arrays, single: dict[str | None, Arrays]) -> float | None:
    """Rows that each use another adapter, against the same rows of the single runs; None where rows cannot choose."""
    if session.bundle.mode == "folded" or len(single) < 2:
        return None
    names: list[str | None] = [*single]
    count = batch["input_ids"].shape[0]
    errors = []
    for start in range(0, len(names), count):  # every adapter takes part, even where there are more than rows
        chosen = [names[(start + row) % len(names)] for row in range(count)]
        mixed = session.run(batch, chosen)
        for row, name in enumerate(chosen):
            for key, alone in single[name].items():
                real = batch["attention_mask"][row] > 0 if alone.ndim == 3 else slice(None)
                together = mixed[key][row][..., : alone.shape[-1]]
                errors.append(np.abs(together - alone[row])[real].max())
    return float(np.max(errors))
