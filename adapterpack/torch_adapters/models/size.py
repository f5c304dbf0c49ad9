"""Limits the size of the model that a base's config can make transformers build, by the size of its
checkpoint.

A number in a config costs nothing to write: a million layers or a width of 10^9 would exhaust memory before
any weight is read.
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

from ...base import CONFIG, Checkpoint, read_json
from ...base.base_folder import named_values
from ...base.quantization import read_quantization
from ...errors import FormatError

_COUNTS = re.compile(r"((?:^n|^num|_n|_num)_layer|layers|experts|blocks|depths?|labels)$")
"""Config keys that count parts of a model, for which classes build lists of that length. A key that ends in
``layer`` needs one of these prefixes, because others number a single layer.
"""
_MOST = {"labels": 100_000, "experts": 20_000}
"""The largest count for these parts (Doge has 16,384 experts, rows of one table); for all others it is
:data:`_MOST_PARTS`.
"""
_MOST_PARTS = 1000
_POSITIONS = re.compile(r"(position_embeddings|positions|sequence_length|seq_length|seq_len)$")
"""Config keys for the length of a text. Models compute tables of that length, which appear in no checkpoint
if positions are rotary.
"""
_LEAST_POSITIONS = 1 << 20
_SMALL = 32 << 20
"""Values that a model may have beyond its checkpoint: tables of positions, masks, new heads."""
_TIMES = 4
"""How many times the values of its checkpoint a model may register beyond that: loading registers each twice,
and half of the model may be new.
"""
_PACKED = 8
"""How many values of a model one stored byte of a quantized weight may stand for."""
_MODULES = 50_000


def require_fitting(folder: Path) -> None:
    """Raises if a config counts more layers, experts or labels than any real model has.

    Raises:
        FormatError: a count is too large; the error names its key.
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
    """Inside the block, this thread cannot build a model that is far larger than the checkpoint in
    ``folder``.

    Raises:
        FormatError: a model that is being built exceeds the limit.
    """
    base = Checkpoint(folder)
    thread = threading.get_ident()
    packed = read_quantization(base.config) is not None
    held = sum(info.nbytes * _PACKED if packed else math.prod(info.shape) for info in base.stored.values())
    most = _SMALL + _TIMES * held
    modules = _MODULES + _TIMES * len(base.stored)
    numbers = parts = 0
    for key, value in named_values(base.config):
        if _POSITIONS.search(key) and type(value) is int and value > (longest := max(_LEAST_POSITIONS, held)):
            raise _too_large(f"{folder / CONFIG}#{key}", f"at most {longest}", _short(value))

    def count(module: nn.Module, name: str, value: Any) -> None:
        """Counts what a module registers, and raises beyond the limits."""
        nonlocal numbers, parts
        # torch's registration hooks are global to the process, so they also see models that other threads
        # build.
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
    """Formats a number, also one with too many digits for a float."""
    return f"{number:.3g}" if abs(number) < 1 << 1000 else "a number of hundreds of digits"


def _too_large(where: object, expected: str, value: str) -> FormatError:
    """Returns the error for a config that describes too large a model."""
    return FormatError(
        "the configuration describes a model far larger than the checkpoint",
        where=where,
        expected=expected,
        found=value,
        remedy="fetch the base again from where it came",
    )
