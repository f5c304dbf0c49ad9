"""OFT: rotates the inputs of a layer block by block (Qiu et al. 2023, arXiv 2306.07280, section 3; Liu et al.
2025, arXiv 2506.19847).

    y' = W (R x) + b,   R = diag(R_1, ..., R_r),   R_i = (I - Q_i)^-1 (I + Q_i)

Q_i is skew-symmetric; its upper triangle, row by row, is a row of ``oft_R`` ``[r, b (b - 1) / 2]``, or of
``[1, ...]`` if all blocks share it. ``use_cayley_neumann`` replaces the inverse by a short series, and R is
then only approximately a rotation. PEFT defines the series for -Q, and so does this method. With ``coft``
every Q_i is scaled back to a Frobenius norm of at most ``eps / sqrt(r)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import Unsupported
from . import (
    METHODS,
    NO_EXTRAS,
    WEIGHTS,
    Arrays,
    BlockDiagonal,
    Method,
    NoBranch,
    NonNegativeInt,
    NormalForm,
    Params,
    PeftConfig,
    PeftKeys,
    PeftLayer,
    PositiveFloat,
    Shapes,
    Site,
    SiteConfigs,
    Storage,
    Terms,
    Traits,
    Widths,
    array_namespace,
    block_size,
    cayley,
    require_whole,
    zeros,
)
from .core.orthogonal import skew, triangle, within


@dataclass(frozen=True)
class OFT(NoBranch):
    """The hyper-parameters of OFT: ``block_size``, or the number of blocks ``r`` in its place.

    If the size does not divide the width of a layer's input, the nearest divisor replaces it.

    Example:
        >>> OFT(block_size=8, block_share=True).rank is None
        True
    """

    block_size: int = 32
    r: NonNegativeInt = 0
    block_share: bool = False
    coft: bool = False
    eps: PositiveFloat = 6e-5
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: Terms = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("block_size", self.block_size, 0 if self.r else 2)


def _shapes(cfg: OFT, site: Site) -> Shapes:
    size = block_size(site.in_features, cfg.block_size, cfg.r)
    count = 1 if cfg.block_share else site.in_features // size if size else 0
    return {"oft_R": (count, size * (size - 1) // 2)}


def _constants(cfg: OFT, site: Site) -> Arrays:
    index, sign = triangle(block_size(site.in_features, cfg.block_size, cfg.r))
    return {"triangle": index, "sign": sign}


def _expanded_size(cfg: OFT, site: Site) -> int:
    """Returns the size of all blocks, even if they share one, and of the index of each number within a
    block.
    """
    size = block_size(site.in_features, cfg.block_size, cfg.r)
    return site.in_features * size + size * size


def _normal_form(cfg: OFT, params: Params, site: Site) -> NormalForm:
    values = params["oft_R"]
    size = block_size(site.in_features, cfg.block_size, cfg.r)
    generator = skew(
        within(values, cfg.eps / math.sqrt(values.shape[0])) if cfg.coft else values,
        params["triangle"],
        params["sign"],
        size,
    )
    blocks = cayley(-generator, cfg.num_cayley_neumann_terms) if cfg.use_cayley_neumann else cayley(generator)
    if cfg.block_share:
        blocks = array_namespace(blocks).broadcast_to(blocks, (site.in_features // size, size, size))
    return NormalForm(pre=BlockDiagonal(blocks))


_KEYS = PeftKeys(
    OFT,
    {
        "block_size": 32,
        "r": 0,
        "block_share": False,
        "coft": False,
        "eps": 6e-5,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
    },
    {**NO_EXTRAS, "module_dropout": 0.0},
    renamed={"block_size": "oft_block_size"},
)


def _to_peft(sites: SiteConfigs) -> PeftConfig:
    first = next(iter(sites.values()))
    return {**_KEYS.to_config(sites), "oft_block_size": 0 if first.r else first.block_size}


def _from_peft(config: PeftConfig) -> Any:
    if "layers_pattern" in config and "use_cayley_neumann" not in config:
        raise Unsupported(
            "the rotations are stored as PEFT stored them before 0.16, which no later PEFT reads",
            where="adapter_config.json",
            expected="use_cayley_neumann, which newer ones write",
            remedy="merge it with the PEFT that made it, and take the difference with adapterpack extract",
        )
    return _KEYS.from_config({**config, "oft_block_size": config.get("oft_block_size") or 32})


def _features(params: Params) -> Widths:
    count, numbers = params["oft_R"].shape
    size = (1 + math.isqrt(1 + 8 * numbers)) // 2
    return (count * size if count > 1 else None), None  # a single row may be the only block, or shared by all


def _patches(cfg: OFT, site: Site) -> str:
    """Returns why PEFT's OFT has no equivalent at this convolution: PEFT rotates the patches of the input and
    sums what overlaps, which for a kernel of more than one point is not a change of the weight.
    """
    if site.kernel and set(site.kernel) == {1}:
        return ""
    return (
        "PEFT runs OFT at a kernel of more than one point as it does not merge it, so what the adapter was "
        "trained for is no weight"
    )


def _back(params: Params) -> Arrays:
    return {"oft_R": -params["oft_R"]}


_EMBEDDING = PeftLayer(
    {"oft_R": "oft_embedding_R.weight"},
    stored=lambda cfg, site, params: _back(params),
    loaded=lambda cfg, params: _back(params),
)
"""PEFT rotates the output of an embedding as it rotates the input of a linear layer. For the rows of the
table that is the inverse rotation, of -Q.
"""

oft = METHODS.register(
    Method(
        name="oft",
        summary="a trained rotation of a layer's inputs, block by block; COFT by coft",
        paper="https://arxiv.org/abs/2306.07280",
        formula="y' = W (R x) + b,  R = diag of (I - Q_i)^-1 (I + Q_i)",
        config=OFT,
        traits=Traits(min_features=(1, 2), layers=(*WEIGHTS, "table")),
        shapes=_shapes,
        init=zeros(_shapes),
        normal_form=_normal_form,
        examples=(
            OFT(),
            OFT(block_size=3),
            OFT(r=2, use_cayley_neumann=True),
            OFT(block_size=4, block_share=True),
            OFT(block_size=3, coft=True, eps=0.4),
            OFT(block_size=6, use_cayley_neumann=True, num_cayley_neumann_terms=3),
        ),
        storage=Storage(constants=_constants, expanded_size=_expanded_size),
        peft=_KEYS.form(
            peft_type="OFT",
            suffixes={"oft_R": "oft_R.weight"},
            layers={"conv": PeftLayer(ambiguous_because=_patches), "table": _EMBEDDING},
            to_config=_to_peft,
            from_config=_from_peft,
            features=_features,
        ),
    )
)
