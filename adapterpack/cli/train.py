"""``adapterpack train``."""

from __future__ import annotations

import click

import adapterpack

from .options import shared
from .output import emit, line
from .progress import apart


@click.command("train")
@click.argument("config", metavar="CONFIG.yaml")
@click.argument("overrides", nargs=-1, metavar="[key=value ...]")
@shared
def command(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Trains the adapters that CONFIG describes and writes one pack each; returns the packs.

    \b
    Example:
      adapterpack train train.yaml
      adapterpack train train.yaml learning_rate=1e-3 r=16
    """
    with apart():
        packs = adapterpack.train(config, overrides)
    trained = [{**adapterpack.inspect(str(pack.path)), "training": dict(pack.manifest.training)} for pack in packs]
    if as_json:
        emit({"command": "train", "packs": trained})
        return
    for pack in trained:
        scores = [("final loss", pack["training"]["final_loss"]), *((metric["name"], metric["value"]) for metric in pack["metrics"])]
        values = ", ".join(f"{name} {value:.4g}" for name, value in scores)
        line(f"trained '{pack['name']}' into {pack['path']}: {pack['sites']} sites, {pack['parameters']:,} numbers, "
             f"{pack['training']['steps']} steps; {values}")
