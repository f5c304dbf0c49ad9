"""``adapterpack completion``."""

from __future__ import annotations

import click

import adapterpack

from .options import shared, values
from .output import emit
from .streams import printed


@click.command("completion")
@click.argument("shell", metavar="bash|zsh|fish", shell_complete=values("adapterpack.cli.completing:SHELLS"))
@shared
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
    script = adapterpack.completion(shell)
    if as_json:
        emit({"command": "completion", "shell": shell, "script": script})
    else:
        with printed():
            click.echo(script)
