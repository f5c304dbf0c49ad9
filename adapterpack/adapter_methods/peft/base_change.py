"""Undoes PEFT's initialisations that move a part of the base's weight into the adapter (PiSSA, OLoRA).

PEFT replaces ``W`` by ``W - s B0 A0`` when it creates the adapter, and again when it loads it. On the
unmodified base its tensors therefore mean

    W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]

which is a LoRA of rank 2 r. ``B0 A0`` follows from the weight for PiSSA (Meng et al. 2024, arXiv 2404.02948,
section 3: the part of the r largest singular values) and for OLoRA (Büyükakyüz 2024, arXiv 2406.01775,
section 3: the first r columns of Q times the first r rows of R), whatever signs a library gives the factors.
The other initialisations depend on data or on a random projection, and cannot be undone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...errors import Unsupported, excerpt
from ..core.layouts import LINEAR, layout_of
from ..core.peft_form import BaseChange, Completed, Factorise, PeftConfig, PeftContent
from ..core.site import Arrays, Site, Tensors

Factors = tuple[np.ndarray, np.ndarray]
_KEEP = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""PEFT's initialisations that leave the base's weight unchanged."""
_CERTAIN = 1e-3
"""How far a part of the weight may rotate because another library rounds differently; float32 rounds to 6e-8
of the largest singular value.
"""
_ROUNDING = float(np.finfo(np.float32).eps) / 2
_WHY = "this adapter belongs to a base whose weights its initialisation rewrote"
_NOTE = (
    "PEFT rewrote the base when it made this adapter; here the adapter takes that back, with twice the "
    "rank, and the base stays "
    "what it is. PEFT also rounds what it leaves of a base in half precision, which is not repeated"
)
_WIDEST = 4096
"""The largest rank that factors are padded to."""
_ANEW = "convert it to plain LoRA in PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)"


def _pissa(weight: np.ndarray, r: int, site: Site, factorise: Factorise) -> Factors:
    """Returns ``B0`` and ``A0`` of PiSSA without the scale."""
    u, s, vt = factorise(weight)
    if r < len(s) and s[0] * _ROUNDING > _CERTAIN * (s[r - 1] - s[r]):
        raise _uncertain(site, "two singular values of this weight are so near to each other")
    root = np.sqrt(s[:r])
    return u[:, :r] * root, root[:, None] * vt[:r]


def _olora(weight: np.ndarray, r: int, site: Site, factorise: Factorise) -> Factors:
    """Returns ``B0`` and ``A0`` of OLoRA, which decomposes the weight as the layer stores it."""
    turned = layout_of(site.kind).turned
    q, upper = np.linalg.qr((weight.T if turned else weight).astype(np.float64))
    ends = np.abs(np.diagonal(upper)[:r])
    if ends.size and np.abs(upper).max() * _ROUNDING > _CERTAIN * ends.min():
        raise _uncertain(site, "the first columns of this weight depend on each other so nearly")
    return (upper[:r].T, q[:, :r].T) if turned else (q[:, :r], upper[:r])


def _uncertain(site: Site, what: str) -> Unsupported:
    return Unsupported(
        f"{what} that what the initialisation took of it is not certain", where=site.path, remedy=_ANEW
    )


_FOLLOW: Mapping[str, Callable[[np.ndarray, int, Site, Factorise], Factors]] = {
    "pissa": _pissa,
    "olora": _olora,
}
"""PEFT's initialisation -> function that computes B0 and A0 from the weight ``[out, in]``, for those that
follow from the weight. OLoRA's result includes the scale.
"""


def undo_base_change(config: PeftConfig) -> BaseChange | None:
    """Returns how to undo what the initialisation named in PEFT's config did to the base; None if it left the
    base unchanged.

    Raises:
        Unsupported: the base alone does not determine the change.

    Example:
        >>> (undo_base_change({"init_lora_weights": "gaussian"}) is None,
        ...     undo_base_change({"init_lora_weights": "pissa"}) is None)
        (True, False)
    """
    init = config.get("init_lora_weights")
    if init in _KEEP:
        return None
    follows = _FOLLOW.get(init.lower() if isinstance(init, str) else "")
    if follows is None:
        raise _unknown(init)
    return BaseChange(_taken_back(follows, divided=follows is _pissa), _WHY, _NOTE)


def widen(content: PeftContent) -> PeftContent:
    """Pads all factors to the config's rank: at a narrower layer PEFT starts with fewer rows, and zeros
    change nothing.
    """
    init = content.written.get("init_lora_weights")
    if not isinstance(init, str) or init.lower() not in _FOLLOW:
        return content
    return content._replace(
        sites={path: _widen(params, content.config.at(path).r) for path, params in content.sites.items()}
    )


def _widen(params: Tensors, r: int) -> Tensors:
    A, B = params.get("lora_A"), params.get("lora_B")
    if (
        A is None
        or B is None
        or A.ndim != 2
        or B.ndim != 2
        or len(A) != B.shape[1]
        or not min(A.shape[1], len(B)) == len(A) < r <= _WIDEST
    ):
        return params
    lacking = r - len(A)
    return {
        **params,
        "lora_A": np.pad(A, ((0, lacking), (0, 0))),
        "lora_B": np.pad(B, ((0, 0), (0, lacking))),
    }


def require_kept_base(config: PeftConfig) -> None:
    """Checks that PEFT's initialisation left the base unchanged, for a method that cannot undo a change.

    Raises:
        Unsupported: the initialisation rewrote the base.
    """
    if (init := config.get("init_lora_weights")) not in _KEEP:
        raise _unknown(init)


def _unknown(init: Any) -> Unsupported:
    expected = f"{', '.join(map(str, _KEEP[1:]))}, or {' or '.join(_FOLLOW)} with its base"
    return Unsupported(_WHY, where="init_lora_weights", expected=expected, found=excerpt(init), remedy=_ANEW)


def _taken_back(start: Callable[..., Factors], divided: bool) -> Completed:
    """Returns the function that turns an adapter with that ``start`` into one of twice the rank; ``divided``:
    PEFT divides the start by the scale.
    """

    def completed(cfg: Any, params: Tensors, site: Site, factorise: Factorise) -> tuple[Any, Arrays]:
        if site.kind not in LINEAR:  # PEFT initialises an embedding as usual
            return cfg, dict(params)
        A, B = params["lora_A"], params["lora_B"]
        if divided and cfg.scale <= 0:
            raise Unsupported(
                "PEFT takes the root of this scale, which is not above zero",
                where=site.path,
                found=f"{cfg.scale:g}",
            )
        B0, A0 = start(np.asarray(site.weight, np.float32), len(A), site, factorise)
        root = math.sqrt(cfg.scale) if divided else 1.0
        lacking = len(A) - len(A0)
        A0 = np.pad(A0 / root, ((0, lacking), (0, 0)))
        B0 = np.pad(B0 / root, ((0, 0), (0, lacking)))
        # The scale is alpha / r, so alpha grows with the rank to keep it.
        r = 2 * len(A)
        factors = {
            "lora_A": np.concatenate([A.astype(np.float32), A0.astype(np.float32)]),
            "lora_B": np.concatenate([B.astype(np.float32), -B0.astype(np.float32)], axis=1),
        }
        return dataclasses.replace(cfg, r=r, alpha=cfg.alpha_at(r)), {**params, **factors}

    return completed
