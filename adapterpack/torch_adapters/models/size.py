"""Bounds what a base's configuration can make a library build: a model is hardly larger than the checkpoint
that it is for.

Numbers of a configuration cost nothing to write: a million layers, or a width of 10^9, would take all memory
before a weight is read.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules import module as hooks

from ...base.base_folder import CONFIG, named_values, read_json
from ...base.checkpoint import Checkpoint
from ...base.quantization import read_quantization
from ...errors import FormatError

_COUNTS = re.compile(r"((?:^n|^num|_n|_num)_layer|layers|experts|blocks|depths?|labels)$")
"""Keys that say how many parts a model has: classes of transformers make lists of that length. One that ends
in ``layer`` says which.
"""
_MOST = {"labels": 100_000}
"""Of what there may be so many; of all else, :data:`_MOST_PARTS`."""
_MOST_PARTS = 1000
_POSITIONS = re.compile(r"(position_embeddings|positions|sequence_length|seq_length|seq_len)$")
"""Keys that say how long a text may be: tables are computed of that length, which no weight shows where
positions are rotated.
"""
_LEAST_POSITIONS = 1 << 20
_SMALL = 32 << 20
"""Numbers that a model may have whatever its checkpoint holds: tables of positions, masks, new heads."""
_TIMES = 4
"""How many times as many as its checkpoint it may have beyond that: loading registers each twice, and half of
them may be new.
"""
_PACKED = 8
"""Numbers of a model that a stored byte of a quantized weight may stand for."""
_MODULES = 50_000


def require_fitting(folder: Path) -> None:
    """Refuses a configuration that counts more layers, experts or labels than any model has.

    Raises:
        FormatError: names the key.
    """
    path = folder / CONFIG
    for key, value in named_values(read_json(path)) if path.is_file() else ():
        if part := _COUNTS.search(key):
            most = _MOST.get(part[1], _MOST_PARTS)
            for count in value if isinstance(value, list) else [value]:
                # of several, negative ones are places, counted from the end
                least = -math.inf if isinstance(value, list) else -1
                if type(count) is int and not least <= count <= most:
                    raise _too_large(f"{path}#{key}", f"at most {most}", _short(count))


@contextmanager
def bounded_build(folder: Path) -> Iterator[None]:
    """Within the block this thread builds no model that is far larger than the checkpoint in ``folder``.

    Raises:
        FormatError: it began to.
    """
    base, thread = Checkpoint(folder), threading.get_ident()
    packed = read_quantization(base.config) is not None
    held = sum(info.nbytes * _PACKED if packed else math.prod(info.shape) for info in base.stored.values())
    most, modules = _SMALL + _TIMES * held, _MODULES + _TIMES * len(base.stored)
    numbers = parts = 0
    for key, value in named_values(base.config):
        if _POSITIONS.search(key) and type(value) is int and value > (longest := max(_LEAST_POSITIONS, held)):
            raise _too_large(f"{folder / CONFIG}#{key}", f"at most {longest}", _short(value))

    def count(module: nn.Module, name: str, value: Any) -> None:
        nonlocal numbers, parts
        if threading.get_ident() != thread or value is None:
            return
        if isinstance(value, nn.Module):
            parts += 1
        else:
            numbers += value.numel()
        if numbers > most or parts > modules:
            raise _too_large(
                folder / CONFIG,
                f"a model of about the {held:,} numbers of the checkpoint",
                f"{type(module).__name__}.{name}, by which it has more than {min(numbers, most):,}",
            )

    with ExitStack() as registered:
        for register in (
            hooks.register_module_parameter_registration_hook,
            hooks.register_module_buffer_registration_hook,
            hooks.register_module_module_registration_hook,
        ):
            registered.callback(register(count).remove)
        yield


def _short(number: int) -> str:
    return f"{number:.3g}" if abs(number) < 1 << 1000 else "a number of hundreds of digits"


def _too_large(where: object, expected: str, value: str) -> FormatError:
    return FormatError(
        "the configuration describes a model far larger than the checkpoint",
        where=where,
        expected=expected,
        found=value,
        remedy="fetch the base again from where it came",
    )
