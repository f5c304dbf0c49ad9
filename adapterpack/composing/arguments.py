"""Checks the arguments of a composition: the weights, the new pack's name and the base model."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base.checkpoint import Checkpoint
from ..errors import ConfigError, NothingToDo, Unsupported
from ..pack.layer_kinds import match_layers
from ..pack.lineage import weights_of
from ..pack.on_base import named_on
from ..pack.pack import Pack

MAX_PARENTS = 64
"""The most parents that a manifest can name."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def checked_weights(packs: Sequence[Any], weights: Sequence[float] | None, unit: bool = False) -> list[float]:
    """Returns one finite weight for each pack: by default equal weights of sum 1, or 1 each with ``unit``.

    Raises:
        NothingToDo, Unsupported: there are no packs, or too many.
        ConfigError: the number of weights is not that of the packs, or a weight is not finite.
    """
    if not packs:
        raise NothingToDo("there are no packs to compose", remedy="name at least one pack")
    if len(packs) > MAX_PARENTS:
        raise Unsupported(
            "too many packs for one composition",
            expected=f"at most {MAX_PARENTS}",
            found=len(packs),
            remedy="compose in two steps",
        )
    return weights_of(packs, weights, 1.0 if unit else 1 / len(packs))


def chosen_name(
    name: str | None, out: str | os.PathLike[str] | None, rule: str, parents: Sequence[Pack]
) -> str:
    """Returns ``name`` if it is set, else the name of the folder ``out``, else a name made of the rule and
    the packs.

    Raises:
        ConfigError: the name is not valid for a pack.
    """
    chosen = name or (
        Path(out).name if out is not None else "-".join([rule, *(parent.name for parent in parents)])[:128]
    )
    if not _NAME.fullmatch(chosen):
        raise ConfigError(
            "a pack's name holds letters, digits, dots, dashes and underscores only",
            where="name",
            expected="at most 128 of them, beginning with a letter or a digit",
            found=repr(chosen),
            remedy="give another name",
        )
    return chosen


def opened_base(
    base: str | os.PathLike[str] | None, packs: Sequence[Pack]
) -> tuple[Checkpoint | None, list[Pack]]:
    """Opens the base checkpoint and checks by names, shapes and samples that all packs were made for it.
    Returns the checkpoint, and the packs with their layers under the names that the checkpoint uses.

    Raises:
        BaseMismatch, SiteNotFound: a pack was made for another base.
    """
    if base is None:
        return None, list(packs)
    checkpoint = Checkpoint(base)
    for pack in packs:
        pack.require_base(checkpoint, content=False)
    return checkpoint, [match_layers(named_on(pack, checkpoint), checkpoint) for pack in packs]
