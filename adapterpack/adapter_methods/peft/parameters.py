"""Reads and writes PEFT's LoRA of bare parameters (``target_parameters``): which parameter a tensor changes,
and how a stack's factors are stored.

PEFT wraps the module that owns the parameters once for each parameter that the adapter changes, in the order
in which the module registered them. It names its tensors by the wrappers: ``experts.lora_A`` for the
outermost and ``experts.base_layer.lora_A`` for the next inner one. The names of the parameters occur only in
the config, so the shapes of the base's parameters must tell which wrapper belongs to which parameter. The
factors of a stack of n matrices are stored side by side: A is ``[n r, in]`` with the rows of one expert
together, B is ``[out, r n]`` with the columns of the experts interleaved. Unsloth before September 2026
trained with the columns of one expert together; a folder may say so (``lora_B_layout``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np

from ...errors import Unsupported, excerpt
from ..core.config import ends
from ..core.layouts import is_stacked
from ..core.peft_form import WITH_BASE, PeftConfig, PeftContent
from ..core.site import Arrays, Params, Shape, Site, Tensors, shapes_of

KEY = "target_parameters"
WRAPPED = ".base_layer"
_INTERLEAVED, _GROUPED = "rank_major", "grouped_by_expert"
_DETAIL, _LAYOUT = "unsloth_fused_expert_lora", "lora_B_layout"
_MOST, _LONGEST = 1024, 1024
"""Limits on the number of names in a config and on the length of a name."""
_MOST_OF_A_MODULE = 6
"""The most parameters of one module whose order is searched for, because the search tries every
permutation.
"""


def targeted_parameters(content: PeftContent) -> PeftContent:
    """Moves the sites that are parameters to the parameters' own paths; module sites stay as they are.

    Raises:
        Unsupported: the file leaves open which parameter a tensor changes, and the base is missing or does
            not decide it either.
        ValueError: the names are malformed, or the tensors are not those of stacks.
    """
    names = names_in(content.written)
    if content.packed or not names:
        return content
    levels: dict[str, list[str]] = {}
    # innermost wrapper first: it belongs to the parameter that the module registered first
    for path in sorted(content.sites, key=len, reverse=True):
        levels.setdefault(unwrap(path), []).append(path)
    sites, kinds = dict(content.sites), dict(content.kinds)
    for owner, wrappers in levels.items():
        candidates = named_at(owner, names, content.written)
        if not candidates:
            continue
        factors = [sites.pop(path) for path in wrappers]
        if any(params.keys() != {"lora_A", "lora_B"} for params in factors):
            raise ValueError(f"the tensors of {owner} do not pair up")
        for name, params in zip(_in_order(owner, candidates, factors, content), factors, strict=True):
            shape = None if content.base is None else content.base.shape(name)
            grouped = _is_grouped(content.written, name)
            kinds[name], sites[name] = _site(name, params, content.config.at(name).r, shape, grouped)
    return content._replace(sites=sites, kinds=kinds)


def names_in(config: PeftConfig) -> list[str]:
    """Returns the parameter names in a config, sorted, because PEFT writes them as a set.

    Raises:
        ValueError: the value is not a list of names, or the list is too long.
    """
    names = config.get(KEY) or []
    if (
        not isinstance(names, list)
        or len(names) > _MOST
        or not all(isinstance(name, str) and 0 < len(name) <= _LONGEST for name in names)
    ):
        raise ValueError(f"{KEY} must be a list of at most {_MOST} names, not {names!r:.80}")
    return sorted(set(names))


def unwrap(path: str) -> str:
    """Removes PEFT's wrappers from a module path.

    Example:
        >>> unwrap("layers.0.experts.base_layer.base_layer")
        'layers.0.experts'
    """
    while path.endswith(WRAPPED):
        path = path.removesuffix(WRAPPED)
    return path


def named_at(owner: str, names: Iterable[str], config: PeftConfig) -> list[str]:
    """Returns the paths of the parameters that these names may mean in the module ``owner``; none if the
    config targets the module itself.

    Example:
        >>> named_at("layers.0.experts", ["experts.up", "0.experts.down", "gate.weight"],
        ...     {"target_modules": ["q_proj"]})
        ['layers.0.experts.up', 'layers.0.experts.down']
    """
    modules = config.get("target_modules")
    if isinstance(modules, list) and any(end in modules for end in ends(owner)):
        return []
    owners = {"", *ends(owner)}
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in names if name.rpartition(".")[0] in owners)
    return [f"{owner}.{leaf}" for leaf in leaves]


def _in_order(
    owner: str, candidates: Sequence[str], factors: Sequence[Tensors], content: PeftContent
) -> Sequence[str]:
    """Returns the parameter that each pair of factors belongs to: the only order of the candidates whose
    shapes fit.
    """
    if content.base is None:
        if len(candidates) == len(factors) == 1:
            return candidates
        raise Unsupported(
            "this file does not say which of a module's parameters its tensors change, the base does",
            where=owner,
            found=", ".join(name.rpartition(".")[2] for name in candidates)[:200],
            expected="the base",
            remedy=WITH_BASE,
        )
    shapes = {name: shape for name in candidates if (shape := content.base.shape(name)) is not None}
    if len(shapes) != len(factors):
        there = ", ".join(shapes) or "none"
        missing = ", ".join(name for name in candidates if name not in shapes) or "any"
        raise Unsupported(
            "the base has other parameters of this module than the file has tensors for",
            where=owner,
            expected=f"{len(factors)} parameters",
            found=f"{there}; without {missing}"[:300],
            remedy="name the base that the adapter was trained on",
        )
    if len(shapes) > _MOST_OF_A_MODULE:
        raise Unsupported(
            "too many parameters of one module are changed",
            where=owner,
            expected=f"at most {_MOST_OF_A_MODULE}",
            found=len(shapes),
            remedy="merge this adapter with the library that made it",
        )
    ranks = {name: content.config.at(name).r for name in shapes}
    fitting = [
        order
        for order in permutations(shapes)
        if all(_fits(shapes[name], ranks[name], pair) for name, pair in zip(order, factors, strict=True))
    ]
    if len(fitting) == 1:
        return fitting[0]
    problem, remedy = (
        (
            "the shapes of the base do not tell which of a module's parameters the tensors change",
            "merge this adapter with the library that made it",
        )
        if fitting
        else ("the tensors fit no parameters of this module", "name the base that the adapter was trained on")
    )
    raise Unsupported(
        problem,
        where=owner,
        expected=", ".join(map(str, shapes.items()))[:300],
        found=", ".join(str(shapes_of(pair)) for pair in factors)[:300],
        remedy=remedy,
    )


def _fits(shape: Shape, rank: int, factors: Tensors) -> bool:
    """Returns whether the factors fit a parameter of this ``shape``, in its stored layout or transposed."""
    A, B = factors["lora_A"], factors["lora_B"]
    if len(shape) not in (2, 3) or A.ndim != 2 or B.ndim != 2:
        return False
    count = shape[0] if len(shape) == 3 else 1
    width = (B.shape[0], A.shape[1])
    return A.shape[0] == B.shape[1] == rank * count and (
        width == shape[-2:] or (len(shape) == 3 and width == shape[:0:-1])
    )


def _is_grouped(config: PeftConfig, name: str) -> bool:
    """Whether the columns of a parameter's B that belong to one expert lie together.

    Raises:
        Unsupported: Unsloth wrote the folder and does not say it, or the order is not known.

    Example:
        >>> _is_grouped({"lora_B_layout": "grouped_by_expert"}, "experts.up")
        True
    """
    mapping = config.get("auto_mapping")
    places = ((_DETAIL, "parameters", name.rpartition(".")[2], _LAYOUT), (_LAYOUT,))
    stated = [
        found for holder in (config, mapping) for keys in places if (found := _at(holder, *keys)) is not None
    ]
    if not stated and not _at(mapping, "unsloth_fixed"):
        return False
    layout = stated[0] if stated else None
    if layout not in (_INTERLEAVED, _GROUPED):
        raise Unsupported(
            "the order of the experts' factors is not known: it is PEFT's, or that of Unsloth before "
            "September 2026",
            where=f"adapter_config.json#/{_LAYOUT}, {name}",
            expected=f"{_INTERLEAVED} or {_GROUPED}",
            found=excerpt(layout),
            remedy=f"add {_LAYOUT} to the configuration: {_GROUPED} if unsloth-zoo before 17 September 2026 "
            f"trained it, else {_INTERLEAVED}",
        )
    return bool(layout == _GROUPED)


def _at(value: Any, *keys: str) -> Any:
    """Returns what lies in mappings under these keys, or None."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _site(name: str, params: Tensors, rank: int, shape: Shape | None, grouped: bool) -> tuple[str, Arrays]:
    """Returns the kind of a parameter and its factors, separated for each matrix of a stack; ``shape`` is the
    shape in the base, if available, and ``grouped`` the order of B's columns.
    """
    A, B = params["lora_A"], params["lora_B"]
    if A.ndim != 2 or B.ndim != 2 or not rank or len(A) != B.shape[1] or len(A) % rank or not len(A):
        raise ValueError(
            f"the factors {A.shape} and {B.shape} of {name} are not those of a stack, of rank {rank} each"
        )
    count = len(A) // rank
    if count == 1 and (shape is None or len(shape) == 2):
        return "parameter", {"lora_A": A, "lora_B": B}
    columns = (
        B.reshape(len(B), count, rank).transpose(1, 0, 2)
        if grouped
        else B.reshape(len(B), rank, count).transpose(2, 0, 1)
    )
    stack = {"lora_A": A.reshape(count, rank, -1), "lora_B": np.ascontiguousarray(columns)}
    turned = shape is not None and shape[1:] == (A.shape[1], len(B)) != (len(B), A.shape[1])
    return "turned_experts" if turned else "experts", stack


def to_peft_factors(site: Site, params: Params) -> Arrays:
    """Returns the factors of a parameter as PEFT stores them.

    Example:
        >>> factors = {"lora_A": np.zeros((3, 2, 5)), "lora_B": np.zeros((3, 7, 2))}
        >>> {name: value.shape for name, value in to_peft_factors(Site("up", 5, 7, "experts", stack=3),
        ...     factors).items()}
        {'lora_A': (6, 5), 'lora_B': (7, 6)}
    """
    A, B = np.asarray(params["lora_A"]), np.asarray(params["lora_B"])
    if not is_stacked(site.kind):
        return {"lora_A": A, "lora_B": B}
    return {
        "lora_A": A.reshape(-1, A.shape[-1]),
        "lora_B": np.ascontiguousarray(B.transpose(1, 2, 0)).reshape(B.shape[1], -1),
    }


def wrappers_of(paths: Iterable[str]) -> dict[str, str]:
    """Maps the path of each parameter that an adapter changes to the path of PEFT's wrapper; ``paths`` are in
    the order in which the modules registered them.

    Example:
        >>> wrappers_of(["experts.up", "experts.down", "gate.weight"])
        {'experts.down': 'experts', 'experts.up': 'experts.base_layer', 'gate.weight': 'gate'}
    """
    wrappers = {}
    counts = dict[str, int]()
    for path in reversed(list(paths)):
        owner = path.rpartition(".")[0]
        wrappers[path] = owner + counts.get(owner, 0) * WRAPPED
        counts[owner] = counts.get(owner, 0) + 1
    return dict(sorted(wrappers.items()))
