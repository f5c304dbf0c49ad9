"""The bundle's manifest: one deployable folder of graph, site map, adapters and tokenizer."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FormatError, UnknownAdapter, nearest, storage_errors
from ..io import strict_json
from ..io.hashing import sha256_of
from ..io.schema_check import schema_problem
from ..manifest.manifest import Base, FileEntry
from ..manifest.parts import Dims, Variant
from ..tasks.task import MAIN, task_named
from . import FILE_NAME as FILE_NAME  # noqa: PLC0414 - a name of this module too
from .signature import Signature, decode_signature

GRAPH = f"{MAIN}.onnx"
PAST, PRESENT = "past_key_values.", "present."
"""What the names of a cache begin with, as a pass takes and as it gives it; ``<layer>.key`` or ``<layer>.value`` follows."""
STEP = "step"
"""The graph of a decoder for one token on a cache that stays where it is; there where the bundle was made ``in_place``."""
MODES = ("folded", "inputs", "bank")
ADAPTER_IDS = "adapter_ids"
ADAPTER_POSITIONS = "adapter_positions"
"""The graph's input ``[batch, tokens]`` that says where a row's adapter acts; there only if an adapter does not act everywhere."""
_MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class Heads:
    """The attention before an output projection, by the values of the graph: what prompts that it looks at are made from.

    ``queries`` are those that it uses, with their positions, ``keys`` and ``values`` the products of its projections, and ``norm`` what
    goes into and comes out of the norm of the keys, where it has one. ``count`` heads of the queries share ``key_heads`` of ``width``.
    """

    queries: str
    keys: str
    values: str
    norm: tuple[str, str] | None
    count: int
    key_heads: int
    width: int
    scale: float


@dataclass(frozen=True)
class MappedSite:
    """One linear module, or block, and where it is in the graph.

    ``layout`` says how ``weight`` lies: ``in_out`` or ``out_in``. ``rank`` is the number of axes of the site's input, whose first is
    the batch. ``fields`` are the slots that the graph has for it (none in folded mode). ``labels`` is the width of the widest head that
    the slots of a module take that was trained whole. ``entry`` is the value that a branch around a block reads. A block that is no linear
    module has no weight, and its node is the one that gives its output. ``ranks`` are the ranks of its slots in a bank, by branch.
    ``positional``: what is in its slots acts where :data:`ADAPTER_POSITIONS` says so. ``part`` is the graph that it is in.
    ``flat``: its input has the tokens of all rows one after another, ``[batch * tokens, in]``, as before the experts of a model.
    ``kind``: ``linear``, ``lookup`` (an embedding, whose input is ids) or ``patches`` (a convolution whose kernels lie side by side).
    ``at`` is where its outputs begin in a weight that is packed with those of others. ``members`` are
    the sites whose ``down`` factors lie side by side in this one's slot: it is no module. ``heads`` is the attention that the site is the
    output projection of, if prompts are added to it. ``dtype`` is what the graph computes in there, and its slots hold.
    """

    path: str
    node: str
    input: str
    output: str
    weight: str
    bias: str | None
    layout: str
    in_features: int
    out_features: int
    rank: int
    role: str = "adapter"
    fields: tuple[str, ...] = ()
    labels: int = 0
    entry: str | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    positional: bool = False
    part: str = MAIN
    flat: bool = False
    kind: str = "linear"
    at: int = 0
    members: tuple[str, ...] = ()
    heads: Heads | None = None
    dtype: str = "float32"


@dataclass(frozen=True)
class BundledAdapter:
    """One adapter in the bundle: ``slot`` in bank mode, the pack's digest, its folder and its labels."""

    name: str
    pack: str
    path: str
    slot: int | None = None
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Bundle:
    """The manifest of a bundle. ``slots`` counts slot 0, which is the base; ``io_before`` is of the graphs before the one that answers.

    ``padding`` is the side on which a decoder's shorter rows are filled up, ``pooling`` how hidden states become one vector a row, and
    ``dtype`` the float type that the graphs were made in. ``in_place``: there is a graph for steps on caches that stay where they are.
    """

    mode: str
    task: str
    base: Base
    frontend: str
    sites: Mapping[str, MappedSite]
    adapters: tuple[BundledAdapter, ...]
    files: tuple[FileEntry, ...]
    slots: int = 0
    max_rank: int = 0
    max_labels: int = 0
    base_labels: tuple[str, ...] | None = None
    base_head_trained: bool = True
    quantization: Mapping[str, Any] | None = None
    parity: Mapping[str, Any] = field(default_factory=dict)
    io: Signature = field(default_factory=Signature)
    io_before: Mapping[str, Signature] = field(default_factory=dict)
    target: str = "ort"
    pooling: str = "mean"
    padding: str = "left"
    dtype: str = "float32"
    in_place: bool = False
    format: str = "adapterpack.bundle"
    format_version: str = "1.0"

    @property
    def parts(self) -> tuple[str, ...]:
        """The graphs, in the order in which they run; the last one gives the answer.

        Raises:
            UnknownName: the task is none that this version knows.
        """
        return tuple(part.name for part in task_named(self.task).parts)

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain JSON values."""
        encoded: dict[str, Any] = strict_json.plain(self)
        return encoded

    def write(self, folder: Path, draft: bool = False, known: Mapping[str, str] | None = None) -> None:
        """Writes the manifest into ``folder``, with the closed list of every other file in it; a ``draft`` lists adapters alone.

        What is about to be proved and perhaps quantized is opened with a draft: the digests of gigabytes are taken once, at the end.
        """
        complete = dataclasses.replace(self, files=tuple(list_files(folder, adapters_only=draft, known=known)))
        (folder / FILE_NAME).write_bytes(strict_json.canonical(complete.to_json()))

    def adapter(self, name: str) -> BundledAdapter:
        """The adapter of that name.

        Raises:
            UnknownAdapter: the bundle has none.
        """
        found = next((adapter for adapter in self.adapters if adapter.name == name), None)
        if found is None:
            raise UnknownAdapter("the bundle has no such adapter", found=repr(name), remedy=nearest(name, [a.name for a in self.adapters]))
        return found


def graph_file(part: str) -> str:
    """The file of one graph of a bundle."""
    return f"{part}.onnx"


def adapter_file(path: str, part: str) -> str:
    """The file of the values with which an adapter at ``path`` fills the slots of one graph, in ONNX Runtime's own format."""
    return f"{path}.onnx_adapter" if part == MAIN else f"{path}.{part}.onnx_adapter"


def bundle_in(folder: str | os.PathLike[str]) -> Path:
    """Where in ``folder`` the bundle is: a model repository has it as the version of its one model.

    Example:
        >>> bundle_in("somewhere").name
        'somewhere'
    """
    inner = sorted(Path(folder).glob(f"*/1/{FILE_NAME}"))
    return inner[0].parent if len(inner) == 1 and not (Path(folder) / FILE_NAME).exists() else Path(folder)


def list_files(folder: Path, adapters_only: bool = False, known: Mapping[str, str] | None = None) -> list[FileEntry]:
    """An entry for every file under ``folder`` except the bundle manifest itself, by relative path; ``known`` are digests, by path too."""
    entries = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        if path.is_file() and relative != FILE_NAME:
            graph = "/" not in relative and relative.endswith((".onnx", ".onnx.data"))
            role = "graph" if graph else "adapter" if relative.startswith("adapters/") else "carried"
            if adapters_only and role != "adapter":
                continue
            entries.append(FileEntry(relative, path.stat().st_size, (known or {}).get(relative) or sha256_of(path), role))
    return entries


def read_bundle(folder: str | os.PathLike[str]) -> Bundle:
    """The manifest of the bundle in ``folder``.

    Raises:
        FormatError: there is none, or it does not fit its schema.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise FormatError("the folder is not a bundle", where=folder, expected=FILE_NAME, remedy="name the folder that export wrote")
    with storage_errors(path), path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    return parse_bundle(data, path)


def parse_bundle(data: bytes, where: object) -> Bundle:
    """The manifest of a bundle from its bytes.

    Raises:
        FormatError: it does not fit its schema.
    """
    value = strict_json.loads(data, where, _MAX_BYTES)
    problem = schema_problem(value, "bundle.v1")
    if problem:
        raise FormatError(f"the bundle's manifest does not fit its schema: {problem[1]}", where=f"{where}#{problem[0]}")
    tuples = {"base_labels": value["base_labels"] and tuple(value["base_labels"])}
    return Bundle(
        **{
            **value,
            **tuples,
            "base": _base(value["base"]),
            "sites": {key: _site(site) for key, site in value["sites"].items()},
            "adapters": tuple(BundledAdapter(**{**a, "labels": a["labels"] and tuple(a["labels"])}) for a in value["adapters"]),
            "files": tuple(FileEntry(**entry) for entry in value["files"]),
            "io": decode_signature(value.get("io", {})),
            "io_before": {part: decode_signature(io) for part, io in value.get("io_before", {}).items()},
        }
    )


def _base(value: Mapping[str, Any]) -> Base:
    dims = value.get("dims")
    return Base(**{**value, "dims": dims and Dims(**dims), "variants": tuple(Variant(**one) for one in value.get("variants", ()))})


def _site(value: Mapping[str, Any]) -> MappedSite:
    heads = value.get("heads")
    found = None if heads is None else Heads(**{**heads, "norm": heads["norm"] and tuple(heads["norm"])})
    return MappedSite(**{**value, "fields": tuple(value["fields"]), "members": tuple(value.get("members", ())), "heads": found})
