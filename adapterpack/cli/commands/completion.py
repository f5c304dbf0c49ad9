"""``adapterpack completion``."""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
)

from ...errors import require_among
from .. import common_options, guard_stdout, print_report, suggest
from ..main import VARIABLE


@click.command("completion")
@click.argument(
    "shell",
    metavar="bash|zsh|fish",
    shell_complete=suggest("adapterpack.cli.commands.completion:SHELLS"),
)
@common_options
def command(shell: str, as_json: bool) -> None:
    """Prints the code with which a shell completes commands, options and values on Tab.

    Nothing is installed: add the line for your shell to its startup file, and open a new shell.

    \b
      bash, ~/.bashrc:                  eval "$(adapterpack completion bash)"
      zsh,  ~/.zshrc, after compinit:   eval "$(adapterpack completion zsh)"
      fish, ~/.config/fish/config.fish: adapterpack completion fish | source

    \b
    Example:
      adapterpack completion bash
    """
    script = completion(shell)
    if as_json:
        print_report({"shell": shell, "script": script})
    else:
        with guard_stdout():
            click.echo(script)


PROGRAM = "adapterpack"


class _Files(ShellComplete):
    """Completes paths where an option or argument has no values of its own."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[Any]]:
        found = super().get_completions(args, incomplete)
        return found or (
            [CompletionItem(incomplete, type="file")] if args and not incomplete.startswith("-") else []
        )


class _Bash(_Files, BashComplete):
    pass


class _Zsh(_Files, ZshComplete):
    pass


class _Fish(_Files, FishComplete):
    pass


SHELLS: dict[str, type[ShellComplete]] = {"bash": _Bash, "zsh": _Zsh, "fish": _Fish}
for _name, _class in SHELLS.items():
    add_completion_class(_class, _name)


def completion(shell: str) -> str:
    """Prints the code with which a shell completes commands, options and values on Tab.

    ``shell`` is bash, zsh or fish. The text defines a function, which asks ``adapterpack`` itself at each
    Tab.

    Raises:
        UnknownName: another shell.

    Example:
        >>> "_ADAPTERPACK_COMPLETE=zsh_complete" in completion("zsh")
        True
    """
    require_among("there is no completion for this shell", shell, SHELLS)
    # the script does not depend on the group's commands
    return SHELLS[shell](click.Group(PROGRAM), {}, PROGRAM, VARIABLE).source()
