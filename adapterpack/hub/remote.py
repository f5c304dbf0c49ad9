"""Validates an artifact on a hub: without its weights, by every check that needs only the listing, headers
and small files, or in full by downloading all of its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base import CARRIED, Checkpoint, Verdict, is_repo
from ..errors import AdapterpackError, FormatError, HubError
from ..io import TENSORS, strict_json
from ..manifest import manifest as m
from ..pack import SIGNATURE, Budget, Pack, from_peft
from ..pack.validate import (
    HEADER_CHECKS,
    NO_BASE,
    SHAPES_ONLY,
    examine,
    questions_about,
    require_known,
    run_checks,
)
from ..pack.validate.checks import (
    Finding,
    Report,
    Spent,
    Subject,
    base_verdict,
    options,
    remote_code,
    unreadable,
)
from ..pack.validate.checks.composition import composition
from ..peft import base_hint
from ..peft.options import parse_config
from ..runtime import validate_bundle
from ..runtime.sessions.validation import about_base, about_texts, other_tokenizer, texts_of_base
from .artifact import Artifact, differences, open_remote
from .base import RemoteBase, remote_base
from .pull import download, scratch_folder
from .transport import HeaderFile, ListedFile, Remote, connect, fetch, names, read_header, tree

_FIRST = 100_000
"""Bytes of the first range request; the headers of most adapters are shorter."""
_MAX_TEXT = 16 << 20
"""The most bytes of a bundle's file that is downloaded here; the tokenizers of most models are smaller."""
_GRAPHS = (
    "graphs and slots: neither what the graphs compute nor that the slots hold the packs, of which only the "
    "manifests were read (--full)"
)
_VALUES = "values: only the header of the tensor file was read (--full reads everything)"
_DIGESTS = "digests: sizes and sha256 are the hub's word, and not all files have one there (--full)"
_SIGNATURE = "signature: not verified (adapterpack pull it to a folder, then adapterpack verify)"
_NO_MANIFEST = (
    "no manifest: one would add the sha256 of every file and tensor, the base's identity by content, the "
    "resolved config and scale of every site, the tokenizer, a canary, the license and the lineage "
    "(adapterpack pull, then push)"
)
_OF_FOLDERS = frozenset({NO_BASE, SHAPES_ONLY})
"""Open questions for a local base, or without one, that a base on a hub answers."""


@dataclass(frozen=True)
class RemoteContext:
    """The artifact to validate, and where to put files. ``folder`` holds its manifest, ``base_folder``
    receives files of a base, and ``base`` is the base that the user named (a folder or a reference).
    """

    remote: Remote
    artifact: Artifact
    listed: Mapping[str, ListedFile]
    folder: Path
    base_folder: Path
    base: Path | str | None
    budget: Budget
    allow_structural: bool
    token: str | None

    @property
    def named_base(self) -> m.Base:
        """The base that the artifact itself names."""
        if self.artifact.kind == "peft":
            return base_hint(parse_config(self.artifact.manifest_bytes, Path(self.artifact.manifest_name)))
        base: m.Base = self.artifact.manifest.base
        return base

    def readable_base(self) -> tuple[Checkpoint | None, tuple[str, ...]]:
        """Returns the base to compare with: the user's, else the artifact's on the same hub, else None with
        the reason.

        Raises:
            AdapterpackError: the base that the user named cannot be read.
        """
        if isinstance(self.base, Path):
            return Checkpoint(self.base), ()
        self.base_folder.mkdir()
        if self.base is not None:
            return remote_base(names.parse(self.base), self.base_folder, self.token), ()
        name, commit = self.named_base.name, self.named_base.commit
        if name is None or not is_repo(name):
            return None, (f"base: {name or 'none is named'}, which is not ORG/NAME on a hub (--base)",)
        try:
            return remote_base(
                names.HubReference(name, commit or names.MAIN), self.base_folder, self.token
            ), ()
        except AdapterpackError as error:
            return None, (f"base: {name} was not compared: {error.what} (--base)",)

    def open_questions(self, base: Checkpoint | None, verdict: Verdict | None) -> tuple[str, ...]:
        """Returns what the headers of a base on a hub leave open."""
        if not isinstance(base, RemoteBase):
            return ()
        same_commit = ", at the commit that is named" if base.commit == self.named_base.commit else ""
        weights = (
            f"base: only the listing and the headers of {base.remote} were read{same_commit}; its weights "
            "were not (--base FOLDER)"
        )
        unread = tuple(
            f"tokenizer: {name} of the base is large, and the hub lists no sha256 of it (--base FOLDER)"
            for name in base.unread
        )
        return (*(() if verdict is not None and verdict.accepted else (weights,)), *unread)


def _check(context: RemoteContext, pack: Pack, file: HeaderFile, small_files: Mapping[str, bytes]) -> Report:
    """Runs the checks of a pack on its headers, with the base if it can be read."""
    base, why = context.readable_base()
    subject = Subject(
        Path(context.remote.reference.address),
        pack,
        file,
        small_files,
        base,
        False,
        context.budget,
        context.allow_structural,
    )
    findings, spent = run_checks(subject, HEADER_CHECKS)
    verdict = None if spent else base_verdict(pack, base, findings)
    answered = frozenset[str]() if isinstance(context.base, Path) else _OF_FOLDERS
    questions = [text for text in questions_about(subject) if text not in answered]
    not_checked = (*spent, *questions, *why, *context.open_questions(base, verdict))
    return Report("pack", "", pack.id, tuple(findings), not_checked, True, verdict)


def _pack(context: RemoteContext) -> Report:
    manifest = context.artifact.manifest
    artifact = context.artifact
    require_known(manifest, f"{context.remote}, {artifact.manifest_name}")
    if refused := [*remote_code(_json(artifact), artifact.manifest_name)] or [*composition(manifest)]:
        return Report("pack", "", manifest.id, tuple(refused))
    context.budget.require_memory(artifact.size)  # some methods dequantize int8 tensors with their scales
    file = _header(context)
    small_files = {}
    for entry in manifest.files:
        if entry.path != TENSORS:
            fetch(
                context.remote,
                ListedFile(entry.path, entry.size, entry.sha256, None),
                context.folder / entry.path,
            )
            small_files[entry.path] = (context.folder / entry.path).read_bytes()
    pack = Pack(
        manifest,
        {name: file.read(name) for name in file.tensors if name in manifest.tensors},
        None,
        small_files,
    )
    return _incomplete(context, _check(context, pack, file, small_files), "PEFT's reading of it (--full)")


def _peft(context: RemoteContext) -> Report:
    """Imports the adapter with zeros in place of its weights; names, shapes, pairs, options and sites are the
    real ones.
    """
    artifact = context.artifact
    code = tuple(remote_code(_json(artifact), artifact.manifest_name, foreign=True))
    if any(finding.severity == "error" for finding in code):
        return Report("peft", "", None, code)
    context.budget.require_memory(artifact.size)
    file = _header(context)
    pack, unknown, _ = from_peft.import_folder(context.folder, tensors=file)
    report = _check(context, pack, file, {})
    return _incomplete(
        context,
        report._replace(kind="peft", id=None, findings=(*code, *options(unknown), *report.findings)),
        _NO_MANIFEST,
    )


def _bundle(context: RemoteContext) -> Report:
    bundle = context.artifact.manifest
    verdict = None
    findings = [*_check_bundle(context)]
    unread = _fetch_texts(context)
    if not unread:
        findings += about_texts(context.folder, bundle)
    base, why = context.readable_base()
    for result in () if base is None else about_base(bundle, base, context.budget, context.allow_structural):
        if isinstance(result, Finding):
            findings.append(result)
        else:
            verdict = result
    if base is not None and not unread:
        findings += texts_of_base(context.folder, bundle, base)
    left = (
        *(f"tokenizer, chat template and configuration: {name} is large (--full)" for name in unread),
        *why,
    )
    report = Report(
        "bundle",
        "",
        context.artifact.id,
        tuple(findings),
        (*left, *context.open_questions(base, verdict)),
        True,
        verdict,
    )
    return _incomplete(context, report, _GRAPHS)


def _fetch_texts(context: RemoteContext) -> tuple[str, ...]:
    """Downloads what a session reads besides graphs and packs. Returns the names of files that are too large
    for that.
    """
    entries = [entry for entry in context.artifact.files if entry.path in CARRIED]
    if large := tuple(entry.path for entry in entries if entry.size > _MAX_TEXT):
        return large
    for entry in entries:
        context.budget.require_time(entry.path)
        fetch(context.remote, context.listed[entry.path], context.folder / entry.path, entry.sha256)
    return ()


def _check_bundle(context: RemoteContext) -> Iterator[Finding]:
    """AB201: the manifests of the bundle's packs are not those that it names. AB203: its tokenizer is not
    theirs.
    """
    entries = {entry.path: entry for entry in context.artifact.files}
    for number, adapter in enumerate(context.artifact.manifest.adapters):
        path = f"{adapter.path}/{m.FILE_NAME}"
        if path not in entries or context.listed[path].size > m.MAX_BYTES:
            yield Finding(
                "AB103", "error", adapter.path, "a pack without a manifest", "export again", file=path
            )
            continue
        place = context.folder / f"pack{number}.json"
        fetch(context.remote, context.listed[path], place, entries[path].sha256)
        pack = m.parse(place.read_bytes(), f"{context.remote}, {path}")
        if pack.id != adapter.pack:
            yield Finding(
                "AB201",
                "error",
                adapter.path,
                "the pack is not the one that the bundle names",
                "export again",
                file=path,
            )
        yield from other_tokenizer(context.artifact.manifest, adapter, pack)


def _json(artifact: Artifact) -> Any:
    return strict_json.loads(artifact.manifest_bytes, artifact.manifest_name, len(artifact.manifest_bytes))


def _header(context: RemoteContext) -> HeaderFile:
    size = next((entry.size for entry in context.artifact.files if entry.path == TENSORS), None)
    if size is None:
        raise FormatError("the manifest lists no tensor file", where=f"{context.remote}, {TENSORS}")
    return read_header(context.remote, TENSORS, size, _FIRST)


def _incomplete(context: RemoteContext, report: Report, more: str) -> Report:
    signature = (_SIGNATURE,) if SIGNATURE in context.listed else ()
    return report._replace(
        not_checked=(_VALUES, _DIGESTS, *signature, more, *report.not_checked), incomplete=True
    )


HEADER_REPORTS: dict[str, Callable[[RemoteContext], Report]] = {
    "pack": _pack,
    "peft": _peft,
    "bundle": _bundle,
}
"""Kind of artifact -> the function that validates it by its headers."""


def validate_remote(
    reference: str,
    base: Path | str | None = None,
    *,
    full: bool,
    budget: Budget | None,
    allow_structural: bool = False,
    token: str | None = None,
) -> Report:
    """Returns the report on an artifact of a hub. ``full`` downloads everything, but not into the store;
    without it the report is incomplete.

    ``base`` is a folder or an ``hf://`` reference; by default it is the base that the artifact names, on the
    same hub. Reads the listing and headers of a base on a hub, never its weights.

    Raises:
        HubError: the hub refuses; the subclass says why.
    """
    remote = connect(names.parse(reference), token)
    listed = tree(remote)
    budget = budget or Budget()
    with scratch_folder() as scratch:
        folder = Path(scratch) / remote.reference.name  # an imported adapter gets the name of its folder
        folder.mkdir()
        try:
            artifact = open_remote(remote, listed, folder)
        except HubError:
            raise
        except AdapterpackError as error:
            return Report("pack", str(remote), None, (unreadable(error, Path(str(remote))),))
        if findings := tuple(differences(artifact, listed)):
            return Report(artifact.kind, str(remote), artifact.id, findings)
        context = RemoteContext(
            remote, artifact, listed, folder, Path(scratch) / "base", base, budget, allow_structural, token
        )
        try:
            report = _whole(context) if full else HEADER_REPORTS[artifact.kind](context)
        except Spent as spent:
            return Report(artifact.kind, str(remote), artifact.id, (), (str(spent),), incomplete=True)
        except HubError:
            raise
        except AdapterpackError as error:
            return Report(
                artifact.kind,
                str(remote),
                artifact.id,
                (unreadable(error, Path(remote.reference.address)),),
            )
    return report._replace(path=str(remote))


def _whole(context: RemoteContext) -> Report:
    """Downloads and checks everything; of a base on a hub only the headers."""
    download(context.remote, context.artifact, context.listed, context.folder)
    base, why = context.readable_base()
    if context.artifact.kind == "bundle":
        report = validate_bundle(
            context.folder, base, full=True, budget=context.budget, allow_structural=context.allow_structural
        )
    else:
        report = examine(context.folder, base, True, context.budget, context.allow_structural)[0]
    left = context.open_questions(base, report.base)
    not_checked = (*(text for text in report.not_checked if text != NO_BASE), *why, *left)
    return report._replace(not_checked=not_checked, incomplete=report.incomplete or bool(left))
