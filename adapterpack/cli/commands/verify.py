"""``adapterpack verify``."""

from __future__ import annotations

import click

import adapterpack

from ...hub import folder_of
from ..options import common_options, option
from ..output import print_json, print_line


@click.command("verify")
@click.argument("pack", metavar="PACK|FLEET|BUNDLE")
@option("--key", "K", "A PEM file with the signer's public key.", required=True)
@option("--identity", "TEXT", "The identity that must have been signed.")
@common_options
def command(pack: str, key: str, identity: str | None, as_json: bool) -> None:
    """Verifies the signature of a pack, a fleet or a bundle: the holder of the key signed exactly these
    files.

    A signature says who vouches for these bytes; "adapterpack validate" checks what is in them. Exit code 4:
    unsigned, wrongly signed, expired, or not verifiable here; the error says which. To write the public key
    of a private one:

    \b
      openssl pkey -in key.pem -pubout -out key.pub

    \b
    Example:
      adapterpack verify packs/tickets --key key.pub
    """
    signature = adapterpack.verify(folder_of(pack), key, identity=identity)
    if as_json:
        print_json({"command": "verify", **signature.to_json()})
        return
    details = signature.to_json()
    print_line(
        f"{signature.name} ({signature.pack}) was signed with the key {signature.key}; none of "
        f"{len(signature.files)} files was altered"
    )
    print_line(
        f"identity: {signature.identity or 'none'}; it holds "
        f"{'until ' + details['expires'] if signature.expires else 'without an expiry date'}"
    )
