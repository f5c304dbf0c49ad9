"""Chooses two, four or eight bits for each product under a budget, by the error of each choice in the
product's own outputs.

The error of a choice is ``|(W - Wq) x|²`` as a share of ``|W x|²``, over calibration rows, or of the weights
themselves without rows. It costs one rounding for each product and number of bits, while the error of the
model's outputs would cost a run of the model each time. Errors of products add up almost independently, so
the search minimizes their mean. It is greedy: all products begin with eight bits, and each step takes bits
from the product whose error grows least for the bytes that this saves.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...bundle import graph_file
from ...errors import ConfigError, Unsupported
from ...io import Json
from ...onnx_graph import fresh_grid, nearest, split_blocks, values
from ...tasks import MAIN
from .options import GraphQuantization
from .product import RoundingSetting, Second, output_error
from .replace_products import find_head, find_products
from .scheme import Choose

BITS = (8, 4, 2)
"""The bits that a product may have, in the order in which the search tries them."""


class BitChoice(NamedTuple):
    """A choice for one product: its bits, the squared relative error, and its bytes with scales and zero
    points.
    """

    bits: int
    error: float
    nbytes: int


def choose_bits(
    folder: Path,
    parts: Sequence[str],
    wanted: GraphQuantization,
    second: Second,
) -> tuple[Choose, Json]:
    """Chooses the setting of every product of a bundle's graph except the one that computes the logits;
    returns the choices and the manifest's report on them.

    Raises:
        ConfigError: two bits everywhere exceed the budget of bytes, or eight bits everywhere exceed that of
            error.
        Unsupported: the model has several graphs.
    """
    if len(parts) > 1:
        raise Unsupported(
            "bits are searched in a model of one graph",
            where=folder.name,
            found=", ".join(parts),
            remedy="choose --scheme int8 or int4",
        )
    setting = wanted.setting
    model = ir.load(folder / graph_file(MAIN))
    assert setting is not None
    head = find_head(model)
    choices = dict[str, list[BitChoice]]()
    for product in find_products(model):
        if product.node.name != head and len(product.weight.shape) == 2:
            moment = second(product.node.inputs[0].name)
            choices[product.node.name] = _choices(product.rows(), moment, setting)
    found = greedy(choices, wanted.error_budget, wanted.size_budget)
    return (lambda name: setting._replace(bits=found[name].bits) if name in found else None), {
        "products": {
            name: {"bits": choice.bits, "error": math.sqrt(choice.error)} for name, choice in found.items()
        }
    }


def greedy(
    choices: dict[str, list[BitChoice]], error_budget: float | None, size_budget: int | None
) -> dict[str, BitChoice]:
    """Returns one choice for each product so that all fit a budget: the root of the mean of the squared
    errors, or the total bytes.

    Raises:
        ConfigError: no choices fit the budget.

    Example:
        >>> errors = {"a": 0.01, "b": 0.09}
        >>> both = {name: [BitChoice(8, 0.0, 8), BitChoice(4, error, 4)] for name, error in errors.items()}
        >>> {name: choice.bits for name, choice in greedy(both, None, 12).items()}
        {'a': 4, 'b': 8}
    """
    at = dict.fromkeys(choices, 0)
    error, size = (
        sum(getattr(options[0], field) for options in choices.values()) for field in ("error", "nbytes")
    )
    limit = None if error_budget is None else error_budget**2 * len(choices)
    queue: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        options = choices[name][at[name] :]
        if len(options) > 1:
            heapq.heappush(
                queue,
                (
                    # the price of the next step down: added error for each byte saved
                    max(options[1].error - options[0].error, 0.0) / (options[0].nbytes - options[1].nbytes),
                    name,
                ),
            )

    for name in choices:
        offer(name)
    while queue and (size_budget is None or size > size_budget):
        _, name = heapq.heappop(queue)
        old, new = choices[name][at[name] : at[name] + 2]
        # this product keeps its bits; a product with a smaller error may still fit
        if limit is not None and error - old.error + new.error > limit:
            continue
        error = error - old.error + new.error
        size = size - old.nbytes + new.nbytes
        at[name] += 1
        offer(name)
    if size_budget is not None and size > size_budget:
        raise ConfigError(
            "no choice of bits fits this budget",
            where="--size-budget",
            found=size_budget,
            expected=f"at least {size}",
            remedy="give more bytes, or larger blocks",
        )
    if limit is not None and error > limit:
        raise ConfigError(
            "even eight bits make a larger error than this budget",
            where="--error-budget",
            found=error_budget,
            expected=f"at least {(error / len(choices)) ** 0.5:.2g}",
            remedy="allow more error, or choose --scheme fp16",
        )
    return {name: options[at[name]] for name, options in choices.items()}


def _choices(rows: np.ndarray, second: np.ndarray | None, setting: RoundingSetting) -> list[BitChoice]:
    x = split_blocks(setting.block_size, rows)
    found = []
    blocks = x.shape[0] * x.shape[1]
    whole = output_error(rows, second)
    for bits in BITS:
        grid = fresh_grid(x, bits, setting.symmetric, np.dtype(np.float32))
        change = values(nearest(x, grid, bits), grid).reshape(len(rows), -1)[:, : rows.shape[1]] - rows
        nbytes = blocks * (setting.block_size * bits // 8 + 4) + (
            0 if setting.symmetric else -(-blocks * bits // 8)
        )
        found.append(BitChoice(bits, output_error(change, second) / whole if whole else 0.0, nbytes))
    return found
