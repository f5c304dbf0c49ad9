"""The options of commands that open a bundle: where and how its graphs run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ..runtime.providers.device import Device
from .options import pairs, values
from .settings import PROVIDER, THREADS

_Function = TypeVar("_Function", bound=Callable[..., Any])
_OPTIONS = (
    click.option(
        "--provider",
        envvar=PROVIDER,
        metavar="cuda|cpu|NAME",
        shell_complete=values("adapterpack.runtime.providers.provider:PROVIDERS"),
        help="Where to run; by default on CUDA if there is a GPU. Other providers of ONNX "
        "Runtime (tensorrt, openvino, dml, coreml, ...) run where their wheel is installed.",
    ),
    click.option("--device-id", type=click.IntRange(min=0), metavar="N", help="The number of the GPU [0]."),
    click.option(
        "--memory-limit", type=click.IntRange(min=1), metavar="B", help="Use at most B bytes of GPU memory."
    ),
    click.option(
        "--arena",
        type=click.Choice(["doubling", "exact"]),
        help="How the arena of GPU memory grows [doubling].",
    ),
    click.option(
        "--tf32/--no-tf32",
        default=None,
        help="Let float32 products use TF32, with mantissas of ten bits; off by default.",
    ),
    click.option(
        "--capture/--no-capture",
        default=None,
        help="Record the engine's steps as CUDA graphs, and replay them.",
    ),
    click.option(
        "--threads",
        envvar=THREADS,
        type=click.IntRange(min=1),
        metavar="N",
        help="Threads of each graph's operators on the CPU [all cores].",
    ),
    click.option(
        "--spinning/--no-spinning",
        default=None,
        help="Whether idle threads spin; turn it off where other work needs the cores.",
    ),
    click.option(
        "--allow-cpu-nodes",
        is_flag=True,
        help="Warn about nodes that fall back to the CPU, instead of failing.",
    ),
    click.option(
        "--provider-option",
        "options",
        multiple=True,
        callback=pairs,
        metavar="KEY=VALUE",
        help="An option of the provider, by ONNX Runtime's name; may be repeated.",
    ),
)
_FIELDS = (
    "provider",
    "device_id",
    "memory_limit",
    "arena",
    "tf32",
    "capture",
    "threads",
    "spinning",
    "allow_cpu_nodes",
    "options",
)


def device_options(function: _Function) -> _Function:
    """The options, which the function takes by the names of the fields of :class:`.Device`."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def device_of(parameters: dict[str, Any]) -> Device:
    """The device of these parameters, which are taken out of them."""
    given = {name: parameters.pop(name) for name in _FIELDS}
    return Device(**{**given, "options": {name: str(value) for name, value in given["options"].items()}})
