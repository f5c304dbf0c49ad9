"""Screens packs for hidden training, such as a backdoor: compares the spectra of their changes with those of
clean packs of one's own.

The idea of looking at spectra is that of arXiv 2602.15195; fixed coefficients are not: those of one base and
method say nothing about another. The test is conformal: if a pack is made as the clean ones are, every order
of their scores is equally likely, whatever the scores' distribution. Source: Vovk, Gammerman and Shafer,
Algorithmic Learning in a Random World, 2005, section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..base import compatibility
from ..composing.as_factors import represent
from ..errors import ConfigError, NonFinite, Unsupported
from ..lowrank import energy_of
from ..lowrank.spectra import spectra
from ..pack import Pack
from .audit_report import Screen, Screened, place_of
from .measures import effective_rank, stable_rank

RATE = 0.05
_FIGURES = ("log size", "stable rank", "effective rank")
_NAMED = 3
"""The most figures that are named for a pack."""
_FLOOR = 1e-9
"""The least standard deviation of a figure, which is 0 among equal packs."""


def screen(packs: Sequence[Pack], clean: Sequence[Pack], rate: float = RATE) -> Screen:
    """Says of each pack whether its change looks unlike the changes of ``clean`` packs of the same kind.

    A pack that is made as the clean ones are is called unusual with a probability of at most ``rate``. The
    cost is bounded by the clean packs: a pack with other modules, ranks or widths is not screened.

    Raises:
        ConfigError: there are too few clean packs for this rate, or they are of several kinds.
        NonFinite: a change is too large to have a spectrum.
        Unsupported: changes of these packs' method have no factors of their own.

    Example:
        >>> from adapterpack import load
        >>> clean = [load(f"packs/clean-{number}") for number in range(19)]  # doctest: +SKIP
        >>> screen([load("packs/orders")], clean).packs[0].outcome  # doctest: +SKIP
        'not unusual'
    """
    known = {pack.id: pack for pack in clean}
    needed = math.ceil(1 / rate) - 1 if 0 < rate < 1 else None
    if needed is None or len(known) < needed:
        raise ConfigError(
            "the clean packs are too few for this rate of false alarms",
            expected="a rate between 0 and 1" if needed is None else f"{needed} different packs",
            found=f"{len(known)} packs, rate {rate}",
            remedy="give more clean packs of one kind, or a higher rate",
        )
    first, *rest = known.values()
    for pack in rest:
        if difference := _difference(pack, first):
            raise ConfigError(
                f"clean packs are of one kind, but {pack.name} and {first.name} have {difference}",
                remedy="give packs of one base, method, rank and list of modules",
            )
    measured = {identity: figures(pack) for identity, pack in known.items()}
    return Screen(
        len(known),
        rate,
        f"{first.manifest.method.type} packs on {first.manifest.base.name or 'an unnamed base'} that change "
        f"{len(first.manifest.adapter_groups)} modules",
        tuple(_screened(pack, first, measured, rate) for pack in packs),
    )


def _difference(pack: Pack, other: Pack) -> str | None:
    """Returns what makes two packs incomparable, or None."""
    one, two = pack.manifest, other.manifest
    if not compatibility.agrees(one.base, two.base):
        return "different bases"
    if one.method.type != two.method.type:
        return f"different methods ({one.method.type} and {two.method.type})"
    shapes = [
        {(entry.group, entry.param): value.shape_of(name) for name, entry in value.tensors.items()}
        for value in (one, two)
    ]
    return None if shapes[0] == shapes[1] else "different modules, ranks or widths"


def _screened(pack: Pack, first: Pack, measured: Mapping[str, dict[str, float]], rate: float) -> Screened:
    if difference := _difference(pack, first):
        return Screened(pack.name, "not screened", None, (f"it and the clean packs have {difference}",))
    own = figures(pack)
    others = [list(values.values()) for identity, values in measured.items() if identity != pack.id]
    z = _deviations(np.array([*others, list(own.values())]))
    scores = np.sqrt(np.mean(z**2, axis=1))
    p = float(np.mean(scores >= scores[-1]))
    most = sorted(zip(z[-1], own, strict=True), key=lambda pair: -abs(pair[0]))[:_NAMED]
    return Screened(
        pack.name,
        "unusual" if p <= rate else "not unusual",
        p,
        tuple(f"{name} is {value:+.1f} standard deviations from the clean packs" for value, name in most),
    )


def _deviations(values: np.ndarray) -> np.ndarray:
    """Returns how many standard deviations of all other rows each row ``[N, F]`` is from their mean."""
    rest = [np.delete(values, row, axis=0) for row in range(len(values))]
    means, deviations = (np.array([how(one, axis=0) for one in rest]) for how in (np.mean, np.std))
    scaled: np.ndarray = (values - means) / np.maximum(deviations, _FLOOR)
    return scaled


def figures(pack: Pack) -> dict[str, float]:
    """Returns what a screen looks at, by name: for each kind of module the mean over the layers, and the
    trend from layer to layer, of the size of the change, of the share of its energy in the first direction,
    and of its effective rank.

    Raises:
        NonFinite: a change is too large to have a spectrum.
        Unsupported: a change has no factors of its own.
    """
    adapters = list(pack.adapters())
    try:
        changes = [represent(adapter).factors for adapter in adapters]
    except Unsupported as error:
        raise Unsupported(
            f"a screen needs changes that factors alone hold: {error.what}",
            where=error.where,
            remedy="screen packs of a low-rank method that does not depend on the base, such as LoRA",
        ) from error
    modules: dict[str, list[tuple[float, ...]]] = {}
    for adapter, change, (_, S, _) in zip(adapters, changes, spectra(changes), strict=True):
        module, layer = place_of(adapter.site.path)
        energy = energy_of(S)
        if not math.isfinite(energy):
            raise NonFinite(
                "a change is too large to have a spectrum",
                where=f"{pack.name}, {adapter.site.path}",
                found=f"a change of rank {change.rank}",
                remedy="refuse this pack: no training ends with such numbers",
            )
        size = math.log(max(energy, _FLOOR**2)) / 2
        modules.setdefault(module, []).append((layer or 0, size, stable_rank(S), effective_rank(S)))
    found = {}
    for module, rows in modules.items():
        values = np.array(sorted(rows))[:, 1:]
        places = np.arange(len(values)) - (len(values) - 1) / 2
        trends = places @ values / (places @ places or 1.0)
        for name, mean, trend in zip(_FIGURES, values.mean(axis=0), trends, strict=True):
            found[f"{name} of {module}"], found[f"{name} of {module} by layer"] = float(mean), float(trend)
    return found
