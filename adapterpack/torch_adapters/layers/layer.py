"""Wraps layers to hold adapters of weight methods (LoRA and its relatives), and runs layer and adapters.

:class:`Adapted` is the base class of all wrappers whose adapters belong to a method; :class:`AdaptedLayer` is
the wrapper of linear layers, and :class:`_Pass` one adapter in one of its calls.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...adapter_methods import (
    METHODS,
    Dense,
    Method,
    Site,
    evaluate,
    fold,
    from_matrix,
    frozen,
    run,
    to_matrix,
)
from ...errors import Unsupported
from ...manifest import Composition
from ...manifest.composed_method import method_of_composition
from ..kernels import low_rank
from .calls import Args, Kwargs
from .tensors import as_parameter
from .weights import device_of, tensor_of, weight_of
from .wrapper import Wrapper, child, innermost, key_of

Tensors = Mapping[str, nn.Parameter]
Place = tuple[nn.Module, str]
"""A parameter's module, and its name there."""


@dataclasses.dataclass
class Held:
    """An adapter at a site, apart from its tensors: its method and config there, and how the model uses it.

    ``secondary``: of an adapter of several methods, this is not the main one. ``weight`` multiplies the
    adapter's change. ``where`` returns the positions at which it acts, ``[batch, length]``; None: everywhere.
    ``first_pass`` holds results of the model's first pass for the current call.
    """

    method: Method
    config: Any
    secondary: bool = False
    weight: float = 1.0
    where: Callable[[], Tensor] | None = None
    first_pass: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Describes the method by its name or composition: method objects hold functions, which pickle cannot
        write.
        """
        method, config = self.method, self.config
        if method.config.composition is None:
            return {**self.__dict__, "method": method.name if METHODS.find(method.name) is method else method}
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        return {**self.__dict__, "method": method.config.composition, "config": fields}

    def __setstate__(self, state: dict[str, Any]) -> None:
        method, config = state["method"], state["config"]
        if isinstance(method, Composition):
            method = method_of_composition(method)
            config = method.config(**config)
        elif isinstance(method, str):
            method = METHODS[method]
        self.__dict__.update(state, method=method, config=config)


class NewAdapter(NamedTuple):
    """The parts of a new adapter at a site.

    ``params`` are its own parameters; ``constants`` and ``shared`` may be shared with other sites.
    """

    method: Method
    config: Any
    params: Mapping[str, np.ndarray]
    constants: Tensors
    shared: Tensors


class Adapted(Wrapper):
    """A wrapper whose adapters each belong to a method: it holds their own parameters, the shared ones and
    the constants at one site.
    """

    _whole_batch = ""
    """The reason why wrappers of this class cannot give the rows of a batch different adapters; empty if they
    can.
    """
    _several = False
    """Whether wrappers of this class may be nested around one module, one for each of its sites."""
    _adapters: nn.ModuleDict = child("adapters")
    _common: nn.ModuleDict = child("common")
    _fixed: nn.ModuleDict = child("fixed")

    def __init__(self, base: nn.Module, site: Site) -> None:
        super().__init__(base, site)
        self._modules.update({key: nn.ModuleDict() for key in ("adapters", "common", "fixed")})
        self._held: dict[str, Held] = {}

    def _add(self, name: str, adapter: NewAdapter) -> None:
        """Adds an adapter on the base's device; its parameters are float32 and trainable, unless the method
        freezes them.
        """
        device = device_of(self._base, self._site.path)
        self._adapters[key_of(name)] = nn.ParameterDict(
            {key: as_parameter(value, device) for key, value in adapter.params.items()}
        )
        self._common[key_of(name)] = nn.ParameterDict(dict(adapter.shared))
        self._fixed[key_of(name)] = nn.ParameterDict(dict(adapter.constants))
        self._held[name] = Held(adapter.method, adapter.config)
        self._trainable(name)

    def _trainable(self, name: str, yes: bool = True) -> None:
        """Makes the adapter's parameters require gradients, or stop requiring them; those that its method
        freezes never do.
        """
        parts = (self._adapters[key_of(name)], self._common[key_of(name)])
        held = self._held[name]
        kept = frozen(held.method, held.config, [key for part in parts for key in part])
        for part in parts:
            for key, value in part.items():
                value.requires_grad_(yes and value.is_floating_point() and key not in kept)

    @property
    def _names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order in which they were added."""
        return tuple(self._held)

    def _part(self, name: str) -> nn.Module:
        """Returns the module that holds the adapter's own parameters."""
        return self._adapters[key_of(name)]

    def _shared(self, name: str) -> dict[str, nn.Parameter]:
        """Returns the parameters that the adapter shares between all its sites."""
        return dict(self._common[key_of(name)].items())

    def _remove(self, name: str) -> None:
        """Removes an adapter; unknown names are ignored."""
        if name in self._held:
            for part in (self._adapters, self._common, self._fixed):
                del part[key_of(name)]
            del self._held[name]
            self._active = tuple(active for active in self._active if active != name)

    def _excluding(self, names: Sequence[str]) -> list[str]:
        """Returns those of the adapters ``names`` that exclude each other from being active; empty if all can
        be active together.
        """
        alone = {
            name: self._held[name]
            for name in names
            if name in self._held and self._held[name].method.traits.exclusive
        }
        methods = {held.method.name: held.method for held in alone.values()}
        overrides = next(iter(methods.values())).overrides if len(methods) == 1 else {}
        together = overrides.get("active_together")
        fitting = len(alone) < 2 or (
            together is not None and together([held.config for held in alone.values()])
        )
        return [] if fitting else list(alone)

    def _same_for_all_rows(self, name: str) -> str:
        """Returns why the adapter cannot act on some rows of a batch only; empty if it can."""
        method = self._held[name].method
        return self._whole_batch or (
            "it looks at more than the tokens of a row"
            if method.reason_against("cache") or method.reason_against("graph")
            else ""
        )

    def _weigh(self, name: str, plain: Any, changed: Any) -> Any:
        """Scales the change from ``plain`` to ``changed`` by the adapter's weight."""
        weight = self._held[name].weight
        return changed if weight == 1 else plain + weight * (changed - plain)

    def _by_row(self, name: str, x: Tensor, y: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """Returns ``y``, the output without the adapter, with ``run(x, y, index)`` in the rows that have the
        adapter.

        Without per-row adapters these are all rows, and ``index`` is None.
        """
        if self._rows is None:
            return run(x, y, None)
        index = self._rows.index(name, x, self._site)
        return y.index_copy(0, index, run(x[index], y[index], index).to(y.dtype)) if len(index) else y

    def _in_rows(
        self, x: Tensor, y: Tensor, run: Callable[..., Tensor], names: Sequence[str] | None = None
    ) -> Tensor:
        """Returns the output ``y`` with ``run(name, x, y, index)`` in the rows of each of the adapters
        ``names``, by default the active ones.
        """
        for name in self._active if names is None else names:
            y = self._by_row(name, x, y, functools.partial(run, name))
        return y

    def _mask(self, name: str, x: Tensor, index: Tensor | None) -> Tensor | None:
        """Returns where the adapter acts, ``[rows, length]``, in the batch rows ``index`` (None: all) that
        ``x`` holds; None if it acts everywhere.

        Raises:
            Unsupported: ``index`` selects rows, and the layer's input does not keep rows apart.
        """
        where = self._held[name].where
        if where is None:
            return None
        mask = where()
        if index is not None and x.ndim < 3:
            raise Unsupported(
                "this layer does not see rows of tokens, so its adapter cannot act at some tokens of "
                "some rows",
                where=self._site.path,
                found=tuple(x.shape),
                remedy="use one adapter for all rows",
            )
        return mask if index is None else mask[index]

    def _folded_parameters(self) -> list[Place]:
        """Returns the parameters, as module and name, that merging the adapters here would change."""
        return []

    def _merge_weights(self) -> dict[Place, Tensor]:
        """Returns these parameters (and a bias, if merging adds one) with the active adapters merged in, in
        their own shapes and precision.

        Raises:
            Unsupported: merging adds a bias, and the layer cannot have one.
        """
        raise NotImplementedError

    def _tied_to(self, leaf: str) -> list[nn.Module]:
        """Returns the modules that share the parameter ``leaf`` and follow the adapters here."""
        return []

    @property
    def _stored(self) -> tuple[Tensor, Tensor | None]:
        """The frozen weight as floats, in the shape in which the module stores it, and the bias; see
        :func:`~.weights.weight_of`.
        """
        module = innermost(self)
        return weight_of(module, "weight", self._site), tensor_of(module, "bias", self._site.path)

    def _precision(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Returns the precision in which an adapter computes: its own, or ``dtype`` if that is finer."""
        own = (
            value.dtype
            for part in (self._adapters, self._common, self._fixed)
            for value in part[key_of(name)].values()
            if value.is_floating_point()
        )
        return torch.promote_types(dtype, next(own))

    def _tensors(self, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns the tensors of :meth:`_every`, with floats cast to ``dtype``."""
        return {
            leaf: value.to(dtype) if value.is_floating_point() else value
            for leaf, value in self._every(name).items()
        }

    def _every(self, name: str) -> dict[str, Tensor]:
        """Returns all tensors that the method's functions need: the adapter's own parameters, the shared
        ones, the constants, and results of the model's first pass for this call.
        """
        key = key_of(name)
        tensors = {
            leaf: value
            for part in (self._adapters, self._common, self._fixed)
            for leaf, value in part[key].items()
        }
        if any(value.is_meta for value in tensors.values()):
            raise Unsupported(
                "the adapter's own tensors are not in memory",
                where=f"{self._site.path}, '{name}'",
                found="the meta device",
                remedy="let accelerate offload the base first, and put the adapter into it then",
            )
        return {**tensors, **self._held[name].first_pass}

    def _with_weight(self, dtype: torch.dtype) -> Site:
        """Returns the site with the frozen weight and bias in ``dtype``, detached from the graph."""
        weight_as_stored, bias = self._stored
        weight = to_matrix(self._site.kind, weight_as_stored.detach()).to(dtype)
        return dataclasses.replace(
            self._site, weight=weight, base_bias=None if bias is None else bias.detach().to(dtype)
        )

    def _site_for(self, name: str, dtype: torch.dtype) -> Site:
        """Returns the site as an adapter's method reads it: with the frozen weight and bias if it reads
        them.
        """
        return self._with_weight(dtype) if self._held[name].method.traits.reads_weight else self._site

    def _normal_form(self, name: str, dtype: torch.dtype) -> Any:
        """Returns an adapter's normal form here, computed in ``dtype``."""
        held = self._held[name]
        return held.method.normal_form(held.config, self._tensors(name, dtype), self._site_for(name, dtype))


class _Pass:
    """One adapter in one call of its layer: its tensors, precision and normal form, and the function below
    it.

    ``below`` is the layer, or the layer with the adapters that come before this one. The adapter computes in
    its own precision, or in the input's if that is finer, so that nothing of the base is rounded away. Under
    autocast each operation chooses its own precision.
    """

    def __init__(self, layer: AdaptedLayer, name: str, below: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self._below = below
        self._input_dtype = x.dtype
        self._held = layer._held[name]
        self.dtype = layer._precision(name, x.dtype)
        self._tensors, self._site = layer._tensors(name, self.dtype), layer._site_for(name, self.dtype)
        self._dropout = self._held.config.dropout if layer.training else 0
        self._autocast = torch.is_autocast_enabled(x.device.type)
        self.weight, self.form = self._held.weight, self._normal_form(layer.training)
        # For a low-rank branch, the weight is just another factor of ``up``, so the fast kernels still apply.
        if self.weight != 1 and self.is_branch and isinstance(self.form.up, Dense):
            up = self.form.up._replace(factor=self.form.up.factor * self.weight)
            self.form = self.form._replace(up=up)
            self.weight = 1.0
        # Autocast does not apply inside the backward pass of a custom autograd function, so kernels are not
        # used under it. A compiler recomputes dropout itself, and cannot trace the seeded one.
        self._has_kernels = (
            self.form is not None
            and not self._autocast
            and not (self._dropout and torch.compiler.is_compiling())
        )
        self.output_dtype = x.dtype

    @property
    def is_branch(self) -> bool:
        """Whether the adapter adds to the layer's output, and adds nothing for an input of zero."""
        return self.form is not None and self.form.is_branch

    def below(self, value: Tensor) -> Tensor:
        """Runs what the adapter builds on at ``value``: the layer, with the adapters before this one."""
        output = self._below(value.to(self._input_dtype))
        # Under autocast the output's dtype differs from the input's, and the layers around expect the
        # output's.
        self.output_dtype = output.dtype
        return output

    def read(self, value: Tensor) -> Tensor:
        """Returns ``value`` in the precision in which the adapter computes."""
        return value if self._autocast else value.to(self.dtype)

    def output(self, ask: Callable[[Tensor], Tensor], x: Tensor, inner: Tensor) -> Tensor:
        """Returns the adapter's output at ``x`` on top of ``ask``; ``inner`` is ``x`` in the adapter's
        precision.
        """
        if self._has_kernels and low_rank.is_low_rank(self.form):
            return low_rank.add_low_rank(self.form, ask(x), x, self._seeded_dropout())
        drop = functools.partial(functional.dropout, p=self._dropout) if self._dropout else None
        if self.form is None:
            held = self._held
            return run(held.method, held.config, self._tensors, self._site, ask, inner, drop)
        return evaluate(self.form, ask, inner, drop)

    def fuse(self, layer: AdaptedLayer, x: Tensor) -> Tensor | None:
        """Computes the layer and the adapter by one kernel; None unless the layer is a plain one and there is
        a kernel for the adapter's form.
        """
        bare = layer._bare(self.dtype) if self._has_kernels and x.dtype == self.dtype else None
        return None if bare is None else low_rank.fuse(self.form, bare, x, self._seeded_dropout())

    def _seeded_dropout(self) -> low_rank.Dropout | None:
        """Draws the dropout of this call, or None without dropout."""
        return low_rank.Dropout.draw(self._dropout) if self._dropout else None

    def _normal_form(self, training: bool) -> Any:
        """Returns the adapter's normal form; None for a method with a forward function of its own."""
        overrides = self._held.method.overrides
        if "forward" in overrides:
            return None
        make = (overrides.get("training_form") if training else None) or self._held.method.normal_form
        return make(self._held.config, self._tensors, self._site)


class AdaptedLayer(Adapted):
    """A frozen layer with any number of named adapters of weight methods.

    Takes and returns what the wrapped layer does. Several active adapters apply one after the other, in
    order.
    """

    def _run_active(self, args: Args, kwargs: Kwargs) -> Any:
        x, result = self._enter(args, kwargs)
        if self._rows is not None:
            return self._row_by_row(x, result)
        # Each adapter wraps the function of those before it; nothing runs until the last is called. Only the
        # first sits directly on the layer and can be fused with it, if the layer has no further arguments.
        for position, name in enumerate(self._active):
            first = position == 0 and len(args) + len(kwargs) == 1
            result = functools.partial(self._with_adapter, name, result, first, None)
        return result(x)

    def _row_by_row(self, x: Tensor, base: Any) -> Tensor:
        """Returns the output of a batch whose rows have one adapter each, or none."""

        # The base has run for the whole batch already; an adapter that asks for its output at the same input
        # gets that, instead of a second run.
        def apply(name: str, own: Tensor, plain: Tensor, index: Tensor | None) -> Tensor:
            return self._with_adapter(
                name, lambda value: plain if value is own else base(value), False, index, own
            )

        return self._in_rows(x, base(x), apply)

    def _with_adapter(
        self, name: str, below: Callable[[Tensor], Tensor], first: bool, index: Tensor | None, x: Tensor
    ) -> Tensor:
        """Returns the output at ``x`` of the adapter on top of ``below``.

        ``first`` means that ``below`` is the wrapped layer itself. ``x`` holds the batch rows ``index``, or
        all rows if that is None.
        """
        step = _Pass(self, name, below, x)
        mask = self._mask(name, x, index)
        if mask is None and step.weight == 1:
            y = step.fuse(self, x) if first else None
            return (step.output(step.below, x, step.read(x)) if y is None else y).to(step.output_dtype)
        plain = step.below(x)
        # A branch adds nothing for zeros, so zeroing the input where the adapter must not act is enough, and
        # cheaper than computing both outputs and choosing.
        if mask is not None and step.weight == 1 and step.is_branch:
            visible = place(mask, x, torch.zeros_like(x), self._site)
            return step.output(lambda _: plain, visible, step.read(visible)).to(step.output_dtype)
        inner = step.read(x)
        changed = step.output(
            lambda value: plain if value is x or value is inner else step.below(value), x, inner
        )
        if step.weight != 1:
            changed = plain + step.weight * (changed - plain)
        changed = changed.to(step.output_dtype)
        return changed if mask is None else place(mask, changed, plain, self._site)

    def _folded_parameters(self) -> list[Place]:
        return [(innermost(self), "weight")]

    def _merge_weights(self) -> dict[Place, Tensor]:
        module = innermost(self)
        with torch.no_grad():
            weight, bias = self._fold_all(self._active)
        if bias is not None and "bias" not in module._parameters:
            raise Unsupported(
                "the fold gives this layer a bias, and it can have none",
                where=self._site.path,
                found=type(module).__name__,
                remedy="keep the adapter unmerged",
            )
        merged = {(module, "weight"): weight.contiguous()}
        return merged if bias is None else {**merged, (module, "bias"): bias}

    def _fold_all(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Returns the weight and the bias, in their own shapes and precision, with adapters merged in one
        after the other in float32 or finer, and rounded once at the end.
        """
        stored, stored_bias = self._stored
        dtype = functools.reduce(
            lambda dtype, name: self._precision(name, dtype),
            names,
            torch.promote_types(stored.dtype, torch.float32),
        )
        weight = to_matrix(self._site.kind, stored).to(dtype)
        bias = None if stored_bias is None else stored_bias.to(dtype)
        for name in names:
            weight, bias = self._fold(name, weight, bias, dtype)
        if bias is not None:
            bias = bias.to(stored.dtype if stored_bias is None else stored_bias.dtype)
        return from_matrix(self._site.kind, weight, stored.shape).to(stored.dtype), bias

    def _fold(
        self, name: str, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the weight ``[out, in]`` and the bias with the adapter merged in, all in ``dtype``."""
        held = self._held[name]
        site = self._site_for(name, dtype)
        folded, moved = fold(held.method, held.config, self._tensors(name, dtype), site, weight, bias)
        if moved is not None and bias is None:
            bias = torch.zeros_like(moved)
        return self._weigh(name, weight, folded), None if moved is None else self._weigh(name, bias, moved)

    def _bare(self, dtype: torch.dtype) -> low_rank.Frozen | None:
        """Returns the wrapped layer's weight and bias if a kernel may use them instead of calling the layer;
        else None.

        They must be frozen plain tensors of ``dtype``, and the call must do nothing else: no hooks, no
        replaced ``forward`` (as offloading and sharding install), no tensor subclass.
        """
        base = self._base
        if f"{type(base).__module__}.{type(base).__qualname__}" not in _PLAIN_LAYERS or is_hooked(base):
            return None
        tensors = [value for value in (base.weight, base.bias) if value is not None]
        plain = all(
            type(value) in _PLAIN and value.dtype == dtype and not value.requires_grad for value in tensors
        )
        return low_rank.Frozen(to_matrix(self._site.kind, base.weight), base.bias) if plain else None


_PLAIN = (nn.Parameter, Tensor)
_PLAIN_LAYERS = frozenset({"torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D"})
"""Classes whose forward is ``x W^T + b``, by name because transformers need not be installed."""


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of a module does more than its class says: it has hooks, or a replaced ``forward``."""
    hooks = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    return bool(hooks) or "forward" in module.__dict__


def place(mask: Tensor, changed: Tensor, plain: Tensor, site: Site) -> Tensor:
    """Returns ``changed`` where ``mask`` ``[batch, length]`` is true, else ``plain``; both are ``[batch,
    length, ...]`` or ``[batch * length, ...]``.

    Virtual tokens before a row's own are outside the mask and keep ``plain``.

    Raises:
        Unsupported: the layer's tensors do not have one vector per token.
    """
    if changed.ndim > 2 and len(changed) == len(mask) and changed.shape[1] > mask.shape[1]:
        mask = functional.pad(mask, (changed.shape[1] - mask.shape[1], 0))
    rows = mask if changed.ndim > 2 else mask.reshape(-1)
    if changed.shape[: rows.ndim] != rows.shape:
        raise Unsupported(
            "this layer does not see one vector for each token, so its adapter cannot act at some of "
            "them only",
            where=site.path,
            expected=(*mask.shape, changed.shape[-1]),
            found=tuple(changed.shape),
            remedy="leave it out of the targets",
        )
    return torch.where(rows[(..., *(None,) * (changed.ndim - rows.ndim))], changed, plain)
