"""``adapterpack bom``."""

from __future__ import annotations

from pathlib import Path

import click

import adapterpack

from ...io import output_file, strict_json
from .. import common_options, option, print_json, print_line, print_report, suggest


@click.command("bom")
@click.argument("path", metavar="PACK|BUNDLE")
@option(
    "-o --output out", "F", "The file; an earlier document is replaced. Without it the document is printed."
)
@option(
    "--form",
    "cyclonedx|spdx",
    "CycloneDX 1.6 (the default) or SPDX 2.3.",
    default="cyclonedx",
    shell_complete=suggest("adapterpack.bill_of_materials:FORMS"),
)
@common_options
def command(path: str, out: str | None, form: str, as_json: bool) -> None:
    """Lists what a pack or a bundle is made of as a bill of materials: files with digests, base, packs, data
    and parents.

    \b
    Example:
      adapterpack bom packs/tickets -o tickets.cdx.json
      adapterpack bom bundle --form spdx -o bundle.spdx.json
    """
    document = adapterpack.bom(path, form)
    if out is None:
        print_json(document)
        return
    mark = b"SPDXRef-DOCUMENT" if form == "spdx" else b"bomFormat"
    with output_file(Path(out), renews=mark) as file:
        file.write_bytes(strict_json.canonical(document))
    if as_json:
        print_report({"path": out, "form": form})
    else:
        print_line(f"{out} lists what {path} is made of, in the form of {form}")
