"""Validates a pack: reads every file once, runs every check that applies, and builds the pack from the bytes
that were checked.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from ...adapter_methods import get
from ...base import Checkpoint
from ...errors import AdapterpackError, FormatError, StorageError, Unsupported
from ...io import LARGE, TENSORS, HeldFile, Streamed, read_file, strict_json
from ...manifest import manifest as m
from ...manifest import method_of
from ...paths import StrPath
from ...peft import layout
from .. import SIGNATURE, TEMPLATE, Pack, from_peft, require_unrevoked_pack, require_unrevoked_signer
from .checks import (
    OPTION,
    Budget,
    Check,
    Finding,
    Report,
    Spent,
    Subject,
    base_findings,
    base_verdict,
    options,
    remote_code,
    template_findings,
    unreadable,
)
from .checks import folder as files
from .checks.composition import composition
from .checks.finding import CHECK
from .registry import CHECKS

__all__ = ["Budget", "Finding", "Report", "examine", "load", "validate"]


def validate(
    path: StrPath,
    base: StrPath | None = None,
    *,
    full: bool = False,
    budget: Budget | None = None,
    allow_structural: bool = False,
) -> Report:
    """Runs every check that applies to the pack at ``path``; with ``base``, also checks that the pack belongs
    to it.

    ``full`` adds the expensive checks; if one of them cannot run, the report's state is ``not fully
    checked``, and so it is if the ``budget`` of time or memory runs out. ``allow_structural`` reports a base
    with equal names, dtypes and shapes but other weights as a warning.

    Returns:
        A report: ``report.state``, ``report.findings``, ``report.not_checked``, ``report.base`` (the verdict
            on the base).
        Faults are findings, not exceptions.

    Raises:
        StorageError: there is no such folder.

    Example:
        >>> validate("packs/tickets").valid  # doctest: +SKIP
        True
    """
    return examine(Path(path), None if base is None else Checkpoint(base), full, budget, allow_structural)[0]


def examine(
    folder: Path,
    base: Checkpoint | None = None,
    full: bool = False,
    budget: Budget | None = None,
    allow_structural: bool = False,
) -> tuple[Report, Pack | None]:
    """Returns the report and, if the pack could be read at all, the pack, built from the bytes that were
    checked.
    """
    if not folder.is_dir():
        raise StorageError(
            "there is no such pack",
            where=folder,
            remedy="name a folder that holds adapterpack.json or adapter_config.json",
        )
    look = _examine if os.path.lexists(folder / m.FILE_NAME) else _examine_peft
    try:
        with _turn(folder):
            return look(folder, base, full, budget or Budget(), allow_structural)
    except AdapterpackError as error:
        return Report("pack", str(folder), None, (unreadable(error, folder),)), None
    except Spent as spent:
        kind = "pack" if look is _examine else "peft"
        return Report(kind, str(folder), None, (), (str(spent),), incomplete=True), None


_large = threading.Lock()
_MOST_FINDINGS = 1000


def _turn(folder: Path) -> AbstractContextManager[object]:
    """Lets only one thread at a time validate a large pack, because a mapped file counts as memory; small
    packs do not wait.
    """
    try:
        return _large if (folder / TENSORS).stat().st_size > LARGE else nullcontext()
    except OSError:
        return nullcontext()  # opening the file will report the problem


def _examine(
    folder: Path, base: Checkpoint | None, full: bool, budget: Budget, allow_structural: bool
) -> tuple[Report, Pack | None]:
    def refuse(findings: list[Finding], manifest: m.Manifest | None = None) -> tuple[Report, None]:
        return Report("pack", str(folder), None if manifest is None else manifest.id, tuple(findings)), None

    findings = cap_findings(files.regular_files(folder, budget))
    data = b""
    value = None
    if not findings:
        data = files.read_manifest(folder / m.FILE_NAME)
        value = strict_json.loads(data, folder / m.FILE_NAME, m.MAX_BYTES)
        # runs first, because the manifest's parser would report such keys as unknown fields
        findings = cap_findings(remote_code(value, m.FILE_NAME, budget=budget))
    if findings:
        return refuse(findings)
    manifest = m.parse(data, folder / m.FILE_NAME, value)
    if findings := [*composition(manifest)]:
        return refuse(findings, manifest)
    require_known(manifest, folder / m.FILE_NAME)
    require_unrevoked_signer(folder)
    named = frozenset({m.FILE_NAME, *(entry.path for entry in manifest.files)})
    if findings := cap_findings(files.forbidden_files(folder, named, budget)) or cap_findings(
        files.closed_file_list(folder, manifest)
    ):
        return refuse(findings, manifest)
    try:
        contents = files.read_files(folder, manifest, budget)
    except Spent as spent:
        return Report("pack", str(folder), manifest.id, (), (str(spent),), incomplete=True), None
    absent = (
        []
        if TENSORS in contents
        else [files.MISSING.at(TENSORS, "the manifest lists no tensor file", pointer="/files")]
    )
    if findings := [*files.magic_bytes(contents)] or absent:
        return refuse(findings, manifest)
    file = HeldFile(contents[TENSORS], folder / TENSORS)
    pack = Pack(
        manifest,
        {name: file.read(name) for name in file.tensors if name in manifest.tensors},
        folder,
        {name: bytes(data) for name, data in contents.items() if name == TEMPLATE},
    )
    subject = Subject(folder, pack, file, contents, base, full, budget, allow_structural)
    findings, spent_on = run_checks(subject, CHECKS)
    # A large pack keeps no arrays in memory: tensors are read again on access and compared with their
    # digests.
    if len(contents[TENSORS]) > LARGE:
        digests = {name: entry.sha256 for name, entry in manifest.tensors.items()}
        pack = dataclasses.replace(pack, tensors=Streamed.of(file, pack.tensors, digests))
    open_questions = (*spent_on, *questions_about(subject))
    return Report(
        "pack",
        str(folder),
        pack.id,
        tuple(findings),
        open_questions,
        bool(spent_on) or (full and base is None),
        None if spent_on else base_verdict(pack, base, findings),
    ), pack


def run_checks(subject: Subject, checks: tuple[Check, ...]) -> tuple[list[Finding], list[str]]:
    """Returns the findings up to the first check with an error, and what there was no time for."""
    findings = []
    for check in checks:
        try:
            subject.budget.require_time(f"{check.__name__.replace('_', ' ')} and what follows")
            findings.extend(cap_findings(check(subject)))
        except Spent as spent:
            return findings, [str(spent)]
        except AdapterpackError as error:
            findings.append(unreadable(error, subject.folder, CHECK))
        if any(finding.severity == "error" for finding in findings):
            break
    return findings, []


def cap_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Returns the findings, at most a thousand per rule plus their number, because a malicious file can have
    one every few bytes.
    """
    kept = []
    counts = Counter[str]()
    for finding in findings:
        counts[finding.rule] += 1
        if counts[finding.rule] <= _MOST_FINDINGS:
            kept.append(finding)
    first = {finding.rule: finding for finding in reversed(kept)}
    return kept + [
        first[rule]._replace(message=f"there are {count} findings of this rule; the others are not listed")
        for rule, count in counts.items()
        if count > _MOST_FINDINGS
    ]


def load(path: StrPath, name: str | None = None) -> Pack:
    """The pack in a folder, every digest verified; a folder that PEFT wrote is imported. ``name``: what to
    call it here.

    A folder of a newer PEFT may have options that are not known here. An unknown option that is on is an
    error. Unknown options that are off are named in a ``UserWarning``, because nothing tells whether off is
    their default (``validate`` reports them as AP604).

    Raises:
        ConfigError: ``name`` is not a valid pack name.
        FormatError: the pack is truncated, altered or malformed.
        NonFinite: a tensor contains NaN or infinity.
        UnknownMethod: its method is not registered.

    Example:
        >>> load("packs/tickets").name  # doctest: +SKIP
        'tickets'
    """
    pack, _ = check(path)
    return pack if name is None else pack.called(name)


def as_pack(pack: Pack | StrPath) -> Pack:
    """Returns a pack as it is, or loads it from its folder like :func:`load`."""
    return pack if isinstance(pack, Pack) else load(pack)


def load_proved(path: Path, name: str) -> Pack:
    """Loads a pack like :func:`load`, from a folder whose bytes the caller knows to have passed all checks
    and not to have changed: only the manifest is read now, and each tensor on access, with its digest.

    Raises:
        FormatError, UnknownMethod, Unsupported: as for :func:`load`.
    """
    manifest = m.parse(files.read_manifest(path / m.FILE_NAME), path / m.FILE_NAME)
    require_known(manifest, path / m.FILE_NAME)
    named = {entry.path: entry.size for entry in manifest.files}
    extra = {TEMPLATE: read_file(path / TEMPLATE, named[TEMPLATE])} if TEMPLATE in named else {}
    return Pack(manifest, {}, path, extra).unloaded().called(name)


def check(path: StrPath) -> tuple[Pack, Report]:
    """Loads a pack like :func:`load`, and also returns the report.

    Raises:
        FormatError, NonFinite, UnknownMethod: as for :func:`load`.
    """
    report, pack = examine(Path(path))
    for finding in report.findings:
        if finding.severity == "error":
            raise finding.as_error("pack", path)
        if finding.rule == OPTION.id:
            warnings.warn(f"{path}: {finding.message}", stacklevel=3)
    if pack is None or report.incomplete:
        raise FormatError(
            "the pack could not be checked to the end",
            where=path,
            found="; ".join(report.not_checked),
            remedy="validate it with a larger budget",
        )
    return pack, report


def _examine_peft(
    folder: Path, base: Checkpoint | None, full: bool, budget: Budget, allow_structural: bool
) -> tuple[Report, Pack | None]:
    """Validates a folder that PEFT wrote: importing it runs the checks that apply, and its sites can be
    looked up in a base.

    Its other files are neither opened nor imported, so files that a pack must not contain are only warnings,
    and the state of a trainer is only mentioned.
    """
    if not (folder / layout.CONFIG).is_file():
        raise FormatError(
            "the folder is not a pack",
            where=folder,
            expected=f"{m.FILE_NAME} or {layout.CONFIG}",
            remedy="name the folder that train, save or compose wrote",
        )
    state = frozenset(path.name for path in folder.iterdir() if files.TRAINER_STATE.fullmatch(path.name))
    findings = [
        finding._replace(severity="warning")
        for finding in cap_findings(files.forbidden_files(folder, state | {TENSORS}, budget))
    ]
    findings += cap_findings(_foreign_json(folder, budget))
    if any(finding.severity == "error" for finding in findings):
        return Report("peft", str(folder), None, tuple(findings)), None
    try:
        budget.require_time("the import")
        budget.require_memory((folder / TENSORS).stat().st_size if (folder / TENSORS).is_file() else 0)
    except Spent as spent:
        return Report("peft", str(folder), None, tuple(findings), (str(spent),), incomplete=True), None
    pack, unknown, _ = from_peft.import_folder(folder)
    require_unrevoked_pack(pack.manifest, folder)
    pack = dataclasses.replace(pack, path=folder)
    findings += options(unknown)
    about_base = SHAPES_ONLY if base else NO_BASE
    open_questions: tuple[str, ...] = ("digests and canary: PEFT folders carry none", about_base)
    if state:
        open_questions += (f"the state of a trainer, which nothing opens: {', '.join(sorted(state)[:8])}",)
    try:
        findings += base_findings(pack, base, budget, allow_structural)
    except Spent as spent:
        return Report(
            "peft", str(folder), pack.id, tuple(findings), (*open_questions, str(spent)), incomplete=True
        ), pack
    return Report(
        "peft",
        str(folder),
        pack.id,
        tuple(findings),
        open_questions,
        full,
        base_verdict(pack, base, findings),
    ), pack


def _foreign_json(folder: Path, budget: Budget) -> Iterator[Finding]:
    """Yields findings about keys that load code, and about the chat template, in files that PEFT wrote."""
    for name in (layout.CONFIG, "tokenizer_config.json"):
        path = folder / name
        if not path.is_file() or path.stat().st_size > 4 << 20:
            continue
        try:
            value = strict_json.loads(path.read_bytes(), path, 4 << 20)
        except FormatError:
            if name == layout.CONFIG:
                return  # reading the config will report it
            continue
        yield from remote_code(value, name, foreign=True, budget=budget)
        template = value.get("chat_template") if isinstance(value, dict) else None
        for entry in template if isinstance(template, list) else [template]:
            text = entry.get("template") if isinstance(entry, dict) else entry
            if isinstance(text, str):
                yield from template_findings(
                    text.encode("utf-8", "surrogatepass"), name, budget, foreign=True
                )
    if (folder / TEMPLATE).is_file():
        yield from template_findings(read_file(folder / TEMPLATE, 1 << 20), TEMPLATE, budget, foreign=True)


def require_known(manifest: m.Manifest, where: object) -> None:
    """Checks that the pack is not revoked, and that its methods are registered here in a known version.

    Raises:
        Revoked: the pack, a file or a tensor is on the list of what was revoked.
        UnknownMethod: a method is not registered.
        Unsupported: the pack was made by a newer version of a method.
    """
    require_unrevoked_pack(manifest, where)
    secondary = [
        (group.method, get(group.method.type)) for group in manifest.groups if group.method is not None
    ]
    for made_by, method in ((manifest.method, method_of(manifest)), *secondary):
        if made_by.spec_version > method.config.spec_version:
            raise Unsupported(
                f"the pack was made by a newer version of the method {method.name}",
                where=where,
                expected=f"spec_version {method.config.spec_version}",
                found=made_by.spec_version,
                remedy=f"update the package that brings {method.name}",
            )


NO_BASE = "base: none was named (--base)"
SHAPES_ONLY = "base: compared by its shapes only"
_CANARY = "canary: it needs the running model; attach, export, and validate --full of a bundle replay it"
_CLAIMS = ("training", "metrics", "license", "base_license")


def questions_about(s: Subject) -> Iterator[str]:
    """Yields one text per open question, each ``what: why, or how to check it``."""
    manifest = s.manifest
    if s.base is None:
        yield NO_BASE
    elif manifest.base.content is None and manifest.base.files is None:
        yield SHAPES_ONLY
    elif manifest.tokenizer is None:
        yield "tokenizer: the pack does not say which one it was trained with"
    yield _CANARY if manifest.canary else "canary: the pack carries none"
    if (s.folder / SIGNATURE).exists():
        yield f"signature: not verified (adapterpack verify {s.folder} --key KEY)"
    if not s.full:
        yield "second reader: the file was not read by the reference reader of safetensors, too (--full)"
    if manifest.lineage and manifest.lineage.parents:
        yield "lineage: the parents are named by digest and were not fetched"
    if claims := [name for name in _CLAIMS if getattr(manifest, name)]:
        yield f"claims: {', '.join(name.replace('_', ' ') for name in claims)} cannot be checked"
