"""What lies in a folder - a pack, a PEFT adapter, a bundle or a base - and the questions that are asked of each alike."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from .errors import StorageError
from .hub.resolve import folder_of
from .pack import manifest as m
from .pack import peft_layout
from .pack.checks.budget import Budget
from .pack.inspect import inspect_base, inspect_pack
from .pack.validate import Report
from .pack.validate import validate as validate_pack
from .runtime import bundle as b


def kind_of(path: str | os.PathLike[str]) -> str:
    """``pack``, ``peft``, ``bundle`` or ``base``, told by the file that says so.

    Raises:
        StorageError: there is no such folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise StorageError("there is no such folder", where=path, remedy="name a pack, a bundle or a base checkpoint")
    marks = {b.FILE_NAME: "bundle", m.FILE_NAME: "pack", peft_layout.CONFIG: "peft"}
    return next((kind for mark, kind in marks.items() if (folder / mark).is_file()), "base")


def validate(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, *, full: bool = False,
             budget: Budget | None = None, allow_structural: bool = False) -> Report:
    """Every check that applies to a pack, a PEFT adapter or a bundle; with ``base``, also that it belongs to that base.

    ``full`` adds the costly checks, and a report of a check that could not be made is then ``not fully checked``; so is one whose
    ``budget`` of time or memory ran out. With ``allow_structural`` a base of the same names, dtypes and shapes, whatever its weights, is a
    warning.

    Returns:
        A report: ``report.state``, ``report.findings``, ``report.not_checked``, ``report.base`` (the verdict on the base).
        Faults are findings, not exceptions.

    Raises:
        StorageError: there is no such folder.

    Example:
        >>> validate("packs/tickets").valid  # doctest: +SKIP
        True
    """
    folder = folder_of(path)
    known = None if base is None else folder_of(base)
    if kind_of(folder) == "bundle":
        from .runtime.validate import validate_bundle  # noqa: PLC0415 - packs do not need what bundles need

        report = validate_bundle(folder, known, allow_structural)
        return dataclasses.replace(report, incomplete=report.incomplete or (full and known is None))
    return validate_pack(folder, known, full=full, budget=budget, allow_structural=allow_structural)


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What an artifact is, for whom, how big, and what it changes, as JSON values; packs are verified on the way.

    Example:
        >>> inspect("packs/tickets")["ranks"]  # doctest: +SKIP
        {'8': 37}
    """
    folder = folder_of(path)
    kind = kind_of(folder)
    if kind == "bundle":
        return _inspect_bundle(folder)
    return inspect_base(folder) if kind == "base" else inspect_pack(folder)


def _inspect_bundle(folder: Path) -> dict[str, Any]:
    bundle = b.read_bundle(folder)
    return {
        "kind": "bundle",
        "path": str(folder),
        "mode": bundle.mode,
        "task": bundle.task,
        "frontend": bundle.frontend,
        "base": m.plain(bundle.base),
        "adapters": [{"name": a.name, "slot": a.slot, "pack": a.pack, "labels": list(a.labels or ())} for a in bundle.adapters],
        "slots": bundle.slots,
        "max_rank": bundle.max_rank,
        "sites": len(bundle.sites),
        "quantization": bundle.quantization,
        "parity": bundle.parity,
        "bytes": sum(entry.size for entry in bundle.files),
        "graph_bytes": sum(entry.size for entry in bundle.files if entry.role == "graph"),
    }
