"""Gram matrices of narrow matrices and products with them: the kernel and numpy against exact sums, for odd shapes."""

from __future__ import annotations

import numpy as np
import pytest

from adapterpack.composing import grams
from adapterpack.composing.grams import Narrow

pytestmark = pytest.mark.fast

SHAPES = [(1, 1, 1), (7, 3, 2), (64, 16, 16), (65, 17, 15), (129, 33, 40), (300, 64, 5), (40, 256, 20), (30, 257, 3)]


@pytest.fixture(params=["compiled", "numpy"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(grams, "_kernel", None)
    elif grams._kernel is None:
        pytest.skip("nothing was compiled here, or the processor has no AVX-512")
    return str(request.param)


def parts_of(x: np.ndarray, turned: bool, ends: list[int]) -> tuple[np.ndarray, ...]:
    """A matrix in parts of some columns, as they are given."""
    parts = np.split(x, ends, axis=1)
    return tuple(np.ascontiguousarray(part.T if turned else part) for part in parts)


@pytest.mark.parametrize(("m", "R", "k"), SHAPES)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_products_are_those_of_float64(kind: str, m: int, R: int, k: int, turned: bool, count: int) -> None:
    """Sums of products of float32 in float64 differ by their order alone, so by a few units of 1e-16 for each term; what is rounded to
    float32 by half a unit of it. In parts, of which one may be empty, each has a weight."""
    rng = np.random.default_rng(m)
    X = [rng.standard_normal((m, R)).astype(np.float32) for _ in range(3)]
    Y = rng.standard_normal((3, R, k))
    ends = sorted(rng.integers(0, R + 1, count - 1).tolist())
    weights = [[1.0] * count if count == 1 else rng.standard_normal(count).tolist() for _ in X]
    narrow = Narrow([parts_of(x, turned, ends) for x in X], turned, weights)
    columns = [np.repeat(own, np.diff([0, *ends, R])) for own in weights]
    wide = [x.astype(np.longdouble) * own for x, own in zip(X, columns, strict=True)]
    exact = np.array([x.T @ x for x in wide])
    size = np.array([np.abs(x).T @ np.abs(x) for x in wide])
    assert (np.abs(narrow.grams() - exact) <= 1e-16 * (m + 4) * size).all()
    assert np.array_equal(narrow.grams(), narrow.grams().transpose(0, 2, 1))
    wanted = np.array([x @ y.astype(np.longdouble) for x, y in zip(wide, Y, strict=True)])
    found = narrow.times(Y.transpose(0, 2, 1)).transpose(0, 2, 1) if turned else narrow.times(Y)
    room = np.array([np.abs(x) @ np.abs(y) for x, y in zip(wide, Y, strict=True)])
    assert found.dtype == np.float32
    assert (np.abs(found - wanted) <= 1e-16 * (R + 4) * room + 2.0**-24 * np.abs(wanted)).all()


def test_a_matrix_is_the_same_among_others(kind: str) -> None:
    """What comes out for one does not depend on its neighbours, to the bit."""
    rng = np.random.default_rng(0)
    X = [rng.standard_normal((50, 12)).astype(np.float32) for _ in range(4)]
    Y = rng.standard_normal((4, 12, 5))
    together = Narrow([(x,) for x in X])
    for index, x in enumerate(X):
        alone = Narrow([(x,)])
        assert np.array_equal(alone.grams()[0], together.grams()[index])
        assert np.array_equal(alone.times(Y[index : index + 1])[0], together.times(Y)[index])


def test_infinity_and_nan_go_through(kind: str) -> None:
    X = np.ones((5, 2), np.float32)
    X[3, 1] = np.inf
    found = Narrow([(X,)]).grams()[0]
    assert found[0, 0] == 5
    assert np.isinf(found[1, 1])
    X[3, 1] = np.nan
    assert np.isnan(Narrow([(X,)]).grams()[0][1, 1])


def test_the_kernel_refuses_what_does_not_fit() -> None:
    kernel = pytest.importorskip("adapterpack.composing.grams._grams", reason="only with a compiler, for processors with AVX-512")
    X, out = np.ones((5, 2), np.float32), np.empty((1, 2, 2))
    for wrong in ((), (X,), X, [(X,)], ((X,), (X,)), ((X,), (X[:4],)), ((X, X[:4]),), ((X,), (X, X)), ((),), ((X[:, :1], X[:, 1:].copy()),),
                  ((X.astype(np.float64),),), ((X.T,),), ((np.ones(5, np.float32),),), ((1,),), (1,), ((X, X),)):
        with pytest.raises((ValueError, TypeError, BufferError)):
            kernel.grams(wrong, False, out)
    for wide in ((np.ones((2, 300), np.float32),), (np.ones((2, 200), np.float32), np.ones((2, 100), np.float32))):
        with pytest.raises(ValueError, match="at most 256"):
            kernel.grams((wide,), False, np.empty((1, 300, 300)))
    with pytest.raises((ValueError, BufferError)):
        kernel.grams(((X,),), False, np.frombuffer(bytes(32)).reshape(1, 2, 2))
    for Y, there in ((np.ones((1, 3, 4)), (1, 5, 4)), (np.ones((1, 2, 4)), (1, 4, 4)), (np.ones((2, 2, 4)), (2, 5, 4))):
        with pytest.raises(ValueError, match="do not fit"):
            kernel.times(((X,),), Y, False, np.empty(there, np.float32), None)
    with pytest.raises(ValueError, match="do not fit"):
        kernel.times(((X,),), np.ones((1, 4, 5)), True, np.empty((1, 4, 5), np.float32), None)
    for turned, signs in ((True, (1, 4)), (False, (1, 3))):
        with pytest.raises(ValueError, match="do not fit"):
            kernel.times(((X,),), np.ones((1, 2, 4)), turned, np.empty((1, 5, 4), np.float32), np.empty(signs))


@pytest.mark.parametrize("R", [1, 2, 7, 16, 33, 256, 257])
def test_factors_are_those_of_cholesky(kind: str, R: int) -> None:
    """``U^T U`` is the matrix and ``U back`` the identity, within the backward error of Cholesky's method: ``R`` units of its diagonal
    (Higham 2002, theorem 10.3), and for the inverse of correlations of this condition as many."""
    X = np.random.default_rng(R).standard_normal((3, 4 * R, R)) * np.logspace(-3, 3, R)
    G = X.transpose(0, 2, 1) @ X
    found = grams.factors(G, 1e6)
    assert found is not None
    U, back = found
    lengths = np.sqrt(np.einsum("brr->br", G))
    assert (np.abs(U.transpose(0, 2, 1) @ U - G) <= 1.2e-16 * (R + 2) * lengths[:, :, None] * lengths[:, None, :]).all()
    assert (np.abs(U @ back - np.eye(R)) <= 1e-15 * (R + 2)).all()
    assert not np.tril(U, -1).any()
    assert not np.tril(back, -1).any()


def test_columns_that_depend_on_each_other_have_no_factor(kind: str) -> None:
    """One of several is enough; and so is one that is nearly so, one of zeros, or a number that is none."""
    good = np.array([[2.0, 1.0], [1.0, 2.0]])
    assert grams.factors(good[None], 1e6) is not None
    for bad in ([[1.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0 + 1e-9]], [[1.0, 0.0], [0.0, 0.0]], [[1.0, 2.0], [2.0, 1.0]],
                [[np.nan, 1.0], [1.0, 2.0]], [[np.inf, 1.0], [1.0, 2.0]]):
        assert grams.factors(np.array([good, bad, good]), 1e6) is None


def test_the_kernel_refuses_matrices_that_are_not_square() -> None:
    kernel = pytest.importorskip("adapterpack.composing.grams._grams", reason="only with a compiler, for processors with AVX-512")
    square = np.ones((2, 3, 3))
    for given in ((square[:, :2], square, square), (square, square[:1], square), (square, square, square[:1]),
                  (np.ones((1, 300, 300)),) * 3, (square[0], square, square), (square.astype(np.float32), square, square),
                  (square, np.broadcast_to(1.0, (2, 3, 3)), square), (None, square, square)):
        with pytest.raises((ValueError, TypeError, BufferError)):
            kernel.factors(*given, 1e6)


@pytest.mark.parametrize(("m", "R", "k"), SHAPES)
def test_the_largest_entry_of_a_column_is_positive(kind: str, m: int, R: int, k: int) -> None:
    rng = np.random.default_rng(k)
    X, Y = [rng.standard_normal((m, R)).astype(np.float32) for _ in range(2)], rng.standard_normal((2, R, k))
    narrow = Narrow([parts_of(x, False, [R // 2]) for x in X], weights=[[1.0, -0.5], [2.0, 1.0]])
    found, signs = narrow.signed(Y)
    assert np.array_equal(found, narrow.times(Y) * signs[:, None, :].astype(np.float32))
    assert (found.max(axis=1) >= -found.min(axis=1)).all()
    assert set(signs.ravel()) <= {1.0, -1.0}
