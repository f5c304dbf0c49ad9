"""What a comparison of two fingerprints means: a small table, read from the strongest evidence down."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from .fingerprint import Fingerprint


class Variant(NamedTuple):
    """A base whose bytes differ and on which the pack may be used all the same.

    ``relation`` is one of ``dtype_cast``, ``quantized``, ``reshard``, ``renamed_keys``; ``tested`` tells whether the pack ran on it.
    """

    relation: str
    digests: Fingerprint
    tested: bool = False


class Evidence(NamedTuple):
    """Which levels are equal: True, False, or None where one side does not know it or used another version of the scheme.

    ``variant`` is the one that was recognized; with ``outline`` by its ``structure`` alone, because its bytes were not read.
    """

    structure: bool | None
    content: bool | None
    files: bool | None
    probe: bool | None
    variant: Variant | None
    outline: bool


class Verdict(NamedTuple):
    """``accepted`` tells whether a pack may be used without further leave; ``means`` says it for people.

    ``differs`` tells a difference that was seen from a likeness that was not shown; ``variant`` is the one that the verdict is about.
    """

    name: str
    accepted: bool
    means: str
    differs: bool = False
    variant: Variant | None = None

    def to_json(self) -> dict[str, Any]:
        """The verdict as reports print it; ``relation`` is that of the variant that was recognized."""
        return {"verdict": self.name, "accepted": self.accepted, "means": self.means,
                "relation": None if self.variant is None else self.variant.relation}

    def __str__(self) -> str:
        relation = "" if self.variant is None else f" ({self.variant.relation})"
        return f"{self.name}{relation}: {self.means}"


_TABLE: tuple[tuple[Callable[[Evidence], bool], Verdict], ...] = (
    (lambda e: bool(e.content), Verdict("same", True, "every byte of every tensor is equal")),
    # Equal files under unequal content cannot be: where both are known, content decides. Unequal files prove nothing.
    (lambda e: e.content is None and bool(e.files), Verdict("same", True, "the weight files are equal")),
    (lambda e: e.variant is not None and not e.outline, Verdict("variant", True, "a declared variant of the base")),
    (lambda e: e.content is None and bool(e.probe) and e.structure is not False,
     Verdict("likely", True, "samples of every tensor are equal; the rest was not read")),
    (lambda e: bool(e.structure) and False in {e.content, e.probe},
     Verdict("structural", False, "the same names, dtypes and shapes, other weights", differs=True)),
    (lambda e: bool(e.structure),
     Verdict("structural", False, "the same names, dtypes and shapes; no digest of the weights is known to both")),
    (lambda e: e.outline,
     Verdict("structural", False, "names, dtypes and shapes of a declared variant, whose weights were not read")),
    (lambda e: all(level is None for level in e[:4]), Verdict("unknown", False, "the two have no level in common")),
    (lambda e: e.structure is False, Verdict("other", False, "names, dtypes or shapes differ", differs=True)),
    (lambda e: True, Verdict("other", False, "other weights", differs=True)),
)


def match(wanted: Fingerprint, found: Fingerprint, variants: Iterable[Variant] = ()) -> Verdict:
    """What is known about ``found`` being the base ``wanted``, or one of its declared variants.

    Levels that either side lacks are not compared; a variant counts by ``content``, or by ``files``, never by less.

    Example:
        >>> wanted = Fingerprint("bfp1:a", "bfp1:b")
        >>> match(wanted, Fingerprint("bfp1:a", "bfp1:b")).name, match(wanted, Fingerprint("bfp1:a", "bfp1:c")).name
        ('same', 'structural')
        >>> match(Fingerprint("bfp1:a", None, probe="bfp1:p"), Fingerprint("bfp1:a", "bfp1:b", probe="bfp1:p")).name
        'likely'
    """
    known = tuple(variants)
    declared = next((v for v in known if _strong(v.digests, found)), None)
    levels = {level: _equal(getattr(wanted, level), getattr(found, level)) for level in Fingerprint._fields}
    outlined = None if declared or levels["structure"] else next((v for v in known if _outlined(v.digests, found)), None)
    evidence = Evidence(**levels, variant=declared or outlined, outline=outlined is not None)
    verdict = next(verdict for holds, verdict in _TABLE if holds(evidence))
    return verdict._replace(variant=evidence.variant) if verdict.name in {"variant", "structural"} else verdict


def _strong(wanted: Fingerprint, found: Fingerprint) -> bool | None:
    """Whether every byte is equal: by ``content``, else by ``files``, whose being unequal proves nothing."""
    content, files = _equal(wanted.content, found.content), _equal(wanted.files, found.files)
    return content if content is not None else files or None


def _outlined(wanted: Fingerprint, found: Fingerprint) -> bool:
    return _strong(wanted, found) is None and bool(_equal(wanted.structure, found.structure))


def _equal(one: str | None, other: str | None) -> bool | None:
    if one is None or other is None or one.partition(":")[0] != other.partition(":")[0]:
        return None
    return one == other
