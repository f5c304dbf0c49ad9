"""``adapterpack serve``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

import adapterpack

from ...errors import ConfigError
from ...pack import Signers
from ...pack.trust import SigstoreIdentity
from ...readable import things
from ...serving.tenants import new_key
from .. import (
    address_options,
    common_options,
    device_of,
    device_options,
    flag,
    load_adapter,
    load_pack,
    open_target,
    option,
    packs_argument,
    print_line,
    print_report,
    trust_config,
)


def _print_key(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is None or ctx.resilient_parsing:
        return
    try:
        key, entry = new_key(value)
    except ConfigError as error:
        raise click.BadParameter(str(error), ctx, param) from error
    click.echo(
        f"the key of {value}, which is shown once and is in no file: {key}\n"
        'its entry is on standard output: put it below the line "keys:" of a file that only you may read '
        "(chmod 600)",
        err=True,
    )
    click.echo(entry)
    ctx.exit()


def _adapter(path: str) -> Any:
    """Loads ``NAME=PATH`` and files for a graph; other paths stay what they are, since the server lists
    folders.
    """
    if path.endswith(".onnx_adapter"):
        return load_adapter(path)
    return path if "=" not in path or Path(path).exists() else load_pack(path)


@click.command("serve")
@click.argument("bundle", metavar="BUNDLE|BASE")
@packs_argument
@option(
    "--adapters",
    "DIR",
    "Adapters to load besides those of the bundle: a pack, NAME=PACK, a folder of packs, a fleet, an "
    ".onnx_adapter file, or a lock file of adapterpack pull; may be repeated.",
    multiple=True,
)
@option(
    "--fetch",
    "SOURCE",
    "Where a request may have an adapter from that is not loaded: a folder of packs, a lock file, or "
    "hf://OWNER on a hub; may be repeated.",
    multiple=True,
)
@address_options(8000)
@option(
    "--name",
    "NAME",
    "The name by which requests address the base, or the adapter of a "
    "folded bundle; by default as the bundle has it.",
)
@option(
    "--keys",
    "FILE",
    "A file of keys: who may use which adapters (see docs/serve.md). It is read again when it changes.",
)
@option(
    "--api-key",
    "KEY",
    "A single key for all clients; better set in ADAPTERPACK_API_KEY.",
    envvar="ADAPTERPACK_API_KEY",
)
@option(
    "--new-key",
    "ID",
    "Print a new key on standard error and its entry for --keys on standard output, and exit.",
    is_eager=True,
    expose_value=False,
    callback=_print_key,
)
@flag("--insecure", "Serve everybody who can reach the address, without keys.")
@option(
    "--audit",
    "FILE",
    'Where to log one line of JSON per request: a file, "-" for standard error, or "" for nowhere.',
    default="-",
    show_default=True,
)
@click.option(
    "--sampling",
    type=click.Choice(["model", "greedy"]),
    help="Sampling of requests that do not say: "
    "as the model's generation_config.json (the default), or greedy.",
)
@flag(
    "--share-prefixes",
    "Reuse what was computed for a prompt across keys, too: faster, but the time of an answer tells what "
    "others have asked.",
)
@device_options
@option(
    "--max-rows",
    "N",
    "How many rows run at a time; by default 8 texts, or 32 rows of an encoder.",
    type=click.IntRange(min=1),
)
@option(
    "--max-length",
    "N",
    "The most tokens of a prompt and its answer; by default the model's context, for texts at most 4096.",
    type=click.IntRange(min=1),
)
@option(
    "--draft",
    "BUNDLE",
    "Let a faster bundle, of the same base in fewer bits or of a smaller model with the same tokens, guess "
    "the next tokens of a request that runs alone; its answer stays the same.",
)
@flag(
    "--deterministic",
    "Answer with the same bits whatever runs beside a request: a step costs as much as one of --max-rows "
    "rows.",
)
@option(
    "--watch",
    "SECONDS",
    "How often to look at the folders and lock files of --adapters, to load new packs and unload "
    "removed ones.",
    type=click.FloatRange(min=0.05),
)
@option(
    "--require-signature",
    "KEYFILE",
    "Load only packs signed with one of these keys (public, PEM), or as below; may be repeated.",
    multiple=True,
)
@option(
    "--require-identity",
    "WHO ISSUER",
    "Load only packs signed under this identity, vouched for by that issuer, or as above; may be repeated.",
    nargs=2,
    multiple=True,
)
@trust_config
@option("--admin", "ADDRESS", "HOST:PORT or unix:PATH, where an operator may load and unload adapters.")
@option("--admin-key-file", "FILE", "The file with the operator's key; needed with --admin.")
@option("--tls-cert", "FILE", "The TLS certificate (chain), PEM; it is read again when it changes.")
@option("--tls-key", "FILE", "The certificate's key, PEM, readable by you alone; needed with --tls-cert.")
@flag("--traces", "Send an OpenTelemetry span for each request; the OTEL_* variables say where to.")
@click.option(
    "--page/--no-page",
    default=True,
    help="Serve a page at / where browsers can try adapters and see traffic (the default), or not.",
)
@common_options
def command(
    *,
    bundle: str,
    packs: tuple[str, ...],
    adapters: tuple[str, ...],
    audit: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Serves a bundle and its adapters over HTTP until it is interrupted.

    A BASE is exported into the cache first, with its PACKs, and the next call finds it there.

    The model of a request is the name of an adapter or of the base. A decoder's bundle has OpenAI's routes
    for text; an encoder's has those for embeddings or labels, and the Open Inference Protocol. Without keys,
    only this machine is served. On SIGTERM and Ctrl-C, answers in progress are finished first.

    \b
    Example:
      adapterpack serve bundle
      adapterpack serve models/base packs/tickets packs/emails
      adapterpack serve bundle --adapters packs --keys keys.yaml --host 0.0.0.0 --port 8000
    """

    def ready(serving: Any) -> None:
        if as_json:
            print_report(
                {
                    "address": serving.address,
                    "base": serving.base,
                    "adapters": serving.adapters,
                    "admin": serving.admin,
                },
                compact=True,
            )
            return
        adapters = f"{things(len(serving.adapters), 'adapter')}: {', '.join(serving.adapters) or 'none'}"
        print_line(f"{serving.address} serves {serving.base} and {adapters}")
        if options["page"]:
            print_line(f"{serving.address}/ in a browser: try adapters side by side, see what runs")
        if serving.admin is not None:
            print_line(f"{serving.admin} is for the operator")
        first = next(iter(serving.adapters), serving.base)
        key = "-H 'Authorization: Bearer KEY' " if options["keys"] or options["api_key"] else ""
        for path, body in serving.examples.items():
            print_line(
                f"curl {serving.address}{path} {key}-H 'Content-Type: application/json' -d "
                f"'{json.dumps({'model': first, **body})}'"
            )

    loaded = [load_pack(pack) for pack in packs]
    config, identities = options.pop("trust_config"), options.pop("require_identity")
    options["require_signature"] += tuple(SigstoreIdentity(who, issuer, config) for who, issuer in identities)
    signers = Signers(options["require_signature"])
    for pack in loaded:
        signers.require(pack)
    folder, others = open_target(bundle, loaded)
    given = [*(one for one in others if not isinstance(one, str)), *map(_adapter, adapters)]
    device = device_of(options)
    adapterpack.serve(folder, adapters=given, audit=audit or None, ready=ready, provider=device, **options)
