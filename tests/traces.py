"""What torch.export makes of a model is made once for all tests, by whichever process of a run needs it
first: a trace takes seconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx_ir as ir
from pytest import MonkeyPatch

LARGEST = 128 << 20
"""Bytes of parameters; a graph of more is not worth its place on a disk."""


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """While it lasts, the graph of a model that was traced before is read from ``folder``."""
    if find_spec("torch") is None:  # nothing is traced where the hub's tests run by themselves
        yield
        return
    frontend = import_module("adapterpack.exporting.tracing.trace")
    trace = frontend._trace

    def traced(form: Any, part: Any, inputs: dict[str, Any]) -> Any:
        if sum(value.nbytes for value in form.parameters()) > LARGEST:
            return trace(form, part, inputs)
        file = folder / f"{_key(form, part, inputs)}.onnx"
        if not file.exists():
            operators_kept()
            # where sizes are symbols it costs a tenth
            with import_module("torch._dynamo.config").patch(fake_tensor_cache_enabled=False):
                graph = trace(form, part, inputs)
            new = file.with_suffix(f".{os.getpid()}")
            ir.save(graph, new, format="protobuf")
            new.rename(file)
            return graph
        return ir.from_proto(ir.to_proto(ir.load(file, format="protobuf")))  # which holds its weights itself

    with MonkeyPatch.context() as patch:
        operators_kept = cache(lambda: _keep_operators(patch))
        patch.setattr(frontend, "_trace", traced)
        yield


def _keep_operators(patch: MonkeyPatch) -> None:
    """What torch.onnx makes of the sources of its operators, some hundreds, is made for the first trace and
    copied for the others.
    """
    module = import_module("torch.onnx._internal.exporter._registration")
    parsed = cache(module.ONNXRegistry.from_torchlib)

    def from_torchlib(opset_version: int = module._constants.TORCHLIB_OPSET) -> Any:
        registry = copy(parsed(opset_version))
        registry.functions = {name: list(known) for name, known in registry.functions.items()}
        return registry

    patch.setattr(module.ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))


def _key(form: Any, part: Any, inputs: dict[str, Any]) -> str:
    """The digest of whatever a trace depends on: the modules, their configs, every number in them, and the
    example.
    """
    digest = sha256(f"{form}{part}{type(form)}{form.inner.dtype}".encode())
    for config in {
        id(module.config): module.config for module in form.modules() if hasattr(module, "config")
    }.values():
        values = {**config.to_dict(), "attention": config._attn_implementation, "_name_or_path": None}
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    for name, value in [*form.named_parameters(), *form.named_buffers(), *_flat("", inputs)]:
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().view(-1).view(_byte()).numpy())
    return digest.hexdigest()


def _byte() -> Any:
    import torch

    return torch.uint8


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(f"{name}.{key}", item)
    else:
        yield name, value
