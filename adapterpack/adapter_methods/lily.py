"""Lily: layers share their low-rank factors, and a router at each layer mixes several up-projections (Zhong
et al. 2024, arXiv 2407.09946, section 3).

    y_t = base(x_t) + s sum_e p_e B_e^T A x_t,   p = mean over the tokens t of softmax(R A x_t)

A ``[r, in]`` is shared by ``stride`` consecutive layers with the same name and shape, and the ``num_experts``
B_e ``[r, out]`` by all of them; R ``[num_experts, r]`` belongs to one layer. The mean is over the tokens of a
row without its padding. PEFT takes it over all tokens of a batch including padding, so that its result for a
row depends on the other rows; with one row per batch both agree. Tokens in a KV cache no longer pass through
the layer, so a Lily adapter refuses to use a cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import numpy as np
from msgspec import Meta

from . import (
    MASKS,
    METHODS,
    MOST_SITES,
    Array,
    FiniteFloat,
    Method,
    NormalForm,
    Params,
    PeftKeys,
    PositiveInt,
    RankConfig,
    Route,
    Shape,
    Shapes,
    Shared,
    Site,
    SoftmaxGate,
    Storage,
    Traits,
    array_namespace,
    kaiming,
    zeros,
)
from .core.routers import mask_of

_MOST_EXPERTS = 1 << 10
_REFUSED = {
    "fold": "its weights are means over the tokens of a row, which no weight of a layer knows",
    "graph": "its router looks at all tokens of a row, and a graph's slots at one",
    "cache": "its router looks at all tokens of a row",
}


@dataclass(frozen=True)
class Lily(RankConfig):
    """The hyper-parameters of Lily. ``block`` is the number of a site's A among those of the layers of its
    name and shape; with ``spread`` every site has a copy of A and B, as in PEFT's files, and trains it by
    itself.

    Example:
        >>> Lily(r=32, stride=4, num_experts=8).scale
        1.0
    """

    r: PositiveInt = 32
    stride: Annotated[int, Meta(ge=1, le=MOST_SITES)] = 1
    num_experts: Annotated[int, Meta(ge=2, le=_MOST_EXPERTS)] = 2
    scaling: FiniteFloat = 1.0
    block: Annotated[int, Meta(ge=0, le=MOST_SITES)] | None = None
    spread: bool = False

    @property
    def scale(self) -> float:
        """``s``, the number that multiplies the branch."""
        return self.scaling

    @property
    def redundant(self) -> bool:
        """Whether every site stores its own copies, as PEFT expects."""
        return self.spread


class _Mean(NamedTuple):
    """Averages the weights of a gate over the tokens of each row that are not padding."""

    gate: SoftmaxGate
    masks: tuple[Array, ...]

    def weights(self, x: Array) -> Array:
        """``[rows, tokens, in]`` to ``[rows, 1, experts]``; an input without a token axis counts as one
        token.
        """
        weights = self.gate.weights(x)
        xp = array_namespace(weights)
        tokens = tuple(range(1, weights.ndim - 1))
        mask = mask_of(self.masks, tuple(weights.shape[:-1]), "lily")
        if mask is None:
            return xp.mean(weights, axis=tokens, keepdims=True) if tokens else weights
        kept = xp.astype(mask, weights.dtype)[..., None]
        total = xp.sum(kept, axis=tokens, keepdims=True)
        # A row that is only padding would divide by zero.
        total = xp.where(total > 0, total, xp.ones_like(total))
        return xp.sum(weights * kept, axis=tokens, keepdims=True) / total


def _group(site: Site) -> str:
    """Returns the key of the sites that share factors (name and shape), as it occurs in the names of the
    shared parameters.
    """
    return f"{site.path.rpartition('.')[2]}_{site.out_features}x{site.in_features}"


def _resolve(configs: Sequence[Any], sites: Sequence[Site]) -> list[Any]:
    """Numbers the blocks in the order of the model's modules."""
    if any(cfg.block is not None or cfg.spread for cfg in configs):
        return list(configs)
    seen: dict[str, int] = {}
    resolved = []
    for cfg, site in zip(configs, sites, strict=True):
        number = seen.get(_group(site), 0)
        seen[_group(site)] = number + 1
        resolved.append(replace(cfg, block=number // cfg.stride))
    return resolved


def _factors(cfg: Lily, site: Site) -> Shapes:
    return {"lily_A": (cfg.r, site.in_features), "lily_B": (cfg.num_experts * cfg.r, site.out_features)}


def _shapes(cfg: Lily, site: Site) -> Shapes:
    return {"lily_router": (cfg.num_experts, cfg.r), **(_factors(cfg, site) if cfg.spread else {})}


def _names(cfg: Lily, site: Site) -> dict[str, str]:
    """Maps ``lily_A`` and ``lily_B`` to the names of the site's parameters."""
    if cfg.spread:
        return {name: name for name in ("lily_A", "lily_B")}
    return {"lily_A": f"lily_A_{_group(site)}_{cfg.block or 0}", "lily_B": f"lily_B_{_group(site)}"}


def _common(cfg: Lily, sites: Sequence[Site]) -> Iterator[tuple[str, Shape]]:
    groups: dict[str, list[Site]] = {}
    for site in () if cfg.spread else sites:
        groups.setdefault(_group(site), []).append(site)
    for group, members in groups.items():
        shapes = _factors(cfg, members[0])
        yield f"lily_B_{group}", shapes["lily_B"]
        yield from (
            (f"lily_A_{group}_{block}", shapes["lily_A"])
            for block in range(math.ceil(len(members) / cfg.stride))
        )


def _normal_form(cfg: Lily, params: Params, site: Site) -> NormalForm:
    A, B = (params[name] for name in _names(cfg, site).values())
    xp = array_namespace(A, B)
    masks = tuple(params[name] for name in MASKS if name in params)
    gate = _Mean(SoftmaxGate(xp.matmul(params["lily_router"], A), cfg.num_experts), masks)
    return NormalForm(
        routes=(
            Route(
                gate, xp.concat([A] * cfg.num_experts, axis=0), cfg.scale * B.T, (cfg.r,) * cfg.num_experts
            ),
        )
    )


_KEYS = PeftKeys(
    Lily,
    ("r", "stride", "num_experts", "scaling"),
    {"init_weights": True},
    renamed={"stride": "stride_A", "num_experts": "num_B"},
)


lily = METHODS.register(
    Method(
        name="lily",
        summary="low-rank factors that layers share, and a router that mixes those on the way up",
        paper="https://arxiv.org/abs/2407.09946",
        formula="y'_t = W x_t + b + s sum_e p_e B_e^T A x_t,  p = mean_t softmax(R A x_t)",
        config=Lily,
        traits=Traits(row_separable=False, batchable=False, layers=("linear",)),
        shapes=_shapes,
        init=zeros(_shapes, lily_router=kaiming, lily_A=kaiming),
        normal_form=_normal_form,
        examples=(Lily(r=3), Lily(r=2, stride=2, num_experts=3, scaling=0.5)),
        storage=Storage(
            shared=Shared(
                lambda cfg, sites: dict(_common(cfg, sites)),
                lambda cfg, sites, rng: {
                    name: kaiming(rng, shape) if name.startswith("lily_A") else np.zeros(shape, np.float32)
                    for name, shape in _common(cfg, sites)
                },
            ),
            expanded_size=lambda cfg, site: cfg.num_experts * cfg.r * (site.in_features + site.out_features),
            resolve=_resolve,
        ),
        overrides={"refuse": lambda stage: _REFUSED.get(stage, "")},
        peft=_KEYS.form(
            peft_type="LILY",
            suffixes={
                "lily_A": "lily_A.weight",
                "lily_B": "lily_B.weight",
                "lily_router": "lily_router.weight",
            },
            to_config=lambda sites: _KEYS.to_config(sites) if next(iter(sites.values())).spread else None,
            from_config=lambda config: replace(_KEYS.from_config(config), spread=True),
            features=lambda params: (
                (params["lily_A"].shape[1], params["lily_B"].shape[1]) if "lily_A" in params else (None, None)
            ),
            shared={"lily_A": "base_model.lily_A", "lily_B": "base_model.lily_B"},
            # copies the shared A and B to the site, as PEFT stores them
            to_peft_with_base=lambda cfg, params, site, factorise: (
                replace(cfg, spread=True, block=None),
                {
                    **params,
                    **{name: site.shared[own] for name, own in _names(cfg, site).items() if not cfg.spread},
                },
            ),
        ),
    )
)
