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

from ..errors import AdapterpackError, FormatError, NonFinite, StorageError, Unsupported, storage_errors
from ..methods import get
from . import manifest as m
from . import peft_layout
from .checkpoint import Checkpoint
from .pack import FILE_ROLES, METADATA, MUTABLE, TENSORS, Pack, site_of
from .safetensors import SafetensorsFile, all_finite


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


def regular_files(folder: Path) -> Iterator[Finding]:
    """AP101: nothing but regular files; asked before any of them is opened. A hub cache's own links into its blobs are let pass."""
    for path in sorted(folder.iterdir()):
        if (path.is_symlink() and not _in_hub_cache(path)) or not path.is_file():
            yield _error("AP101", path.name, "only regular files may lie in a pack", "remove it")


def closed_file_list(folder: Path, manifest: m.Manifest) -> Iterator[Finding]:
    """AP102-AP103: exactly the listed files."""
    listed = {entry.path for entry in manifest.files}
    present = {path.name for path in folder.iterdir()}
    for name in sorted(present - listed - MUTABLE - {m.FILE_NAME}):
        yield _error("AP102", name, "a file that the manifest does not list", "remove it, or pack the adapter again")
    for name in sorted(listed - present):
        yield _error("AP103", name, "a listed file is missing", "fetch the pack again")


def tensor_index(s: Subject) -> Iterator[Finding]:
    """AP201-AP204: names, dtypes, shapes and bytes of every tensor are the manifest's.

    It comes before the digests of whole files, so that altered bytes are reported by the name of the tensor that they belong to.
    """
    entries, found = s.pack.manifest.tensors, s.file.tensors
    for name in sorted(entries.keys() - found.keys()):
        yield _error("AP201", name, "a tensor that the manifest lists is missing", "fetch the pack again")
    for name in sorted(found.keys() - entries.keys()):
        yield _error("AP202", name, "a tensor that the manifest does not list", "fetch the pack again")
    for name in sorted(entries.keys() & found.keys()):
        entry, info = entries[name], found[name]
        if (entry.dtype, entry.shape) != (info.dtype, info.shape):
            yield _error("AP203", name,
                         f"the tensor is {info.dtype} {list(info.shape)}, the manifest says {entry.dtype} {list(entry.shape)}")
        elif hashlib.sha256(s.file.buffer(name)).hexdigest() != entry.sha256:
            yield _error("AP204", name, "the tensor's sha256 is not the manifest's: its bytes were altered", "fetch the pack again")


def file_digests(s: Subject) -> Iterator[Finding]:
    """AP104-AP105: every listed file has the listed size and bytes."""
    for entry in s.pack.manifest.files:
        path = s.folder / entry.path
        if path.stat().st_size != entry.size:
            yield _error("AP104", entry.path, f"the file has {path.stat().st_size} bytes, the manifest says {entry.size}",
                         "fetch the pack again")
        elif m.sha256_of(path) != entry.sha256:
            yield _error("AP105", entry.path, "the file's sha256 is not the manifest's: it was altered", "fetch the pack again")


def quantized(s: Subject) -> Iterator[Finding]:
    """AP205-AP207: int8 tensors and their scales belong together, fit each other, and the manifest says that the pack is quantized."""
    entries, used = s.pack.manifest.tensors, set()
    for name, entry in entries.items():
        if entry.scales is None:
            if entry.dtype == "I8":
                yield _error("AP205", name, "an int8 tensor without scales", "quantize the pack again")
            continue
        used.add(entry.scales)
        found = entries.get(entry.scales)
        wanted = ("F32", (*entry.shape[:1], *(1 for _ in entry.shape[1:])), entry.group, f"{entry.param}.scales")
        if entry.dtype != "I8" or found is None or (found.dtype, found.shape, found.group, found.param) != wanted:
            yield _error("AP205", name, "the tensor and its scales do not fit each other", "quantize the pack again")
        elif np.abs(s.file.read(entry.scales)).max() > np.finfo(np.float32).max / 128:
            yield _error("AP301", entry.scales, "a scale so large that values overflow", "quantize the pack again", NonFinite)
    for name in sorted(name for name, entry in entries.items() if entry.param.endswith(".scales") and name not in used):
        yield _error("AP206", name, "scales that belong to no int8 tensor", "quantize the pack again")
    said = (s.pack.manifest.quantization is not None, "int8" in s.pack.manifest.must_understand)
    if said != (bool(used), bool(used)):
        yield _error("AP207", "quantization", "the manifest does not say rightly whether the pack is quantized", "quantize the pack again")


def finite(s: Subject) -> Iterator[Finding]:
    """AP301-AP302: no NaN, no infinity; an adapter whose change is all zero has no effect."""
    for name in s.file.tensors:
        if not all_finite(s.file.read(name)):
            yield _error("AP301", name, "the tensor holds NaN or infinity", "train again in float32 or with a lower learning rate",
                         NonFinite)
    for group in s.pack.manifest.groups:
        if group.role == "adapter" and any(not np.any(value) for value in s.pack.params(group.path).values()):
            yield Finding("AP302", "warning", group.path, "a tensor of this site is all zero: the adapter has no effect there",
                          "check that training reached it")


def roles(s: Subject) -> Iterator[Finding]:
    """AP401-AP405: every tensor belongs to a group, and every group has the tensors that its method says, of the right shapes."""
    paths = {group.path for group in s.pack.manifest.groups}
    if len(paths) != len(s.pack.manifest.groups):
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
        layers = s.pack.method.traits.layers
        if group.kind not in layers:
            yield _error("AP405", group.path, f"the method has no sites of kind '{group.kind}', only {', '.join(layers)}")
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
    """AP601-AP602: the right files are listed, and PEFT would read from them what the manifest says.

    The meaning is compared and not the bytes: another version of adapterpack may write PEFT's config in another way.
    """
    has_face = peft_layout.config_bytes(s.pack.manifest) is not None  # never for quantized tensors: PEFT would take integers for values
    listed = sorted((entry.path, entry.role) for entry in s.pack.manifest.files)
    expected = sorted((name, FILE_ROLES[name]) for name in (TENSORS, *([peft_layout.CONFIG] if has_face else [])))
    if listed != expected:
        yield _error("AP602", "files", f"the file list is {listed}, this pack's must be {expected}", "pack the adapter again")
        return
    if s.file.metadata != METADATA:
        yield _error("AP601", TENSORS, f"the file's metadata must be {METADATA}", "pack the adapter again")
    if has_face and (problem := peft_layout.disagreement(s.folder, s.pack.manifest)):
        yield _error("AP601", peft_layout.CONFIG, f"the file does not agree with the manifest: {problem}", "pack the adapter again")


def base_model(s: Subject) -> Iterator[Finding]:
    """AP701: the named base is the one that the pack was made for."""
    yield from _base_findings(s.pack, s.base)


def _base_findings(pack: Pack, base: Checkpoint | None) -> Iterator[Finding]:
    if base is not None:
        try:
            pack.require_base(base)
        except AdapterpackError as error:
            yield _error("AP701", "base", str(error), error.remedy or "", type(error))


CHECKS: tuple[Check, ...] = (tensor_index, file_digests, quantized, finite, roles, scales, peft_face, base_model)
"""In order; after the first that finds an error the rest are left out: what they would say of altered bytes means nothing."""


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
        if not os.path.lexists(folder / m.FILE_NAME):
            return _examine_peft(folder, base)
        if findings := [*regular_files(folder)]:
            return Report("pack", str(folder), None, tuple(findings)), None
        manifest = _manifest(folder / m.FILE_NAME)
        if findings := [*closed_file_list(folder, manifest)]:
            return Report("pack", str(folder), manifest.id, tuple(findings)), None
        file = SafetensorsFile(folder / TENSORS, private=True)
    except AdapterpackError as error:
        finding = _error("AP001", error.where or folder, str(error), error.remedy or "", type(error))
        return Report("pack", str(folder), None, (finding,)), None
    pack = Pack(manifest, {name: file.read(name) for name in file.tensors if name in manifest.tensors}, folder)
    for check in CHECKS:
        try:
            findings.extend(check(Subject(folder, pack, file, base)))
        except AdapterpackError as error:
            findings.append(_error("AP000", error.where or check.__name__, str(error), error.remedy or "", type(error)))
        if any(finding.severity == "error" for finding in findings):
            break
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


def _examine_peft(folder: Path, base: Checkpoint | None) -> tuple[Report, Pack]:
    """A folder that PEFT wrote: importing it makes every check that it can bear, and its sites can be looked for in a base."""
    if not (folder / peft_layout.CONFIG).is_file():
        raise FormatError("the folder is not a pack", where=folder, expected=f"{m.FILE_NAME} or {peft_layout.CONFIG}",
                          remedy="name the folder that train, save or compose wrote")
    pack = dataclasses.replace(peft_layout.read(folder), path=folder)
    about_base = "base: compared by its shapes only" if base else "base: none was named (--base)"
    open_questions = ("digests and canary: PEFT folders carry none", about_base)
    return Report("peft", str(folder), pack.id, tuple(_base_findings(pack, base)), open_questions), pack


def _manifest(path: Path) -> m.Manifest:
    with storage_errors(path):
        if path.stat().st_size > m.MAX_BYTES:
            raise FormatError("the manifest is too large", where=path, expected=f"at most {m.MAX_BYTES} bytes", found=path.stat().st_size)
        data = path.read_bytes()
    manifest = m.parse(data, path)
    if manifest.to_bytes() != data:
        raise FormatError("the manifest is not in its canonical form: it was edited by hand", where=path, remedy="pack the adapter again")
    method = get(manifest.method.type)
    if manifest.method.spec_version > method.spec_version:
        raise Unsupported(f"the pack was made by a newer version of the method {method.name}", where=path,
                          expected=f"spec_version {method.spec_version}", found=manifest.method.spec_version,
                          remedy=f"update the package that brings {method.name}")
    return manifest


def _in_hub_cache(link: Path) -> bool:
    """Whether a link is one that the hub's client makes: ``snapshots/COMMIT/name`` into the ``blobs`` beside ``snapshots``."""
    folder = link.parent.resolve()
    return folder.parent.name == "snapshots" and link.resolve().parent == folder.parent.parent / "blobs"
