"""Checks of a bundle: its closed file list, and every pack in it."""

from __future__ import annotations

from pathlib import Path

from ..errors import AdapterpackError, BaseMismatch
from ..pack import identity
from ..pack import manifest as m
from ..pack.checkpoint import Checkpoint
from ..pack.match import Verdict
from ..pack.validate import Finding, Report, examine
from .bundle import FILE_NAME, Bundle, read_bundle


def validate_bundle(folder: Path, base: Path | None = None, allow_structural: bool = False) -> Report:
    """The report on a bundle: files, digests, packs, and with ``base`` that it was made from that base."""
    try:
        bundle = read_bundle(folder)
    except AdapterpackError as error:
        return Report("bundle", str(folder), None, (Finding("AB001", "error", FILE_NAME, str(error), error.remedy or ""),))
    findings = []
    listed = {entry.path: entry for entry in bundle.files}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        if path.is_symlink():
            findings.append(Finding("AB101", "error", relative, "only regular files may lie in a bundle", "remove it"))
        elif path.is_file() and relative not in listed and relative != FILE_NAME:
            findings.append(Finding("AB102", "error", relative, "a file that the manifest does not list", "remove it, or export again"))
    for relative, entry in listed.items():
        path = folder / relative
        if not path.is_file():
            findings.append(Finding("AB103", "error", relative, "a listed file is missing", "copy the bundle again"))
        elif path.stat().st_size != entry.size or m.sha256_of(path) != entry.sha256:
            message = "the file is not the one that the manifest lists: it was altered or truncated"
            findings.append(Finding("AB104", "error", relative, message, "copy the bundle again"))
    for adapter in bundle.adapters:
        report, pack = examine(folder / adapter.path)
        findings += [Finding(f.rule, f.severity, f"{adapter.path}/{f.where}", f.message, f.fix) for f in report.findings]
        if pack is not None and pack.id != adapter.pack:
            findings.append(Finding("AB201", "error", adapter.path, "the pack is not the one that the bundle names", "export again"))
    known, about_base = _base(bundle, base, allow_structural)
    open_questions = [] if base else ["base: none was named (--base)"]
    open_questions.append("graph: replayed when it was exported, not here")
    return Report("bundle", str(folder), None, (*findings, *about_base), tuple(open_questions), base=known)


def _base(bundle: Bundle, base: Path | None, allow_structural: bool) -> tuple[Verdict | None, list[Finding]]:
    """AB301, and the verdict on the base if one was named."""
    if base is None:
        return None, []
    checkpoint, remedy = Checkpoint(base), "name the base that it was exported from"
    found = identity.read(checkpoint, bundle.base)
    try:
        known = identity.require("the bundle", bundle.base, found, name=checkpoint.name, where=base, allow_structural=allow_structural)
    except BaseMismatch as error:
        return identity.verdict(bundle.base, found), [Finding("AB301", "error", "base", str(error), remedy)]
    return known, [Finding("AB301", "warning", "base", known.means, remedy)] if known.name == "structural" else []
