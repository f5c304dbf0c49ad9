"""``adapterpack sign``."""

from __future__ import annotations

import os

import click

import adapterpack

from ..options import common_options, option
from ..output import print_json, print_line

PASSWORD = "ADAPTERPACK_KEY_PASSWORD"


@click.command("sign")
@click.argument("pack", metavar="PACK|FLEET|BUNDLE")
@option("--key", "K", "A PEM file with your private elliptic-curve key.", required=True)
@option("--identity", "TEXT", "Who signs, as free text; it is part of what is signed.")
@option("--expires", "DATE", "The last day (UTC), or the moment, at which the signature is valid.")
@common_options
def command(pack: str, key: str, identity: str | None, expires: str | None, as_json: bool) -> None:
    """Signs a pack, a fleet or a bundle: writes the detached signature adapterpack.sig.json into its folder,
    over the manifest and every file that it lists.

    A valid pack may come from anybody: only a signature says who made it. OpenSSF's model-signing verifies
    the same signature. If the key has a password, it is read from ADAPTERPACK_KEY_PASSWORD. To make a pair of
    keys:

    \b
      openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem
      openssl pkey -in key.pem -pubout -out key.pub

    \b
    Example:
      adapterpack sign packs/tickets --key key.pem --expires 2030-06-30
    """
    signature = adapterpack.sign(
        pack, key, identity=identity, expires=expires, password=os.environ.get(PASSWORD)
    )
    if as_json:
        print_json({"command": "sign", **signature.to_json()})
        return
    details = signature.to_json()
    print_line(
        f"signed {signature.name} ({signature.pack}) with the key {signature.key}: {details['signature']}"
    )
    print_line(f"it holds {'until ' + details['expires'] if signature.expires else 'without an expiry date'}")
