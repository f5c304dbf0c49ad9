"""Compacter: a bottleneck whose two matrices are sums of Kronecker products (Mahabadi et al. 2021, arXiv
2106.04647, section 4).

    h' = h + s (U act(D h + b_down) + b_up)
    D = sum_i A_i (x) (s_i t_i),   U likewise with its own factors

The rules A_i ``[n, n]`` may be shared by all sites and both matrices (one tensor in the pack), and may be
products ``[n, k] [k, n]``; s_i t_i always have rank ``k``. Widths that n does not divide are rounded up and
the result is cut; the bottleneck is rounded up to a multiple of n. The left factors of U and the biases start
at zero, so that a fresh adapter changes nothing. The rules start normal with variance 1/n, because smaller
values would let hardly any gradient through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from . import (
    FOR_TRAINING,
    METHODS,
    Array,
    Arrays,
    BlockConfig,
    BlockForm,
    Dense,
    Method,
    Params,
    PositiveInt,
    Random,
    Shapes,
    Shared,
    Site,
    Storage,
    array_namespace,
    normal,
)
from .forms.blocks import TRAITS


@dataclass(frozen=True, kw_only=True)
class Compacter(BlockConfig):
    """The hyper-parameters of Compacter; ``targets="all-ffn"`` makes it Compacter++. ``phm_dim`` is n,
    ``phm_rank`` is k.

    Example:
        >>> Compacter().at("layers.0.mlp").act
        'gelu'
    """

    targets: str | tuple[str, ...] = field(default="all-blocks", metadata=FOR_TRAINING)
    reduction: float = 32
    act: str = "gelu"
    phm_dim: PositiveInt = 4
    phm_rank: PositiveInt = 1
    shared_rule: bool = True
    factorized_rule: bool = False

    def width(self, site: Site) -> int:
        """Returns how wide the bottleneck is at a site: a multiple of ``phm_dim``."""
        return self.phm_dim * math.ceil(super().width(site) / self.phm_dim)


def _rule_shapes(cfg: Compacter) -> Shapes:
    n, k = cfg.phm_dim, cfg.phm_rank
    return {"rule_left": (n, n, k), "rule_right": (n, k, n)} if cfg.factorized_rule else {"rule": (n, n, n)}


def _rules(cfg: Compacter, rng: Random) -> Arrays:
    """Draws random rules; a product of two factors gets the same variance as a single rule."""
    inner = cfg.phm_rank if cfg.factorized_rule else 1
    std = (1 / cfg.phm_dim / inner) ** (0.25 if cfg.factorized_rule else 0.5)
    return {name: normal(rng, shape, std) for name, shape in _rule_shapes(cfg).items()}


def _shapes(cfg: Compacter, site: Site) -> Shapes:
    n = cfg.phm_dim
    k = cfg.phm_rank
    r = cfg.width(site)
    wide = math.ceil(site.out_features / n)
    narrow = r // n
    factors = {
        "down_left": (n, narrow, k),
        "down_right": (n, k, wide),
        "down_bias": (r,),
        "up_left": (n, wide, k),
        "up_right": (n, k, narrow),
        "up_bias": (site.out_features,),
    }
    return factors if cfg.shared_rule else {**_rule_shapes(cfg), **factors}


def _init(cfg: Compacter, site: Site, rng: Random) -> Arrays:
    made = {} if cfg.shared_rule else _rules(cfg, rng)
    for name, shape in _shapes(cfg, site).items():
        if name in {"down_left", "down_right", "up_right"}:
            bound = math.sqrt(6 / (shape[1] + shape[2]))  # Glorot uniform, as in the paper
            made[name] = rng.uniform(-bound, bound, shape).astype(np.float32)
        elif name not in made:
            made[name] = np.zeros(shape, np.float32)
    return made


def kronecker_sum(rules: Array, factors: Array, rows: int, columns: int) -> Array:
    """Computes ``sum_i rules[i] (x) factors[i]`` of ``[n, p, q]`` and ``[n, a, b]``, cut to ``[rows,
    columns]``, with one matrix product.

    Example:
        >>> kronecker_sum(np.ones((1, 1, 2)), np.array([[[3.0], [4.0]]]), 2, 2)
        array([[3., 3.],
               [4., 4.]])
    """
    xp = array_namespace(rules, factors)
    n, p, q = rules.shape
    _, a, b = factors.shape
    product = xp.matmul(xp.reshape(rules, (n, p * q)).T, xp.reshape(factors, (n, a * b)))
    # Interleaves the axes of rule and factor, which turns the outer product into a Kronecker product.
    grid = xp.permute_dims(xp.reshape(product, (p, q, a, b)), (0, 2, 1, 3))
    return xp.reshape(grid, (p * a, q * b))[:rows, :columns]


def _normal_form(cfg: Compacter, params: Params, site: Site) -> BlockForm:
    xp = array_namespace(params["down_left"])
    rules = xp.matmul(params["rule_left"], params["rule_right"]) if cfg.factorized_rule else params["rule"]
    r = cfg.width(site)
    width = site.out_features
    down = kronecker_sum(rules, xp.matmul(params["down_left"], params["down_right"]), r, width)
    up = kronecker_sum(rules, xp.matmul(params["up_left"], params["up_right"]), width, r)
    return BlockForm(
        down=Dense(down),
        up=Dense(cfg.scale * up),
        down_bias=params["down_bias"],
        up_bias=cfg.scale * params["up_bias"],
        act=cfg.act,
        reads_input=cfg.reads_input,
    )


def _expanded_size(cfg: Compacter, site: Site) -> int:
    """Returns the size of both matrices before they are cut, plus the rules."""
    n = cfg.phm_dim
    return 2 * (cfg.width(site) + n) * (site.out_features + n) + n**3


compacter = METHODS.register(
    Method(
        name="compacter",
        summary="a bottleneck of Kronecker products, whose rules all sites may share",
        paper="https://arxiv.org/abs/2106.04647",
        formula="h + scaling (U act(D z)), U and D sums of Kronecker products",
        kind="activation",
        config=Compacter,
        traits=TRAITS,
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        examples=(
            Compacter(reduction=2, phm_dim=2),
            Compacter(reduction=3, phm_dim=3, phm_rank=2, shared_rule=False, act="silu"),
            Compacter(reduction=2, factorized_rule=True, act="tanh", scaling=2.0),
            Compacter(
                reduction=4, phm_dim=2, factorized_rule=True, shared_rule=False, source="input", phm_rank=2
            ),
        ),
        storage=Storage(
            expanded_size=_expanded_size,
            shared=Shared(
                lambda cfg, sites: _rule_shapes(cfg) if cfg.shared_rule else {},
                lambda cfg, sites, rng: _rules(cfg, rng) if cfg.shared_rule else {},
            ),
        ),
    )
)
