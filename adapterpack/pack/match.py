"""What a comparison of two fingerprints means: a small table, read from the strongest evidence down."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from .fingerprint import Fingerprint


@dataclass(frozen=True)
class Variant:
    """A base whose bytes differ and on which the pack may be used all the same.

    ``relation`` is one of ``dtype_cast``, ``quantized``, ``reshard``, ``renamed_keys``; ``tested`` tells whether the pack ran on it.
    """

    relation: str
    digests: Fingerprint
    tested: bool = False


class Evidence(NamedTuple):
    """Which levels are equal: True, False, or None where one side does not know it or used another version of the scheme."""

    structure: bool | None
    content: bool | None
    files: bool | None
    probe: bool | None
    variant: Variant | None


class Verdict(NamedTuple):
    """``accepted`` tells whether a pack may be used without further leave; ``means`` says it for people."""

    name: str
    accepted: bool
    means: str
    variant: Variant | None = None


_TABLE: tuple[tuple[Callable[[Evidence], bool], Verdict], ...] = (
    (lambda e: bool(e.content), Verdict("same", True, "every byte of every tensor is equal")),
    # Equal files under unequal content cannot be: where both are known, content decides. Unequal files prove nothing.
    (lambda e: e.content is None and bool(e.files), Verdict("same", True, "the weight files are equal")),
    (lambda e: e.variant is not None, Verdict("variant", True, "a declared variant of the base")),
    (lambda e: e.content is None and bool(e.probe) and e.structure is not False,
     Verdict("likely", True, "samples of every tensor are equal; the rest was not read")),
    (lambda e: bool(e.structure),
     Verdict("structural", False, "the same names, dtypes and shapes; nothing shows that the weights are the same")),
    (lambda e: all(level is None for level in e[:4]), Verdict("unknown", False, "the two have no level in common")),
    (lambda e: True, Verdict("other", False, "another base")),
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
    declared = next((v for v in variants if _strong(v.digests, found)), None)
    levels = {level: _equal(getattr(wanted, level), getattr(found, level)) for level in Fingerprint._fields}
    evidence = Evidence(**levels, variant=declared)
    verdict = next(verdict for holds, verdict in _TABLE if holds(evidence))
    return verdict._replace(variant=declared) if verdict.name == "variant" else verdict


def _strong(wanted: Fingerprint, found: Fingerprint) -> bool:
    content, files = _equal(wanted.content, found.content), _equal(wanted.files, found.files)
    return bool(files) if content is None else content


def _equal(one: str | None, other: str | None) -> bool | None:
    if one is None or other is None or one.partition(":")[0] != other.partition(":")[0]:
        return None
    return one == other
