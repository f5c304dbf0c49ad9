"""``adapterpack bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import adapterpack

from ...report.bench import bench_facts, bench_report, bench_table
from .. import (
    common_options,
    device_of,
    device_options,
    html_option,
    load_adapter,
    open_page,
    open_target,
    option,
    packs_argument,
    print_line,
    print_report,
    print_table,
    show_steps,
)


@click.command("bench")
@click.argument("bundle", metavar="BUNDLE|BASE")
@packs_argument
@option(
    "--rows",
    "N",
    "How many rows run together; may be repeated.",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 4, 8),
    show_default=True,
)
@option("--prompt", "N", "The tokens of each prompt.", default=128, show_default=True)
@option("--tokens", "N", "How many tokens are generated.", default=32, show_default=True)
@option("--runs", "N", "Of how many runs to take the median.", default=5, show_default=True)
@device_options
@html_option("the speed of each load")
@common_options
def command(
    *,
    bundle: str,
    packs: tuple[str, ...],
    html: str | None,
    as_json: bool,
    **parameters: Any,
) -> None:
    """Measures how fast a bundle answers: for each number of rows the base, one adapter, and a different one
    in each row, in turn; each figure is the median of several runs after a warm-up.

    \b
    Example:
      adapterpack bench bundle
      adapterpack bench models/SmolLM2 packs/orders packs/emails --rows 1 --rows 16 --html speed.html
    """
    with open_page(html) as write_page:
        device = device_of(parameters)
        folder, loaded = open_target(bundle, [load_adapter(pack) for pack in packs])
        with show_steps() as say:
            found = adapterpack.bench(
                folder,
                loaded,
                provider=device,
                progress=say,
                **parameters,
            )
        result = found.to_json()
        write_page(bench_report, result, Path(bundle).name)
    if as_json:
        print_report(result, html=html)
        return
    print_table(*bench_table(result))
    print_line(bench_facts(result))
    if html is not None:
        print_line(f"wrote {html}")
