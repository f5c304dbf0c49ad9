"""Browsers: writes a folder for any static file server, with a page and a bundle that ``adapterpack.js`` runs
in ONNX Runtime Web.

``OUT/index.html`` and ``OUT/bundle``. What a browser downloads is in files of a bounded size, and a quantized
graph has a second form for WebAssembly on the same data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path

from ....base import read_json
from ....bundle import (
    ADAPTER_IDS,
    DECODER,
    GRAPH,
    PAST,
    Bundle,
    GraphSignature,
    graph_file,
    growing_axis,
    read_bundle,
)
from ....errors import Unsupported
from ....graph_passes import write_float_products
from ....io import Json, strict_json
from ....pack import load
from ....runtime import Tokenizer, context_length
from ....slots import DEFAULT
from ..base import TARGETS, Target
from .data_files import SlotPlace, data_files, split
from .page import write_page

SPLIT = 64 << 20
"""Size limit of data files in bytes; a single larger tensor gets its own file."""
WASM_GRAPH = "wasm.onnx"
TASKS = frozenset({"text-classification", "feature-extraction", "text-generation"})


def _finish(folder: Path, most: int | None) -> None:
    bundle = read_bundle(folder)
    tokenizer, problems = require_feedable(folder, bundle)
    old = data_files(folder / GRAPH)
    (folder / graph_file(DECODER)).unlink(missing_ok=True)  # browsers do not run the engine's graph
    slots = {f"{path}.{field}" for path, site in bundle.sites.items() for field in site.fields}
    io = _require_inputs(bundle.io, slots)
    places = split(
        folder / GRAPH,
        slots,
        {port.name for port in io.inputs} - {port.name for port in bundle.io.inputs},
        most or SPLIT,
    )
    for name in old - data_files(folder / GRAPH):
        (folder / name).unlink()
    # JavaScript can only fill float32 slots
    slotted = {} if any(site.dtype != DEFAULT for site in bundle.sites.values()) else places
    without = write_float_products(folder / GRAPH, folder / WASM_GRAPH)
    wasm = WASM_GRAPH if without is None else None
    (folder / FACTS).write_bytes(strict_json.canonical(facts(folder, tokenizer, problems, slotted, wasm)))
    dataclasses.replace(bundle, decoder=False, io=io).write(folder)
    write_page(folder.parent)


def _require_inputs(io: GraphSignature, slots: Collection[str]) -> GraphSignature:
    """Returns the signature of a graph in which only slots are optional."""
    kept = tuple(port for port in io.slots if port.name in slots)
    return dataclasses.replace(
        io, inputs=(*io.inputs, *(port for port in io.slots if port.name not in slots)), slots=kept
    )


web = TARGETS.register(
    Target(
        "web",
        "browsers: a folder for any server of files, with a page; further packs are loaded into the "
        "bank there",
        frozenset({"bank", "folded"}),
        "export with --mode bank: a browser feeds no ONNX Runtime adapters",
        lambda task: task.name in TASKS,
        place=lambda bundle: "bundle",
        finish=_finish,
        splits=True,
        next_step="fetch the packages that run it, once: npm install --ignore-scripts --prefix {out}\n"
        "serve it to browsers: python -m http.server --bind 127.0.0.1 --directory {out}",
    )
)


FACTS = "web.json"
_TOKENIZERS = frozenset({"BPE", "Unigram", "WordPiece"})
"""The tokenizer models that the package @huggingface/tokenizers supports."""
_TYPES = frozenset({"float32", "int64"})
_FED = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids", ADAPTER_IDS})
"""The inputs that ``adapterpack.js`` feeds, besides the cache."""


def require_feedable(folder: Path, bundle: Bundle) -> tuple[Tokenizer, dict[str, str]]:
    """Checks that a browser can feed the graph and start the rows of each adapter; returns the tokenizer, and
    the problem of each adapter that has labels.

    Raises:
        Unsupported: the graph has another input or float type, the tokenizer is of another kind, or an
            adapter is a prompt.
    """
    if unknown := [
        port.name
        for port in bundle.io.inputs
        if port.name not in _FED
        and not (port.name.startswith(PAST) and growing_axis(port.name, port.shape) is not None)
    ]:
        raise Unsupported(
            "a browser does not feed an input of this graph",
            found=", ".join(unknown),
            expected=", ".join(sorted(_FED)),
            remedy="leave out the adapter that acts at some positions only, or --target web",
        )
    if others := sorted({port.dtype for port in (*bundle.io.inputs, *bundle.io.outputs)} - _TYPES):
        raise Unsupported(
            "a browser cannot read or write numbers of this graph's types",
            found=", ".join(others),
            expected=", ".join(sorted(_TYPES)),
            remedy="export with --dtype float32",
        )
    tokenizer = Tokenizer(folder)
    if (kind := type(tokenizer.core.model).__name__) not in _TOKENIZERS:
        raise Unsupported(
            "a browser has no tokenizer of this kind",
            where=folder / "tokenizer.json",
            found=kind,
            expected=", ".join(sorted(_TOKENIZERS)),
            remedy="leave --target web out",
        )
    problems: dict[str, str] = {}
    for adapter in bundle.adapters:
        pack = load(folder / adapter.path)
        if pack.method.kind == "prompt":
            raise Unsupported(
                "a browser does not begin a row with an adapter's prompt",
                where=adapter.name,
                found="a prompt",
                remedy="leave this adapter out, or --target web",
            )
        if adapter.labels:
            problems[adapter.name] = pack.manifest.problem
    return tokenizer, problems


def facts(
    folder: Path,
    tokenizer: Tokenizer,
    problems: Mapping[str, str],
    slots: Mapping[str, SlotPlace],
    wasm_graph: str | None,
) -> Json:
    """Returns the facts as plain JSON values; reads template and lengths the way the runtime does."""
    return {
        "context": context_length(read_json(folder / "config.json"), folder / "config.json"),
        "ends": sorted(tokenizer.eos_ids),
        "pad": tokenizer.pad_id,
        "problems": dict(problems),
        "slots": {
            name: {"file": place.file, "offset": place.offset, "shape": list(place.shape)}
            for name, place in slots.items()
        },
        "special": tokenizer.special_tokens,
        "template": tokenizer.template,
        "wasm_graph": wasm_graph,
    }
