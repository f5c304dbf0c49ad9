"""``adapterpack quantize``: smaller copies of packs and bundles, or a comparison of the ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

import adapterpack

from ...hub import folder_of
from ...readable import size, things
from ...report.comparison import comparison_report, comparison_table, list_left_out
from .. import (
    common_options,
    divert_stdout,
    html_option,
    open_page,
    option,
    print_facts,
    print_line,
    print_report,
    print_table,
    quantization_options,
    show_steps,
    suggest,
)


@click.command("quantize")
@click.argument("source", metavar="PACK|BUNDLE")
@option("-o --output out", "OUT", "The folder of the smaller copy; it must not exist.")
@option(
    "--scheme schemes",
    "S",
    "int8 (the default), int4, fp8 or mixed for packs; int8, int4, int2, mixed, w8a8, fp16 "
    "or bf16 for bundles. May be repeated with --compare; the default is then int8 and int4.",
    multiple=True,
    shell_complete=suggest(
        "adapterpack.quantizing.pack_scheme:PACK_SCHEMES",
        "adapterpack.quantizing.graphs.scheme:GRAPH_SCHEMES",
    ),
)
@option(
    "--rank-budget", "E", "Cut the rank of each site of a pack first, within this relative error.", type=float
)
@quantization_options
@option(
    "--compare rows",
    "ROWS.jsonl",
    "Write nothing: measure each way of quantizing a bundle on these rows "
    "(text, messages, prompt and completion, or text and label).",
)
@option("--adapter", "NAME", "With --compare: the adapter, if the bundle has several.")
@html_option("the figures of --compare")
@common_options
def command(
    source: str,
    out: str | None,
    schemes: tuple[str, ...],
    rank_budget: float | None,
    rows: str | None,
    adapter: str | None,
    html: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Writes a quantized copy of a pack or of a bundle; the error is in its manifest.

    With --compare it measures instead, against the float bundle: for each scheme the adapter merged before
    quantizing, attached to the quantized base, and attached with a correction (of rank 32, or --compensate).

    \b
    Example:
      adapterpack quantize packs/tickets -o packs/tickets-int8
      adapterpack quantize packs/tickets --scheme int4 --rank-budget 0.05 -o packs/tickets-int4
      adapterpack quantize bundle --scheme int4 -o bundle-int4
      adapterpack quantize bundle --scheme int4 --algorithm gptq --calibration rows.jsonl -o bundle-gptq
      adapterpack quantize bundle --compare orders.test.jsonl --html compare.html
    """
    if rows is not None:
        if out is not None or rank_budget is not None:
            raise click.UsageError("--compare writes no copy, so that -o and --rank-budget say nothing.")
        compare(folder_of(source), rows, schemes, adapter, html, as_json, options)
        return
    if out is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    if len(schemes) > 1 or adapter is not None or html is not None:
        raise click.UsageError("Several --scheme, --adapter and --html go with --compare.")
    folder = folder_of(source)
    if schemes:
        options["scheme"] = schemes[0]
    with divert_stdout():
        adapterpack.quantize(folder, out, rank_budget=rank_budget, **options)
    before = adapterpack.inspect(folder)["bytes"]
    after = adapterpack.inspect(out)
    if as_json:
        print_report({**after, "bytes_before": before})
        return
    print_line(f"quantized {source} to {out}: {size(before)} became {size(after['bytes'])}")
    report = dict(after["quantization"])
    errors = report.pop("error_by_accuracy", None)
    if bits := [choice["bits"] for choice in report.pop("products", {}).values()]:
        print_line(
            ", ".join(
                f"{bits.count(number)} products of {number} bits"
                for number in sorted(set(bits), reverse=True)
            )
        )
    print_facts(report)
    if errors is not None and "head" in report:
        print_line(accuracy_sentence(report["accuracy"], errors))


def accuracy_sentence(accuracy: str, errors: Mapping[str, float]) -> str:
    """Describes in a sentence the error of a quantized graph, and what the other accuracy would give.

    Example:
        >>> accuracy_sentence("exact", {"exact": 0.04, "fast": 0.08})  # doctest: +ELLIPSIS
        'exact products: outputs move by 4% (root mean square); --accuracy fast: by 8%, with products ...'
    """
    other = next(name for name in errors if name != accuracy)
    speed = "much faster" if accuracy == "exact" else "slower"
    return (
        f"{accuracy} products: outputs move by {100 * errors[accuracy]:.3g}% (root mean square); --accuracy "
        f"{other}: by {100 * errors[other]:.3g}%, with products {speed}"
    )


def compare(
    bundle: Path,
    rows: str,
    schemes: Sequence[str],
    adapter: str | None,
    html: str | None,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Compares the quantized forms of a bundle on the rows of a file, and prints the result."""
    if schemes:
        options["schemes"] = schemes
    with open_page(html) as write_page:
        with show_steps() as say:
            found = adapterpack.compare_quantized(bundle, rows, adapter=adapter, progress=say, **options)
        result = found.to_json()
        write_page(comparison_report, result)
    if as_json:
        print_report(result, html=html)
        return
    print_table(
        *comparison_table(result), f"{things(found.rows, 'row')}, {things(found.positions, 'choice')}"
    )
    for form, reason in list_left_out(result):
        print_line(f"not measured: {form}: {reason}")
    for sentence in found.advice:
        print_line(sentence)
    if html is not None:
        print_line(f"the page is {html}")
