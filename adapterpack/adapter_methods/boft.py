"""BOFT: rotates a layer's inputs by a butterfly of small rotations and scales its outputs (Liu et al. 2024,
arXiv 2311.06243, section 4).

    y' = s * (W R x) + b,   R = B_1 ... B_m
    B_i = P_i diag(R_i1, R_i2, ...) P_i^T,   R_ij = (I - S_ij)^-1 (I + S_ij)

``boft_R`` ``[m, blocks, b, b]`` holds matrices A, of which only the skew-symmetric part ``S = (A - A^T) / 2``
counts; ``boft_s``, s, is ``[out, 1]``. The permutation P_i brings inputs that are 2^(i-2) blocks apart into
one block, so that m factors of small blocks mix 2^(m-1) blocks.

PEFT builds more than one factor only where it can compile its CUDA extension. Elsewhere it trains one factor,
while its config still contains the number that was asked for. Such a file is read as one factor if the
tensors have one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import NamedTuple

import numpy as np

from . import (
    METHODS,
    NO_EXTRAS,
    Arrays,
    BlockDiagonal,
    Chain,
    Method,
    NoBranch,
    NonNegativeInt,
    NormalForm,
    Operator,
    Params,
    PeftConfig,
    PeftContent,
    PeftKeys,
    PeftLayer,
    Permutation,
    PositiveInt,
    Shapes,
    Site,
    SiteConfigs,
    Storage,
    Traits,
    array_namespace,
    block_size,
    cayley,
    require_whole,
    zeros,
)


@dataclass(frozen=True)
class BOFT(NoBranch):
    """The hyper-parameters of BOFT: ``block_size``, or the number of blocks ``block_num`` in its place.

    If the size does not divide the width of a layer's input, the nearest divisor replaces it. A layer has as
    many factors as fit: they require an even block size and a number of blocks that is a multiple of
    2^(factors - 1).

    Example:
        >>> BOFT(block_size=4, n_butterfly_factor=2).scale
        1.0
    """

    block_size: int = 4
    block_num: NonNegativeInt = 0
    n_butterfly_factor: PositiveInt = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("block_size", self.block_size, 0 if self.block_num else 2)


class _Layout(NamedTuple):
    factors: int
    blocks: int
    size: int


def _layout(cfg: BOFT, width: int) -> _Layout:
    size = block_size(width, cfg.block_size, cfg.block_num)
    blocks = width // size
    factors = 1
    # Each further factor exchanges half blocks between twice as many blocks, so both must be divisible.
    while factors < cfg.n_butterfly_factor and size % 2 == 0 and blocks % 2**factors == 0:
        factors += 1
    return _Layout(factors, blocks, size)


def _shapes(cfg: BOFT, site: Site) -> Shapes:
    factors, blocks, size = _layout(cfg, site.in_features)
    return {"boft_R": (factors, blocks, size, size), "boft_s": (site.out_features, 1)}


@lru_cache(maxsize=64)
def _orders(layout: _Layout) -> np.ndarray:
    """Returns, for each factor, the order in which it reads the output of the previous one, the last factor
    first: ``[factors, width]``.

    The blocks of the first factor are contiguous, so that no permutation is needed after it.
    """
    inputs = np.arange(layout.blocks * layout.size)
    gathered = []
    for factor in range(layout.factors):
        halves = inputs.reshape(-1, 2 ** (factor + 1), layout.size // 2)
        gathered.append(np.concatenate([halves[:, 0::2], halves[:, 1::2]], axis=1).reshape(-1))
    orders = []
    before = inputs
    # Combines undoing one factor's permutation with applying the next one's into a single gather.
    for order in reversed(gathered):
        orders.append(before[np.argsort(order)])
        before = order
    return np.array(orders, np.int32)


def _constants(cfg: BOFT, site: Site) -> Arrays:
    layout = _layout(cfg, site.in_features)
    return {"orders": _orders(layout)} if layout.factors > 1 else {}


def _normal_form(cfg: BOFT, params: Params, site: Site) -> NormalForm:
    generators = params["boft_R"]
    scale = params["boft_s"][:, 0]
    xp = array_namespace(generators)
    factors, blocks, size = _layout(cfg, site.in_features)
    flat = xp.reshape(generators, (factors * blocks, size, size))
    turned = xp.reshape(cayley(0.5 * (flat - xp.permute_dims(flat, (0, 2, 1)))), generators.shape)
    steps: list[Operator] = [BlockDiagonal(turned[factor, ...]) for factor in reversed(range(factors))]
    if factors > 1:
        steps = [Chain(Permutation(params["orders"][number, :]), step) for number, step in enumerate(steps)]
    shift = (
        None if site.base_bias is None else site.base_bias * (1 - scale)
    )  # only the weight's output is scaled, not the bias
    return NormalForm(pre=reduce(Chain, steps), output_scale=scale, shift=shift)


_KEYS = PeftKeys(
    BOFT,
    ("block_size", "block_num", "n_butterfly_factor"),
    {**NO_EXTRAS, "boft_dropout": 0.0},
    renamed={name: f"boft_{name}" for name in ("block_size", "block_num", "n_butterfly_factor")},
)


def _to_peft(sites: SiteConfigs) -> PeftConfig:
    first = next(iter(sites.values()))
    return {**_KEYS.to_config(sites), "boft_block_size": 0 if first.block_num else first.block_size}


def _count_factors(content: PeftContent) -> PeftContent:
    """Corrects the number of factors to that of the tensors, if PEFT trained fewer than its config says."""
    counts = {tensors["boft_R"].shape[0] for tensors in content.sites.values() if "boft_R" in tensors}
    if content.packed or counts != {1}:
        return content
    return content.configure(n_butterfly_factor=1)


_CONVOLUTION = PeftLayer(
    shapes_say_so=lambda shapes: shapes.get("boft_s", ())[:1] == (1,) != shapes["boft_s"][1:],
    # PEFT stores the scales of a convolution's outputs as a row
    stored=lambda cfg, site, params: {**params, "boft_s": params["boft_s"].reshape(1, -1)},
    loaded=lambda cfg, params: {**params, "boft_s": params["boft_s"].reshape(-1, 1)},
)

boft = METHODS.register(
    Method(
        name="boft",
        summary=(
            "a trained rotation of a layer's inputs as a butterfly of small blocks, and a factor on every "
            "output"
        ),
        paper="https://arxiv.org/abs/2311.06243",
        formula="y' = s * (W R x) + b,  R = B_1 ... B_m, butterflies of Cayley rotations",
        config=BOFT,
        traits=Traits(reads_weight=True, min_features=(1, 2)),
        shapes=_shapes,
        init=zeros(_shapes, boft_s=1),
        normal_form=_normal_form,
        examples=(
            BOFT(),
            BOFT(block_size=2, n_butterfly_factor=2),
            BOFT(block_num=3),
            BOFT(block_num=6, n_butterfly_factor=4),
        ),
        storage=Storage(
            constants=_constants,
            expanded_size=lambda cfg, site: _layout(cfg, site.in_features).factors * site.in_features,
        ),
        peft=_KEYS.form(
            # more factors need PEFT's CUDA extension, and its kernels are square
            peft_supports=lambda cfg, site: (
                _layout(cfg, site.in_features).factors == 1 and len(set(site.kernel)) < 2
            ),
            from_peft_file=_count_factors,
            layers={"conv": _CONVOLUTION},
            peft_type="BOFT",
            suffixes=("boft_R", "boft_s"),
            to_config=_to_peft,
            from_config=lambda config: _KEYS.from_config(
                {**config, "boft_block_size": config.get("boft_block_size") or 4}
            ),
            features=lambda params: (
                params["boft_R"].shape[1] * params["boft_R"].shape[3],
                params["boft_s"].shape[0],
            ),
        ),
    )
)
