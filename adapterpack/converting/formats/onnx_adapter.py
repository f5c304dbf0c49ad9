"""Reads and writes ONNX Runtime's ``.onnx_adapter`` for exported graphs: ``<module path>.down`` [in, r] and
``.up`` [r, out], which include the scale.

A fully trained module has ``head`` [in, out] and ``head_bias`` [out]. A file does not state its graph: a file
whose parameters have other names is for another tool's graph, and is refused. Files of ``olive
convert-adapters``, for onnxruntime-genai, have the same factors as ``lora_A.weight`` and ``lora_B.weight``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from ...adapter_methods import LAYOUTS, Arrays
from ...errors import FormatError, Unsupported
from ...pack import Pack
from ...runtime.adapters import write_adapter_file
from ...slots import Values, fit, pack_values, split_slot
from ...slots.values import HEAD_FIELDS
from .. import (
    FORMATS,
    BaseModel,
    ConversionSource,
    Format,
    Notes,
    Reading,
    SiteFactors,
    bind_to_base,
    dequantize,
    first_bytes,
    list_first,
    lora_pack,
    require_pairs,
)
from ..flatbuffer import MAGIC, read_parameters

_PAIR = ("down", "up")
_NOT_LORA = ("scale", "shift", "pre")
"""Fields of other methods, whose parameters cannot be derived from the normal form."""


def _write(pack: Pack, out: Path, base: BaseModel | None) -> Notes:
    values, notes = _values(pack)
    write_adapter_file(out, values)
    return notes


def _write_for(pack: Pack, out: Path, graph: Path) -> Notes:
    values, notes = _values(pack)
    fitted, more = fit(values, graph)
    write_adapter_file(out, fitted)
    return notes + more


def _values(pack: Pack) -> tuple[Values, Notes]:
    """Returns a pack's values by slot, and notes on what the file cannot hold."""
    if pack.acts is not None:
        raise Unsupported(
            "the format cannot say that an adapter acts at some positions of a row only",
            where=pack.where,
            found=str(pack.acts)[:80],
            remedy="keep it as a pack, or export a bundle",
        )
    unsupported = next(
        (
            group
            for group in pack.manifest.adapter_groups
            if group.kind in LAYOUTS and not LAYOUTS[group.kind].linear
        ),
        None,
    )
    if unsupported is not None:
        raise Unsupported(
            "the format does not say of what kind a layer is, and would be read back as one of linear layers",
            where=f"pack '{pack.name}', {unsupported.path}",
            found=unsupported.kind,
            remedy="keep it as a pack, or export a bundle",
        )
    plain, notes = dequantize(pack)
    # in float64, so that factor and scale are multiplied first and rounded once to the slot's float32
    values = pack_values(
        dataclasses.replace(
            plain, tensors={name: value.astype(np.float64) for name, value in plain.tensors.items()}
        )
    )
    if not values:
        raise Unsupported(
            "the format holds inputs of a graph, and this adapter has none",
            where=pack.where,
            found=pack.method.name,
            remedy="keep it as a pack: sessions put it into the cache that a row begins with",
        )
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise Unsupported(
                "a value leaves the range of float32 with its scale", where=pack.where, found=name
            )
    if labels := pack.manifest.task.labels:
        notes += (f"the format has no place for label names: {len(labels)} are left out",)
    return values, notes


def _read(source: ConversionSource) -> Reading:
    modules: dict[str, Arrays] = {}
    parameters = read_parameters(source.path)
    for name, value in parameters.items():
        path, field = split_slot(name)
        if field in _NOT_LORA and path:
            raise Unsupported(
                "a slot of a method that its slots do not identify",
                where=source.path,
                found=name,
                expected="down and up, or head and head_bias",
                remedy="convert the pack that the file was made from",
            )
        if not path or field not in (*_PAIR, *HEAD_FIELDS.values()):
            raise Unsupported(
                "the file is for a graph of another tool: its parameters are no slots",
                where=source.path,
                found=name,
                expected="<module path>.down and .up, or .head and .head_bias",
                remedy="convert the adapter that it was made from",
            )
        modules.setdefault(path, {})[field] = value
    low_rank = {path: fields for path, fields in modules.items() if set(fields) & set(_PAIR)}
    heads = {path: fields for path, fields in modules.items() if path not in low_rank}
    if mixed := sorted(path for path, fields in low_rank.items() if set(fields) - set(_PAIR)):
        raise FormatError(
            "a module with both low-rank and whole slots", where=source.path, found=list_first(mixed)
        )
    require_pairs(low_rank, _PAIR, source.path)
    require_pairs(heads, ("head",), source.path)
    if empty := sorted(
        path for path, fields in low_rank.items() if 0 in (*fields["down"].shape, *fields["up"].shape)
    ):
        raise FormatError("a module whose slots are empty", where=source.path, found=list_first(empty))
    sites = {
        path: SiteFactors(path, fields["down"].T, fields["up"].T, 1.0) for path, fields in low_rank.items()
    }
    full = {path: _head(path, fields, source) for path, fields in sorted(heads.items())}
    pack = lora_pack(source, sites, "onnx_adapter", full=full)
    notes: Notes = ("the scale lies inside the factors: alpha = r, the scale is one",) if sites else ()
    if any(".lora_A." in name and not name.endswith(".lora_A.weight") for name in parameters):
        notes += ("modules have the names that they have in the graph of the file",)
    if full and source.base is None:
        notes += (f"trained whole: {list_first(list(full))}; the file names no labels",)
    return Reading(bind_to_base(pack, source.base), notes)


def _head(path: str, fields: Arrays, source: ConversionSource) -> Arrays:
    """Returns the weight and bias of a fully trained linear layer; a bias that the file lacks is zero, as in
    the graph.
    """
    weight = fields["head"]
    bias = fields.get("head_bias")
    if weight.ndim != 2 or 0 in weight.shape or (bias is not None and bias.shape != weight.shape[1:]):
        raise FormatError(
            "the slots of a module that was trained whole do not fit each other",
            where=f"{source.path}, {path}",
            expected="head [in, out] and head_bias [out]",
            found=f"{weight.shape}, {None if bias is None else bias.shape}",
        )
    return {"weight": np.ascontiguousarray(weight.T)} | ({} if bias is None else {"bias": bias})


ONNX_ADAPTER = FORMATS.register(
    Format(
        "onnx_adapter",
        "ONNX Runtime's adapter with the slots of our graphs, one file",
        False,
        lambda path: first_bytes(path, 8)[4:] == MAGIC,
        _read,
        _write,
        suffix=".onnx_adapter",
        write_for=_write_for,
    )
)
