"""The modules that hold adapters of weight methods around a layer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ...adapter_methods import Dense, Method, Site, evaluate, fold, from_matrix, frozen, run, to_matrix
from ...adapter_methods.registry import METHODS
from ...errors import Unsupported
from ...manifest.composed_method import method_of_composition
from ...manifest.structs import Composition
from ..kernels import low_rank
from ..kernels.dropout import Dropout
from .tensors import as_parameter
from .weights import device_of, tensor_of, weight_of
from .wrapper import Wrapper, child, innermost, key_of

Tensors = Mapping[str, nn.Parameter]


def _describe(method: Method, cfg: Any) -> tuple[Any, Any]:
    """A method and its config as what can be written: :func:`_rebuild` takes it."""
    if method.config.composition is not None:
        fields = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
        return method.config.composition, fields
    return (method.name if METHODS.find(method.name) is method else method), cfg


def _rebuild(method: Any, cfg: Any) -> tuple[Method, Any]:
    if isinstance(method, Composition):
        composed = method_of_composition(method)
        return composed, composed.config(**cfg)
    return (METHODS[method] if isinstance(method, str) else method), cfg


class NewAdapter(NamedTuple):
    """What an adapter has at a site: its own ``params``; ``constants`` and ``shared`` may be of other sites,
    too.
    """

    method: Method
    config: Any
    params: Mapping[str, np.ndarray]
    constants: Tensors
    shared: Tensors


class Adapted(Wrapper):
    """A wrapper whose adapters are those of a method at a site: their own parameters, the shared ones, and
    the constants.
    """

    _whole_batch = ""
    """Why a wrapper of this class cannot have other adapters from row to row of a batch; empty where it
    can.
    """
    _several = False
    """Whether a module may stand in several wrappers of this class, one for each of its sites."""
    _adapters: nn.ModuleDict = child("adapters")
    _common: nn.ModuleDict = child("common")
    _fixed: nn.ModuleDict = child("fixed")

    def __init__(self, base: nn.Module, site: Site) -> None:
        super().__init__(base)
        self._site = site
        self._modules.update({key: nn.ModuleDict() for key in ("adapters", "common", "fixed")})
        self._methods: dict[str, tuple[Method, Any]] = {}
        # the adapters whose method here is not the one that they are named by
        self._secondary: set[str] = set()
        self._first_pass_params: dict[str, Mapping[str, torch.Tensor]] = {}
        self._where: dict[str, Callable[[], torch.Tensor]] = {}
        self._weights: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files: a method stands there by its name, or by the composition that makes it."""
        methods = {name: _describe(*made) for name, made in self._methods.items()}
        return {**self.__dict__, "_methods": methods}

    def __setstate__(self, state: dict[str, Any]) -> None:
        made = {name: _rebuild(*described) for name, described in state["_methods"].items()}
        super().__setstate__({**state, "_methods": made})

    def _add(self, name: str, adapter: NewAdapter) -> None:
        """Adds an adapter; its own parameters are trained as float32, on the base's device, unless the method
        says that they are frozen.
        """
        device = device_of(self._base, self._site.path)
        self._adapters[key_of(name)] = nn.ParameterDict(
            {key: as_parameter(value, device) for key, value in adapter.params.items()}
        )
        self._common[key_of(name)] = nn.ParameterDict(dict(adapter.shared))
        self._fixed[key_of(name)] = nn.ParameterDict(dict(adapter.constants))
        self._methods[name] = adapter.method, adapter.config
        self._trainable(name)

    def _trainable(self, name: str, yes: bool = True) -> None:
        """Lets the adapter's parameters be trained, or not."""
        parts = (self._adapters[key_of(name)], self._common[key_of(name)])
        kept = frozen(*self._methods[name], [key for part in parts for key in part])
        for part in parts:
            for key, value in part.items():
                value.requires_grad_(yes and value.is_floating_point() and key not in kept)

    @property
    def _names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order in which they came."""
        return tuple(self._methods)

    def _part(self, name: str) -> nn.Module:
        """What holds the adapter's own parameters."""
        return self._adapters[key_of(name)]

    def _shared(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters that the adapter has in common at all its sites."""
        return dict(self._common[key_of(name)].items())

    def _remove(self, name: str) -> None:
        """Removes an adapter; unknown names are ignored."""
        if name in self._methods:
            del (
                self._adapters[key_of(name)],
                self._common[key_of(name)],
                self._fixed[key_of(name)],
                self._methods[name],
            )
            self._secondary.discard(name)
            self._first_pass_params.pop(name, None)
            self._where.pop(name, None)
            self._weights.pop(name, None)
            self._active = tuple(active for active in self._active if active != name)

    def _excluding(self, names: Sequence[str]) -> list[str]:
        """Those among the names of adapters of which only one can be active at a time; none where there are
        no two.
        """
        alone = [name for name in names if name in self._methods and self._methods[name][0].traits.exclusive]
        methods = {self._methods[name][0].name: self._methods[name][0] for name in alone}
        overrides = next(iter(methods.values())).overrides if len(methods) == 1 else {}
        together = overrides.get("active_together")
        fitting = len(alone) < 2 or (
            together is not None and together([self._methods[name][1] for name in alone])
        )
        return [] if fitting else alone

    def _same_for_all_rows(self, name: str) -> str:
        method = self._methods[name][0]
        return self._whole_batch or (
            "it looks at more than the tokens of a row"
            if method.reason_against("cache") or method.reason_against("graph")
            else ""
        )

    def _weigh(self, name: str, plain: Any, changed: Any) -> Any:
        """``plain`` and the weight's share of what the adapter has changed in it."""
        weight = self._weights.get(name, 1.0)
        return changed if weight == 1 else plain + weight * (changed - plain)

    def _by_row(
        self, name: str, x: torch.Tensor, y: torch.Tensor, run: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        """``y``, the output without the adapter, with ``run(x, y, index)`` in the rows ``index`` that have
        it: all, or some of a batch.
        """
        if self._rows is None:
            return run(x, y, None)
        index = self._rows.index(name, x, self._site)
        return y.index_copy(0, index, run(x[index], y[index], index).to(y.dtype)) if len(index) else y

    def _mask(self, name: str, x: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor | None:
        """Where the adapter acts in the rows ``index`` (None: all) that ``x`` holds, ``[rows, length]``;
        None: everywhere.

        Raises:
            Unsupported: some of the rows are meant, and the layer does not see them apart.
        """
        if name not in self._where:
            return None
        mask = self._where[name]()
        if index is not None and x.ndim < 3:
            raise Unsupported(
                "this layer does not see rows of tokens, so its adapter cannot act at some tokens of "
                "some rows",
                where=self._site.path,
                found=tuple(x.shape),
                remedy="use one adapter for all rows",
            )
        return mask if index is None else mask[index]

    def _folded_parameters(self) -> list[tuple[nn.Module, str]]:
        """The modules, and the names of their parameters, into which adapters here are folded."""
        return []

    def _merge_weights(self) -> dict[tuple[nn.Module, str], torch.Tensor]:
        """These parameters, and a bias that the folds give, with the active adapters folded in; in their own
        shapes and precision.

        Raises:
            Unsupported: a fold gives a bias, and the layer can have none.
        """
        raise NotImplementedError

    def _tied_to(self, leaf: str) -> list[nn.Module]:
        """The modules that have the same parameter under the same name and follow this one's adapters."""
        return []

    @property
    def _stored(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The frozen weight in the shape in which the module stores it, and its bias; as floats, see
        :func:`~.weights.weight_of`.
        """
        module = innermost(self)
        return weight_of(module, "weight", self._site), tensor_of(module, "bias", self._site.path)

    def _tensors(self, name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """As :meth:`_every`, floats in ``dtype``."""
        return {
            leaf: value.to(dtype) if value.is_floating_point() else value
            for leaf, value in self._every(name).items()
        }

    def _every(self, name: str) -> dict[str, torch.Tensor]:
        """Everything that the method's functions want of the adapter: its own parameters, the shared ones,
        the constants, and what a first pass of the model gave for this one.
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
        return {**tensors, **self._first_pass_params[name]} if name in self._first_pass_params else tensors

    def _all_params(self, name: str) -> Iterator[torch.Tensor]:
        return iter((*self._part(name).parameters(), *self._shared(name).values()))

    def _with_weight(self, dtype: torch.dtype) -> Site:
        """The site with the frozen weight and bias, which pass no gradient on."""
        weight_as_stored, bias = self._stored
        weight = to_matrix(self._site.kind, weight_as_stored.detach()).to(dtype)
        return dataclasses.replace(
            self._site, weight=weight, base_bias=None if bias is None else bias.detach().to(dtype)
        )


class _Pass:
    """One adapter in one call of its layer: what it computes with, in which precision, on top of what.

    The branch is computed in the adapter's precision, or the input's where that is finer: nothing of the base
    is rounded away. Under autocast each operation chooses its own.
    """

    def __init__(
        self, layer: AdaptedLayer, name: str, below: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
    ) -> None:
        self._below, self._input_dtype = below, x.dtype
        self._method, self._cfg = layer._methods[name]
        every = layer._every(name)
        own = next(value.dtype for value in every.values() if value.is_floating_point())
        self.dtype = torch.promote_types(x.dtype, own)
        self._tensors = {
            leaf: value.to(self.dtype) if value.is_floating_point() else value
            for leaf, value in every.items()
        }
        self._site = layer._with_weight(self.dtype) if self._method.traits.reads_weight else layer._site
        self._dropout = self._cfg.dropout if layer.training else 0
        self._autocast = torch.is_autocast_enabled(x.device.type)
        self.weight = layer._weights.get(name, 1.0)
        self.form = self._normal_form(layer.training)
        if self.weight != 1 and self.is_branch and isinstance(self.form.up, Dense):
            up = self.form.up._replace(factor=self.form.up.factor * self.weight)
            self.form, self.weight = self.form._replace(up=up), 1.0
        # Autocast rules do not reach the backward of a custom function, so the kernels stay out of its way. A
        # compiler makes dropout again by itself, and cannot look at a seed.
        self.has_kernels = (
            self.form is not None
            and not self._autocast
            and not (self._dropout and torch.compiler.is_compiling())
        )
        self.output_dtype = x.dtype

    @property
    def is_branch(self) -> bool:
        """Whether the adapter adds to the layer's output, and nothing where it is given nothing."""
        return self.form is not None and self.form.is_branch

    def below(self, value: torch.Tensor) -> torch.Tensor:
        """What the adapter is on top of, at ``value``."""
        output = self._below(value.to(self._input_dtype))
        # under autocast it is not that of the input, and the layer's neighbours count on it
        self.output_dtype = output.dtype
        return output

    def read(self, value: torch.Tensor) -> torch.Tensor:
        """``value`` as the branch reads it."""
        return value if self._autocast else value.to(self.dtype)

    def output(
        self, ask: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, inner: torch.Tensor
    ) -> torch.Tensor:
        """The adapter's output at ``x``, which it reads as ``inner``, on top of ``ask``."""
        if self.has_kernels and low_rank.is_low_rank(self.form):
            return low_rank.add_low_rank(self.form, ask(x), x, self._seeded_dropout())
        drop = functools.partial(functional.dropout, p=self._dropout) if self._dropout else None
        if self.form is None:
            return run(self._method, self._cfg, self._tensors, self._site, ask, inner, drop)
        return evaluate(self.form, ask, inner, drop)

    def fuse(self, layer: low_rank.Frozen, x: torch.Tensor) -> torch.Tensor | None:
        """Layer and adapter by one kernel; None where there is none for its form."""
        return low_rank.fuse(self.form, layer, x, self._seeded_dropout())

    def _seeded_dropout(self) -> Dropout | None:
        return Dropout.draw(self._dropout) if self._dropout else None

    def _normal_form(self, training: bool) -> Any:
        overrides = self._method.overrides
        if "forward" in overrides:
            return None
        make = (overrides.get("training_form") if training else None) or self._method.normal_form
        return make(self._cfg, self._tensors, self._site)


class AdaptedLayer(Adapted):
    """A frozen layer with any number of named adapters of weight methods.

    Input and output are those of the wrapped layer. Several active adapters apply one after the other, in
    order.
    """

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's output with the active adapters applied."""
        if not self._active:
            return self._base(*args, **kwargs)  # type: ignore[no-any-return]
        x, result = self._enter(args, kwargs)
        if self._rows is not None:
            return self._row_by_row(x, result)
        for position, name in enumerate(self._active):
            first = position == 0 and len(args) + len(kwargs) == 1
            result = functools.partial(self._with_adapter, name, result, first, None)
        return result(x)  # type: ignore[no-any-return]

    def _row_by_row(self, x: torch.Tensor, base: Any) -> torch.Tensor:
        """The output of a batch whose rows have one adapter each, or none."""
        y: torch.Tensor = base(x)

        def apply(own: torch.Tensor, plain: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
            return self._with_adapter(
                name, lambda value: plain if value is own else base(value), False, index, own
            )

        for name in self._active:
            y = self._by_row(name, x, y, apply)
        return y

    def _with_adapter(
        self,
        name: str,
        below: Callable[[torch.Tensor], torch.Tensor],
        first: bool,
        index: torch.Tensor | None,
        x: torch.Tensor,
    ) -> torch.Tensor:
        """The output at ``x`` of the adapter on top of ``below``, which is the wrapped layer itself if the
        adapter comes ``first``; ``x`` holds the rows ``index`` of the batch, or all.
        """
        step, mask = _Pass(self, name, below, x), self._mask(name, x, index)
        if mask is None and step.weight == 1:
            y = self._fuse(step, x) if first else None
            return (step.output(step.below, x, step.read(x)) if y is None else y).to(step.output_dtype)
        plain = step.below(x)
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

    def _fuse(self, step: _Pass, x: torch.Tensor) -> torch.Tensor | None:
        """Layer and adapter in one operation, where the layer is a plain one and the adapter has a kernel."""
        layer = self._bare(step.dtype) if step.has_kernels and x.dtype == step.dtype else None
        return None if layer is None else step.fuse(layer, x)

    def _folded_parameters(self) -> list[tuple[nn.Module, str]]:
        return [(innermost(self), "weight")]

    def _merge_weights(self) -> dict[tuple[nn.Module, str], torch.Tensor]:
        module = innermost(self)
        stored, stored_bias = self._stored
        owned = (
            value.dtype
            for name in self._active
            for value in self._all_params(name)
            if value.is_floating_point()
        )
        dtype = torch.promote_types(stored.dtype, functools.reduce(torch.promote_types, owned, torch.float32))
        with torch.no_grad():
            weight, bias = (
                to_matrix(self._site.kind, stored).to(dtype),
                None if stored_bias is None else stored_bias.to(dtype),
            )
            for name in self._active:
                weight, bias = self._fold(name, weight, bias, dtype)
            merged = {
                (module, "weight"): from_matrix(self._site.kind, weight, stored.shape)
                .to(stored.dtype)
                .contiguous()
            }
            if bias is not None and "bias" not in module._parameters:
                raise Unsupported(
                    "the fold gives this layer a bias, and it can have none",
                    where=self._site.path,
                    found=type(module).__name__,
                    remedy="keep the adapter unmerged",
                )
            if bias is not None:
                merged[module, "bias"] = bias.to(stored.dtype if stored_bias is None else stored_bias.dtype)
        return merged

    def _fold(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight ``[out, in]`` and the bias with the adapter folded in, all of ``dtype``."""
        method, cfg = self._methods[name]
        site = self._with_weight(dtype) if method.traits.reads_weight else self._site
        folded, moved = fold(method, cfg, self._tensors(name, dtype), site, weight, bias)
        if moved is not None and bias is None:
            bias = torch.zeros_like(moved)
        return self._weigh(name, weight, folded), None if moved is None else self._weigh(name, bias, moved)

    def _bare(self, dtype: torch.dtype) -> low_rank.Frozen | None:
        """The wrapped layer's weight and bias, if they are frozen and of ``dtype`` and calling the layer
        comes to nothing else.

        It does not where something hooks into the call or took its place (offloading, sharding), or the
        weight is of a class of its own.
        """
        base: Any = self._base
        hooked = (
            base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        )
        if (
            f"{type(base).__module__}.{type(base).__qualname__}" not in _PLAIN_LAYERS
            or hooked
            or "forward" in base.__dict__
        ):
            return None
        tensors = [value for value in (base.weight, base.bias) if value is not None]
        plain = all(
            type(value) in _PLAIN and value.dtype == dtype and not value.requires_grad for value in tensors
        )
        return low_rank.Frozen(to_matrix(self._site.kind, base.weight), base.bias) if plain else None


_PLAIN = (nn.Parameter, torch.Tensor)
_PLAIN_LAYERS = frozenset({"torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D"})
"""Classes whose call is ``x W^T + b``, of a library that need not be there by name."""


def place(mask: torch.Tensor, changed: torch.Tensor, plain: torch.Tensor, site: Site) -> torch.Tensor:
    """``changed`` where ``mask`` ``[batch, length]`` says so, else ``plain``; both ``[batch, length, ...]``
    or ``[batch * length, ...]``.

    Virtual tokens, which stand before a row's own, are left alone.

    Raises:
        Unsupported: the layer does not see the rows as they are.
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
