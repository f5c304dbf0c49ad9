"""``adapterpack verify``."""

from __future__ import annotations

import click

import adapterpack

from ...hub import folder_of
from ...pack.trust import SigstoreIdentity
from .. import common_options, option, print_line, print_report, trust_config


@click.command("verify")
@click.argument("pack", metavar="PACK|FLEET|BUNDLE")
@option("--key", "K", "A PEM file with the signer's public key.")
@option("--identity", "WHO", "The identity that must have been signed; with --issuer, the one certified.")
@option("--issuer", "URL", "Who must have vouched for the identity, in place of a key.")
@trust_config
@common_options
def command(
    *,
    pack: str,
    key: str | None,
    identity: str | None,
    issuer: str | None,
    trust_config: str | None,
    as_json: bool,
) -> None:
    """Verifies the signature of a pack, a fleet or a bundle: the holder of the key, or somebody under the
    identity, signed exactly these files.

    A signature says who vouches for these bytes; "adapterpack validate" checks what is in them. Exit code 4:
    unsigned, wrongly signed, expired, or not verifiable here; the error says which. To write the public key
    of a private one:

    \b
      openssl pkey -in key.pem -pubout -out key.pub

    \b
    Example:
      adapterpack verify packs/tickets --key key.pub
      adapterpack verify packs/tickets --identity me@example.org --issuer https://accounts.google.com
    """
    if bool(key) == bool(issuer) or bool(issuer) > bool(identity) or (key and trust_config):
        raise click.UsageError("Either --key, or --issuer with --identity and perhaps --trust-config.")
    who = key or SigstoreIdentity(identity or "", issuer or "", trust_config)
    signature = adapterpack.verify(folder_of(pack), who, identity=identity)
    if as_json:
        print_report(signature.to_json())
        return
    details = signature.to_json()
    print_line(
        f"{signature.name} ({signature.pack}) was signed with the {'certificate' if issuer else 'key'} "
        f"{signature.key}; none of {len(signature.files)} files was altered"
    )
    print_line(
        f"identity: {signature.identity or 'none'}{f' (by {issuer})' if issuer else ''}; it holds "
        f"{'until ' + details['expires'] if signature.expires else 'without an expiry date'}"
    )
