"""TLS with a certificate that can be renewed while a server runs."""

from __future__ import annotations

import ssl
from pathlib import Path

from ..errors import ConfigError, storage_errors
from ..io import require_private
from ..paths import StrPath
from .reloading_file import ReloadingFile

IN_THE_CLEAR = (
    "keys and answers cross the network as they are: give --tls-cert and --tls-key, or put a proxy with TLS "
    "before it"
)
"""The warning of a server that other machines reach without TLS."""


class Certificate:
    """A certificate and its key, in PEM files. ``context`` uses their current contents for each new
    connection.

    Raises:
        ConfigError: the files hold no certificate with its key, or other users may read the key.
        StorageError: the files cannot be read.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        self._file = ReloadingFile(
            "certificate and its key", [certificate, key], lambda: _context(certificate, key)
        )
        self.context = _context(certificate, key)
        # OpenSSL calls it in every handshake, even if the client names no server
        self.context.sni_callback = self._exchange

    @classmethod
    def of(cls, certificate: StrPath | None, key: StrPath | None) -> Certificate | None:
        """Makes the certificate of two files, or returns None if neither is given.

        Raises:
            ConfigError: only one of the two is given, or see the class.
        """
        if certificate is None and key is None:
            return None
        if certificate is None or key is None:
            raise ConfigError(
                "TLS needs a certificate and its key", remedy="give both --tls-cert and --tls-key"
            )
        return cls(Path(certificate), Path(key))

    def _exchange(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._file.value


def _context(certificate: Path, key: Path) -> ssl.SSLContext:
    require_private(key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    with storage_errors(certificate):
        try:
            # without a password an encrypted key fails instead of prompting
            context.load_cert_chain(certificate, key, password="")
        except ssl.SSLError as error:
            raise ConfigError(
                "these files hold no certificate with its key",
                where=f"{certificate}, {key}",
                expected="PEM, the key without a password",
                found=error.reason or str(error),
            ) from error
    return context
