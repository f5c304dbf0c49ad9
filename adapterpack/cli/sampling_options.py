"""The options of ``adapterpack run`` that say how the tokens of an answer are chosen, and what form it has."""

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
    click.option("--sampling", type=click.Choice(["greedy", "model"]),
                 help="What counts where the options below say nothing: the likeliest token, which is the default, or what the model's "
                      "generation_config.json says."),
    click.option("--temperature", type=float, metavar="T", help="0, the default, always takes the likeliest token."),
    click.option("--top-k", type=int, metavar="K", help="Draw from the K likeliest tokens."),
    click.option("--top-p", type=float, metavar="P", help="Draw from the fewest tokens that have this share of the probability."),
    click.option("--min-p", type=float, metavar="P", help="Draw from tokens at least P times as likely as the likeliest."),
    click.option("--repetition-penalty", type=float, metavar="R", help="Above 1: tokens of prompt and answer become less likely."),
    click.option("--seed", type=int, metavar="N", help="The seed of what is drawn."),
    click.option("--stop", multiple=True, metavar="TEXT", help="A text that ends an answer and is cut off; may be repeated."),
    click.option("--logprobs", type=int, metavar="N", help="Add the log-probability of each token, and of the N likeliest in its place."),
    click.option("--beams", "num_beams", type=int, metavar="N", help="Search with N beams for the likeliest answer."),
    click.option("--json-schema", metavar="F.json", help="Answers are JSON that fits this schema; needs the extra structured."),
    click.option("--regex", metavar="R", help="Answers match this regular expression as a whole; needs the extra structured."),
    click.option("--grammar", metavar="F.lark", help="Answers are of this grammar, in Lark's form or GBNF; needs the extra structured."),
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
