"""Proves that a method trains under torch, and computes there what it does under numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from .case import Case, adapted, digests, is_float, leaves, require, require_close, results, tensor


def torch_equals_numpy(case: Case) -> None:
    """``run`` and ``fold`` on torch float64 tensors give what they give on numpy arrays, within 1e-12
    (:data:`EXACT`).
    """
    here = (case.trained(), case.weight, case.bias)
    there = ({name: tensor(value) for name, value in here[0].items()}, tensor(case.weight), tensor(case.bias))
    expected, found = results(case, *here, case.x), results(case, *there, tensor(case.x))
    for what, value in expected.items():
        require((value is None) == (found[what] is None), f"{what} is given under one library only")
        if value is not None:
            require_close(found[what].numpy(), value, f"{what} differs under torch")


def gradients_reach_every_parameter(case: Case) -> None:
    """Within two steps of SGD from ``init`` each parameter has had a gradient that is not zero, and the base
    has not changed by a bit.

    Two, because a factor whose partner starts at zero (LoRA's A) can have none at the first.
    """
    params, weight, bias = leaves(case, case.fresh()), tensor(case.weight), tensor(case.bias)
    kept = {"weight": weight.numpy(), "bias": None if bias is None else bias.numpy()}
    before, reached = digests(kept), set()
    for _ in range(2):
        ((adapted(case, params, weight, bias, tensor(case.x)) - 1.0) ** 2).mean().backward()
        reached |= {
            name
            for name, value in params.items()
            if value.grad is not None and bool(value.grad.abs().max() > 0)
        }
        params = leaves(
            case,
            {
                name: (v if v.grad is None else v - 0.1 * v.grad).detach().numpy()
                for name, v in params.items()
            },
        )
    trained = {name for name, value in params.items() if value.requires_grad}
    require(reached == trained, f"no gradient reaches {', '.join(sorted(trained - reached))}")
    require(digests(kept) == before, "training changed the base")


def loss_falls(case: Case) -> None:
    """50 steps of Adam at rate 0.05 at least halve ``mean (run(x) - run(x; trained))^2`` from ``init``: a
    target that the method can reach.

    A half is little: Adam moves each parameter by up to 2.5, the target lies 0.3 away.
    """
    import torch  # noqa: PLC0415 - see the module's docstring

    layer, params = (tensor(case.weight), tensor(case.bias), tensor(case.x)), leaves(case, case.fresh())
    target = adapted(case, {name: tensor(value) for name, value in case.trained().items()}, *layer)
    optimizer = torch.optim.Adam([value for value in params.values() if value.requires_grad], lr=0.05)
    losses = []
    for _ in range(51):
        optimizer.zero_grad()
        loss = ((adapted(case, params, *layer) - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    require(losses[-1] < 0.5 * losses[0], f"the loss went from {losses[0]:.3g} to {losses[-1]:.3g} only")


def dtype_kept(case: Case) -> None:
    """When parameters and inputs share a dtype, ``run`` and ``fold`` keep it: float32 and float64 in numpy,
    both halves in torch.
    """
    import torch  # noqa: PLC0415 - see the module's docstring

    for dtype in (np.dtype(np.float32), np.dtype(np.float64), torch.bfloat16, torch.float16):

        def cast(value: Any, dtype: Any = dtype) -> Any:
            array = value if isinstance(dtype, np.dtype) else tensor(value)
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
        for name, value in results(case, params, weight, bias, cast(case.x)).items():
            require(value is None or value.dtype == dtype, f"{name} is not {dtype}, though all inputs are")
