"""Algorithms that round weights: GPTQ against its definition, and the errors that each promises to make
smaller.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from adapterpack.errors import ConfigError
from adapterpack.onnx_graph.nbits import BlockGrid, fresh_grid, nearest, split_blocks, values
from adapterpack.quantizing.graphs.algorithms.awq import round_awq
from adapterpack.quantizing.graphs.algorithms.gptq import DAMPING, round_gptq
from adapterpack.quantizing.graphs.algorithms.k_quant import round_k_quant
from adapterpack.quantizing.graphs.product import Codes, RoundingSetting
from adapterpack.quantizing.graphs.search import BITS, BitChoice, greedy

WIDTH, OUT = 45, 7


def dense(codes: Codes, width: int = WIDTH) -> np.ndarray:
    """What the codes stand for ``[out, in]`` in float64, the inputs' division undone."""
    wide = (codes.q.astype(np.float64) - codes.grid.zero[..., None]) * codes.grid.scale[..., None].astype(
        np.float64
    )
    matrix = wide.reshape(len(wide), -1)[:, :width]
    return matrix if codes.divisor is None else matrix / codes.divisor


def nearest_codes(rows: np.ndarray, setting: RoundingSetting) -> Codes:
    x = split_blocks(setting.block_size, rows)
    grid = fresh_grid(x, setting.bits, setting.symmetric, np.dtype(np.float32))
    return Codes(nearest(x, grid, setting.bits), grid)


def correlated(rng: np.random.Generator) -> np.ndarray:
    """Inputs ``[n, in]`` of a few directions, with one large input, as activations of language models have
    them.
    """
    x = rng.standard_normal((400, 12)) @ rng.standard_normal((12, WIDTH)) + 0.3 * rng.standard_normal(
        (400, WIDTH)
    )
    x[:, 5] *= 20
    return x


def by_definition(rows: np.ndarray, H: np.ndarray, setting: RoundingSetting) -> np.ndarray:
    """Column after column to nearest; what is left is, each time, the least-squares solution for all columns
    that are rounded so far: ``W_R = W - E_F H_FR H_RR⁻¹``, with ``E_F`` their errors. In float64, without a
    Cholesky factor.
    """
    W0, W = rows.astype(np.float64), rows.astype(np.float64)
    found = np.zeros_like(W0)
    grid = BlockGrid(np.zeros((OUT, 1)), np.zeros((OUT, 1)), setting.symmetric)
    for column in range(WIDTH):
        if column % setting.block_size == 0:
            block = np.zeros((OUT, 1, setting.block_size))
            own = W[:, column : column + setting.block_size]
            block[:, 0, : own.shape[1]] = own
            grid = fresh_grid(block, setting.bits, setting.symmetric, np.dtype(np.float32))
        found[:, column] = values(nearest(W[:, column][:, None, None], grid, setting.bits), grid)[:, 0, 0]
        done, left = slice(0, column + 1), slice(column + 1, WIDTH)
        if column + 1 < WIDTH:
            W[:, left] = W0[:, left] - (found[:, done] - W0[:, done]) @ H[done, left] @ np.linalg.inv(
                H[left, left]
            )
    return found


@pytest.mark.parametrize(
    "setting",
    [
        RoundingSetting("int4", 4, 16, False),
        RoundingSetting("int4", 4, 32, True),
        RoundingSetting("int2", 2, 16, False),
    ],
)
def test_gptq_is_its_definition(setting: RoundingSetting) -> None:
    """Nearly all weights are the same; float32 may round a few the other way, which moves those behind them.
    The error of the outputs is the definition's within 2 %, and less than that of rounding to nearest.
    """
    rng = np.random.default_rng(setting.block_size)
    x, rows = correlated(rng), rng.standard_normal((OUT, WIDTH)).astype(np.float32)
    H = x.T @ x / len(x)
    damped = H + DAMPING * H.diagonal().mean() * np.eye(WIDTH)
    found, expected = (
        dense(round_gptq(rows, H.astype(np.float32), setting, np.float32)),
        by_definition(rows, damped, setting),
    )
    assert np.mean(np.abs(found - expected) < 1e-4) > 0.9
    ours, theirs, plain = (
        np.square((matrix - rows) @ x.T).sum()
        for matrix in (found, expected, dense(nearest_codes(rows, setting)))
    )
    assert ours == pytest.approx(theirs, rel=0.02)
    assert ours < 0.8 * plain


def test_awq_errs_less_in_the_outputs() -> None:
    """Over inputs of which one is twenty times as large; its scale is larger than the others'."""
    rng, setting = np.random.default_rng(3), RoundingSetting("int4", 4, 32, False)
    x, rows = correlated(rng), rng.standard_normal((OUT, WIDTH)).astype(np.float32)
    codes = round_awq(rows, (x.T @ x / len(x)).astype(np.float32), setting, np.float32)
    assert codes.divisor is not None and codes.divisor.argmax() == 5
    ours, plain = (
        np.square((dense(found) - rows) @ x.T).sum() for found in (codes, nearest_codes(rows, setting))
    )
    assert ours < 0.7 * plain


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_block_of_k_quants_errs_more_than_to_nearest(bits: int) -> None:
    """Blocks of both signs, of one, of one number, and of zeros; all of them together err less."""
    rng, setting = np.random.default_rng(bits), RoundingSetting("any", bits, 16, False)
    rows = rng.standard_normal((6, WIDTH)).astype(np.float32)
    rows[1], rows[2], rows[3], rows[4] = np.abs(rows[1]) + 3, -np.abs(rows[2]) - 3, 0.7, 0
    ours, plain = (
        np.square(split_blocks(16, dense(codes) - rows)).sum(-1)
        for codes in (round_k_quant(rows, setting, np.float32), nearest_codes(rows, setting))
    )
    assert (ours <= plain + 1e-9).all()
    assert ours.sum() < plain.sum()


@pytest.mark.parametrize("sized", [True, False])
def test_the_search_keeps_to_its_budget(sized: bool) -> None:
    """Of 5 products, beside all 243 choices: within the budget, and as good as the best of a budget that is
    one step tighter.
    """
    rng = np.random.default_rng(7)
    choices = {}
    for name in "abcde":
        sizes, errors = (
            rng.integers(50, 200) * np.array([8, 4, 2]),
            10 ** rng.uniform(-5, -3) * np.array([1, 15, 300]),
        )
        choices[name] = [
            BitChoice(bits, float(error), int(size))
            for bits, error, size in zip(BITS, errors, sizes, strict=True)
        ]
    every = [
        (sum(one.nbytes for one in picked), float(np.sqrt(sum(one.error for one in picked) / 5)))
        for picked in itertools.product(*choices.values())
    ]
    step = max(one[0].nbytes - one[1].nbytes for one in choices.values())
    for size, error in every[20:220:23]:
        found = greedy(choices, None if sized else error, size if sized else None).values()
        nbytes, total = sum(one.nbytes for one in found), float(np.sqrt(sum(one.error for one in found) / 5))
        if sized:
            assert nbytes <= size
            assert total <= min([other for taken, other in every if taken <= size - step], default=np.inf) * (
                1 + 1e-9
            )
        else:
            assert total <= error * (1 + 1e-9)
            assert nbytes <= min(taken for taken, other in every if other <= error) + step
    with pytest.raises(ConfigError, match="budget"):
        greedy(choices, 1e-9, None) if not sized else greedy(choices, None, 10)
