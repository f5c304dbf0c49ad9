"""Holds what cannot repeat blocks of a base away from adapters that do."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import Unsupported
from ..manifest.described import Described


def common_repeats(packs: Iterable[Described]) -> tuple[int, ...]:
    """The ranges of blocks that all packs are of, start and end in turn; none where the blocks are the base's
    own.

    Raises:
        Unsupported: they differ.
    """
    by_repeats = {pack.repeats: pack.name for pack in packs}
    if len(by_repeats) > 1:
        raise Unsupported(
            "the packs are of different stacks of blocks: one repeats blocks of the base otherwise than "
            "another",
            where=", ".join(map(repr, by_repeats.values())),
            found="; ".join(str(ends or "none") for ends in by_repeats),
            remedy="take packs of one stack",
        )
    return next(iter(by_repeats), ())


def require_own_blocks(packs: Iterable[Described], what: str, remedy: str = "") -> None:
    """Goes on only if no pack repeats blocks of its base.

    Raises:
        Unsupported: one does; ``what`` cannot hold it.
    """
    for pack in packs:
        if pack.repeats:
            raise Unsupported(
                f"the adapter repeats blocks of its base (PEFT's layer_replication), which {what} cannot say",
                where=f"pack '{pack.name}'",
                found=str(pack.repeats),
                remedy=remedy
                or "merge it: adapterpack merge BASE PACK -o OUT writes the repeated blocks out",
            )
