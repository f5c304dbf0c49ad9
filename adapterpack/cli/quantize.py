"""``adapterpack quantize``."""

from __future__ import annotations

import click

import adapterpack

from ..hub.resolve import folder_of
from ..io.readable import size
from .options import out_option, shared
from .output import emit, facts, line
from .progress import apart


@click.command("quantize")
@click.argument("source", metavar="PACK|BUNDLE")
@out_option("The folder of the smaller copy")
@click.option("--scheme", default="int8", show_default=True, metavar="S", help="int8 for packs; int8 or int4 for bundles.")
@shared
def command(source: str, out: str, scheme: str, as_json: bool) -> None:
    """Writes a quantized copy of a pack (int8) or of a bundle's graph (int4, int8); the error is in its manifest.

    \b
    Example:
      adapterpack quantize packs/tickets -o packs/tickets-int8
      adapterpack quantize bundle --scheme int4 -o bundle-int4
    """
    folder = folder_of(source)
    with apart():
        adapterpack.quantize(folder, out, scheme=scheme)
    before, after = adapterpack.inspect(folder)["bytes"], adapterpack.inspect(out)
    if as_json:
        emit({"command": "quantize", **after, "bytes_before": before})
        return
    line(f"quantized {source} to {out}: {size(before)} became {size(after['bytes'])}")
    facts(after["quantization"])
