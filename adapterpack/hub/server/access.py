"""Decides who may read and write: by tokens from a file, kept as digests, and by signed addresses for
uploads, which carry no token.
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
from ...http.http_error import HTTPError
from ...io.secret_files import require_private
from .storage import Settings

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
NAME = re.compile(_NAME)
_LINE = re.compile(rf"({_NAME})\s+(read|write)\s+(\S{{16,256}})")
_NUMBER = re.compile(r"[0-9]{1,15}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VALID_SECONDS = 6 * 3600


@dataclass(frozen=True)
class Account:
    """Who a token belongs to, and whether it may write."""

    name: str
    write: bool


@dataclass(frozen=True)
class Access:
    """The accounts by the sha256 of their tokens. Without a token, what is not private may be read."""

    accounts: Mapping[str, Account] = field(default_factory=dict)
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    @classmethod
    def from_file(cls, path: Path) -> Access:
        """Reads lines ``NAME read|write TOKEN``; empty lines and those that begin with # are left out.

        Raises:
            ConfigError: a line is something else, or others may read the file.
            StorageError: it cannot be read.
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
            accounts[_digest(match[3])] = Account(match[1], match[2] == "write")
        return cls(accounts)

    def account(self, authorization: str | None) -> Account | None:
        """Whose header this is; None for nobody's.

        Raises:
            HTTPError: there is a token, and it is none of ours.
        """
        scheme, _, token = (authorization or "").partition(" ")
        if not token:
            return None
        account = self.accounts.get(_digest(token.strip())) if scheme.lower() == "bearer" else None
        if account is None:
            raise HTTPError(401, "Unauthorized", "Invalid credentials in Authorization header")
        return account

    @staticmethod
    def require_writer(account: Account | None) -> None:
        """Lets by who may write.

        Raises:
            HTTPError: nobody, or one who may only read.
        """
        if account is None:
            raise HTTPError(401, "Unauthorized", "A token is needed")
        if not account.write:
            raise HTTPError(403, "Forbidden", "This token may only read")

    @staticmethod
    def require_granted(account: Account | None, settings: Settings) -> None:
        """Lets by who may have the files of a gated repository.

        Raises:
            HTTPError: nobody (401), or somebody who was not let in (403), as the public hub answers.
        """
        if not settings.gated or (
            account is not None and (account.write or account.name in settings.granted)
        ):
            return
        raise HTTPError(
            403 if account else 401, "GatedRepo", "Access to this model is restricted: ask its owner for it"
        )

    def sign(self, what: str, size: int) -> str:
        """The query of an address where these bytes, and no others, may be put for some hours; ``what`` is a
        sha256, or names a part.
        """
        until = int(time.time()) + _VALID_SECONDS
        return f"size={size}&until={until}&signature={self._signature(what, size, until)}"

    def require_signed(self, what: str, size: str, until: str, signature: str) -> int:
        """The size that was signed.

        Raises:
            HTTPError: the address is not one that was given out, or its time is over.
        """
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


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
