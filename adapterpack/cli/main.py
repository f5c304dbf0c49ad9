"""The command group: commands by name, imported when they run, and the one place where errors become sentences and exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

import click

from ..errors import EXIT_FAILED, AdapterpackError
from ..version import VERSION
from .options import TRACEBACK, traceback_option, wants
from .output import emit, one_line

EXIT_INTERRUPTED = 130

COMMANDS = {
    "demo": "adapterpack.cli.demo:command",
    "train": "adapterpack.cli.train:command",
    "validate": "adapterpack.cli.validate:command",
    "inspect": "adapterpack.cli.inspect:command",
    "sign": "adapterpack.cli.sign:command",
    "verify": "adapterpack.cli.verify:command",
    "merge": "adapterpack.cli.merge:command",
    "unmerge": "adapterpack.cli.unmerge:command",
    "declare": "adapterpack.cli.declare:command",
    "audit": "adapterpack.cli.audit:command",
    "compose": "adapterpack.cli.compose:command",
    "measure": "adapterpack.cli.measure:command",
    "resize": "adapterpack.cli.resize:command",
    "extract": "adapterpack.cli.extract:command",
    "quantize": "adapterpack.cli.quantize:command",
    "convert": "adapterpack.cli.convert:command",
    "export": "adapterpack.cli.export:command",
    "run": "adapterpack.cli.run:command",
    "push": "adapterpack.cli.push:command",
    "pull": "adapterpack.cli.pull:command",
    "hub": "adapterpack.cli.hub:command",
    "methods": "adapterpack.cli.methods:command",
    "rules": "adapterpack.cli.rules:command",
}
"""Command -> where it is, in the order of a piece of work, which is the order of the listing."""


class Commands(click.Group):
    """A group that imports a command when it is asked for, and tells errors in one way for all of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        found: click.Command = getattr(import_module(module), attribute)
        return found

    def invoke(self, ctx: click.Context) -> Any:
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of other libraries, before they are imported
        with _told(ctx):
            return super().invoke(ctx)


@contextmanager
def _told(ctx: click.Context) -> Iterator[None]:
    """What the command raises, as text on stderr (and with ``--json`` as an object on stdout) and an exit code."""
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
        raise  # click's own, and a reader that went away
    except KeyboardInterrupt as interrupt:  # whoever keeps something for the next try says so in a note
        left = dict.fromkeys(getattr(interrupt, "__notes__", ()))
        click.echo(f"interrupted; {'; '.join(left) or 'nothing was left behind'}", err=True)
        ctx.exit(EXIT_INTERRUPTED)
    except AdapterpackError as error:
        _fail(ctx, one_line(str(error)), error.to_json(), error.exit_code)
    except Exception as error:
        known = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        sentence = f"this is a bug in adapterpack, please report it ({TRACEBACK} shows where): {known}"
        _fail(ctx, one_line(sentence), AdapterpackError(sentence).to_json() | {"code": "bug"}, EXIT_FAILED)


def _fail(ctx: click.Context, sentence: str, error: dict[str, str | None], exit_code: int) -> NoReturn:
    if wants(ctx, TRACEBACK):
        click.echo(traceback.format_exc(), err=True, nl=False)
    if wants(ctx, "--json"):
        emit({"command": ctx.invoked_subcommand, "error": error})
    click.echo(click.style("error:", fg="red", bold=True) + f" {sentence}", err=True)
    ctx.exit(exit_code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="adapterpack")
@traceback_option
def main() -> None:
    """Train, pack, verify, merge, compose, quantize, export and run adapters for large pretrained models.

    Every command is the library function of the same name: "adapterpack merge" is adapterpack.merge.

    A PACK is a folder that adapterpack or PEFT wrote, or hf://org/name; NAME=PATH gives it another name. A BASE is a checkpoint folder, a
    hub id, or hf://org/name. Exit codes: 0 done, 1 failed with a named error, 2 wrong usage, 3 not fully checked, 4 signature or trust.

    \b
    Example:
      adapterpack train train.yaml
      adapterpack export models/base packs/tickets -o bundle
      adapterpack run bundle --adapter tickets --prompt "Where is my parcel?"
    """
