"""``adapterpack quantize``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

import adapterpack

from ..hub.resolve import folder_of
from ..io.readable import size
from .options import out_option, quantization_options, shared, values
from .output import emit, facts, line
from .progress import apart


@click.command("quantize")
@click.argument("source", metavar="PACK|BUNDLE")
@out_option("The folder of the smaller copy")
@click.option("--scheme", default="int8", show_default=True, metavar="S",
              shell_complete=values("adapterpack.quantizing.scheme:SCHEMES", "adapterpack.exporting.quantization.scheme:SCHEMES"),
              help="int8, int4, fp8 or mixed for packs; int8, int4, int2, mixed, fp16 or bf16 for bundles.")
@click.option("--rank-budget", type=float, metavar="E", help="Cut the rank of each site of a pack first, within this relative error.")
@quantization_options
@click.option("--block-size", type=int, metavar="N", help="How many weights share a scale: 16, 32 (the default), 64, 128 or 256.")
@click.option("--symmetric/--asymmetric", default=None, help="Blocks without zero points, or with them (the default).")
@click.option("--algorithm", metavar="A", shell_complete=values("adapterpack.exporting.quantization.algorithm:ALGORITHMS"),
              help="How weights are rounded: rtn (to nearest, the default), k-quant, hqq, or, on calibration "
                                               "rows, gptq or awq.")
@click.option("--calibration", metavar="FILE.jsonl", help="Rows that the model will see: text, messages, or prompt and completion.")
@click.option("--compensate", type=int, metavar="RANK", help="Correct the error of a bank by a pack of this rank, which every row carries; "
                                                              "best with --calibration.")
@click.option("--error-budget", type=float, metavar="E", help="mixed: as few bits a product as this relative error of products allows.")
@click.option("--size-budget", type=int, metavar="BYTES", help="mixed: the least error of products that all take at most so many bytes.")
@shared
def command(source: str, out: str, as_json: bool, **options: Any) -> None:
    """Writes a quantized copy of a pack (int8, int4, fp8, mixed) or of a bundle's graphs; the error is in its manifest.

    \b
    Example:
      adapterpack quantize packs/tickets -o packs/tickets-int8
      adapterpack quantize packs/tickets --scheme int4 --rank-budget 0.05 -o packs/tickets-int4
      adapterpack quantize bundle --scheme int4 -o bundle-int4
      adapterpack quantize bundle --scheme int4 --algorithm gptq --calibration rows.jsonl -o bundle-gptq
    """
    folder = folder_of(source)
    with apart():
        adapterpack.quantize(folder, out, **options)
    before, after = adapterpack.inspect(folder)["bytes"], adapterpack.inspect(out)
    if as_json:
        emit({"command": "quantize", **after, "bytes_before": before})
        return
    line(f"quantized {source} to {out}: {size(before)} became {size(after['bytes'])}")
    report = dict(after["quantization"])
    errors = report.pop("error_by_accuracy", None)
    if bits := [choice["bits"] for choice in report.pop("products", {}).values()]:
        line(", ".join(f"{bits.count(number)} products of {number} bits" for number in sorted(set(bits), reverse=True)))
    facts(report)
    if errors is not None and "head" in report:
        line(accuracy_sentence(report["accuracy"], errors))


def accuracy_sentence(accuracy: str, errors: Mapping[str, float]) -> str:
    """What the accuracy of a quantized graph costs, and what the other one would.

    Example:
        >>> accuracy_sentence("exact", {"exact": 0.04, "fast": 0.08})
        'exact products: outputs move by 4% (root mean square); --accuracy fast: by 8%, with products much faster'
    """
    other = next(name for name in errors if name != accuracy)
    speed = "much faster" if accuracy == "exact" else "slower"
    return (f"{accuracy} products: outputs move by {100 * errors[accuracy]:.3g}% (root mean square); --accuracy {other}: "
            f"by {100 * errors[other]:.3g}%, with products {speed}")
