"""``adapterpack convert``."""

from __future__ import annotations

import csv
from typing import Any

import click

import adapterpack

from ...hub import folder_of
from ...readable import things
from .. import (
    common_options,
    divert_stdout,
    option,
    out_option,
    print_line,
    print_report,
    structural_option,
    suggest,
)


def _names(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
    """Parses labels from a line of CSV."""
    if value is None:
        return None
    try:
        (labels,) = csv.reader([value], skipinitialspace=True, strict=True)
    except (csv.Error, ValueError) as error:
        raise click.BadParameter(
            f"{value!r} is no list of names with commas between them.", ctx, param
        ) from error
    return labels


@click.command("convert")
@click.argument("source", metavar="SRC")
@out_option(
    "The file (gguf, kohya, diffusers, onnx_adapter) or folder (pack, peft, xlora, mlx, adapterhub) to write"
)
@option(
    "--to",
    "F",
    "The format to write: pack, peft, xlora, mlx, adapterhub, gguf, kohya, diffusers or onnx_adapter. "
    "By default what the ending of OUT says (.gguf, .onnx_adapter), or else peft for a pack, and pack "
    "for everything else.",
    shell_complete=suggest("adapterpack.converting.pipeline:writable"),
)
@option("--base", "BASE", "The base model; needed to write gguf and adapterhub, and to read kohya.")
@option(
    "--part",
    "PREFIX",
    "Which part of a file with several: a model of kohya or diffusers (lora_unet, unet, ...), or a task "
    "(0, ...).",
)
@option(
    "--labels",
    "A,B,...",
    "Names for the labels of a classifier's head, in the order of its logits, in the pack that is "
    "written: PEFT's folders do not have them. Put a name with a comma in double quotes.",
    callback=_names,
)
@option(
    "--for graph",
    "GRAPH",
    "An ONNX graph with inputs for an adapter, whether of Olive or of export --mode inputs: an "
    "onnx_adapter is written with its names, ranks and dtypes, and what has no input there is named.",
)
@structural_option
@common_options
def command(*, source: str, out: str, as_json: bool, **options: Any) -> None:
    """Converts a pack, or an adapter of another tool, to another format. What the format cannot hold is an
    error that names it. LyCORIS files are read, too.

    \b
    Example:
      adapterpack convert packs/tickets -o tickets.gguf --base models/base
      adapterpack convert peft/tickets -o packs/tickets --base models/base --labels "parcel,refund,other"
      adapterpack convert peft/tickets -o tickets.onnx_adapter --for olive/model.onnx
      adapterpack convert style.safetensors -o packs/style --to pack --base models/unet --part lora_unet
    """
    with divert_stdout():
        done = adapterpack.convert(folder_of(source), out, **options)
    answer = done.to_json()
    if as_json:
        print_report(answer)
        return
    whole = (
        f" and {things(len(answer['modules_to_save']), 'module')} trained whole"
        if answer["modules_to_save"]
        else ""
    )
    print_line(
        f"converted {source} ({done.source}) to {out} ({done.target}): "
        f"{things(answer['sites'], 'site')}{whole}"
    )
    for note in done.notes:
        print_line(note)
