"""The page of commands, read off click: ``python tests/guide/commands_page.py > docs/commands.md``."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from inspect import cleandoc

import click

from adapterpack.cli.main import COMMANDS, main

INTRO = """# Commands

Each command is the library function of the same name: `adapterpack merge` is `adapterpack.merge`. This page is generated from their
`--help` by `make guide`.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | failed, with a [named error](errors.md) |
| 2 | wrong usage |
| 3 | `validate`: not everything could be checked |
| 4 | signature or trust |
| 130 | interrupted; what was kept for the next try is named |
| 143, 129 | ended by SIGTERM or SIGHUP; likewise |

Every command has `--json` (one JSON object on standard output, described by
[`schemas/report.v1.json`](../schemas/report.v1.json)), `--traceback` (where in the program an error arose) and `--help`.

A `PACK` is a folder that adapterpack or PEFT wrote, or `hf://org/name`; `NAME=PATH` gives it another name. A `BASE` is a checkpoint
folder, a hub id, or `hf://org/name`. Outputs are new: nothing is ever overwritten, and an output is whole or absent.
"""
_SHARED = {"--json", "--traceback", "--help"}


def page() -> str:
    """Every command in the order of the listing: what it does, its example, and its options."""
    with click.Context(main, info_name="adapterpack") as context:
        rows = "".join(f"| [`{name}`](#{name}) | {about} |\n" for name, about in COMMANDS.items())
        parts = [INTRO, f"| command | about |\n|---|---|\n{rows}"]
        for name in COMMANDS:
            command = main.get_command(context, name)
            assert command is not None
            parts.extend(_sections(command, context, name, 2))
    return "\n".join(parts)


def _sections(command: click.Command, parent: click.Context, name: str, level: int) -> Iterator[str]:
    """The command, and if it is a group each of its commands."""
    context = click.Context(command, parent=parent, info_name=name)
    anchor = context.command_path.removeprefix("adapterpack ").replace(" ", "-")
    yield f"{'#' * level} {context.command_path.removeprefix('adapterpack ')} {{ #{anchor} }}\n"
    yield f"    {context.command_path} {' '.join(command.collect_usage_pieces(context))}\n"
    yield _help(command.help or "")
    rows = "".join(
        f"| {_names(option, context)} | {_about(option, context)} |\n"
        for option in command.get_params(context)
        if isinstance(option, click.Option) and not option.hidden and not _SHARED & set(option.opts)
    )
    if rows:
        yield f"| option | meaning |\n|---|---|\n{rows}"
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            yield from _sections(command.get_command(context, child), context, child, level + 1)  # type: ignore[arg-type]


def _help(text: str) -> str:
    """Paragraphs as they are, examples as code: click marks what is not wrapped with a line ``\\b``."""
    parts = []
    for part in re.split(r"\n\s*\n", cleandoc(text.replace("\f", ""))):
        if not part.startswith("\b"):
            parts.append(_escaped(part))
            continue
        head, _, rest = part.removeprefix("\b\n").partition("\n")
        if re.fullmatch(r"Examples?:", head):
            parts.append("\n".join(f"    {line.strip()}" for line in rest.splitlines()))
        else:
            parts.append("\n".join(f"    {line}" for line in [head, *rest.splitlines()]))
    return "\n\n".join(parts) + "\n"


def _names(option: click.Option, context: click.Context) -> str:
    record = option.get_help_record(context)
    assert record is not None
    return f"`{record[0]}`".replace("|", "\\|")


def _about(option: click.Option, context: click.Context) -> str:
    record = option.get_help_record(context)
    assert record is not None
    return re.sub(r"  \[(.*)\]$", r" *(\1)*", _escaped(record[1]).replace("|", "\\|"))


def _escaped(text: str) -> str:
    """What Markdown would take for its own."""
    return re.sub(r"([*<])", r"\\\1", text)


if __name__ == "__main__":
    sys.stdout.write(page())
