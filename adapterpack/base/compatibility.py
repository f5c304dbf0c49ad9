"""Tells from fingerprints whether a base model is the one that a pack or a bundle was made for, or a variant
of it that it declares.

The evidence is weighed by a small table, from the strongest down; checkpoints, models in memory and bundles
are compared in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ..errors import BaseMismatch
from ..manifest import manifest as m
from .checkpoint import Checkpoint
from .fingerprint import Fingerprint


class BaseVariant(NamedTuple):
    """A base with other bytes on which the pack may be used nevertheless.

    ``relation`` is one of ``dtype_cast``, ``quantized``, ``reshard``, ``renamed_keys``; ``tested`` tells
    whether the pack ran on it.
    """

    relation: str
    digests: Fingerprint
    tested: bool = False


class Evidence(NamedTuple):
    """Which levels are equal: True, False, or None where one side does not know it or used another version of
    the scheme.

    ``variant`` is the one that was recognized; with ``structure_alone`` by its ``structure``, because its
    bytes were not read. ``named`` says that the one that wants a base names it by any level.
    """

    structure: bool | None
    content: bool | None
    files: bool | None
    probe: bool | None
    variant: BaseVariant | None
    structure_alone: bool
    named: bool


class Verdict(NamedTuple):
    """The result of a comparison: ``accepted`` says whether the pack may be used on this base, ``means``
    explains it to people.

    ``differs`` says that a difference was found, rather than that nothing shows they are equal; ``variant``
    is the one that the verdict is about.
    """

    name: str
    accepted: bool
    means: str
    differs: bool = False
    variant: BaseVariant | None = None

    def to_json(self) -> dict[str, Any]:
        """The verdict as reports print it; ``relation`` is that of the variant that was recognized."""
        return {
            "verdict": self.name,
            "accepted": self.accepted,
            "means": self.means,
            "relation": None if self.variant is None else self.variant.relation,
        }

    def __str__(self) -> str:
        relation = "" if self.variant is None else f" ({self.variant.relation})"
        return f"{self.name}{relation}: {self.means}"


_TABLE: tuple[tuple[Callable[[Evidence], bool], Verdict], ...] = (
    (lambda e: bool(e.content), Verdict("same", True, "every byte of every tensor is equal")),
    # Equal files under unequal content cannot be: where both are known, content decides. Unequal files prove
    # nothing.
    (lambda e: e.content is None and bool(e.files), Verdict("same", True, "the weight files are equal")),
    (
        lambda e: e.variant is not None and not e.structure_alone,
        Verdict("variant", True, "a declared variant of the base"),
    ),
    (
        lambda e: e.content is None and bool(e.probe) and e.structure is not False,
        Verdict("likely", True, "samples of every tensor are equal; the rest was not read"),
    ),
    (
        lambda e: bool(e.structure) and False in {e.content, e.probe},
        Verdict("structural", False, "the same names, dtypes and shapes, other weights", differs=True),
    ),
    (
        lambda e: bool(e.structure),
        Verdict(
            "structural",
            False,
            "the same names, dtypes and shapes; no digest of the weights is known to both",
        ),
    ),
    (
        lambda e: e.structure_alone,
        Verdict(
            "structural", False, "names, dtypes and shapes of a declared variant, whose weights were not read"
        ),
    ),
    (
        lambda e: not e.named,
        Verdict(
            "unknown",
            False,
            "no base is named by its content (a folder of PEFT never names one): the weights were not "
            "compared",
        ),
    ),
    (
        lambda e: all(level is None for level in e[:4]),
        Verdict("unknown", False, "the two have no level in common"),
    ),
    (lambda e: e.structure is False, Verdict("other", False, "names, dtypes or shapes differ", differs=True)),
    (lambda e: True, Verdict("other", False, "other weights", differs=True)),
)


def match(wanted: Fingerprint, actual: Fingerprint, variants: Iterable[BaseVariant] = ()) -> Verdict:
    """What is known about ``actual`` being the base ``wanted``, or one of its declared variants.

    Levels that either side lacks are not compared; a variant counts by ``content``, or by ``files``, never by
    less.

    Example:
        >>> wanted = Fingerprint("bfp1:a", "bfp1:b")
        >>> match(wanted, Fingerprint("bfp1:a", "bfp1:b")).name, match(wanted, Fingerprint("bfp1:a",
        ...     "bfp1:c")).name
        ('same', 'structural')
        >>> match(Fingerprint("bfp1:a", None, probe="bfp1:p"), Fingerprint("bfp1:a", "bfp1:b",
        ...     probe="bfp1:p")).name
        'likely'
    """
    variants = tuple(variants)
    equal = {level: _equal(getattr(wanted, level), getattr(actual, level)) for level in Fingerprint._fields}
    by_bytes = next((variant for variant in variants if _equal_bytes(variant.digests, actual)), None)
    by_structure = (
        None
        if by_bytes or equal["structure"]
        else next((variant for variant in variants if _equal_structure_alone(variant.digests, actual)), None)
    )
    evidence = Evidence(
        **equal, variant=by_bytes or by_structure, structure_alone=by_structure is not None, named=any(wanted)
    )
    verdict = next(verdict for applies, verdict in _TABLE if applies(evidence))
    return (
        verdict._replace(variant=evidence.variant) if verdict.name in {"variant", "structural"} else verdict
    )


def _equal_bytes(wanted: Fingerprint, actual: Fingerprint) -> bool | None:
    """Whether every byte is equal: by ``content``, else by ``files``, whose being unequal proves nothing."""
    content, files = _equal(wanted.content, actual.content), _equal(wanted.files, actual.files)
    return content if content is not None else files or None


def _equal_structure_alone(wanted: Fingerprint, actual: Fingerprint) -> bool:
    return _equal_bytes(wanted, actual) is None and bool(_equal(wanted.structure, actual.structure))


def _equal(one: str | None, other: str | None) -> bool | None:
    if one is None or other is None or one.partition(":")[0] != other.partition(":")[0]:
        return None
    return one == other


ALTERNATIVES = {
    "structural": (
        ", or accept another with --allow-structural-base (allow_structural=True; for attach "
        "check_base=False)"
    ),
    "other": ", or declare a cast, quantized or renamed form of it as a variant (adapterpack declare)",
}
"""Verdict -> what a user can do instead of using the base that the pack names, if the models are of one
type.
"""


def recorded_fingerprint(base: m.Base) -> Fingerprint:
    """The fingerprint of a base as a manifest records it."""
    return Fingerprint(base.structure, base.content, base.files, base.probe)


def declared_variants(base: m.Base) -> tuple[BaseVariant, ...]:
    """The variants that a manifest declares."""
    return tuple(
        BaseVariant(one.relation, Fingerprint(one.structure, one.content), one.tested)
        for one in base.variants
    )


def deciding_fingerprint(base: Checkpoint, wanted: m.Base, content: bool | None = True) -> Fingerprint:
    """The fingerprint of a checkpoint, as far as it decides whether it is ``wanted``: bytes are read only
    where they can still decide.

    ``content=False`` reads headers and samples only, unless the manifest names a base without its structure;
    None reads more where they leave it open: where the manifest knows no samples, or they are others and a
    variant might be meant.
    """
    variants = [variant.digests for variant in declared_variants(wanted)]
    accepted = [recorded_fingerprint(wanted), *variants]
    structures = {one.structure for one in accepted}
    if content is None:
        content = wanted.probe is None or (
            base.probe != wanted.probe and base.structure in {one.structure for one in variants}
        )
        content = content or wanted.structure != base.structure
    deciding = None in structures or (content and base.structure in structures)
    by_content = deciding and any(one.content is not None for one in accepted)
    by_files = deciding and any(one.content is None and one.files is not None for one in accepted)
    return base.fingerprint(content=by_content, files=by_files)


def compare(wanted: m.Base, actual: Fingerprint) -> Verdict:
    """What is known about ``actual`` being the base that a manifest names, or one of the variants that it
    declares.
    """
    return match(recorded_fingerprint(wanted), actual, declared_variants(wanted))


def agrees(wanted: m.Base, other: m.Base) -> bool:
    """Whether ``other`` is the base ``wanted`` or one of the variants that it declares, as far as both are
    known.

    Example:
        >>> from adapterpack.manifest.structs import Variant
        >>> agrees(m.Base(content="bfp1:a", variants=(Variant("dtype_cast", content="bfp1:b"),)),
        ...     m.Base(content="bfp1:b"))
        True
        >>> agrees(m.Base(content="bfp1:b"), m.Base(content="bfp1:a"))
        False
    """
    verdict = compare(wanted, recorded_fingerprint(other))
    return verdict.accepted or not (verdict.differs or verdict.variant is not None)


def require(
    owner: str,
    wanted: m.Base,
    actual: Fingerprint,
    *,
    name: str | None,
    where: object,
    model_type: str | None = None,
    allow_structural: bool = False,
) -> Verdict:
    """The verdict on ``actual``, if it lets the owner of ``wanted`` be used there. An owner that records no
    digest may be used on any base.

    ``owner`` says whose base it is, for instance ``pack 'tickets'``; ``name``, ``where`` and ``model_type``
    (as in ``config.json``, None where it is unknown) describe the base in use.

    Raises:
        BaseMismatch: it is another base, or nothing shows that it is this one and ``allow_structural`` was
            not given.
    """
    verdict, recorded = compare(wanted, actual), recorded_fingerprint(wanted)
    if verdict.accepted or (allow_structural and verdict.name == "structural") or not any(recorded):
        return verdict
    what = (
        f"{owner} was made for another base"
        if verdict.differs
        else f"nothing shows that {owner} was made for this base"
    )
    one_type = None in (wanted.model_type, model_type) or wanted.model_type == model_type
    alternative = ALTERNATIVES.get(verdict.name, "") if one_type else ""
    raise BaseMismatch(
        f"{what}: {verdict.means}",
        where=where,
        expected=_describe(wanted.name or "an unnamed base", recorded, actual),
        found=_describe(name, actual, recorded),
        remedy="use the base that it names" + alternative,
    )


def _describe(name: str | None, one: Fingerprint, other: Fingerprint) -> str:
    """A base by name and the first level in which it differs from the other, or the first that it has."""
    pairs = [(mine, theirs) for mine, theirs in zip(one, other, strict=True) if mine is not None]
    digest = next(
        (mine for mine, theirs in pairs if theirs not in (None, mine)),
        pairs[0][0] if pairs else "no fingerprint",
    )[:17]
    return digest if name is None else f"{name} ({digest})"
