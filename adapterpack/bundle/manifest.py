"""The manifest of a bundle: the typed contents of ``adapterpack.bundle.json``, with its checks.

It describes one deployable folder: the graphs and their sites, the adapters, and every file with its digest.
Older manifests lack fields that came later; ``OPTIONAL`` fills them in. The docstrings of the structs are the
descriptions in ``schemas/bundle.v1.json``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from ..errors import FormatError, UnknownAdapter, UnknownName, require_among
from ..io import Json, Misfit, PositiveWhole, Whole, read_file, sha256_of, strict_json, typed_json
from ..manifest import structs
from ..manifest.structs import Base, FileEntry
from ..pack import SIGNATURE, require_unrevoked
from ..paths import StrPath
from ..tasks import MAIN, get_task
from ..tasks.data import ONE, PROBLEMS
from . import FILE_NAME as FILE_NAME  # noqa: PLC0414 - a name of this module too
from .reports import CanaryReport, DecoderReport, ProofReport, QuantizationReport
from .signature import GraphSignature

GRAPH = f"{MAIN}.onnx"
PAST, PRESENT = "past_key_values.", "present."
"""Prefixes of cache names, as inputs and as outputs of a pass; ``<layer>.key`` or ``<layer>.value`` follows.
"""
ENCODED = "encoder."
"""The prefix of an encoder's keys and values for cross-attention; the same follows."""
MODES = ("folded", "inputs", "bank")
ADAPTER_IDS = "adapter_ids"
ADAPTER_POSITIONS = "adapter_positions"
"""The graph's input ``[batch, tokens]`` with the positions at which a row's adapter acts. A graph has it only
if some adapter does not act everywhere.
"""
ADDED = "adapterpack/"
"""The prefix of all nodes that a graph has for adapters; quantization skips them."""
ADAPTERS = "adapters"
"""The subfolder that holds a folder for each adapter, by name."""
_MAX_BYTES = 16 << 20

_NAME = "[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
PartName = Annotated[str, Meta(pattern=r"^[a-z][a-z_]{0,31}\Z")]
FilePath = Annotated[str, Meta(max_length=255, pattern=rf"^{_NAME}(/{_NAME}){{0,3}}\Z")]
FloatType = Annotated[str, Meta(pattern=r"^(float32|float16|bfloat16)\Z")]
Labels = Annotated[
    tuple[Annotated[str, Meta(min_length=1, max_length=200)], ...], Meta(min_length=1, max_length=10_000)
]
Field = Annotated[
    str,
    Meta(
        pattern=(
            r"^((experts_)?(down|up|delta)|scale|shift|pre|turn|turn_down|turn_up|head|head_bias|mix"
            r"|attended_(keys|values|absent|gate)|virtual(_here|_cut)?"
            r"|(output|input)_(identity|relu|tanh|silu|gelu|gelu_tanh)(_normed)?"
            r"_(norm_weight|norm_bias|down|down_bias|up|up_bias)"
            r"|route[0-3]_((abs|dot)_keys|fuse_query|(abs|dot|fuse)_(bias|pick|down|up|spread)))\Z"
        )
    ),
]
"""The name of a slot of a site."""


@dataclass(frozen=True)
class Heads:
    """The attention before an output projection; prompts are computed from its values in the graph.

    ``queries`` are the final queries, with positions. ``keys`` and ``values`` are the outputs of the
    projections, and ``norm`` the input and output of the norm on the keys, if there is one. ``count`` query
    heads share ``key_heads`` key heads of ``width``.
    """

    queries: str
    keys: str
    values: str
    norm: tuple[str, str] | None
    count: Annotated[int, Meta(ge=1, le=100_000)]
    key_heads: Annotated[int, Meta(ge=1, le=100_000)]
    width: Annotated[int, Meta(ge=1, le=1_000_000)]
    scale: float


@dataclass(frozen=True)
class MappedSite:
    """A site of a graph, a linear module or a block, with its slots.

    Attributes:
        node: the node of its matrix product; for a block, which has no weight, the node of its output.
        layout: the axis order of ``weight``: ``in_out`` or ``out_in``; of experts that of their ``down`` and
            ``up``, which change places where adapters take ``[experts, in, out]`` for ``[experts, out, in]``.
        rank: the number of axes of its input; the first is the batch.
        fields: the slots that the graph has for it; none in folded mode.
        labels: for a module that was trained in full, the most labels for which its slots have room.
        entry: the value that enters a block, for branches that read its input.
        ranks: the ranks of its slots in a bank, by branch.
        positional: whether its slots act only where :data:`ADAPTER_POSITIONS` is true.
        part: the graph to which it belongs.
        flat: whether its input joins the tokens of all rows, ``[batch * tokens, in]``, as for the experts of
            a mixture, or their windows, ``[batch * windows, tokens, in]``.
        kind: ``linear``, ``lookup`` (an embedding, whose input is ids), ``patches`` (a convolution over
            patches that do not overlap), ``experts`` (a stack of matrices, one for each expert, whose path is
            a parameter's) or ``prompt`` (virtual tokens before a row's own).
        at: the index of its first output in a weight that several sites share.
        members: for a group, which is no module, the sites whose ``down`` factors are concatenated in its
            slot.
        heads: the attention whose output projection it is, if prompts are added there.
        dtype: the float type of the graph there, and of its slots.
        head: for an embedding, the output head that is tied to it.
        stack: the number of its experts.
    """

    path: structs.Path
    node: str
    input: str
    output: str
    weight: str
    bias: str | None
    layout: Annotated[str, Meta(pattern=r"^(in_out|out_in)\Z")]
    in_features: PositiveWhole
    out_features: PositiveWhole
    rank: PositiveWhole
    role: Annotated[str, Meta(pattern=r"^(adapter|full)\Z")] = "adapter"
    fields: Annotated[tuple[Field, ...], Meta(extra_json_schema={"uniqueItems": True})] = ()
    labels: Annotated[int, Meta(ge=0, le=100_000)] = 0
    entry: str | None = None
    ranks: Annotated[Mapping[str, Annotated[int, Meta(ge=0, le=1_000_000)]], Meta(max_length=24)] = field(
        default_factory=dict
    )
    positional: bool = False
    part: PartName = MAIN
    flat: bool = False
    kind: Annotated[str, Meta(pattern=r"^(linear|lookup|patches|experts|prompt)\Z")] = "linear"
    at: Whole = 0
    members: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=512)], ...], Meta(max_length=64)
    ] = ()
    heads: Heads | None = None
    dtype: FloatType = "float32"
    head: str | None = None
    stack: Annotated[int, Meta(ge=1, le=100_000)] = 1

    def breaches(self) -> Iterator[Misfit]:
        """Yields a misfit for each duplicate field."""
        return typed_json.find_duplicates(self.fields, "/fields")


SiteMap = Mapping[str, MappedSite]
"""Path of a site -> its place in the graphs."""


@dataclass(frozen=True)
class BundledAdapter:
    """One adapter in the bundle: the digest of its pack, its folder, its labels, and in bank mode its
    ``slot``.
    """

    name: structs.PackName
    pack: structs.Sha256
    path: FilePath
    slot: PositiveWhole | None = None
    labels: Labels | None = None


class BundleFile(FileEntry):
    """One file of a bundle."""

    path: FilePath
    role: Annotated[str, Meta(pattern=r"^(graph|adapter|carried)\Z")]


@dataclass(frozen=True)
class Bundle:
    """The manifest of a bundle.

    ``slots`` includes slot 0, which belongs to the base. ``io_before`` holds the signatures of the graphs
    before the last one, which gives the answer. ``base_problem`` says what the logits of the base's own head
    mean. ``padding`` is the side on which shorter rows of a decoder are padded, ``pooling`` how hidden states
    become one vector for each row, and ``dtype`` the float type of the graphs. ``decoder`` says that there is
    a decoder graph for the engine. ``in_place`` is a remnant: an older version wrote a graph for single
    steps, which nothing reads any more. ``compensation`` once named a pack that every row carried; such a
    bundle has to be quantized again.
    """

    mode: Annotated[str, Meta(pattern=rf"^({'|'.join(MODES)})\Z")]
    task: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9-]{0,63}\Z")]
    base: Base
    frontend: structs.ShortText
    sites: Annotated[Mapping[str, MappedSite], Meta(max_length=50_000)]
    adapters: Annotated[tuple[BundledAdapter, ...], Meta(max_length=4096)]
    files: Annotated[tuple[BundleFile, ...], Meta(max_length=1 << 16)]
    slots: Annotated[int, Meta(ge=0, le=4096)] = 0
    max_rank: Annotated[int, Meta(ge=0, le=4096)] = 0
    max_labels: Annotated[int, Meta(ge=0, le=100_000)] = 0
    base_labels: Labels | None = None
    base_head_trained: bool = True
    base_problem: Annotated[str, Meta(pattern=rf"^({'|'.join(PROBLEMS)})\Z")] = ONE.name
    quantization: Mapping[str, Any] | None = None
    parity: Mapping[str, Any] = field(default_factory=dict)
    io: GraphSignature = field(default_factory=GraphSignature)
    io_before: Annotated[Mapping[PartName, GraphSignature], Meta(max_length=8)] = field(default_factory=dict)
    target: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_-]{0,63}\Z")] = "ort"
    pooling: Annotated[str, Meta(pattern=r"^(mean|cls|last)\Z")] = "mean"
    padding: Annotated[str, Meta(pattern=r"^(left|right)\Z")] = "left"
    dtype: FloatType = "float32"
    in_place: bool = False
    decoder: bool = False
    compensation: None = None
    format: Literal["adapterpack.bundle"] = "adapterpack.bundle"
    format_version: Annotated[str, Meta(pattern=r"^1\.[0-9]{1,4}\Z")] = "1.0"

    def breaches(self) -> Iterator[Misfit]:
        """Yields what types cannot express: an unknown task, duplicate files, adapters and sites that do not
        fit the bank or each other, and errors in the reports on quantization and canaries.
        """
        try:
            parts = self.parts
        except UnknownName as error:
            yield Misfit(
                "/task", f"{error.sentence.rstrip('.')}, or the package that brings it is not installed"
            )
            return
        yield from self._file_breaches()
        yield from self._adapter_breaches()
        yield from self._site_breaches(parts)
        for pointer, report, kind in (
            ("/quantization", self.quantization, QuantizationReport | None),
            ("/parity/canary", self.parity.get("canary", _NO_CANARIES), CanaryReport),
            ("/parity/decoder", self.parity.get("decoder", {}), DecoderReport),
            ("/parity/proof", self.parity.get("proof", _IN_FULL), ProofReport),
        ):
            if isinstance(problem := typed_json.read(report, kind), Misfit):  # type: ignore[arg-type]
                yield Misfit(pointer + problem.pointer, problem.message)

    def _file_breaches(self) -> Iterator[Misfit]:
        yield from typed_json.find_duplicates([entry.path.casefold() for entry in self.files], "/files")
        owned = tuple(f"{adapter.path}{after}" for adapter in self.adapters for after in "/.")
        for number, entry in enumerate(self.files):
            if entry.role != role_of(entry.path):
                yield Misfit(
                    f"/files/{number}/role", f"a file of that path is of the role {role_of(entry.path)}"
                )
            if entry.role == "adapter" and not entry.path.startswith(owned):
                yield Misfit(f"/files/{number}/path", "the file belongs to no adapter of the bundle")

    def _adapter_breaches(self) -> Iterator[Misfit]:
        yield from typed_json.find_duplicates([adapter.name for adapter in self.adapters], "/adapters")
        if self.mode != "bank":
            for name in ("slots", "max_rank"):
                if getattr(self, name):
                    yield Misfit(f"/{name}", f"a bundle of the mode {self.mode} has no bank")
        elif not self.slots or (
            not self.max_rank and any("down" in site.fields for site in self.sites.values())
        ):
            yield Misfit("/slots", "a bank has slots of some rank")
        yield from typed_json.find_duplicates(
            [adapter.slot for adapter in self.adapters if adapter.slot is not None], "/adapters"
        )
        for number, adapter in enumerate(self.adapters):
            if adapter.path != f"{ADAPTERS}/{adapter.name}":
                yield Misfit(f"/adapters/{number}/path", "an adapter lies in the folder of its name")
            if (adapter.slot is None) == (self.mode == "bank") or (adapter.slot or 0) >= max(self.slots, 1):
                expected = (
                    f"a slot below {self.slots}"
                    if self.mode == "bank"
                    else f"no slot in the mode {self.mode}"
                )
                yield Misfit(f"/adapters/{number}/slot", f"expected {expected}, found {adapter.slot}")

    def _site_breaches(self, parts: Collection[str]) -> Iterator[Misfit]:
        for path, site in self.sites.items():
            pointer = f"/sites/{typed_json.escape_key(path)}"
            if site.part not in parts:
                yield Misfit(f"{pointer}/part", f"the task {self.task} has no graph {site.part!r}")
            if site.fields and self.mode == "folded":
                yield Misfit(f"{pointer}/fields", "a folded graph has no slots")
            if not self.sites.keys() >= set(site.members):
                yield Misfit(f"{pointer}/members", "a member is no site of the bundle")
            if site.labels > self.max_labels:
                yield Misfit(f"{pointer}/labels", f"expected at most {self.max_labels}, found {site.labels}")

    @property
    def parts(self) -> tuple[str, ...]:
        """The part names of the graphs, in the order in which they run; the last one gives the answer.

        Raises:
            UnknownName: this version does not know the task.
        """
        return tuple(part.name for part in get_task(self.task).parts)

    def to_json(self) -> Json:
        """Returns the manifest as plain JSON values."""
        encoded: Json = strict_json.plain(self)
        return encoded

    def write(self, folder: Path, draft: bool = False, known: Mapping[str, str] | None = None) -> None:
        """Writes the manifest into ``folder``, with the complete list of all other files. A ``draft`` lists
        adapters only.

        Export opens the bundle with a draft to test and perhaps quantize it, so that gigabytes are hashed
        only once, at the end.
        """
        complete = dataclasses.replace(
            self, files=tuple(list_files(folder, adapters_only=draft, known=known))
        )
        (folder / FILE_NAME).write_bytes(strict_json.canonical(complete.to_json()))

    def adapter(self, name: str) -> BundledAdapter:
        """Returns the adapter of that name.

        Raises:
            UnknownAdapter: the bundle has none.
        """
        named = {adapter.name: adapter for adapter in self.adapters}
        require_among("the bundle has no such adapter", name, named, UnknownAdapter)
        return named[name]


def sites_in(part: str, sites: SiteMap) -> dict[str, MappedSite]:
    """Returns the sites that lie in the graph of a part."""
    return {path: site for path, site in sites.items() if site.part == part}


def graph_file(part: str) -> str:
    """Returns the file name of a graph of a bundle."""
    return f"{part}.onnx"


def adapter_file(path: str, part: str) -> str:
    """Returns the ``.onnx_adapter`` file with the values of an adapter at ``path`` for the slots of one
    graph.
    """
    return f"{path}.onnx_adapter" if part == MAIN else f"{path}.{part}.onnx_adapter"


def role_of(path: str) -> str:
    """Returns the role of a file of a bundle: a ``graph`` or its data, part of an ``adapter``, or ``carried``
    over from the base.

    Example:
        >>> (role_of("model.onnx.data"), role_of("adapters/tickets/adapterpack.json"),
        ...     role_of("tokenizer.json"))
        ('graph', 'adapter', 'carried')
    """
    if "/" not in path and path.endswith((".onnx", ".onnx.data")):
        return "graph"
    return "adapter" if path.startswith(f"{ADAPTERS}/") else "carried"


def bundle_in(folder: StrPath) -> Path:
    """Finds the bundle in ``folder``: a model repository holds it as the version of its single model, a site
    as ``bundle``, a model package as its only shared asset. Returns ``folder`` itself for anything else.

    Example:
        >>> bundle_in("somewhere").name
        'somewhere'
    """
    inner = [
        path
        for place in ("*/1", "bundle", "shared_assets/*")
        for path in Path(folder).glob(f"{place}/{FILE_NAME}")
    ]
    return inner[0].parent if len(inner) == 1 and not (Path(folder) / FILE_NAME).exists() else Path(folder)


def list_files(folder: Path, adapters_only: bool, known: Mapping[str, str] | None) -> list[BundleFile]:
    """Returns an entry for every file under ``folder`` except the manifest and its signature. ``known`` are
    digests that need not be computed, by relative path.
    """
    entries = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        if path.is_file() and relative not in {FILE_NAME, SIGNATURE}:
            if adapters_only and role_of(relative) != "adapter":
                continue
            digest = (known or {}).get(relative) or sha256_of(path)
            entries.append(BundleFile(relative, path.stat().st_size, digest, role_of(relative)))
    return entries


def read_bundle(folder: StrPath) -> Bundle:
    """Reads the manifest of the bundle in ``folder``.

    Raises:
        FormatError: there is no manifest, or it does not fit its schema.
    """
    return parse_bundle(manifest_bytes(folder), Path(folder) / FILE_NAME)


def manifest_bytes(folder: StrPath) -> bytes:
    """Reads the bytes of the manifest in ``folder``, up to just above the permitted size.

    Raises:
        FormatError: there is no manifest, or it is no regular file.
    """
    path = Path(folder) / FILE_NAME
    if not os.path.lexists(path):
        # a base; packs
        kinds = {"config.json": "{}", "adapterpack.json": "BASE {}", "adapter_config.json": "BASE {}"}
        named = next((words for name, words in kinds.items() if (Path(folder) / name).is_file()), None)
        remedy = (
            "name the folder that export wrote"
            if named is None
            else f"make a bundle of it: adapterpack export {named.format(shlex.quote(str(folder)))} -o BUNDLE"
        )
        raise FormatError("the folder is not a bundle", where=folder, expected=FILE_NAME, remedy=remedy)
    return read_file(path, _MAX_BYTES + 1)


def parse_bundle(data: bytes, where: object) -> Bundle:
    """Parses the manifest of a bundle from its bytes.

    Raises:
        FormatError: the manifest does not fit its schema.
        Revoked: the bundle is on the list of what was revoked.
    """
    require_unrevoked({f"sha256:{hashlib.sha256(data).hexdigest()}": "the bundle"}, where)
    value = _with_later_fields(strict_json.loads(data, where, _MAX_BYTES))
    return typed_json.require(value, Bundle, "the bundle's manifest does not fit its schema", where)


_IN_FULL = {"depth": "full"}
_NO_CANARIES: Json = {"replayed": {}, "not_replayed": {}}
OPTIONAL: Mapping[str, Json] = json.loads((Path(__file__).parent / "optional_fields.json").read_text("utf-8"))
"""Part of a manifest -> the fields that older bundles may lack, with their values in that case."""


def _with_later_fields(value: Any) -> Any:
    """Returns a manifest with the fields that are newer than it."""
    if not isinstance(value, dict):
        return value
    new = {**OPTIONAL["Bundle"], **value}
    for key, part in (("base", "Base"), ("io", "GraphSignature")):
        if isinstance(item := new.get(key), dict):
            new[key] = {**OPTIONAL[part], **item}
    for key, part in (("sites", "MappedSite"), ("io_before", "GraphSignature")):
        if isinstance(items := new.get(key), dict):
            new[key] = {
                name: {**OPTIONAL[part], **item} if isinstance(item, dict) else item
                for name, item in items.items()
            }
    return new
