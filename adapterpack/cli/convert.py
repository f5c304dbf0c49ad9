"""``adapterpack convert``."""

from __future__ import annotations

import click

import adapterpack

from ..hub.resolve import folder_of
from ..io.readable import things
from .options import out_option, shared, structural_option, values
from .output import emit, line
from .progress import apart


@click.command("convert")
@click.argument("source", metavar="SRC")
@out_option("The file (gguf, kohya, diffusers, onnx_adapter) or folder (pack, peft, xlora, mlx, adapterhub) to write")
@click.option("--to", "form", required=True, metavar="F", shell_complete=values("adapterpack.converting.pipeline:writable"),
              help="The format to write: pack, peft, xlora, mlx, adapterhub, gguf, kohya, diffusers or onnx_adapter.")
@click.option("--base", metavar="BASE", help="The base model; needed to write gguf and adapterhub, and to read kohya.")
@click.option("--part", metavar="PREFIX",
              help="Which part of a file with several: a model of kohya or diffusers (lora_unet, unet, ...), or a task (0, ...).")
@structural_option
@shared
def command(*, source: str, out: str, form: str, base: str | None, part: str | None, allow_structural: bool, as_json: bool) -> None:
    """Converts a pack, or an adapter of another tool, to another format. What the format cannot hold is an error that names it. LyCORIS
    files are read, too.

    \b
    Example:
      adapterpack convert packs/tickets -o tickets.gguf --to gguf --base models/base
      adapterpack convert style.safetensors -o packs/style --to pack --base models/unet --part lora_unet
    """
    with apart():
        done = adapterpack.convert(folder_of(source), out, to=form, base=base, part=part, allow_structural=allow_structural)
    answer = done.to_json()
    if as_json:
        emit({"command": "convert", **answer})
        return
    whole = f" and {things(len(answer['modules_to_save']), 'module')} trained whole" if answer["modules_to_save"] else ""
    line(f"converted {source} ({done.source}) to {out} ({done.target}): {things(answer['sites'], 'site')}{whole}")
    for note in done.notes:
        line(note)
