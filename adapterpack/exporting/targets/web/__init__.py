"""Browsers: writes a folder for any static file server, with a page and a bundle that ``adapterpack.js`` runs
in ONNX Runtime Web.

``OUT/index.html`` and ``OUT/bundle``. What a browser downloads is in files of a bounded size, and a quantized
graph has a second form for WebAssembly on the same data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

from ....bundle.decoder_graph import DECODER
from ....bundle.manifest import GRAPH, Bundle, graph_file, read_bundle
from ....bundle.signature import GraphSignature
from ....graph_passes.float_products import write_float_products
from ....io import strict_json
from ....slots.precision import DEFAULT
from ..base import TARGETS, Target
from .data_files import data_files, split
from .facts import FACTS, facts, require_fed
from .page import write_page

SPLIT = 64 << 20
"""Size limit of data files in bytes; a single larger tensor gets its own file."""
WASM_GRAPH = "wasm.onnx"
TASKS = frozenset({"text-classification", "feature-extraction", "text-generation"})


def _finish(folder: Path, most: int | None) -> None:
    bundle = read_bundle(folder)
    require_fed(folder, bundle)
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
    wasm = write_float_products(folder / GRAPH, folder / WASM_GRAPH)
    (folder / FACTS).write_bytes(
        strict_json.canonical(facts(folder, bundle, slotted, WASM_GRAPH if wasm else None))
    )
    dataclasses.replace(bundle, decoder=False, io=io).write(folder)
    write_page(folder.parent)


def _require_inputs(io: GraphSignature, slots: Collection[str]) -> GraphSignature:
    """Returns the signature of a graph in which only slots are optional."""
    kept = tuple(port for port in io.slots if port.name in slots)
    return dataclasses.replace(
        io, inputs=(*io.inputs, *(port for port in io.slots if port.name not in slots)), slots=kept
    )


def _place(bundle: Bundle) -> str:
    return "bundle"


web = TARGETS.register(
    Target(
        "web",
        "browsers: a folder for any server of files, with a page; further packs are loaded into the "
        "bank there",
        frozenset({"bank", "folded"}),
        "export with --mode bank: a browser feeds no ONNX Runtime adapters",
        lambda task: task.name in TASKS,
        place=_place,
        finish=_finish,
        next_step="fetch the packages that run it, once: npm install --ignore-scripts --prefix {out}\n"
        "serve it to browsers: python -m http.server --bind 127.0.0.1 --directory {out}",
    )
)
