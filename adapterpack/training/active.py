"""Lists a model's adapters and chooses which of them take part in its forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..errors import UnknownAdapter, Unsupported, nearest
from .layers.head_labels import name_outputs
from .layers.layer import Adapted
from .layers.whole import SavedModule
from .layers.wrapper import Wrapper


def active(model: nn.Module, names: str | list[str] | None) -> nn.Module:
    """Chooses which adapters take part in the forward pass: one, several (applied in order), or None for the base alone.

    Raises:
        UnknownAdapter: the model has no adapter of that name.
        Unsupported: several of a method of which only one can be active, such as prompts.
    """
    wanted = [names] if isinstance(names, str) else list(names or ())
    names_in_model = adapter_names(model)
    for name in wanted:
        if name not in names_in_model:
            raise UnknownAdapter("the model has no such adapter", found=repr(name), remedy=nearest(name, names_in_model))
    wrappers = list(wrappers_of(model))
    for module in wrappers:
        alone = [name for name in wanted if isinstance(module, Adapted) and name in module._names and module._exclusive(name)]
        if len(alone) > 1:
            raise Unsupported("only one of these adapters can be active at a time", where=module._site.path, found=", ".join(alone),
                              remedy="choose one of them")
    for module in wrappers:
        module._active = tuple(name for name in wanted if name in module._names)
    name_outputs(model)
    return model


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters in a model, sorted."""
    return sorted({name for module in wrappers_of(model) for name in module._names})


@contextmanager
def only(model: nn.Module, name: str | None) -> Iterator[None]:
    """The model in evaluation mode with one adapter (or none) active; as it was before afterwards."""
    modes = {module: module.training for module in model.modules()}
    before = {module: module._active for module in modes if isinstance(module, Wrapper)}
    try:
        active(model, name)
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for wrapper, names in before.items():
            wrapper._active = names
        name_outputs(model)


def wrappers_of(model: nn.Module) -> Iterator[Adapted | SavedModule]:
    """The modules of a model that hold adapters."""
    return (module for module in model.modules() if isinstance(module, Adapted | SavedModule))
