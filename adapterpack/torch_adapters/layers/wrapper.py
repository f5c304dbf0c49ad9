"""The wrapper that replaces a module to hold its adapters, and functions that see a model's own modules
through wrappers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ...adapter_methods import Arrays, Site
from .calls import Args, Kwargs, Rows, argument_names, input_key
from .tensors import as_numpy

Targets = str | tuple[str, ...]
"""Which layers are adapted: names, or a word for many."""


def child(key: str) -> Any:
    """Makes an attribute of a wrapper that reads its submodule ``key``; the submodule is named ``key`` in
    state dicts.
    """
    return property(lambda self: self._modules[key])


class Wrapper(nn.Module):
    """A module that replaces another and holds named adapters for it; with none active it behaves exactly as
    the wrapped module.

    All public names that :class:`nn.Module` does not define are the wrapped module's, for reading and
    writing: a model may read ``layer.in_features`` or set ``block.scale`` as if there were no wrapper. So
    that it hides none of these, the wrapper's own names begin with an underscore, although other modules of
    this package use them.
    """

    _site: Site
    _active: tuple[str, ...]
    _rows: Rows | None
    """Which active adapter each row of the batch has; None: every row has all of them."""
    _base: nn.Module = child("base")

    def __init__(self, base: nn.Module, site: Site) -> None:
        super().__init__()
        self.training = base.training
        self._modules["base"] = base
        self._site = site
        self._active = ()
        self._rows = None
        self._entry = next(iter(argument_names(innermost(base))), None)

    @property
    def _names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order in which they were added."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the module does, with the active adapters applied."""
        return self._run_active(args, kwargs) if self._active else self._base(*args, **kwargs)

    def _run_active(self, args: Args, kwargs: Kwargs) -> Any:
        """Returns the module's output for the arguments of a call with the active adapters applied."""
        raise NotImplementedError

    def _part(self, name: str) -> nn.Module:
        """Returns the module that holds the adapter's parameters."""
        raise NotImplementedError

    def _remove(self, name: str) -> None:
        """Removes an adapter; unknown names are ignored."""
        raise NotImplementedError

    def _own(self, name: str) -> dict[str, torch.Tensor]:
        """Returns the adapter's own tensors: its parameters, and the buffers of a module trained in full."""
        state = self._part(name).state_dict(keep_vars=True)
        return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}

    def _params(self, name: str) -> Arrays:
        """Returns the adapter's own tensors as numpy arrays: floats as float32, others unchanged."""
        return {key: as_numpy(value) for key, value in self._own(name).items()}

    def _shared(self, name: str) -> dict[str, nn.Parameter]:
        """Returns the parameters that the adapter shares between all its sites."""
        return {}

    def _same_for_all_rows(self, name: str) -> str:
        """Returns why the adapter cannot act on some rows of a batch only; empty if it can."""
        raise NotImplementedError

    def _enter(self, args: Args, kwargs: Kwargs) -> tuple[Any, Callable[[Any], Any]]:
        """Returns the input among the arguments of a call, and the wrapped module as a function of that
        input.
        """
        key = input_key(self._entry, args, kwargs)
        base = self._base
        if isinstance(key, str):
            return kwargs[key], lambda value: base(*args, **{**kwargs, key: value})
        return args[0], lambda value: base(value, *args[1:], **kwargs)

    def __getattr__(self, name: str) -> Any:
        # While the wrapper is being copied, it has no base yet.
        base = self.__dict__.get("_modules", {}).get("base")
        if base is not None and not name.startswith("__"):
            try:
                return getattr(innermost(base), name)
            except AttributeError:
                pass
        # A submodule of the wrapper itself, by its name in state dicts.
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("_modules", {}).get("base")
        if base is None or name.startswith("_") or name == "training" or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            setattr(innermost(base), name, value)


def input_of(module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
    """Returns the input of a module that is called with these arguments."""
    key = input_key(next(iter(argument_names(innermost(module))), None), args, kwargs)
    return kwargs[key] if isinstance(key, str) else args[key]


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the model's own modules under their own paths, as if it had no adapters; a shared module
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


def paths_of(model: nn.Module, part: nn.Module | None) -> list[str]:
    """Returns the paths of the modules of a part of a model, the part's own first; none for None."""
    inside = set() if part is None else {module for _, module in base_modules(part)}
    return [path for path, module in base_modules(model) if module in inside]


def path_order(model: nn.Module) -> dict[str, int]:
    """Maps the path of each module and parameter to its place in the model's order."""
    paths = [
        name
        for path, module in base_modules(model)
        for name in (path, *(f"{path}.{leaf}".lstrip(".") for leaf in module._parameters))
    ]
    return {path: place for place, path in enumerate(paths)}


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Returns the module at one of the model's own paths, or the wrapper around it.

    Raises:
        AttributeError: the model has no such path.
    """
    module = model
    for leaf in filter(None, path.split(".")):
        module = getattr(innermost(module), leaf)
    return module


def is_named(path: str, names: Iterable[str]) -> bool:
    """Whether a path is one of the names, or ends with one, compared by whole components."""
    return f".{path}".endswith(tuple(f".{name}" for name in names))


def is_inside(path: str, owners: Iterable[str]) -> bool:
    """Whether a path is one of the paths ``owners``, or lies below one."""
    return f"{path}.".startswith(tuple(f"{owner}." for owner in owners))


def as_list(names: object) -> list[Any]:
    """Returns one name, several names or None as a list."""
    if names is None:
        return []
    return list(names) if isinstance(names, Iterable) and not isinstance(names, str) else [names]


def innermost(module: nn.Module) -> nn.Module:
    """Returns the model's own module inside any wrappers."""
    while isinstance(module, Wrapper):
        module = module._base
    return module


def bare(module: nn.Module) -> nn.Module:
    """Returns the module with all wrappers removed from it and from inside it."""
    module = innermost(module)
    for leaf, child in list(module.named_children()):
        if (inner := bare(child)) is not child:
            module._modules[leaf] = inner
    return module


@lru_cache(maxsize=1024)
def key_of(name: str) -> str:
    """Escapes an adapter's name as a key of a ModuleDict, which cannot contain dots or be one of the dict's
    own attributes (``keys``, ``train``).
    """
    return "adapter:" + name.replace("%", "%25").replace(".", "%2e")
