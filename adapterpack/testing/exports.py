"""The proof of a row of the table of architectures: export, then compare with plain transformers, row by row without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..slots.precision import DEFAULT, PRECISIONS
from ..tasks.task import Task, task_named
from .architectures import ARCHITECTURES, KINDS, MODES, Architecture, Kind, left_out
from .case import require

LENGTHS = (9, 1, 6)
"""Rows of the batch; one has a single token."""
Arrays = dict[str, np.ndarray]


def make_base(architecture: Architecture, folder: Path) -> Path:
    """A random checkpoint in which nothing is zero or one: a lost bias or norm would not show."""
    import torch  # noqa: PLC0415 - see the package's docstring
    import transformers  # noqa: PLC0415

    torch.manual_seed(5)
    auto_class = getattr(transformers, task_named(architecture.task).auto_class)
    model = auto_class.from_config(architecture.config(transformers))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def make_pack(architecture: Architecture, base: Path, kind: Kind) -> Any:
    """A pack of one kind, moved by noise as training would."""
    import torch  # noqa: PLC0415 - see above

    from ..training.inject import adapt  # noqa: PLC0415
    from ..training.loading import load_model  # noqa: PLC0415
    from ..training.save import save  # noqa: PLC0415

    model = load_model(task_named(architecture.task), base)
    heads = tuple(head for head in architecture.heads if hasattr(model, head))
    adapt(model, kind.config(architecture.targets, heads), kind.name)
    torch.manual_seed(len(kind.name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return save(model, None, base=base, name=kind.name)


def kept(frontends: Sequence[Any]) -> tuple[Any, ...]:
    """Frontends that build one base once and copy what they built: tracing takes most of the time of an export."""
    import onnx_ir as ir  # noqa: PLC0415 - see above

    built: dict[tuple[str, str, str, str], Any] = {}

    def build_of(frontend: Any) -> Any:
        def build(folder: Path, task: str, dtype: str = DEFAULT) -> Any:
            key = (frontend.name, str(folder.resolve()), task, dtype)
            if key not in built:
                graph = frontend.build(folder, task, dtype)
                built[key] = graph._replace(model=ir.to_proto(graph.model), before={n: ir.to_proto(m) for n, m in graph.before.items()})
            found = built[key]
            return found._replace(model=ir.from_proto(found.model), before={n: ir.from_proto(m) for n, m in found.before.items()})

        return frontend._replace(build=build)

    return tuple(build_of(frontend) for frontend in frontends)


class Reference:
    """Plain transformers in float64 with one adapter folded into its checkpoint, or, where it does not fold, attached in torch."""

    def __init__(self, task: Task, base: Path, pack: Any = None, folded: Path | None = None) -> None:
        from ..training.inject import attach  # noqa: PLC0415 - see above
        from ..training.loading import load_model  # noqa: PLC0415

        if folded is not None:
            from ..merging.pipeline import merge  # noqa: PLC0415

            merge(base, [pack], folded)
        self.task = task
        self.model = load_model(task, folded or base).double().eval()
        if pack is not None and folded is None:
            attach(self.model, pack, check_base=False)
            self.model.double()
        if hasattr(self.model, "set_experts_implementation"):
            self.model.set_experts_implementation("eager")  # the fused one knows no float64

    def __call__(self, row: Arrays) -> Arrays:
        """The outputs of a batch of one without padding."""
        import torch  # noqa: PLC0415 - see above

        given = {key: torch.from_numpy(value) for key, value in row.items()}
        given = {key: value.double() if value.is_floating_point() else value for key, value in given.items()}
        with torch.no_grad():
            found = self.model(**given)
        return {key: value.numpy() for key, value in found.items() if isinstance(value, torch.Tensor)}


def prove(
    architecture: Architecture, mode: str, folder: Path, frontends: Sequence[Any] | None = None, only: Sequence[str] | None = None,
    dtype: str = DEFAULT,
) -> list[str]:
    """Exports one architecture in one mode with every kind of adapter that it takes (or ``only`` some), and checks it; their names.

    ``dtype`` is what the graphs compute in; how near they must come is that type's. Folded bundles are made and checked
    one after the other.

    Raises:
        AssertionError: a graph disagrees with transformers.
    """
    stage: Any = import_module("adapterpack.exporting.pipeline")
    from ..runtime.session import Session  # noqa: PLC0415 - see above

    task = task_named(architecture.task)
    base = folder / "base"
    if not base.exists():
        make_base(architecture, base)
    kinds = [kind for kind in KINDS if left_out(architecture, mode, kind) is None and (only is None or kind.name in only)]
    packs = {kind.name: make_pack(architecture, base, kind) for kind in kinds}
    known: dict[str | None, Reference] = {None: Reference(task, base)}
    for kind in kinds:
        known[kind.name] = Reference(task, base, packs[kind.name], folder / f"merged-{mode}-{kind.name}" if kind.folds else None)
    usual = stage.FRONTENDS
    stage.FRONTENDS = usual if frontends is None else tuple(frontends)
    try:
        if mode == "folded":
            for name, pack in packs.items():
                stage.export(base, [pack], folder / f"folded-{name}", mode=mode, task=task.name, dtype=dtype)
                check(Session(folder / f"folded-{name}", "cpu"), {name: known[name]})
        else:
            stage.export(base, list(packs.values()), folder / mode, mode=mode, task=task.name, dtype=dtype)
            check(Session(folder / mode, "cpu"), known)
    finally:
        stage.FRONTENDS = usual
    return list(packs)


def check(session: Any, known: Mapping[str | None, Reference]) -> None:
    """Every row of ragged batches, with every adapter beside every other, equals plain transformers on that row alone."""
    from ..exporting.example_inputs import example  # noqa: PLC0415 - see above
    from ..exporting.proof.parity import row_of  # noqa: PLC0415

    first, names = next(iter(known.values())), list(known)
    batch = example(session.task, first.model.config, LENGTHS, model=lambda: first.model, bare=(1,), seed=3)
    rows = [row_of(batch, row) for row in range(len(LENGTHS))]
    expected = {name: [reference(row) for row in rows] for name, reference in known.items()}
    for padded in [batch, *([_other_side(batch)] if session.task.pads_left else [])]:
        for start in range(len(names)):
            chosen = [names[(start + row) % len(names)] for row in range(len(LENGTHS))]
            found = session.run(padded, chosen)
            for row, name in enumerate(chosen):
                _require(session, found, row, padded, expected[name][row], f"{session.bundle.mode}, {name}, row {row}")
    if session.task.generates:
        for start in range(len(names)):
            chosen = [names[(start + row) % len(names)] for row in range(len(LENGTHS))]
            whole = [expected[name][row]["logits"][0] for row, name in enumerate(chosen)]
            _in_pieces(session, batch, chosen, whole)


def _other_side(batch: Arrays) -> Arrays:
    """Rows padded on the right that were padded on the left."""
    found = dict(batch)
    for key in ("input_ids", "attention_mask"):
        padding = (batch["attention_mask"] == 0).sum(1)
        found[key] = np.stack([np.roll(row, -int(count)) for row, count in zip(batch[key], padding, strict=True)])
    return found


def _require(session: Any, found: Arrays, row: int, batch: Arrays, expected: Arrays, what: str) -> None:
    from ..exporting.proof.parity import _real  # noqa: PLC0415 - see above

    for key in found.keys() & expected.keys():
        real = _real(key, found[key], batch)
        one = found[key][row] if real is None else found[key][row][real[row]]
        right = expected[key][0]
        _close(session, one[..., : right.shape[-1]], right, f"{what}, {key}")
    require(bool(found.keys() & expected.keys()), f"{what}: the graph has none of the model's outputs")


def _close(session: Any, found: np.ndarray, right: np.ndarray, what: str) -> None:
    require(found.shape == right.shape, f"{what}: shape {found.shape}, not {right.shape}")
    error, size = float(np.abs(found - right).max()), float(np.abs(right).max())
    require(error <= PRECISIONS[session.bundle.dtype].tolerance * size, f"{what}: off by {error:.2g}, of {size:.2g}")


def _in_pieces(session: Any, batch: Arrays, names: Sequence[str | None], whole: Sequence[np.ndarray]) -> None:
    """The same tokens three, one and then all the others at a time, each piece on the cache of those before."""
    from ..runtime.generation.decoder import grown  # noqa: PLC0415 - see above
    from ..runtime.model_inputs import ENCODED  # noqa: PLC0415

    ids = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    length, carried = batch[ids].shape[1], Arrays()
    for start, stop in ((0, length - 3), (length - 3, length - 2), (length - 2, length)):
        piece = {ids: batch[ids][:, start:stop], **carried}
        if "attention_mask" in batch:
            piece["attention_mask"] = batch["attention_mask"] if ids != "input_ids" else batch["attention_mask"][:, :stop]
        if start == 0:
            piece = {**batch, **piece}
        found = session.run(piece, names)
        carried = {**{key: value for key, value in (carried | found).items() if key.startswith(ENCODED)}, **grown(found)}
        for row, right in enumerate(whole):
            take = min(stop - start, len(right) - (length - stop))  # a row padded on the left may begin later
            if take > 0:
                end = len(right) - (length - stop)
                _close(session, found["logits"][row][-take:], right[end - take : end], f"tokens {start} to {stop} on a cache, row {row}")


def run(chosen: Sequence[str], folder: Path) -> list[tuple[str, str, str]]:
    """Proves rows of the table, all modes; ``(architecture, mode, outcome)`` for each."""
    from ..exporting.frontends import FRONTENDS  # noqa: PLC0415 - see above

    outcomes = []
    for architecture in (one for one in ARCHITECTURES if not chosen or one.name in chosen):
        frontends = kept(FRONTENDS)
        for mode in MODES:
            try:
                outcome = ", ".join(prove(architecture, mode, folder / architecture.name, frontends))
            except Exception as error:  # the run goes on to the other rows
                outcome = f"FAILED {type(error).__name__}: {str(error)[:600]}"
            outcomes.append((architecture.name, mode, outcome))
            print(*outcomes[-1], sep=" | ", flush=True)  # noqa: T201 - a script's own output
    return outcomes


if __name__ == "__main__":
    import sys
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        failed = [one for one in run(sys.argv[1:], Path(scratch)) if one[2].startswith("FAILED")]
    sys.exit(1 if failed else 0)
