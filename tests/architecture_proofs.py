"""The proof of a row of the table of architectures: export, then compare with plain transformers, row by row
without padding.

``python tests/architecture_proofs.py [NAME...]`` proves every cell of the rows of these names, or of all.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import traces
import transformers
from architectures import ARCHITECTURES, KINDS, MODES, Architecture, Kind, left_out
from invariants.bundles import Reference, check

from adapterpack.exporting.pipeline import export
from adapterpack.runtime.sessions.session import Session
from adapterpack.slots.precision import DEFAULT
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.adapt import adapt
from adapterpack.torch_adapters.models.load import load_model
from adapterpack.torch_adapters.save import save


def make_base(architecture: Architecture, folder: Path) -> Path:
    """A random checkpoint in which nothing is zero or one: a lost bias or norm would not show."""
    torch.manual_seed(5)
    auto_class = getattr(transformers, get_task(architecture.task).auto_class)
    model = auto_class.from_config(architecture.config(transformers))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def make_pack(architecture: Architecture, base: Path, kind: Kind) -> Any:
    """A pack of one kind, moved by noise as training would."""
    model = load_model(get_task(architecture.task), base)
    heads = tuple(head for head in architecture.heads if hasattr(model, head))
    adapt(model, kind.config(architecture.targets, heads), kind.name)
    torch.manual_seed(len(kind.name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return save(model, None, base=base, name=kind.name)


def prove(
    architecture: Architecture,
    mode: str,
    folder: Path,
    only: Sequence[str] | None = None,
    dtype: str = DEFAULT,
) -> list[str]:
    """Exports one architecture in one mode with every kind of adapter that it takes (or ``only`` some), and
    checks it; their names.

    ``dtype`` is what the graphs compute in; how near they must come is that type's. Folded bundles are made
    and checked one after the other.

    Raises:
        AssertionError: a graph disagrees with transformers.
    """
    task = get_task(architecture.task)
    base = folder / "base"
    if not base.exists():
        make_base(architecture, base)
    kinds = [
        kind
        for kind in KINDS
        if left_out(architecture, mode, kind) is None and (only is None or kind.name in only)
    ]
    packs = {kind.name: make_pack(architecture, base, kind) for kind in kinds}
    known: dict[str | None, Reference] = {None: Reference(task, base)}
    for kind in kinds:
        known[kind.name] = Reference(
            task, base, packs[kind.name], folder / f"merged-{mode}-{kind.name}" if kind.folds else None
        )
    if mode == "folded":
        for name, pack in packs.items():
            export(
                base,
                [pack],
                folder / f"folded-{name}",
                mode=mode,
                task=task.name,
                dtype=dtype,
                in_place=False,
            )
            check(Session(folder / f"folded-{name}", "cpu"), {name: known[name]})
    else:
        export(
            base, list(packs.values()), folder / mode, mode=mode, task=task.name, dtype=dtype, in_place=False
        )
        check(Session(folder / mode, "cpu"), known)
    return list(packs)


def run(chosen: Sequence[str], folder: Path) -> list[tuple[str, str, str]]:
    """Proves rows of the table, all modes; ``(architecture, mode, outcome)`` for each."""
    outcomes = []
    for architecture in (one for one in ARCHITECTURES if not chosen or one.name in chosen):
        for mode in MODES:
            try:
                outcome = ", ".join(prove(architecture, mode, folder / architecture.name))
            except Exception as error:  # the run goes on to the other rows
                outcome = f"FAILED {type(error).__name__}: {str(error)[:600]}"
            outcomes.append((architecture.name, mode, outcome))
            print(*outcomes[-1], sep=" | ", flush=True)  # noqa: T201 - a script's own output
    return outcomes


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch, traces.kept(Path(scratch)):
        failed = [one for one in run(sys.argv[1:], Path(scratch)) if one[2].startswith("FAILED")]
    sys.exit(1 if failed else 0)
