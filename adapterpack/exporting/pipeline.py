"""Exports a base and packs to a bundle, or adds another target's files to a finished bundle."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

from ..bundle import Bundle, bundle_in, read_bundle, refuse_other_files, require_files
from ..errors import ConfigError, Unsupported
from ..extras import needed_by
from ..graph_passes import default_slot_name
from ..io import copy_folder, output_folder, refuse_existing
from ..merging.base_kind import is_graph
from ..pack import SIGNATURE
from ..tasks import get_task
from .arguments import ExportRequest, prepare, require_split
from .targets import TARGETS

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
    capacity of a bank. Graphs are compared with the torch model, base and adapters, on a ragged padded
    batch, before they are published. ``dtype`` is the float type that graph and slots are made in,
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
    holds the bundle), ``web`` (a site for browsers, whose data files have at most ``split`` bytes) or
    ``model-package`` (ONNX Runtime's, in which providers share the bundle).
    ``base`` may be a finished bundle, whose graphs the target takes as they are, or an ONNX or GGUF file that
    another tool made of ``checkpoint``: its weights are found there by their bytes. ``frontend`` is what
    makes the graph, by default the first whose graph agrees with the model. ``proof`` says how much is
    proved: ``full``, every row and adapter on the whole model; ``layers``, each kind of layer at full width,
    the whole on short rows, and at most four adapters; or ``none``. The default is ``full`` below 1 GB of
    float32 weights, and ``layers`` above. ``pooling`` (``mean``, ``cls`` or ``last``) is recorded for tasks
    that give hidden states; by default what the base says.
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
    refuse_existing(request.out)
    if is_graph(request.base) and Path(request.base).is_dir():
        return retarget(request)
    job = prepare(request)
    with needed_by("adapterpack.export", "export"):
        from .build import build_bundle  # noqa: PLC0415 - torch and transformers
    return build_bundle(job)


ORDINARY = "ort"


_TAKEN = frozenset({"base", "out", "target", "split", "progress"})
"""The fields of a request that apply to a finished bundle."""
_OPTIONS = {"in_place": "static_cache", "checkpoint": "base"}
"""Fields whose command-line option has another name."""


def retarget(request: ExportRequest) -> Bundle:
    """Writes the finished bundle that a request names as ``base`` for another target.

    Raises:
        ConfigError: the request sets fields other than the target's.
        FormatError: a file of the bundle was altered, is missing, or is not in its manifest.
        Unsupported: the target cannot run the bundle.
    """
    source = request.base
    target = TARGETS[request.target]
    require_split(target, request.split)
    if target.name == ORDINARY:
        raise ConfigError(
            "a bundle is exported already",
            where=source,
            remedy="name the checkpoint, or the .onnx file with --base CHECKPOINT",
        )
    chosen = [
        _OPTIONS.get(field.name, field.name)
        for field in dataclasses.fields(request)
        if field.name not in _TAKEN and getattr(request, field.name) not in (field.default, [])
    ]
    if chosen:
        raise ConfigError(
            "a finished bundle is written for a target as it is",
            where=source,
            found=", ".join(chosen),
            remedy=(
                "leave these out, or export from the checkpoint; adapterpack quantize makes bundles smaller"
            ),
        )
    place = bundle_in(source)
    bundle = read_bundle(place)
    if bundle.target != ORDINARY or target.slot_name is not default_slot_name:
        raise Unsupported(
            "this bundle was made for another product",
            where=source,
            found=bundle.target,
            expected=target.name,
            remedy=f"export the checkpoint with --target {target.name}",
        )
    target.require(bundle.mode, get_task(bundle.task))
    require_files(place, bundle, "cached")
    refuse_other_files(place, bundle)
    with output_folder(request.out) as root:
        folder = root / target.place(bundle)
        copy_folder(place, folder)
        (folder / SIGNATURE).unlink(missing_ok=True)  # the signature covers the old bytes
        target.write(folder, bundle)
        dataclasses.replace(bundle, target=target.name).write(folder)
        if target.finish is not None:
            target.finish(folder, request.split)
    return read_bundle(bundle_in(request.out))
