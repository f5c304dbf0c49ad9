"""Traces the parts of a task's model with transformers.exporters (torch.export), one graph for each part."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from onnxscript.function_libs.torch_lib.registration import torch_op
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from transformers import PreTrainedModel
from transformers.exporters import OnnxConfig, OnnxExporter
from transformers.exporters import utils as exporter_utils
from transformers.pytorch_utils import Conv1D

from ...errors import Unsupported
from ...graph_passes import SWAPPED, PositionInputs, torch_scope, uses_of_modules
from ...onnx_graph import inputs_of
from ...runtime import positions
from ...slots import DEFAULT, LEAVES
from ...tasks import ANY_SIZE, Part, Sound, Task, sound_of
from ...torch_adapters.models.load import load_model, quiet_transformers
from ...torch_adapters.models.row_frequencies import hold_frequencies
from .example_inputs import example, images_of
from .torch_parts import PREFIX, TorchPart, part_class
from .unread_weights import Mapped, UnreadWeights, load_mapped

_SPECIALIZED = frozenset({"source", "height", "width"})
"""Axes that may have a fixed length in a model, as in Whisper's encoder, or where images are of one size."""
_LENGTHS = (7, 5, 4)
"""Lengths of the example rows; unlike any fixed axis of a model, so that the exporter does not confuse the
two.
"""
_VIRTUAL = 6
"""Virtual tokens of the example."""
_PLACE = re.compile(r'raised this error:\n\s*File "[^"]*?([^/"]+)", line (\d+), in .*\n\s*(.+)')
"""torch's words for the line of a model that it cannot trace."""


def trace_model(
    task: Task, folder: Path, dtype: str, prompted: bool, whole: bool = False
) -> dict[str, ir.Model]:
    """Loads a task's model in this float type and returns the graph of every part; ``prompted`` graphs have
    room for virtual tokens. A large model's graphs read their weights in the checkpoint's files, where they
    compute with the weights as they are stored; ``whole`` loads them first.
    """
    loaded = (
        load_mapped(task, folder, whole)
        if dtype == DEFAULT
        else Mapped(load_model(task, folder, dtype=dtype).eval(), False)
    )
    model = _with_turned_experts(_with_linear_layers(loaded.model))
    weights = UnreadWeights(model) if loaded.half else None
    hold_frequencies(model)
    graphs = _trace_parts(task, model, prompted)
    if weights is not None and not weights.fill(graphs.values()):
        del loaded, model, weights, graphs
        return trace_model(task, folder, dtype, prompted, whole=True)
    for graph in graphs.values():
        _note_swapped(graph, model)
    return graphs


def module_path(node: ir.Node) -> str | None:
    """Returns the path of the model's module that a node comes from."""
    path = torch_scope(node)
    return None if path is None else path.removeprefix(PREFIX)


def _trace_parts(task: Task, model: PreTrainedModel, prompted: bool) -> dict[str, ir.Model]:
    """Returns the graph of every part; the outputs of one part are the example inputs of the next.
    ``prompted`` graphs have room for virtual tokens.
    """
    batch = example(task, model.config, _LENGTHS, model=lambda: model)
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    tensors = {
        name: value.to(model.dtype) if value.is_floating_point() else value for name, value in tensors.items()
    }
    graphs = {}
    sound = sound_of(model)
    parts = [_with_axes(part, sound, model) for part in task.parts]
    for part in parts:
        form = part_class(part.form)(model)
        if "position_ids" in part.inputs:
            tensors["position_ids"] = torch.from_numpy(positions(tensors["attention_mask"].numpy()))
        tensors |= form.example_inputs(tensors)
        inputs = {name: tensors[name] for name in part.inputs if name in tensors}
        if prompted and part is parts[0]:
            width = model.get_input_embeddings().weight.shape[1]
            here = torch.ones(len(_LENGTHS), _VIRTUAL, dtype=model.dtype)
            inputs |= {
                "virtual": here[..., None].expand(-1, -1, width).clone(),
                "virtual_here": here,
                "virtual_cut": here.clone(),
            }
        with torch.no_grad():
            outputs = form(**inputs, **({"past_key_values": []} if "past_key_values" in part.inputs else {}))
        tensors |= {name: value for name, value in outputs.items() if "." not in name} | _families(outputs)
        tensors |= form.later_inputs(tensors)
        # later parts also see the virtual tokens in its output
        if prompted and "attention_mask" in tensors and part is parts[0]:
            tensors["attention_mask"] = torch.nn.functional.pad(
                tensors["attention_mask"], (_VIRTUAL, 0), value=1
            )
        if "past_key_values" in part.inputs:
            # traces with a filled cache: an empty one would fix its length at 0
            inputs["past_key_values"] = tensors["present"]
        if "position_ids" in part.inputs:  # the tokens follow that many cached ones
            inputs["attention_mask"] = torch.cat([inputs["attention_mask"]] * 2, 1)
            inputs["position_ids"] = torch.from_numpy(positions(inputs["attention_mask"].numpy()))[
                :, -inputs["position_ids"].shape[1] :
            ]
        graphs[part.name] = _trace(
            form, part, {name: inputs[name] for name in (*part.inputs, *LEAVES) if name in inputs}
        )
    return graphs


def _with_axes(part: Part, sound: Sound | None, model: PreTrainedModel) -> Part:
    """Returns a part with the axes of what the model hears, and of images, which may all be of one size."""
    axes = {**part.axes, **({} if sound is None else {sound.name: sound.axes})}
    if "pixel_values" in part.inputs and part.form == "plain":
        free = axes.pop("pixel_values", None) is not None
        axes |= ANY_SIZE if images_of(model.config, free)[1] else {}
    return replace(part, axes=axes)


def _families(named: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Groups ``present.0.key`` and the like by layer; a layer that keeps nothing is empty."""
    layers_by_family: dict[str, list[dict[str, Any]]] = {}
    for name, value in named.items():
        if "." in name:
            family, number, kept = name.split(".")
            layers = layers_by_family.setdefault(family, [])
            layers += [{} for _ in range(int(number) + 1 - len(layers))]
            layers[int(number)][kept] = value.clone()
    return layers_by_family


def _trace(form: TorchPart, part: Part, inputs: dict[str, Any]) -> ir.Model:
    """Returns the graph of one part.

    Raises:
        Unsupported: what the model computes depends on its tokens.
    """
    _know_complex_axes()
    part = replace(part, axes={**part.axes, **form.axes})
    shapes = {name: _dynamic(part, name, value) for name, value in inputs.items()}
    with (
        _symbolic_lengths(form),
        warnings.catch_warnings(),
        _keep_types(),
        contextlib.redirect_stdout(io.StringIO()),
        quiet_transformers(),
        _quiet("torch.onnx"),
    ):
        warnings.simplefilter("ignore")
        try:
            graph = (
                OnnxExporter().export(form, inputs, OnnxConfig(dynamic=True, dynamic_shapes=shapes)).program
            )
        except GuardOnDataDependentSymNode as error:
            place = _PLACE.search(str(error))
            raise Unsupported(
                "the model's Python code branches on the values of tokens, as loops over experts do",
                where=f"{place[1]}, line {place[2]}" if place else type(form.inner).__name__,
                found=place[3] if place else str(error).partition("\n")[0],
                expected="the same computation for all tokens, as in a graph",
                remedy="run this model under torch",
            ) from error
    _name_axes(graph, part)
    _join_weights(graph)
    if form.goes_on and {"past_key_values", "position_ids"} <= inputs.keys():
        found = inputs_of(graph.graph)
        others = [found[name] for name in ("attention_mask", "position_ids") if name in found]
        caches = [value for value in found.values() if value.name.endswith((".key", ".value"))]
        _count_by(found["input_ids"], [*others, *caches])
        places = PositionInputs(graph, found["input_ids"], caches, None)
        places.follow_rows()
        if not form.counts:
            # such a model counts padding; a table that it indexes otherwise is for the proof to judge
            with contextlib.suppress(Unsupported):
                places.index_tables()
    return graph


def _join_weights(model: ir.Model) -> None:
    """Makes all uses of a module read one weight: the exporter folds its transposition at each use anew."""
    nodes = {node.name: node for node in model.graph}
    held = model.graph.initializers
    first: dict[str, str] = {}
    for site in uses_of_modules(model, module_path):
        shared = first.setdefault(site.path, site.weight)
        if site.kind == "linear" and shared != site.weight:
            one, other = (held[name].const_value.numpy() for name in (shared, site.weight))
            if np.array_equal(one, other):
                nodes[site.node].replace_input_with(1, held[shared])


def _count_by(ids: ir.Value, others: Iterable[ir.Value]) -> None:
    """Makes nodes that read an axis of ``ids`` from another input read it from ``ids``: torch reads a shared
    axis from any of its inputs, and the engine's graph has neither the mask nor, at times, the positions.
    """
    places = {str(axis): place for place, axis in enumerate(ids.shape)}
    for value in others:
        for node, _ in list(value.uses()):
            start, end = (node.attributes.get_int(name, 0) for name in ("start", "end"))
            if node.op_type == "Shape" and end == start + 1 and str(value.shape[start]) in places:
                place = places[str(value.shape[start])]
                node.replace_input_with(0, ids)
                for name, at in (("start", place), ("end", place + 1)):
                    node.attributes[name] = ir.AttrInt64(name, at)


@functools.cache
def _know_complex_axes() -> None:
    """Teaches torch's exporter, which holds complex numbers as pairs, how to unsqueeze them: it only handles
    real tensors.

    Rotations that multiply complex numbers (Llama 4) need it.
    """

    def unsqueeze(self, dim: int):  # type: ignore[no-untyped-def] # onnxscript knows its own annotations only
        return op.Unsqueeze(self, op.Constant(value_ints=[dim if dim >= 0 else dim + len(self.shape)]))

    torch_op("aten::unsqueeze", complex=True, trace_only=True)(unsqueeze)


@contextlib.contextmanager
def _symbolic_lengths(form: nn.Module) -> Iterator[None]:
    """Makes ``len`` of a tensor its first axis in the modules that define a model: Python's own returns a
    number, which would fix the batch (RT-DETR).
    """
    names = {type(module).__module__ for module in form.modules()}
    scopes = [vars(sys.modules[name]) for name in names if name.startswith("transformers.models.")]
    for scope in scopes:
        scope["len"] = lambda value: value.shape[0] if isinstance(value, Tensor) else len(value)
    try:
        yield
    finally:
        for scope in scopes:
            del scope["len"]


def _axes(part: Part, name: str) -> tuple[str | None, ...]:
    """Returns the names of an input's axes: a mask covers the tokens in a decoder's cache, or those of the
    encoder.
    """
    if name == "attention_mask" and "past_key_values" in part.inputs:
        return ("batch", "total" if "position_ids" in part.inputs else "source")
    return part.axes_of(name)


def _dynamic(part: Part, name: str, value: Tensor | list[dict[str, Tensor]]) -> Any:
    if isinstance(value, list):
        return [
            {kept: _dynamic(part, f"{name}.{number}.{kept}", tensor) for kept, tensor in layer.items()}
            for number, layer in enumerate(value)
        ]
    dims = torch.export.Dim
    return {
        axis: dims.AUTO if axis_name in _SPECIALIZED else dims.DYNAMIC
        for axis, axis_name in enumerate(_axes(part, name))
        if axis_name
    }


def _with_linear_layers(model: PreTrainedModel) -> PreTrainedModel:
    """Replaces GPT-2's ``Conv1D`` by equivalent linear layers: the forward of ``Conv1D`` flattens the batch,
    which a bank needs to keep.
    """
    for parent in list(model.modules()):
        for leaf, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                layer = nn.utils.skip_init(nn.Linear, child.nx, child.nf, dtype=child.weight.dtype)
                layer.weight = nn.Parameter(child.weight.detach().T.contiguous())
                layer.bias = child.bias
                setattr(parent, leaf, layer)
    return model


def _with_turned_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Stores each stack of experts ``[n, in, out]``, as the exporter's products read it, if its module asks
    ``is_transposed``: a transposition that the exporter folds gives a constant without the parameter's name.
    """
    for module in model.modules():
        chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
        if chosen in _ASKING and getattr(module, "is_transposed", None) is False:
            for _, stack in _stacks(module):
                stack.data = stack.data.mT.contiguous()
            module.is_transposed = True
    return model


_ASKING = frozenset({"grouped_mm", "batched_mm"})
"""The implementations of experts that ask ``is_transposed``."""


def _stacks(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Returns the parameters of a module itself that are stacks of matrices."""
    return [(leaf, value) for leaf, value in module.named_parameters(recurse=False) if value.ndim == 3]


def _note_swapped(graph: ir.Model, model: PreTrainedModel) -> None:
    """Notes at each stack whether its module does not say that it is ``[n, in, out]``: adapters then take it
    for ``[n, out, in]``.
    """
    for path, module in model.named_modules():
        for leaf, _ in [] if getattr(module, "is_transposed", False) else _stacks(module):
            if (held := graph.graph.initializers.get(f"{PREFIX}{path}.{leaf}")) is not None:
                held.metadata_props[SWAPPED] = "1"


def _name_axes(model: ir.Model, part: Part) -> None:
    """Replaces the exporter's symbols (``s43``), which may differ between inputs, by the names of the axes
    throughout.
    """
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for dim, name in zip(value.shape, _axes(part, value.name), strict=False):
            # skips sums of other symbols
            if name is not None and not isinstance(dim, int) and str(dim.value).isidentifier():
                names.setdefault(str(dim.value), name)
    # the symbols also occur within expressions such as ``s43 + s12``
    symbols = re.compile("|".join(rf"\b{symbol}\b" for symbol in names) or r"(?!)")
    for value in [
        *model.graph.inputs,
        *model.graph.outputs,
        *(out for node in model.graph for out in node.outputs),
    ]:
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    dim
                    if isinstance(dim, int) or dim.value is None
                    else symbols.sub(lambda match: names[match[0]], str(dim.value))
                    for dim in value.shape
                ]
            )


@contextlib.contextmanager
def _keep_types() -> Iterator[None]:
    """Keeps the exporter from casting every input to the model's float type: recurrent states are float32 in
    a model of half precision, too.
    """
    cast = exporter_utils.cast_leaf_tensors
    exporter_utils.cast_leaf_tensors = lambda tensors, dtype, device: tensors
    try:
        yield
    finally:
        exporter_utils.cast_leaf_tensors = cast


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
