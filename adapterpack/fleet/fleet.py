"""Defines :class:`Fleet`: its members as packs, written to a folder and read back with every byte checked,
and signed and verified there.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..adapter_methods import Arrays, LoRA, Site, Tensors
from ..adapter_methods.lora import lora
from ..errors import CorruptBlob, FormatError, NonFinite, Unsigned, WronglySigned, require_among
from ..io import HeldFile, in_hub_cache, output_folder, read_file, safetensors
from ..manifest import Lineage, Parent, digest_tensors
from ..manifest.digests import tensor_digest
from ..pack import MUTABLE, Pack, SharedFactors, Signature, build
from ..pack.trust import Signable, SigstoreIdentity, SigstoreSigner, Statement, seal, unseal
from ..pack.validate.checks import Finding, entries
from ..pack.validate.checks.folder import REGULAR
from ..paths import StrPath
from .manifest import FILE_NAME, MAX_BYTES, TENSOR_FILE, FleetManifest, Member, layout, parse

_REMEDY = "fetch the fleet again, or compress the packs again"


class _MemberTensors(Mapping[str, np.ndarray]):
    """The tensors of a member's pack. The factors of its change in ``shared`` bases, by site, are computed at
    each access, so that a member needs little memory.
    """

    def __init__(self, pack: Pack, shared: Mapping[str, SharedFactors]) -> None:
        self._entries = pack.manifest.tensors
        self._shared = shared
        self._held = {
            name: pack.tensors[name] for name, entry in self._entries.items() if entry.group not in shared
        }

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._held:
            return self._held[name]
        factors = self._shared[self._entries[name].group]
        return factors.down if self._entries[name].param == "lora_A" else factors.up @ factors.core

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@dataclasses.dataclass(frozen=True)
class Fleet:
    """Many adapters of one base. ``fleet.pack(name)`` is one of them, a LoRA that everything takes that takes
    packs.

    Example:
        >>> from adapterpack import Fleet  # doctest: +SKIP
        >>> fleet = Fleet.load("fleet")  # doctest: +SKIP
        >>> fleet.names, fleet.pack("tickets").write("packs/tickets")  # doctest: +SKIP
    """

    manifest: FleetManifest
    tensors: Tensors = dataclasses.field(repr=False)
    path: Path | None = None

    @classmethod
    def load(cls, path: StrPath) -> Fleet:
        """Loads the fleet in a folder into memory and verifies every digest.

        Raises:
            FormatError: the fleet is malformed, altered or larger than it declares, or a file is a link to
                outside of the folder.
            NonFinite: a tensor contains NaN or infinity.
        """
        folder = Path(path)
        manifest = parse(read_file(folder / FILE_NAME, MAX_BYTES + 1), folder / FILE_NAME)
        where = folder / TENSOR_FILE
        data = read_file(where, manifest.size + 1) if where.is_file() else b""
        if len(data) != manifest.size:
            raise FormatError(
                "the tensor file is missing, or not as long as the manifest says",
                where=where,
                expected=f"{manifest.size} bytes",
                remedy=_REMEDY,
            )
        file = HeldFile(data, where)
        # Headers are compared before any value is read.
        found = {name: (info.dtype, info.shape) for name, info in file.tensors.items()}
        if (
            found != {name: (dtype, shape) for name, dtype, shape in layout(manifest)}
            or found.keys() != manifest.tensors.keys()
        ):
            raise FormatError(
                "the tensors are not those that the manifest describes", where=where, remedy=_REMEDY
            )
        tensors = {}
        for name in found:
            value = file.read(name)
            if tensor_digest(value) != manifest.tensors[name]:
                raise CorruptBlob("a tensor was altered", where=f"{where}, {name}", remedy=_REMEDY)
            if not safetensors.all_finite(value):
                raise NonFinite("a tensor holds NaN or infinity", where=f"{where}, {name}", remedy=_REMEDY)
            tensors[name] = value
        if hashlib.sha256(data).hexdigest() != manifest.sha256:
            raise CorruptBlob(
                "the tensor file was altered", where=where, expected=manifest.sha256, remedy=_REMEDY
            )
        return cls(manifest, tensors, folder)

    @classmethod
    def sealed(cls, tensors: Tensors, **fields: Any) -> Fleet:
        """Returns a fleet with these tensors, and computes their digests; ``fields`` are the other fields of
        its manifest.
        """
        tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        digests, file = digest_tensors(tensors, {})
        manifest = FleetManifest(tensors=digests, size=file.size, sha256=file.sha256, **fields)
        return cls(parse(manifest.bytes, f"fleet '{manifest.name}'"), tensors)

    def write(self, out: StrPath) -> Fleet:
        """Writes the fleet to a new folder ``out``, completely or not at all, and returns it with its path.

        Raises:
            OutputExists: ``out`` already exists.
            StorageError: the file system refuses.
        """
        with output_folder(out) as folder:
            safetensors.write(folder / TENSOR_FILE, self.tensors)
            (folder / FILE_NAME).write_bytes(self.manifest.bytes)
        return dataclasses.replace(self, path=Path(out))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the members, in their original order."""
        return tuple(member.name for member in self.manifest.members)

    @property
    def nbytes(self) -> int:
        """The total size of all tensors in bytes."""
        return sum(value.nbytes for value in self.tensors.values())

    def member(self, name: str) -> tuple[int, Member]:
        """Returns a member's number and its entry in the manifest.

        Raises:
            UnknownName: no member has that name.
        """
        require_among("the fleet has no such member", name, self.names, where=self.manifest.name)
        number = self.names.index(name)
        return number, self.manifest.members[number]

    def shared(self, name: str) -> dict[str, SharedFactors]:
        """Returns a member's change in the fleet's bases, by site (zero where it changes nothing), or an
        empty dict if the member has its own factors.
        """
        number, member = self.member(name)
        if member.cluster is None:
            return {}
        place = self.manifest.places[number]
        c = member.cluster
        return {
            self.manifest.sites[s].path: SharedFactors(
                f"{self.manifest.id}.{s}.{c}",
                self.tensors[f"down.{s}.{c}"],
                self.tensors[f"up.{s}.{c}"],
                self.tensors[f"cores.{s}"][place],
                self.tensors[f"scales.{s}"][place],
            )
            for s in range(len(self.manifest.sites))
        }

    def pack(self, name: str) -> Pack:
        """Returns one member as a pack: an independent LoRA with scale 1. Its factors are computed on access;
        only its core and the shared bases stay in memory.

        Raises:
            UnknownName: no member has that name.
        """
        number, member = self.member(name)
        whole: dict[str, Arrays] = {}
        for place, one in enumerate(member.whole):
            whole.setdefault(one.path, {})[one.param] = self.tensors[f"whole.{number}.{place}"]
        adapters = {
            site: (LoRA(r=len(A), alpha=float(len(A))), {"lora_A": A, "lora_B": B})
            for site, A, B in self._factors(name)
        }
        weights = {site.path: site.weight for site in self.manifest.sites} | {
            one.path: one.weight for one in member.whole
        }
        pack = build(
            name,
            lora,
            adapters,
            task=member.task,
            base=self.manifest.base,
            full=whole,
            weights=weights,
            problem=member.problem,
            license=member.license,
            lineage=Lineage(
                "compress", (Parent(member.pack, name),), {"fleet": self.manifest.id, "error": member.error}
            ),
        )
        pack = dataclasses.replace(pack, vouched=self._vouched)
        shared = self.shared(name)
        if not shared:
            return pack
        paths = [self.manifest.sites[number].path for number in member.sites]
        changed = {path: shared[path] for path in paths}
        return dataclasses.replace(pack, tensors=_MemberTensors(pack, changed), factored=shared)

    def _vouched(self, key: StrPath | SigstoreIdentity) -> None:
        """Checks that a trusted signer signed the folder that this fleet was read from, with these
        contents.

        Raises:
            TrustError: the signature is missing, or is not of this fleet.
        """
        if self.path is None:
            raise Unsigned(
                "a fleet in memory is not signed",
                where=self.manifest.name,
                remedy="write it, and sign the folder",
            )
        if (signed := verify_fleet(self.path, key)).pack != self.manifest.id:
            raise WronglySigned(
                "the signature is of another fleet",
                where=self.path,
                expected=self.manifest.id,
                found=signed.pack,
            )

    def _factors(self, name: str) -> Iterator[tuple[Site, np.ndarray, np.ndarray]]:
        """Yields site, ``A`` ``[r, in]`` and ``B`` ``[out, r]`` for each site that a member changes."""
        number, member = self.member(name)
        shared = self.shared(name)
        for s in member.sites:
            one = self.manifest.sites[s]
            site = Site(one.path, one.in_features, one.out_features, one.kind, one.bias)
            if member.cluster is None:
                yield site, self.tensors[f"A.{number}.{s}"], self.tensors[f"B.{number}.{s}"]
            else:
                yield site, shared[one.path].down, shared[one.path].up @ shared[one.path].core


def sign_fleet(
    folder: Path,
    key: StrPath | SigstoreSigner,
    *,
    identity: str | None,
    expires: str | datetime | None,
    password: str | None,
) -> Signature:
    """Writes ``adapterpack.sig.json`` into a fleet's folder, covering its two files; the arguments are those
    of :func:`adapterpack.sign`.

    Raises:
        FormatError: the fleet is not valid.
    """

    def checked() -> Statement:
        manifest = Fleet.load(folder).manifest  # what is signed is what was checked
        files = {FILE_NAME: manifest.id.removeprefix("sha256:"), TENSOR_FILE: manifest.sha256}
        return Statement(manifest.name, files)

    return seal(_signable(folder), checked, key, identity, expires, password)


def verify_fleet(
    folder: Path,
    key: StrPath | SigstoreIdentity,
    *,
    identity: str | None = None,
    at: datetime | None = None,
) -> Signature:
    """Returns the signature of a fleet, if the trusted signer signed exactly the files in the folder.

    Raises:
        TrustError: as for :func:`adapterpack.verify`.
    """
    return unseal(_signable(folder), key, identity, at)


def _signable(folder: Path) -> Signable:
    def irregular() -> Iterator[Finding]:
        return (
            REGULAR.at(path.name, "only regular files may lie in a fleet", file=path.name)
            for path in entries(folder)
            if (path.is_symlink() and not in_hub_cache(path)) or not path.is_file()
        )

    def listed(data: bytes) -> set[str]:
        parse(data, folder / FILE_NAME)
        return {TENSOR_FILE}

    return Signable(
        "fleet",
        folder,
        FILE_NAME,
        MUTABLE,
        irregular,
        lambda: {path.name for path in entries(folder)},
        listed,
    )
