"""``adapterpack extract``."""

from __future__ import annotations

from typing import Any

import click

import adapterpack

from ...hub import folder_of
from ...readable import show_value, size, things
from .. import common_options, option, out_option, print_line, print_report, show_bytes


@click.command("extract")
@click.argument("tuned")
@click.argument("base")
@out_option("The folder of the new pack")
@option("--rank", "R", "The largest rank that any site keeps; 128 by default.", type=int)
@option(
    "--energy",
    "Q",
    "The share of the squared singular values to keep; by default the change's own "
    "rank, or 0.99 where it has none.",
    type=float,
)
@option(
    "--modules", "A,B", "The layers to factorize, by the ends of their paths; by default all linear layers."
)
@click.option(
    "--rest",
    type=click.Choice(["keep", "leave", "refuse"]),
    default="keep",
    show_default=True,
    help=(
        "Other tensors that changed (heads, embeddings, norms, biases): keep their modules whole, leave "
        "them out, or refuse."
    ),
)
@common_options
def command(*, tuned: str, base: str, out: str, modules: str | None, as_json: bool, **options: Any) -> None:
    """Extracts a LoRA pack that turns the checkpoint BASE into TUNED, which was fine-tuned from it or holds a
    merged adapter.

    \b
    Example:
      adapterpack extract models/tuned models/base -o packs/tuned
      adapterpack extract models/tuned models/base --rank 32 --modules q_proj,v_proj -o packs/small
    """
    wanted = None if modules is None else [part.strip() for part in modules.split(",") if part.strip()]
    with show_bytes("extract") as progress:
        pack = adapterpack.extract(
            folder_of(tuned), folder_of(base), modules=wanted, out=out, progress=progress, **options
        )
    summary = adapterpack.inspect(out)
    story = pack.manifest.extensions["x_extract"]
    if as_json:
        print_report({**summary, "extract": story})
        return
    print_line(
        f"extracted {out} from {tuned}: {things(summary['sites'], 'site')}"
        + (f" of rank {', '.join(summary['ranks'])}" if summary["ranks"] else "")
        + f", {size(summary['bytes'])}"
    )
    ranks = sorted(set(story["detected"].values()))
    if ranks:
        print_line(
            f"at {len(story['detected'])} of {len(story['ranks'])} sites the change ends in the "
            "rounding of the checkpoint: its rank is "
            + (str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}")
        )
    if story["ranks"]:
        print_line(
            f"relative error of the change: {show_value(story['truncation']['total'])}, of which rounding "
            f"makes {show_value(story['rounding'])}"
        )
    for key, what in (
        ("kept_whole", "tensors are kept whole"),
        ("left_out", "changed tensors are left as in the base"),
        ("rounding_only", "layers differ by rounding alone and are left out"),
        ("not_in_tuned", "tensors of the base are not in the fine-tuned checkpoint"),
    ):
        if names := story[key]:
            print_line(f"{len(names)} {what}: {', '.join(names[:4])}" + (", ..." if len(names) > 4 else ""))
