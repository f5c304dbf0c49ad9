"""Proves that a method does not mix the rows of a batch, and works with other adapters on the same layer."""

from __future__ import annotations

import numpy as np

from adapterpack.adapter_methods import fold, run
from adapterpack.testing import Case, make_layer, require


def in_order(case: Case) -> None:
    """Two adapters one after the other, ``run2(run1(x)) == x fold2(fold1(W)).T + b``, within 1e-11 of the
    largest entry.

    What reads the base reads the original one in both. For an additive method the other order gives the same.
    """
    first = case.trained()
    second = {name: v * 0.5 + 0.1 if name in case.trains else v for name, v in first.items()}
    x, site = case.x, case.adapted().site
    results = []
    for one, two in ((first, second), (second, first)):
        inner = case.adapted(one)
        forward = run(case.method, case.config, two, site, inner.run, x)
        merged = make_layer(*fold(case.method, case.config, two, site, *inner.fold()))(x)
        require(
            float(np.abs(forward - merged).max()) <= 1e-11 * np.abs(forward).max(),
            "forward and merge disagree on two adapters",
        )
        results.append(forward)
    if case.method.traits.additive:
        require(
            float(np.abs(results[0] - results[1]).max()) <= 1e-11 * np.abs(results[0]).max(),
            "the order of additive adapters matters",
        )
