"""Turns the figures of a comparison into advice in sentences, from measured values only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ...readable import percent, size
from .figures import Figures
from .result import QuantizedForm

SAME = 0.005
"""Losses count as equal if they differ by less than this share of the float bundle's perplexity."""
NEAR = 0.02
"""A form counts as good as the float bundle if its perplexity is at most this share higher."""


class _Quality(NamedTuple):
    """A perplexity in words, and its distance from the float bundle's as a share."""

    shown: str
    worse: float


def advice(forms: Sequence[QuantizedForm], rank: int) -> Iterator[str]:
    """Yields a sentence for every scheme (the best way, and the gain by a correction), then which form to
    take, and which forms are slow.

    ``forms`` begin with the float one.
    """
    reference = forms[0].figures
    assert reference is not None
    made = [
        (form, figures, _quality(figures, reference))
        for form in forms[1:]
        if (figures := form.figures) is not None
    ]
    for scheme in dict.fromkeys(form.scheme for form, _, _ in made):
        ways = {form.way: quality for form, _, quality in made if form.scheme == scheme}
        yield from _of_scheme(scheme, ways, _quality(reference, reference), rank)
    near = [(figures.nbytes, form) for form, figures, quality in made if quality.worse <= NEAR]
    if near:
        nbytes, best = min(near, key=lambda one: one[0])
        yield (
            f"The smallest that is within {percent(NEAR)} of the float bundle: {best.scheme}, {best.way}, "
            f"{size(nbytes)} instead of {size(reference.nbytes)}."
        )
    elif made:
        yield f"None is within {percent(NEAR)} of the float bundle."
    slow = [f"{form.scheme}, {form.way}" for form, figures, _ in made if _speed(figures) < _speed(reference)]
    if slow:
        yield f"Slower than the float bundle at one row: {'; '.join(slow)}."


def _of_scheme(scheme: str, ways: Mapping[str, _Quality], reference: _Quality, rank: int) -> Iterator[str]:
    attached = ways.get("attached") or ways.get("quantized")
    merged, corrected = ways.get("merged"), ways.get("compensated")
    measured = f"(perplexity: float {reference.shown}"
    if attached is not None and merged is not None:
        measured += f", attached {attached.shown}, merged {merged.shown})"
        if abs(attached.worse - merged.worse) <= SAME:
            yield (
                f"{scheme}: to attach the float adapter or to merge it first makes no difference {measured}."
            )
        elif attached.worse < merged.worse:
            yield (
                f"{scheme}: attach the float adapter to the quantized base, and do not merge it first "
                f"{measured}."
            )
        else:
            yield (
                f"{scheme}: here a merge before quantizing is better than a float adapter on the quantized "
                f"base {measured}."
            )
    if attached is not None and corrected is not None:
        measured = f"(perplexity: {attached.shown} becomes {corrected.shown}, float {reference.shown})"
        if attached.worse <= SAME:
            yield f"{scheme}: there is no loss to speak of that a correction could win back {measured}."
        else:
            share = 1 - max(corrected.worse, 0.0) / attached.worse
            if share > 0:
                yield (
                    f"{scheme}: a correction of rank {rank} wins back {percent(share)} of what is lost "
                    f"{measured}."
                )
            else:
                yield f"{scheme}: a correction of rank {rank} wins nothing back {measured}."


def _quality(figures: Figures, reference: Figures) -> _Quality:
    return _Quality(f"{figures.perplexity:.4g}", figures.perplexity / reference.perplexity - 1)


def _speed(figures: Figures) -> float:
    return figures.decode if figures.decode is not None else figures.prefill
