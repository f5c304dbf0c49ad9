"""Reads, writes and repeats recipes: a recipe says how a pack was composed, and the same packs always give
the same bytes.

A recipe comes from the lineage of a composed pack, which records everything. It names packs by digest and
statistics files by sha256 and contains no paths, so it can be published with the pack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ..adapter_methods.nodes.composed import NAME as TREE
from ..errors import ConfigError, FormatError
from ..io import Json, Progress, open_regular, output_file, read_at_most
from ..io.strict_json import canonical, loads
from ..library_errors import library_errors
from ..manifest import Parent
from ..manifest.structs import PackName
from ..pack import Pack, load
from ..paths import StrPath
from .assemble import assemble
from .rules.rule import RULES, Arguments
from .statistics import Statistics
from .statistics import read as read_statistics
from .steps import CompositionRequest, compose_by_rule

FORMAT = "adapterpack-recipe-1"
_LIMIT = 1 << 20
_OPTIONS = ("rank", "energy", "budget", "whole", "by_site")
_MOST_PARENTS = 10_000


@dataclass(frozen=True)
class CompositionRecipe:
    """Says how to compose the pack ``name`` from ``parents``: by a rule with its parameters, or by a
    ``tree``; ``options`` are rank, energy, budget, whole and by_site. ``statistics`` are the digests of their
    files, ``result`` the digest of the pack.

    Example:
        >>> parents = (Parent("sha256:" + "0" * 64, "a", 0.5),)
        >>> CompositionRecipe("both", parents, rule="linear").to_json()["rule"]
        'linear'
    """

    name: str
    parents: tuple[Parent, ...]
    rule: str | None = None
    tree: Mapping[str, Any] | None = None
    params: Arguments = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    statistics: tuple[str, ...] = ()
    result: str | None = None

    def to_json(self) -> Json:
        """Returns the recipe as a JSON value."""
        return {
            "format": FORMAT,
            "name": self.name,
            "rule": self.rule,
            "tree": self.tree,
            "params": dict(self.params),
            **self.options,
            "seed": self.seed,
            "parents": [msgspec.structs.asdict(parent) for parent in self.parents],
            "statistics": list(self.statistics),
            "result": self.result,
        }

    def write(self, out: StrPath) -> None:
        """Writes the recipe atomically."""
        with output_file(out, renews=FORMAT.encode()) as file:
            file.write_bytes(canonical(self.to_json()))


def recipe_of(pack: Pack) -> CompositionRecipe:
    """Returns the recipe of a composed pack.

    Raises:
        ConfigError: the pack was not composed, or was composed from statistics that were never saved to a
            file.
    """
    lineage = pack.manifest.lineage
    if lineage is None or (lineage.operation not in RULES and pack.manifest.composition is None):
        raise ConfigError(
            "this pack was not composed, so there is no recipe for it",
            where=pack.where,
            found="no lineage" if lineage is None else lineage.operation,
            remedy="name a recipe, or a pack that compose made",
        )
    result = pack.id
    params = dict(lineage.params)
    if pack.manifest.composition is not None:
        return CompositionRecipe(
            pack.manifest.pack.name,
            lineage.parents,
            tree=pack.manifest.composition.tree,
            seed=int(params.get("seed", 0)),
            result=result,
        )
    parameters = RULES[lineage.operation].parameters
    statistics = params.get("statistics") or ()
    if not all(isinstance(digest, str) for digest in statistics):
        raise ConfigError(
            "the statistics of this pack are in no file", where=pack.where, remedy="write them to files first"
        )
    return CompositionRecipe(
        pack.manifest.pack.name,
        lineage.parents,
        lineage.operation,
        None,
        {name: value for name, value in params.items() if name in parameters},
        {name: params[name] for name in _OPTIONS if name in params},
        0,
        tuple(statistics),
        result,
    )


def read(source: StrPath) -> CompositionRecipe:
    """Reads a recipe from its file, or from the folder of a composed pack.

    Raises:
        FormatError: the file is not a recipe.
        StorageError: it cannot be read.
        ConfigError: the pack was not composed.
    """
    path = Path(source)
    if path.is_dir():
        return recipe_of(load(path))
    with open_regular(path) as opened:
        data = read_at_most(opened, _LIMIT + 1)
    value = loads(data, path, _LIMIT)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise FormatError(
            "this is not a recipe",
            where=path,
            expected=FORMAT,
            found=str(value.get("format") if isinstance(value, dict) else type(value).__name__)[:80],
            remedy="write one with compose --write-recipe, or name a composed pack",
        )
    with library_errors(
        "msgspec", "the recipe is malformed", where=path, remedy="write it again with compose --write-recipe"
    ):
        file = msgspec.convert(value, _File)
    return file.recipe()


class _File(msgspec.Struct, forbid_unknown_fields=True):
    """The fields of a recipe's file."""

    format: str
    name: PackName
    parents: Annotated[tuple[Parent, ...], msgspec.Meta(min_length=1, max_length=_MOST_PARENTS)]
    rule: str | None = None
    tree: Any = None
    params: dict[str, Any] = {}
    rank: int | None = None
    energy: float | None = None
    budget: float | None = None
    whole: str | None = None
    by_site: dict[str, dict[str, list[float]]] | None = None
    seed: int = 0
    statistics: Annotated[tuple[str, ...], msgspec.Meta(max_length=_MOST_PARENTS)] = ()
    result: str | None = None

    def __post_init__(self) -> None:
        if (self.rule is None) == (self.tree is None):
            raise ValueError("a recipe has either a rule or a tree")

    def recipe(self) -> CompositionRecipe:
        """Returns the recipe."""
        options = {name: value for name in _OPTIONS if (value := getattr(self, name)) is not None}
        return CompositionRecipe(
            self.name,
            self.parents,
            self.rule,
            self.tree,
            self.params,
            options,
            self.seed,
            self.statistics,
            self.result,
        )


def repeat(
    recipe: CompositionRecipe | StrPath,
    packs: Sequence[Pack],
    *,
    base: StrPath | None = None,
    statistics: Sequence[Statistics | StrPath] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> Pack:
    """Composes the pack of a recipe again from its parents, and checks by its digest that it is the same.

    The name is part of the digest, so the comparison uses the name in the recipe even if ``name`` differs.

    Raises:
        FormatError: a parent is missing, a pack is not among the parents, the statistics differ, or the
            resulting pack has another digest.
    """
    recipe = recipe if isinstance(recipe, CompositionRecipe) else read(recipe)
    parents = _match_packs(recipe, packs)
    if recipe.tree is not None:
        made = assemble(parents, recipe.tree, recipe.name, recipe.seed)
    else:
        weights = tuple(parent.weight for parent in recipe.parents if parent.weight is not None)
        request = CompositionRequest(recipe.rule or TREE, weights or None, recipe.params, **recipe.options)
        measured = _match_statistics(recipe, statistics)
        made = compose_by_rule(parents, request, recipe.name, base, measured, progress=progress)
    if recipe.result is not None and made.id != recipe.result:
        raise FormatError(
            "the same packs gave another result than the recipe says",
            where=f"recipe of '{recipe.name}'",
            expected=recipe.result,
            found=made.id,
            remedy="on another kind of processor, or with another numpy, the last bits may differ: set "
            "result to null in the recipe to accept that",
        )
    return made if name is None or name == recipe.name else made.renamed(name)


def _match_packs(recipe: CompositionRecipe, packs: Sequence[Pack]) -> list[Pack]:
    """Returns the packs in the order of the recipe, under the names that the recipe gives them."""
    by_digest = {pack.id: pack for pack in packs}
    wanted = {parent.digest: parent for parent in recipe.parents}
    for digest, parent in wanted.items():
        if digest not in by_digest:
            raise FormatError(
                "a pack of the recipe is not among those given",
                where=f"'{parent.name}'",
                expected=digest,
                found=", ".join(f"'{pack.name}' {pack.id[:23]}" for pack in packs) or "none",
                remedy="give the very packs that the recipe names",
            )
    for pack in packs:
        if pack.id not in wanted:
            raise FormatError(
                "a pack is none of the recipe's",
                where=pack.where,
                expected=", ".join(f"'{parent.name}' {parent.digest[:23]}" for parent in recipe.parents),
                found=pack.id,
                remedy="leave it out",
            )
    return [by_digest[parent.digest].called(parent.name) for parent in recipe.parents]


def _match_statistics(
    recipe: CompositionRecipe, statistics: Sequence[Statistics | StrPath] | None
) -> list[Statistics] | None:
    """Returns the statistics in the order of the recipe; their digests identify them."""
    loaded = [item if isinstance(item, Statistics) else read_statistics(item) for item in statistics or ()]
    by_digest = {item.digest: item for item in loaded}
    for digest in recipe.statistics:
        if digest not in by_digest:
            raise FormatError(
                "statistics of the recipe are not among those given",
                expected=digest,
                found=", ".join(map(str, by_digest)) or "none",
                remedy="give the very files that the recipe names",
            )
    return [by_digest[digest] for digest in recipe.statistics] or None
