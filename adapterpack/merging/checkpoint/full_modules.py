"""Decides which tensors of the output the fully trained modules of packs, such as a classifier head,
become.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from ...adapter_methods import Arrays, Tensors
from ...base import Checkpoint, in_memory, module_parameter
from ...errors import SiteNotFound, Unsupported
from ...manifest import Group
from ...pack import Pack
from . import tied_weights, vocabulary


class FullModules(NamedTuple):
    """The tensors that fully trained modules become: ``replaced`` by the base's name, ``added`` by the
    output's name.

    ``prefix`` is put before all other output names, ``untied`` says that the output's embeddings are no
    longer tied, ``vocab_size`` is set if the vocabulary grew, and ``copies`` are additional tensors: new name
    -> the tensor of the base that it starts from.
    """

    replaced: Tensors
    added: Tensors
    prefix: str
    untied: bool
    vocab_size: int | None = None
    copies: Mapping[str, str] = MappingProxyType({})


def resolve(
    base: Checkpoint,
    packs: Sequence[Pack],
    untie: bool = False,
    tables: Tensors = MappingProxyType({}),
) -> FullModules:
    """Returns the tensors that the fully trained modules of ``packs`` become in a checkpoint made from
    ``base``, including the extended ``tables``; with ``untie`` a tied head stays as it was if only the
    embedding was trained.

    Raises:
        Unsupported: two packs hold the same module, or the result could not be loaded as it was trained.
    """
    owner: dict[str, str] = {}
    replaced = dict(tables)
    added = {}
    prefixes = set()
    for pack in packs:
        groups = {group.path: group for group in pack.manifest.groups}
        full = pack.full()
        prefix = _prefix(base, pack) if full else ""
        for path, params in full.items():
            if path in owner:
                raise Unsupported(
                    "two packs hold this module trained whole, and two of it cannot be one",
                    where=path,
                    found=f"'{owner[path]}' and '{pack.name}'",
                    remedy="merge only one of them",
                )
            owner[path] = pack.name
            for param, value in params.items():
                name = _base_name(base, groups[path], param, prefix)
                tied = name is not None and name == base.tied_to(path)
                if name is None and param == "weight" and groups[path].weight is not None:
                    raise SiteNotFound(
                        "the base lacks the tensor that the pack names for this module",
                        where=f"pack '{pack.name}', {path}",
                        expected=groups[path].weight,
                        remedy="merge into the checkpoint that the pack names",
                    )
                if name is None or tied:
                    # A tied head that was trained gets a table of its own.
                    added[f"{path}.{param}"] = value
                    prefixes.add(prefix)
                elif name in tables:
                    raise Unsupported(
                        "one pack holds this table trained whole, another trained words of it",
                        where=name,
                        remedy="merge only one of the two",
                    )
                else:
                    _require_replaceable(base, pack, name, value)
                    replaced[name] = value
    if len(prefixes) > 1:
        raise Unsupported(
            "the packs add modules to different task models",
            where=", ".join(sorted(owner)),
            found=f"names under {sorted(prefixes)}",
            remedy="merge only one of them",
        )
    vocab_size = vocabulary.extended_vocab_size(base, replaced)
    copies = _tie(base, replaced, added, vocab_size, untie)
    untied = _tied(base) and any(_is_output_head(base, value, vocab_size) for value in added.values())
    return FullModules(replaced, added, next(iter(prefixes), ""), untied or bool(copies), vocab_size, copies)


def _tie(
    base: Checkpoint,
    replaced: Tensors,
    added: Arrays,
    vocab_size: int | None,
    untie: bool,
) -> dict[str, str]:
    """Handles a tied embedding that was fully trained: the head is equal to it (and then not a separate
    tensor), was trained too, grew with it, or with ``untie`` stays what it was.

    Raises:
        Unsupported: none of these holds.
    """
    tables = [
        name
        for name, value in replaced.items()
        if _tied(base)
        and base.tensors[name].shape[:1] == (base.config.get("vocab_size"),)
        and value.ndim == 2
    ]
    for name in tables:
        heads = [head for head, value in added.items() if _is_output_head(base, value, vocab_size)]
        same = [head for head in heads if not untie and np.array_equal(added[head], replaced[name])]
        for head in same:
            del added[head]
        if not heads and vocab_size is None:
            if untie:
                return {tied_weights.head_of(base, name): name}
            raise Unsupported(
                "this tensor is the input embedding and the output head at once, and only one of them "
                "was trained",
                where=f"{base.where}, {name}",
                remedy=(
                    "merge with --untie (untie=True), which writes a head of its own, or keep the adapter "
                    "unmerged"
                ),
            )
    return {}


def _prefix(base: Checkpoint, pack: Pack) -> str:
    """Returns the prefix of the task model's module paths before the base's tensor names, derived from the
    sites in both; often empty.
    """
    prefixes = set()
    for group in pack.manifest.adapter_groups:
        weight = base.require_weight(group.path, group.weight)
        module = in_memory(weight, base.renamings).removesuffix(".weight")
        prefixes.add(group.path.removesuffix(module) if group.path.endswith(f".{module}") else "")
    if len(prefixes) > 1:
        raise Unsupported(
            "the sites do not agree on how the task model's names differ from the base's",
            where=pack.where,
            found=sorted(prefixes),
            remedy="keep the adapter unmerged",
        )
    return next(iter(prefixes), "")


def _base_name(base: Checkpoint, group: Group, param: str, prefix: str) -> str | None:
    """Returns the base's tensor for one parameter of a fully trained module, or None if the base has none."""
    candidates = [f"{group.path}.{param}", f"{group.path.removeprefix(prefix)}.{param}"]
    if group.weight is not None:
        candidates.insert(0, module_parameter(group.weight, param))
    return next((name for name in candidates if name in base.tensors), None) or base.renamed_name(
        f"{group.path}.{param}"
    )


def _require_replaceable(base: Checkpoint, pack: Pack, name: str, value: np.ndarray) -> None:
    shape = base.tensors[name].shape
    if (
        shape != value.shape
        and not pack.manifest.task.labels
        and not vocabulary.adds_words(base, name, value)
    ):
        raise Unsupported(
            "a module that was trained whole has another shape in the base",
            where=f"pack '{pack.name}', {name}",
            expected=shape,
            found=value.shape,
            remedy="keep the adapter unmerged",
        )


def _tied(base: Checkpoint) -> bool:
    return bool(base.config.get("tie_word_embeddings"))


def _is_output_head(base: Checkpoint, value: np.ndarray, vocab_size: int | None) -> bool:
    """Whether a tensor has one row for each word of the vocabulary."""
    return value.ndim == 2 and value.shape[0] == (vocab_size or base.config.get("vocab_size"))
