"""API keys: who may use a server, and what. Keys are stored as digests in a file that is reloaded when it
changes.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ...errors import ConfigError, excerpt, nearest, storage_errors
from ...http import HTTPError, ReloadingFile
from ...io import ClosedStruct, Misfit, require_private, sha256_of_text, typed_json

LEAST_CHARACTERS = 16
"""The least length of a key that an operator chooses."""
_MOST = 10**12
_MOST_BYTES = 64 << 20
"""The most bytes of a file of keys in JSON."""
_TIMES = 16
"""How many times larger than other YAML files a file of keys may be."""


class Key(ClosedStruct, omit_defaults=True):
    """One entry of a file of keys.

    Attributes:
        id: the holder's name, in logs and for fair scheduling.
        sha256: the key's digest, as hex. The key itself is never stored.
        adapters: the adapters that it may use, or ``"*"`` for all.
        base: whether it may use the base.
        expires: when it ends, RFC 3339.
        rank: keys with a smaller rank always go first.
        share: its share of the engine's tokens, relative to other keys of its rank.
        max_rows: the most rows that wait or run at a time.
        requests_per_minute: its rate of requests; after a pause it may send as many at once.
        tokens_per_minute: its rate of prompt and answer tokens; after a pause it may use as many at once.
        tokens_per_day: its tokens from midnight to midnight, UTC.
        admin: whether it may see data of all keys, such as metrics.
    """

    id: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    adapters: tuple[str, ...] | Literal["*"] = "*"
    base: bool = True
    expires: datetime | None = None
    rank: Annotated[int, Meta(ge=-100, le=100)] = 0
    share: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    max_rows: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    requests_per_minute: Annotated[int, Meta(ge=1, le=_MOST)] | None = None
    tokens_per_minute: Annotated[int, Meta(ge=1, le=_MOST)] | None = None
    tokens_per_day: Annotated[int, Meta(ge=1, le=_MOST)] | None = None
    admin: bool = False

    def breaches(self) -> Iterator[Misfit]:
        """Yields a misfit for a time without a zone."""
        if self.expires is not None and self.expires.tzinfo is None:
            yield Misfit("/expires", "a time needs its zone, as in 2027-01-31T00:00:00Z")

    def may(self, adapter: str | None) -> bool:
        """Returns whether it may use an adapter, or the base (None)."""
        return self.base if adapter is None else self.adapters == "*" or adapter in self.adapters

    @property
    def expired(self) -> bool:
        """Whether the key has expired."""
        return self.expires is not None and self.expires.timestamp() <= time.time()


class _File(ClosedStruct):
    keys: Annotated[tuple[Key, ...], Meta(max_length=100_000)]


EVERYBODY = Key(id="everybody", sha256="0" * 64, admin=True)
"""The key of all requests to a server without keys."""


class Keys:
    """The keys of a server: none, one, or those of a file, which :meth:`look` reloads when it has changed.

    A file that cannot be read may have had keys revoked, so after ``unread_seconds`` none of its keys is
    valid any more.
    """

    def __init__(
        self, keys: Sequence[Key] = (), path: Path | None = None, unread_seconds: float = 60.0
    ) -> None:
        self._keys = _by_digest(keys)
        self._most_unread = unread_seconds
        self._file = (
            None if path is None else ReloadingFile("keys", [path], lambda: _by_digest(read_keys(path)))
        )

    @classmethod
    def one(cls, key: str, name: str = "api-key") -> Keys:
        """Makes a single key for all, with the rights of an admin."""
        return cls([Key(id=name, sha256=sha256_of_text(key), admin=True)])

    @classmethod
    def one_in(cls, path: Path, name: str) -> Keys:
        """Reads the single key that a file contains in plain text.

        Raises:
            ConfigError: others may read the file, or it holds no single word of 16 characters or more.
            StorageError: the file cannot be read.
        """
        key = _private_bytes(path).decode("utf-8", "replace").strip()
        if len(key) < LEAST_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(
                "this file holds no key",
                where=path,
                expected=f"one word of {LEAST_CHARACTERS} characters or more",
                remedy="write one: openssl rand -hex 32",
            )
        return cls.one(key, name)

    async def look(self) -> None:
        """Reloads the file on another thread, if it has changed."""
        if self._file is not None:
            await self._file.look()

    @property
    def unread_seconds(self) -> float:
        """For how many seconds the file has been unreadable; 0 if it can be read."""
        return 0.0 if self._file is None else self._file.unread_seconds

    @property
    def counted(self) -> bool:
        """Whether keys are valid: the file was readable recently enough."""
        return self.unread_seconds <= self._most_unread

    @property
    def _known(self) -> Mapping[str, Key]:
        return self._keys if self._file is None else self._file.latest

    @property
    def needed(self) -> bool:
        """Whether requests need a key."""
        return self._file is not None or bool(self._keys)

    def missing(self, adapters: Collection[str]) -> Iterator[str]:
        """Yields a warning for each adapter that a key names and that is not among ``adapters``.

        Example:
            >>> key = Key(id="shop", sha256="0" * 64, adapters=("tickets", "review"))
            >>> list(Keys([key]).missing({"tickets", "reviews"}))  # doctest: +ELLIPSIS
            ["the key shop may ask for 'review', and no adapter is called so: did you mean 'reviews'? ..."]
        """
        for key in self._known.values():
            for name in () if key.adapters == "*" else key.adapters:
                if name not in adapters:
                    yield (
                        f"the key {key.id} may ask for {name!r}, and no adapter is called so: "
                        f"{nearest(name, adapters)}"
                    )

    def of(self, authorization: str | None) -> Key:
        """Returns the key of an ``Authorization`` header. It looks up the digest, so timing reveals nothing
        about how much of a key is right, and compares in constant time.

        Raises:
            HTTPError: the key is missing, unknown or expired, or the file has been unreadable for too long.
        """
        if not self.needed:
            return EVERYBODY
        if not self.counted:
            what = "the file of keys cannot be read: nobody is let in before it can be"
            raise HTTPError(503, "keys_unread", what, retry_after=10)
        scheme, _, given = (authorization or "").partition(" ")
        digest = sha256_of_text(given.strip())
        match = self._known.get(digest)
        known = match is not None and hmac.compare_digest(match.sha256, digest)
        if match is None or not known or match.expired or scheme.lower() != "bearer":
            what = (
                "this server needs a key: Authorization: Bearer KEY"
                if not given
                else "this key is not known, or its time is over"
            )
            raise HTTPError(401, "invalid_api_key", what)
        return match


def _by_digest(keys: Sequence[Key]) -> Mapping[str, Key]:
    return {key.sha256: key for key in keys}


def read_keys(path: Path) -> tuple[Key, ...]:
    """Reads the keys of a YAML or JSON file. Up to 100,000 keys in JSON, or about 30,000 in YAML, are read in
    seconds.

    Raises:
        ConfigError: the file has another form, two entries share an id or a digest, or other users may read
            the file.
        FormatError: the file begins like JSON but is not valid JSON.
        StorageError: the file cannot be read.
    """
    from ...io import plain_yaml, strict_json  # noqa: PLC0415 - the help of the command must not pay for it

    data = _private_bytes(path)
    is_json = data.lstrip().startswith(b'{"')
    read = (
        partial(strict_json.loads, limit=_MOST_BYTES) if is_json else partial(plain_yaml.loads, times=_TIMES)
    )
    value = read(data, path)
    try:
        keys = msgspec.convert(value, _File).keys
    except msgspec.ValidationError as error:
        pointer, message = typed_json.misfit(value, _File) or Misfit("", str(error))
        remedy = (
            'begin the file with the line "keys:", and put the entries below it'
            if isinstance(value, list)
            else None
        )
        raise ConfigError(
            f"this is not a file of keys: {message}",
            where=f"{path}#{pointer}",
            expected="keys: a list of id, sha256, ...",
            remedy=remedy,
        ) from error
    for key in keys:
        for pointer, message in key.breaches():
            raise ConfigError(message, where=f"{path}, {key.id}{pointer}")
    for name, values in (("id", [key.id for key in keys]), ("sha256", [key.sha256 for key in keys])):
        if len(set(values)) < len(values):
            raise ConfigError(f"two keys have the same {name}", where=path)
    return keys


def _private_bytes(path: Path) -> bytes:
    require_private(path)
    with storage_errors(path):
        return path.read_bytes()


def new_key(name: str) -> tuple[str, str]:
    """Returns a new key, and its entry for a file of keys with the id ``name``.

    Raises:
        ConfigError: no key can have that id.

    Example:
        >>> new_key("shop")[1]  # doctest: +ELLIPSIS
        '- {id: shop, sha256: ..., adapters: "*"}'
    """
    from ...io import plain_yaml  # noqa: PLC0415 - the help of the command must not pay for it

    key = f"ap-{secrets.token_urlsafe(32)}"
    try:
        msgspec.convert({"id": name, "sha256": sha256_of_text(key)}, Key)
    except msgspec.ValidationError as error:
        raise ConfigError(
            "a key cannot have this id",
            found=excerpt(name),
            expected="1 to 64 letters, digits, dots, hyphens and underscores, a letter or a digit first",
        ) from error
    read_back = plain_yaml.loads(f"[{name}]", "the id of a key")
    shown = name if read_back == [name] else repr(name)
    digest = sha256_of_text(key)
    return key, f'- {{id: {shown}, sha256: {digest}, adapters: "*"}}'
