"""Validation of what lies on a hub, without its weights: the tree, the manifest, and the header of the tensor file by range requests."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import AdapterpackError, FormatError, HubError
from ..pack import manifest as m
from ..pack import safetensors, strict_json
from ..pack.checks import reading
from ..pack.checks.base import base_verdict
from ..pack.checks.budget import Budget, Spent
from ..pack.checks.composition import composition
from ..pack.checks.finding import Finding, Report
from ..pack.checks.registry import HEADER_CHECKS
from ..pack.checks.remote import remote_code
from ..pack.checks.subject import Subject
from ..pack.checks.unchecked import unchecked
from ..pack.pack import SIGNATURE, TENSORS, Pack
from ..pack.validate import examine, require_known, run_checks
from . import names
from .artifact import Artifact, differences, open_remote
from .client import Listed, Remote, connect, fetch, read, tree
from .pull import download, scratch_folder

if TYPE_CHECKING:
    from ..pack.checkpoint import Checkpoint

_FIRST = 100_000
"""Bytes of the first range: the headers of most adapters are shorter."""
_VALUES = "values: only the header of the tensor file was read (--full reads everything)"
_DIGESTS = "digests: sizes and sha256 are the hub's word, and not all files have one there (--full)"


class HeaderFile(safetensors.SafetensorsFile):
    """A tensor file of which only the header is here: its tensors have names, dtypes and shapes, and read as zeros that take no memory."""

    def __init__(self, head: bytes, size: int, where: str) -> None:
        self.path, self.size, self._bytes = Path(where), size, head
        self.tensors, self.metadata = safetensors.parse_header(io.BytesIO(head), size, where)

    def read(self, name: str) -> np.ndarray:
        """Zeros of the tensor's dtype and shape."""
        info = self.tensors[name]
        return np.broadcast_to(np.zeros((), safetensors.DTYPES[info.dtype]), info.shape)


def validate_remote(reference: str, base: Path | None = None, *, full: bool = False, budget: Budget | None = None,
                    allow_structural: bool = False, token: str | None = None) -> Report:
    """The report on an artifact of a hub; ``full`` downloads it all, into no store, else what was not checked makes it incomplete.

    Raises:
        HubError: the hub refuses, by name.
    """
    remote = connect(names.parse(reference), token)
    listed, budget = tree(remote), budget or Budget()
    with scratch_folder() as scratch:
        try:
            artifact = open_remote(remote, listed, Path(scratch))
        except HubError:
            raise
        except AdapterpackError as error:
            return Report("pack", str(remote), None, (reading.unreadable(error, Path(str(remote))),))
        found = list(differences(artifact, listed))
        if found:
            return Report(artifact.kind, str(remote), artifact.id, tuple(found))
        look = _whole if full else _outline
        try:
            report = look(remote, artifact, listed, Path(scratch), base, budget, allow_structural)
        except Spent as spent:
            return Report(artifact.kind, str(remote), artifact.id, (), (str(spent),), incomplete=True)
        except HubError:
            raise
        except AdapterpackError as error:
            return Report(artifact.kind, str(remote), artifact.id, (reading.unreadable(error, Path(remote.repo)),))
    return dataclasses.replace(report, path=str(remote))


def _whole(remote: Remote, artifact: Artifact, listed: Mapping[str, Listed], scratch: Path, base: Path | None, budget: Budget,
           allow_structural: bool) -> Report:
    download(remote, artifact, dict(listed), scratch)
    if artifact.kind == "bundle":
        from ..runtime.validate import validate_bundle  # noqa: PLC0415 - packs do not need what bundles need

        return validate_bundle(scratch, base, full=True, budget=budget, allow_structural=allow_structural)
    return examine(scratch, _checkpoint(base), True, budget, allow_structural)[0]


def _outline(remote: Remote, artifact: Artifact, listed: Mapping[str, Listed], scratch: Path, base: Path | None, budget: Budget,
             allow_structural: bool) -> Report:
    signature = ("signature: not verified (adapterpack pull it to a folder, then adapterpack verify)",) if SIGNATURE in listed else ()
    if artifact.kind == "pack":
        report = _pack(remote, artifact, scratch, base, budget, allow_structural)
    elif artifact.kind == "peft":
        config = strict_json.loads(artifact.mark, artifact.mark_name, len(artifact.mark))
        findings = (*remote_code(config, artifact.mark_name, foreign=True),)
        _header(remote, artifact)
        report = Report("peft", "", None, findings, ("the import: its tensors and sites (--full)",))
    else:
        findings = (*_bundled(remote, artifact, listed, scratch),)
        report = Report("bundle", "", None, findings, ("the graph, and the tensors of the packs in it (--full)",
                                                       *(() if base is None else ("base: compared with --full",))))
    return dataclasses.replace(report, not_checked=(_VALUES, _DIGESTS, *signature, *report.not_checked), incomplete=True)


def _pack(remote: Remote, artifact: Artifact, scratch: Path, base: Path | None, budget: Budget, allow_structural: bool) -> Report:
    manifest = artifact.manifest
    require_known(manifest, f"{remote}, {artifact.mark_name}")
    code = [*remote_code(strict_json.loads(artifact.mark, artifact.mark_name, len(artifact.mark)), artifact.mark_name)]
    if code := code or [*composition(manifest)]:
        return Report("pack", "", manifest.id, tuple(code))
    budget.require_memory(artifact.size)  # some methods put int8 tensors and their scales together
    file, held = _header(remote, artifact), {}
    for entry in manifest.files:
        if entry.path != TENSORS:
            fetch(remote, Listed(entry.path, entry.size, entry.sha256, None), scratch / entry.path)
            held[entry.path] = (scratch / entry.path).read_bytes()
    pack = Pack(manifest, {name: file.read(name) for name in file.tensors if name in manifest.tensors}, None, held)
    no_digests: dict[str, Future[str]] = {}
    known = _checkpoint(base)
    subject = Subject(Path(remote.repo), pack, file, held, no_digests, known, False, budget, allow_structural)
    findings, spent = run_checks(subject, HEADER_CHECKS)
    left = (*spent, "PEFT's reading of it (--full)", *unchecked(subject))
    return Report("pack", "", pack.id, tuple(findings), left, True, None if spent else base_verdict(pack, known, findings))


def _header(remote: Remote, artifact: Artifact) -> HeaderFile:
    """The header of the tensor file, by one range request or two."""
    size = next((entry.size for entry in artifact.files if entry.path == TENSORS), None)
    where = f"{remote}, {TENSORS}"
    if size is None:
        raise FormatError("the manifest lists no tensor file", where=where)
    head = read(remote, TENSORS, 0, min(size, _FIRST))
    length = 8 + int.from_bytes(head[:8], "little")
    if len(head) < length <= min(size, 8 + safetensors.MAX_HEADER):
        head += read(remote, TENSORS, len(head), length - len(head))
    return HeaderFile(head, size, where)


def _bundled(remote: Remote, artifact: Artifact, listed: Mapping[str, Listed], scratch: Path) -> Iterator[Finding]:
    """AB201: the manifests of the packs in a bundle are those that it names."""
    for number, adapter in enumerate(artifact.manifest.adapters):
        path = f"{adapter.path}/adapterpack.json"
        if path not in listed or listed[path].size > 4 << 20:
            yield Finding("AB103", "error", adapter.path, "a pack without a manifest", "export again", file=path)
            continue
        place = scratch / f"pack{number}.json"
        entry = next(one for one in artifact.files if one.path == path)
        fetch(remote, listed[path], place, entry.sha256)
        if m.parse(place.read_bytes(), f"{remote}, {path}").id != adapter.pack:
            yield Finding("AB201", "error", adapter.path, "the pack is not the one that the bundle names", "export again", file=path)


def _checkpoint(base: Path | None) -> Checkpoint | None:
    if base is None:
        return None
    from ..pack.checkpoint import Checkpoint  # noqa: PLC0415 - most are looked at without a base

    return Checkpoint(base)
