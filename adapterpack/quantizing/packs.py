"""Quantizes the matrices of a pack to codes of few bits, and measures the resulting error of the change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace

from ..adapter_methods import fold, is_stacked, row_blocks
from ..composing.resize import resize
from ..errors import ConfigError, NothingToDo, Unsupported
from ..manifest import PACKED, Packed, entry_of
from ..pack import Adapter, Pack, descend, encode, seal
from .pack_scheme import PACK_SCHEMES, PackScheme


def schemes() -> dict[str, PackScheme]:
    """Returns the schemes for packs by name.

    Example:
        >>> list(schemes())
        ['fp8', 'int4', 'int8', 'mixed']
    """
    return dict(PACK_SCHEMES)


def quantize_pack(
    pack: Pack, *, scheme: str = "int8", rank_budget: float | None = None, name: str | None = None
) -> Pack:
    """Returns the pack with the matrices of its adapters quantized; fully trained modules stay as they are.

    ``rank_budget`` first reduces the rank of each site as far as the change there stays within that relative
    error. The result is then a LoRA, as with a scheme that decomposes changes.

    ``manifest.quantization`` records the error of the change over all sites: ``max_error``, the largest of
    any entry, and ``relative_error``, in the Frobenius norm, which ``sites`` has for each site. The default
    name is the pack's name followed by the scheme.

    Raises:
        UnknownName: there is no such scheme.
        ConfigError: ``rank_budget`` is not a relative error.
        NothingToDo: the pack is quantized already, or holds no matrix to quantize.
        Unsupported: the method's tensors must stay float, or its change has no factors where these are
            needed.

    Example:
        >>> quantize_pack(pack).manifest.quantization["relative_error"] < 0.01  # doctest: +SKIP
        True
    """
    chosen = PACK_SCHEMES[scheme]
    _require_quantizable(pack)
    floats = (
        pack
        if rank_budget is None and not chosen.decomposed
        else resize(pack, energy=_energy(rank_budget), name=pack.name)
    )
    manifest = floats.manifest
    adapters = {group.path for group in manifest.adapter_groups}
    tensors = dict(floats.tensors)
    entries = dict(manifest.tensors)
    packed = {}
    for key, entry in manifest.tensors.items():
        if entry.group in adapters and len(entry.shape) >= 2:
            tensors[key], packed[key] = _encode(floats.tensors[key], chosen)
            entries[key] = entry_of(tensors[key], entry.group, entry.param)
    if not packed:
        raise NothingToDo(
            "the pack holds no matrix to quantize",
            where=pack.where,
            remedy="keep this pack as it is",
        )
    settings = {"scheme": scheme, **({} if rank_budget is None else {"rank_budget": rank_budget})}
    draft = replace(
        manifest,
        pack=replace(pack.manifest.pack, name=name or f"{pack.name[: 127 - len(scheme)]}-{scheme}"),
        tensors=entries,
        files=(),
        lineage=descend("quantize", [pack], settings),
        must_understand=tuple(sorted({*manifest.must_understand, PACKED})),
        canary=None,  # its logits were those of the float pack
        metrics=(),  # so were its scores
        quantization={"scheme": scheme, "max_error": 0.0, "relative_error": 0.0, "packed": packed},
    )
    sites = dict(site_errors(pack, Pack(draft, tensors)))
    error = Error.of(sites.values())
    quantization = {
        "scheme": scheme,
        "max_error": error.largest,
        "relative_error": error.relative,
        "sites": {path: one.relative for path, one in sites.items()},
        "packed": packed,
    }
    return seal(replace(draft, quantization=quantization), tensors)


def _require_quantizable(pack: Pack) -> None:
    manifest = pack.manifest
    if manifest.quantization is not None:
        raise NothingToDo(
            f"the pack is quantized already, as {manifest.quantization['scheme']}",
            where=pack.where,
            remedy="quantize the pack that it was made from",
        )
    for method in pack.methods:
        if not method.traits.quantizable or not method.traits.additive or method.traits.reads_weight:
            raise Unsupported(
                f"tensors of the method {method.name} stay float: the error in the change could not be "
                "bounded or measured",
                where=pack.where,
                remedy="keep this pack as it is",
            )
    if stacks := [group.path for group in manifest.groups if is_stacked(group.kind)]:
        raise Unsupported(
            "the parameters of a stack of matrices stay float",
            where=f"pack '{pack.name}', {stacks[0]}",
            remedy="keep this pack as it is",
        )


def _energy(rank_budget: float | None) -> float:
    """Returns the share of the squared singular values that must stay for that relative error."""
    if rank_budget is None:
        return 1.0
    if not 0 < rank_budget < 1:
        raise ConfigError(
            "a rank budget is the relative error that cutting ranks may make",
            where="rank_budget",
            expected="above 0, below 1",
            found=rank_budget,
            remedy="give an error such as 0.05",
        )
    return 1 - rank_budget**2


def _encode(value: np.ndarray, scheme: PackScheme) -> tuple[np.ndarray, Packed]:
    """Encodes a tensor ``[rows, ...]`` by a scheme; its directions are its rows or its columns, whichever are
    fewer.
    """
    matrix = value.reshape(len(value), -1)
    axis = int(matrix.shape[1] < matrix.shape[0])
    norms = np.linalg.norm(matrix.astype(np.float64), axis=1 - axis)
    return encode(value, scheme.runs(norms), axis, scheme.group)


class Error(NamedTuple):
    """The difference between two changes: its largest entry, its squared Frobenius norm, and that of the
    exact change.
    """

    largest: float
    squares: float
    total: float

    @property
    def relative(self) -> float:
        """The relative Frobenius error; 0 for a change that is zero."""
        return math.sqrt(self.squares / self.total) if self.total else 0.0

    @classmethod
    def of(cls, errors: Iterable[Error]) -> Error:
        """Combines the errors of several changes."""
        parts = list(errors)
        return cls(
            max((one.largest for one in parts), default=0.0),
            sum(one.squares for one in parts),
            sum(one.total for one in parts),
        )


def site_errors(exact: Pack, other: Pack) -> Iterator[tuple[str, Error]]:
    """Yields for each site the difference between the changes of two packs with the same sites.

    Computed in float64, a block of rows at a time.
    """
    found = {adapter.site.path: adapter for adapter in other.adapters()}
    for one in exact.adapters():
        two = found[one.site.path]
        (largest, squares, total) = (0.0, 0.0, 0.0)
        rows, columns = one.site.out_features, one.site.in_features
        separable = one.method.traits.row_separable and two.method.traits.row_separable
        wide, other_wide = _wide(one), _wide(two)
        for block in row_blocks(rows, columns) if separable else iter((slice(0, rows),)):
            change = _change(wide, block)
            error = _change(other_wide, block) - change
            largest = max(largest, float(np.abs(error).max()))
            squares += float(np.vdot(error, error))
            total += float(np.vdot(change, change))
        yield one.site.path, Error(largest, squares, total)


def _wide(adapter: Adapter) -> Adapter:
    params = adapter.params
    return adapter._replace(params={name: value.astype(np.float64) for name, value in params.items()})


def _change(adapter: Adapter, block: slice) -> np.ndarray:
    """Returns these rows of an additive method's change, by folding it into a weight of zeros."""
    nothing = np.zeros((block.stop - block.start, adapter.site.in_features))
    changed: np.ndarray = fold(
        adapter.method, adapter.config, adapter.params, adapter.site, nothing, None, block
    )[0]
    return changed
