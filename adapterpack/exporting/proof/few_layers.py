"""Writes a copy of a base that has its first layers only, at full width: one of each kind."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...base.base_folder import CONFIG, read_json
from ...base.checkpoint import Checkpoint
from ..tracing.scratch_checkpoint import write_checkpoint

_BLOCK = re.compile(r"(.*?(?:^|\.)(?:layers|layer|h|blocks|block))\.([0-9]{1,5})\.")
"""A tensor of a block: its stack and its number."""
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_PARTS = ("", "text_config", "decoder", "language_config", "llm_config")
_ALIKE = 4
"""Different values that a setting for each layer may have and still say what kinds of layers there are."""


class LayerStack(NamedTuple):
    """The one stack of a decoder: its ``layers``, of which the first ``kept`` have one of each kind; ``part``
    is the name of its part of the configuration, whose ``field`` is the number of layers.
    """

    layers: int
    kept: int
    part: str
    field: str


def stack_of(base: Checkpoint, config: Mapping[str, Any]) -> LayerStack | None:
    """The stack that a configuration (of transformers) describes, or None where it is not known which tensors
    are its.
    """
    for part in _PARTS:
        settings = config.get(part) if part else config
        count = next(
            (key for key in _COUNTS if isinstance(settings, Mapping) and type(settings.get(key)) is int), None
        )
        if count is not None and isinstance(settings, Mapping):
            layers = settings[count]
            if any(numbers == layers for numbers in _stacks(base).values()):
                return LayerStack(layers, _count_kinds(settings, layers), part, count)
    return None


def write_few_layers(base: Checkpoint, config: Mapping[str, Any], stack: LayerStack, folder: Path) -> Path:
    """Writes the first layers of a base, everything outside of its stack, and the configuration of that, into
    the new ``folder``.

    Raises:
        StorageError: the disk has no room for it.
    """
    cut = {name for name, numbers in _stacks(base).items() if numbers == stack.layers}
    names = [
        name
        for name in base.tensors
        if name not in base.stacks
        and not ((block := _BLOCK.match(name)) and block[1] in cut and int(block[2]) >= stack.kept)
    ]
    entries = [(name, base.tensors[name].dtype, base.tensors[name].shape) for name in names]
    written = read_json(base.folder / CONFIG)
    shown = written.get(stack.part, written) if stack.part else written
    shown.update(_shorten(config.get(stack.part, config) if stack.part else config, stack))
    write_checkpoint(folder, entries, lambda name, *_: [base.read(name)], base.folder, written)
    return folder


def _stacks(base: Checkpoint) -> dict[str, int]:
    """The number of blocks of each stack."""
    found: dict[str, int] = {}
    for name in base.tensors:
        if block := _BLOCK.match(name):
            found[block[1]] = max(found.get(block[1], 0), int(block[2]) + 1)
    return found


def _by_layer(settings: Mapping[str, Any], layers: int) -> dict[str, list[Any]]:
    """The settings that have a value for each layer."""
    return {
        key: value for key, value in settings.items() if isinstance(value, list) and len(value) == layers > 1
    }


def _count_kinds(settings: Mapping[str, Any], layers: int) -> int:
    """How many layers from the first on have one of each kind."""
    by_field = [list(map(str, values)) for values in _by_layer(settings, layers).values()]
    kinds = list(zip(*(values for values in by_field if len(set(values)) <= _ALIKE), strict=True))
    return max((kinds.index(kind) for kind in set(kinds)), default=0) + 1


def _shorten(settings: Mapping[str, Any], stack: LayerStack) -> Iterator[tuple[str, Any]]:
    yield stack.field, stack.kept
    for key, value in _by_layer(settings, stack.layers).items():
        yield key, value[: stack.kept]
