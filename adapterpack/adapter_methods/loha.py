"""LoHa: the Hadamard product of two low-rank changes (Hyeon-Woo et al. 2022, FedPara, arXiv 2108.06098;
LyCORIS, arXiv 2309.14859).

    W' = W + s (w1_a w1_b) * (w2_a w2_b),   s = alpha / r

``*`` is elementwise, w1_a and w2_a are ``[out, r]``, w1_b and w2_b ``[r, in]``. The change has rank at most
r^2, and is a product of two factors of that rank (the Khatri-Rao products of the rows and of the columns).
These are used if r^2 is smaller than both widths, so that no ``[out, in]`` matrix is formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from . import (
    MATRICES,
    METHODS,
    AlphaConfig,
    Array,
    Arrays,
    Dense,
    Method,
    NormalForm,
    Params,
    PeftConfig,
    PeftKeys,
    PeftLayer,
    Random,
    Shapes,
    Site,
    Storage,
    Tensors,
    Traits,
    array_namespace,
    kaiming,
    widths_of,
)


@dataclass(frozen=True)
class LoHa(AlphaConfig):
    """The hyper-parameters of LoHa; ``alpha`` defaults to ``2 r``.

    Example:
        >>> LoHa(r=4).rank
        16
    """

    @property
    def rank(self) -> int:
        """The largest rank of the change, ``r^2``."""
        return self.r**2


def _shapes(cfg: LoHa, site: Site) -> Shapes:
    up, down = (site.out_features, cfg.r), (cfg.r, site.in_features)
    return {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": up, "hada_w2_b": down}


def _init(cfg: LoHa, site: Site, rng: Random) -> Arrays:
    # hada_w2_b is drawn, too, although it starts at zero, so that a seed gives the same other factors.
    drawn = {name: kaiming(rng, shape) for name, shape in _shapes(cfg, site).items()}
    return {**drawn, "hada_w2_b": np.zeros_like(drawn["hada_w2_b"])}


def _normal_form(cfg: LoHa, params: Params, site: Site) -> NormalForm:
    up1, down1, up2, down2 = (params[name] for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
    # Below the full rank the Khatri-Rao factors have at most twice as many numbers as the dense change.
    if cfg.rank < min(up1.shape[0], down1.shape[1]):
        return NormalForm(
            down=Dense(_products(down1.T, down2.T).T), up=Dense(_products(cfg.scale * up1, up2))
        )
    xp = array_namespace(up1, down1, up2, down2)
    return NormalForm(down=Dense(cfg.scale * xp.matmul(up1, down1) * xp.matmul(up2, down2)))


def _products(left: Array, right: Array) -> Array:
    """Returns, row by row, all products of an entry of ``[n, r]`` with an entry of ``[n, r]``: ``[n,
    r^2]``.
    """
    xp = array_namespace(left, right)
    return xp.reshape(left[:, :, None] * right[:, None, :], (left.shape[0], left.shape[1] * right.shape[1]))


_MOST = 1 << 24
"""The most numbers that a small core and factor may grow to when joined; large ones may grow 64-fold."""


def with_kernel(core: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Returns ``[r, channels * kernel]`` from a factor ``[r, channels]`` and its core ``[r, r, *kernel]``:
    the sum over the core's second axis.

    With ``use_effective_conv2d`` PEFT stores a convolution's factors separately from its kernel (FedPara's
    Tucker form, arXiv 2108.06098, proposition 3); joined into one factor they are the same change.

    Raises:
        ValueError: the shapes do not fit together, or the factor would be far larger than its parts.

    Example:
        >>> with_kernel(np.ones((2, 2, 3, 3)), np.ones((2, 5))).shape
        (2, 45)
    """
    if core.ndim < 3 or factor.ndim != 2 or core.shape[:2] != (len(factor), len(factor)):
        raise ValueError(f"a core {core.shape} and a factor {factor.shape} do not go together")
    numbers = math.prod(core.shape[2:]) * factor.size
    if numbers > max(_MOST, 64 * (core.size + factor.size)):
        raise ValueError(f"a factor of {numbers} numbers would be made of {core.size + factor.size}")
    joined = np.moveaxis(
        np.tensordot(core.astype(np.float64), factor.astype(np.float64), axes=([1], [0])), -1, 1
    )
    return joined.reshape(len(factor), -1).astype(np.float32)


def _join(tensors: Tensors) -> Tensors:
    """Returns the tensors of a convolution's site in the ordinary form: kernels multiplied into the input
    factors, and output factors, which PEFT then stores as ``[r, out]``, transposed.
    """
    if not {"hada_t1", "hada_t2"} & set(tensors):
        return tensors
    if set(tensors) != {f"hada_{name}" for name in ("t1", "w1_a", "w1_b", "t2", "w2_a", "w2_b")}:
        raise ValueError(f"of a kernel's tensors there are only {', '.join(sorted(tensors))}")
    joined = {f"hada_w{n}_b": with_kernel(tensors[f"hada_t{n}"], tensors[f"hada_w{n}_b"]) for n in (1, 2)}
    return {**joined, **{f"hada_w{n}_a": np.ascontiguousarray(tensors[f"hada_w{n}_a"].T) for n in (1, 2)}}


FIELDS: PeftConfig = {"r": 8, "alpha": 8}
CONSTANTS: PeftConfig = {
    "rank_dropout": 0.0,
    "module_dropout": 0.0,
    "init_weights": True,
    "use_effective_conv2d": False,
}
"""What the PEFT configs of LoHa and LoKr share; dropout of ranks or modules and the initialisation only
matter in training and are ignored.
"""
_KEYS = PeftKeys(LoHa, FIELDS, CONSTANTS, whole=("alpha",))

loha = METHODS.register(
    Method(
        name="loha",
        summary="the elementwise product of two low-rank changes: rank r^2 for the tensors of rank 2 r",
        paper="https://arxiv.org/abs/2108.06098",
        formula="W' = W + s (w1a w1b) * (w2a w2b), elementwise",
        config=LoHa,
        traits=Traits(additive=True, low_rank=True, layers=MATRICES),
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        examples=(LoHa(r=1), LoHa(r=2, alpha=3), LoHa(r=3, alpha=5)),
        storage=Storage(
            expanded_size=lambda cfg, site: min(
                cfg.rank * (site.in_features + site.out_features), site.in_features * site.out_features
            )
        ),
        peft=_KEYS.form(
            peft_type="LOHA",
            suffixes=("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
            aliases={name: name for name in ("hada_t1", "hada_t2")},
            from_peft_file=lambda content: content.change_sites(_join),
            layers={"conv": PeftLayer(), "grouped_conv": PeftLayer()},
            features=widths_of("hada_w1_b", "hada_w1_a"),
        ),
    )
)
