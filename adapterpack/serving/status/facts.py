"""What a pack is, in the words that somebody looks for who has to choose one: method, rank, where it acts,
size.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from ...pack.inspect import summary
from ...pack.pack import Pack


class Facts(msgspec.Struct, frozen=True):
    """A pack: its method, the smallest and the largest rank of its sites, how many sites there are, in which
    modules, and its bytes.
    """

    method: str
    ranks: tuple[int, int] | None
    sites: int
    modules: list[str]
    bytes: int


class KnownFacts:
    """The facts of packs, looked up once for each digest. Any thread may ask."""

    def __init__(self) -> None:
        self._by_digest: dict[str, Facts] = {}

    def of(self, pack: Pack) -> Facts:
        """The facts of a pack."""
        facts = self._by_digest.get(pack.id) or _facts(pack)
        self._by_digest[pack.id] = facts
        return facts

    def keep(self, digests: Collection[str]) -> None:
        """Forgets those of other packs."""
        for digest in set(self._by_digest) - set(digests):
            self._by_digest.pop(digest, None)


def _facts(pack: Pack) -> Facts:
    said = summary(pack)
    ranks = [group.rank for group in pack.manifest.groups if group.rank is not None]
    whole = [path.rpartition(".")[2] for path in said["modules_to_save"]]
    modules = list(dict.fromkeys([*said["sites_by_module"], *whole]))
    return Facts(
        " + ".join([said["method"], *said.get("beside", ())]),
        (min(ranks), max(ranks)) if ranks else None,
        said["sites"],
        modules,
        said["bytes"],
    )
