"""Opens folders of graphs that Olive and onnxruntime-genai made: writes a bundle of the same graph into the
user's cache, which shares the weights with the folder, and whose slots are the graph's inputs for an adapter.

What the graph takes is told by the names of its inputs; ``genai_config.json`` says what these leave open.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path, PurePath

from ..base import copy_carried
from ..bundle import FILE_NAME, GENAI_FILE, GRAPH, PAST, PRESENT, Bundle, MappedSite
from ..errors import OutputExists, Unsupported
from ..io import Config, cache_folder, output_folder, strict_json, without_none
from ..manifest.structs import Base
from ..onnx_graph import DTYPES, GraphFile, require_safe
from ..paths import StrPath
from ..slots import slots_of
from ..version import VERSION
from .text import read_object

MADE_OF = "made_of"
"""The entry of a bundle's parity report with the folder of the other tool."""
_EMBEDDED = "embedded.onnx.data"
_SMALL = 1024
"""The bytes up to which a tensor stays in the graph: sizes, axes and the like, from which shapes follow."""
_FED = {"input_ids", "attention_mask", "position_ids"}
_CACHE = re.compile(re.escape(PAST) + r"[0-9]+\.(key|value)")
_REASON = "it is the graph of another tool, with one adapter a run"


Finish = Callable[[Bundle, Path], Bundle]
"""Adds to the folder of an unpublished bundle, and returns the bundle with what it added."""


def bundle_folder(folder: StrPath, finish: Finish | None = None) -> Path:
    """Returns the folder itself, or for one of another tool, with ``genai_config.json``, that of its bundle,
    to which ``finish`` has added.

    Raises:
        Unsupported: it cannot be told what the graph takes; the message names it.
        FormatError: the graph reads files outside of the folder, or is malformed.
    """
    source = Path(folder)
    if (source / FILE_NAME).exists() or not (source / GENAI_FILE).is_file():
        return source
    graph, model, told = read_folder(source)
    files = sorted({source / GENAI_FILE, graph.path, *require_safe(graph), *source.glob("*.json")})
    # not their change times: the links that are made change them
    states = [(str(path.resolve()), (at := path.stat()).st_ino, at.st_size, at.st_mtime_ns) for path in files]
    key = hashlib.sha256(repr((VERSION, states, finish is not None)).encode()).hexdigest()
    out = cache_folder() / "graphs" / key
    if not out.is_dir():
        # another process may have been first
        with suppress(OutputExists), output_folder(out) as new:
            _write(graph, model, told, new, finish)
    return out


def read_folder(folder: Path) -> tuple[GraphFile, Config, Config]:
    """Reads a folder of another tool: the graph of its decoder, and what ``genai_config.json`` says of the
    model, and of the decoder in it.

    Raises:
        Unsupported: it does not name a graph.
        FormatError: the graph is malformed.
    """
    config = read_object(folder / GENAI_FILE).get("model")
    model = config if isinstance(config, dict) else {}
    decoder = model.get("decoder")
    told = decoder if isinstance(decoder, dict) else {}
    name = told.get("filename", GRAPH)
    if not isinstance(name, str) or PurePath(name).name != name or not (folder / name).is_file():
        raise Unsupported(
            "the configuration names no graph in the folder",
            where=folder / GENAI_FILE,
            found=name,
            expected="the name of a graph, under model, decoder, filename",
            remedy="write the name of the graph there, and put the graph beside it",
        )
    return GraphFile(folder / name), model, told


def _write(graph: GraphFile, model: Config, told: Config, out: Path, finish: Finish | None) -> None:
    """Writes the bundle of a graph."""
    bundle = bundle_of(graph, told)
    _link(graph, out)
    copy_carried(graph.folder, out)
    _describe(model, told, out)
    (bundle if finish is None else finish(bundle, out)).write(out)


def bundle_of(graph: GraphFile, told: Config) -> Bundle:
    """Returns the manifest of a graph's bundle, without files, after it has given the graph's caches the
    sizes that the configuration of its decoder has ``told``.

    Raises:
        Unsupported: it cannot be told what the graph takes; the message names it.
    """
    inputs = list({value.name: value for value in graph.model.graph.input}.values())  # Olive lists some twice
    del graph.model.graph.input[:]
    graph.model.graph.input.extend(inputs)
    slots = slots_of(graph)
    _require_known(graph, {slot.name for slot in slots.values()})
    if needed := sorted(slot.name for slot in slots.values() if not slot.has_default):
        raise _untold("inputs that an adapter must fill", graph, needed[0], "inputs with a default")
    modules = {path for path, field in slots if {(path, "down"), (path, "up")} <= slots.keys()}
    sites = {}
    for path in sorted(modules):
        down, up = slots[path, "down"], slots[path, "up"]
        sizes = (down.shape[1 if down.turned else 0], up.shape[0 if up.turned else 1])
        if None in sizes:
            raise _untold("the width of a module", graph, path, "inputs of a fixed width")
        sites[path] = MappedSite(
            path=path,
            node="",
            input="",
            output="",
            weight="",
            bias=None,
            layout="in_out",
            in_features=sizes[0] or 1,
            out_features=sizes[1] or 1,
            rank=3,
            fields=("down", "up"),
            dtype=down.dtype.name,
        )
    caches = [value for value in graph.model.graph.input if _CACHE.fullmatch(value.name)]
    for value in caches:
        for axis, size in ((1, "num_key_value_heads"), (3, "head_size")):
            extent = value.type.tensor_type.shape.dim[axis]
            if not extent.HasField("dim_value"):
                if type(told.get(size)) is not int:
                    raise _untold("the size of its caches", graph, value.name, f"{size} in {GENAI_FILE}")
                extent.dim_value = told[size]
    return Bundle(
        mode="inputs",
        task="text-generation",
        base=Base(),
        frontend="onnxruntime-genai",
        sites=sites,
        adapters=(),
        files=(),
        dtype=DTYPES[caches[0].type.tensor_type.elem_type].name,
        padding=_padding(graph),
        parity={"decoder": {"left_out": _REASON}, MADE_OF: str(graph.folder)},
    )


def _require_known(graph: GraphFile, slots: Iterable[str]) -> None:
    """Checks that a graph takes and gives what a decoder with a cache does, and nothing else.

    Raises:
        Unsupported: it does not.
    """
    defaults = {tensor.name for tensor in graph.model.graph.initializer}
    inputs = {value.name for value in graph.model.graph.input} - defaults - {*slots}
    caches = {name for name in inputs if _CACHE.fullmatch(name)}
    if other := sorted(inputs - caches - _FED):
        raise _untold("an input", graph, other[0], f"{', '.join(sorted(_FED))}, {PAST}N.key and .value")
    outputs = {value.name for value in graph.model.graph.output}
    wanted = {"logits", *(PRESENT + name.removeprefix(PAST) for name in caches)}
    if missing := sorted(({"input_ids"} - inputs) | (wanted - outputs)):
        raise _untold("what it takes and gives", graph, f"no {missing[0]}", ", ".join(sorted(wanted)[:5]))
    if not caches:
        raise _untold("its cache", graph, "none", f"inputs such as {PAST}0.key")


def _padding(graph: GraphFile) -> str:
    """Returns the side of padding: the right one where GroupQueryAttention counts a row's own positions.

    Raises:
        Unsupported: nothing says how the graph counts them.
    """
    if "position_ids" in {value.name for value in graph.model.graph.input}:
        return "left"
    if not any(node.op_type == "GroupQueryAttention" for node in graph.model.graph.node):
        raise _untold("how it counts positions", graph, "no position_ids", "GroupQueryAttention")
    return "right"


def _link(graph: GraphFile, out: Path) -> None:
    """Writes the graph next to links to its weights; those inside its own file are read from there."""
    shared = {path: path.name for path in graph.files if path != graph.path}
    for tensor in graph.model.graph.initializer:
        place = graph.stored.get(tensor.name)
        if place is None or place.file != graph.path:
            continue
        if place.nbytes <= _SMALL:
            tensor.raw_data = graph.array(tensor.name).tobytes()
            continue
        shared[graph.path] = _EMBEDDED
        tensor.data_location = tensor.EXTERNAL
        for key, value in {"location": _EMBEDDED, "offset": place.offset, "length": place.nbytes}.items():
            tensor.external_data.add(key=key, value=str(value))
    for path, name in shared.items():
        try:
            os.link(path, out / name)
        except OSError:  # another file system
            shutil.copyfile(path, out / name)
    (out / GRAPH).write_bytes(graph.model.SerializeToString())


def _describe(model: Config, told: Config, out: Path) -> None:
    """Writes the model's configurations where the folder has none, from that of onnxruntime-genai."""
    ids = {key: model[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in model}
    sizes = {
        "model_type": model.get("type"),
        "max_position_embeddings": model.get("context_length"),
        "vocab_size": model.get("vocab_size"),
        "num_hidden_layers": told.get("num_hidden_layers"),
        "hidden_size": told.get("hidden_size"),
    }
    stated = without_none(sizes)
    for name, value in {"config.json": {**stated, **ids}, "generation_config.json": ids}.items():
        if not (out / name).exists():
            (out / name).write_bytes(strict_json.canonical(value))


def _untold(what: str, graph: GraphFile, found: object, expected: str) -> Unsupported:
    return Unsupported(
        f"the graph of another tool does not tell {what}",
        where=graph.path,
        found=found,
        expected=expected,
        remedy="make a bundle of the base and the adapters: adapterpack export BASE ADAPTERS -o BUNDLE",
    )
