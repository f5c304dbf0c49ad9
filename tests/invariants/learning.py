"""Proves that a method trains under torch, and computes there what it does under numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from adapterpack.testing import (
    AdaptedCase,
    Case,
    is_float,
    make_leaves,
    require,
    to_tensor,
)


def loss_falls(case: Case) -> None:
    """50 steps of Adam at rate 0.05 at least halve ``mean (run(x) - run(x; trained))^2`` from ``init``: a
    target that the method can reach.

    A half is little: Adam moves each parameter by up to 2.5, the target lies 0.3 away.
    """
    import torch

    weight, bias, x = to_tensor(case.weight), to_tensor(case.bias), to_tensor(case.x)
    params = make_leaves(case, case.fresh())
    trained = {name: to_tensor(value) for name, value in case.trained().items()}
    target = AdaptedCase(case, trained, weight, bias).run(x)
    optimizer = torch.optim.Adam([value for value in params.values() if value.requires_grad], lr=0.05)
    losses = []
    for _ in range(51):
        optimizer.zero_grad()
        loss = ((AdaptedCase(case, params, weight, bias).run(x) - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    require(losses[-1] < 0.5 * losses[0], f"the loss went from {losses[0]:.3g} to {losses[-1]:.3g} only")


def dtype_kept(case: Case) -> None:
    """When parameters and inputs share a dtype, ``run`` and ``fold`` keep it: float32 and float64 in numpy,
    both halves in torch.
    """
    import torch

    for dtype in (np.dtype(np.float32), np.dtype(np.float64), torch.bfloat16, torch.float16):

        def cast(value: Any, dtype: Any = dtype) -> Any:
            array = value if isinstance(dtype, np.dtype) else to_tensor(value)
            return (
                array
                if value is None or not is_float(value)
                else array.astype(dtype)
                if array is value
                else array.to(dtype)
            )

        params, weight, bias = (
            {name: cast(value) for name, value in case.trained().items()},
            cast(case.weight),
            cast(case.bias),
        )
        for name, value in AdaptedCase(case, params, weight, bias).results(cast(case.x)).items():
            require(value is None or value.dtype == dtype, f"{name} is not {dtype}, though all inputs are")
