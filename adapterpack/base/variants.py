"""Determines how one checkpoint relates to another: the same weights in other files, in another dtype, under
other names, or quantized.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import BaseMismatch, NothingToDo
from ..io import FLOATS, HashedSource, digests, read_file
from .base_folder import MAX_JSON
from .checkpoint import Checkpoint
from .compatibility import BaseVariant
from .quantization import scheme
from .recast import cast_digests


@dataclass(frozen=True)
class Relation:
    """How the second of two checkpoints relates to the first.

    ``kind`` is ``same``, ``reshard``, ``dtype_cast``, ``renamed_keys``, ``quantized`` or ``other``.
    ``proven`` means that every byte was compared; a quantization is only declared. ``names`` maps names of
    the first to those of the second where they differ.
    """

    kind: str
    proven: bool
    detail: str
    names: Mapping[str, str] = field(default_factory=dict)


def relation(a: Checkpoint, b: Checkpoint) -> Relation:
    """Returns how ``b`` relates to ``a``; reads whole tensors only if headers and samples agree.

    Raises:
        StorageError: a file changed since it was opened.

    Example:
        >>> relation(Checkpoint("base"), Checkpoint("base-bf16")).kind  # doctest: +SKIP
        'dtype_cast'
    """
    return next((match for rule in _RULES if (match := rule(a, b)) is not None), None) or Relation(
        "other", True, _difference(a, b)
    )


def variant(a: Checkpoint, b: Checkpoint, tested: bool = False) -> BaseVariant:
    """Returns ``b`` as a declared variant of ``a``, with its fingerprint.

    Raises:
        BaseMismatch: ``b`` is another base.
        NothingToDo: ``b`` is ``a`` itself, which needs no declaration.
    """
    related = relation(a, b)
    if related.kind == "same":
        raise NothingToDo("the two bases are the same files: there is no variant to declare", where=b.folder)
    if related.kind == "other":
        raise BaseMismatch(
            f"this is no variant of the base: {related.detail}",
            where=b.folder,
            expected=f"a variant of {a.name}",
            remedy="declare only a cast, a quantization, a new sharding or a renaming of the base",
        )
    return BaseVariant(related.kind, b.fingerprint(files=True), tested)


def _same(a: Checkpoint, b: Checkpoint) -> Relation | None:
    """Returns the relation of equal tensors under equal names, or None."""
    if a.structure != b.structure or a.probe != b.probe or a.content != b.content:
        return None
    if _layout(a) == _layout(b):
        return Relation("same", True, "the weight files are equal")
    return Relation(
        "reshard",
        True,
        f"equal tensors in {len(a.files)} and {len(b.files)} files; their order, split or metadata differs",
    )


def _layout(base: Checkpoint) -> tuple[Any, ...]:
    """Returns everything that the files contain besides tensors, so that files with equal tensors can be
    compared without reading them again.
    """
    starts = {
        shard: min((info.offset for info in file.tensors.values()), default=file.size)
        for shard, file in base.files.items()
    }
    headers = {
        shard: HashedSource(base.folder / shard, base.identities[shard], ((0, start),))
        for shard, start in starts.items()
    }
    return digests(headers), read_file(
        base.folder / base.index_name, MAX_JSON
    ) if base.index is not None else None


def _cast(a: Checkpoint, b: Checkpoint) -> Relation | None:
    """Returns the relation of a cast, or None."""
    if {n: i.shape for n, i in a.tensors.items()} != {n: i.shape for n, i in b.tensors.items()}:
        return None
    changed = [name for name, info in a.tensors.items() if info.dtype != b.tensors[name].dtype]
    if not changed or not all({a.tensors[name].dtype, b.tensors[name].dtype} <= FLOATS for name in changed):
        return None
    dtypes = {name: info.dtype for name, info in b.tensors.items()}
    # Samples first: they rule out most pairs without reading whole tensors.
    if cast_digests(a, dtypes, samples=True) != b.samples or cast_digests(a, dtypes) != b.digests:
        return None
    kinds = Counter(f"{a.tensors[name].dtype} to {dtypes[name]}" for name in changed)
    return Relation(
        "dtype_cast", True, "; ".join(f"{kind} in {count} tensors" for kind, count in sorted(kinds.items()))
    )


def _renamed(a: Checkpoint, b: Checkpoint) -> Relation | None:
    """Returns the relation of equal tensors under other names, or None."""
    if a.tensors.keys() == b.tensors.keys() or _kinds(a, {}) != _kinds(b, {}):
        return None
    if _kinds(a, a.samples) != _kinds(b, b.samples) or _kinds(a, a.digests) != _kinds(b, b.digests):
        return None
    names = _pairs(a, b)
    return Relation(
        "renamed_keys", True, f"equal tensors; {len(names)} of {len(a.tensors)} have another name", names
    )


def _kinds(base: Checkpoint, known: Mapping[str, bytes]) -> Counter[Any]:
    """Counts the tensors by dtype, shape and digest, regardless of names."""
    return Counter((info.dtype, info.shape, known.get(name)) for name, info in base.tensors.items())


def _pairs(a: Checkpoint, b: Checkpoint) -> dict[str, str]:
    """Maps old names to new names.

    Tensors with equal bytes (norms of ones, say) are paired in the order of their names read from the last
    part, so that a new prefix pairs layer with layer.
    """
    left: dict[Any, list[str]] = defaultdict(list)
    right: dict[Any, list[str]] = defaultdict(list)
    for base, other, side in ((a, b, left), (b, a, right)):
        for name, info in base.tensors.items():
            key = (info.dtype, info.shape, base.digests[name])
            twin = other.tensors.get(name)
            if twin is None or key != (twin.dtype, twin.shape, other.digests[name]):
                side[key].append(name)
    return {
        old: new
        for key in left
        for old, new in zip(
            sorted(left[key], key=_last_part_first), sorted(right[key], key=_last_part_first), strict=True
        )
    }


def _last_part_first(name: str) -> list[str]:
    """Returns the parts of a name in reverse order."""
    return name.split(".")[::-1]


def _quantized(a: Checkpoint, b: Checkpoint) -> Relation | None:
    """Returns the relation if ``b`` declares a quantization and some of its unquantized tensors equal those
    of ``a``; else None.
    """
    declared = scheme(b)
    if declared is None or scheme(a) is not None:
        return None
    both = {
        name: (a.tensors[name], info) for name, info in b.tensors.items() if name in a.tensors and info.nbytes
    }
    common = {
        name: new.dtype
        for name, (old, new) in both.items()
        if old.shape == new.shape and {old.dtype, new.dtype} <= FLOATS
    }
    cast = cast_digests(a, common)
    equal = sum(cast[name] == b.digests[name] for name in common)
    if not equal:
        return None
    return Relation(
        "quantized",
        False,
        f"declared: {declared}; {equal} of the {len(common)} tensors left in floating point are equal",
    )


_RULES: tuple[Callable[[Checkpoint, Checkpoint], Relation | None], ...] = (_same, _cast, _renamed, _quantized)


def _difference(a: Checkpoint, b: Checkpoint) -> str:
    """Describes the first difference between two checkpoints."""
    for one, other, which in ((a, b, "first"), (b, a, "second")):
        if lone := sorted(one.tensors.keys() - other.tensors.keys()):
            return f"only the {which} has {_few(lone)}"
    if shapes := sorted(n for n in a.tensors if a.tensors[n].shape != b.tensors[n].shape):
        return f"other shapes: {_few(shapes)}"
    dtypes = {name: info.dtype for name, info in b.tensors.items()}
    floats = {
        name: dtype
        for name, dtype in dtypes.items()
        if dtype == a.tensors[name].dtype or {dtype, a.tensors[name].dtype} <= FLOATS
    }
    if odd := sorted(dtypes.keys() - floats.keys()):
        return f"other dtypes: {_few(odd)}"
    samples = cast_digests(a, floats, samples=True)
    if values := sorted(name for name in floats if samples[name] != b.samples[name]):
        return f"other values, as samples show: {_few(values)}"
    cast = cast_digests(a, floats)
    return f"other values: {_few(sorted(name for name in floats if cast[name] != b.digests[name]))}"


def _few(names: list[str]) -> str:
    """Lists the first names in words."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
