"""``adapterpack inspect``."""

from __future__ import annotations

import click

import adapterpack

from ...readable import size
from .. import common_options, flag, html_option, open_page, print_facts, print_line, print_report
from ..output import shorten_digests


@click.command("inspect")
@click.argument("path", metavar="PACK|BUNDLE|BASE|FILE")
@flag("--full", "Show digests in full, instead of their first digits. JSON always has them in full.")
@html_option("all of it")
@common_options
def command(path: str, full: bool, html: str | None, as_json: bool) -> None:
    """Shows what an artifact is, which base it fits, how large it is and what it changes; packs are verified
    on the way.

    FILE is an adapter of another tool (GGUF, kohya or diffusers safetensors, .onnx_adapter) or a GGUF model.

    \b
    Example:
      adapterpack inspect packs/tickets
      adapterpack inspect packs/tickets --full
      adapterpack inspect bundle --html bundle.html
    """
    with open_page(html) as write_page:
        summary = adapterpack.inspect(path)
        if html is not None:
            from ...report.inspection import inspect_report  # noqa: PLC0415 - only a page needs it

            write_page(inspect_report, summary)
    if as_json:
        print_report(summary)
        return
    if base := summary.get("base"):  # the digests of variants get a separate line
        variants = [f"{one['relation']} {one['content']}" for one in base["variants"]]
        summary = {
            **summary,
            "base": {key: value for key, value in base.items() if key != "variants"},
            "base_variants": variants,
        }
    summary = {key: size(value) if key.endswith("bytes") else value for key, value in summary.items()}
    print_facts(summary if full else shorten_digests(summary))
    if html is not None:
        print_line(f"the page is {html}")
