"""``adapterpack sign``."""

from __future__ import annotations

import os

import click

import adapterpack

from ...pack.trust import SigstoreSigner
from .. import common_options, flag, option, print_line, print_report, trust_config

PASSWORD = "ADAPTERPACK_KEY_PASSWORD"


@click.command("sign")
@click.argument("pack", metavar="PACK|FLEET|BUNDLE")
@option("--key", "K", "A PEM file with your private elliptic-curve key.")
@flag("--keyless", "Sign as whom an identity token names, by sigstore, without a key of your own.")
@option(
    "--identity-token", "FILE", "The token for --keyless (by default SIGSTORE_ID_TOKEN, or the CI job's)."
)
@trust_config
@option("--identity", "TEXT", "Who signs with a key, as free text; it is part of what is signed.")
@option("--expires", "DATE", "The last day (UTC), or the moment, at which the signature is valid.")
@common_options
def command(
    *,
    pack: str,
    key: str | None,
    keyless: bool,
    identity_token: str | None,
    trust_config: str | None,
    identity: str | None,
    expires: str | None,
    as_json: bool,
) -> None:
    """Signs a pack, a fleet or a bundle: writes the detached signature adapterpack.sig.json into its folder,
    over the manifest and every file that it lists.

    A valid pack may come from anybody: only a signature says who made it. OpenSSF's model-signing verifies
    the same signature. If the key has a password, it is read from ADAPTERPACK_KEY_PASSWORD. To make a pair of
    keys:

    \b
      openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem
      openssl pkey -in key.pem -pubout -out key.pub

    With --keyless, sigstore certifies for one signature who signs, and logs that in public: a CI job signs as
    its workflow; at a terminal, a browser asks who you are.

    \b
    Example:
      adapterpack sign packs/tickets --key key.pem --expires 2030-06-30
      adapterpack sign packs/tickets --keyless
    """
    if keyless == bool(key) or (key and (identity_token or trust_config)):
        raise click.UsageError("Either --key, or --keyless with its --identity-token and --trust-config.")
    signature = adapterpack.sign(
        pack,
        key or SigstoreSigner(identity_token, trust_config),
        identity=identity,
        expires=expires,
        password=os.environ.get(PASSWORD),
    )
    if as_json:
        print_report(signature.to_json())
        return
    details = signature.to_json()
    signer = (
        f"as {signature.identity}, by {signature.issuer}," if keyless else f"with the key {signature.key}"
    )
    print_line(f"signed {signature.name} ({signature.pack}) {signer}: {details['signature']}")
    print_line(f"it holds {'until ' + details['expires'] if signature.expires else 'without an expiry date'}")
