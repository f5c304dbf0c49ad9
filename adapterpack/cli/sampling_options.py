"""The options of ``adapterpack run`` that say how the tokens of an answer are chosen, and what form it
has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from ..errors import storage_errors
from ..runtime.text.model_files import read_text

_Function = TypeVar("_Function", bound=Callable[..., Any])
_FILES = ("json_schema", "grammar")
"""Parameters that are given as files."""
_OPTIONS = (
    click.option("--max-new-tokens", type=int, metavar="N", help="The most tokens of an answer."),
    click.option(
        "--sampling",
        type=click.Choice(["greedy", "model"]),
        help="The default for the options below: greedy (always the likeliest token; the default), or what "
        "the model's generation_config.json says.",
    ),
    click.option(
        "--temperature", type=float, metavar="T", help="0, the default, always takes the likeliest token."
    ),
    click.option("--top-k", type=int, metavar="K", help="Sample from the K likeliest tokens."),
    click.option(
        "--top-p",
        type=float,
        metavar="P",
        help="Sample from the fewest tokens whose probabilities add up to P.",
    ),
    click.option(
        "--min-p",
        type=float,
        metavar="P",
        help="Sample from tokens at least P times as likely as the likeliest.",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        metavar="R",
        help="Above 1: makes tokens of the prompt and the answer less likely.",
    ),
    click.option("--seed", type=int, metavar="N", help="The seed for sampling."),
    click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        help="A text that ends an answer and is cut off; may be repeated.",
    ),
    click.option(
        "--logprobs",
        type=int,
        metavar="N",
        help="Add the log-probability of each token, and of the N likeliest alternatives.",
    ),
    click.option(
        "--beams", "num_beams", type=int, metavar="N", help="Search for the likeliest answer with N beams."
    ),
    click.option(
        "--json-schema",
        metavar="F.json",
        help="Answer with JSON that fits this schema; needs the extra structured.",
    ),
    click.option(
        "--regex",
        metavar="R",
        help="Answer with text that matches this regular expression; needs the extra structured.",
    ),
    click.option(
        "--grammar",
        metavar="F.lark",
        help="Answer in this grammar, written for Lark or as GBNF; needs the extra structured.",
    ),
)


def sampling_options(function: _Function) -> _Function:
    """The options, which the function takes by the names of ``Sampling``."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def sampling_parameters(options: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that were given, with the texts of files.

    Raises:
        StorageError, FormatError: a file cannot be read, or is no text.
    """
    given = {name: value for name, value in options.items() if value not in (None, ())}
    for name in _FILES:
        if name in given:
            with storage_errors(given[name]):
                given[name] = read_text(Path(given[name]).resolve())
    return given
