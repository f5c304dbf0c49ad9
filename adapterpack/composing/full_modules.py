"""Combines the fully trained modules of packs, such as a classification head, an embedding or a norm, by a
named policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace

from ..adapter_methods import Arrays
from ..errors import ConfigError, Unsupported, require_among
from ..io import FLOATS, dtype_name
from ..manifest import manifest as m
from ..pack import Pack
from .compatibility import SIDE_BY_SIDE, common_problem, common_task, common_type, list_labels

Modules = dict[str, Arrays]


class CombinedModules(NamedTuple):
    """The fully trained modules of the new pack, its task with the labels, and the problem type of its
    head.
    """

    task: m.PackTask
    modules: Modules
    problem: str


def apply_policy(policy: str, packs: Sequence[Pack], weights: Sequence[float]) -> CombinedModules:
    """Combines the packs' tasks and fully trained modules by a policy: ``average``, ``union`` or
    ``pick:NAME``.

    Raises:
        ConfigError: there is no such policy, or no pack of that name.
        Unsupported: the policy cannot be followed; the message says why.
    """
    if policy == "average":
        return _average(packs, weights)
    if policy == "union":
        return _unite(packs, weights)
    if policy.startswith("pick:"):
        return _pick(packs, policy.removeprefix("pick:"))
    raise ConfigError(
        "unknown policy for modules trained whole",
        where="whole",
        expected="average or union or pick:NAME",
        found=repr(policy),
        remedy="give one of them",
    )


def _average(packs: Sequence[Pack], weights: Sequence[float]) -> CombinedModules:
    """Averages modules of all packs under the weights; their labels must be the same."""
    return CombinedModules(common_task(packs), average(packs, weights), common_problem(packs))


def _pick(packs: Sequence[Pack], of: str) -> CombinedModules:
    """Returns the modules of the pack named ``of``, with its labels."""
    by_name = {pack.name: pack for pack in packs}
    unknown = "none of the packs has that name"
    expected = " or ".join(by_name)
    require_among(unknown, of, by_name, ConfigError, "whole", expected=expected)
    return CombinedModules(
        replace(common_type(packs), labels=by_name[of].manifest.task.labels),
        by_name[of].full(),
        by_name[of].manifest.problem,
    )


def _unite(packs: Sequence[Pack], weights: Sequence[float]) -> CombinedModules:
    """Averages heads with equal labels, and concatenates heads with different labels into one with all their
    outputs, in order.
    """
    sets: dict[tuple[str, ...] | None, list[int]] = {}
    for index, pack in enumerate(packs):
        if pack.full():
            sets.setdefault(pack.manifest.task.labels, []).append(index)
    if len(sets) < 2:
        return _average(packs, weights)
    named = [(labels, packs[members[0]].name) for labels, members in sets.items()]
    for labels, name in named:
        if labels is None:
            raise Unsupported(
                "heads are joined by their labels, and this pack names none",
                where=f"pack '{name}'",
                remedy="pick one: --whole pick:NAME (whole='pick:NAME')",
            )
    together = [label for labels, _ in named for label in labels or ()]
    if twice := {label for label in together if together.count(label) > 1}:
        raise Unsupported(
            "two heads have a label in common, and one output cannot be both of theirs",
            where=" and ".join(f"'{name}'" for _, name in named),
            found=list_labels(tuple(sorted(twice))),
            remedy="rename the labels of one, or pick one head: --whole pick:NAME (whole='pick:NAME')",
        )
    parts = [average([packs[i] for i in members], [weights[i] for i in members]) for members in sets.values()]
    sizes = [len(labels or ()) for labels in sets]
    paths = list(dict.fromkeys(path for part in parts for path in part))
    modules = {
        path: _join(path, [part.get(path) for part in parts], sizes, [name for _, name in named])
        for path in paths
    }
    return CombinedModules(
        replace(common_type(packs), labels=tuple(together)), modules, common_problem(packs)
    )


def _join(path: str, parts: Sequence[Arrays | None], sizes: Sequence[int], names: Sequence[str]) -> Arrays:
    """Joins one module over all label sets: concatenates tensors with a row for each label, and requires all
    other tensors to be equal.
    """
    present = [part for part in parts if part is not None]
    for name, part in zip(names, parts, strict=True):
        if part is None or part.keys() != present[0].keys():
            raise Unsupported(
                "a module that another pack trained whole is missing, or has other tensors",
                where=f"{path} in '{name}'",
                remedy="pick one: --whole pick:NAME (whole='pick:NAME')",
            )
    joined = {}
    for key in present[0]:
        values = [part[key] for part in present]
        if all(
            len(value.shape) and len(value) == size and value.shape[1:] == values[0].shape[1:]
            for value, size in zip(values, sizes, strict=True)
        ):
            joined[key] = np.concatenate(values, axis=0)
        elif all(np.array_equal(value, values[0]) for value in values):
            joined[key] = values[0]
        else:
            raise Unsupported(
                "only outputs of labels can stand side by side; this part of the heads, which comes "
                "before them, differs",
                where=f"{path}.{key} in " + " and ".join(f"'{name}'" for name in names),
                expected="one tensor in all packs, or a row for each label",
                found=" and ".join(str(list(value.shape)) for value in values),
                remedy="pick one head: --whole pick:NAME (whole='pick:NAME'), or serve the packs side by "
                "side in a bank bundle",
            )
    return joined


def average(packs: Sequence[Pack], weights: Sequence[float]) -> Modules:
    """Averages the fully trained modules of the packs, with the weights normalised to sum 1; float32.

    A module is a weight, not a change to one, so weights that do not sum to 1 would change its scale. The sum
    is computed in float64.

    Raises:
        Unsupported: a pack lacks a module or a tensor that another has, shapes differ, or the weights sum to
            0.
    """
    modules = comparable(packs)
    paths = list(modules[0]) if modules else []
    if not paths:
        return {}
    total = sum(weights)
    if abs(total) <= 1e-9 * sum(map(abs, weights)):
        raise Unsupported(
            "modules trained whole are averaged, and weights that sum to 0 have no average",
            where=", ".join(paths),
            expected="weights with a sum other than 0",
            found=", ".join(f"{weight:g}" for weight in weights),
            remedy="choose other weights, or train the adapters without these modules",
        )
    shares = [weight / total for weight in weights]
    return {
        path: {
            param: _mean(f"{path}.{param}", [module[path][param] for module in modules], shares)
            for param in modules[0][path]
        }
        for path in paths
    }


def comparable(packs: Sequence[Pack]) -> list[dict[str, Arrays]]:
    """Returns the fully trained modules of each pack after checking that all packs have the same modules and
    tensors.

    Raises:
        Unsupported: a pack lacks a module or a tensor that another has, or shapes differ.
    """
    modules = [pack.full() for pack in packs]
    paths = list(dict.fromkeys(path for module in modules for path in module))
    for pack, module in zip(packs, modules, strict=True):
        for path in paths:
            if path not in module:
                raise Unsupported(
                    "a module that another pack trained whole is missing",
                    where=pack.where,
                    expected=path,
                    found=", ".join(module) or "none",
                    remedy=SIDE_BY_SIDE,
                )
            expected, found = (
                {param: tuple(value.shape) for param, value in full.items()}
                for full in (modules[0][path], module[path])
            )
            if expected != found:
                raise Unsupported(
                    "a module trained whole has other tensors in another pack",
                    where=f"{path} in '{packs[0].name}' and '{pack.name}'",
                    expected=expected,
                    found=found,
                    remedy=SIDE_BY_SIDE,
                )
    return modules


def _mean(where: str, values: Sequence[np.ndarray], shares: Sequence[float]) -> np.ndarray:
    if any(dtype_name(value.dtype) not in FLOATS for value in values):
        if any(not np.array_equal(value, values[0]) for value in values):
            raise Unsupported(
                "whole numbers that differ between packs have no average", where=where, remedy=SIDE_BY_SIDE
            )
        return values[0]
    total = np.zeros(values[0].shape, np.float64)
    for value, share in zip(values, shares, strict=True):
        total += share * value.astype(np.float64)
    return total.astype(np.float32)
