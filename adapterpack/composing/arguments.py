"""Checks the arguments of a composition: the weights, the new pack's name and the base model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base import Checkpoint
from ..base.renamings import find
from ..errors import ConfigError, NothingToDo, Unsupported
from ..pack import Pack, match_layers, move_paths, named_on, weights_of
from ..paths import StrPath
from .rules.rule import Arguments, Rule

BySite = Mapping[str, Mapping[str, Sequence[float]]]
"""Site -> ``weight``, or a parameter that packs may have for themselves -> a number for each pack."""
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


def check_by_site(by_site: BySite, packs: Sequence[Pack], rule: Rule, arguments: Arguments) -> None:
    """Checks the values that packs have at single sites.

    Raises:
        ConfigError: a site that no pack changes, a value that is not one for each pack, or one that the rule
            does not take pack by pack; the rule searches for weights, or measures the whole adapter.
    """
    if rule.search or arguments.get("scope") == "adapter":
        raise ConfigError(
            "the rule looks at all sites together, and these values differ from site to site",
            where=f"rule {rule.name}",
            expected="weights of its own" if rule.search else "scope=tensor",
            found="by_site",
            remedy="leave by_site out" if rule.search else "give the parameter scope=tensor",
        )
    paths = {group.path for pack in packs for group in pack.manifest.adapter_groups}
    names = ("weight", *rule.each)
    for path, values in by_site.items():
        for name, numbers in values.items():
            if path not in paths or name not in names or len(numbers) != len(packs):
                raise ConfigError(
                    "these are not the values of packs at a site",
                    where=f"by_site, {path}, {name}",
                    expected=f"a site of the packs, {' or '.join(names)}, and {len(packs)} numbers",
                    found=numbers,
                    remedy="correct by_site",
                )
            for number in numbers:
                weights_of(packs[:1], [number], 1.0) if name == "weight" else rule.arguments(
                    {**arguments, name: number}
                )


def chosen_name(name: str | None, out: StrPath | None, rule: str, parents: Sequence[Pack]) -> str:
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


def opened_base(base: StrPath | None, packs: Sequence[Pack]) -> tuple[Checkpoint | None, list[Pack]]:
    """Opens the base checkpoint and checks by names, shapes and samples that all packs were made for it.
    Returns the checkpoint, and the packs with their layers under the names that the checkpoint uses, and that
    the first pack uses.

    Raises:
        BaseMismatch, SiteNotFound: a pack was made for another base.
    """
    if base is None:
        return None, _named_alike(packs)
    checkpoint = Checkpoint(base)
    for pack in packs:
        pack.require_base(checkpoint, content=False)
    return checkpoint, _named_alike([match_layers(named_on(pack, checkpoint), checkpoint) for pack in packs])


def _named_alike(packs: Sequence[Pack]) -> list[Pack]:
    """Returns the packs; one that has no site under a name of the first pack gets the first pack's names:
    models with and without a head differ by a prefix (``bert.``).
    """
    names = {group.path: group.path for group in packs[0].manifest.adapter_groups}
    alike = []
    for pack in packs:
        paths = [group.path for group in pack.manifest.adapter_groups]
        found = {path: find(path, names) for path in paths} if names.keys().isdisjoint(paths) else {}
        alike.append(move_paths(pack, {path: place for path, place in found.items() if place is not None}))
    return alike
