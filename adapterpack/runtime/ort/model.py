"""Opens one graph of a bundle under ONNX Runtime, and runs it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from ..._native import quantized_matmul, ragged_attention, row_lora
from ...bundle import DECODER, ENCODED, PRESENT, graph_file
from ...errors import AdapterpackError, ProviderError
from ...library_errors import library_errors
from ...onnx_graph import (
    computing_wide,
    divide_products,
    is_fast,
    packs_codes,
    replace_attention,
    replace_lora,
    replace_products,
)
from ...slots import DEFAULT
from ...tasks import AXES
from ..providers import ResolvedDevice, check_placement
from .values import BFLOAT16

_UNCAPTURED = -1
"""The number of a run that is neither recorded nor replayed:
https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html.
"""
TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(bool)": "bool",
}
"""ONNX Runtime's type name -> numpy's."""


class OrtModel:
    """An ONNX Runtime session of one graph, which computes in ``dtype``.

    By name: ``inputs`` must be fed; ``slots`` are inputs with defaults, of which callers may feed the
    ``optional`` ones; ``results`` are the outputs. The caller checks the graph beforehand with
    :func:`adapterpack.onnx_graph.confine.require_safe`. ``mapped`` is for a few runs: it leaves
    weights in the mapped file, except codes of up to :data:`adapterpack.onnx_graph.products.PACKED` bytes.
    Opening then costs neither time nor memory, but each run is slower: slightly for float products, 20 to 80
    times for more codes.

    Otherwise, on the CPU, the engine's graph adds the changes of LoRAs by an operator of adapterpack's own,
    where that was compiled: ``lora`` are the paths of these layers in the order of their numbers, and
    ``halves`` says whether their factors are held in float16, as where activations are rounded to int8.
    ``ragged`` says whether another operator computes the attention, for which the inputs name each token's
    row and position. In any graph a third one multiplies by quantized weights where activations are rounded,
    and the session holds these weights itself.

    Raises:
        FormatError: ONNX Runtime refuses the graph.
        ProviderError: the device's provider did not start, or leaves nodes to the CPU that the device does
            not allow there.
    """

    def __init__(
        self, folder: Path, part: str, resolved: ResolvedDevice, dtype: str = DEFAULT, mapped: bool = False
    ) -> None:
        self.path = folder / graph_file(part)
        self.resolved = resolved
        self.memory = resolved.memory
        self.dtype = dtype
        self.ragged = False
        self.lora = list[str]()
        self.halves = False
        self._weights = list[quantized_matmul.HeldWeight]()
        options = resolved.session_options()
        with self._opening(resolved):
            self._ort = resolved.open(self._form(options, part, mapped), options)
        self.provider = resolved.require(self._ort)
        on_cpu = resolved.provider.name == "cpu"
        self.cpu_nodes = [] if on_cpu else check_placement(self._ort, resolved, self.path)
        self.inputs: dict[str, Any] = {value.name: value for value in self._ort.get_inputs()}
        self.slots: dict[str, Any] = {value.name: value for value in self._ort.get_overridable_initializers()}
        self.optional = {name: value for name, value in self.slots.items() if name in AXES}
        self.results: dict[str, Any] = {value.name: value for value in self._ort.get_outputs()}
        self.outputs = list(self.results)
        self._types = {
            name: np.dtype(TYPES[value.type])
            for name, value in {**self.inputs, **self.optional}.items()
            if value.type in TYPES
        }

    def _opening(self, resolved: ResolvedDevice) -> AbstractContextManager[None]:
        """Translates errors: a graph that the CPU cannot open is invalid; on another provider it may just be
        unsupported.
        """
        name = resolved.provider.name
        if name == "cpu":
            return library_errors(
                "onnxruntime",
                "ONNX Runtime cannot open the graph",
                where=self.path,
                remedy="export the bundle again",
            )
        return library_errors(
            "onnxruntime",
            f"ONNX Runtime cannot open the graph on {name}",
            where=self.path,
            kind=ProviderError,
            remedy="choose another provider",
        )

    def _form(self, options: ort.SessionOptions, part: str, mapped: bool) -> Path | bytes:
        """Returns what ONNX Runtime opens: the graph's file, or the same graph with divided products or LoRAs
        in one operator, or for bfloat16 on a CPU, which cannot compute in it, with casts.
        """
        on_cpu = self.resolved.provider.name == "cpu"
        form: Path | bytes = self.path
        if mapped:
            model = ir.load(self.path)
            if not packs_codes(model):
                options.add_session_config_entry("session.disable_prepacking", "1")
            # a folded transposition would be a copy of a table that is the head, too
            options.add_session_config_entry("optimization.disable_specified_optimizers", "ConstantFolding")
            # with few runs, spinning threads would only take cores from others
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            if divide_products(model):
                form = ir.to_proto(model).SerializeToString()
        if self.dtype == BFLOAT16.name and on_cpu:
            form = computing_wide(self.path)
        elif on_cpu and not mapped:
            model = ir.load(self.path)
            if part == DECODER:
                self.lora = replace_lora(model) if row_lora.LIBRARY else []
                self.halves = bool(self.lora and is_fast(model))
                self.ragged = bool(ragged_attention.LIBRARY and replace_attention(model))
            self._weights = replace_products(model) if quantized_matmul.LIBRARY else []
            used = {
                row_lora.LIBRARY: self.lora,
                ragged_attention.LIBRARY: self.ragged,
                quantized_matmul.LIBRARY: self._weights,
            }
            for library in [library for library, there in used.items() if there]:
                options.register_custom_ops_library(library)
                form = ir.to_proto(model).SerializeToString()
        if isinstance(form, bytes):
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(self.path.parent)
            )
        return form

    def cast(self, name: str, array: np.ndarray) -> np.ndarray:
        """Casts an array to the dtype of the input of that name."""
        return array.astype(self._types.get(name, array.dtype), copy=False)

    def call(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Runs the graph on ``OrtValue`` feeds and returns its outputs by name. On a GPU the KV cache stays
        on the device.

        Raises:
            AdapterpackError: ONNX Runtime fails, for example on a shape or an id that the graph cannot take.
        """
        with self._errors():
            values = (
                self._ort.run_with_ort_values(self.outputs, dict(feeds))
                if self.memory[0] == "cpu"
                else self._bound(feeds)
            )
        return dict(zip(self.outputs, values, strict=True))

    def _bound(self, feeds: Mapping[str, Any]) -> list[Any]:
        binding = self._ort.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, *(self.memory if name.startswith((PRESENT, ENCODED)) else ("cpu", 0)))
        self._ort.run_with_iobinding(binding, self._options(None))
        return list(binding.get_outputs())

    def binding(self) -> Any:
        """Returns a new ``IOBinding`` of the graph, for :meth:`run_bound`."""
        return self._ort.io_binding()

    def run_bound(self, binding: Any, capture: int | None) -> None:
        """Runs the graph on a binding. On a device that captures, the first run with a ``capture`` number is
        recorded and later ones replay it on the same memory; a run without a number is not captured.

        Raises:
            AdapterpackError: see :meth:`call`.
        """
        with self._errors():
            self._ort.run_with_iobinding(binding, self._options(capture))

    def _options(self, capture: int | None) -> Any:
        if not self.resolved.captures:
            return None
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(_UNCAPTURED if capture is None else capture))
        return options

    def _errors(self) -> AbstractContextManager[None]:
        return library_errors(
            "onnxruntime",
            "ONNX Runtime could not run the graph on these inputs",
            where=self.path.parent,
            remedy="check shapes, lengths and ids against the model's config",
            kind=AdapterpackError,
        )
