"""Inspects and validates folders of graphs that Olive and onnxruntime-genai made, without writing a bundle of
them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ...errors import AdapterpackError
from ...io import Config, Json
from ...onnx_graph import require_openable, require_safe
from ...pack.validate.checks import Report, unreadable
from ..genai_bundle import bundle_of, read_folder

KIND = "genai_folder"
_LEFT_OPEN = (
    "which base the graph is of, and that it computes that base: the folder names none",
    "digests and canaries: the folder holds none",
)
_NOT_OPENED = "that ONNX Runtime opens the graph: with full"


def inspect_other_folder(folder: Path) -> Json:
    """Returns what a folder of another tool is and which modules its graph has inputs of an adapter for, as
    JSON values. ``refused`` says why it cannot be run here, if it cannot.

    Raises:
        Unsupported: it does not name a graph.
        FormatError: the graph is malformed, or reads files outside of the folder.
    """
    graph, model, decoder = read_folder(folder)
    data = require_safe(graph)
    refused = None
    sites = dict[str, Any]()
    try:
        sites = dict(bundle_of(graph, decoder).sites)
    except AdapterpackError as error:
        refused = error.sentence
    return {
        "kind": KIND,
        "path": str(folder),
        "model_type": _told(model, "type", str),
        "graph": graph.path.name,
        "context_length": _told(model, "context_length", int),
        "vocab_size": _told(model, "vocab_size", int),
        "sites": len(sites),
        "sites_by_module": dict(Counter(path.rpartition(".")[2] for path in sites)),
        "refused": refused,
        "bytes": sum(path.stat().st_size for path in {graph.path, *data}),
    }


def _told(model: Config, key: str, kind: type) -> Any:
    value = model.get(key)
    return value if type(value) is kind else None


def validate_other_folder(folder: Path, full: bool) -> Report:
    """Checks that it can be told what the graph of another tool takes, that it reads no file outside of its
    folder, and with ``full`` that ONNX Runtime opens it; returns the report.
    """
    try:
        graph, _, decoder = read_folder(folder)
        data = require_safe(graph)
        bundle_of(graph, decoder)
        if full:
            require_openable(graph.path, {graph.path, *data})
    except AdapterpackError as error:
        return Report(KIND, str(folder), None, (unreadable(error, folder),))
    left_open = _LEFT_OPEN if full else (*_LEFT_OPEN, _NOT_OPENED)
    return Report(KIND, str(folder), None, (), left_open, incomplete=full)
