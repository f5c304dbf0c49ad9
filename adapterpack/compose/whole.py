"""Modules that packs carry whole, such as a classification head: averaged, never dropped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import Unsupported
from ..pack.pack import Pack
from ..pack.safetensors import FLOATS, dtype_name
from .agree import SIDE_BY_SIDE


def average(packs: Sequence[Pack], weights: Sequence[float]) -> dict[str, dict[str, np.ndarray]]:
    """The modules trained whole, each the average of the packs' under the weights normalised to sum 1; float32.

    A module is a weight and no change, so only an average of modules is a module of the same size. The sum is made in float64.

    Raises:
        Unsupported: a pack lacks a module or a tensor that another has, shapes differ, or the weights sum to 0.
    """
    modules = comparable(packs)
    paths = list(modules[0]) if modules else []
    if not paths:
        return {}
    total = sum(weights)
    if abs(total) <= 1e-9 * sum(map(abs, weights)):
        raise Unsupported("modules trained whole are averaged, and weights that sum to 0 have no average", where=", ".join(paths),
                          expected="weights with a sum other than 0", found=", ".join(f"{weight:g}" for weight in weights),
                          remedy="choose other weights, or train the adapters without these modules")
    shares = [weight / total for weight in weights]
    return {path: _average(path, [module[path] for module in modules], shares) for path in paths}


def comparable(packs: Sequence[Pack]) -> list[dict[str, dict[str, np.ndarray]]]:
    """The modules that each pack trained whole, shown to be the same ones with the same tensors in all.

    Raises:
        Unsupported: a pack lacks a module or a tensor that another has, or shapes differ.
    """
    modules = [pack.full() for pack in packs]
    paths = list(dict.fromkeys(path for module in modules for path in module))
    for pack, module in zip(packs, modules, strict=True):
        for path in paths:
            if path not in module:
                raise Unsupported("a module that another pack trained whole is missing", where=f"pack '{pack.name}'", expected=path,
                                  found=", ".join(module) or "none", remedy=SIDE_BY_SIDE)
            expected, found = ({param: tuple(value.shape) for param, value in one.items()} for one in (modules[0][path], module[path]))
            if expected != found:
                raise Unsupported("a module trained whole has other tensors in another pack",
                                  where=f"{path} in '{packs[0].name}' and '{pack.name}'", expected=expected, found=found,
                                  remedy=SIDE_BY_SIDE)
    return modules


def _average(path: str, modules: Sequence[dict[str, np.ndarray]], shares: Sequence[float]) -> dict[str, np.ndarray]:
    return {param: _mean(f"{path}.{param}", [module[param] for module in modules], shares) for param in modules[0]}


def _mean(where: str, values: Sequence[np.ndarray], shares: Sequence[float]) -> np.ndarray:
    if any(dtype_name(value.dtype) not in FLOATS for value in values):
        if any(not np.array_equal(value, values[0]) for value in values):
            raise Unsupported("whole numbers that differ between packs have no average", where=where, remedy=SIDE_BY_SIDE)
        return values[0]
    total = np.zeros(values[0].shape, np.float64)
    for value, share in zip(values, shares, strict=True):
        total += share * value.astype(np.float64)
    return total.astype(np.float32)
