"""The manifest of a fleet: its sites, its members with their errors, and the digest of every tensor.

A fleet is a folder with two files, ``adapterfleet.json`` and ``fleet.safetensors``. The manifest determines
the names, dtypes and shapes of all tensors (:func:`layout`); a file that differs is refused before any of its
values is read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ..errors import FormatError
from ..io import DTYPES, FLOATS, Misfit, StrictStruct, strict_json, typed_json
from ..manifest import structs
from ..manifest.integrity import KEY, require_whole, seal
from ..manifest.structs import Base, PackTask
from ..tasks.data import MARKED, ONE

FILE_NAME = "adapterfleet.json"
TENSOR_FILE = "fleet.safetensors"
FORMAT_VERSION = "1.1"
_UNSEALED = "1.0"
"""The version whose manifests contain no digest of themselves."""
MAX_BYTES = 16 << 20
MOST_NUMBERS = 1 << 34
"""The most numbers of all tensors of a fleet together."""
MOST_TENSORS = 50_000

Rank = Annotated[int, Meta(ge=1, le=65_536)]
Index = Annotated[int, Meta(ge=0, le=50_000)]


class FleetSite(StrictStruct):
    """A module that members change: its place, its kind and widths, and the tensor of the base behind it."""

    path: structs.Path
    kind: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,31}\Z")]
    in_features: structs.Width
    out_features: structs.Width
    bias: bool
    weight: Annotated[str, Meta(min_length=1, max_length=512)] | None


class Whole(StrictStruct):
    """A parameter of a module that a member has trained whole."""

    path: structs.Path
    param: structs.Path
    weight: Annotated[str, Meta(min_length=1, max_length=512)] | None
    dtype: Annotated[str, Meta(pattern=rf"^({'|'.join(DTYPES)})\Z")]
    shape: Annotated[tuple[Annotated[int, Meta(ge=1, le=1 << 33)], ...], Meta(max_length=8)]


class Member(StrictStruct):
    """One adapter: what it is called, the pack that it was made from, and how far its change is from that
    pack's.

    ``sites`` are those that it changes, by their place among the fleet's. In a ``cluster`` it has a core for
    each; by itself (None) it has factors of its own, of these ``ranks``. ``error`` is the relative Frobenius
    error over all sites, ``worst`` that of the worst site.
    """

    name: structs.PackName
    pack: structs.Sha256
    task: PackTask
    problem: Annotated[str, Meta(pattern=rf"^({'|'.join([ONE.name, *sorted(MARKED)])})\Z")]
    license: structs.ShortText | None
    cluster: Annotated[int, Meta(ge=0, le=63)] | None
    sites: Annotated[tuple[Index, ...], Meta(max_length=50_000)]
    ranks: Annotated[tuple[Rank, ...], Meta(max_length=50_000)]
    whole: Annotated[tuple[Whole, ...], Meta(max_length=1000)]
    error: structs.Positive
    worst: structs.Positive

    def breaches(self) -> Iterator[Misfit]:
        """Yields sites out of order, and ranks that do not match the sites."""
        if any(one >= two for one, two in zip(self.sites, self.sites[1:], strict=False)):
            yield Misfit("/sites", "are not in order")
        if len(self.ranks) != (len(self.sites) if self.cluster is None else 0):
            yield Misfit("/ranks", "a member has ranks of its own exactly where it is in no cluster")


class FleetManifest(StrictStruct, dict=True):
    """The whole manifest. ``rank`` is that of the bases, or the width of a site where that is less;
    ``error_budget`` the relative error above which a member keeps its own factors, None for no bound.
    """

    name: structs.PackName
    base: Base
    rank: Rank
    clusters: Annotated[int, Meta(ge=1, le=64)]
    error_budget: structs.Positive | None
    sites: Annotated[tuple[FleetSite, ...], Meta(min_length=1, max_length=10_000)]
    members: Annotated[tuple[Member, ...], Meta(min_length=1, max_length=10_000)]
    tensors: Annotated[Mapping[str, structs.Hex], Meta(min_length=1, max_length=MOST_TENSORS)]
    size: structs.Count
    sha256: structs.Hex
    format: Literal["adapterfleet"] = "adapterfleet"
    format_version: Annotated[str, Meta(pattern=r"^1\.[0-9]{1,4}\Z")] = FORMAT_VERSION
    must_understand: Annotated[tuple[str, ...], Meta(max_length=0)] = ()

    def breaches(self) -> Iterator[Misfit]:
        """Yields contradictions between members, or between members and sites."""
        yield from typed_json.find_duplicates([member.name for member in self.members], "/members")
        yield from typed_json.find_duplicates([site.path for site in self.sites], "/sites")
        for number, member in enumerate(self.members):
            if member.sites and member.sites[-1] >= len(self.sites):
                yield Misfit(f"/members/{number}/sites", "name a site that the fleet does not have")
            if member.cluster is not None and member.cluster >= self.clusters:
                yield Misfit(f"/members/{number}/cluster", "is a cluster that the fleet does not have")

    @cached_property
    def bytes(self) -> bytes:
        """The bytes that it was read from, or else its canonical bytes."""
        return seal(msgspec.structs.asdict(self))

    @cached_property
    def id(self) -> str:
        """``sha256:`` followed by the digest of the manifest's bytes."""
        return f"sha256:{hashlib.sha256(self.bytes).hexdigest()}"

    def rank_at(self, site: FleetSite) -> int:
        """Returns the rank of the bases at a site."""
        return min(self.rank, site.in_features, site.out_features)

    @cached_property
    def places(self) -> dict[int, int]:
        """Member number -> its index among the cores, for members that have cores."""
        return {
            number: place
            for place, number in enumerate(
                number for number, member in enumerate(self.members) if member.cluster is not None
            )
        }


def layout(manifest: FleetManifest) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yields name, dtype and shape of every tensor.

    For site ``s`` and cluster ``c``: ``down.s.c`` ``[k, in]`` and ``up.s.c`` ``[out, k]``, with orthonormal
    rows and columns. For site ``s``: ``cores.s`` ``[members in clusters, k, k]`` and ``scales.s`` ``[members
    in clusters, k, 1]``; a core is their product. For member ``i`` outside of clusters: ``A.i.s`` ``[rank,
    in]`` and ``B.i.s`` ``[out, rank]``. For what member ``i`` trained in full: ``whole.i.j``.
    """
    used = sorted({member.cluster for member in manifest.members if member.cluster is not None})
    count = len(manifest.places)
    for number, site in enumerate(manifest.sites) if count else ():
        k = manifest.rank_at(site)
        for cluster in used:
            yield f"down.{number}.{cluster}", "F32", (k, site.in_features)
            yield f"up.{number}.{cluster}", "F32", (site.out_features, k)
        yield f"cores.{number}", "I8", (count, k, k)
        yield f"scales.{number}", "F32", (count, k, 1)
    for number, member in enumerate(manifest.members):
        for place, rank in zip(member.sites, member.ranks, strict=False):
            site = manifest.sites[place]
            yield f"A.{number}.{place}", "F32", (rank, site.in_features)
            yield f"B.{number}.{place}", "F32", (site.out_features, rank)
        for place, whole in enumerate(member.whole):
            yield f"whole.{number}.{place}", whole.dtype, whole.shape


def parse(data: bytes, where: object) -> FleetManifest:
    """Parses the manifest in ``data`` and checks its limits.

    Raises:
        FormatError: the manifest is malformed, altered, not in its canonical form, or of another version.
    """
    value = strict_json.loads(data, where, MAX_BYTES)
    if not isinstance(value, dict) or value.get("format") != "adapterfleet":
        raise FormatError("this is not the manifest of a fleet", where=where, expected="format: adapterfleet")
    version = value.get("format_version")
    if version not in (FORMAT_VERSION, _UNSEALED) or value.get("must_understand"):
        raise FormatError(
            "another version of the format of fleets",
            where=where,
            expected=FORMAT_VERSION,
            found=version,
            remedy="use a version of adapterpack that reads it",
        )
    if version != _UNSEALED:
        require_whole(value, data, where, "fetch the fleet again, or compress the packs again")
    if strict_json.canonical(value) != data:
        raise FormatError(
            "the manifest is not in its canonical form: it was edited by hand",
            where=where,
            remedy="compress the packs again",
        )
    fields = value if version == _UNSEALED else {key: item for key, item in value.items() if key != KEY}
    what = "the manifest does not fit its schema"
    remedy = "compress the packs again"
    manifest = typed_json.require(fields, FleetManifest, what, where, remedy=remedy)
    numbers = 0
    for count, (name, dtype, shape) in enumerate(layout(manifest)):
        numbers += math.prod(shape)
        if numbers > MOST_NUMBERS or count >= MOST_TENSORS:
            raise FormatError(
                "the fleet is larger than a fleet may be",
                where=where,
                expected=f"at most {MOST_NUMBERS} numbers in {MOST_TENSORS} tensors",
                remedy="compress fewer packs",
            )
        if name.startswith("whole.") and dtype not in FLOATS:
            raise FormatError(
                "a module that was trained whole has numbers that are no floats",
                where=f"{where}, {name}",
                found=dtype,
                remedy="compress the packs again",
            )
    # Keeps the bytes as read: they determine the id, whatever version they are in.
    manifest.__dict__["bytes"] = data
    return manifest
