"""``adapterpack init``."""

from __future__ import annotations

from pathlib import Path

import click

import adapterpack

from ...hub import folder_of
from ...io import refuse_existing
from ...training.config.sources import Source
from ...training.data.decompress import files_of
from .. import columns_option, common_options, option, print_facts, print_line, print_report, show_steps


@click.command("init")
@click.argument("base", metavar="BASE")
@click.argument("data", metavar="DATA")
@option(
    "-o --output out",
    "FILE",
    "The configuration to write; it must not exist.",
    default="train.yaml",
    show_default=True,
)
@option("--method", "M", "The adapter method.", default="lora", show_default=True)
@columns_option
@common_options
def command(*, base: str, data: str, out: str, method: str, columns: dict[str, str], as_json: bool) -> None:
    """Writes a configuration for training an adapter of a base on data, after a look at both.

    The columns of the data decide what is trained. Each setting has a comment that says why it has its value.

    \b
    Example:
      adapterpack init models/MiniLM tickets.csv
      adapterpack init models/MiniLM requests.csv --column text=message --column label=team
      adapterpack init models/SmolLM2 chats.jsonl --method dora -o chats.yaml
    """
    with show_steps() as step:
        step("look at the base and the data")
        # before ten seconds of imports
        refuse_existing(Path(out), "-o FILE")
        folder_of(base)
        files_of(Source(data))
        settings = adapterpack.init(
            base, {"path": data, "columns": columns} if columns else data, out, method=method
        )
    if as_json:
        print_report({"output": out, "settings": settings})
        return
    print_facts({key: value for key, value in settings.items() if key != "name"})
    print_line(f"wrote {out}; train it with: adapterpack train {out}")
