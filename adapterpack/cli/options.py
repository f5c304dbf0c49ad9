"""Options that several commands share, and the loading of packs from what the user typed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

import adapterpack

from ..hub import folder_of
from ..io import output_file, scratch_folder
from ..report.page import PAGE
from .logs import QUIET, VERBOSE

TRACEBACK = "--traceback"
_RENAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,127})=(.+)", re.DOTALL)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def has_flag(ctx: click.Context, flag: str) -> bool:
    """Whether the user set a flag on the command or on the group."""
    return bool(ctx.meta.get(flag, False))


def _remember(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    # The code that reports errors reads the group's context, which shares its ``meta`` with the command's.
    if value:
        ctx.meta[param.opts[0]] = True
    if ctx.meta.get(QUIET) and ctx.meta.get(VERBOSE):
        raise click.UsageError(f"Either {QUIET} or {VERBOSE}.", ctx)
    return value


def _global_flag(*names: str, about: str) -> Callable[[_Function], _Function]:
    return click.option(
        *names, is_flag=True, is_eager=True, expose_value=False, callback=_remember, help=about
    )


def option(names: str, metavar: str, about: str, **more: Any) -> Callable[[_Function], _Function]:
    """Returns an option that takes a value. ``names`` are separated by blanks, the last perhaps that of the
    parameter; ``more`` is click's.
    """
    return click.option(*names.split(), metavar=metavar, help=about, **more)


def flag(names: str, about: str) -> Callable[[_Function], _Function]:
    """Returns an option without a value: whether it was given."""
    return click.option(*names.split(), is_flag=True, help=about)


def combine(*options: Callable[[_Function], _Function]) -> Callable[[_Function], _Function]:
    """Returns a decorator that adds all these options, in the order in which the help lists them."""

    def decorate(function: _Function) -> _Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


global_options = combine(
    _global_flag(QUIET, "-q", about="Show only warnings and errors on stderr, no progress and no notes."),
    _global_flag(
        VERBOSE,
        "-v",
        about="Show time and origin of each message, and the time and memory that the work took.",
    ),
    _global_flag(TRACEBACK, about="Show the Python traceback of an error."),
)
"""The flags that mean the same before and after the name of a command."""
trust_config = option(
    "--trust-config",
    "FILE",
    "The ClientTrustConfig of your own instance of sigstore, as JSON, in place of the public one.",
)
common_options = combine(
    click.option(
        "--json",
        "as_json",
        is_flag=True,
        is_eager=True,
        callback=_remember,
        help="Print machine-readable JSON (schemas/report.v1.json).",
    ),
    global_options,
)
"""The options of every command: ``--json`` (as ``as_json``), and those of :data:`global_options`."""


def out_option(help_text: str) -> Callable[[_Function], _Function]:
    """Returns the option ``-o OUT``; the path must not exist."""
    return option("-o --output out", "OUT", f"{help_text}; it must not exist.", required=True)


def address_options(port: int) -> Callable[[_Function], _Function]:
    """Returns the options ``--host`` and ``--port`` of a server."""
    return combine(
        option("--host", "H", "The address to listen at.", default="127.0.0.1", show_default=True),
        option(
            "--port",
            "P",
            "The port; 0 takes a free one.",
            default=port,
            show_default=True,
            type=click.IntRange(0, 65535),
        ),
    )


def html_option(about: str) -> Callable[[_Function], _Function]:
    """Returns the option ``--html F``; an existing page of adapterpack is replaced."""
    return option(
        "--html html", "F", f"Write an HTML page with {about} to this file; an earlier page is replaced."
    )


@contextmanager
def open_page(html: str | None) -> Iterator[Callable[..., object]]:
    """Yields a function that writes the page of ``--html`` by a report and what it takes; without the option
    it does nothing. A path that cannot be used fails before the block, at no cost. The page gets its name
    when the block succeeds; it replaces an earlier page of adapterpack, and any other file is an error.
    """
    if html is None:
        yield lambda report, *found: None
        return
    with output_file(html, renews=PAGE) as page:
        yield lambda report, *found: page.write_text(report(*found), "utf-8")


structural_option = flag(
    "--allow-structural-base allow_structural",
    "Accept a base with the same names, dtypes and shapes, whatever its weights.",
)
"""The option that accepts a base which can only be compared by structure."""

weight_option = option(
    "--weight weights",
    "W",
    "The weight of a pack; repeat it, once for each pack, in their order.",
    type=float,
    multiple=True,
)


def suggest(
    *sources: str,
) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem[Any]]]:
    """Completes an option with names: each source is ``module:NAME`` of a registry, of names, or of a
    function that returns names.
    """

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[Any]]:
        found: dict[str, str | None] = {}
        for source in sources:
            module, _, name = source.partition(":")
            known = getattr(import_module(module), name)
            known = known() if callable(known) else known
            for one in known:
                found.setdefault(
                    one, getattr(known[one], "summary", None) if isinstance(known, Mapping) else None
                )
        return [
            CompletionItem(name, help=about)
            for name, about in sorted(found.items())
            if name.startswith(incomplete)
        ]

    return complete


quantization_options = combine(
    option(
        "--accuracy",
        "A",
        "How a graph multiplies by quantized weights: exact, or fast (activations are rounded "
        "to int8); by default fast where it adds at most a tenth to the error.",
        shell_complete=suggest("adapterpack.quantizing.graphs.options:ACCURACIES"),
    ),
    option(
        "--head",
        "S",
        "The type of the weights that give the logits: int8 (the default), int4 or float.",
        shell_complete=suggest("adapterpack.quantizing.graphs.options:HEADS"),
    ),
    option(
        "--block-size", "N", "How many weights share a scale: 16, 32 (the default), 64, 128 or 256.", type=int
    ),
    click.option(
        "--symmetric/--asymmetric",
        default=None,
        help="Blocks without zero points, or with them (the default).",
    ),
    option(
        "--algorithm",
        "A",
        "How weights are rounded: rtn (to nearest, the default), k-quant, hqq, or, on "
        "calibration rows, gptq or awq.",
        shell_complete=suggest("adapterpack.quantizing.graphs.algorithm:ALGORITHMS"),
    ),
    option(
        "--calibration",
        "FILE.jsonl",
        "Rows like those that the model will see: text, messages, or prompt and completion.",
    ),
    option(
        "--compensate",
        "RANK",
        "Correct the error of each layer by a term of this rank, in eight bits; best with --calibration.",
        type=int,
    ),
    option(
        "--error-budget",
        "E",
        "Scheme mixed: as few bits per product as this relative error allows.",
        type=float,
    ),
    option(
        "--size-budget", "BYTES", "Scheme mixed: the least error within this size of all products.", type=int
    ),
)
"""The options of quantizing a bundle's graphs: the fields of
:class:`~adapterpack.quantizing.graphs.options.GraphOptions`.
"""


def load_pack(reference: str) -> Any:
    """Loads and verifies the pack at ``PATH``, ``NAME=PATH`` or ``hf://org/name``.

    Raises:
        StorageError: there is no such folder.
        FormatError: the pack is not valid.
    """
    match = None if Path(reference).exists() else _RENAMED.fullmatch(reference)
    name, path = match.groups() if match else (None, reference)
    return adapterpack.load(folder_of(path), name)


def load_adapter(reference: str) -> Any:
    """Loads the adapter at ``PATH`` or ``NAME=PATH``, a pack, a PEFT folder or an ``.onnx_adapter`` file.
    Any other text without a slash is the name of an adapter in the bundle, and is returned unchanged.

    Raises:
        FormatError: the adapter is not valid.
    """
    if not reference.endswith(".onnx_adapter"):
        return load_pack(reference) if "/" in reference else reference
    match = None if Path(reference).exists() else _RENAMED.fullmatch(reference)
    name, path = match.groups() if match else (Path(reference).stem, reference)
    with scratch_folder() as folder:
        return adapterpack.convert(path, folder / name, to="pack").pack


def parse_pairs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> Mapping[str, Any]:
    """Parses ``key=value`` texts to a mapping; values are YAML, as in a training configuration."""
    from ..io.plain_yaml import loads  # noqa: PLC0415 - the listing of commands must not pay for it

    values_by_key = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not equals:
            raise click.BadParameter(f"{text!r} is not key=value.", ctx, param)
        if key in values_by_key:
            raise click.BadParameter(f"{key!r} is given twice.", ctx, param)
        values_by_key[key] = loads(value, key, what="a value cannot be read, put it in quotes")
    return values_by_key


columns_option = option(
    "--column columns",
    "OURS=YOURS",
    "A column by another name, such as text=message; may be repeated.",
    multiple=True,
    callback=parse_pairs,
)
"""Columns of data by other names."""
