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
              help="For so many seconds, try a server that did not answer only after all others.")
@click.option("--few", default=8, show_default=True, type=click.IntRange(min=1), metavar="N",
              help="Send requests to another server once this one has so many.")
@click.option("--tls-cert", metavar="FILE", help="The certificate (chain) to speak TLS with, PEM; it is read again when it is renewed.")
@click.option("--tls-key", metavar="FILE", help="Its key, PEM, which only you may read; needed with --tls-cert.")
@click.option("--replica-ca", metavar="FILE", help="The CA certificates (PEM) by which https:// servers are trusted, instead of the "
              "system's.")
@shared
def command(*, replicas: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Routes requests to several servers of one bundle, those for the same adapter to the same server.

    So each server keeps few adapters in memory, and reuses the prompts that it has read. When a server goes down, its adapters move to the
    others, and return with it. A request goes to a second server only if the first cannot be reached or accepts none.

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
