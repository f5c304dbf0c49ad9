"""Decides and checks what a merge will change, before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ...adapter_methods import CONVOLUTIONS, LAYOUTS, matrix_shape, unfoldable
from ...base import Verdict, WeightStorage, module_parameter
from ...base.codecs.plain import plain_writer
from ...base.codecs.storage import Writer
from ...errors import NothingToDo, Unsupported
from ...manifest import Group
from ...pack import Pack, match_layers
from ..fold import Contribution, bind, changes_nothing, slice_of
from .base_model import MergeBase
from .full_modules import FullModules, resolve
from .tied_weights import split_tied
from .vocabulary import extended_table


@dataclass(frozen=True)
class MergeTarget:
    """One weight of the base and what changes it; ``bias`` is the tensor of its bias, if the fold changes
    that too.

    ``base_bias`` are the values of its bias, for methods that read them. ``kind`` is the kind of layer,
    ``storage`` how it is stored.
    """

    weight: str
    bias: str | None
    contributions: tuple[Contribution, ...]
    storage: WeightStorage
    base_bias: np.ndarray | None = None
    kind: str = "linear"


@dataclass(frozen=True)
class MergePlan:
    """The targets by weight tensor, the fully trained modules, and for each pack the verdict on its base.

    ``copies`` are additional tensors of the output: new name -> the tensor of the base that it starts from.
    """

    targets: Mapping[str, MergeTarget]
    full_modules: FullModules
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)


def make(
    base: MergeBase,
    packs: Sequence[Pack],
    weights: Sequence[float],
    allow_structural: bool = False,
    *,
    dtype: str | None = None,
    full: bool = True,
    stochastic: bool = False,
    untie: bool = False,
) -> MergePlan:
    """Returns the plan of a merge of ``packs``, each with its weight, into ``base``, to be written in
    ``dtype`` (None: each tensor keeps its own).

    With ``full`` every byte of the base is compared with what the packs name; without it bytes are read only
    where samples do not decide. With ``stochastic`` changed weights are rounded stochastically. With
    ``untie`` a tied output head becomes a separate tensor.

    Raises:
        BaseMismatch: a pack was made for another base.
        SiteNotFound: the base lacks a site.
        Unsupported: the fold would not be exact; says why and what to do instead.
        NothingToDo: no weight would change.
    """
    for pack in packs:  # checks all headers before reading any bytes, so that a wrong pack fails early
        base.require(pack, content=False, allow_structural=True)
    verdicts = tuple(
        base.require(pack, content=True if full else None, allow_structural=allow_structural)
        for pack in packs
    )
    packs = [match_layers(pack, base) for pack in packs]
    contributions: dict[str, list[Contribution]] = {}
    tables: dict[str, tuple[Contribution, np.ndarray]] = {}
    for pack, weight in zip(packs, weights, strict=True):
        for name, contribution in _contributions(base, pack, weight):
            if (table := extended_table(base, name, contribution)) is None:
                contributions.setdefault(name, []).append(contribution)
            else:
                _require_alone(name, [*(tables[name][:1] if name in tables else ()), contribution])
                tables[name] = contribution, table
    contributions, copies = split_tied(base, contributions, {pack.name: pack for pack in packs}, untie)
    for name in contributions.keys() - copies.keys():
        _require_one_module(name, contributions[name])
    full_modules = resolve(base, packs, untie, {name: table for name, (_, table) in tables.items()})
    copies = {**copies, **full_modules.copies}
    for name in sorted(full_modules.replaced.keys() & base.quantized.keys() if dtype is None else ()):
        raise Unsupported(
            "a module that was trained whole would take the place of a quantized weight",
            where=f"{base.folder}, {name}",
            found=base.quantized[name].codec,
            remedy=_DEQUANTIZE,
        )
    for name in sorted(contributions.keys() & full_modules.replaced.keys()):
        raise Unsupported(
            "one pack puts a tensor in the place of this one, another adapts it",
            where=name,
            remedy="merge only one of the two",
        )
    targets = {
        name: target
        for name, of_tensor in contributions.items()
        if (target := _target(base, name, of_tensor, dtype, copies.get(name))) is not None
    }
    _require_apart(targets)
    for target in targets.values():
        _require_writable(base, target, stochastic)
    if not targets and not full_modules.replaced and not full_modules.added:
        raise NothingToDo(
            "the packs would change nothing",
            where=", ".join(pack.name for pack in packs) or "no packs were given",
            remedy="train the adapter first, or give it a weight other than zero",
        )
    return MergePlan(targets, full_modules, verdicts, base.notes, copies)


_DEQUANTIZE = "merge with --dtype float16, which writes the base dequantized"


def _require_apart(targets: Mapping[str, MergeTarget]) -> None:
    """Checks that no stored tensor is written for two weights, such as an expert and the stack that contains
    it.
    """
    owners: dict[str, str] = {}
    for name, target in targets.items():
        for part in target.storage.writer.parts.values():
            if (other := owners.setdefault(part, name)) != name:
                raise Unsupported(
                    "one pack adapts fused experts, another one of them",
                    where=part,
                    found=f"{other} and {name}",
                    remedy="merge one of them, and the other into the result",
                )


def _require_writable(base: MergeBase, target: MergeTarget, stochastic: bool) -> None:
    """Checks that the changed weight can be written in the output's format."""
    writer = target.storage.writer
    where = f"{base.folder}, {target.weight}"
    if writer.read_only_reason is not None:
        raise Unsupported(
            f"this form of {writer.label} can be read and not written: {writer.read_only_reason}",
            where=where,
            remedy=_DEQUANTIZE,
        )
    if stochastic and not writer.stochastic:
        raise Unsupported(
            f"codes of {writer.label} are those with the least error, with new scales where these serve "
            "better: they are not rounded by chance",
            where=where,
            found="stochastic rounding",
            remedy=f"leave it out, or {_DEQUANTIZE}",
        )


def _contributions(base: MergeBase, pack: Pack, weight: float) -> Iterator[tuple[str, Contribution]]:
    owner = pack.where
    for method in pack.methods:
        if method.kind != "weight":
            raise Unsupported(
                f"method '{method.name}' does not act on weights, so it cannot be folded into them",
                where=owner,
                remedy="keep the adapter unmerged",
            )
        if reason := method.reason_against("fold"):
            raise Unsupported(
                reason,
                where=owner,
                remedy="keep the adapter unmerged: attach it, or export with --mode bank",
            )
    if pack.acts is not None:
        raise Unsupported(
            "this adapter acts at some positions of a row only, which no weight can tell apart",
            where=owner,
            found=f"{pack.method.name}, {pack.acts}"[:200],
            remedy="keep it unmerged, or export a bank or inputs",
        )
    for method in pack.methods:
        if weight != 1 and not method.traits.additive:
            raise Unsupported(
                f"method '{method.name}' is not additive, so a weight on it has no meaning",
                where=owner,
                expected="weight 1",
                found=f"weight {weight:g}",
                remedy="leave its weight at 1",
            )
    for group in pack.groups:
        if group.role == "adapter" and (reason := unfoldable(group.kind)):
            raise Unsupported(
                reason,
                where=f"{owner}, {group.path}",
                found=group.kind,
                remedy="keep the adapter unmerged: attach it",
            )
    for adapter in pack.adapters(partial(_shape, base, owner)):
        name = base.require_weight(adapter.site.path, adapter.weight)
        yield name, Contribution(pack.name, adapter.method, adapter, weight)


def _shape(base: MergeBase, owner: str, group: Group) -> tuple[int, ...]:
    """Returns the shape ``[out, in]`` of the weight that a group changes, followed by a convolution's
    kernel.
    """
    if group.kind not in LAYOUTS:
        raise Unsupported(
            f"sites of kind '{group.kind}' cannot be folded",
            where=f"{owner}, {group.path}",
            expected=", ".join(LAYOUTS),
            remedy="keep the adapter unmerged",
        )
    stored = base.tensors[base.require_weight(group.path, group.weight)].shape
    shape = matrix_shape(group.kind, stored)
    if shape is None:
        raise Unsupported(
            "the weight of this site is not one of its kind",
            where=f"{owner}, {group.path}",
            expected=group.kind,
            found=stored,
        )
    return *shape, *(stored[2:] if group.kind in CONVOLUTIONS else ())


def _require_alone(name: str, contributions: list[Contribution]) -> None:
    if len(contributions) > 1 and any(one.method.traits.exclusive for one in contributions):
        raise Unsupported(
            "several adapters change this tensor, and one of them puts its own values in its place",
            where=name,
            found=", ".join(f"'{one.pack}' ({one.method.name})" for one in contributions),
            remedy="merge only one of them",
        )


def _require_one_module(name: str, contributions: list[Contribution]) -> None:
    """Checks that no pack changes this tensor at several modules that share it, as a block at several places
    of a model does (Zamba): the tensor could hold one of the changes only.
    """
    for pack in {one.pack for one in contributions}:
        paths = sorted({one.adapter.site.path for one in contributions if one.pack == pack})
        if len(paths) > 1:
            raise Unsupported(
                "modules of the model share this tensor, which cannot hold the change of each",
                where=name,
                found=f"{pack}: {', '.join(paths[:4])}",
                expected="one module",
                remedy="keep the adapter unmerged, or export it with --mode bank",
            )


def _in_own_places(contributions: list[Contribution]) -> bool:
    """Whether all are of one method, and each puts its values in places of its own."""
    method = contributions[0].method
    together = method.overrides.get("active_together")
    return (
        together is not None
        and all(one.method.name == method.name for one in contributions)
        and together([one.adapter.config for one in contributions])
    )


def _plan_copies(base: MergeBase, copied: str, name: str, out: str | None) -> Writer:
    if copied in base.quantized and out is None:
        raise Unsupported(
            "a quantized weight is not written twice", where=f"{base.where}, {copied}", remedy=_DEQUANTIZE
        )
    return plain_writer(name, out or base.tensors[copied].dtype)


def _target(
    base: MergeBase, name: str, contributions: list[Contribution], out: str | None, copied: str | None
) -> MergeTarget | None:
    """Returns the target, or None if no contribution changes it. Folds one row to see whether the bias
    changes.

    ``copied`` is the tensor of the base that the weight starts from, if that has another name.
    """
    if not _in_own_places(contributions):
        _require_alone(name, contributions)
    kinds = {contribution.adapter.site.kind for contribution in contributions}
    if len(kinds) > 1:
        raise Unsupported(
            "the packs do not agree on how this weight is stored",
            where=name,
            found=", ".join(sorted(kinds)),
            remedy="merge packs that were trained on one base",
        )
    (kind,) = kinds
    storage = base.storage(
        copied or name, out, f"pack '{contributions[0].pack}', {contributions[0].adapter.site.path}"
    )
    storage = (
        storage if copied is None else WeightStorage(storage.reader, _plan_copies(base, copied, name, out))
    )
    dtype = storage.reader.work
    matrices = storage.reader.matrices(kind)
    stored_bias = module_parameter(name, "bias")
    bias = stored_bias if stored_bias in base.tensors else None
    old = None if bias is None else base.read(bias)
    changes_bias = False
    effective = []
    for contribution in contributions:
        parts = [(slice_of(contribution, number), matrix) for number, matrix in enumerate(matrices)]
        bounds = [(bind(part, dtype, matrix, old), matrix) for part, matrix in parts]
        if all(changes_nothing(contribution, bound, matrix.shape) for bound, matrix in bounds):
            continue
        effective.append(contribution)
        bound, matrix = bounds[0]
        row = slice(0, 1) if contribution.method.traits.row_separable else slice(0, len(matrix))
        before = None if old is None else old[row].astype(dtype)
        after = bound.fold(matrix[row].astype(dtype), before, row)[1]
        if bias is None and after is not None:
            raise Unsupported(
                f"folding method '{contribution.method.name}' gives this site a bias, and the base has none",
                where=f"{base.folder}, {name}",
                expected=stored_bias,
                remedy="keep the adapter unmerged",
            )
        changes_bias = changes_bias or after is not before
    return (
        MergeTarget(name, bias if changes_bias else None, tuple(effective), storage, old, kind)
        if effective
        else None
    )
