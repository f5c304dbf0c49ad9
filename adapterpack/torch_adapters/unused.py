"""Finds layers whose output does not matter to a model: an adapter there would be trained and packed without
any effect.

Some models read a layer's weight instead of calling it, or drop its output. With an example input, one
forward pass answers this before training (:func:`unused_layers`); without one, :class:`Watch` observes the
model's first real pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..errors import NothingToDo
from ..tasks.data import Row
from .canaries.canary import examples_of
from .canaries.inputs import reads_text_alone
from .layers import device_of, evaluating, innermost, is_loaded, module_at
from .layers.observers import Observer
from .layers.sites import experts_in

log = logging.getLogger(__name__)

_SHOWN = 5


def unused_layers(model: nn.Module, paths: Sequence[str], samples: Sequence[Row] = ()) -> list[str] | None:
    """Returns which of the modules at ``paths`` have no effect on the model's output for an example.

    Such a module is not called although its owner or its layer is (the attention to an encoder in a decoder
    that has none), or its output reaches none of the model's outputs. A module counts as used if the example
    cannot tell: experts, and parts of the model that do not run, unless the model was loaded for a task of
    texts alone, which need none of its towers. The example is the canary's input, else the first of
    ``samples``; the result is None if the model runs on neither. The model and the random state stay
    unchanged, and no activations are kept.
    """
    if not paths or not is_loaded(model):
        return None
    modules = {path: innermost(module_at(model, path)) for path in paths}
    owners = {path: (_owner(model, path), _layer_of(model, path)) for path in paths}
    examples: tuple[Callable[[], Row | None], ...] = (
        lambda: next(examples_of(model), None),
        lambda: _sample(model, samples),
    )
    for make_example in examples:
        try:
            with _aside(model), evaluating(model, None):
                example = make_example()
                if example is not None:
                    return _find(model, modules, owners, example)
        except Exception as error:
            # The model's own code may raise anything on generated inputs.
            log.debug("the model does not run on an example: %s", error)
    return None


def _find(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    owners: Mapping[str, tuple[nn.Module | None, nn.Module | None]],
    example: Row,
) -> list[str] | None:
    """Runs the example and returns the paths of modules that it shows to be unused; None if the outputs do
    not depend on any of them.

    Each module's output gets a zero added that requires a gradient. A module reaches an output if the
    autograd graph of the outputs contains its zero.
    """
    called: set[nn.Module | None] = set()
    marks: dict[nn.Module, Tensor] = {}

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
        for owner in {owner for several in owners.values() for owner in several if owner is not None}
    ]
    # Only the edges of the graph matter, so autograd need not store a single tensor for a backward pass.
    forget = torch.autograd.graph.saved_tensors_hooks(lambda value: None, lambda nothing: nothing)
    with torch.enable_grad(), forget:
        outputs = _outputs(model, example, hooks)
    reached = _leaves(outputs)
    if not reached:
        return None
    silent = {module for module, value in marks.items() if value not in reached}
    # The graph alone may be wrong where the model computes with an operation that has no gradient. So the
    # suspects must also leave the outputs unchanged when their own outputs change.
    if silent and not _are_silent(model, silent, example, outputs):
        # The model uses an operation without a gradient, so the graph proves nothing.
        silent = set()
    experts = experts_in(model)
    whole = reads_text_alone(model)
    return [
        path
        for path, module in modules.items()
        if module in silent
        or (
            module not in called
            and (whole or called.intersection(owners[path]))
            and not path.startswith(experts)
        )
    ]


def _are_silent(model: nn.Module, modules: set[nn.Module], example: Row, outputs: list[Tensor]) -> bool:
    """Whether the outputs stay equal, bit for bit, when random noise is added to the outputs of
    ``modules``.
    """
    hooks = [
        module.register_forward_hook(lambda module, args, output: _with(output, _noisy)) for module in modules
    ]
    with torch.no_grad():
        other = _outputs(model, example, hooks)
    return len(other) == len(outputs) and all(
        torch.equal(one.nan_to_num(), two.nan_to_num()) for one, two in zip(outputs, other, strict=True)
    )


def _noisy(value: Tensor) -> Tensor:
    """Adds random noise to a tensor."""
    return value + torch.rand_like(value, dtype=torch.float32).to(value.dtype)


def _owner(model: nn.Module, path: str) -> nn.Module | None:
    """Returns the module that contains the module at ``path`` and would call it; None for a list or dict,
    whose elements the model may choose from.
    """
    owner = innermost(module_at(model, path.rpartition(".")[0]))
    return None if isinstance(owner, nn.ModuleList | nn.ModuleDict) else owner


def _layer_of(model: nn.Module, path: str) -> nn.Module | None:
    """Returns the smallest element of a list of modules that contains the module at ``path``, if there is
    one.
    """
    while "." in path:
        path = path.rpartition(".")[0]
        owner = path.rpartition(".")[0]
        if owner and isinstance(module_at(model, owner), nn.ModuleList):
            return module_at(model, path)
    return None


def _sample(model: nn.Module, samples: Sequence[Row]) -> Row | None:
    """Returns the first of the samples on the model's device, or None."""
    device = device_of(model)
    first = next(iter(samples), None)
    return first and {
        key: value.to(device) if hasattr(value, "to") else value for key, value in first.items()
    }


@contextmanager
def _aside(model: nn.Module) -> Iterator[None]:
    """Restores the random state afterwards, for models that draw random numbers."""
    device = device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _with(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Applies ``change`` to a module's output if that is a float tensor, or to its first element if it is a
    tuple that begins with one; returns other outputs unchanged.
    """
    if type(output) is tuple and output and isinstance(output[0], Tensor):
        return (_with(output[0], change), *output[1:]) if output[0].is_floating_point() else output
    return change(output) if isinstance(output, Tensor) and output.is_floating_point() else output


def _outputs(model: nn.Module, example: Row, hooks: Iterable[Any]) -> list[Tensor]:
    """Runs the example and returns the tensors in the model's output; removes the hooks."""
    try:
        return list(_tensors(model(**example)))
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yields the tensors in a model's output, without nested outputs of its parts (a tower's, say), which the
    model only passes on.
    """
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for value in output.values() if isinstance(output, Mapping) else output:
            if not isinstance(value, ModelOutput):
                yield from _tensors(value)


def _leaves(outputs: Iterable[Tensor]) -> set[Tensor]:
    """Returns the leaf tensors in the autograd graph of these outputs."""
    nodes = [value.grad_fn for value in outputs]
    seen: set[Any] = {None}
    while nodes:
        if (node := nodes.pop()) not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
    return {node.variable for node in seen if hasattr(node, "variable")}


class Watch(Observer):
    """Observes which layers of a new adapter a model calls in its first pass, for models that no example can
    be made for.

    ``names`` maps each target to the layers that it names; if the pass calls none of the layers of a target,
    :meth:`_end` raises.
    """

    def __init__(
        self, model: nn.Module, adapter: str, paths: Sequence[str], names: Mapping[str, Sequence[str]]
    ) -> None:
        self.adapter = adapter
        self.names = names
        self.ran = False
        owners = {path: path.rpartition(".")[0] for path in paths if _owner(model, path) is not None}
        experts = experts_in(model)
        self._owners = {path: owner for path, owner in owners.items() if not path.startswith(experts)}
        self._uncalled = {
            path: module_at(model, path).register_forward_pre_hook(partial(self._call, path))
            for path in {*self._owners, *self._owners.values()}
            if path
        }
        self._first = model.register_forward_hook(self._end)
        self.handles = [*self._uncalled.values(), self._first]

    def _call(self, path: str, module: nn.Module, args: Any) -> None:
        """Removes the hook of a module that has been called: it is used."""
        if not torch.compiler.is_compiling():
            self._uncalled.pop(path).remove()

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        """Reports after the first pass which layers were not called."""
        if torch.compiler.is_compiling():
            return
        self._first.remove()
        self.ran = True
        report(self.adapter, self.unused, self.names)

    @property
    def unused(self) -> list[str]:
        """The layers that were never called although their owners were."""
        return [
            path
            for path, owner in self._owners.items()
            if path in self._uncalled and owner not in self._uncalled and self.ran
        ]


def report(adapter: str, unused: Sequence[str], names: Mapping[str, Sequence[str]]) -> None:
    """Warns of layers that have no effect; ``names`` maps each target to the layers that it names.

    Raises:
        NothingToDo: all layers that a target names are among them.
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
    """Lists the first paths in words."""
    return ", ".join(paths[:_SHOWN]) + (f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else "")
