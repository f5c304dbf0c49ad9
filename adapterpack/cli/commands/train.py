"""``adapterpack train``."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

import click

import adapterpack

from ...readable import things
from .. import (
    common_options,
    divert_stdout,
    flag,
    guard_stdout,
    html_option,
    log_message,
    open_page,
    option,
    print_facts,
    print_line,
    print_report,
    print_table,
)
from ..output import print_rich
from ..progress import show_training


@click.command("train")
@click.argument("config", metavar="CONFIG.yaml")
@click.argument("overrides", nargs=-1, metavar="[key=value ...]")
@click.option(
    "--from",
    "tool",
    type=click.Choice(("axolotl", "llamafactory", "trl", "adapterpack")),
    help=(
        "The tool that CONFIG was written for, with its names, defaults and meanings. Default: what its keys "
        "show."
    ),
)
@flag(
    "--print-config",
    "Print the configuration with all defaults filled in and where each value comes from, and train nothing.",
)
@flag(
    "--dry-run", "Load everything, say what would be trained, in how much memory and time, and train nothing."
)
@click.option(
    "--on-bad-row",
    type=click.Choice(("fail", "skip")),
    help="What to do with rows that cannot be read: end the run, or leave "
    "them out and log how many and why. Default: the configuration's on_bad_row, else fail.",
)
@option(
    "--reward rewards",
    "FILE.py:FUNCTION",
    "Your function that scores answers, for trainer: grpo. The file is executed, so name only files "
    "that you trust.",
    multiple=True,
)
@flag(
    "--suggest",
    "Choose what CONFIG leaves open by its base, method and data: learning rate, rank, epochs and lengths. "
    "The log says why.",
)
@flag("--overwrite", "Replace packs in the output folders, each when the new one is complete.")
@flag(
    "--live",
    "Serve a page to this machine while the training runs: losses, evaluations, learning rate and time left. "
    "The log says its address.",
)
@html_option("the losses and the packs")
@common_options
def command(
    *,
    config: str,
    overrides: tuple[str, ...],
    tool: str | None,
    print_config: bool,
    dry_run: bool,
    on_bad_row: str | None,
    rewards: tuple[str, ...],
    suggest: bool,
    overwrite: bool,
    live: bool,
    html: str | None,
    as_json: bool,
) -> None:
    """Trains the adapters that CONFIG describes, and writes a pack for each.

    After an interruption the same command resumes from the last checkpoint.

    \b
    Example:
      adapterpack train train.yaml
      adapterpack train train.yaml learning_rate=1e-3 r=16
      adapterpack train train.yaml "learning_rate=[1e-4, 1e-3]"
      adapterpack train train.yaml --dry-run --suggest
      adapterpack train train.yaml --live --html train.html
    """
    overrides += () if on_bad_row is None else (f"on_bad_row={on_bad_row}",)
    overrides += ("overwrite_output_dir=true",) if overwrite else ()
    if print_config and suggest:
        raise click.UsageError("--print-config reads no data; --dry-run shows suggestions.")
    if print_config:
        _print_config(config, overrides, tool, as_json)
        return
    from ...training.config.config import read_config  # noqa: PLC0415 - the help needs none of it

    if dry_run:
        read_config(config, overrides, tool)  # reports errors in the config before the slow import of torch
        _dry_run(config, overrides, rewards, tool, suggest, as_json)
        return
    first = int(os.environ.get("RANK", "0")) == 0
    with open_page(html if first else None) as write_page, ExitStack() as stack:
        configs, _ = read_config(config, overrides, tool)  # as above
        shown = None
        if first and (live or html is not None):
            from ...report.live import TrainingPage, serve_page  # noqa: PLC0415 - only a page needs them

            shown = TrainingPage(configs[0].pack_name)
            if live:
                log_message(f"watch the training at {stack.enter_context(serve_page(shown.write))}")
        with show_training("train") as progress:
            if shown is not None:
                shown.progress = progress
            packs = adapterpack.train(
                config,
                overrides,
                shown or progress,
                _load_rewards(rewards),
                tool,
                suggest=suggest,
            )
        trained = [
            {**adapterpack.inspect(str(pack.path)), "training": dict(pack.manifest.training)}
            for pack in packs
            if pack.path is not None
        ]
        if len(trained) < len(packs):
            return  # in a distributed run only one process writes
        if shown is not None:
            shown.packs = trained
            write_page(shown.write)
    if as_json:
        print_report({"packs": trained})
        return
    for pack in trained:
        scores = [
            ("final loss", pack["training"]["final_loss"]),
            *((metric["name"], metric["value"]) for metric in pack["metrics"]),
        ]
        values = ", ".join(f"{name} {value:.4g}" for name, value in scores)
        print_line(
            f"trained '{pack['name']}' into {pack['path']}: {things(pack['sites'], 'site')}, "
            f"{pack['parameters']:,} numbers, {things(pack['training']['steps'], 'step')}; {values}"
        )
    _compare([(pack["name"], {one["name"]: one["value"] for one in pack["metrics"]}) for pack in trained])
    if html is not None:
        print_line(f"the page with the losses is {html}")


def _compare(trained: list[tuple[str, dict[str, float]]]) -> None:
    """Prints the evaluations of several packs as a table, if all have the same measures."""
    measures = list(trained[0][1])
    if len(trained) > 1 and measures and all(list(one) == measures for _, one in trained):
        ordered = sorted(trained, key=lambda pack: pack[1]["loss"])
        rows = [(name, *(f"{value:.4g}" for value in one.values())) for name, one in ordered]
        print_table(["pack", *measures], rows, "evaluated, the lowest loss first")


def _print_config(config: str, overrides: tuple[str, ...], tool: str | None, as_json: bool) -> None:
    from ...io import plain_yaml, strict_json  # noqa: PLC0415 - the help needs none of it
    from ...training.config.config import as_mapping, read_config  # noqa: PLC0415

    with divert_stdout():
        configs, notes = read_config(config, overrides, tool)
    settings = [strict_json.plain({**as_mapping(one), "name": one.pack_name}) for one in configs]
    whole = settings[0] if len(settings) == 1 else {"adapters": settings}
    origins = dict(configs[0].origins or {}) if len(configs) == 1 else {}
    if as_json:
        print_report({"config": whole, "origins": origins, "notes": notes})
        return
    with guard_stdout():
        for note in notes:
            click.echo(f"# {note}")
        for line in plain_yaml.dumps(whole).splitlines():
            origin = origins.get(line.partition(":")[0])
            click.echo(line if origin is None else f"{line}  # {origin}")


def _load_rewards(rewards: tuple[str, ...]) -> list[Any]:
    """Loads the named reward functions; imports nothing if there are none."""
    if not rewards:
        return []
    from ...training.loop.rewards import find_reward  # noqa: PLC0415 - the help needs none of it

    return [find_reward(text) for text in rewards]


def _dry_run(
    config: str,
    overrides: tuple[str, ...],
    rewards: tuple[str, ...],
    tool: str | None,
    suggest: bool,
    as_json: bool,
) -> None:
    from ...training.dry_run import dry_run  # noqa: PLC0415 - the help needs none of it

    with divert_stdout():
        reports = dry_run(config, overrides, _load_rewards(rewards), tool, suggest)
    if as_json:
        print_report({"dry_run": reports})
        return
    for report in reports:
        batch = report.pop("first_batch")
        print_facts(report)
        for row in batch:
            _print_row(row)


def _print_row(row: list[dict[str, object]]) -> None:
    """Prints a row of the first batch; trained tokens are green, or in brackets without colours."""
    from rich.text import Text  # noqa: PLC0415 - as above

    text = Text()
    for part in row:
        words = str(part["text"])
        text.append(f"[{words}]" if part["learned"] else words, "green" if part["learned"] else "")
    print_rich(text)
