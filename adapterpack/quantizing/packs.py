"""Stores the tensors of a pack as small integers, and measures the error that this makes in the change."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace

from ..adapter_methods import fold, is_stacked, row_blocks
from ..errors import NothingToDo, UnknownName, Unsupported, nearest
from ..manifest.entries import entry_of
from ..pack.lineage import descended
from ..pack.pack import Adapter, Pack, sealed


class Scheme(NamedTuple):
    """How one matrix ``[rows, ...]`` is stored: ``encode`` gives the integers and the float32 scales ``[rows, 1, ...]``.

    What is read back is ``integers * scales``. ``feature`` is what a reader must understand.
    """

    name: str
    summary: str
    feature: str
    encode: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def int8_rows(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 by row: ``s = max|x| / 127``, ``q = round(x / s)``; then ``|x - q s| <= s / 2`` for every entry.

    The quotient is taken in float64 with the very scale that is stored. A row of zeros, or one too small for a float32 scale, has the
    smallest normal scale.

    Example:
        >>> int8_rows(np.array([[0.5, -1.27], [0.0, 0.0]]))[0]
        array([[  50, -127],
               [   0,    0]], dtype=int8)
    """
    exact = value.astype(np.float64)
    peak = np.abs(exact).max(axis=tuple(range(1, exact.ndim)), keepdims=True)
    scales = np.maximum(peak / 127, np.finfo(np.float32).tiny).astype(np.float32)
    return np.clip(np.rint(exact / scales), -127, 127).astype(np.int8), scales


_SCHEMES = (Scheme("int8", "symmetric int8 with one float32 scale for every row of every matrix", "int8", int8_rows),)


def schemes() -> dict[str, Scheme]:
    """The schemes for packs by name.

    Example:
        >>> list(schemes())
        ['int8']
    """
    return {scheme.name: scheme for scheme in _SCHEMES}


def quantize_pack(pack: Pack, *, scheme: str = "int8", name: str | None = None) -> Pack:
    """The pack with the matrices of its adapters quantized; modules that were trained whole stay as they are.

    ``manifest.quantization`` says the error in the change, over all sites: ``max_error``, the largest of any entry, and
    ``relative_error``, in the Frobenius norm. The name is the pack's with the scheme behind it, unless one is given.

    Raises:
        UnknownName: there is no such scheme.
        NothingToDo: the pack is quantized already, or holds no matrix to quantize.
        Unsupported: the method's tensors must stay float.

    Example:
        >>> quantize_pack(pack).manifest.quantization["relative_error"] < 0.01  # doctest: +SKIP
        True
    """
    known = schemes()
    if scheme not in known:
        raise UnknownName("unknown scheme for packs", found=repr(scheme), remedy=nearest(scheme, known))
    chosen, manifest = known[scheme], pack.manifest
    if manifest.quantization is not None:
        raise NothingToDo(f"the pack is quantized already, as {manifest.quantization['scheme']}", where=f"pack '{pack.name}'",
                          remedy="quantize the pack that it was made from")
    for method in pack.methods:
        if not method.traits.quantizable or not method.traits.additive or method.traits.reads_weight:
            raise Unsupported(f"tensors of the method {method.name} stay float: the error in the change could not be bounded or measured",
                              where=f"pack '{pack.name}'", remedy="keep this pack as it is")
    if stacks := [group.path for group in manifest.groups if is_stacked(group.kind)]:
        raise Unsupported("the parameters of a stack of matrices stay float", where=f"pack '{pack.name}', {stacks[0]}",
                          remedy="keep this pack as it is")
    adapters = {group.path for group in manifest.groups if group.role == "adapter"}
    tensors, entries = dict(pack.tensors), dict(manifest.tensors)
    for key, entry in manifest.tensors.items():
        if entry.group in adapters and len(entry.shape) >= 2:
            integers, scales = chosen.encode(pack.tensors[key])
            tensors[key], tensors[f"{key}.scales"] = integers, scales
            entries[key] = entry_of(integers, entry.group, entry.param, f"{key}.scales")
            entries[f"{key}.scales"] = entry_of(scales, entry.group, f"{entry.param}.scales")
    if len(entries) == len(manifest.tensors):
        raise NothingToDo("the pack holds no matrix to quantize", where=f"pack '{pack.name}'", remedy="keep this pack as it is")
    draft = replace(
        manifest,
        pack=replace(manifest.pack, name=name or f"{pack.name[: 127 - len(scheme)]}-{scheme}"),
        tensors=dict(sorted(entries.items())),
        files=(),
        lineage=descended("quantize", [pack], {"scheme": scheme}),
        must_understand=tuple(sorted({*manifest.must_understand, chosen.feature})),
        canary=None,  # its logits were those of the float pack
        metrics=(),  # so were its scores
    )
    largest, relative = change_error(pack, Pack(draft, tensors))
    quantization = {"scheme": scheme, "max_error": largest, "relative_error": relative}
    return sealed(replace(draft, quantization=quantization), tensors)


def change_error(exact: Pack, other: Pack) -> tuple[float, float]:
    """The largest error of any entry, and the relative Frobenius error, of one pack's change against another's with the same sites.

    Computed in float64, a block of rows at a time.
    """
    largest = squares = total = 0.0
    for one, two in zip(exact.adapters(), other.adapters(), strict=True):
        rows, columns = one.site.out_features, one.site.in_features
        blocks = row_blocks(rows, columns) if one.method.traits.row_separable else iter((slice(0, rows),))
        one, two = _wide(one), _wide(two)  # noqa: PLW2901 - the same sites, in float64
        for block in blocks:
            change = _change(one, block)
            error = _change(two, block) - change
            largest = max(largest, float(np.abs(error).max()))
            squares += float(np.vdot(error, error))
            total += float(np.vdot(change, change))
    return largest, math.sqrt(squares / total) if total else 0.0


def _wide(adapter: Adapter) -> Adapter:
    params: Mapping[str, np.ndarray] = adapter.params
    return adapter._replace(params={name: value.astype(np.float64) for name, value in params.items()})


def _change(adapter: Adapter, block: slice) -> np.ndarray:
    """The rows of an additive method's change: what it makes of a weight of zeros."""
    nothing = np.zeros((block.stop - block.start, adapter.site.in_features))
    changed: np.ndarray = fold(adapter.method, adapter.config, adapter.params, adapter.site, nothing, None, block)[0]
    return changed
