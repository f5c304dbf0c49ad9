"""``adapterpack serve``."""

from __future__ import annotations

import json
import os
from typing import Any

import click

import adapterpack

from ..errors import ConfigError
from ..io.readable import things
from ..serving.keys import new_key
from .device_options import device_of, device_options
from .options import pack_at, shared
from .output import emit, line


def _print_key(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is None or ctx.resilient_parsing:
        return
    try:
        key, entry = new_key(value)
    except ConfigError as error:
        raise click.BadParameter(str(error), ctx, param) from error
    click.echo(f"the key of {value}, which is shown once and is in no file: {key}\n"
               'its entry is on standard output: put it below the line "keys:" of a file that only you may read (chmod 600)', err=True)
    click.echo(entry)
    ctx.exit()


@click.command("serve")
@click.argument("bundle", metavar="BUNDLE")
@click.option("--adapters", multiple=True, metavar="DIR",
              help="A pack, NAME=PACK, a folder of packs, a fleet, or a lock file of adapterpack pull, to load besides those of the "
              "bundle; may be repeated.")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="H", help="The address to listen at.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), metavar="P", help="The port; 0 takes a free one.")
@click.option("--name", metavar="NAME", help="What requests call the base; by default what the bundle calls it. Of "
              "a bundle with one folded adapter: what they call that.")
@click.option("--keys", metavar="FILE", help="Who may ask for which adapters: see docs/serve.md. It is read again when it changes.")
@click.option("--api-key", metavar="KEY", envvar="ADAPTERPACK_API_KEY", help="One key for all; better in ADAPTERPACK_API_KEY.")
@click.option("--new-key", metavar="ID", is_eager=True, expose_value=False, callback=_print_key,
              help="Print a new key on standard error and its entry for --keys on standard output, and end.")
@click.option("--insecure", is_flag=True, help="Serve everybody who can reach the address, without keys.")
@click.option("--audit", default="-", show_default=True, metavar="FILE",
              help='A file for one line of JSON a request; "-" is standard error, "" nowhere.')
@click.option("--sampling", type=click.Choice(["model", "greedy"]), help="What counts where a request for text says "
              "nothing: the model's generation_config.json (the default), or the likeliest token.")
@device_options
@click.option("--max-rows", type=click.IntRange(min=1), metavar="N",
              help="Answers that run at a time; by default 8 texts, or 32 rows of an encoder.")
@click.option("--max-length", type=click.IntRange(min=1), metavar="N",
              help="Tokens of a prompt and its answer together; by default the model's context, of texts at most 4096.")
@click.option("--watch", type=click.FloatRange(min=0.05), metavar="SECONDS",
              help="Look at the folders and lock files of --adapters that often: what comes is loaded, what goes is unloaded.")
@click.option("--require-signature", multiple=True, metavar="KEYFILE",
              help="Load only packs signed with this key (a public one, PEM), or another that is given so; may be repeated.")
@click.option("--admin", metavar="ADDRESS", help="HOST:PORT or unix:PATH, where an operator loads and unloads adapters while it runs.")
@click.option("--admin-key-file", metavar="FILE", help="The file with the operator's key; needed with --admin.")
@click.option("--tls-cert", metavar="FILE", help="The certificate (chain) to speak TLS with, PEM; it is read again when it is renewed.")
@click.option("--tls-key", metavar="FILE", help="Its key, PEM, which only you may read; needed with --tls-cert.")
@click.option("--traces", is_flag=True, help="Send an OpenTelemetry span for each request; OTEL_* variables say where.")
@click.option("--page/--no-page", default=True,
              help="Whether browsers get a page at / to try adapters and see traffic; by default they do.")
@shared
def command(*, bundle: str, adapters: tuple[str, ...], audit: str, as_json: bool, **options: Any) -> None:
    """Serves a bundle and its adapters over HTTP until it is interrupted.

    A request's model is the name of an adapter, or of the base. A decoder's bundle has OpenAI's routes for text, an encoder's those for
    embeddings or labels, and the Open Inference Protocol. Only this machine may ask unless there are keys. SIGTERM and Ctrl-C let answers
    end first.

    \b
    Example:
      adapterpack serve bundle
      adapterpack serve bundle --adapters packs --keys keys.yaml --host 0.0.0.0 --port 8000
    """
    def ready(serving: Any) -> None:
        if as_json:
            emit({"command": "serve", "address": serving.address, "base": serving.base, "adapters": serving.adapters,
                  "admin": serving.admin}, compact=True)
            return
        adapters = f"{things(len(serving.adapters), 'adapter')}: {', '.join(serving.adapters) or 'none'}"
        line(f"{serving.address} serves {serving.base} and {adapters}")
        if options["page"]:
            line(f"{serving.address}/ in a browser: try adapters side by side, see what runs")
        if serving.admin is not None:
            line(f"{serving.admin} is for the operator")
        first = next(iter(serving.adapters), serving.base)
        key = "-H 'Authorization: Bearer KEY' " if options["keys"] or options["api_key"] else ""
        for path, body in serving.examples.items():
            line(f"curl {serving.address}{path} {key}-H 'Content-Type: application/json' -d '{json.dumps({'model': first, **body})}'")

    packs = [path if os.path.exists(path) or "=" not in path else pack_at(path) for path in adapters]  # noqa: PTH110 - also hf://
    device = device_of(options)
    adapterpack.serve(bundle, adapters=packs, audit=audit or None, ready=ready, provider=device, **options)
