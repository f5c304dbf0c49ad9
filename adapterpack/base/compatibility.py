"""Compares fingerprints to decide whether a pack or bundle was made for this base, or for one of which this
is a declared variant.

A small table ranks the evidence from the strongest down. Checkpoints, models in memory and bundles are
compared in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from ..errors import BaseMismatch
from ..io import Json
from ..manifest import manifest as m
from .checkpoint import Checkpoint
from .fingerprint import Fingerprint


class BaseVariant(NamedTuple):
    """A base with other bytes on which the pack may be used all the same.

    ``relation`` is ``dtype_cast``, ``quantized``, ``reshard`` or ``renamed_keys``; ``tested`` says whether
    the pack was run on it.
    """

    relation: str
    digests: Fingerprint
    tested: bool = False


class Evidence(NamedTuple):
    """Which levels of two fingerprints are equal: True, False, or None if one side lacks the level or uses
    another version of the scheme.

    ``variant`` is the declared variant that matches; ``structure_alone`` means that only its ``structure``
    matches, because its bytes were not read. ``named`` says that the wanted base has a fingerprint at any
    level.
    """

    structure: bool | None
    content: bool | None
    files: bool | None
    probe: bool | None
    variant: BaseVariant | None
    structure_alone: bool
    named: bool


class Verdict(NamedTuple):
    """The result of a comparison: ``accepted`` says whether the pack may be used on this base, and ``means``
    explains it.

    ``differs`` says that a difference was found, as opposed to no proof of equality; ``variant`` is the
    variant that the verdict is about.
    """

    name: str
    accepted: bool
    means: str
    differs: bool = False
    variant: BaseVariant | None = None

    def to_json(self) -> Json:
        """Returns the verdict as reports print it; ``relation`` is that of the matching variant."""
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
    """Compares ``actual`` with the base ``wanted`` and its declared variants, and returns the verdict.

    Levels that either side lacks are not compared; a variant matches by ``content`` or ``files``, never by
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
        else next(
            (
                variant
                for variant in variants
                if _equal_bytes(variant.digests, actual) is None
                and _equal(variant.digests.structure, actual.structure)
            ),
            None,
        )
    )
    evidence = Evidence(
        **equal, variant=by_bytes or by_structure, structure_alone=by_structure is not None, named=any(wanted)
    )
    verdict = next(verdict for applies, verdict in _TABLE if applies(evidence))
    return (
        verdict._replace(variant=evidence.variant) if verdict.name in {"variant", "structural"} else verdict
    )


def _equal_bytes(wanted: Fingerprint, actual: Fingerprint) -> bool | None:
    """Whether every byte is equal: by ``content``, else by ``files``, whose difference proves nothing."""
    content = _equal(wanted.content, actual.content)
    files = _equal(wanted.files, actual.files)
    return content if content is not None else files or None


def _equal(one: str | None, other: str | None) -> bool | None:
    """Whether two levels are equal; None if one is missing or they use different schemes."""
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
"""What else a user can do about a verdict, if both models have the same type."""
_OF_A_GRAPH = (
    ", or if you know that this graph was made of it, write the adapter for the graph: adapterpack convert "
    "PACK --for model.onnx -o ADAPTER.onnx_adapter"
)


def recorded_fingerprint(base: m.Base) -> Fingerprint:
    """Returns the fingerprint of a base in a manifest."""
    return Fingerprint(base.structure, base.content, base.files, base.probe)


def declared_variants(base: m.Base) -> tuple[BaseVariant, ...]:
    """Returns the variants that a manifest declares."""
    return tuple(
        BaseVariant(one.relation, Fingerprint(one.structure, one.content), one.tested)
        for one in base.variants
    )


def deciding_fingerprint(base: Checkpoint, wanted: m.Base, content: bool | None = True) -> Fingerprint:
    """Returns the fingerprint of a checkpoint as far as it decides whether it is ``wanted``; reads bytes only
    where they can still decide.

    ``content=False`` reads headers and samples only, unless the manifest lacks the base's structure. None
    reads more only if these leave it open: if the manifest has no samples, or they differ and a variant might
    be meant.
    """
    variants = [variant.digests for variant in declared_variants(wanted)]
    accepted = [recorded_fingerprint(wanted), *variants]
    structures = {one.structure for one in accepted}
    if content is None:
        content = wanted.probe is None or (
            base.probe != wanted.probe and base.structure in {one.structure for one in variants}
        )
        content = content or wanted.structure != base.structure
    # If no accepted structure equals this one, the bytes cannot make it match, so they are not read.
    deciding = None in structures or (content and base.structure in structures)
    by_content = deciding and any(one.content is not None for one in accepted)
    by_files = deciding and any(one.content is None and one.files is not None for one in accepted)
    return base.fingerprint(content=by_content, files=by_files)


def compare(wanted: m.Base, actual: Fingerprint) -> Verdict:
    """Compares ``actual`` with the base that a manifest names and the variants that it declares, and returns
    the verdict.
    """
    return match(recorded_fingerprint(wanted), actual, declared_variants(wanted))


def agrees(wanted: m.Base, other: m.Base) -> bool:
    """Whether ``other`` is the base ``wanted`` or one of its declared variants, as far as both are known.

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
    """Returns the verdict on ``actual`` if it allows the owner of ``wanted`` to be used; an owner that
    records no digest may be used on any base.

    ``owner`` describes whose base it is, for instance ``pack 'tickets'``; ``name``, ``where`` and
    ``model_type`` (as in ``config.json``, None if unknown) describe the base in use.

    Raises:
        BaseMismatch: it is another base, or nothing shows that it is this one and ``allow_structural`` is
            false.
    """
    verdict = compare(wanted, actual)
    recorded = recorded_fingerprint(wanted)
    if verdict.accepted or (allow_structural and verdict.name == "structural") or not any(recorded):
        return verdict
    what = (
        f"{owner} was made for another base"
        if verdict.differs
        else f"nothing shows that {owner} was made for this base"
    )
    one_type = None in (wanted.model_type, model_type) or wanted.model_type == model_type
    alternative = ALTERNATIVES.get(verdict.name, "") if one_type else ""
    alternative = alternative if any(actual) else _OF_A_GRAPH
    raise BaseMismatch(
        f"{what}: {verdict.means}",
        where=where,
        expected=_describe(wanted.name or "an unnamed base", recorded, actual),
        found=_describe(name, actual, recorded),
        remedy="use the base that it names" + alternative,
    )


def _describe(name: str | None, one: Fingerprint, other: Fingerprint) -> str:
    """Describes a base by name and by the first level that differs from the other's, or the first that it
    has.
    """
    pairs = [(mine, theirs) for mine, theirs in zip(one, other, strict=True) if mine is not None]
    digest = next(
        (mine for mine, theirs in pairs if theirs not in (None, mine)),
        pairs[0][0] if pairs else "no fingerprint",
    )[:17]
    return digest if name is None else f"{name} ({digest})"
