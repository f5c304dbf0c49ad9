"""Writes packs of methods other than plain LoRA in the forms of LyCORIS."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...adapter_methods import Arrays
from ...errors import Unsupported
from ...pack import Adapter
from .. import scale_factor


def number(value: float) -> np.ndarray:
    """Returns a number as kohya stores it, a float32; a float64 if float32 would round it.

    Example:
        >>> number(2.0).dtype.name, number(0.1).dtype.name
        ('float32', 'float64')
    """
    return np.array(value, np.float32 if float(np.float32(value)) == value else np.float64)


def _dora(adapter: Adapter) -> Arrays:
    params, cfg = adapter.params, adapter.config
    return {
        "lora_down.weight": params["lora_A"],
        "lora_up.weight": params["lora_B"],
        "alpha": number(cfg.scale * cfg.r),
        "dora_scale": params["lora_magnitude_vector"].reshape(-1, 1),
    }


def _lokr(adapter: Adapter) -> Arrays:
    """Returns the factors; multiplies the scale into w2 if neither is split, since LyCORIS then assumes scale
    1.
    """
    leaves = dict(adapter.params)
    cfg = adapter.config
    if "lokr_w1" in leaves and "lokr_w2" in leaves:
        return {
            **leaves,
            "lokr_w2": scale_factor(leaves["lokr_w2"], cfg.scale, adapter.site.path),
            "alpha": number(float(cfg.r)),
        }
    return {**leaves, "alpha": number(cfg.scale * cfg.r)}


def _ia3(adapter: Adapter) -> Arrays:
    if not adapter.config.feedforward:
        raise Unsupported(
            "(IA)^3 of LyCORIS scales outputs without the bias, and (IA)^3 with it",
            where=adapter.site.path,
            remedy="keep the pack as it is, or merge it",
        )
    factors = adapter.params["ia3_l"].reshape(-1).astype(np.float64)
    return {"weight": (factors - 1).astype(np.float32), "on_input": np.array(1, np.int64)}


WRITERS: dict[str, Callable[[Adapter], Arrays]] = {"dora": _dora, "ia3": _ia3, "lokr": _lokr}
"""Method -> function that returns the leaves of a site; methods without one are written as LoRA."""
