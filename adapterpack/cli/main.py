"""The command group: imports a command when it is called, and turns errors into sentences and exit codes in
one place.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from ..errors import EXIT_FAILED, AdapterpackError, StorageError, closest, printable, storage_errors
from ..library_errors import is_out_of_memory
from ..signals import Ended, Raising, end_where_files_are_cut_short, raised
from ..version import VERSION
from . import output, settings
from .logs import log_failure, log_to_stderr
from .options import TRACEBACK, global_options, has_flag
from .output import escape_line, print_json

VARIABLE = "_ADAPTERPACK_COMPLETE"
"""The environment variable by which a shell's completion function asks for completions."""

COMMANDS = {
    "demo": "every stage on a small real model",
    "init": "write a configuration for training, from a base and data",
    "train": "train packs from a configuration and data",
    "validate": "check a pack, a bundle or an adapter, and say what was not checked",
    "inspect": "show what an artifact is, which base it fits, and what it changes",
    "sign": "sign a pack, a fleet or a bundle",
    "bom": "list what a pack or a bundle is made of, as CycloneDX or SPDX",
    "verify": "check who signed a pack, a fleet or a bundle",
    "merge": "fold packs into a checkpoint, a GGUF file or an ONNX graph",
    "unmerge": "get the base back from a merged checkpoint",
    "declare": "allow a pack on another form of its base",
    "audit": "measure what packs do to the base and to each other",
    "compose": "combine packs into one pack",
    "measure": "collect statistics of a pack on data, for the rules that need them",
    "resize": "reduce the rank of a pack, and report the error",
    "extract": "extract an adapter from a fine-tuned checkpoint and its base",
    "port": "carry a pack to the next version of its base, or say why that is of no use",
    "compress": "compress many packs of one base into a fleet",
    "quantize": "quantize a pack or a bundle, and report the error",
    "convert": "convert packs to and from the formats of other tools",
    "export": "export a base and packs as a bundle for ONNX Runtime",
    "run": "run a bundle in the terminal, each row with its own adapter",
    "evaluate": "measure adapters on rows with known answers, the base beside them",
    "chat": "talk with a model in the terminal, and switch adapters on the way",
    "bench": "measure how fast a bundle answers, by rows and adapters",
    "serve": "serve a bundle over HTTP, each request with its own adapter",
    "push": "push a pack or a bundle to a hub or a registry",
    "pull": "pull a pack or a bundle from a hub or a registry",
    "hub": "run a hub of your own, or audit adapters on a hub",
    "methods": "list the adapter methods",
    "rules": "list the rules of composition",
    "completion": "print the code that makes a shell complete commands and values",
    "doctor": "check this installation; show or empty the caches",
}
"""Command -> its summary, in the order of a typical workflow, which the listing uses; the module of that name
defines ``command``.
"""


class Commands(click.Group):
    """A group that imports a command only when it is called, and reports the errors of all commands in one
    way.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            if (close := closest(cmd_name, COMMANDS)) and not ctx.resilient_parsing:
                ctx.fail(f"No such command {cmd_name!r}. Did you mean {close!r}?")
            return None
        command: click.Command = import_module(f"adapterpack.cli.commands.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))  # without importing any of them

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[Any]]:
        named = [
            CompletionItem(name, help=about)
            for name, about in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        # the group's own would import every command
        return named + super(click.Group, self).shell_complete(ctx, incomplete)

    def main(self, *args: Any, **options: Any) -> Any:
        if VARIABLE in os.environ:  # the shell's completion function called this process
            import_module("adapterpack.cli.commands.completion")
        output.open_missing()
        try:
            with output.guard_stdout():  # outside of commands nothing else is done than that, as for --help
                return super().main(*args, **{"complete_var": VARIABLE, **options})
        except StorageError as error:
            log_failure(escape_line(str(error)))
            sys.exit(error.exit_code)

    def invoke(self, ctx: click.Context) -> Any:
        if not sys.stderr.isatty():
            # hides progress bars of other libraries, which read this at import
            os.environ.setdefault("TQDM_DISABLE", "1")
        warnings.formatwarning = _warning
        end_where_files_are_cut_short(lambda path: _report_cut_file(ctx, path), EXIT_FAILED)
        with raised() as signals, _report_errors(ctx, signals):
            settings.apply_config_file()
            with log_to_stderr(ctx.meta), _report_errors(ctx, signals):
                return super().invoke(ctx)


_as_python_writes = warnings.formatwarning


def _warning(*details: Any, **more: Any) -> str:
    """Formats a warning as Python does, and escapes names that could control a terminal."""
    return printable(_as_python_writes(*details, **more))


@contextmanager
def _report_errors(ctx: click.Context, signals: Raising) -> Iterator[None]:
    """Reports an exception of the command as text on stderr (with ``--json`` also as an object on stdout) and
    as an exit code.
    """
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
        raise  # click handles its own exceptions and broken pipes
    # code that keeps partial results for the next run says so in a note
    except KeyboardInterrupt as interrupt:
        _end(ctx, interrupt, interrupt if isinstance(interrupt, Ended) else Ended())
    except Exception as error:
        # libraries may turn an interrupt into their own error, for instance during their import
        if signals.ended is not None:
            _end(ctx, error, signals.ended)
        if isinstance(error, AdapterpackError):
            _end_with_error(ctx, error, str(error), error.to_json(), error.exit_code)
        if (refused := _explain_refusal(error)) is not None:
            _end_with_error(ctx, error, str(refused), refused.to_json())
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        sentence = f"this is a bug in adapterpack, please report it ({TRACEBACK} shows where): {reason}"
        _end_with_error(ctx, error, sentence, AdapterpackError(sentence).to_json() | {"code": "bug"})


def _end(ctx: click.Context, error: BaseException, ended: Ended) -> NoReturn:
    """Ends the command the way the signal requests."""
    left = dict.fromkeys(getattr(error, "__notes__", ()))
    sentence = escape_line(f"{ended.word}; {'; '.join(left) or 'nothing was left behind'}")
    click.echo(sentence, err=True)
    _emit_error(ctx, AdapterpackError(sentence).to_json() | {"code": "interrupted"})
    ctx.exit(ended.exit_code)


_OF_THE_SYSTEM = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_OF_DISKS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENAMETOOLONG,
    }
)


def _explain_refusal(error: Exception) -> AdapterpackError | None:
    """Returns an error in words for a refusal by the operating system that no program can prevent; None for
    other errors.
    """
    if is_out_of_memory(error):
        return AdapterpackError(
            "there is not enough memory",
            found=" ".join(str(error).split())[:200] or None,
            remedy="end other programs, or take a machine that has more",
        )
    if not isinstance(error, OSError) or not (error.errno in _OF_DISKS or isinstance(error, _OF_THE_SYSTEM)):
        return None
    try:
        with storage_errors(error.filename2 or error.filename):
            raise error
    except StorageError as refused:
        return refused


def _end_with_error(
    ctx: click.Context,
    error: Exception,
    sentence: str,
    report: dict[str, str | None],
    exit_code: int = EXIT_FAILED,
) -> NoReturn:
    """Ends the command with the sentence for an error, followed by the notes that were added to the error."""
    sentence = escape_line(" ".join([sentence, *getattr(error, "__notes__", ())]))
    if has_flag(ctx, TRACEBACK):
        click.echo(printable(traceback.format_exc()), err=True, nl=False)
    _emit_error(ctx, report | {"message": sentence})
    log_failure(sentence)
    ctx.exit(exit_code)


def _report_cut_file(ctx: click.Context, path: str) -> None:
    """Reports a file that became shorter while a library read it. The process is about to end."""
    error = StorageError(
        "a file was cut short while it was in use",
        where=path,
        remedy="start again once nothing writes to it",
    )
    sys.stdout = sys.__stdout__ or sys.stdout  # a command may have replaced stdout
    _emit_error(ctx, error.to_json() | {"message": escape_line(str(error))})
    log_failure(escape_line(str(error)))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def _emit_error(ctx: click.Context, error: dict[str, str | None]) -> None:
    if has_flag(ctx, "--json"):
        # the object also follows results that were already printed line by line
        print_json({"command": ctx.invoked_subcommand, "error": error}, compact=True)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="adapterpack")
@global_options
def main() -> None:
    """Train, pack, verify, merge, compose, quantize, export and run adapters for large pretrained models.

    Every command is the library function of the same name: "adapterpack merge" is adapterpack.merge.

    A PACK is a folder that adapterpack or PEFT wrote, or hf://org/name; NAME=PATH gives it another name. A
    BASE is a checkpoint folder, a hub id, or hf://org/name. Exit codes: 0 done, 1 failed with a named error,
    2 wrong usage, 3 not fully checked, 4 signature or trust.

    \b
    Example:
      adapterpack train train.yaml
      adapterpack export models/base packs/tickets -o bundle
      adapterpack run bundle --adapter tickets --prompt "Where is my parcel?"
    """
