"""Fast forward and backward for common structures of the normal form; chosen by structure and sizes, never by
method name.

Four ways beat evaluating the form as it stands. **Parallel**: where ``up down`` is a chain of dense matrices
and fixed maps, the frozen layer and the branch are one step, which adds the branch into the layer's output,
and its gradient into the input's, with no tensor between. **After**: a scale, or pairs of outputs turned, and
the layer are one step (:mod:`~.output_transform`). **Within**: a change that is as wide as the weight, or of
a rank so high that it may as well be, is added to the weight, and one product does for both. **Again**: a
structure whose values inside are as wide as its input, or wider, is computed once more in the backward pass
instead of being kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ...adapter_methods import BlockCirculant, Dense, Kronecker, NormalForm, Scaled
from ...adapter_methods.core.sparse import Sparse
from .chain import Steps, add, add_back, back, by_step, chain_of, entering, of_matrix, through
from .dropout import Dropout
from .output_transform import after, turn_of


class Frozen(NamedTuple):
    """A linear layer that nothing but an adapter looks at: weight ``[out, in]`` and bias ``[out]`` or None,
    neither trained.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None


def is_low_rank(form: NormalForm) -> bool:
    """Whether a form has a dense low-rank branch and nothing more than a scale and a shift after it."""
    return form.is_parallel and isinstance(form.down, Dense) and isinstance(form.up, Dense)


def belongs_within(form: NormalForm, rows: int) -> bool:
    """Whether it costs less to add the change to the weight than to compute it as a branch for ``rows``
    inputs.

    Counted are multiplications, forward and backward: as a branch two products of the rank for each input and
    direction, and one for each factor that is trained; within it one product for the weight's gradient, and
    one of the two factors for each of those.
    """
    if not form.is_parallel:
        return False
    if form.up is None:
        return isinstance(form.down, Dense | Sparse)
    if not (isinstance(form.down, Dense) and isinstance(form.up, Dense | Scaled)):
        return False
    (rank, wide), tall = (
        form.down.stored.shape,
        len(form.up.left if isinstance(form.up, Scaled) else form.up.stored),
    )
    of_down, of_up = (
        torch.is_grad_enabled()
        and any(isinstance(value, torch.Tensor) and value.requires_grad for value in part)
        for part in (form.down, form.up)
    )
    if not (of_down or of_up):
        return bool(rows * (wide + tall) > wide * tall)
    as_branch = rows * rank * (2 * (wide + tall) + of_down * wide + of_up * tall)
    return bool(wide * tall * (rows + rank * (1 + of_down + of_up)) < as_branch)


def fuse(
    form: NormalForm, layer: Frozen, x: torch.Tensor, dropout: Dropout | None = None
) -> torch.Tensor | None:
    """``scale * (layer(x) + up(down(dropout(x)))) + shift``, all of one precision; None where there is no
    better way than to evaluate it.

    ``x`` is ``[..., in]``.
    """
    if dropout is None and belongs_within(form, x.shape[:-1].numel()):
        bias, rest = _bias(form, layer)
        return _finish(rest, functional.linear(x, _change(form, layer.weight), bias))
    turn = turn_of(form, len(layer.weight))
    if turn is not None:
        return _finish(NormalForm(shift=form.shift), after(x, layer.weight, layer.bias, turn))
    if form.is_parallel and form.up is None and isinstance(form.down, _WIDE_INSIDE):
        bias, rest = _bias(form, layer)
        return _finish(
            rest,
            functional.linear(x, layer.weight, bias)
            + _again(form.down, x if dropout is None else dropout.of(x)),
        )
    chain = chain_of(form)
    if chain is None:
        return None
    steps, matrices = chain
    if not steps and form.shift is None:
        return None
    bias, rest = _bias(form, layer)
    flat = _Parallel.apply(_flat(x), dropout if steps else None, layer.weight, bias, steps, *matrices)[0]
    return _finish(rest, flat.reshape(*x.shape[:-1], len(layer.weight)))


_WIDE_INSIDE = (BlockCirculant, Kronecker)
"""Operators that would keep spectra, or products with one of two factors, for the backward pass."""


def _again(operator: Any, x: torch.Tensor) -> torch.Tensor:
    """``operator.apply(x)``, of which ``x`` and the operator's own tensors are kept; nothing in it is
    drawn.
    """
    result: torch.Tensor = checkpoint(
        lambda value, *tensors: type(operator)(*tensors).apply(value),
        x,
        *operator,
        use_reentrant=False,
        preserve_rng_state=False,
    )
    return result


def _change(form: NormalForm, weight: torch.Tensor) -> torch.Tensor:
    """``weight + up down``."""
    down: Any = form.down
    result: torch.Tensor = (
        weight + down.after(form.up.dense())
        if form.up is not None
        else (down.onto(weight) if isinstance(down, Sparse) else weight + down.dense())
    )
    return result


def add_low_rank(
    form: NormalForm, y: torch.Tensor, x: torch.Tensor, dropout: Dropout | None = None
) -> torch.Tensor:
    """``scale * (y + up(down(dropout(x)))) + shift`` for a form of which :func:`is_low_rank` holds; ``x``
    ``[..., in]``, ``y`` ``[..., out]``.

    The result is of the wider precision of ``y`` and the form.
    """
    down, up = form.down.matrix, form.up.matrix  # type: ignore[union-attr]
    flat = _LowRank.apply(_flat(y), _flat(x), down, up, dropout)
    return _finish(form, flat.reshape(y.shape))


def _bias(form: NormalForm, layer: Frozen) -> tuple[torch.Tensor | None, NormalForm]:
    """The bias with the shift, where no scale comes between them, and the form without what that did."""
    if form.shift is None or form.output_scale is not None:
        return layer.bias, form
    return form.shift if layer.bias is None else layer.bias + form.shift, form._replace(shift=None)


def _finish(form: NormalForm, y: torch.Tensor) -> torch.Tensor:
    """``scale * y + shift``."""
    if form.output_scale is None:
        return y if form.shift is None else y + form.shift
    return y * form.output_scale if form.shift is None else torch.addcmul(form.shift, y, form.output_scale)


class _Parallel(torch.autograd.Function):
    """``x W^T + b + chain(dropout(x))`` of a frozen weight.

    Kept for the backward pass are the matrices and what entered those that are trained; for what dropout
    leaves of ``x``, ``x`` itself, of which it is made again. Values inside of the chain, which are narrow,
    are results too: that way a gradient of the gradient finds where they came from. Inputs and results are
    matrices: torch lets nobody change a view that a function made, and models change the outputs of their
    layers in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropout: Dropout | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        steps: Steps,
        *matrices: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """``x`` ``[rows, in]``, ``weight`` ``[out, in]``, ``bias`` ``[out]`` or None -> ``[rows, out]``, and
        the values.
        """
        at, trained = by_step(steps, matrices), by_step(steps, ctx.needs_input_grad[5:])
        y = functional.linear(x, weight, bias)
        values = entering(steps, at, x if dropout is None else dropout.of(x))
        if steps:
            add(y, steps[-1], at[-1], values[-1])
        ctx.steps, ctx.count, ctx.dropout = steps, len(matrices), dropout
        inside = [value for value, wanted in zip(values[1:], trained[1:], strict=True) if wanted]
        ctx.save_for_backward(weight, *matrices, *([x] if trained and trained[0] else []), *inside)
        ctx.set_materialize_grads(False)
        return y, *inside

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor | None, *inside: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of ``x``, the bias, and the matrices."""
        steps: Steps = ctx.steps
        dropout: Dropout | None = ctx.dropout
        of_x, _, _, of_bias, _, *of_matrices = ctx.needs_input_grad
        weight, *kept = ctx.saved_tensors
        at, trained = by_step(steps, kept[: ctx.count]), by_step(steps, of_matrices)
        values, added = kept[ctx.count :], [None, *inside] if steps and trained[0] else [*inside]
        for_matrices: list[torch.Tensor | None] = []
        for_x, going, factors = gradient @ weight if of_x and gradient is not None else None, gradient, None
        for position in reversed(range(len(steps))):
            extra = None
            if trained[position]:
                value, extra = values.pop(), added.pop()
                if dropout is not None and not position:
                    factors = dropout.factors(value)
                    value = value * factors
                for_matrices.append(None if going is None else of_matrix(going, value))
            elif steps[position] is None:
                for_matrices.append(None)
            if going is not None and (position or dropout is not None or for_x is None):
                going = back(steps[position], at[position], going)
            elif going is not None:
                add_back(for_x, steps[0], at[0], going)
            going = extra if going is None else going if extra is None else going + extra
        if dropout is not None and of_x and going is not None:
            factors = dropout.factors(going) if factors is None else factors
            for_x = going * factors if for_x is None else for_x.addcmul_(going, factors)
        elif for_x is None and of_x:
            for_x = going
        return (
            for_x,
            None,
            None,
            gradient.sum(0) if of_bias and gradient is not None else None,
            None,
            *reversed(for_matrices),
        )


class _LowRank(torch.autograd.Function):
    """``y + (dropout(x) A^T) B^T`` for a layer's output that is there already.

    Only ``x``, ``A`` and ``B`` are kept for the backward pass: ``x A^T`` is computed again, which costs
    rank/width of a layer. ``x`` and ``y`` may be of a lower precision than ``A`` and ``B``: ``x`` is kept as
    it came, and every product is taken in theirs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        dropout: Dropout | None = None,
    ) -> torch.Tensor:
        """``y`` ``[rows, out]``, ``x`` ``[rows, in]``, ``A`` ``[r, in]``, ``B`` ``[out, r]`` -> ``[rows,
        out]``.
        """
        ctx.save_for_backward(x, A, B)
        ctx.dtype, ctx.dropout = y.dtype, dropout
        wide = x.to(A.dtype)
        inner = (wide if dropout is None else dropout.of(wide)) @ A.T
        # One pass over the output where the dtypes allow it: neither the branch nor the sum is a tensor of
        # its own.
        return torch.addmm(y, inner, B.T) if y.dtype == B.dtype else y + inner @ B.T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of ``y``, ``x``, ``A`` and ``B``."""
        x, A, B = ctx.saved_tensors
        of_y, of_x, of_a, of_b, _ = ctx.needs_input_grad
        wide, inner = x.to(A.dtype), through(gradient, B)
        factors = None if ctx.dropout is None else ctx.dropout.factors(wide)
        wide, for_x = wide if factors is None else wide * factors, inner @ A if of_x else None
        return (
            gradient.to(ctx.dtype) if of_y else None,
            None if for_x is None else (for_x if factors is None else for_x * factors).to(x.dtype),
            inner.T @ wide if of_a else None,
            of_matrix(gradient, wide @ A.T) if of_b else None,
            None,
        )


def _flat(value: torch.Tensor) -> torch.Tensor:
    """``[..., width]`` as ``[rows, width]``."""
    return value.reshape(value.shape[:-1].numel(), value.shape[-1])
