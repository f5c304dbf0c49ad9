"""Shared options of commands that run a bundle: device, sampling, and the form of answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

import adapterpack

from ..bundle import GENAI_FILE
from ..errors import storage_errors
from ..hub import folder_of
from ..io import Json
from ..merging.base_kind import is_graph
from ..runtime import Device
from ..runtime.text import read_text
from .logs import log_message
from .options import combine, flag, option, parse_pairs, suggest
from .progress import show_steps
from .settings import PROVIDER, THREADS

packs_argument = click.argument("packs", nargs=-1, metavar="[PACK...]")
"""The adapters after a bundle or a base."""


def open_target(
    target: str,
    adapters: Sequence[str | adapterpack.Pack],
    accept: Callable[[Any], None] | None = None,
) -> tuple[Path, Sequence[str | adapterpack.Pack]]:
    """Returns the bundle that a command runs, and its adapters: of a base, which is exported into the cache
    together with the packs if their task is one to ``accept``, their names.

    Raises:
        AdapterpackError: see :func:`adapterpack.bundle_for`.
    """
    folder = folder_of(target)
    if is_graph(folder) or (folder / GENAI_FILE).is_file():
        return folder, adapters
    packs = [one for one in adapters if not isinstance(one, str)]
    with show_steps() as say:
        bundle = adapterpack.bundle_for(folder, packs, progress=say, accept=accept)
    log_message(
        f"{target} is exported to {bundle}, where the next call finds it; for production, write a bundle of "
        "your own with adapterpack export"
    )
    return bundle, [one if isinstance(one, str) else one.name for one in adapters]


device_options = combine(
    option(
        "--provider",
        "cuda|cpu|NAME",
        "Where to run; by default on CUDA if there is a GPU. Other providers of ONNX "
        "Runtime (tensorrt, openvino, dml, coreml, ...) run where their wheel is installed.",
        envvar=PROVIDER,
        shell_complete=suggest("adapterpack.runtime.providers.provider:PROVIDERS"),
    ),
    option("--device-id", "N", "The number of the GPU [0].", type=click.IntRange(min=0)),
    option("--memory-limit", "B", "Use at most B bytes of GPU memory.", type=click.IntRange(min=1)),
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
    option(
        "--threads",
        "N",
        "Threads of each graph's operators on the CPU [all cores].",
        envvar=THREADS,
        type=click.IntRange(min=1),
    ),
    click.option(
        "--spinning/--no-spinning",
        default=None,
        help="Whether idle threads spin; turn it off where other work needs the cores.",
    ),
    flag("--allow-cpu-nodes", "Warn about nodes that fall back to the CPU, instead of failing."),
    option(
        "--provider-option options",
        "KEY=VALUE",
        "An option of the provider, by ONNX Runtime's name; may be repeated.",
        multiple=True,
        callback=parse_pairs,
    ),
)
"""Options for where a bundle runs; a command receives them under the names of the fields of :class:`.Device`.
"""


def device_of(parameters: dict[str, Any]) -> Device:
    """Removes the device options from ``parameters`` and returns the device that they describe."""
    given = {field.name: parameters.pop(field.name) for field in fields(Device)}
    return Device(**{**given, "options": {name: str(value) for name, value in given["options"].items()}})


batch_option = option(
    "--batch-size",
    "N",
    "How many rows run together.",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
)
"""How many rows a command runs at once."""

_FILES = ("json_schema", "grammar")
"""Parameters whose option takes a file."""
sampling_options = combine(
    option("--max-new-tokens", "N", "The most tokens of an answer.", type=int),
    click.option(
        "--sampling",
        type=click.Choice(["greedy", "model"]),
        help="The default for the options below: greedy (always the likeliest token; the default), or what "
        "the model's generation_config.json says.",
    ),
    option("--temperature", "T", "0, the default, always takes the likeliest token.", type=float),
    option("--top-k", "K", "Sample from the K likeliest tokens.", type=int),
    option("--top-p", "P", "Sample from the fewest tokens whose probabilities add up to P.", type=float),
    option("--min-p", "P", "Sample from tokens at least P times as likely as the likeliest.", type=float),
    option(
        "--repetition-penalty",
        "R",
        "Above 1: makes tokens of the prompt and the answer less likely.",
        type=float,
    ),
    option("--seed", "N", "The seed for sampling.", type=int),
    option("--stop", "TEXT", "A text that ends an answer and is cut off; may be repeated.", multiple=True),
    option(
        "--logprobs",
        "N",
        "Add the log-probability of each token, and of the N likeliest alternatives.",
        type=int,
    ),
    option("--beams num_beams", "N", "Search for the likeliest answer with N beams.", type=int),
    option("--json-schema", "F.json", "Answer with JSON that fits this schema; needs the extra structured."),
    option(
        "--regex", "R", "Answer with text that matches this regular expression; needs the extra structured."
    ),
    option(
        "--grammar",
        "F.lark",
        "Answer in this grammar, written for Lark or as GBNF; needs the extra structured.",
    ),
)
"""Options for how tokens are chosen and which form an answer has; a command receives them under the names of
``Sampling``.
"""


def sampling_parameters(options: Mapping[str, Any]) -> Json:
    """Returns the parameters that the user set, with files replaced by their text.

    Raises:
        StorageError, FormatError: a file cannot be read, or is not text.
    """
    given = {name: value for name, value in options.items() if value not in (None, ())}
    for name in _FILES:
        if name in given:
            with storage_errors(given[name]):
                given[name] = read_text(Path(given[name]).resolve())
    return given
