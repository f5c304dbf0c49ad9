"""Tells which argument of a module's call is which, and which adapter each row of the current batch has.

The model may be called with several rows for each adapter named, as beam search does; the rows of one adapter
name must be next to each other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from ...adapter_methods import Site
from ...errors import Unsupported
from .observers import Observer

Args = tuple[Any, ...]
"""The positional arguments of a call."""
Kwargs = dict[str, Any]
"""The keyword arguments of a call."""


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of the arguments of a module's ``forward``, as its class defines it, in order, the
    input first; those after ``*args`` are left out.
    """
    return _names_of(type(module).forward)


@lru_cache(maxsize=1024)
def _names_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(one.name for one in takewhile(lambda one: one.kind in named, parameters))


def named_arguments(module: nn.Module, args: Args, kwargs: Kwargs) -> Kwargs:
    """Returns the arguments of a call of a module by their names."""
    return {**dict(zip(argument_names(module), args, strict=False)), **kwargs}


def input_key(parameter: str | None, args: Args, kwargs: Kwargs) -> int | str:
    """Returns where the input of a call is: 0 for its first positional argument, else the keyword
    ``parameter`` or the first keyword.

    Raises:
        TypeError: the call has no arguments.
    """
    if args:
        return 0
    if not kwargs:
        raise TypeError("a module with adapters was called without an input")
    return parameter if parameter is not None and parameter in kwargs else next(iter(kwargs))


_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "decoder_input_ids",
    "pixel_values",
    "input_features",
    "input_values",
)
"""The names of model inputs whose first axis is the batch."""


class Rows(Observer):
    """The adapter of each row (None: the base), and the number of rows in the current call.

    Layers cannot see which axis of their input is the batch, so :meth:`index` derives it from the sizes, and
    refuses what it cannot tell. ``trusted`` means that the batch is known to be the first axis of the model's
    layers, as in transformers models that support scaled-dot-product attention.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[str | None]) -> None:
        self.adapters = tuple(adapters)
        self.trusted = bool(getattr(model, "_supports_sdpa", False))
        self._first: set[str] = set()
        self._batch = 0
        self._places: dict[tuple[str, int, torch.device], Tensor] = {}
        self.handles = [
            entry.register_forward_pre_hook(self._enter, with_kwargs=True) for entry in _entries(model)
        ]

    def index(self, name: str, x: Tensor, site: Site) -> Tensor:
        """Returns the indices along the first axis of a layer's input that belong to the rows of an adapter.

        Raises:
            Unsupported: the batch is not the first axis of the layer's input.
        """
        each = self._entries_of_a_row(x, site)
        key = (name, each, x.device)
        # All layers with the same number of entries per row share the index, so compute it once.
        if key not in self._places:
            places = [
                row * each + entry
                for row, own in enumerate(self.adapters)
                if own == name
                for entry in range(each)
            ]
            self._places[key] = torch.tensor(places, dtype=torch.long, device=x.device)
        return self._places[key]

    def _entries_of_a_row(self, x: Tensor, site: Site) -> int:
        """Returns how many entries along the first axis of a layer's input belong to each named row."""
        batch = self._batch
        length = len(x) if x.ndim else 0
        # Axes other than the width; integer ids have no width.
        axes = x.ndim - x.is_floating_point()
        flat = axes == 1 and batch and length % batch == 0  # [batch * length, width]
        plain = batch and length == batch
        if not (plain or flat):
            raise Unsupported(
                "this layer does not see the rows of the batch one by one, so they cannot have adapters "
                "of their own",
                where=site.path,
                expected=f"{batch} rows",
                found=tuple(x.shape),
                remedy="use one adapter for all rows",
            )
        # With as many tokens as rows, ``[length, batch, width]`` has the same shape as ``[batch, length,
        # width]``. Trust only layers that an earlier call has shown to have the batch first.
        if plain and axes == 2 and batch > 1 and not self.trusted:
            if x.shape[1] != batch:
                self._first.add(site.path)
            elif site.path not in self._first:
                raise Unsupported(
                    "a batch of as many rows as tokens does not tell which of the two this layer has first",
                    where=site.path,
                    found=tuple(x.shape),
                    remedy="pad the batch by one token",
                )
        return length // len(self.adapters)

    def _enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Reads the number of rows from the inputs of the model's call, as a hook."""
        inputs = named_arguments(module, args, kwargs)
        values = [inputs.get(name) for name in _INPUTS] + list(inputs.values())
        first = next((value for value in values if isinstance(value, Tensor) and value.ndim), None)
        batch = 0 if first is None else len(first)
        if not batch or batch % len(self.adapters):
            raise Unsupported(
                "there is not one adapter for each row of the batch",
                where="adapters",
                expected=f"{batch} names",
                found=len(self.adapters),
                remedy="name one for each row, None for the base",
            )
        self._batch = batch


def _entries(model: nn.Module) -> list[nn.Module]:
    """Returns the modules that callers call: the model, and the encoder of an encoder-decoder, which
    generation calls directly.
    """
    both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)) and hasattr(
        model, "get_encoder"
    )
    return [model, model.get_encoder()] if both else [model]  # type: ignore[operator, list-item]
