"""Signs and verifies with identities in place of keys: sigstore's authority certifies who signs, and its log
when.

``sigstore`` is imported only here and only when needed. Source: sigstore bundle 0.3, and the extension of
Fulcio's certificates that names the issuer.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from ...errors import ConfigError, WronglySigned, storage_errors
from ...extras import needed_by
from ...io import read_at_most
from ...library_errors import library_errors
from ...paths import StrPath
from .dsse import MAX_BYTES, PAYLOAD_TYPE, Sealed, require_certificate

TOKEN = "SIGSTORE_ID_TOKEN"
"""The environment variable that may hold an identity token; cosign reads it, too."""
_NAMES, _ISSUER = "2.5.29.17", "1.3.6.1.4.1.57264.1.1"


class SigstoreIdentity:
    """Someone trusted to sign, named as sigstore names signers: an identity (an e-mail address, or the
    address of a workflow) and the issuer that vouched for it. It stands wherever a public key does.

    ``trust_config`` is a sigstore ``ClientTrustConfig`` in JSON, for a private instance; without it, the
    public instance counts, with the roots that the installed library knows. Verifying asks no network.

    Raises:
        ConfigError: the identity or the issuer is empty, or the trust configuration cannot be used.
        MissingExtra: ``sigstore`` is not installed.

    Example:
        >>> who = SigstoreIdentity(
        ...     "https://github.com/org/adapters/.github/workflows/release.yml@refs/heads/main",
        ...     "https://token.actions.githubusercontent.com",
        ... )  # doctest: +SKIP
        >>> adapterpack.verify("packs/tickets", who).issuer  # doctest: +SKIP
        'https://token.actions.githubusercontent.com'
    """

    def __init__(self, identity: str, issuer: str, trust_config: StrPath | None = None) -> None:
        # The library takes an empty issuer for any issuer.
        if not (identity and issuer):
            raise ConfigError(
                "an identity counts only with its issuer",
                found=f"identity {identity!r}, issuer {issuer!r}",
                remedy="name both",
            )
        self.identity, self.issuer = identity, issuer
        self._policy = _sigstore("verify.policy").Identity(identity=identity, issuer=issuer)
        _, self._verifier = _trust(trust_config, offline=True)

    def unseal(self, data: bytes, where: object) -> Sealed:
        """Returns what a signature file holds, if this identity signed it while its certificate was valid,
        and the log and its timestamps say so.

        Raises:
            UnsupportedSignature: the signature rests on a key.
            WronglySigned: the file is malformed or altered, or somebody else signed it.
        """
        require_certificate(data, where)
        with library_errors(
            "sigstore",
            "sigstore does not vouch for this signature",
            where=where,
            expected=f"{self.identity}, by {self.issuer}",
            remedy="do not use the artifact; ask its maker under which identity it was signed",
            kind=WronglySigned,
        ):
            bundle = _sigstore("models").Bundle.from_json(data)
            kind, payload = self._verifier.verify_dsse(bundle, self._policy)
            digest = bundle.signing_certificate.fingerprint(
                import_module("cryptography.hazmat.primitives.hashes").SHA256()
            )
        if kind != PAYLOAD_TYPE:
            raise WronglySigned(
                "what was signed is no statement",
                where=where,
                expected=PAYLOAD_TYPE,
                remedy="ask its maker to sign it again",
            )
        return Sealed(payload, digest.hex(), self.identity, self.issuer)


class SigstoreSigner:
    """Signs as whom an identity token names, with a key that exists for one signature; it stands wherever
    :func:`adapterpack.sign` takes a private key. Identity and signature enter a log that everybody can read.

    The token is that in ``token_file``, in ``SIGSTORE_ID_TOKEN``, or of the CI job; at a terminal, a browser
    asks for it. ``trust_config`` is that of :class:`SigstoreIdentity`.

    Raises:
        ConfigError: the trust configuration cannot be used, or the public instance's cannot be renewed.
        MissingExtra: ``sigstore`` is not installed.

    Example:
        >>> adapterpack.sign("packs/tickets", SigstoreSigner()).identity  # doctest: +SKIP
        'https://github.com/org/adapters/.github/workflows/release.yml@refs/heads/main'
    """

    def __init__(self, token_file: StrPath | None = None, trust_config: StrPath | None = None) -> None:
        self._token_file, self._trust_config = token_file, trust_config
        self._trust, _ = _trust(trust_config, offline=False)

    def seal(self, payload: bytes) -> tuple[bytes, Sealed]:
        """Returns the bytes of the signature file for ``payload``, and what :class:`SigstoreIdentity` reads
        in them.

        Raises:
            ConfigError: there is no identity token, it is not accepted, or a service cannot be reached.
        """
        with library_errors(
            "sigstore",
            "sigstore did not sign",
            remedy="get a new identity token, and check that the network can be used",
            kind=ConfigError,
        ):
            context = _sigstore("sign").SigningContext.from_trust_config(self._trust)
            with context.signer(_sigstore("oidc").IdentityToken(self._token())) as signer:
                bundle = signer.sign_dsse(_sigstore("dsse").Statement(payload))
            said = {one.oid.dotted_string: one.value for one in bundle.signing_certificate.extensions}
        who = SigstoreIdentity(said[_NAMES][0].value, said[_ISSUER].value.decode(), self._trust_config)
        data = bundle.to_json().encode()
        return data, who.unseal(data, "the new signature")

    def _token(self) -> str:
        if self._token_file is not None:
            return _read(self._token_file).decode().strip()
        oidc = _sigstore("oidc")
        if token := os.environ.get(TOKEN) or oidc.detect_credential():
            return token
        if not sys.stdin.isatty():
            raise ConfigError(
                "there is no identity token to sign with",
                expected=f"{TOKEN}, a file, or a CI job that may ask for one",
                remedy="let the job ask for one (GitHub: permissions, id-token: write), or name a file",
            )
        return str(oidc.Issuer(self._trust.signing_config.get_oidc_url()).identity_token())


def _sigstore(module: str) -> Any:
    with needed_by("signing under an identity"):
        return import_module(f"sigstore.{module}")


def _trust(path: StrPath | None, offline: bool) -> tuple[Any, Any]:
    """Returns a trust configuration, and what verifies by it; without a path, the public instance's."""
    kind = _sigstore("models").ClientTrustConfig
    with library_errors(
        "sigstore",
        "the trust configuration cannot be used",
        where=path,
        remedy="name a ClientTrustConfig, or check that the network and the home folder can be used",
        kind=ConfigError,
    ):
        config = kind.production(offline=offline) if path is None else kind.from_json(_read(path))
        return config, _sigstore("verify").Verifier(trusted_root=config.trusted_root)


def _read(path: StrPath) -> bytes:
    with storage_errors(path), Path(path).open("rb") as file:
        return read_at_most(file, MAX_BYTES)
