"""Options that several commands share, and packs by what the user typed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

import adapterpack

from ..hub.resolve import folder_of

TRACEBACK = "--traceback"
_RENAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,127})=(.+)", re.DOTALL)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def wants(ctx: click.Context, flag: str) -> bool:
    """Whether a flag was given to the command or to the group."""
    return bool(ctx.meta.get(flag, False))


def _remember(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    # The translator of errors asks the group's context, which shares its ``meta`` with the command's.
    if value:
        ctx.meta[param.opts[0]] = True
    return value


traceback_option = click.option(TRACEBACK, is_flag=True, is_eager=True, expose_value=False, callback=_remember,
                                help="With an error, show where in the program it arose.")
_json_option = click.option("--json", "as_json", is_flag=True, is_eager=True, callback=_remember,
                            help="Print machine-readable JSON (schemas/report.v1.json).")


def shared(function: _Function) -> _Function:
    """The options that every command has: ``--json`` (as ``as_json``) and ``--traceback``."""
    return _json_option(traceback_option(function))


def out_option(help_text: str) -> Callable[[_Function], _Function]:
    """``-o OUT``, which must not exist."""
    return click.option("-o", "--output", "out", required=True, metavar="OUT", help=f"{help_text}; it must not exist.")


structural_option = click.option("--allow-structural-base", "allow_structural", is_flag=True,
                                 help="Accept a base with the same names, dtypes and shapes, whatever its weights.")
"""Leave for a base of which nothing better is known."""

weight_option = click.option("--weight", "weights", type=float, multiple=True, metavar="W",
                             help="A pack's weight; repeat it, one for each pack in their order.")


def quantization_options(function: _Function) -> _Function:
    """``--accuracy`` and ``--head`` of a quantized graph."""
    accuracy = click.option("--accuracy", metavar="A", shell_complete=values("adapterpack.exporting.quantization.options:ACCURACIES"),
                            help="How a graph multiplies with quantized weights: exact, or fast (activations are rounded to int8); by "
                                 "default fast where it adds at most a tenth to the error.")
    head = click.option("--head", metavar="S", shell_complete=values("adapterpack.exporting.quantization.options:HEADS"),
                        help="What the product that gives a graph's logits is quantized to: int8 (the default), int4 or float.")
    return accuracy(head(function))


def values(*sources: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem[Any]]]:
    """Completes an option with names: each source is ``module:NAME``, of a registry, of names, or of a function that returns some."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[Any]]:
        found: dict[str, str | None] = {}
        for source in sources:
            module, _, name = source.partition(":")
            known = getattr(import_module(module), name)
            known = known() if callable(known) else known
            for one in known:
                found.setdefault(one, getattr(known[one], "summary", None) if isinstance(known, Mapping) else None)
        return [CompletionItem(name, help=about) for name, about in sorted(found.items()) if name.startswith(incomplete)]

    return complete


def pack_at(reference: str) -> Any:
    """The pack behind ``PATH``, ``NAME=PATH`` or ``hf://org/name``, verified.

    Raises:
        StorageError: there is no such folder.
        FormatError: it is no valid pack.
    """
    match = None if Path(reference).exists() else _RENAMED.fullmatch(reference)
    name, path = match.groups() if match else (None, reference)
    return adapterpack.load(folder_of(path), name)


def pairs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> Mapping[str, Any]:
    """``key=value`` texts as a mapping; values are read as YAML, as in a training configuration."""
    values_by_key: dict[str, Any] = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not equals:
            raise click.BadParameter(f"{text!r} is not key=value.", ctx, param)
        if key in values_by_key:
            raise click.BadParameter(f"{key!r} is given twice.", ctx, param)
        values_by_key[key] = _value(key, value)
    return values_by_key


def _value(key: str, text: str) -> Any:
    from ..io.plain_yaml import loads  # noqa: PLC0415 - the listing of commands must not pay for it

    return loads(text, key, what="a value cannot be read, put it in quotes")
