"""Every check of a pack, each a small value in a table; the report says what was found and what was not checked."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import AdapterpackError, FormatError, NonFinite, StorageError, storage_errors
from ..methods import get
from . import manifest as m
from . import peft_layout
from .checkpoint import Checkpoint
from .pack import MUTABLE, TENSORS, Pack, encode_files, site_of
from .safetensors import FLOATS, SafetensorsFile

MAX_FILE = 8 << 30


@dataclass(frozen=True)
class Finding:
    """One thing that a check found: a stable rule id, how bad it is, where, and what to do."""

    rule: str
    severity: str
    where: str
    message: str
    fix: str = ""
    error: type[AdapterpackError] = FormatError

    def to_json(self) -> dict[str, str]:
        """The finding as JSON prints it."""
        return {key: getattr(self, key) for key in ("rule", "severity", "where", "message", "fix")}


@dataclass(frozen=True)
class Report:
    """What validation says of one artifact: ``valid`` or ``invalid``, why, and which questions it left open."""

    kind: str
    path: str
    id: str | None
    findings: tuple[Finding, ...]
    not_checked: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        """No finding is an error."""
        return not any(finding.severity == "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The report as ``validate --json`` prints it."""
        return {
            "kind": self.kind,
            "path": self.path,
            "id": self.id,
            "state": "valid" if self.valid else "invalid",
            "findings": [finding.to_json() for finding in self.findings],
            "not_checked": list(self.not_checked),
        }


class Subject(NamedTuple):
    """What a check looks at: the folder, the parsed manifest, the open tensor file, the pack, and the base if one was named."""

    folder: Path
    pack: Pack
    file: SafetensorsFile
    base: Checkpoint | None


Check = Callable[[Subject], Iterator[Finding]]


def _error(rule: str, where: object, message: str, fix: str = "", error: type[AdapterpackError] = FormatError) -> Finding:
    return Finding(rule, "error", str(where), message, fix, error)


def closed_file_list(s: Subject) -> Iterator[Finding]:
    """AP101-AP105: exactly the listed files, regular, of the listed size and bytes."""
    listed = {entry.path: entry for entry in s.pack.manifest.files}
    for path in sorted(s.folder.iterdir()):
        if path.is_symlink() or not path.is_file():
            yield _error("AP101", path.name, "only regular files may lie in a pack", "remove it")
        elif path.name not in listed and path.name != m.FILE_NAME and path.name not in MUTABLE:
            yield _error("AP102", path.name, "a file that the manifest does not list", "remove it, or pack the adapter again")
    for name, entry in listed.items():
        path = s.folder / name
        if not path.is_file():
            yield _error("AP103", name, "a listed file is missing", "fetch the pack again")
        elif path.stat().st_size != entry.size:
            yield _error("AP104", name, f"the file has {path.stat().st_size} bytes, the manifest says {entry.size}", "fetch the pack again")
        elif _sha256(path) != entry.sha256:
            yield _error("AP105", name, "the file's sha256 is not the manifest's: it was altered", "fetch the pack again")


def tensor_index(s: Subject) -> Iterator[Finding]:
    """AP201-AP204: names, dtypes, shapes and bytes of every tensor are the manifest's."""
    entries, found = s.pack.manifest.tensors, s.file.tensors
    for name in sorted(entries.keys() - found.keys()):
        yield _error("AP201", name, "a tensor that the manifest lists is missing", "fetch the pack again")
    for name in sorted(found.keys() - entries.keys()):
        yield _error("AP202", name, "a tensor that the manifest does not list", "fetch the pack again")
    for name in sorted(entries.keys() & found.keys()):
        entry, info = entries[name], found[name]
        if (entry.dtype, entry.shape) != (info.dtype, info.shape):
            yield _error("AP203", name, f"the tensor is {info.dtype} {list(info.shape)}, the manifest says {entry.dtype} {list(entry.shape)}")
        elif hashlib.sha256(s.file.buffer(name)).hexdigest() != entry.sha256:
            yield _error("AP204", name, "the tensor's sha256 is not the manifest's: its bytes were altered", "fetch the pack again")


def finite(s: Subject) -> Iterator[Finding]:
    """AP301-AP302: no NaN, no infinity; an adapter whose change is all zero has no effect."""
    for name, info in s.file.tensors.items():
        if info.dtype in FLOATS and not np.isfinite(s.file.read(name).astype(np.float32)).all():
            yield _error("AP301", name, "the tensor holds NaN or infinity", "train again in float32 or with a lower learning rate", NonFinite)
    for group in s.pack.manifest.groups:
        if group.role == "adapter" and any(not np.any(value) for value in s.pack.params(group.path).values()):
            yield Finding("AP302", "warning", group.path, "a tensor of this site is all zero: the adapter has no effect there",
                          "check that training reached it")


def roles(s: Subject) -> Iterator[Finding]:
    """AP401-AP404: every group has the tensors that its method says, of the right shapes, and belongs to a group."""
    paths = [group.path for group in s.pack.manifest.groups]
    if len(set(paths)) != len(paths):
        yield _error("AP401", "groups", "two groups have the same path")
    for name, entry in s.pack.manifest.tensors.items():
        if entry.group not in paths or entry.file != TENSORS:
            yield _error("AP402", name, "the tensor belongs to no group, or to another file")
    for group in s.pack.manifest.groups:
        params = s.pack.params(group.path)
        if group.role == "full":
            if not params:
                yield _error("AP403", group.path, "a module without tensors")
            continue
        try:
            cfg = s.pack.config_at(group)
            peft_layout.check_shapes(s.pack.method, cfg, site_of(group), params, s.folder.name)
        except AdapterpackError as error:
            yield _error("AP403", group.path, error.what + (f": expected {error.expected}, found {error.found}" if error.expected else ""))
            continue
        if extra := sorted(set(params) - set(s.pack.method.shapes(cfg, site_of(group)))):
            yield _error("AP404", group.path, f"a tensor that the method does not have: {', '.join(extra)}")


def scales(s: Subject) -> Iterator[Finding]:
    """AP501-AP502: the written scale and rank are those that the method computes from its configuration."""
    for group in s.pack.manifest.groups:
        if group.role != "adapter":
            continue
        cfg = s.pack.config_at(group)
        if group.scale is None or not np.isclose(group.scale, cfg.scale, rtol=1e-9, atol=0):
            yield _error("AP501", group.path, f"the scale is {group.scale}, the configuration gives {cfg.scale}", "pack the adapter again")
        if group.rank != cfg.rank:
            yield _error("AP502", group.path, f"the rank is {group.rank}, the configuration gives {cfg.rank}", "pack the adapter again")


def peft_face(s: Subject) -> Iterator[Finding]:
    """AP601: the files derived from the manifest are what the manifest gives."""
    tensors = {name: s.file.read(name) for name in s.file.tensors}
    for name, data in encode_files(s.pack.manifest, tensors).items():
        path = s.folder / name
        if path.is_file() and path.read_bytes() != data:
            yield _error("AP601", name, "the file does not agree with the manifest that it is derived from", "pack the adapter again")


def base_model(s: Subject) -> Iterator[Finding]:
    """AP701: the named base is the one that the pack was made for."""
    if s.base is not None:
        try:
            s.pack.require_base(s.base)
        except AdapterpackError as error:
            yield _error("AP701", "base", str(error), error.remedy or "", type(error))


CHECKS: tuple[Check, ...] = (closed_file_list, tensor_index, finite, roles, scales, peft_face, base_model)


def validate(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> Report:
    """Every check that applies to the pack at ``path``; with ``base``, also that it belongs to that base.

    Returns:
        A report: ``report.valid``, ``report.findings``, ``report.not_checked``. Faults are findings, not exceptions.

    Raises:
        StorageError: there is no such folder.

    Example:
        >>> validate("packs/tickets").valid  # doctest: +SKIP
        True
    """
    return examine(Path(path), None if base is None else Checkpoint(base))[0]


def examine(folder: Path, base: Checkpoint | None = None) -> tuple[Report, Pack | None]:
    """The report and, if the pack could be read at all, the pack itself, made from the very bytes that were checked."""
    if not folder.is_dir():
        raise StorageError("there is no such pack", where=folder, remedy="name a folder that holds adapterpack.json or adapter_config.json")
    try:
        pack, file = _open(folder)
    except AdapterpackError as error:
        finding = _error("AP001", error.where or folder, str(error), error.remedy or "", type(error))
        return Report("pack", str(folder), None, (finding,)), None
    if file is None:  # a PEFT folder: importing it has made every check that it can bear
        return Report("peft", str(folder), pack.id, (), ("digests, base and canary: PEFT folders carry none",)), pack
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings.extend(check(Subject(folder, pack, file, base)))
        except AdapterpackError as error:
            findings.append(_error("AP000", error.where or check.__name__, str(error), error.remedy or "", type(error)))
        if any(finding.severity == "error" for finding in findings):
            break  # what a later check would say of altered bytes means nothing
    open_questions = ([] if base else ["base: none was named (--base)"]) + ["canary: replayed when the pack is attached or exported"]
    return Report("pack", str(folder), pack.id, tuple(findings), tuple(open_questions)), pack


def load(path: str | os.PathLike[str], name: str | None = None) -> Pack:
    """The pack in a folder, every digest verified; a folder that PEFT wrote is imported.

    Raises:
        FormatError: truncated, altered or malformed.
        NonFinite: a tensor holds NaN or infinity.
        UnknownMethod: its method is not registered.

    Example:
        >>> load("packs/tickets").name  # doctest: +SKIP
        'tickets'
    """
    report, pack = examine(Path(path))
    for finding in report.findings:
        if finding.severity == "error":
            raise finding.error(f"the pack is not valid, {finding.rule}: {finding.message}".rstrip("."), where=f"{path}, {finding.where}",
                                remedy=finding.fix or None)
    assert pack is not None
    return pack if name is None else pack.renamed(name)


def _open(folder: Path) -> tuple[Pack, SafetensorsFile | None]:
    path = folder / m.FILE_NAME
    if not path.exists():
        if (folder / peft_layout.CONFIG).is_file():
            return dataclasses.replace(peft_layout.read(folder), path=folder), None
        raise FormatError("the folder is not a pack", where=folder, expected=f"{m.FILE_NAME} or {peft_layout.CONFIG}",
                          remedy="name the folder that train, save or compose wrote")
    with storage_errors(path):
        if path.stat().st_size > m.MAX_BYTES:
            raise FormatError("the manifest is too large", where=path, expected=f"at most {m.MAX_BYTES} bytes", found=path.stat().st_size)
        data = path.read_bytes()
    manifest = m.parse(data, path)
    if manifest.to_bytes() != data:
        raise FormatError("the manifest is not in its canonical form: it was edited by hand", where=path, remedy="pack the adapter again")
    get(manifest.method.type)
    file = SafetensorsFile(folder / TENSORS)
    return Pack(manifest, {name: file.read(name) for name in file.tensors if name in manifest.tensors}, folder), file


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
