"""``adapterpack merge``."""

from __future__ import annotations

from typing import Any

import click

from ...hub import folder_of
from ...merging.checkpoint import MergeReport
from ...merging.onnx.report import GraphReport
from ...merging.pipeline import merge
from ...readable import size, things
from .. import (
    common_options,
    flag,
    load_pack,
    option,
    out_option,
    print_line,
    print_report,
    show_bytes,
    structural_option,
    suggest,
    weight_option,
)


@click.command("merge")
@click.argument("base")
@click.argument("packs", nargs=-1, required=True, metavar="PACK...")
@out_option("The folder of the merged checkpoint or graph, or the GGUF file")
@option("--base checkpoint", "CHECKPOINT", "The checkpoint from which an ONNX or GGUF file was made.")
@weight_option
@option(
    "--dtype",
    "D",
    "The dtype of the output: float32, bfloat16 or float16; by default each tensor keeps its own. A "
    "quantized base is written dequantized.",
)
@flag("--untie", "Write the output head of a model with tied embeddings as a tensor of its own.")
@flag("--safe", "Refuse a result that is too large for its dtype, too: it would be infinite.")
@option(
    "--stochastic-rounding",
    "SEED",
    "Round up or down by chance: small changes are kept on average.",
    type=int,
)
@option(
    "--verify",
    "structure|full",
    "Check the base by names, shapes and samples of every tensor (default), or by every byte.",
    default="structure",
    shell_complete=suggest("adapterpack.merging.pipeline:VERIFY"),
)
@option(
    "--shard", "I/N", "Do the I-th of N shares of the work; all N machines write to the same output folder."
)
@flag("--resume", "After an error or an interrupt, keep what is done; the same command resumes there.")
@click.option(
    "--sync/--no-sync",
    "durable",
    default=True,
    help="Wait until every byte is on the disk (default), or do not.",
)
@option("--device", "cuda|cpu", "Compute with torch on that device; by default with numpy.")
@structural_option
@common_options
def command(
    *,
    base: str,
    packs: tuple[str, ...],
    out: str,
    weights: tuple[float, ...],
    checkpoint: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Folds PACKS into BASE (a checkpoint, a GGUF file, an ONNX file or a bundle) and writes the result to
    OUT, whole or not at all.

    \b
    Example:
      adapterpack merge models/base packs/tickets -o models/tickets
      adapterpack merge models/base packs/a packs/b --weight 0.7 --weight 0.3 -o models/both
      adapterpack merge onnx/model.onnx packs/tickets --base models/base -o onnx-tickets
      adapterpack merge model-Q4_K_M.gguf packs/tickets --base models/base --dtype float16 -o tickets-f16.gguf
    """
    loaded = [load_pack(pack) for pack in packs]
    with show_bytes("merge") as progress:
        report = merge(
            folder_of(base),
            loaded,
            out,
            weights=weights or None,
            progress=progress,
            checkpoint=None if checkpoint is None else folder_of(checkpoint),
            **options,
        )
    if as_json:
        print_report(report.to_json())
        return
    names = ", ".join(
        pack.name if pack.weight == 1 else f"{pack.weight:g} of {pack.name}" for pack in report.packs
    )
    if isinstance(report, GraphReport):
        _say_graph(report, names)
    elif report.jobs_missing:
        print_line(
            f"part {report.shard} is done; {report.out} is there once "
            f"{things(report.jobs_missing, 'piece')} of other parts are done, too"
        )
        return
    else:
        _say_checkpoint(report, names)
    if report.advice:
        print_line(f"warning: {report.advice}")


def _say_checkpoint(report: MergeReport, names: str) -> None:
    print_line(
        f"merged {names} into {report.base_name}: {report.tensors_changed} of {report.tensors} tensors "
        f"changed, {size(report.bytes_written)} written to {report.out} in {report.seconds:.1f} s"
    )
    for pack in report.packs:
        if pack.base == "structural":
            print_line(f"nothing but names and shapes shows that {pack.name} was made for this base")
    if report.bytes_resumed:
        print_line(f"{size(report.bytes_resumed)} of it were done by an earlier try")
    for note in report.notes:
        print_line(note)
    _say_loss(report)
    if report.requantized is not None:
        error, grid = report.requantized
        print_line(
            f"the requantized fold lies {error:.3g} from the exact one (Frobenius norm); rounding to "
            f"the base's own grid makes {grid:.3g}"
        )


def _say_graph(report: GraphReport, names: str) -> None:
    print_line(
        f"merged {names} into {report.graph} of {report.base_name}: "
        f"{len(report.tensors) + len(report.replaced)} tensors changed, "
        f"{size(report.bytes_written)} written to {report.out} in {report.seconds:.1f} s"
    )
    if report.left_out:
        print_line(f"the bundle's own adapters are left out: {', '.join(report.left_out)}")
    _say_loss(report)
    if report.quantized is not None:
        before, after = report.quantized
        print_line(
            f"quantized weights are at most {after:.2g} of their size from the float fold; before, they "
            f"were {before:.2g} from the base"
        )
    for name, result in report.checks.items():
        if result != "passed":
            print_line(f"{name}: {result}")


def _say_loss(report: MergeReport | GraphReport) -> None:
    if report.losses:
        print_line(
            f"after rounding, {100 * report.kept:.4g} % of the change is kept, with a relative error of "
            f"{report.relative_error:.2g}"
        )
