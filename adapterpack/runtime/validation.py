"""Validates a bundle: its closed file list, every pack in it, its base, and with ``full`` the canaries on its graphs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..base import compatibility
from ..base.checkpoint import Checkpoint
from ..base.compatibility import Verdict
from ..bundle.files import differences
from ..bundle.manifest import FILE_NAME, GRAPH, Bundle, read_bundle
from ..errors import AdapterpackError, BaseMismatch
from ..library_errors import library_errors
from ..pack.validate.budget import Budget, Spent
from ..pack.validate.checks.folder import entries
from ..pack.validate.open_questions import NO_BASE
from ..pack.validate.validation import Finding, Report, examine

_NOT_RUN = "graph and canaries: replayed with full, where there is no error"


def validate_bundle(
    folder: Path, base: Path | Checkpoint | None = None, *, full: bool = False, budget: Budget | None = None, allow_structural: bool = False
) -> Report:
    """The report on a bundle: files, digests, packs, and with ``base`` that it was made from that base; within ``budget``.

    ``full`` also runs the graph: the canaries of its packs are replayed. A bundle with an error is not run.
    """
    findings: list[Finding] = []
    left_open: list[str] = []
    verdict: Verdict | None = None
    try:
        for result in _findings(folder, base, budget or Budget(), allow_structural):
            if isinstance(result, Finding):
                findings.append(result)
            elif isinstance(result, Verdict):
                verdict = result
            else:
                left_open.append(result)
    except Spent as spent:
        left_open.append(str(spent))
    except AdapterpackError as error:
        findings.append(Finding("AB001", "error", FILE_NAME, error.sentence, error.remedy or ""))
        return Report("bundle", str(folder), None, tuple(findings))
    incomplete = bool(left_open) or (full and base is None)
    sound = not left_open and not any(finding.severity == "error" for finding in findings)
    broken, about_graph = _replayed(folder) if full and sound else ([], (_NOT_RUN,))
    open_questions = (*left_open, *([] if base else [NO_BASE]), *about_graph)
    return Report("bundle", str(folder), None, (*findings, *broken), open_questions, incomplete, verdict)


def _findings(folder: Path, base: Path | Checkpoint | None, budget: Budget, allow_structural: bool) -> Iterator[Finding | Verdict | str]:
    """Findings, the verdict on the base, and as texts what the budget was too small for."""
    bundle = read_bundle(folder)
    irregular = False
    for finding in _file_list(folder, bundle, budget):
        irregular |= finding.rule == "AB101"
        yield finding
    if irregular:
        return  # nothing is opened that may lead out of the folder
    yield from _digests(folder, bundle, budget)
    yield from _confined(folder)
    for adapter in bundle.adapters:
        budget.require_time(f"the adapter {adapter.name}")
        report, pack = examine(folder / adapter.path, budget=budget)
        for one in report.findings:
            yield one._replace(where=f"{adapter.path}/{one.where}", file=one.file and f"{adapter.path}/{one.file}")
        if report.incomplete:
            yield f"{adapter.path}: {report.not_checked[0]}"
        elif pack is not None and pack.id != adapter.pack:
            yield Finding("AB201", "error", adapter.path, "the pack is not the one that the bundle names", "export again")
    if base is not None:
        budget.require_time("the base")
        yield from about_base(bundle, base if isinstance(base, Checkpoint) else Checkpoint(base), budget, allow_structural)


def about_base(bundle: Bundle, checkpoint: Checkpoint, budget: Budget, allow_structural: bool) -> Iterator[Finding | Verdict]:
    """AB301, and the verdict on the base; of one whose weights are elsewhere, what its headers say."""
    remedy = "name the base that it was exported from"
    with checkpoint.watched(lambda: budget.require_time("the bytes of the base")):
        fingerprint = compatibility.deciding_fingerprint(checkpoint, bundle.base)
    try:
        verdict = compatibility.require("the bundle", bundle.base, fingerprint, name=checkpoint.name, where=checkpoint.where,
                                 allow_structural=allow_structural or not checkpoint.has_weights)
    except BaseMismatch as error:
        yield Finding("AB301", "error", "base", error.sentence, error.remedy or remedy)
        yield compatibility.compare(bundle.base, fingerprint)
        return
    if verdict.name == "structural" and checkpoint.has_weights:
        yield Finding("AB301", "warning", "base", verdict.means, remedy)
    yield verdict


def _replayed(folder: Path) -> tuple[list[Finding], tuple[str, ...]]:
    """AB401, and which canaries say nothing of this graph."""
    from . import canary  # noqa: PLC0415 - ONNX Runtime: a pull, and a validation that runs no graph, must not pay for it
    from .session import Session  # noqa: PLC0415

    try:
        with library_errors("onnxruntime", "the graph cannot be run", where=GRAPH):
            replayed = canary.verify(Session(folder, provider="cpu"))
    except AdapterpackError as error:
        return [Finding("AB401", "error", error.where or GRAPH, error.sentence, error.remedy or "export again", type(error))], ()
    return [], tuple(f"canary of {name}: {reason}" for name, reason in replayed["not_replayed"].items())


def _file_list(folder: Path, bundle: Bundle, budget: Budget) -> Iterator[Finding]:
    listed = {FILE_NAME, *(entry.path for entry in bundle.files)}
    for path in (path for top in entries(folder) for path in (top, *sorted(top.rglob("*")))):
        budget.require_time("the list of files")
        relative = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            yield Finding("AB101", "error", relative, "only regular files may lie in a bundle", "remove it")
        elif path.is_file() and relative not in listed:
            yield Finding("AB102", "error", relative, "a file that the manifest does not list", "remove it, or export again")


def _confined(folder: Path) -> Iterator[Finding]:
    """AB105."""
    from ..onnx_graph.confine import require_confined  # noqa: PLC0415 - onnx, and packs have no graph

    for path in sorted(folder.glob("*.onnx")):
        try:
            require_confined(path, must_exist=False)  # a missing file is AB103
        except AdapterpackError as error:
            yield Finding("AB105", "error", path.name, error.sentence, error.remedy or "do not use this bundle")


def _digests(folder: Path, bundle: Bundle, budget: Budget) -> Iterator[Finding]:
    """AB103-AB104. Every file is hashed, whatever was found before."""
    for wrong in differences(folder, bundle, again=True, watch=lambda: budget.require_time("the digests of the files")):
        if wrong.found is None:
            yield Finding("AB103", "error", wrong.path, "a listed file is missing", "copy the bundle again")
        else:
            message = "the file is not the one that the manifest lists: it was altered or truncated"
            yield Finding("AB104", "error", wrong.path, message, "copy the bundle again")
