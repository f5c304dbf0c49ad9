"""``adapterpack export``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import click

import adapterpack

from ...bundle import bundle_in, proof_sentence
from ...hub import folder_of
from ...merging.base_kind import is_gguf, is_graph
from ...readable import size, things
from ..options import (
    common_options,
    flag,
    load_pack,
    option,
    out_option,
    quantization_options,
    structural_option,
    suggest,
)
from ..output import print_json, print_line
from ..progress import show_steps
from .quantize import accuracy_sentence


@click.command("export")
@click.argument("base")
@click.argument("packs", nargs=-1, metavar="[PACK...]")
@out_option("The folder of the bundle")
@option(
    "--mode",
    "M",
    "folded (one adapter, merged into the weights), inputs (one adapter per run) or bank (each row its "
    "own adapter).",
    default="bank",
    show_default=True,
    shell_complete=suggest("adapterpack.bundle.manifest:MODES"),
)
@option(
    "--task",
    "T",
    "A Hugging Face pipeline name, such as text-generation; by default that of the packs.",
    shell_complete=suggest("adapterpack.tasks.task:TASKS"),
)
@option(
    "--quantize",
    "S",
    "Quantize the base's weights: int8, int4, int2, mixed, w8a8, fp16 or bf16; the "
    "options up to --size-budget say how. as-trained: as they were while the packs were trained.",
    shell_complete=suggest("adapterpack.quantizing.graphs.scheme:GRAPH_SCHEMES"),
)
@flag("--dequantize", "Write the weights of a quantized base as floats, not as its codes.")
@quantization_options
@option(
    "--dtype",
    "D",
    "The float type of the graph and its slots: float32, or for GPUs float16 or bfloat16.",
    default="float32",
    show_default=True,
)
@click.option(
    "--static-cache/--no-static-cache",
    default=None,
    help="Require the decoder graph with static caches, which the engine and serve run, or leave it out; "
    "by default it is made where the model's family has one.",
)
@click.option("--in-place", is_flag=True, hidden=True, help="The former name of --static-cache.")
@option(
    "--cache",
    "C",
    "The type of cached keys and values in the engine's graph: float, or int8, a quarter of the "
    "memory at about the error of int8 weights.",
    default="float",
    show_default=True,
    shell_complete=suggest("adapterpack.quantizing.graphs.options:CACHES"),
)
@option("--slots", "N", "How many slots a bank has, including slot 0 for the base.", type=int)
@option("--max-rank", "R", "The largest rank that a slot of a bank can take.", type=int)
@option(
    "--frontend",
    "F",
    "What builds the graph: mobius, transformers, rereading; by default the first whose graph is right.",
    shell_complete=suggest("adapterpack.exporting.frontends.base:FRONTENDS"),
)
@option(
    "--target",
    "T",
    "What will run the bundle: ort, ort-genai (a folder that onnxruntime-genai loads), triton (a "
    "model repository), web (a site for browsers) or model-package (variants by provider, which ONNX "
    "Runtime opens).",
    default="ort",
    show_default=True,
    shell_complete=suggest("adapterpack.exporting.targets.base:TARGETS"),
)
@option(
    "--split",
    "MB",
    "web: MB of the largest data file, 64 by default; a tensor that is larger has a file of its own.",
    type=click.IntRange(min=1),
)
@option(
    "--proof",
    "P",
    "How much is proved against torch: full, layers (a few at full width, the whole on short rows) or "
    "none; by default full for models below 1 GB of float32, layers above.",
    shell_complete=suggest("adapterpack.bundle.reports:PROOFS"),
)
@option(
    "--pooling",
    "P",
    "How embeddings are pooled from hidden states: mean, cls or last; by default as the base says, or mean.",
    shell_complete=suggest("adapterpack.tasks.embeddings:POOLING"),
)
@option("--base checkpoint", "CHECKPOINT", "The checkpoint from which an ONNX or GGUF file was made.")
@structural_option
@common_options
def command(
    *,
    base: str,
    packs: tuple[str, ...],
    out: str,
    in_place: bool,
    static_cache: bool | None,
    target: str,
    split: int | None,
    checkpoint: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Writes a bundle: an ONNX graph of BASE with PACKS in it, its site map, the packs and the tokenizer.

    BASE is a checkpoint; or an ONNX or GGUF file that another tool made from the checkpoint --base; or a
    finished bundle, which is converted for the --target without changes.

    \b
    Example:
      adapterpack export models/base packs/tickets packs/emails -o bundle
      adapterpack export models/base support=packs/tickets --mode folded --quantize int4 -o bundle
      adapterpack export models/base packs/orders --mode inputs --target ort-genai -o genai
      adapterpack export model.onnx packs/orders --base models/base -o bundle
      adapterpack export bundle-int8 --target web -o site
    """
    graph = base if is_graph(base) or is_gguf(base) else folder_of(base)
    loaded = [load_pack(pack) for pack in packs]
    with show_steps() as say:
        adapterpack.export(
            graph,
            loaded,
            out,
            in_place=in_place or static_cache,
            target=target,
            split=None if split is None else split << 20,
            checkpoint=None if checkpoint is None else folder_of(checkpoint),
            progress=say,
            **options,
        )
    bundle = adapterpack.inspect(bundle_in(out))
    if as_json:
        print_json({"command": "export", **bundle})
        return
    names = ", ".join(adapter["name"] for adapter in bundle["adapters"]) or "no adapters"
    print_line(
        f"exported {bundle['base']['name']} with {names} to {bundle['path']}: {bundle['task']}, "
        f"mode {options['mode']}, {things(bundle['sites'], 'site')}, {size(bundle['bytes'])}"
    )
    if bundle["slots"]:
        print_line(
            f"the bank has {bundle['slots']} slots, the base's included, of rank at most {bundle['max_rank']}"
        )
    quantization = bundle["quantization"] or {}
    print_line(proof_sentence(bundle["parity"]["proof"], len(bundle["adapters"])))
    for sentence in proof(bundle["parity"], bool(quantization), "stored" in quantization):
        print_line(sentence)
    for format_name, report in quantization.get("stored", {}).items():
        print_line(stored_sentence(format_name, report))
    left_out = bundle["parity"].get("decoder", {}).get("left_out")
    if left_out is not None:
        print_line(f"the engine's graph is left out, so serve does not run this bundle: {left_out}")
    if "cache" in bundle["parity"].get("decoder", {}):
        print_line(cache_sentence(bundle["parity"]["decoder"]["cache"]))
    if "error_by_accuracy" in quantization and ("head" in quantization or "stored" in quantization):
        print_line(accuracy_sentence(quantization["accuracy"], quantization["error_by_accuracy"]))
    for name, reason in bundle["parity"]["canary"]["not_replayed"].items():
        print_line(f"the canary of {name} was not replayed: {reason}")
    # imports onnx_ir, which is slow to import
    from ...exporting.targets import TARGETS  # noqa: PLC0415

    for step in filter(None, TARGETS[target].next_step.format(out=shlex.quote(out)).splitlines()):
        print_line(step)


def cache_sentence(report: Mapping[str, Any]) -> str:
    """Describes the manifest's report on int8 caches in a sentence."""
    return (
        f"keys and values are {report['type']}: logits move by {report['relative']:.2%} (root mean square), "
        "at most "
        f"{report['max_relative']:.2%} of the largest; same best token {report['label_agreement']:.1%}"
    )


def stored_sentence(name: str, report: Mapping[str, Any]) -> str:
    """Describes in a sentence how the graph stores a quantized base's weights in one format.

    Example:
        >>> stored_sentence("awq", {"held": 13, "dequantized": 1,  # doctest: +ELLIPSIS
        ...     "reasons": {"zero points that are no codes": 1}, "difference": 0.0})
        '13 of 14 weights in awq are held as they are stored; floats of the same values: 1 (zero points ...)'
    """
    held, left = report["held"], report["dequantized"]
    exact = f", within {report['difference']:.1g} of their largest" if report["difference"] else ""
    floats = (
        ""
        if not left
        else "; floats of the same values: "
        + ", ".join(f"{n} ({why})" for why, n in report["reasons"].items())
    )
    return f"{held} of {held + left} weights in {name} are held as they are stored{exact}{floats}"


def proof(parity: Mapping[str, Any], quantized: bool, stored: bool = False) -> Iterator[str]:
    """Yields the parity report line by line; ``stored``: the base itself is quantized."""
    if not parity["max_abs"]:
        return
    when = ", of floats of the same values:" if stored else ", before quantization:" if quantized else ":"
    yield f"differences from torch, within {parity['tolerance']:.0e} of the largest output{when}"
    for name, error in parity["max_abs"].items():
        agreed = parity["argmax_agreement"][name]
        yield (
            f"  {name}: largest difference {error:.2g} ({parity['max_relative'][name]:.1g} of the largest), "
            f"same best choice {agreed:.1%}"
        )
    mixed = (
        ""
        if parity["mixed"] is None
        else f"rows with different adapters in one batch: a difference of {parity['mixed']:.2g}; "
    )
    yield f"  {mixed}rows alone and in a batch: a difference of {parity['alone']:.2g}"
