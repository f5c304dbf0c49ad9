"""What can be said of an adapter on a hub without its weights, kind by kind: every check that asks for headers and small files only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..base.checkpoint import Checkpoint
from ..base.compatibility import Verdict
from ..errors import AdapterpackError, FormatError
from ..io import strict_json
from ..io.safe_open import TENSORS
from ..manifest import manifest as m
from ..pack import from_peft
from ..pack.pack import SIGNATURE, Pack
from ..pack.validate.budget import Budget
from ..pack.validate.checks.base import base_verdict
from ..pack.validate.checks.composition import composition
from ..pack.validate.checks.peft_agreement import options
from ..pack.validate.checks.remote import remote_code
from ..pack.validate.context import Subject
from ..pack.validate.finding import Finding, Report
from ..pack.validate.open_questions import NO_BASE, SHAPES_ONLY, unchecked
from ..pack.validate.registry import HEADER_CHECKS
from ..pack.validate.validation import require_known, run_checks
from ..peft.options import base_hint, parsed
from . import names
from .artifact import Artifact
from .base import RemoteBase, remote_base
from .transport.client import Listed, Remote
from .transport.headers import HeaderFile, read_header
from .transport.transfer import fetch

_FIRST = 100_000
"""Bytes of the first range: the headers of most adapters are shorter."""
_VALUES = "values: only the header of the tensor file was read (--full reads everything)"
_DIGESTS = "digests: sizes and sha256 are the hub's word, and not all files have one there (--full)"
_NO_MANIFEST = ("no manifest: one would add the sha256 of every file and tensor, the base's identity by content, the resolved config "
                "and scale of every site, the tokenizer, a canary, the license and the lineage (adapterpack pull, then push)")
_OF_FOLDERS = frozenset({NO_BASE, SHAPES_ONLY})
"""What is open where no base, or a folder, was named; of a base on a hub more is known."""


@dataclass(frozen=True)
class Look:
    """A look at one artifact: ``folder`` holds its manifest, ``base_folder`` is for what is fetched of a base, ``base`` the one that
    the user named (a folder or a reference)."""

    remote: Remote
    artifact: Artifact
    listed: Mapping[str, Listed]
    folder: Path
    base_folder: Path
    base: Path | str | None
    budget: Budget
    allow_structural: bool
    token: str | None

    @property
    def wanted(self) -> m.Base:
        """The base that the artifact names."""
        if self.artifact.kind == "peft":
            return base_hint(parsed(self.artifact.mark, Path(self.artifact.mark_name)))
        found: m.Base = self.artifact.manifest.base
        return found

    def known_base(self) -> tuple[Checkpoint | None, tuple[str, ...]]:
        """The base to compare with: the named one, else the artifact's own on the same hub; or None, and why.

        Raises:
            AdapterpackError: the one that the user named cannot be read.
        """
        if isinstance(self.base, Path):
            return Checkpoint(self.base), ()
        self.base_folder.mkdir()
        if self.base is not None:
            return remote_base(names.parse(self.base), self.base_folder, self.token), ()
        name, commit = self.wanted.name, self.wanted.commit
        if name is None or not names.is_repo(name):
            return None, (f"base: {name or 'none is named'}, which is not ORG/NAME on a hub (--base)",)
        try:
            return remote_base(names.Reference(name, commit or names.MAIN), self.base_folder, self.token), ()
        except AdapterpackError as error:
            return None, (f"base: {name} was not compared: {error.what} (--base)",)

    def left_open(self, base: Checkpoint | None, verdict: Verdict | None) -> tuple[str, ...]:
        """What the headers of a base on a hub do not show."""
        if not isinstance(base, RemoteBase):
            return ()
        same_commit = ", at the commit that is named" if base.commit == self.wanted.commit else ""
        weights = f"base: only the listing and the headers of {base.remote} were read{same_commit}; its weights were not (--base FOLDER)"
        unread = tuple(f"tokenizer: {name} of the base is large, and the hub lists no sha256 of it (--base FOLDER)" for name in base.unread)
        return (*(() if verdict is not None and verdict.accepted else (weights,)), *unread)


def _checked(look: Look, pack: Pack, file: HeaderFile, held: Mapping[str, bytes]) -> Report:
    """The checks of a pack by its headers, with the base if one can be read."""
    base, why = look.known_base()
    subject = Subject(Path(look.remote.reference.address), pack, file, held, base, False, look.budget, look.allow_structural)
    findings, spent = run_checks(subject, HEADER_CHECKS)
    verdict = None if spent else base_verdict(pack, base, findings)
    answered = frozenset[str]() if isinstance(look.base, Path) else _OF_FOLDERS
    open_questions = [text for text in unchecked(subject) if text not in answered]
    return Report("pack", "", pack.id, tuple(findings), (*spent, *open_questions, *why, *look.left_open(base, verdict)), True, verdict)


def _pack(look: Look) -> Report:
    manifest, artifact = look.artifact.manifest, look.artifact
    require_known(manifest, f"{look.remote}, {artifact.mark_name}")
    code = [*remote_code(strict_json.loads(artifact.mark, artifact.mark_name, len(artifact.mark)), artifact.mark_name)]
    if code := code or [*composition(manifest)]:
        return Report("pack", "", manifest.id, tuple(code))
    look.budget.require_memory(artifact.size)  # some methods put int8 tensors and their scales together
    file, held = _header(look), {}
    for entry in manifest.files:
        if entry.path != TENSORS:
            fetch(look.remote, Listed(entry.path, entry.size, entry.sha256, None), look.folder / entry.path)
            held[entry.path] = (look.folder / entry.path).read_bytes()
    pack = Pack(manifest, {name: file.read(name) for name in file.tensors if name in manifest.tensors}, None, held)
    return _looked(look, _checked(look, pack, file, held), "PEFT's reading of it (--full)")


def _peft(look: Look) -> Report:
    """Imported with zeros in place of its weights: names, shapes, pairs, options and sites are those of the real ones."""
    artifact = look.artifact
    config = strict_json.loads(artifact.mark, artifact.mark_name, len(artifact.mark))
    code = tuple(remote_code(config, artifact.mark_name, foreign=True))
    if any(finding.severity == "error" for finding in code):
        return Report("peft", "", None, code)
    look.budget.require_memory(artifact.size)
    file = _header(look)
    pack, unknown = from_peft.imported(look.folder, tensors=file)
    report = _checked(look, pack, file, {})
    return _looked(look, report._replace(kind="peft", id=None, findings=(*code, *options(unknown), *report.findings)), _NO_MANIFEST)


def _bundle(look: Look) -> Report:
    from ..runtime.validation import about_base  # noqa: PLC0415 - packs do not need what bundles need

    findings, verdict = [*_bundled(look)], None
    base, why = look.known_base()
    for found in () if base is None else about_base(look.artifact.manifest, base, look.budget, look.allow_structural):
        if isinstance(found, Finding):
            findings.append(found)
        else:
            verdict = found
    report = Report("bundle", "", look.artifact.id, tuple(findings), (*why, *look.left_open(base, verdict)), True, verdict)
    return _looked(look, report, "the graph, and the tensors of the packs in it (--full)")


def _bundled(look: Look) -> Iterator[Finding]:
    """AB201: the manifests of the packs in a bundle are those that it names."""
    entries = {entry.path: entry for entry in look.artifact.files}
    for number, adapter in enumerate(look.artifact.manifest.adapters):
        path = f"{adapter.path}/{m.FILE_NAME}"
        if path not in entries or look.listed[path].size > m.MAX_BYTES:
            yield Finding("AB103", "error", adapter.path, "a pack without a manifest", "export again", file=path)
            continue
        place = look.folder / f"pack{number}.json"
        fetch(look.remote, look.listed[path], place, entries[path].sha256)
        if m.parse(place.read_bytes(), f"{look.remote}, {path}").id != adapter.pack:
            yield Finding("AB201", "error", adapter.path, "the pack is not the one that the bundle names", "export again", file=path)


def _header(look: Look) -> HeaderFile:
    size = next((entry.size for entry in look.artifact.files if entry.path == TENSORS), None)
    if size is None:
        raise FormatError("the manifest lists no tensor file", where=f"{look.remote}, {TENSORS}")
    return read_header(look.remote, TENSORS, size, _FIRST)


def _looked(look: Look, report: Report, more: str) -> Report:
    signature = ("signature: not verified (adapterpack pull it to a folder, then adapterpack verify)",) if SIGNATURE in look.listed else ()
    return report._replace(not_checked=(_VALUES, _DIGESTS, *signature, more, *report.not_checked), incomplete=True)


OUTLINES: dict[str, Callable[[Look], Report]] = {"pack": _pack, "peft": _peft, "bundle": _bundle}
"""Kind of artifact -> the look at it."""
