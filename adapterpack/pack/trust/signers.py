"""Requires that a pack was signed by a trusted key before a runtime loads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import WronglySigned
from ..pack import Pack
from .keys import public_key
from .sign import verify


class Signers:
    """The public keys, in PEM files, of the people trusted to sign packs; without keys, packs need no
    signature.

    Raises:
        ConfigError, StorageError: a file contains no public key.
    """

    def __init__(self, keys: Sequence[Path] = ()) -> None:
        self._keys = tuple(keys)
        for key in self._keys:
            public_key(key)

    def require(self, pack: Pack) -> None:
        """Checks that a trusted key signed this pack, or the fleet that it was taken from.

        Raises:
            TrustError: none of the keys signed it, or the signature has expired.
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
