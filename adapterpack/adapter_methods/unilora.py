"""Uni-LoRA: takes LoRA's factors at every layer from one trained vector (Li et al. 2025, arXiv 2506.00799,
section 3).

    y' = base(x) + B (A x),   A = theta[i_A] / sqrt(n[i_A]),   B = theta[i_B] / sqrt(n[i_B])

A seed assigns indices into ``theta`` ``[d]`` to all entries of all layers' factors; n[i] is the number of
entries with index i. A pack holds d numbers. A fresh adapter changes the output a little, as in PEFT and the
paper: theta provides both A and B, and could not be trained from zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from ..errors import Unsupported, excerpt
from . import (
    METHODS,
    NO_EXTRAS,
    SHARES_A_PART,
    TRANSPOSED,
    WITH_BASE,
    Arrays,
    Dense,
    FiniteFloat,
    Method,
    NormalForm,
    OfBase,
    Params,
    PeftConfig,
    PeftContent,
    PeftKeys,
    PositiveInt,
    Random,
    RankConfig,
    Seed,
    Shared,
    Site,
    Storage,
    Traits,
    array_namespace,
    pattern_of,
    require_widths,
)
from .core.config import ends

_INDICES = ("unilora_indices_A", "unilora_indices_B")
_MOST = 1 << 28
"""The most entries in all factors of one adapter, whose indices are computed at once."""


@dataclass(frozen=True)
class UniLoRA(RankConfig):
    """The hyper-parameters of Uni-LoRA.

    ``start`` is the number of a site's first entry among the ``total`` entries of the adapter, and ``starts``
    holds it by path; None means that the site is the only one.

    Example:
        >>> UniLoRA(r=4, theta_d_length=256).rank
        4
    """

    r: PositiveInt = 4
    theta_d_length: PositiveInt = 256
    proj_seed: Seed = 42
    init_theta_d_bound: FiniteFloat = 0.02
    start: Annotated[int, Meta(ge=0, le=_MOST)] | None = None
    total: Annotated[int, Meta(ge=1, le=_MOST)] | None = None
    starts: Mapping[str, int] = pattern_of("start")


@lru_cache(maxsize=2)
def _deal_indices(total: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the index of every entry, int32 ``[total]``, and ``1 / sqrt(n)``, float32 ``[length]``: indices
    are assigned evenly and shuffled.
    """
    if max(total, length) > _MOST:
        raise Unsupported(
            "the adapter would have too many indices",
            expected=f"at most {_MOST}",
            found=max(total, length),
            remedy="use a smaller rank or fewer targets",
        )
    rng = np.random.default_rng(seed)
    indices = np.repeat(np.arange(length), total // length)
    if rest := total % length:
        indices = np.concatenate([indices, rng.choice(length, size=rest, replace=False)])
    # These calls reproduce PEFT's draws, so their order must not change.
    rng.shuffle(indices)
    counts = np.bincount(indices, minlength=length)
    return indices.astype(np.int32), (1 / np.sqrt(np.maximum(counts, 1))).astype(np.float32)


def _places(cfg: UniLoRA, site: Site) -> int:
    return cfg.r * (site.in_features + site.out_features)


def _resolve(configs: Sequence[Any], sites: Sequence[Site]) -> list[Any]:
    """Numbers the entries site by site, in the order of the model's modules."""
    if any(cfg.total is not None for cfg in configs) or not all(
        site.in_features and site.out_features for site in sites
    ):
        return list(configs)
    ends = np.cumsum([_places(cfg, site) for cfg, site in zip(configs, sites, strict=True)]).tolist()
    return [
        replace(cfg, start=start, total=ends[-1]) for cfg, start in zip(configs, [0, *ends[:-1]], strict=True)
    ]


def _constants(cfg: UniLoRA, site: Site) -> Arrays:
    require_widths(site)
    start, total = (
        (0, _places(cfg, site)) if cfg.start is None or cfg.total is None else (cfg.start, cfg.total)
    )
    indices, norms = _deal_indices(total, cfg.theta_d_length, cfg.proj_seed)
    middle = start + cfg.r * site.in_features
    end = start + _places(cfg, site)
    if end > total:
        raise Unsupported(
            "the indices lie outside the weight",
            where=site.path,
            expected=f"places up to {total}",
            found=end,
            remedy="pack the adapter again",
        )
    return {
        "unilora_indices_A": indices[start:middle],
        "unilora_indices_B": indices[middle:end],
        "unilora_norms": norms,
    }


def _normal_form(cfg: UniLoRA, params: Params, site: Site) -> NormalForm:
    theta = params["unilora_theta_d"] * params["unilora_norms"]
    xp = array_namespace(theta)
    down, up = (xp.take(theta, params[name], axis=0) for name in _INDICES)
    return NormalForm(down=Dense(xp.reshape(down, (cfg.r, -1))), up=Dense(xp.reshape(up, (-1, cfg.r))))


def _theta(cfg: UniLoRA, sites: Sequence[Site], rng: Random) -> Arrays:
    bound = cfg.init_theta_d_bound
    return {"unilora_theta_d": rng.uniform(-bound, bound, cfg.theta_d_length).astype(np.float32)}


_KEYS = PeftKeys(
    UniLoRA,
    ("r", "theta_d_length", "proj_seed", "init_theta_d_bound", "dropout"),
    {**NO_EXTRAS, "save_indices": False},
    renamed={"dropout": "unilora_dropout"},
)


def _from_peft(config: PeftConfig) -> Any:
    targets = config.get("target_modules")
    if isinstance(targets, str) and re.fullmatch(
        r"[A-Za-z0-9_.-]+", targets
    ):  # a regular expression that is just a name
        targets = [targets]
    return replace(
        _KEYS.from_config(config), targets=tuple(map(str, targets)) if isinstance(targets, list) else ()
    )


def _from_peft_file(content: PeftContent) -> PeftContent:
    """Determines the sites and their entries: by the indices that PEFT stored, or for a file without indices
    by its only target.
    """
    cfg = replace(content.config, targets="all-linear")
    if not content.sites and content.base is not None and not content.packed:
        return _in_order(cfg, content, content.base)
    if not content.sites:
        whole = len(content.config.targets) == 1 and (
            "." in content.config.targets[0] or not content.written.get("task_type")
        )
        # a model for a task has no layer at its root, so a name without dots may match several paths
        if not whole and not content.packed:
            raise Unsupported(
                "this file does not say in which order its layers come, on which their indices depend",
                where="target_modules",
                expected="save_indices: true, or the path of one layer",
                found=", ".join(content.config.targets)[:80],
                remedy=(
                    f"{WITH_BASE}; or save it again with PEFT after setting save_indices=True in its config"
                ),
            )
        return PeftContent(cfg, content.shared, {path: {} for path in content.config.targets})
    if any(
        name not in params or cfg.r not in params[name].shape
        for params in content.sites.values()
        for name in _INDICES
    ):
        raise ValueError(f"every site needs {' and '.join(_INDICES)} of rank {cfg.r}")
    parts = {
        path: np.concatenate([params[name].reshape(-1) for name in _INDICES])
        for path, params in content.sites.items()
    }
    total = sum(map(len, parts.values()))
    indices = _deal_indices(total, cfg.theta_d_length, cfg.proj_seed)[0]
    start = 0
    starts = {}
    # Sites follow each other in the shuffled indices, so each start identifies the next site by its first
    # indices.
    while start < total:
        path = next(
            (path for path, part in parts.items() if path not in starts and _begins(indices[start:], part)),
            None,
        )
        if path is None:
            raise Unsupported(
                "the stored indices are not those of proj_seed",
                where="unilora_indices_A",
                remedy="merge this adapter with the library that made it",
            )
        starts[path] = start
        start += len(parts[path])
    return PeftContent(replace(cfg, total=total, starts=starts), content.shared, {path: {} for path in parts})


def _in_order(cfg: UniLoRA, content: PeftContent, base: OfBase) -> PeftContent:
    """Returns the sites whose paths end in PEFT's targets, in the order of the base model."""
    for option in ("exclude_modules", "layers_to_transform"):
        if content.written.get(option):
            raise Unsupported(
                "this option of PEFT decides which layers there are, and is not followed",
                where=option,
                found=excerpt(content.written[option]),
                remedy="save it again with PEFT after setting save_indices=True in its config",
            )
    targets = set(content.config.targets)
    starts = {}
    start = 0
    for path in base.modules():
        if not targets.isdisjoint(ends(path)):
            shape = base.shape(f"{path}.weight") or ()
            if len(shape) != 2:
                raise ValueError(f"{path} has no matrix")
            starts[path] = start
            start += cfg.r * sum(shape)
    if not starts:
        raise ValueError(f"the base has no layer that is called {', '.join(sorted(targets))[:200] or 'so'}")
    return PeftContent(
        replace(cfg, total=start, starts=starts), content.shared, {path: {} for path in starts}
    )


def _begins(indices: np.ndarray, part: np.ndarray) -> bool:
    """Whether ``indices`` begin with ``part``; comparing a few numbers first rejects most mismatches
    cheaply.
    """
    return np.array_equal(indices[: len(part[:16])], part[:16]) and np.array_equal(indices[: len(part)], part)


unilora = METHODS.register(
    Method(
        name="unilora",
        summary=(
            "LoRA's factors at every layer taken from one trained vector, by indices that a seed deals out"
        ),
        paper="https://arxiv.org/abs/2506.00799",
        formula="y' = W x + b + B A x,  A and B gathered from one vector theta",
        config=UniLoRA,
        traits=Traits(additive=True, identity_at_init=False, low_rank=True),
        shapes=lambda cfg, site: {},
        init=lambda cfg, site, rng: {},
        normal_form=_normal_form,
        examples=(
            UniLoRA(r=2, theta_d_length=5, init_theta_d_bound=0.5),
            UniLoRA(r=3, theta_d_length=70, proj_seed=7, init_theta_d_bound=1.0, dropout=0.1),
        ),
        storage=Storage(
            constants=_constants,
            expanded_size=lambda cfg, site: (cfg.total or 0) + cfg.theta_d_length + _places(cfg, site),
            shared=Shared(lambda cfg, sites: {"unilora_theta_d": (cfg.theta_d_length,)}, _theta),
            resolve=_resolve,
        ),
        peft=_KEYS.form(
            peft_type="UNILORA",
            suffixes=(*_INDICES, "unilora_scales_A", "unilora_scales_B"),
            layers=TRANSPOSED,
            from_config=_from_peft,
            shared={"unilora_theta_d": "base_model.unilora_theta_d"},
            from_peft_file=_from_peft_file,
            refused_by=SHARES_A_PART,
        ),
    )
)
