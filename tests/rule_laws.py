"""The laws of combination as functions: of adapterpack's rules, and of anything else that combines LoRA
packs.

A law raises ``AssertionError`` where it is broken. ``Combiner.run`` gives the changes, in float64, that come
out of packs and weights; with ``neutral`` under the parameters that change least, such as a density of 1.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from adapterpack.adapter_methods import Site
from adapterpack.adapter_methods.lora import LoRA, lora
from adapterpack.composing.pipeline import compose
from adapterpack.composing.rules.rule import RULES
from adapterpack.composing.statistics import Statistics
from adapterpack.errors import AdapterpackError, NothingToDo
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import Pack, build
from adapterpack.pack.validate.validation import load

Deltas = dict[str, np.ndarray]
SITES = (Site("layers.q_proj", 33, 17), Site("layers.v_proj", 17, 40))
WHOLE = 17
"""The rank that every change of these sites has room in: at this rank nothing is cut."""
EQUAL, MIXED = LoRA(r=3, alpha=5), (LoRA(r=2, alpha=7), LoRA(r=5, alpha=4), LoRA(r=4, alpha=2))
TOLERANCE = 2e-5
"""Of the size of the result: factors in float32, a few decompositions, and changes that partly cancel."""


class Combiner(Protocol):
    """Something that combines packs."""

    weights: Sequence[float]

    def run(self, packs: Sequence[Pack], weights: Sequence[float], *, neutral: bool = False) -> Deltas:
        """The changes of the combination; zeros where nothing is left."""
        ...

    def reloaded(self, packs: Sequence[Pack], weights: Sequence[float]) -> Deltas:
        """The changes of the combination after it was written and read."""
        ...


class Ours:
    """A rule of adapterpack."""

    def __init__(self, rule: str) -> None:
        self.rule = RULES[rule]
        # rules of two; of directions that agree
        special = {"slerp": [0.7, 0.4], "nuslerp": [0.7, 0.4], "model_stock": [0.7, 0.4, 1.1]}
        self.weights = special.get(rule, [0.7, -0.4, 1.1])

    def pack(
        self,
        packs: Sequence[Pack],
        weights: Sequence[float] | None,
        params: dict[str, Any] | None = None,
        **options: Any,
    ) -> Pack:
        """The composed pack, with nothing cut off unless ``options`` say so."""
        options = {"rank": WHOLE if self.rule.cut else None, **options}
        statistics = (
            [measured(pack, self.rule.statistics) for pack in packs] if self.rule.statistics else None
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return compose(
                packs, rule=self.rule.name, weights=weights, params=params, statistics=statistics, **options
            )

    def run(self, packs: Sequence[Pack], weights: Sequence[float], *, neutral: bool = False) -> Deltas:
        """See :class:`Combiner`."""
        try:
            return deltas(self.pack(packs, weights, dict(self.rule.neutral) if neutral else None))
        except NothingToDo:
            return times(deltas(packs[0]), 0.0)

    def reloaded(self, packs: Sequence[Pack], weights: Sequence[float]) -> Deltas:
        """See :class:`Combiner`."""
        with tempfile.TemporaryDirectory() as folder:
            self.pack(packs, weights, out=Path(folder) / "out")
            return deltas(load(Path(folder) / "out"))


def made(
    seed: int, cfg: LoRA = EQUAL, *, turned: bool = False, factor: float = 1.0, sites: Sequence[Site] = SITES
) -> Pack:
    """A pack of random factors that have something in common with other seeds'; ``turned``: the same change
    in other factors.
    """
    rng, turn, common = (
        np.random.default_rng(seed),
        np.random.default_rng(seed + 1000),
        np.random.default_rng(99),
    )
    adapters = {}
    for site in sites:
        n, out = site.in_features or 0, site.out_features or 0
        A, B = rng.standard_normal((cfg.r, n)), rng.standard_normal((out, cfg.r))
        A, B = (
            A + common.standard_normal((9, n))[: cfg.r],
            factor * (B + common.standard_normal((out, 9))[:, : cfg.r]),
        )
        if turned:
            Q = turn.standard_normal((cfg.r, cfg.r)) + 2 * np.eye(cfg.r)
            A, B = Q @ A, B @ np.linalg.inv(Q)
        adapters[site] = (cfg, {"lora_A": A.astype(np.float32), "lora_B": B.astype(np.float32)})
    return _built(f"pack-{seed}", adapters)


def measured(pack: Pack, kind: str) -> Statistics:
    """Statistics as data would give them, drawn by the pack's name and the site: correlated moments, or
    positive squares.
    """
    matrices = {}
    for a in pack.adapters():
        rng = np.random.default_rng([ord(letter) for letter in f"{pack.name}:{a.site.path}"])
        m, n = a.site.out_features or 0, a.site.in_features or 0
        X = (
            rng.standard_normal((3 * n, n)) @ rng.standard_normal((n, n))
            if kind == "moment"
            else rng.standard_normal((m, n))
        )
        matrices[a.site.path] = (X.T @ X / len(X) if kind == "moment" else X**2).astype(np.float32)
    return Statistics(kind, pack.id, 100, matrices, f"sha256:{sha256(pack.name.encode()).hexdigest()}")


def deltas(pack: Pack) -> Deltas:
    """The changes of a LoRA pack, from its tensors, in float64."""
    return {
        a.site.path: a.config.scale
        * a.params["lora_B"].astype(np.float64)
        @ a.params["lora_A"].astype(np.float64)
        for a in pack.adapters()
    }


def times(parts: Deltas, factor: float) -> Deltas:
    """All changes times a number."""
    return {path: factor * delta for path, delta in parts.items()}


def close(found: Deltas, wanted: Deltas, size: float = 0.0) -> None:
    """Equal at every site, relative to the larger of what is wanted and ``size``."""
    assert found.keys() == wanted.keys()
    for path, delta in wanted.items():
        error = float(np.linalg.norm(found[path] - delta))
        assert error <= TOLERANCE * max(float(np.linalg.norm(delta)), size), f"{path}: {error:g}"


def identity(c: Combiner) -> None:
    """A lone pack of weight 1 is itself."""
    close(c.run([made(1)], [1.0], neutral=True), deltas(made(1)))


def sums(c: Combiner) -> None:
    """The weighted sum of the changes, at density 1."""
    packs = _some(c)
    parts = [times(deltas(pack), w) for w, pack in zip(c.weights, packs, strict=True)]
    close(
        c.run(packs, c.weights, neutral=True),
        {path: np.sum([part[path] for part in parts], axis=0) for path in parts[0]},
    )


def permutation(c: Combiner) -> None:
    """The order of the packs changes nothing."""
    packs = _some(c)
    close(c.run(packs[::-1], c.weights[::-1]), c.run(packs, c.weights))


def gauge(c: Combiner) -> None:
    """``B M^-1``, ``M A`` counts as the same adapter as ``B``, ``A``."""
    packs = _some(c)
    close(c.run([made(1, turned=True), *packs[1:]], c.weights), c.run(packs, c.weights))


def homogeneous(c: Combiner) -> None:
    """All changes times 1/8 give the result times 1/8."""
    packs = [made(seed, factor=0.125) for seed in range(1, 1 + len(c.weights))]
    close(c.run(packs, c.weights), times(c.run(_some(c), c.weights), 0.125))


def weighted(c: Combiner) -> None:
    """The weight of a lone pack multiplies."""
    close(c.run([made(1)], [0.25]), times(c.run([made(1)], [1.0]), 0.25))


def odd(c: Combiner) -> None:
    """All weights negated negate the result."""
    packs = _some(c)
    close(c.run(packs, [-w for w in c.weights]), times(c.run(packs, c.weights), -1.0))


def cancels(c: Combiner) -> None:
    """``a - a = 0``."""
    for seed in (1, 2, 3):
        size = min(float(np.linalg.norm(delta)) for delta in deltas(made(seed)).values())
        close(c.run([made(seed), made(seed)], [1.0, -1.0]), times(deltas(made(seed)), 0.0), size)


def mixed_ranks(c: Combiner) -> None:
    """Packs of different ranks and alphas are combined as the same changes of one rank are."""
    packs = [made(seed, cfg) for seed, cfg in enumerate(MIXED, 1)][: len(c.weights)]
    close(c.run(packs, c.weights), c.run([padded(pack) for pack in packs], c.weights))


def zero_weight(c: Combiner) -> None:
    """A pack of weight 0 is absent."""
    close(c.run([made(1), made(3), made(2)], [0.7, 0.0, 0.4]), c.run([made(1), made(2)], [0.7, 0.4]))


def rslora(c: Combiner) -> None:
    """Only the scale counts, not whether ``alpha / sqrt(r)`` or ``alpha / r`` says it."""
    plain, stable = (
        [made(seed, cfg) for seed in range(1, 1 + len(c.weights))]
        for cfg in (LoRA(r=4, alpha=8), LoRA(r=4, alpha=4, use_rslora=True))
    )
    close(c.run(stable, c.weights), c.run(plain, c.weights))


def reload(c: Combiner) -> None:
    """Written and read, the changes are the same."""
    close(c.reloaded(_some(c), c.weights), c.run(_some(c), c.weights))


LAWS: tuple[Callable[[Combiner], None], ...] = (
    identity, sums, permutation, gauge, homogeneous, weighted, odd, cancels, mixed_ranks, zero_weight, rslora,
    reload,
)  # fmt: skip


def verdict(law: Callable[[Combiner], None], combiner: Combiner) -> str:
    """``yes``, ``no``, or ``refused``: what a law says of a combiner."""
    try:
        law(combiner)
    except AssertionError:
        return "no"
    except (AdapterpackError, ValueError, RuntimeError, KeyError):
        return "refused"
    return "yes"


def padded(pack: Pack) -> Pack:
    """The same changes as a LoRA of rank 6 and scale 1, with zeros in the place of what is missing."""
    adapters = {}
    for a in pack.adapters():
        A, B = a.params["lora_A"], (a.config.scale * a.params["lora_B"]).astype(np.float32)
        more = 6 - len(A)
        adapters[a.site] = (
            LoRA(r=6, alpha=6),
            {"lora_A": np.pad(A, ((0, more), (0, 0))), "lora_B": np.pad(B, ((0, 0), (0, more)))},
        )
    return _built(pack.name, adapters)


def _some(c: Combiner) -> list[Pack]:
    return [made(seed) for seed in range(1, 1 + len(c.weights))]


def _built(name: str, adapters: Any) -> Pack:
    base = m.Base("acme/base", None, "llama", "bfp1:" + "1" * 64, "bfp1:" + "2" * 64)
    return build(name, lora, adapters, task=m.PackTask("text-generation"), base=base)
