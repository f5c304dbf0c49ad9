"""Checks of a bundle: its closed file list, every pack in it, its base."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import AdapterpackError
from ..pack.checkpoint import Checkpoint
from ..pack.checks.budget import Budget, Spent
from ..pack.checks.unchecked import NO_BASE
from ..pack.digests import Source, digest, identity
from ..pack.validate import Finding, Report, examine
from .bundle import FILE_NAME, Bundle, read_bundle

_GRAPH = "graph: replayed when it was exported, not here"


def validate_bundle(folder: Path, base: Path | None = None, *, full: bool = False, budget: Budget | None = None) -> Report:
    """The report on a bundle: files, digests, packs, and with ``base`` that it was made from that base; within ``budget``."""
    findings: list[Finding] = []
    left_open: list[str] = []
    try:
        for found in _findings(folder, base, budget or Budget()):
            if isinstance(found, Finding):
                findings.append(found)
            else:
                left_open.append(found)
    except Spent as spent:
        left_open.append(str(spent))
    except AdapterpackError as error:
        findings.append(Finding("AB001", "error", FILE_NAME, str(error), error.remedy or ""))
        return Report("bundle", str(folder), None, tuple(findings))
    incomplete = bool(left_open) or (full and base is None)
    return Report("bundle", str(folder), None, tuple(findings), (*left_open, *([] if base else [NO_BASE]), _GRAPH), incomplete)


def _findings(folder: Path, base: Path | None, budget: Budget) -> Iterator[Finding | str]:
    """Findings, and as texts what the budget was too small for."""
    bundle = read_bundle(folder)
    irregular = False
    for finding in _file_list(folder, bundle, budget):
        irregular |= finding.rule == "AB101"
        yield finding
    if irregular:
        return  # nothing is opened that may lead out of the folder
    yield from _digests(folder, bundle, budget)
    for adapter in bundle.adapters:
        budget.require_time(f"the adapter {adapter.name}")
        report, pack = examine(folder / adapter.path, budget=budget)
        for one in report.findings:
            yield dataclasses.replace(one, where=f"{adapter.path}/{one.where}", file=one.file and f"{adapter.path}/{one.file}")
        if report.incomplete:
            yield f"{adapter.path}: {report.not_checked[0]}"
        elif pack is not None and pack.id != adapter.pack:
            yield Finding("AB201", "error", adapter.path, "the pack is not the one that the bundle names", "export again")
    if base is not None:
        budget.require_time("the base")
        if (found := Checkpoint(base)).content != bundle.base.content:
            message = (f"the bundle was made from {bundle.base.name} ({(bundle.base.content or '')[:17]}), "
                       f"not from {found.name} ({found.content[:17]})")
            yield Finding("AB301", "error", "base", message, "name the base that it was exported from")


def _file_list(folder: Path, bundle: Bundle, budget: Budget) -> Iterator[Finding]:
    listed = {FILE_NAME, *(entry.path for entry in bundle.files)}
    for path in sorted(folder.rglob("*")):
        budget.require_time("the list of files")
        relative = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            yield Finding("AB101", "error", relative, "only regular files may lie in a bundle", "remove it")
        elif path.is_file() and relative not in listed:
            yield Finding("AB102", "error", relative, "a file that the manifest does not list", "remove it, or export again")


def _digests(folder: Path, bundle: Bundle, budget: Budget) -> Iterator[Finding]:
    """AB103-AB104. Files are hashed block by block, by one thread a core, and never held."""
    def sha256(_: str, blocks: Iterator[memoryview]) -> bytes:
        hasher = hashlib.sha256()
        for block in blocks:
            budget.require_time("the digests of the files")
            hasher.update(block)
        return hasher.digest()

    there = {entry.path: entry for entry in bundle.files if (folder / entry.path).is_file()}
    sources = {name: Source(folder / name, identity(folder / name), ((0, entry.size),)) for name, entry in there.items()}
    found = digest({name: source for name, source in sources.items() if source.identity.size == there[name].size}, sha256)
    for entry in bundle.files:
        if entry.path not in there:
            yield Finding("AB103", "error", entry.path, "a listed file is missing", "copy the bundle again")
        elif entry.path not in found or found[entry.path].hex() != entry.sha256:
            message = "the file is not the one that the manifest lists: it was altered or truncated"
            yield Finding("AB104", "error", entry.path, message, "copy the bundle again")
