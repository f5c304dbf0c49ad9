"""AdaMSS: divides the rows of a weight into groups, each with its own small change within the span of the
weight's first singular vectors (Zheng et al. 2025, NeurIPS, "Adaptive Multi-Subspace").

    W'_k = W_k + B_k A_k P,   b'_k = b_k + B_k A_k p

[W, b] is approximated by U S [P, p] of rank r; k-means divides the rows of U into ``num_subspaces`` groups,
and W_k are the rows of group k. A_k ``[subspace_rank, r]`` starts as the first directions of U's rows in the
group, B_k ``[rows, subspace_rank]`` as zero. Without a bias there is no p. A pack stores the group of each
row, and P and p.

PEFT stores no groups: its file has a B_k for each group, and PEFT decomposes and groups the weight again
whenever it loads the file. This module therefore needs the base to read and write PEFT's file, and repeats
the same steps: torch's random start, two rounds of subspace iteration, scikit-learn's k-means. If PEFT ran on
a GPU, whose random start differs, the file's own P implies the result (only in float32 is it exact enough).
Rounding may put a row that lies between two groups into either, so the computation is repeated with
perturbations as large as rounding errors, and the groups are accepted only if all runs that match the sizes
of the file's B_k agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import ml_dtypes
import numpy as np
from msgspec import Meta

from ..errors import Unsupported
from ..extras import needed_by
from . import (
    FOR_TRAINING,
    LINEAR,
    METHODS,
    OPTIONAL,
    WIDEST,
    Arrays,
    Dense,
    Factorise,
    FiniteFloat,
    Method,
    NormalForm,
    Params,
    PeftContent,
    PeftKeys,
    PositiveInt,
    Random,
    Seed,
    Shapes,
    Site,
    SiteConfig,
    Storage,
    Tensors,
    Training,
    Traits,
    array_namespace,
    pattern_of,
    svd_lowrank,
)

MOST_GROUPS = 1024
_ROUNDS = 2
"""How many rounds of subspace iteration PEFT takes."""


@dataclass(frozen=True)
class AdaMSS(SiteConfig):
    """The hyper-parameters of AdaMSS, under PEFT's names. ``random_seed`` begins the estimate of the singular
    vectors.

    With ``use_dynamic_rank`` a group starts with as many directions as it has singular values (of U U^T
    within the group) above ``svd_threshold`` times the first. ``length`` is the length of a layer's singular
    vectors, its inputs plus one for a bias; it follows from the layer, and ``lengths`` holds it for each site
    of a PEFT file. ``parts`` is set if the tensors are in PEFT's form: the number of rows and the rank of
    each group.

    Example:
        >>> AdaMSS(r=64, num_subspaces=4).subspace_rank
        1
    """

    r: PositiveInt = 100
    num_subspaces: Annotated[int, Meta(ge=1, le=MOST_GROUPS)] = 5
    subspace_rank: Annotated[int, Meta(ge=1, le=WIDEST // MOST_GROUPS)] = 1
    use_dynamic_rank: bool = False
    svd_threshold: FiniteFloat = 0.1
    random_seed: Seed = 0
    length: PositiveInt | None = None
    lengths: Mapping[str, int] = pattern_of("length", **FOR_TRAINING)
    parts: tuple[tuple[int, int], ...] | None = field(default=None, metadata=OPTIONAL)

    @property
    def rank(self) -> int:
        """The largest total number of directions of all groups."""
        return self.num_subspaces * self.subspace_rank

    @property
    def redundant(self) -> bool:
        """True: the singular vectors and groups are stored, because another machine would estimate different
        ones.
        """
        return True


def _sizes(cfg: AdaMSS, site: Site) -> tuple[int, int, int]:
    """Returns the number of groups, the number of singular vectors and the length of each vector."""
    length = cfg.length or (site.in_features + site.bias if site.in_features else 0)
    vectors = min([cfg.r, *(width for width in (length, site.out_features) if width)])
    return min(cfg.num_subspaces, site.out_features or cfg.num_subspaces), vectors, length


def _shapes(cfg: AdaMSS, site: Site) -> Shapes:
    groups, r, length = _sizes(cfg, site)
    basis = {"adamss_newB": (r, length)}
    if cfg.parts is not None:
        As = {f"adamss_A.{k}": (rank, r) for k, (_, rank) in enumerate(cfg.parts)}
        return {**As, **{f"adamss_B.{k}": part for k, part in enumerate(cfg.parts)}, **basis}
    return {
        "adamss_A": (groups, cfg.subspace_rank, r),
        "adamss_B": (site.out_features, cfg.subspace_rank),
        "adamss_groups": (site.out_features,),
        **basis,
    }


def _augment(site: Site, dtype: Any = np.float32) -> np.ndarray:
    """Returns ``[W, b]``, or W if there is no bias, in float32 after rounding to the ``dtype`` of a model."""
    matrix = np.asarray(site.weight).astype(dtype).astype(np.float32)
    bias = site.base_bias
    if bias is None:
        return matrix
    return np.concatenate([matrix, np.asarray(bias).astype(dtype).astype(np.float32)[:, None]], axis=1)


def _group(points: np.ndarray, count: int) -> np.ndarray:
    """Returns the group of each of the ``points`` ``[n, r]`` by k-means in float64, with PEFT's settings.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    with needed_by("AdaMSS"):
        from sklearn.cluster import KMeans  # noqa: PLC0415 - only this method needs it

    means = KMeans(count, init="random", n_init=1, max_iter=10, random_state=123456789)
    groups: np.ndarray = means.fit(points.astype(np.float64)).labels_
    return groups


_TRIES = 6


def _find_groups(
    cfg: AdaMSS, site: Site, matrix: np.ndarray, stored: np.ndarray | None
) -> set[tuple[int, ...]]:
    """Returns all groups of the rows that are found from singular vectors perturbed as much as rounding may
    change them.

    ``stored``: P and p of a PEFT file, ``[r, in]``, which must belong to this weight.

    Raises:
        Unsupported: the stored vectors do not belong to this weight.
    """
    groups, r, _ = _sizes(cfg, site)
    (U, _, V), (rounded, _, also) = (
        svd_lowrank(matrix, r, _ROUNDS, cfg.random_seed, dtype) for dtype in (np.float64, np.float32)
    )
    noise = max(_outside(also.T, V), float(np.finfo(np.float32).eps))
    several = [U, rounded]
    if stored is not None:
        step = float(ml_dtypes.finfo(_precision(stored)).eps)
        off = _outside(stored, V)
        if off <= 16 * max(step, noise):
            noise = max(noise, off if off > step else 0.0)
        else:
            U, noise = _imply(matrix, stored)
            several = [U]
        if not noise <= _MOST_NOISE:
            raise Unsupported(
                "the singular vectors in this file are not those of this base's weight: it belongs to "
                "another base, or was "
                "made on a GPU in half precision, which do not determine them exactly enough",
                where=site.path,
                expected=f"orthonormal left vectors, within {_MOST_NOISE:g}",
                found=f"{noise:.2g}",
                remedy="merge it with PEFT on the machine that trained it",
            )
    # Perturbs the vectors as much as rounding might have: only groups that never change are certain.
    rng = np.random.default_rng(0)
    size = noise * float(np.sqrt(np.square(U).mean()))
    several += [U + size * rng.standard_normal(U.shape) for _ in range(_TRIES)]
    return {tuple(_group(points, groups).tolist()) for points in several}


_MOST_NOISE = 1e-3
"""The largest accepted noise, relative to the length of a left vector. With more, many rows could belong to
either of two groups.
"""


def _imply(matrix: np.ndarray, stored: np.ndarray) -> tuple[np.ndarray, float]:
    """Computes U ``[out, r]`` from the V of a file, ``[r, in]``, alone; returns U and how far its columns are
    from orthonormal, which they are if V belongs to this weight.

    A GPU starts its estimate from other random numbers than a CPU and ends with other values for the last
    vectors. But for any start ``W V = U S`` holds for a wide weight, and ``W^T U = V S`` for a tall one, with
    U in the span of W's columns; S are the lengths. For a tall weight, the directions with singular values
    below a 16th of the r-th are dropped: they contribute less than 16^-5 to U, because the iteration
    multiplies them by the fifth power, and rounding errors would dominate.
    """
    W = matrix.astype(np.float64)
    V = stored.T.astype(np.float64)
    lost = 0.0
    if W.shape[0] < W.shape[1]:
        U = W @ V
    else:
        values, vectors = np.linalg.eigh(W.T @ W)
        kept = values > values[-V.shape[1]] / 256
        U = W @ ((vectors[:, kept] / values[kept]) @ (vectors[:, kept].T @ V))
        lost = float(np.linalg.norm(W.T @ U - V) / np.linalg.norm(V))
    U = U / np.linalg.norm(U, axis=0)
    return U, max(lost, float(np.linalg.norm(U.T @ U - np.eye(V.shape[1]))) / np.sqrt(V.shape[1]))


def _outside(rows: np.ndarray, V: np.ndarray) -> float:
    """Returns the part of the ``rows`` ``[r, in]`` outside of the span of V ``[in, r]``, relative to their
    norm.
    """
    wide = rows.astype(np.float64)
    return float(np.linalg.norm(wide - wide @ V @ V.T)) / max(float(np.linalg.norm(wide)), 1e-30)


def _init(cfg: AdaMSS, site: Site, rng: Random) -> Arrays:
    count, r, _ = _sizes(cfg, site)
    U, _, V = svd_lowrank(_augment(site), r, _ROUNDS, cfg.random_seed)
    groups = _group(U, count)
    A = np.zeros((count, cfg.subspace_rank, r), np.float32)
    for k in range(count):
        values, directions = np.linalg.svd(U[groups == k], full_matrices=False)[1:]
        kept = min(cfg.subspace_rank, len(values))
        if cfg.use_dynamic_rank:  # the threshold applies to U U^T, whose singular values are the squares
            kept = max(1, min(kept, int((values**2 > cfg.svd_threshold * values[0] ** 2).sum())))
        A[k, :kept] = directions[:kept]
    return {
        "adamss_A": A,
        "adamss_B": np.zeros((site.out_features, cfg.subspace_rank), np.float32),
        "adamss_groups": groups.astype(np.int32),
        "adamss_newB": np.ascontiguousarray(V.T, np.float32),
    }


def _normal_form(cfg: AdaMSS, params: Params, site: Site) -> NormalForm:
    A, B, groups, vectors = (params[f"adamss_{name}"] for name in ("A", "B", "groups", "newB"))
    xp = array_namespace(B)
    count, rank, r = A.shape
    # One-hot membership puts each row's B into the columns of its own group, so all groups form one pair of
    # factors.
    own = xp.astype(groups[:, None] == xp.arange(count, dtype=groups.dtype, device=groups.device), B.dtype)
    up = xp.reshape(own[:, :, None] * B[:, None, :], (B.shape[0], count * rank))
    down = xp.matmul(xp.reshape(A, (count * rank, r)), vectors)
    if vectors.shape[1] == site.in_features:
        return NormalForm(down=Dense(down), up=Dense(up))
    return NormalForm(down=Dense(down[:, :-1]), up=Dense(up), shift=xp.matmul(up, down[:, -1]))


def _require(cfg: AdaMSS, params: Params, site: Site) -> None:
    groups = np.asarray(params.get("adamss_groups", np.zeros(0, np.int32)))
    if groups.dtype.kind not in "iu" or (
        groups.size and not 0 <= groups.min() <= groups.max() < _sizes(cfg, site)[0]
    ):
        raise ValueError(f"the groups of rows are numbers from 0 to {_sizes(cfg, site)[0] - 1}")
    if site.in_features and cfg.length is not None and cfg.length - site.in_features not in {0, 1}:
        raise ValueError(
            f"the singular vectors have {cfg.length} numbers, of a layer with {site.in_features} inputs"
        )


_ASA = (
    "use_asa",
    "asa_target_subspaces",
    "init_warmup",
    "final_warmup",
    "mask_interval",
    "asa_importance_beta",
    "asa_uncertainty_beta",
    "asa_schedule_exponent",
)
"""PEFT's keys for its schedule of which groups to train; they do not affect a trained adapter."""
_KEYS = PeftKeys(
    AdaMSS,
    ("r", "num_subspaces", "subspace_rank", "use_dynamic_rank", "svd_threshold", "random_seed"),
    {"init_weights": "orthogonal"},
)


def _gather(content: PeftContent) -> PeftContent:
    """Joins a file's factors of all groups into one array each, with the rows group by group, as in the
    file.
    """
    joined = content.change_sites(lambda params: _one_array(content.config, params))
    return joined.configure(
        lengths={path: params["adamss_newB"].shape[1] for path, params in joined.sites.items()}
    )


def _one_array(cfg: AdaMSS, params: Tensors) -> Arrays:
    count = sum(name.startswith("adamss_B.") for name in params)
    names = {"adamss_newB", *(f"adamss_{side}.{k}" for side in "AB" for k in range(count))}
    if not count or params.keys() != names:
        raise ValueError(
            f"a layer has adamss_newB and an A and a B for each group, not {', '.join(sorted(params))[:200]}"
        )
    As, Bs = ([params[f"adamss_{side}.{k}"] for k in range(count)] for side in "AB")
    for A, B in zip(As, Bs, strict=True):
        if (
            A.ndim != 2
            or B.ndim != 2
            or A.shape[0] != B.shape[1]
            or A.shape[0] > cfg.subspace_rank
            or A.shape[1] != As[0].shape[1]
        ):
            raise ValueError(
                f"A {A.shape} and B {B.shape} of a group do not fit, or have more than "
                f"{cfg.subspace_rank} directions"
            )
    lacking = [cfg.subspace_rank - len(A) for A in As]
    A = np.stack([np.pad(A, ((0, rows), (0, 0))) for A, rows in zip(As, lacking, strict=True)])
    B = np.concatenate([np.pad(B, ((0, 0), (0, columns))) for B, columns in zip(Bs, lacking, strict=True)])
    groups = np.repeat(np.arange(count, dtype=np.int32), [len(B) for B in Bs])
    return {"adamss_A": A, "adamss_B": B, "adamss_groups": groups, "adamss_newB": params["adamss_newB"]}


def _precision(stored: np.ndarray) -> Any:
    """Returns the dtype of PEFT's model when it computed the singular vectors: the narrowest dtype that holds
    their values.
    """
    return next(
        (
            dtype
            for dtype in (ml_dtypes.bfloat16, np.float16)
            if np.array_equal(stored.astype(dtype).astype(stored.dtype), stored)
        ),
        np.float32,
    )


def _place(cfg: AdaMSS, params: Tensors, site: Site, factorise: Factorise) -> tuple[AdaMSS, Arrays]:
    """Moves the rows of a file's parameters to their places in the weight."""
    stored = params["adamss_newB"]
    matrix = _augment(site, _precision(stored))
    if stored.shape[1] != matrix.shape[1]:
        raise Unsupported(
            "the singular vectors in this file are of another weight, or of one with a bias where this "
            "has none",
            where=site.path,
            expected=f"vectors of {matrix.shape[1]} numbers",
            found=stored.shape[1],
            remedy="name the base that it was trained on",
        )
    count = np.bincount(params["adamss_groups"], minlength=len(params["adamss_A"]))
    found = {
        groups
        for groups in _find_groups(cfg, site, matrix, stored)
        if np.array_equal(np.bincount(groups, minlength=len(count)), count)
    }
    if len(found) != 1:
        raise Unsupported(
            "the file does not say which rows of this weight its groups are, and k-means does not say it "
            "for certain: rows lie so near to the middle between two groups that rounding decides"
            if found
            else "k-means of this weight's rows gives no groups of the sizes that this file has",
            where=site.path,
            expected=f"groups of {', '.join(map(str, count[:20]))} rows, always the same",
            found=f"{len(found)} ways",
            remedy="merge it with PEFT on the machine that trained it",
        )
    groups = np.array(found.pop(), np.int32)
    B = np.empty_like(params["adamss_B"])
    # The file lists the rows group by group; a stable sort by group gives their places in the weight.
    B[np.argsort(groups, kind="stable")] = params["adamss_B"]
    return cfg, {**params, "adamss_B": B, "adamss_groups": groups}


def _in_parts(cfg: AdaMSS, params: Tensors, site: Site, factorise: Factorise) -> tuple[AdaMSS, Arrays]:
    """Returns the parameters as PEFT's file stores them, for the groups that PEFT computes for this
    weight.
    """
    A = params["adamss_A"]
    B = params["adamss_B"]
    mine = params["adamss_groups"]
    found = _find_groups(cfg, site, _augment(site, _precision(params["adamss_newB"])), None)
    theirs = np.array(found.pop())
    rows = [np.flatnonzero(theirs == k) for k in range(len(A))]
    if found or any(len(set(mine[at].tolist())) != 1 for at in rows):
        raise Unsupported(
            "PEFT would put the rows of this weight into other groups than this adapter has"
            if not found
            else "rows of this weight lie so near to the middle between two "
            "groups that rounding decides into "
            "which PEFT puts "
            "them, and its file does not say it",
            where=site.path,
            remedy="keep the pack as it is, or merge it",
        )
    made = {"adamss_newB": params["adamss_newB"]}
    for k, at in enumerate(rows):
        own = A[mine[at[0]]]
        rank = min(len(at), len(own))
        if cfg.use_dynamic_rank:
            rank = max([1, *(np.flatnonzero(own.astype(np.float32).any(1)) + 1)])
        made |= {f"adamss_A.{k}": own[:rank].copy(), f"adamss_B.{k}": B[at, :rank]}
    return replace(cfg, parts=tuple(made[f"adamss_B.{k}"].shape for k in range(len(rows)))), made


adamss = METHODS.register(
    Method(
        name="adamss",
        summary="the rows of a weight in groups, each changed within the weight's first singular vectors",
        paper="https://openreview.net/forum?id=8ZdWmpYxT0",
        formula="W'_k = W_k + B_k A_k P,  b'_k = b_k + B_k A_k p,  [W, b] ~ U S [P, p]",
        config=AdaMSS,
        traits=Traits(additive=True, low_rank=True, frozen=("adamss_newB",), layers=LINEAR),
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        examples=(
            AdaMSS(r=3, num_subspaces=2),
            AdaMSS(r=4, num_subspaces=3, subspace_rank=2, use_dynamic_rank=True, random_seed=3),
        ),
        storage=Storage(
            require=_require,
            resolve=lambda configs, sites: [
                replace(cfg, length=_sizes(cfg, site)[2] or None)
                for cfg, site in zip(configs, sites, strict=True)
            ],
            expanded_size=lambda cfg, site: (
                _sizes(cfg, site)[0] * cfg.subspace_rank * (2 * site.out_features + site.in_features)
            ),
        ),
        training=Training(needs=lambda cfg: frozenset({"weight"})),
        peft=_KEYS.form(
            peft_type="ADAMSS",
            suffixes=("adamss_A", "adamss_B", "adamss_groups", "adamss_newB"),
            features=lambda params: (None, params["adamss_B"].shape[0] if "adamss_B" in params else None),
            from_peft_file=_gather,
            known_keys=frozenset(_ASA),
            to_peft_with_base=_in_parts,
            overrides={"indexed": ("adamss_A", "adamss_B"), "from_peft_with_base": _place},
        ),
    )
)
