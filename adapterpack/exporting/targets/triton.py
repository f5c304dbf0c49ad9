"""NVIDIA Triton: a model repository whose one version is the bundle.

``OUT/MODEL/config.pbtxt`` and ``OUT/MODEL/1/``, the bundle. The adapter is an ordinary input, so the server's
dynamic batcher puts requests for different adapters into one batch. Format:
https://github.com/triton-inference-server/server, docs/user_guide/model_configuration.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from ...bundle import ADAPTER_IDS, Bundle, Port
from .base import TARGETS, Target

CONFIG = "config.pbtxt"
BATCH = 64
"""The largest batch that the server forms."""
_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "bool": "TYPE_BOOL",
    "float64": "TYPE_FP64",
    "uint8": "TYPE_UINT8",
}


def model_name(bundle: Bundle) -> str:
    """Returns the model's name on the server: that of the base.

    Example:
        >>> re.sub(r"[^A-Za-z0-9._-]+", "-", "org/My model")
        'org-My-model'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", bundle.base.name or "model").strip("-.") or "model"


def _write(folder: Path, bundle: Bundle) -> None:
    model = folder.parent
    shared = _shared_labels(bundle)
    if shared:
        (model / "labels.txt").write_text("".join(f"{label}\n" for label in shared), "utf-8")
    (model / CONFIG).write_text(config(bundle, "labels.txt" if shared else None), "utf-8")


def config(bundle: Bundle, labels: str | None = None) -> str:
    """Returns the text of ``config.pbtxt``. Its parameters record the id, the pack and the labels of each
    adapter.
    """
    lines = [
        f"name: {_text(model_name(bundle))}",
        'backend: "onnxruntime"',
        f"max_batch_size: {BATCH}",
        "version_policy { latest { num_versions: 1 } }",
        "dynamic_batching { }",
    ]
    for port in bundle.io.inputs:
        lines += _block("input", port)
    for port in bundle.io.outputs:
        lines += _block("output", port, labels if port.name == "logits" else None)
    for key, value in _parameters(bundle):
        lines.append(f"parameters {{ key: {_text(key)} value {{ string_value: {_text(value)} }} }}")
    return "\n".join(lines) + "\n"


def _block(kind: str, port: Port, labels: str | None = None) -> list[str]:
    """Returns one input or output without its batch axis; a value without other axes is declared for the
    server to reshape.
    """
    dims = ", ".join(str(extent if isinstance(extent, int) else -1) for extent in port.shape[1:])
    shape = [f"  dims: [ {dims} ]"] if dims else ["  dims: [ 1 ]", "  reshape { shape: [ ] }"]
    more = [f"  label_filename: {_text(labels)}"] if labels else []
    return [
        f"{kind} {{",
        f"  name: {_text(port.name)}",
        f"  data_type: {_TYPES[port.dtype]}",
        *shape,
        *more,
        "}",
    ]


def _parameters(bundle: Bundle) -> Iterator[tuple[str, str]]:
    yield "adapterpack.base", bundle.base.content or bundle.base.structure or ""
    if bundle.base_labels:
        yield "adapterpack.labels", json.dumps(list(bundle.base_labels))
    for adapter in bundle.adapters:
        if any(port.name == ADAPTER_IDS for port in bundle.io.inputs):
            yield f"adapterpack.adapter_id.{adapter.name}", str(adapter.slot)
        yield f"adapterpack.pack.{adapter.name}", adapter.pack
        if adapter.labels:
            yield f"adapterpack.labels.{adapter.name}", json.dumps(list(adapter.labels))


def _shared_labels(bundle: Bundle) -> tuple[str, ...] | None:
    """Returns the labels if all adapters that a row can name share them: the server knows one list for each
    output.
    """
    lists = {adapter.labels or bundle.base_labels for adapter in bundle.adapters}
    if not bundle.adapters or (bundle.base_head_trained and bundle.mode != "folded"):
        lists.add(bundle.base_labels)
    return next(iter(lists)) if len(lists) == 1 else None


def _text(value: str) -> str:
    """Quotes a string for protobuf's text format. JSON's escapes are a subset of its escapes, except
    surrogate pairs, which are therefore not escaped.
    """
    return json.dumps(value, ensure_ascii=False)


triton = TARGETS.register(
    Target(
        "triton",
        "NVIDIA Triton: a model repository, adapters chosen by the input adapter_ids",
        frozenset({"bank", "folded"}),
        "export with --mode bank: the server feeds no ONNX Runtime adapters",
        lambda task: len(task.parts) == 1,
        place=lambda bundle: f"{model_name(bundle)}/1",
        write=_write,
    )
)
