"""Repeats the blocks of a model in memory: the copies share the base's weights, and each has adapters of its
own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from ...adapter_methods.forms.repeated_layers import order_of
from ...base.repeated_layers import STACKS
from ...errors import BaseMismatch, Unsupported
from ..active import adapter_names
from ..layers.wrapper import base_modules

_MARK = "_adapterpack_repeated_layers"


class Stack(NamedTuple):
    """What a model had before its blocks were repeated: the owner of the stack, its name there, the blocks,
    and settings by name.
    """

    ends: tuple[int, ...]
    owner: nn.Module
    leaf: str
    blocks: nn.ModuleList
    settings: dict[str, Any]


def repeats_in(model: nn.Module) -> tuple[int, ...]:
    """The ranges in which the blocks of a model are repeated, start and end in turn; none where they are its
    own.
    """
    stack: Stack | None = model.__dict__.get(_MARK)
    return () if stack is None else stack.ends


@contextmanager
def repeating(model: nn.Module, ends: Sequence[int], adapter: str) -> Iterator[None]:
    """Makes the blocks of ``model`` those in ranges ``ends``, start and end in turn; after an error they are
    as they were.

    Raises:
        BaseMismatch: the model has no such blocks.
        Unsupported: it has several stacks of blocks, or none; or it holds adapters of another stack.
    """
    before = repeats_in(model)
    if before != tuple(ends) and (before or adapter_names(model)):
        raise Unsupported(
            "adapters of one model must be of one stack of blocks",
            where=f"adapter '{adapter}'",
            expected=f"blocks repeated as in {before}" if before else "the base's own blocks",
            found=str(tuple(ends)),
            remedy="detach the others first, or load the base once more",
        )
    if ends and not before:
        _repeat(model, tuple(ends))
    try:
        yield
    except BaseException:
        if not adapter_names(model):
            give_back(model)
        raise


def _repeat(model: nn.Module, ends: tuple[int, ...]) -> None:
    owner, leaf, blocks = _stack_of(model)
    order, settings = order_of(ends), dict[str, Any]()
    config: Any = getattr(owner, "config", None)
    if max(order) >= len(blocks):
        raise BaseMismatch(
            "the adapter repeats a block that the model does not have",
            where=type(model).__name__,
            expected=f"block {max(order)}",
            found=f"{len(blocks)} blocks",
            remedy="use the base that the adapter was trained on",
        )
    types: Any = getattr(config, "layer_types", None)
    if isinstance(types, list) and len(types) == len(blocks):
        settings["layer_types"] = types
    if isinstance(getattr(config, "num_hidden_layers", None), int):
        settings["num_hidden_layers"] = len(blocks)
    model.__dict__[_MARK] = Stack(ends, owner, leaf, blocks, settings)
    owner._modules[leaf] = nn.ModuleList(_copied(blocks[number], place) for place, number in enumerate(order))
    if "layer_types" in settings:
        config.layer_types = [types[number] for number in order]
    if "num_hidden_layers" in settings:
        config.num_hidden_layers = len(order)


def give_back(model: nn.Module) -> None:
    """Gives a model its own blocks back, where they were repeated."""
    stack: Stack | None = model.__dict__.pop(_MARK, None)
    if stack is not None:
        stack.owner._modules[stack.leaf] = stack.blocks.train(stack.owner.training)
        for key, value in stack.settings.items():
            setattr(stack.owner.config, key, value)


def _stack_of(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The owner of the one stack of blocks, its name there, and the blocks."""
    found = [
        (path, module)
        for path, module in base_modules(model)
        if isinstance(module, nn.ModuleList) and any(f".{path}".endswith(f".{end}") for end in STACKS)
    ]
    outer = [
        (path, module)
        for path, module in found
        if not any(path.startswith(f"{other}.") for other, _ in found)
    ]
    if len(outer) != 1:
        raise Unsupported(
            "the adapter repeats blocks of its base, which does not have one stack of them",
            where=type(model).__name__,
            found=", ".join(path for path, _ in outer) or "none",
            expected=f"one whose name ends with {', '.join(STACKS)}",
        )
    path, blocks = outer[0]
    owner = model.get_submodule(path.rpartition(".")[0])
    return owner, path.rpartition(".")[2], blocks


def _copied(block: nn.Module, place: int) -> nn.Module:
    """A block with the same weights that knows its place, which caches go by."""
    shared: dict[int, Any] = {id(value): value for value in (*block.parameters(), *block.buffers())}
    configs = (getattr(module, "config", None) for module in block.modules())
    copied: Any = copy.deepcopy(
        block, {**shared, **{id(config): config for config in configs if config is not None}}
    )
    for module in copied.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = place
    made: nn.Module = copied
    return made
