"""Decides who may read and write: by tokens from a file, stored as digests, and by signed URLs for uploads,
which carry no token.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import ConfigError, storage_errors
from ...http import HTTPError
from ...io import require_private, sha256_of_text
from .storage import Settings

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
NAME = re.compile(_NAME)
_LINE = re.compile(rf"({_NAME})\s+(read|write)\s+(\S{{16,256}})")
_NUMBER = re.compile(r"[0-9]{1,15}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VALID_SECONDS = 6 * 3600


@dataclass(frozen=True)
class Account:
    """The owner of a token, and whether the token may write."""

    name: str
    write: bool


@dataclass(frozen=True)
class Access:
    """The accounts by the SHA-256 of their tokens. Requests without a token may read whatever is
    not private.
    """

    accounts: Mapping[str, Account] = field(default_factory=dict)
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    @classmethod
    def from_file(cls, path: Path) -> Access:
        """Reads lines ``NAME read|write TOKEN``; skips empty lines and lines that begin with #.

        Raises:
            ConfigError: a line has another form, or other users may read the file.
            StorageError: the file cannot be read.
        """
        require_private(path)
        with storage_errors(path):
            lines = path.read_text("utf-8").splitlines()
        accounts = {}
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            match = _LINE.fullmatch(line.strip())
            if match is None:
                raise ConfigError(
                    "a line of the file of tokens cannot be read",
                    where=f"{path}, line {number}",
                    expected="NAME read|write TOKEN, the token of at least 16 characters",
                )
            accounts[sha256_of_text(match[3])] = Account(match[1], match[2] == "write")
        return cls(accounts)

    def account(self, authorization: str | None) -> Account | None:
        """Returns the account of an ``Authorization`` header, or None without a token.

        Raises:
            HTTPError: the token is unknown.
        """
        scheme, _, token = (authorization or "").partition(" ")
        if not token:
            return None
        account = self.accounts.get(sha256_of_text(token.strip())) if scheme.lower() == "bearer" else None
        if account is None:
            raise HTTPError(401, "Unauthorized", "Invalid credentials in Authorization header")
        return account

    @staticmethod
    def require_writer(account: Account | None) -> None:
        """Checks that an account may write.

        Raises:
            HTTPError: there is no account, or it may only read.
        """
        if account is None:
            raise HTTPError(401, "Unauthorized", "A token is needed")
        if not account.write:
            raise HTTPError(403, "Forbidden", "This token may only read")

    @staticmethod
    def require_granted(account: Account | None, settings: Settings) -> None:
        """Checks that an account may read the files of a repository, which may be gated.

        Raises:
            HTTPError: there is no account (401), or it has no access (403), as on the public hub.
        """
        if not settings.gated or (
            account is not None and (account.write or account.name in settings.granted)
        ):
            return
        raise HTTPError(
            403 if account else 401, "GatedRepo", "Access to this model is restricted: ask its owner for it"
        )

    def sign(self, what: str, size: int) -> str:
        """Returns the query of a URL to which exactly these bytes may be uploaded for some hours; ``what`` is
        a SHA-256, or names a part.
        """
        until = int(time.time()) + _VALID_SECONDS
        return f"size={size}&until={until}&signature={self._signature(what, size, until)}"

    def require_signed(self, what: str, query: Mapping[str, str]) -> int:
        """Checks the signature in the query of an upload URL and returns the signed size.

        Raises:
            HTTPError: this hub did not sign the URL, or the URL has expired.
        """
        size, until, signature = (query.get(key, "") for key in ("size", "until", "signature"))
        if not (
            _NUMBER.fullmatch(size)
            and _NUMBER.fullmatch(until)
            and _SHA256.fullmatch(signature)
            and hmac.compare_digest(self._signature(what, int(size), int(until)), signature)
        ):
            raise HTTPError(403, "Forbidden", "The address was not given out by this hub")
        if int(until) < time.time():
            raise HTTPError(403, "Forbidden", "The address has expired")
        return int(size)

    def _signature(self, what: str, size: int, until: int) -> str:
        return hmac.new(self.secret, f"{what} {size} {until}".encode(), hashlib.sha256).hexdigest()
