"""Writes compositions as mergekit configurations where mergekit's formula is the same, and otherwise says why
not.

mergekit merges full models: it takes ``base+adapter`` minus ``base`` as the change, and writes a full
checkpoint without truncating anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ..errors import Unsupported, printable
from ..io import Json, output_file
from ..paths import StrPath
from .recipe import CompositionRecipe
from .rules.rule import Arguments, Weights


class MergekitMethod(NamedTuple):
    """A mergekit method that computes the same as a rule, with the parameters of one model (by its weight)
    and the parameters common to all models; by default those of a plain sum.

    ``mismatch`` returns the reason why the given weights and parameters would give a different result in
    mergekit, or "" if the results agree.
    """

    method: str
    per_model: Callable[[float, Arguments], Json] = lambda weight, params: {"weight": weight}
    common: Callable[[Arguments], Json] = lambda params: {"normalize": False, "lambda": 1.0}
    mismatch: Callable[[Weights, Arguments], str] = lambda weights, params: ""


def _positive(weights: Weights, params: Arguments) -> str:
    return "" if min(weights) > 0 else "mergekit divides by the sum of the weights, not of their sizes"


def _trims_alone(weights: Weights, params: Arguments) -> str:
    if params.get("gamma") == 0:
        return "with gamma 0 mergekit makes every change zero"
    if params.get("scope") != "tensor":
        return "mergekit trims each tensor for itself; compose with --param scope=tensor"
    return ""


def _measures_alone(weights: Weights, params: Arguments) -> str:
    alone = params.get("scope", "tensor") == params.get("per", "tensor") == "tensor"
    return "" if alone else "mergekit measures each tensor for itself"


def _of_cosines(weights: Weights, params: Arguments) -> str:
    same = params.get("mean") == "cosine"
    return "" if same else "mergekit takes the mean of the cosines; compose with --param mean=cosine"


def _first(*reasons: Callable[[Weights, Arguments], str]) -> Callable[..., str]:
    """Returns a function that returns the first reason of several."""
    return lambda weights, params: next(filter(None, (reason(weights, params) for reason in reasons)), "")


def _voted(weight: float, params: Arguments) -> Json:
    return {"weight": weight, **{name: params[name] for name in ("density", "gamma") if name in params}}


def _scaled(params: Arguments) -> Json:
    return {"normalize": bool(params.get("normalize", False)), "lambda": float(params.get("lam", 1.0))}


_SUM = MergekitMethod("task_arithmetic")

MERGEKIT_METHODS: Mapping[str, MergekitMethod] = {
    **dict.fromkeys(("linear", "cat", "svd", "lorahub"), _SUM),
    "task_arithmetic": _SUM._replace(common=_scaled),
    "negate": _SUM._replace(common=lambda params: {"normalize": False, "lambda": -float(params["lam"])}),
    "average": _SUM._replace(common=lambda params: {"normalize": True, "lambda": 1.0}, mismatch=_positive),
    "ties": MergekitMethod("ties", _voted, _scaled, _first(_trims_alone, _positive)),
    "breadcrumbs": MergekitMethod("breadcrumbs", _voted, _scaled, _trims_alone),
    "breadcrumbs_ties": MergekitMethod("breadcrumbs_ties", _voted, _scaled, _first(_trims_alone, _positive)),
    "slerp": MergekitMethod(
        "nuslerp",
        common=lambda params: {"nuslerp_flatten": True},
        mismatch=_first(
            _measures_alone,
            lambda weights, params: "" if len(weights) == 2 else "mergekit's nuslerp takes two models",
            _positive,
        ),
    ),
    "model_stock": MergekitMethod(
        "model_stock",
        lambda weight, params: {},
        lambda params: {"filter_wise": False},
        _first(
            _measures_alone,
            lambda weights, params: (
                "" if len(set(weights)) == 1 and weights[0] > 0 else "mergekit's model_stock has no weights"
            ),
            _of_cosines,
        ),
    ),
}
"""Rule -> mergekit's method with the same formula."""

REASONS: Mapping[str, str] = {
    **dict.fromkeys(
        ("dare_linear", "dare_ties", "della", "della_linear"),
        "its random choices are others, and no seed makes them equal",
    ),
    "karcher": "mergekit takes the mean of whole models, not of changes",
    "sce": "mergekit's has no weights of models",
}


def to_mergekit(recipe: CompositionRecipe, base: str, models: Sequence[str]) -> Json:
    """Returns the mergekit configuration of the same merge. ``base`` and ``models`` are paths or names;
    ``models`` follow the recipe's order.

    Raises:
        Unsupported: mergekit has no such rule, or one with another formula.

    Example:
        >>> from adapterpack.manifest.manifest import Parent
        >>> parent = Parent("sha256:" + "0" * 64, "a", 0.5)
        >>> recipe = CompositionRecipe("both", (parent,), rule="linear")
        >>> to_mergekit(recipe, "org/base", ["packs/a"])["models"]
        [{'model': 'org/base+packs/a', 'parameters': {'weight': 0.5}}]
    """
    rule = recipe.rule
    weights = [parent.weight or 0.0 for parent in recipe.parents]
    equal = MERGEKIT_METHODS.get(rule or "")
    reason = (
        "a tree is evaluated when the model runs"
        if rule is None
        else REASONS.get(rule, "it has no method with this formula")
    )
    if equal is not None:
        reason = equal.mismatch(weights, recipe.params)
    if equal is None or reason:
        raise Unsupported(
            "mergekit would not give the same",
            where=f"rule {rule or 'tree'}",
            found=reason,
            expected=f"one of {', '.join(sorted(MERGEKIT_METHODS))}",
            remedy="keep the recipe, which adapterpack compose --recipe repeats",
        )
    return {
        "merge_method": equal.method,
        "base_model": base,
        "models": [
            {
                "model": f"{base}+{model}",
                **({"parameters": values} if (values := equal.per_model(weight, recipe.params)) else {}),
            }
            for model, weight in zip(models, weights, strict=True)
        ],
        "parameters": equal.common(recipe.params),
        "dtype": "float32",
    }


def write(recipe: CompositionRecipe, base: str, models: Sequence[str], out: StrPath) -> None:
    """Writes the configuration of :func:`to_mergekit` as YAML, with a comment on the truncation that
    adapterpack did and mergekit does not do.
    """
    import yaml  # noqa: PLC0415 - most compositions write none

    value = to_mergekit(recipe, base, models)
    note = printable(f"# The merge of the adapterpack recipe '{recipe.name}'.").replace("\n", "\\n") + "\n"
    if cut := {name: recipe.options[name] for name in ("rank", "energy", "budget") if name in recipe.options}:
        note += (
            "# adapterpack cut the result "
            f"({', '.join(f'{name} {value:g}' for name, value in cut.items())}); mergekit does not.\n"
        )
    with output_file(out, renews=b"# The merge of the adapterpack recipe") as file:
        file.write_text(note + yaml.safe_dump(value, sort_keys=False), "utf-8")
