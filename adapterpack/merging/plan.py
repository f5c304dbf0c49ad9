"""What a merge will change, decided and checked before a byte is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ..adapter_methods import LAYOUTS, matrix_shape
from ..base.codecs.dequantized_checkpoint import Decoded
from ..base.codecs.plain import PlainWriter
from ..base.codecs.storage import Storage
from ..base.linear_layers import on
from ..base.match import Verdict
from ..errors import NothingToDo, Unsupported
from ..manifest.manifest import Group
from ..pack.pack import Pack
from .fold.fold import Contribution, bind, inert, slice_of
from .tied import parted
from .vocabulary import lengthened
from .whole import Whole, resolve


@dataclass(frozen=True)
class Target:
    """One weight of the base and what changes it; ``bias`` is the tensor of its bias, if the fold changes that too.

    ``base_bias`` holds the values of its bias, for methods that read them. ``kind`` says how the weight lies, ``storage`` how it is stored.
    """

    weight: str
    bias: str | None
    contributions: tuple[Contribution, ...]
    storage: Storage
    base_bias: np.ndarray | None = None
    kind: str = "linear"


@dataclass(frozen=True)
class Plan:
    """The targets by weight tensor, the modules that come in whole, and for each pack what was known about its base.

    ``copies`` are tensors that the output has besides: new name -> the one of the base that it begins as.
    """

    targets: Mapping[str, Target]
    whole: Whole
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)


def make(base: Decoded, packs: Sequence[Pack], weights: Sequence[float], allow_structural: bool = False, *,
         dtype: str | None = None, full: bool = True, by_chance: bool = False, untie: bool = False) -> Plan:
    """The plan of a merge of ``packs``, each with its weight, into ``base``, to be written in ``dtype`` (None: as it is stored).

    With ``full`` every byte of the base is read to tell whether it is the packs' own; without it only where samples leave it open.
    With ``by_chance`` what is changed shall be rounded stochastically. With ``untie`` a tied output head becomes a tensor of its own.

    Raises:
        BaseMismatch: a pack was made for another base.
        SiteNotFound: the base lacks a site.
        Unsupported: the fold would not be exact; says why and what to do instead.
        NothingToDo: no weight would change.
    """
    for pack in packs:  # the headers of all before the bytes of any
        base.require(pack, content=False, allow_structural=True)
    verdicts = tuple(base.require(pack, content=True if full else None, allow_structural=allow_structural) for pack in packs)
    packs = [on(pack, base) for pack in packs]
    found: dict[str, list[Contribution]] = {}
    tables: dict[str, tuple[Contribution, np.ndarray]] = {}
    for pack, weight in zip(packs, weights, strict=True):
        for name, contribution in _contributions(base, pack, weight):
            if (table := lengthened(base, name, contribution)) is None:
                found.setdefault(name, []).append(contribution)
            else:
                _require_alone(name, [each for each in (tables.get(name, (None,))[0], contribution) if each is not None])
                tables[name] = contribution, table
    found, copies = parted(base, found, {pack.name: pack for pack in packs}, untie)
    whole = resolve(base, packs, untie, {name: table for name, (_, table) in tables.items()})
    copies = {**copies, **whole.copies}
    for name in sorted(whole.replaced.keys() & base.coded.keys() if dtype is None else ()):
        raise Unsupported("a module that was trained whole would take the place of a quantized weight", where=f"{base.folder}, {name}",
                          found=base.coded[name].codec, remedy=_DEQUANTIZE)
    for name in sorted(found.keys() & whole.replaced.keys()):
        raise Unsupported("one pack puts a tensor in the place of this one, another adapts it", where=name,
                          remedy="merge only one of the two")
    targets = {name: target for name, each in found.items() if (target := _target(base, name, each, dtype, copies.get(name))) is not None}
    _require_apart(targets)
    for target in targets.values():
        _require_writable(base, target, by_chance)
    if not targets and not whole.replaced and not whole.added:
        raise NothingToDo("the packs would change nothing", where=", ".join(pack.name for pack in packs) or "no packs were given",
                          remedy="train the adapter first, or give it a weight other than zero")
    return Plan(targets, whole, verdicts, base.notes, copies)


_DEQUANTIZE = "merge with dtype bfloat16, which writes the base dequantized"


def _require_apart(targets: Mapping[str, Target]) -> None:
    """Checks that no stored tensor is written for two weights, as an expert and the stack that it is in."""
    owners: dict[str, str] = {}
    for name, target in targets.items():
        for part in target.storage.writer.parts.values():
            if (other := owners.setdefault(part, name)) != name:
                raise Unsupported("one pack adapts fused experts, another one of them", where=part, found=f"{other} and {name}",
                                  remedy="merge one of them, and the other into the result")


def _require_writable(base: Decoded, target: Target, by_chance: bool) -> None:
    """Checks that the output can hold the weight as it shall be written."""
    writer, where = target.storage.writer, f"{base.folder}, {target.weight}"
    if writer.sealed is not None:
        raise Unsupported(f"this form of {writer.label} can be read and not written: {writer.sealed}", where=where, remedy=_DEQUANTIZE)
    if by_chance and not writer.by_chance:
        raise Unsupported(f"codes of {writer.label} are those with the least error, with new scales where these serve better: they are not "
                          "rounded by chance", where=where, found="stochastic rounding", remedy=f"leave it out, or {_DEQUANTIZE}")


def _contributions(base: Decoded, pack: Pack, weight: float) -> Iterator[tuple[str, Contribution]]:
    owner = f"pack '{pack.name}'"
    for method in pack.methods:
        if method.kind != "weight":
            raise Unsupported(f"method '{method.name}' does not act on weights, so it cannot be folded into them", where=owner,
                              remedy="keep the adapter beside the base")
        if method.unfoldable:
            raise Unsupported(method.unfoldable, where=owner,
                              remedy="keep the adapter beside the base: attach it, or export with --mode bank")
    if pack.acts is not None:
        raise Unsupported("this adapter acts at some positions of a row only, which no weight can tell apart", where=owner,
                          found=f"{pack.method.name}, {pack.acts}"[:200], remedy="keep it beside the base, or export a bank or inputs")
    for method in pack.methods:
        if weight != 1 and not method.traits.additive:
            raise Unsupported(f"method '{method.name}' is not additive, so a weight on it has no meaning", where=owner,
                              expected="weight 1", found=f"weight {weight:g}", remedy="leave its weight at 1")
    for adapter in pack.adapters(partial(_shape, base, owner)):
        name = base.require_weight(adapter.site.path, adapter.weight)
        yield name, Contribution(pack.name, adapter.method, adapter, weight)


def _shape(base: Decoded, owner: str, group: Group) -> tuple[int, int]:
    """The shape ``[out, in]`` of the weight that a group changes."""
    if group.kind not in LAYOUTS:
        raise Unsupported(f"sites of kind '{group.kind}' cannot be folded", where=f"{owner}, {group.path}", expected=", ".join(LAYOUTS),
                          remedy="keep the adapter beside the base")
    stored = base.tensors[base.require_weight(group.path, group.weight)].shape
    shape = matrix_shape(group.kind, stored)
    if shape is None:
        raise Unsupported("the weight of this site is not one of its kind", where=f"{owner}, {group.path}", expected=group.kind,
                          found=stored)
    return shape


def _require_alone(name: str, contributions: list[Contribution]) -> None:
    if len(contributions) > 1 and any(each.method.traits.exclusive for each in contributions):
        raise Unsupported("several adapters change this tensor, and one of them puts its own values in its place", where=name,
                          found=", ".join(f"'{each.pack}' ({each.method.name})" for each in contributions), remedy="merge only one of them")


def _copied(base: Decoded, copied: str, name: str, out: str | None) -> PlainWriter:
    if copied in base.coded and out is None:
        raise Unsupported("a quantized weight is not written twice", where=f"{base.where}, {copied}", remedy=_DEQUANTIZE)
    return PlainWriter(name, out or base.tensors[copied].dtype)


def _target(base: Decoded, name: str, contributions: list[Contribution], out: str | None, copied: str | None) -> Target | None:
    """The target, or None if all contributions to it are inert. One row is folded for a look at what becomes of the bias.

    ``copied`` is the tensor of the base that the weight is a copy of, if it is one.
    """
    _require_alone(name, contributions)
    kinds = {each.adapter.site.kind for each in contributions}
    if len(kinds) > 1:
        raise Unsupported("the packs do not agree on how this weight is stored", where=name, found=", ".join(sorted(kinds)),
                          remedy="merge packs that were trained on one base")
    (kind,) = kinds
    storage = base.storage(copied or name, out, f"pack '{contributions[0].pack}', {contributions[0].adapter.site.path}")
    storage = storage if copied is None else Storage(storage.reader, _copied(base, copied, name, out))
    dtype, whole = storage.reader.work, storage.reader.matrices(kind)
    stem = name.removesuffix(".weight")
    bias = f"{stem}.bias" if stem != name and f"{stem}.bias" in base.tensors else None
    old = None if bias is None else base.read(bias)
    changes_bias, moving = False, []
    for each in contributions:
        parts = [(slice_of(each, number), matrix) for number, matrix in enumerate(whole)]
        bounds = [(bind(part, dtype, matrix, old), matrix) for part, matrix in parts]
        if all(inert(each, bound, matrix.shape) for bound, matrix in bounds):
            continue
        moving.append(each)
        bound, matrix = bounds[0]
        row = slice(0, 1) if each.method.traits.row_separable else slice(0, len(matrix))
        before = None if old is None else old[row].astype(dtype)
        after = bound.fold(matrix[row].astype(dtype), before, row)[1]
        if bias is None and after is not None:
            raise Unsupported(f"folding method '{each.method.name}' gives this site a bias, and the base has none",
                              where=f"{base.folder}, {name}", expected=f"{stem}.bias", remedy="keep the adapter beside the base")
        changes_bias = changes_bias or after is not before
    return Target(name, bias if changes_bias else None, tuple(moving), storage, old, kind) if moving else None
