"""Finds the layers that a model does not use: an adapter there would be trained and packed, and do
nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..errors import NothingToDo
from .canaries.canary import examples_of
from .layers.active import evaluating
from .layers.sites import in_experts
from .layers.weights import device_of, is_loaded
from .layers.wrapper import innermost, module_at

log = logging.getLogger(__name__)

_WATCHES = "_adapterpack_watches"
"""The attribute of a model that holds the :class:`Watch` of each adapter that has one."""
_SHOWN = 5


def unused_layers(
    model: nn.Module, paths: Sequence[str], samples: Sequence[Mapping[str, Any]] = ()
) -> list[str] | None:
    """Those of the modules at ``paths`` that change nothing in what the model gives for an example.

    Such a module is not called though its owner is, or its output reaches none of the model's. Those of which
    the example says nothing count as used: parts that it does not run, and experts. The example is the
    canary's, or the first of ``samples``; None where the model runs on neither. The model and the random
    state stay as they are, and no activation is kept.
    """
    if not paths or not is_loaded(model):
        return None
    modules = {path: innermost(module_at(model, path)) for path in paths}
    owners = {path: _owner(model, path) for path in paths}
    for make_example in (partial(_canary, model), partial(_sample, model, samples)):
        try:
            with _aside(model), evaluating(model, None):
                example = make_example()
                if example is not None:
                    return _find(model, modules, owners, example)
        except Exception as error:  # the model's own code, on inputs of ours
            log.debug("the model does not run on an example: %s", error)
    return None


def _find(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    owners: Mapping[str, nn.Module | None],
    example: Mapping[str, Any],
) -> list[str] | None:
    called: set[nn.Module | None] = set()
    marks: dict[nn.Module, torch.Tensor] = {}

    def mark(module: nn.Module, args: Any, output: Any) -> Any:
        called.add(module)
        zero = marks.get(module, torch.zeros((), requires_grad=True))
        marked = _with(output, lambda value: value + zero.to(value.device, value.dtype))
        if marked is not output:
            marks[module] = zero
        return marked

    hooks = [module.register_forward_hook(mark) for module in dict.fromkeys(modules.values())]
    hooks += [
        owner.register_forward_pre_hook(lambda module, args: called.add(module))
        for owner in dict.fromkeys(owners.values())
        if owner is not None
    ]
    forget = torch.autograd.graph.saved_tensors_hooks(lambda value: None, lambda nothing: nothing)
    try:
        with torch.enable_grad(), forget:  # only which tensor came from which is wanted
            outputs = list(_tensors(model(**example)))
    finally:
        for hook in hooks:
            hook.remove()
    reached = _leaves(outputs)
    if not reached:
        return None
    silent = {module for module, value in marks.items() if value not in reached}
    if silent and not _are_silent(model, silent, example, outputs):
        silent = set()  # the model computes with something that passes no gradient on
    return [
        path
        for path, module in modules.items()
        if module in silent
        or (module not in called and owners[path] in called and not in_experts(model, path))
    ]


def _are_silent(
    model: nn.Module, modules: set[nn.Module], example: Mapping[str, Any], outputs: list[torch.Tensor]
) -> bool:
    """Whether the outputs stay what they are, to the bit, when these modules give something else."""
    hooks = [
        module.register_forward_hook(lambda module, args, output: _with(output, _noisy)) for module in modules
    ]
    try:
        with torch.no_grad():
            other = list(_tensors(model(**example)))
    finally:
        for hook in hooks:
            hook.remove()
    return len(other) == len(outputs) and all(
        torch.equal(one.nan_to_num(), two.nan_to_num()) for one, two in zip(outputs, other, strict=True)
    )


def _noisy(value: torch.Tensor) -> torch.Tensor:
    return value + torch.rand_like(value, dtype=torch.float32).to(value.dtype)


def _owner(model: nn.Module, path: str) -> nn.Module | None:
    """What has the module and may call it; None for one of a list, of which any may be chosen."""
    owner = innermost(module_at(model, path.rpartition(".")[0]))
    return None if isinstance(owner, nn.ModuleList | nn.ModuleDict) else owner


def _canary(model: nn.Module) -> Mapping[str, Any] | None:
    return next(examples_of(model), None)


def _sample(model: nn.Module, samples: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    device, first = device_of(model, type(model).__name__), next(iter(samples), None)
    return first and {
        key: value.to(device) if hasattr(value, "to") else value for key, value in first.items()
    }


@contextmanager
def _aside(model: nn.Module) -> Iterator[None]:
    """Leaves the random state as it is, where the model draws numbers."""
    device = device_of(model, type(model).__name__)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _with(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A module's output, changed if it is a tensor of floats or a tuple that begins with one; else as it
    is.
    """
    if type(output) is tuple and output and isinstance(output[0], torch.Tensor):
        return (_with(output[0], change), *output[1:]) if output[0].is_floating_point() else output
    return change(output) if isinstance(output, torch.Tensor) and output.is_floating_point() else output


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """The tensors that a model gives, without what it passes on of the outputs of its parts, such as a
    tower's own."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for value in output.values() if isinstance(output, Mapping) else output:
            if not isinstance(value, ModelOutput):
                yield from _tensors(value)


def _leaves(outputs: Iterable[torch.Tensor]) -> set[torch.Tensor]:
    """The tensors of which these were computed, as far as gradients reach."""
    nodes: list[Any] = [value.grad_fn for value in outputs]
    seen: set[Any] = {None}
    while nodes:
        if (node := nodes.pop()) not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
    return {node.variable for node in seen if hasattr(node, "variable")}


class Watch:
    """Notes which layers of a new adapter are called, in a model that can be given no example.

    ``names`` are layers by the target that named them: where the first pass calls none of those, it raises.
    """

    def __init__(
        self, model: nn.Module, adapter: str, paths: Sequence[str], names: Mapping[str, Sequence[str]]
    ) -> None:
        self.adapter, self.names, self.ran = adapter, names, False
        owners = {path: path.rpartition(".")[0] for path in paths if _owner(model, path) is not None}
        self._owners = {path: owner for path, owner in owners.items() if not in_experts(model, path)}
        self._uncalled = {
            path: module_at(model, path).register_forward_pre_hook(partial(self._call, path))
            for path in {*self._owners, *self._owners.values()}
            if path
        }
        self._first = model.register_forward_hook(self._end)

    def _call(self, path: str, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._uncalled.pop(path).remove()

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._first.remove()
        self.ran = True
        report(self.adapter, self.unused, self.names)

    @property
    def unused(self) -> list[str]:
        """The layers that were never called, though their owners were."""
        return [
            path
            for path, owner in self._owners.items()
            if path in self._uncalled and owner not in self._uncalled and self.ran
        ]

    def close(self) -> None:
        """Takes all hooks out of the model."""
        for hook in (*self._uncalled.values(), self._first):
            hook.remove()


def report(adapter: str, unused: Sequence[str], names: Mapping[str, Sequence[str]]) -> None:
    """Says which layers do nothing; ``names`` are layers by the target that named them.

    Raises:
        NothingToDo: all that one of the names stands for are among them.
    """
    left = set(unused)
    for name, paths in names.items():
        if paths and left.issuperset(paths):
            raise NothingToDo(
                "the model does not use this layer: it never calls it, or no output depends on it",
                where=f"adapter '{adapter}'",
                found=f"{name!r}: {_list(paths)}",
                remedy="take it out of targets; allow_unused adapts it all the same",
            )
    if unused:
        log.warning("adapter '%s' leaves out %s, which the model does not use", adapter, _list(unused))


def _list(paths: Sequence[str]) -> str:
    return ", ".join(paths[:_SHOWN]) + (f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else "")


def watch(model: nn.Module, adapter: str, paths: Sequence[str], names: Mapping[str, Sequence[str]]) -> None:
    """Notes from now on which layers of an adapter the model calls."""
    model.__dict__.setdefault(_WATCHES, {})[adapter] = Watch(model, adapter, paths, names)


def unwatch(model: nn.Module, adapters: Iterable[str]) -> None:
    """Ends what :func:`watch` began."""
    watches: dict[str, Watch] = model.__dict__.get(_WATCHES, {})
    for adapter in adapters:
        if adapter in watches:
            watches.pop(adapter).close()


def unused_of(model: nn.Module, adapter: str) -> frozenset[str]:
    """The paths of an adapter's layers that the model has not used in any pass so far."""
    watches: dict[str, Watch] = model.__dict__.get(_WATCHES, {})
    return frozenset(watches[adapter].unused) if adapter in watches else frozenset()
