"""``adapterpack route``."""

from __future__ import annotations

from typing import Any

import click

import adapterpack

from .options import shared
from .output import emit, line


@click.command("route")
@click.argument("replicas", nargs=-1, required=True, metavar="URL...")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="H", help="The address to listen at.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), metavar="P", help="The port; 0 takes a free one.")
@click.option("--pause", default=2.0, show_default=True, type=click.FloatRange(min=0), metavar="S",
              help="Seconds for which a server that did not answer is tried after all others.")
@click.option("--few", default=8, show_default=True, type=click.IntRange(min=1), metavar="N",
              help="Requests that a server may have at a time before the next ones go to another.")
@click.option("--tls-cert", metavar="FILE", help="The certificate (chain) to speak TLS with, PEM; it is read again when it is renewed.")
@click.option("--tls-key", metavar="FILE", help="Its key, PEM, which only you may read; needed with --tls-cert.")
@click.option("--replica-ca", metavar="FILE", help="The certificates, PEM, by which servers at https:// are trusted, in place of the "
              "system's.")
@shared
def command(*, replicas: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Gives requests on to servers of one bundle, those for one adapter to one of them.

    Each server then has few adapters in memory, and finds prompts again that it has read. When one ends, its adapters move to the others,
    and come back with it. A request is sent to a second server only where the first could not be reached or takes none.

    \b
    Example:
      adapterpack route http://127.0.0.1:8001 http://127.0.0.1:8002 http://127.0.0.1:8003 --port 8000
    """
    def ready(address: str) -> None:
        if as_json:
            emit({"command": "route", "address": address, "replicas": list(replicas)}, compact=True)
        else:
            line(f"{address} gives requests on to {', '.join(replicas)}")

    adapterpack.route(replicas, ready=ready, **options)
