"""The compiled kernel of merges: against exact arithmetic, among its instruction sets, and beside the merge
that numpy does without it.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from test_merge import lora_pack, tensors

import adapterpack
from adapterpack._native import lowrank
from adapterpack.io import safetensors as st

pytestmark = pytest.mark.fast
BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
SHAPES = [
    (1, 1, 1),
    (5, 31, 2),
    (4, 32, 3),
    (7, 33, 16),
    (13, 100, 65),
    (8, 257, 1),
    (3, 64, 0),
    (0, 40, 2),
    (2, 0, 2),
]


@pytest.fixture
def kernel() -> ModuleType:
    return lowrank._kernel or pytest.skip("no compiler here: numpy does all merges")


def drawn(
    rows: int, columns: int, rank: int, dtype: Any, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((rows, columns)) * 0.02).astype(dtype)
    up, down = (
        rng.standard_normal((rows, rank), np.float32) * 0.05,
        rng.standard_normal((rank, columns), np.float32) * 0.05,
    )
    return weight, up, down


def bits(value: np.ndarray) -> np.ndarray:
    return value.view(np.uint32 if value.dtype == F32 else np.uint16)


def nearest_float32(value: Fraction) -> np.float32:
    """The float32 next to an exact number, ties to even."""
    guess = np.float32(float(value))
    beside = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(beside, key=lambda each: (abs(Fraction(float(each)) - value), int(each.view(np.uint32)) & 1))


def test_a_product_is_a_chain_of_fused_multiply_adds(kernel: ModuleType) -> None:
    """Bit for bit against fractions: each step is rounded once, in the order of the rank."""
    _, up, down = drawn(5, 35, 6, np.float32)
    found = np.empty((5, 35), np.float32)
    packed = lowrank.panels(up, down)
    for name in kernel.sets():
        kernel.product(up, packed, found, name)
        for row in range(5):
            for column in range(35):
                total = np.float32(0)
                for k in range(6):
                    total = nearest_float32(
                        Fraction(float(up[row, k])) * Fraction(float(down[k, column]))
                        + Fraction(float(total))
                    )
                assert found[row, column] == total, (name, row, column)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_a_fold_is_the_product_added_and_rounded_once(
    kernel: ModuleType, shape: tuple[int, int, int], dtype: np.dtype[Any]
) -> None:
    """The bytes exactly; the sums to 1e-5 of what float64 says (a row is summed in float32); the product to
    rank rounding errors.
    """
    weight, up, down = drawn(*shape, dtype)
    packed = lowrank.panels(up, down)
    assert packed is not None
    change, out = np.empty(weight.shape, np.float32), np.empty_like(weight)
    lowrank.product(up, down, packed, change)
    exact = up.astype(np.float64) @ down.astype(np.float64)
    size = np.abs(up).astype(np.float64) @ np.abs(down)
    assert (np.abs(change - exact) <= shape[2] * 2.0**-24 * size + 1e-45).all()
    new = weight.astype(np.float32) + change
    error, inner, moved = lowrank.fold(weight, up, packed, out)
    assert np.array_equal(bits(out), bits(new.astype(dtype)))
    assert moved == bool((bits(out) != bits(weight)).any())
    lost = out.astype(np.float64) - new if dtype != F32 else ((new - weight) - change).astype(np.float64)
    assert error == pytest.approx((lost**2).sum(), rel=1e-5)
    scale = np.sqrt((lost**2).sum() * (change.astype(np.float64) ** 2).sum())
    assert inner == pytest.approx((lost * change).sum(), abs=1e-5 * scale)
    for name in kernel.sets():  # the bytes of every instruction set are the same
        again = np.empty_like(out)
        arrays = [each.view(np.uint16) if dtype == BF16 else each for each in (weight, again)]
        kernel.fold(arrays[0], up, packed, arrays[1], name)
        assert np.array_equal(bits(again), bits(out)), name


@pytest.mark.parametrize(
    ("dtype", "start", "plus"),
    [
        (
            BF16,
            [
                0x3F80,
                0x3F81,
                0x7F7F,
                0xFF7F,
                0x7F80,
                0xFF80,
                0x7FC0,
                0xFFC1,
                0x7F81,
                0x0000,
                0x8000,
                0x0001,
                0x8001,
            ],
            [2.0**-8, 2.0**-8, 3e38, -3e38, 1, -np.inf, 1, 1, 1, -0.0, -0.0, 5e-41, 1e-45],
        ),
        (
            F16,
            [
                0x3C00,
                0x3C01,
                0x7BFF,
                0xFBFF,
                0x7BFF,
                0x7C00,
                0xFC00,
                0x7E00,
                0xFE01,
                0x7C01,
                0x0000,
                0x8000,
                0x0001,
                0x8001,
                0x0000,
            ],
            [2.0**-11, 2.0**-11, 16, -16, 15.9, 1, -np.inf, 1, 1, 1, -0.0, -0.0, 3e-8, 1e-8, 2.9e-8],
        ),
    ],
)
def test_numbers_at_the_ends_of_a_dtype(
    kernel: ModuleType, dtype: np.dtype[Any], start: list[int], plus: list[float]
) -> None:
    """Ties to even, overflow to infinity, NaN, infinities, zeros of both signs, subnormals: as numpy and
    ml_dtypes round them.
    """
    weight, up, down = (
        np.array([start], np.uint16).view(dtype),
        np.ones((1, 1), np.float32),
        np.array([plus], np.float32),
    )
    packed = lowrank.panels(up, down)
    assert packed is not None
    with np.errstate(all="ignore"):
        # a sum that begins at zero is never -0
        expected = (weight.astype(np.float32) + (down + np.float32(0))).astype(dtype)
    nan = np.isnan(expected.astype(np.float32))
    for name in kernel.sets():
        out = np.empty_like(weight)
        arrays = [each.view(np.uint16) if dtype == BF16 else each for each in (weight, out)]
        kernel.fold(arrays[0], up, packed, arrays[1], name)
        assert np.array_equal(bits(out)[~nan], bits(expected)[~nan]), name
        assert np.isnan(out.astype(np.float32))[nan].all()


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_number_that_is_not_finite_touches_no_other(kernel: ModuleType, dtype: np.dtype[Any]) -> None:
    """Rows that are folded together, one of which overflows, and one of which holds NaN of either sign: every
    byte as numpy and ml_dtypes round it; that it moved is found in the numbers, and not in the NaN, which
    stays.
    """
    weight, up, down = drawn(21, 70, 5, dtype)
    weight[3, 40], weight[9, 69], weight[20, 0] = np.nan, -np.array(np.nan, dtype), np.inf
    up[12], down[:, 7] = 1e30, 1e30
    packed = lowrank.panels(up, down)
    assert packed is not None
    change = np.empty(weight.shape, np.float32)
    lowrank.product(up, down, packed, change)
    with np.errstate(all="ignore"):
        expected = (weight.astype(np.float32) + change).astype(dtype)
    assert not np.isfinite(expected.astype(np.float32)).all()
    for name in kernel.sets():
        out = np.empty_like(weight)
        arrays = [each.view(np.uint16) if dtype == BF16 else each for each in (weight, out)]
        error, _, moved = kernel.fold(arrays[0], up, packed, arrays[1], name)
        assert np.array_equal(bits(out), bits(expected)), name
        assert moved and not np.isfinite(error)
        lone = np.full((9, 64), weight[9, 69])
        arrays = [each.view(np.uint16) if dtype == BF16 else each for each in (lone, np.empty_like(lone))]
        assert kernel.fold(arrays[0], up[:9], packed[:2], arrays[1], name)[2] is False, name


def test_wrong_arrays_are_refused(kernel: ModuleType) -> None:
    """Every length, dtype and layout is checked before a number is read."""
    weight, up, down = drawn(4, 40, 3, np.float32)
    packed = lowrank.panels(up, down)
    assert packed is not None
    out = np.empty_like(weight)
    refused = pytest.raises((TypeError, ValueError, BufferError))
    for arguments in (
        (weight[:3], up, packed, out),
        (weight, up[:3], packed, out),
        (weight, up[:, :2], packed, out),
        (weight, up, packed[:1], out),
        (weight, up, packed[:, :, :16].copy(), out),
        (weight, up, packed, out[:, :39].copy()),
        (weight, up, packed, out[:, ::-1]),
        (weight.astype(np.float64), up, packed, out),
        (weight, up.astype(np.float64), packed, out),
        (weight.view(np.int32), up, packed, out),
        (weight[0], up, packed, out),
        (weight.astype(np.float16), up, packed, out),
        (weight, up, packed, out.view(np.float16)),
        (weight, up, packed, b"0" * 640),
        (weight, up, packed, out, "sse"),
        (weight, up, packed, None),
        (weight, up.T.copy().T, packed, out),
    ):
        with refused:
            kernel.fold(*arguments)
    out.flags.writeable = False
    with refused:
        kernel.fold(weight, up, packed, out)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_a_merge_with_and_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: np.dtype[Any]
) -> None:
    """The same report to 1e-4. The BLAS may add the same product in another order, which changes the last
    bits of float32, and one number in a thousand of 16 bits.
    """
    base = tmp_path / "base"
    base.mkdir()
    weight, _, _ = drawn(301, 77, 0, dtype, 3)
    st.write(
        base / "model.safetensors",
        {"a.x_proj.weight": weight, "a.y_proj.weight": weight[:50] * dtype.type(2)},
        {"format": "pt"},
    )
    (base / "config.json").write_text("{}")
    sites = {"a.x_proj": (301, 77), "a.y_proj": (50, 77)}
    packs = [lora_pack(base, r=rank, sites=sites, size=0.05, seed=rank) for rank in (3, 16)]
    one = adapterpack.merge(base, packs, tmp_path / "one")
    monkeypatch.setattr(lowrank, "COMPILED", False)
    monkeypatch.setattr(lowrank, "_kernel", None)
    two = adapterpack.merge(base, packs, tmp_path / "two")
    a, b = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    for name in a:
        if dtype == np.float32:
            # sums of 19 products of 0.0025
            np.testing.assert_allclose(a[name], b[name], rtol=1e-6, atol=1e-8)
        else:
            assert np.count_nonzero(a[name] != b[name]) <= max(1, a[name].size // 1000), name
    assert one.relative_error == pytest.approx(two.relative_error, rel=1e-4, abs=1e-9)
    assert one.kept == pytest.approx(two.kept, rel=1e-4)
    assert one.tensors_changed == two.tensors_changed == 2
