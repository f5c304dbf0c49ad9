"""Writes a copy of a base that has only its first layers, at full width, with at least one layer of each
kind.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from msgspec.structs import replace

from ...base import CONFIG, Checkpoint, read_json
from ...io import Config
from ...manifest.manifest import Base
from ...pack import Pack, seal
from ..tracing.scratch_checkpoint import write_checkpoint

_BLOCK = re.compile(r"(.*?(?:^|\.)(?:layers|layer|h|blocks|block))\.([0-9]{1,5})\.")
"""Matches a tensor of a block: its stack and its number."""
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_PARTS = ("", "text_config", "decoder", "language_config", "llm_config")
_ALIKE = 4
"""A per-layer setting distinguishes kinds of layers only if it has at most this many different values."""


class LayerStack(NamedTuple):
    """The only stack of a decoder: its ``layers``, of which the first ``kept`` include each kind; ``part``
    names its section of the configuration, in which ``field`` is the number of layers.
    """

    layers: int
    kept: int
    part: str
    field: str


def stack_of(base: Checkpoint, config: Config) -> LayerStack | None:
    """Returns the stack that a transformers configuration describes, or None if the code cannot tell which
    tensors belong to it.
    """
    for part in _PARTS:
        settings = config.get(part) if part else config
        if not isinstance(settings, Mapping):
            continue
        count = next((key for key in _COUNTS if type(settings.get(key)) is int), None)
        if count is not None:
            layers = settings[count]
            if any(numbers == layers for numbers in _stacks(base).values()):
                kinds = _count_kinds(settings, layers, _list_contents(base, layers))
                return LayerStack(layers, kinds, part, count)
    return None


def write_few_layers(base: Checkpoint, config: Config, stack: LayerStack, folder: Path) -> Path:
    """Writes the base's first layers, all tensors outside its stack, and a matching configuration to the new
    ``folder``.

    Raises:
        StorageError: the disk has no room for it.
    """
    names = list_kept(base, stack)
    entries = [(name, base.tensors[name].dtype, base.tensors[name].shape) for name in names]
    written = read_json(base.folder / CONFIG)
    shown = written.get(stack.part, written) if stack.part else written
    by_layer = _by_layer(config.get(stack.part, config) if stack.part else config, stack.layers)
    shown |= {stack.field: stack.kept, **{key: values[: stack.kept] for key, values in by_layer.items()}}
    write_checkpoint(folder, entries, lambda name, *_: [base.read(name)], base.folder, written)
    return folder


def list_kept(base: Checkpoint, stack: LayerStack) -> list[str]:
    """Returns the names of the tensors that a copy of the first layers has."""
    cut = {name for name, numbers in _stacks(base).items() if numbers == stack.layers}
    return [
        name
        for name in base.tensors
        if name not in base.stacks
        and not ((block := _BLOCK.match(name)) and block[1] in cut and int(block[2]) >= stack.kept)
    ]


def cut_packs(base: Checkpoint, stack: LayerStack, packs: Sequence[Pack]) -> list[Pack]:
    """Returns the parts of packs that change the first layers of the base, and what lies outside its stack;
    leaves out packs that change nothing there.
    """
    names = {name.rpartition(".")[2] for name, layers in _stacks(base).items() if layers == stack.layers}

    def stays(path: str) -> bool:
        block = _BLOCK.match(f"{path}.")
        return block is None or block[1].rpartition(".")[2] not in names or int(block[2]) < stack.kept

    cut = []
    for pack in packs:
        manifest = pack.manifest
        entries = {name: entry for name, entry in manifest.tensors.items() if stays(entry.group)}
        groups = tuple(group for group in manifest.groups if stays(group.path))
        if any(group.role in ("adapter", "full") for group in groups):
            draft = replace(manifest, groups=groups, tensors=entries, base=Base(), canary=None)
            part = seal(draft, {name: pack.tensors[name] for name in entries}, pack.extra)
            cut.append(dataclasses.replace(part, alias=pack.alias))
    return cut


def _stacks(base: Checkpoint) -> dict[str, int]:
    """Returns the number of blocks of each stack."""
    found: dict[str, int] = {}
    for name in base.tensors:
        if block := _BLOCK.match(name):
            found[block[1]] = max(found.get(block[1], 0), int(block[2]) + 1)
    return found


def _by_layer(settings: Config, layers: int) -> dict[str, list[Any]]:
    """Returns the settings that have one value for each layer."""
    return {
        key: value for key, value in settings.items() if isinstance(value, list) and len(value) == layers > 1
    }


def _list_contents(base: Checkpoint, layers: int) -> list[str]:
    """Returns a text for each layer, equal for layers that have tensors of the same names and shapes."""
    contents: list[set[str]] = [set() for _ in range(layers)]
    names = {name for name, numbers in _stacks(base).items() if numbers == layers}
    for name, info in base.tensors.items():
        if (block := _BLOCK.match(name)) and block[1] in names:
            contents[int(block[2])].add(f"{block[1]}.{name[block.end() :]}: {info.shape}")
    return [str(sorted(content)) for content in contents]


def _count_kinds(settings: Config, layers: int, contents: list[str]) -> int:
    """Returns how many of the first layers include each kind."""
    by_field = [contents, *(list(map(str, values)) for values in _by_layer(settings, layers).values())]
    kinds = list(zip(*(values for values in by_field if len(set(values)) <= _ALIKE), strict=True))
    return max((kinds.index(kind) for kind in set(kinds)), default=0) + 1
