"""The wrapper that takes a module's place and holds its adapters, and access to a model's own modules through
it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from torch import nn

from .per_row import Rows
from .tensors import as_numpy


def child(key: str) -> Any:
    """A wrapper's own submodule: named ``key`` in a state dict, read by the attribute's own name."""
    return property(lambda self: self._modules[key])


class Wrapper(nn.Module):
    """What stands in a module's place and holds named adapters for it; with none active it is the module
    itself, exactly.

    A public name that torch's modules do not have is the wrapped module's, to read and to write: a model
    looks at ``layer.in_features`` or sets ``block.scale`` as if nothing stood there. So that none of them is
    hidden, a wrapper's own names begin with an underscore, as those of a named tuple do.
    """

    _active: tuple[str, ...]
    _rows: Rows | None
    """Which of the active adapters each row of a batch has; None: all rows have all of them."""
    _base: nn.Module = child("base")

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.training = base.training
        self._modules["base"] = base
        self._active, self._rows = (), None
        self._entry = first_parameter(type(innermost(base)).forward)

    @property
    def _names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order in which they came."""
        raise NotImplementedError

    def _part(self, name: str) -> nn.Module:
        """What holds the adapter's parameters."""
        raise NotImplementedError

    def _remove(self, name: str) -> None:
        """Removes an adapter; unknown names are ignored."""
        raise NotImplementedError

    def _params(self, name: str) -> dict[str, np.ndarray]:
        """The adapter's own parameters as numpy arrays: floats as float32, the rest as it is."""
        return {key: as_numpy(value) for key, value in self._part(name).named_parameters()}

    def _same_for_all_rows(self, name: str) -> str:
        """Why the adapter cannot be that of some rows of a batch alone; empty where it can."""
        raise NotImplementedError

    def _enter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Callable[[Any], Any]]:
        """The input among the arguments of a call, and the wrapped module as a function of the input
        alone.
        """
        key, base = input_key(self._entry, args, kwargs), self._base
        if isinstance(key, str):
            return kwargs[key], lambda value: base(*args, **{**kwargs, key: value})
        return args[0], lambda value: base(value, *args[1:], **kwargs)

    def __getattr__(self, name: str) -> Any:
        base = self.__dict__.get("_modules", {}).get("base")  # there is none yet while a copy is made
        if base is not None and not name.startswith("__"):
            try:
                return getattr(innermost(base), name)
            except AttributeError:
                pass
        return super().__getattr__(name)  # a submodule of the wrapper, by its name in a state dict

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("_modules", {}).get("base")
        if base is None or name.startswith("_") or name == "training" or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            setattr(innermost(base), name, value)


@lru_cache(maxsize=1024)
def first_parameter(forward: Callable[..., Any]) -> str | None:
    """What the ``forward`` of a class of modules calls its input, its first parameter; None where it takes
    any number of them.
    """
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return parameters[0].name if parameters and parameters[0].kind in named else None


def input_key(parameter: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str:
    """Where the input of a call is: its first argument, 0; else the keyword ``entry``, or the first one.

    Raises:
        TypeError: the call has no arguments.
    """
    if args:
        return 0
    if not kwargs:
        raise TypeError("a module with adapters was called without an input")
    return parameter if parameter is not None and parameter in kwargs else next(iter(kwargs))


def input_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The input of a module that is called with these arguments, by place or by name."""
    key = input_key(first_parameter(type(innermost(module)).forward), args, kwargs)
    return kwargs[key] if isinstance(key, str) else args[key]


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules under their own paths, as if no adapter had been put into it; a shared module
    once.
    """
    visited: set[nn.Module] = set()
    left = [("", model)]
    while left:
        path, module = left.pop()
        inner = module if not isinstance(module, Wrapper) else innermost(module)
        if inner not in visited:
            visited.add(inner)
            yield path, inner
            left += [
                (f"{path}.{leaf}" if path else leaf, child)
                for leaf, child in reversed(inner._modules.items())
                if child is not None
            ]


def path_order(model: nn.Module) -> dict[str, int]:
    """The place of each module and parameter in the model's order, by its path."""
    paths = [
        name
        for path, module in base_modules(model)
        for name in (path, *(f"{path}.{leaf}".lstrip(".") for leaf in module._parameters))
    ]
    return {path: place for place, path in enumerate(paths)}


def module_at(model: nn.Module, path: str) -> nn.Module:
    """What stands at one of the model's own paths: the module itself, or what wraps it.

    Raises:
        AttributeError: there is no such path.
    """
    module = model
    for leaf in filter(None, path.split(".")):
        module = getattr(innermost(module), leaf)
    return module


def innermost(module: nn.Module) -> nn.Module:
    """The model's own module under whatever wraps it."""
    while isinstance(module, Wrapper):
        module = module._base
    return module


def bare(module: nn.Module) -> nn.Module:
    """The module without anything that was put into it or around it."""
    module = innermost(module)
    for leaf, child in list(module.named_children()):
        if (inner := bare(child)) is not child:
            module._modules[leaf] = inner
    return module


@lru_cache(maxsize=1024)
def key_of(name: str) -> str:
    """A name as the key of a ModuleDict, which may hold no dots and none of the dict's own words (``keys``,
    ``train``).
    """
    return "adapter:" + name.replace("%", "%25").replace(".", "%2e")
