"""Whose signature a pack needs before it is loaded into what runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import WronglySigned
from ..pack import Pack
from .keys import public_key
from .sign import verify


class Signers:
    """The public keys of those who may vouch for a pack, in PEM files; without any, nobody needs to.

    Raises:
        ConfigError, StorageError: a file holds no public key.
    """

    def __init__(self, keys: Sequence[Path] = ()) -> None:
        self._keys = tuple(keys)
        for key in self._keys:
            public_key(key)

    def require(self, pack: Pack) -> None:
        """Checks that one of them signed this very pack, or what it was taken out of.

        Raises:
            TrustError: none of them did, or the signature's time is over.
        """
        for number, key in enumerate(self._keys, 1):
            try:
                if pack.vouched is None:
                    verify(pack, key)
                else:
                    pack.vouched(key)
                return
            except WronglySigned:
                if number == len(self._keys):
                    raise
