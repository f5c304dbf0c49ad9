"""Runs a frozen linear layer and its adapter faster, or in less memory, than evaluating the adapter's normal
form; chosen by structure and sizes, never by method name.

There are four ways. **Parallel**: if the branch ``up down`` is a chain of dense matrices and fixed maps,
layer and branch are one autograd function, which adds the branch into the layer's output, and its gradient
into the input's, without temporaries. **After**: a scale or a rotation of pairs of outputs is computed
together with the layer (:mod:`~.output_transform`). **Within**: a change as wide as the weight, or of a rank
so high that two products cost more, is added to the weight, and one product computes both. **Again**: a
structure whose intermediate values are at least as wide as its input is recomputed in the backward pass
instead of stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ...adapter_methods import BlockCirculant, Dense, Kronecker, NormalForm, Scaled
from ...adapter_methods.core.sparse import Sparse
from .chain import Steps, add, add_back, back, by_step, chain_of, entering, of_matrix, through
from .output_transform import after, turn_of

_STEPS = 1 << 16
"""The dropout rate is rounded to a multiple of 1 / 65536, the resolution of a 16-bit random number."""
_EACH = 4
"""How many 16-bit numbers are cut from one 64-bit random number: CPUs draw these one after the other, so
fewer draws are faster.
"""


class Dropout(NamedTuple):
    """One draw of dropout, with the same mask for all tensors of one size.

    Sets ``dropped / 65536`` of the values to zero and scales the others up to keep the expected value.
    """

    seed: int
    dropped: int

    @classmethod
    def draw(cls, rate: float) -> Dropout:
        """Draws a seed from torch's own generator, whose state training checkpoints and activation
        checkpointing restore.
        """
        return cls(int(torch.randint(1 << 62, ())), min(round(rate * _STEPS), _STEPS - 1))

    def of(self, x: Tensor) -> Tensor:
        """Returns ``x`` with dropout applied."""
        return x * self.factors(x)

    def factors(self, x: Tensor) -> Tensor:
        """Returns the factor of each value in ``x`` or a tensor of its size: zero, or slightly more than
        one.
        """
        generator = torch.Generator(x.device).manual_seed(self.seed)
        drawn = torch.empty(-(-x.numel() // _EACH), dtype=torch.int64, device=x.device).random_(
            -(1 << 63), None, generator=generator
        )
        kept = drawn.view(torch.int16)[: x.numel()].view(x.shape) >= self.dropped - _STEPS // 2
        return kept.to(x.dtype).mul_(_STEPS / (_STEPS - self.dropped))


class Frozen(NamedTuple):
    """A frozen linear layer that only an adapter uses: weight ``[out, in]`` and bias ``[out]`` or None."""

    weight: Tensor
    bias: Tensor | None


def is_low_rank(form: NormalForm) -> bool:
    """Whether a form is a dense low-rank branch, with at most a scale and a shift after it."""
    return form.is_parallel and isinstance(form.down, Dense) and isinstance(form.up, Dense)


def belongs_within(form: NormalForm, rows: int) -> bool:
    """Whether adding the change to the weight costs less than computing it as a branch for ``rows`` inputs.

    Compares multiplications, forward and backward. A branch takes two products of the rank per input and
    direction, and one for each factor that is trained. Adding to the weight takes one product for the
    weight's gradient, one to form the change, and one for the gradient of each trained factor.
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
        torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in part)
        for part in (form.down, form.up)
    )
    if not (of_down or of_up):
        return bool(rows * (wide + tall) > wide * tall)
    as_branch = rows * rank * (2 * (wide + tall) + of_down * wide + of_up * tall)
    return bool(wide * tall * (rows + rank * (1 + of_down + of_up)) < as_branch)


def fuse(form: NormalForm, layer: Frozen, x: Tensor, dropout: Dropout | None = None) -> Tensor | None:
    """Returns ``scale * (layer(x) + up(down(dropout(x)))) + shift`` for ``x`` ``[..., in]``, all in one
    precision; None if evaluating the form is as good.
    """
    bias, rest = _bias(form, layer)
    if dropout is None and belongs_within(form, x.shape[:-1].numel()):
        return _finish(rest, functional.linear(x, _change(form, layer.weight), bias))
    # torch.compile cannot trace "not" of a tuple
    turns = form.pre is None and form.down is None and len(form.routes) == 0
    turn = turn_of(form, len(layer.weight)) if turns else None
    if turn is not None:
        return _finish(NormalForm(shift=form.shift), after(x, layer.weight, layer.bias, turn))
    if form.is_parallel and form.up is None and isinstance(form.down, _WIDE_INSIDE):
        branch = _again(form.down, x if dropout is None else dropout.of(x))
        return _finish(rest, functional.linear(x, layer.weight, bias) + branch)
    chain = chain_of(form)
    if chain is None:
        return None
    steps, matrices = chain
    if not steps and form.shift is None:
        return None
    flat = _Parallel.apply(_flat(x), dropout if steps else None, layer.weight, bias, steps, *matrices)[0]
    return _finish(rest, flat.reshape(*x.shape[:-1], len(layer.weight)))


_WIDE_INSIDE = (BlockCirculant, Kronecker)
"""Operators that would store spectra, or products with one of two factors, for the backward pass."""


def _again(operator: Any, x: Tensor) -> Tensor:
    """Returns ``operator.apply(x)``, keeping only ``x`` and the operator's tensors; the backward pass
    recomputes the rest. No random numbers are drawn inside, so their state is not kept.
    """
    return checkpoint(
        lambda value, *tensors: type(operator)(*tensors).apply(value),
        x,
        *operator,
        use_reentrant=False,
        preserve_rng_state=False,
    )


def _change(form: NormalForm, weight: Tensor) -> Tensor:
    """Returns ``weight + up down``."""
    down: Any = form.down
    return (
        weight + down.after(form.up.dense())
        if form.up is not None
        else (down.onto(weight) if isinstance(down, Sparse) else weight + down.dense())
    )


def add_low_rank(form: NormalForm, y: Tensor, x: Tensor, dropout: Dropout | None = None) -> Tensor:
    """Returns ``scale * (y + up(down(dropout(x)))) + shift`` for a form that :func:`is_low_rank` accepts;
    ``x`` is ``[..., in]``, ``y`` ``[..., out]``.

    The result has the wider precision of ``y`` and the form.
    """
    down, up = form.down.matrix, form.up.matrix  # type: ignore[union-attr]
    flat = _LowRank.apply(_flat(y), _flat(x), down, up, dropout)
    return _finish(form, flat.reshape(y.shape))


def _bias(form: NormalForm, layer: Frozen) -> tuple[Tensor | None, NormalForm]:
    """Returns the layer's bias with the form's shift added, and the form without it; unchanged if a scale
    comes between them.
    """
    if form.shift is None or form.output_scale is not None:
        return layer.bias, form
    return form.shift if layer.bias is None else layer.bias + form.shift, form._replace(shift=None)


def _finish(form: NormalForm, y: Tensor) -> Tensor:
    """Returns ``scale * y + shift``."""
    if form.output_scale is None:
        return y if form.shift is None else y + form.shift
    return y * form.output_scale if form.shift is None else torch.addcmul(form.shift, y, form.output_scale)


class _Parallel(torch.autograd.Function):
    """Computes ``x W^T + b + chain(dropout(x))`` for a frozen weight.

    The backward pass keeps the matrices and the inputs of those that are trained; instead of ``dropout(x)``
    it keeps ``x`` and draws the mask again. The narrow values inside the chain are outputs too, so that
    second derivatives reach what they came from. Inputs and outputs are matrices: torch forbids changing a
    view that a custom function returned, and models change the outputs of their layers in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropout: Dropout | None,
        weight: Tensor,
        bias: Tensor | None,
        steps: Steps,
        *matrices: Tensor,
    ) -> tuple[Tensor, ...]:
        """Maps ``x`` ``[rows, in]``, with ``weight`` ``[out, in]`` and ``bias`` ``[out]`` or None, to
        ``[rows, out]`` and the values inside the chain that trained matrices read.
        """
        at = by_step(steps, matrices)
        trained = by_step(steps, ctx.needs_input_grad[5:])
        y = functional.linear(x, weight, bias)
        values = entering(steps, at, x if dropout is None else dropout.of(x))
        if steps:
            add(y, steps[-1], at[-1], values[-1])
        ctx.steps = steps
        ctx.count = len(matrices)
        ctx.dropout = dropout
        inside = [value for value, wanted in zip(values[1:], trained[1:], strict=True) if wanted]
        ctx.save_for_backward(weight, *matrices, *([x] if trained and trained[0] else []), *inside)
        ctx.set_materialize_grads(False)
        return y, *inside

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *inside: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns the gradients of ``x``, the bias and the matrices."""
        steps: Steps = ctx.steps
        dropout: Dropout | None = ctx.dropout
        of_x, _, _, of_bias, _, *of_matrices = ctx.needs_input_grad
        weight, *kept = ctx.saved_tensors
        at = by_step(steps, kept[: ctx.count])
        trained = by_step(steps, of_matrices)
        values = kept[ctx.count :]
        added = [None, *inside] if steps and trained[0] else [*inside]
        for_matrices: list[Tensor | None] = []
        for_x = gradient @ weight if of_x and gradient is not None else None
        going = gradient
        factors = None
        # ``going`` is the gradient on its way back through the chain. ``extra`` is the gradient that a value
        # inside the chain receives as an output of its own, in second derivatives.
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
            # The first step's result is added into the gradient of ``x`` directly, unless dropout has to
            # scale it first.
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
    """Computes ``y + (dropout(x) A^T) B^T`` for a layer's output ``y`` that exists already.

    The backward pass keeps ``x``, ``A`` and ``B`` only; recomputing ``x A^T`` costs rank / width of a layer.
    ``x`` and ``y`` may have a lower precision than ``A`` and ``B``: ``x`` is kept as it came, and every
    product is computed in theirs.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, dropout: Dropout | None = None
    ) -> Tensor:
        """Maps ``y`` ``[rows, out]``, ``x`` ``[rows, in]``, ``A`` ``[r, in]`` and ``B`` ``[out, r]`` to
        ``[rows, out]``.
        """
        ctx.save_for_backward(x, A, B)
        ctx.dtype = y.dtype
        ctx.dropout = dropout
        wide = x.to(A.dtype)
        inner = (wide if dropout is None else dropout.of(wide)) @ A.T
        # With equal dtypes, ``addmm`` adds the branch in one pass over the output, without a tensor for the
        # branch.
        return torch.addmm(y, inner, B.T) if y.dtype == B.dtype else y + inner @ B.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of ``y``, ``x``, ``A`` and ``B``."""
        x, A, B = ctx.saved_tensors
        of_y, of_x, of_a, of_b, _ = ctx.needs_input_grad
        wide = x.to(A.dtype)
        inner = through(gradient, B)
        factors = None if ctx.dropout is None else ctx.dropout.factors(wide)
        wide = wide if factors is None else wide * factors
        for_x = inner @ A if of_x else None
        return (
            gradient.to(ctx.dtype) if of_y else None,
            None if for_x is None else (for_x if factors is None else for_x * factors).to(x.dtype),
            inner.T @ wide if of_a else None,
            of_matrix(gradient, wide @ A.T) if of_b else None,
            None,
        )


def _flat(value: Tensor) -> Tensor:
    """Reshapes ``[..., width]`` to ``[rows, width]``."""
    return value.reshape(value.shape[:-1].numel(), value.shape[-1])
