"""PSOFT: a rotation in the principal subspace of the frozen weight (Wu et al. 2025, arXiv 2505.11235, section
4).

    y' = base(x) + B (R - I) A x,   W = U S V^T,   B A = the r largest terms of it

R = diag(b) Q diag(a) with a rotation Q from the Cayley transform (as in OFT), or a free [r, r] matrix. A =
V_r^T and B = U_r S_r; with ``pissa_init`` both contain the square root of S_r. PEFT's ``psoft_alpha`` cancels
out of A and B, so it has no effect.

With ``svd="lowrank"`` U_r, S_r and V_r are the estimate of Halko et al. (arXiv 0909.4061, algorithm 5.1) that
``torch.svd_lowrank`` computes from ``random_seed`` in ``svd_lowrank_niter`` rounds; torch's CPU generator
gives the same numbers on every machine.

A and B are recomputed from the weight in float32 wherever the adapter is used. The sign of a pair of singular
vectors is arbitrary, and R means something else for every choice, so here each left vector points along a
fixed random direction. PEFT uses the signs that its linear algebra library happens to return. They differ
between CPU and GPU and between libraries (about one pair in six between numpy and torch), so the meaning of
PEFT's PSOFT file depends on the machine. With the base at hand, this module reads and writes such files for
the current machine: if s are the signs of PEFT's vectors relative to ours, R in PEFT's frame is diag(s) R
diag(s), and so is the generator of a rotation.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from ..errors import Unsupported
from . import (
    METHODS,
    OPTIONAL,
    WIDEST,
    Array,
    Arrays,
    Dense,
    Estimate,
    Factorise,
    Method,
    NormalForm,
    Params,
    PeftConfig,
    PeftKeys,
    Random,
    RankConfig,
    Seed,
    Shapes,
    Site,
    Storage,
    Tensors,
    Terms,
    Traits,
    array_namespace,
    cayley,
    is_number,
    svd_lowrank,
)
from .core.orthogonal import skew, triangle, within

_MOST_ROUNDS = 100
"""The most rounds of power iteration; each costs four products of the weight with ``r`` columns. PEFT's
default is 10.
"""


@dataclass(frozen=True)
class PSOFT(RankConfig):
    """The hyper-parameters of PSOFT; the rank is at most the smaller width of a layer. ``svd``: "full", or
    "lowrank" for an estimate.

    Example:
        >>> PSOFT(r=16).rank
        16
    """

    r: Annotated[int, Meta(ge=2, le=WIDEST)] = 32
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    orth: bool = True
    mag_a: bool = True
    mag_b: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: Terms = 5
    cayley_neumann_eps: Annotated[float, Meta(gt=0, lt=1)] | None = None
    svd: Literal["full", "lowrank"] = field(default="full", metadata=OPTIONAL)
    svd_lowrank_niter: Annotated[int, Meta(ge=0, le=_MOST_ROUNDS)] = field(default=10, metadata=OPTIONAL)
    random_seed: Seed = field(default=0, metadata=OPTIONAL)


def _rank(cfg: PSOFT, site: Site) -> int:
    return min([cfg.r, *(width for width in (site.in_features, site.out_features) if width)])


def _shapes(cfg: PSOFT, site: Site) -> Shapes:
    r = _rank(cfg, site)
    vectors: Shapes = {
        f"vector_{side}": (r,) for side, there in (("a", cfg.mag_a), ("b", cfg.mag_b)) if there
    }
    return {"psoft_R": (r * (r - 1) // 2,) if cfg.orth else (r, r), **vectors}


def _init(cfg: PSOFT, site: Site, rng: Random) -> Arrays:
    made = {name: np.ones(shape, np.float32) for name, shape in _shapes(cfg, site).items()}
    return {
        **made,
        "psoft_R": 0 * made["psoft_R"] if cfg.orth else np.eye(_rank(cfg, site), dtype=np.float32),
    }


def _constants(cfg: PSOFT, site: Site) -> Arrays:
    r = _rank(cfg, site)
    U, S, V = _principal(cfg, site, r)
    # Fixes the arbitrary signs: each left vector has a positive product with one fixed random direction.
    along = np.where(np.random.default_rng(0).standard_normal(len(U)) @ U < 0, np.float32(-1), np.float32(1))
    U = U * along
    V = along[:, None] * V
    inner = np.sqrt(S[:r, None]) if cfg.ab_svd_init == "pissa_init" else np.ones((r, 1), np.float32)
    index, sign = triangle(r)
    turning = {"triangle": index, "sign": sign} if cfg.orth else {}
    return {"A": inner * V[:r], "B": U[:, :r] * (S[:r] / inner[:, 0]), **turning}


def _principal(cfg: PSOFT, site: Site, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns U, S and V^T of the weight in float32, at least the first ``r`` vectors, with the signs of
    numpy's decomposition.
    """
    weight = np.asarray(site.weight, np.float32)
    if cfg.svd == "full":
        U, S, V = np.linalg.svd(weight, full_matrices=False)
        return U, S, V
    U, S, V = svd_lowrank(weight, r, cfg.svd_lowrank_niter, cfg.random_seed)
    return U, S, V.T


def _normal_form(cfg: PSOFT, params: Params, site: Site) -> NormalForm:
    R = _rotation(cfg, params) if cfg.orth else params["psoft_R"]
    xp = array_namespace(R)
    if cfg.mag_b:
        R = params["vector_b"][:, None] * R
    if cfg.mag_a:
        R = R * params["vector_a"]
    change = R - xp.eye(R.shape[0], dtype=R.dtype, device=R.device)
    return NormalForm(down=Dense(params["A"]), up=Dense(xp.matmul(params["B"], change)))


def _rotation(cfg: PSOFT, params: Params) -> Array:
    values = params["psoft_R"][None, :]
    if cfg.use_cayley_neumann and cfg.cayley_neumann_eps is not None:
        values = within(values, cfg.cayley_neumann_eps)
    generator = skew(values, params["triangle"], params["sign"], params["A"].shape[0])
    return cayley(generator, cfg.num_cayley_neumann_terms if cfg.use_cayley_neumann else 0)[0, ...]


_SAME = 1e-4
"""How far the singular vectors of two libraries may differ: float32 rounds them to about 1e-7 of the first
value divided by the gap to the next one.
"""


def _change_frame(cfg: PSOFT, params: Tensors, site: Site, factorise: Factorise) -> tuple[PSOFT, Arrays]:
    """Converts parameters between this package's frame and PEFT's; the conversion is its own inverse."""
    r = _rank(cfg, site)
    if r < cfg.r:
        raise Unsupported(
            "PEFT has no PSOFT at a layer that is narrower than the rank",
            where=site.path,
            found=f"r={cfg.r}",
            expected=f"at most {r}",
            remedy="keep the pack as it is",
        )
    estimate = Estimate(r, cfg.svd_lowrank_niter, cfg.random_seed) if cfg.svd == "lowrank" else None
    U, S, V = factorise(np.asarray(site.weight, np.float32), estimate)
    constants = _constants(replace(cfg, ab_svd_init="psoft_init"), site)
    A = constants["A"]
    B = constants["B"] / S[:r]
    U = U[:, :r]
    V = V[:r]
    signs = np.where((A * V).sum(1) < 0, np.float32(-1), np.float32(1))
    off = max(float(np.abs(A - signs[:, None] * V).max()), float(np.abs(B - signs * U).max()))
    if not off <= _SAME:
        raise Unsupported(
            "singular values of this weight are so near to each other that no library says which vectors "
            "belong to them, so PEFT's file has no certain meaning",
            where=site.path,
            expected=f"vectors within {_SAME:g}",
            found=f"{off:.2g}",
            remedy="merge the adapter with the library that trained it, on the machine that did",
        )
    R = params["psoft_R"]
    both = np.outer(signs, signs).astype(R.dtype)
    return cfg, {**params, "psoft_R": R * (both[np.triu_indices(r, 1)] if cfg.orth else both)}


_KEYS = PeftKeys(
    PSOFT,
    (
        "r",
        "ab_svd_init",
        "orth",
        "mag_a",
        "mag_b",
        "use_cayley_neumann",
        "num_cayley_neumann_terms",
        "cayley_neumann_eps",
        "dropout",
        "svd",
        "svd_lowrank_niter",
        "random_seed",
    ),
    {"fan_in_fan_out": False, "init_weights": True},
    renamed={
        "orth": "psoft_orth",
        "mag_a": "psoft_mag_a",
        "mag_b": "psoft_mag_b",
        "dropout": "psoft_dropout",
        "svd": "psoft_svd",
        "svd_lowrank_niter": "psoft_svd_lowrank_niter",
    },
)


def _from_peft(config: PeftConfig) -> Any:
    alpha = config.get("psoft_alpha", 32)
    # the root of a negative alpha is NaN; a positive alpha cancels out
    if not is_number(alpha) or alpha <= 0:
        raise ValueError(f"psoft_alpha must be positive, not {alpha!r}")
    if config.get("psoft_svd") == "lowrank" and config.get("random_seed") is None:
        raise Unsupported(
            "an older PEFT estimated these singular vectors with random numbers that nothing repeats",
            expected="random_seed",
            found="psoft_svd 'lowrank' without it",
            remedy="merge it with the PEFT that made it, where that still runs",
        )
    return _KEYS.from_config(config)


psoft = METHODS.register(
    Method(
        name="psoft",
        summary="a trained rotation in the principal subspace of the frozen weight",
        paper="https://arxiv.org/abs/2505.11235",
        formula="y' = W x + b + U_r S_r (R - I) V_r^T x",
        config=PSOFT,
        traits=Traits(additive=True, low_rank=True, reads_weight=True, min_features=(2, 2)),
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        examples=(
            PSOFT(r=3),
            PSOFT(r=2, ab_svd_init="pissa_init", mag_a=False),
            PSOFT(r=5, orth=False, mag_b=False, dropout=0.1),
            PSOFT(r=4, use_cayley_neumann=True, cayley_neumann_eps=0.9),
            PSOFT(r=3, svd="lowrank", svd_lowrank_niter=4, random_seed=7),
        ),
        storage=Storage(constants=_constants),
        peft=_KEYS.form(
            peft_type="PSOFT",
            suffixes={
                "psoft_R": "psoft_R.weight",
                "vector_a": "psoft_R.vector_a",
                "vector_b": "psoft_R.vector_b",
            },
            to_config=lambda sites: {**_KEYS.to_config(sites), "psoft_alpha": next(iter(sites.values())).r},
            from_config=_from_peft,
            to_peft_with_base=_change_frame,
            overrides={"from_peft_with_base": _change_frame},
        ),
    )
)
