"""Gram matrices of narrow matrices and products with them: the kernel and numpy against exact sums, for odd shapes."""

from __future__ import annotations

import numpy as np
import pytest

from adapterpack.compose import grams
from adapterpack.compose.grams import Narrow

pytestmark = pytest.mark.fast

SHAPES = [(1, 1, 1), (7, 3, 2), (64, 16, 16), (65, 17, 15), (129, 33, 40), (300, 64, 5), (40, 256, 20), (30, 257, 3)]


@pytest.fixture(params=["compiled", "numpy"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(grams, "_kernel", None)
    elif grams._kernel is None:
        pytest.skip("nothing was compiled here, or the processor has no AVX-512")
    return str(request.param)


@pytest.mark.parametrize(("m", "R", "k"), SHAPES)
@pytest.mark.parametrize("turned", [False, True])
def test_products_are_those_of_float64(kind: str, m: int, R: int, k: int, turned: bool) -> None:
    """Sums of products of float32 in float64 differ by their order alone, so by a few units of 1e-16 for each term; what is rounded to
    float32 by half a unit of it."""
    rng = np.random.default_rng(m)
    X = [rng.standard_normal((m, R)).astype(np.float32) for _ in range(3)]
    Y = rng.standard_normal((3, R, k))
    given = [np.asfortranarray(x).T if turned else x for x in X]
    narrow = Narrow(given, turned)
    exact = np.array([x.astype(np.longdouble).T @ x.astype(np.longdouble) for x in X])
    size = np.array([np.abs(x).astype(np.float64).T @ np.abs(x) for x in X])
    assert (np.abs(narrow.grams() - exact) <= 1e-16 * (m + 1) * size).all()
    assert np.array_equal(narrow.grams(), narrow.grams().transpose(0, 2, 1))
    wanted = np.array([x.astype(np.longdouble) @ y.astype(np.longdouble) for x, y in zip(X, Y, strict=True)])
    found = narrow.times(Y.transpose(0, 2, 1)).transpose(0, 2, 1) if turned else narrow.times(Y)
    room = np.array([np.abs(x).astype(np.float64) @ np.abs(y) for x, y in zip(X, Y, strict=True)])
    assert found.dtype == np.float32
    assert (np.abs(found - wanted) <= 1e-16 * (R + 1) * room + 2.0**-24 * np.abs(wanted)).all()


def test_a_matrix_is_the_same_among_others(kind: str) -> None:
    """What comes out for one does not depend on its neighbours, to the bit."""
    rng = np.random.default_rng(0)
    X = [rng.standard_normal((50, 12)).astype(np.float32) for _ in range(4)]
    Y = rng.standard_normal((4, 12, 5))
    together = Narrow(X)
    for index, x in enumerate(X):
        alone = Narrow([x])
        assert np.array_equal(alone.grams()[0], together.grams()[index])
        assert np.array_equal(alone.times(Y[index : index + 1])[0], together.times(Y)[index])


def test_infinity_and_nan_go_through(kind: str) -> None:
    X = np.ones((5, 2), np.float32)
    X[3, 1] = np.inf
    found = Narrow([X]).grams()[0]
    assert found[0, 0] == 5
    assert np.isinf(found[1, 1])
    X[3, 1] = np.nan
    assert np.isnan(Narrow([X]).grams()[0][1, 1])


def test_the_kernel_refuses_what_does_not_fit() -> None:
    kernel = pytest.importorskip("adapterpack.compose.grams._grams", reason="only with a compiler, for processors with AVX-512")
    X, out = np.ones((5, 2), np.float32), np.empty((1, 2, 2))
    for wrong in ((), (X, X), (X, X[:4]), (X.astype(np.float64),), (X.T,), (np.ones(5, np.float32),), (1,)):
        with pytest.raises((ValueError, TypeError, BufferError)):
            kernel.grams(tuple(wrong), False, out)
    with pytest.raises(ValueError, match="too large"):
        kernel.grams((np.ones((2, 300), np.float32),), False, np.empty((1, 300, 300)))
    with pytest.raises((ValueError, BufferError)):
        kernel.grams((X,), False, np.frombuffer(bytes(32)).reshape(1, 2, 2))
    for Y, there in ((np.ones((1, 3, 4)), (1, 5, 4)), (np.ones((1, 2, 4)), (1, 4, 4)), (np.ones((2, 2, 4)), (2, 5, 4))):
        with pytest.raises(ValueError, match="do not fit"):
            kernel.times((X,), Y, False, np.empty(there, np.float32), None)
    with pytest.raises(ValueError, match="do not fit"):
        kernel.times((X,), np.ones((1, 4, 5)), True, np.empty((1, 4, 5), np.float32), None)
    for turned, signs in ((True, (1, 4)), (False, (1, 3))):
        with pytest.raises(ValueError, match="do not fit"):
            kernel.times((X,), np.ones((1, 2, 4)), turned, np.empty((1, 5, 4), np.float32), np.empty(signs))


@pytest.mark.parametrize(("m", "R", "k"), SHAPES)
def test_the_largest_entry_of_a_column_is_positive(kind: str, m: int, R: int, k: int) -> None:
    rng = np.random.default_rng(k)
    X, Y = [rng.standard_normal((m, R)).astype(np.float32) for _ in range(2)], rng.standard_normal((2, R, k))
    found, signs = Narrow(X).signed(Y)
    assert np.array_equal(found, Narrow(X).times(Y) * signs[:, None, :].astype(np.float32))
    assert (found.max(axis=1) >= -found.min(axis=1)).all()
    assert set(signs.ravel()) <= {1.0, -1.0}
