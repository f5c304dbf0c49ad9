"""Exports a base and packs to a bundle, or adds another target's files to a finished bundle."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

from ..bundle.manifest import Bundle
from ..extras import needed_by
from ..io.atomic import refuse_existing
from ..merging.base_kind import is_graph
from .arguments import prepare
from .request import ExportRequest
from .retarget import retarget

_Call = ParamSpec("_Call")


def _takes_fields(
    kind: Callable[_Call, ExportRequest],
) -> Callable[[Callable[[ExportRequest], Bundle]], Callable[_Call, Bundle]]:
    """Lets callers pass a request's fields as keyword arguments instead of a request; the signature shows
    them.
    """

    def decorate(function: Callable[[ExportRequest], Bundle]) -> Callable[_Call, Bundle]:
        @functools.wraps(function)
        def call(*args: _Call.args, **kwargs: _Call.kwargs) -> Bundle:
            return function(kind(*args, **kwargs))

        fields = inspect.signature(kind)
        call.__signature__ = fields.replace(return_annotation="Bundle")  # type: ignore[attr-defined]
        return call

    return decorate


@_takes_fields(ExportRequest)
def export(request: ExportRequest) -> Bundle:
    """Writes a bundle: an ONNX graph of ``base`` with ``packs`` in it, its site map, the packs and the
    tokenizer.

    ``mode``: ``folded`` (weights changed), ``inputs`` (ONNX Runtime's optional inputs, one adapter a run) or
    ``bank`` (another adapter for every row). ``slots`` counts slot 0, the base; it and ``max_rank`` are the
    capacity of a bank. Every graph is compared with the torch model, base and each adapter, on a ragged
    padded batch, before it is published. ``dtype`` is the float type that graph and slots are made in,
    ``float32`` or ``float16``. ``quantize`` is the scheme of a quantized graph; ``algorithm``,
    ``calibration``, ``compensate`` and the like are as of :func:`adapterpack.quantize` for a bundle;
    ``as-trained`` has the codes that the base had while the packs were trained (QLoRA). The graph of a
    quantized base (NF4, GPTQ, AWQ, compressed-tensors ...) holds the base's own codes and scales wherever an
    operator can, and floats of the same values where none can; with ``dequantize``, or a ``dtype`` other than
    float32, it is all floats. Its manifest says what became of the weights of each format. A decoder gets the
    graph that the engine, ``serve`` and ``generate`` run, with a static cache on the same weights, where its
    family has one; ``in_place`` True insists on it, False leaves it out. ``cache`` ``int8`` keeps its keys
    and values in eight bits, and records by how much that moves its logits. ``target`` says who serves it:
    ``ort``, ``ort-genai`` (the folder that onnxruntime-genai loads), ``triton`` (a model repository, which
    holds the bundle) or ``web`` (a site for browsers, whose data files have at most ``split`` bytes).
    ``base`` may be a finished bundle, whose graphs the target takes as they are, or an ONNX or GGUF file that
    another tool made of ``checkpoint``: its weights are found there by their bytes. ``frontend`` is what
    makes the graph, by default the first whose graph agrees with the model. ``pooling`` (``mean``, ``cls`` or
    ``last``) is recorded for tasks that give hidden states; by default what the base says.
    ``allow_structural`` accepts a base that has the names, dtypes and shapes of the packs', whatever its
    weights.

    Raises:
        BaseMismatch: a pack belongs to another base.
        ParityError: no frontend made a graph that agrees with the model.
        Unsupported: the mode cannot carry one of the packs, the target cannot run it, or the base is a model
            for another task.
        OutputExists: ``out`` is taken.

    Example:
        >>> export("MiniLM", ["packs/tickets"], "bundle", mode="bank")  # doctest: +SKIP
    """
    refuse_existing(Path(request.out))
    if is_graph(request.base) and Path(request.base).is_dir():
        return retarget(request)
    job = prepare(request)
    with needed_by("adapterpack.export", "export"):
        from .build import build_bundle  # noqa: PLC0415 - torch and transformers
    return build_bundle(job)
