"""Proves a method's forward pass and fold, and the traits that follow from them, in float64 on numpy
arrays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json

import numpy as np

from .case import EXACT, Case, adapted, digests, folded_at, layer_of, require, require_close, results, site_of


def identity_at_init(case: Case) -> None:
    """``run(init(cfg, site), x) == base(x)`` and ``fold(init(cfg, site), W, b) == (W, b)``, bit for bit:
    nothing may be rounded.
    """
    weight, bias, x = case.weight, case.bias, case.x
    before = {"the output": layer_of(weight, bias)(x), "the weight": weight, "the bias": bias}
    for what, after in results(case, case.fresh(), weight, bias, x).items():
        # no bias and a bias of zeros are the same
        one, two = (0.0 if value is None else value for value in (before[what], after))
        require(bool(np.all(one == two)), f"a fresh adapter changes {what}")


def trained_adapter_changes_the_output(case: Case) -> None:
    """``run(trained, x) != base(x)``: an adapter that does nothing would keep every other law. 1e-3 is far
    above rounding.
    """
    change = np.abs(
        adapted(case, case.trained(), case.weight, case.bias, case.x)
        - layer_of(case.weight, case.bias)(case.x)
    ).max()
    require(bool(change > 1e-3), f"a trained adapter changes outputs by {change:.1e} only")


def fold_equals_forward(case: Case) -> None:
    """``x @ W'.T + b' == run(x)`` with ``W', b' = fold(W, b)``, within 1e-12 in float64 (:data:`EXACT`)."""
    folded = layer_of(*folded_at(case, case.trained(), case.weight, case.bias))
    expected = adapted(case, case.trained(), case.weight, case.bias, case.x)
    require_close(folded(case.x), expected, "the folded layer and the adapted layer disagree")


def fold_in_row_blocks(case: Case) -> None:
    """``fold(W, b)[rows] == fold(W[rows], b[rows], rows)`` for blocks of 1 and 3 rows, within 1e-12: blocks
    may sum in another order.
    """
    params, out = case.trained(), case.layer.out_features
    weight, bias = folded_at(case, params, case.weight, case.bias)
    for rows in (slice(start, min(start + step, out)) for step in (1, 3) for start in range(0, out, step)):
        block, block_bias = folded_at(
            case, params, case.weight[rows], None if case.bias is None else case.bias[rows], rows
        )
        require_close(block, weight[rows], f"rows {rows.start} to {rows.stop} fold otherwise alone")
        require(
            (block_bias is None) == (bias is None),
            "a block has a bias where the whole has none, or the reverse",
        )
        if bias is not None:
            require_close(
                block_bias, bias[rows], f"the bias of rows {rows.start} to {rows.stop} folds otherwise alone"
            )


def shapes_declared(case: Case) -> None:
    """``shapes(cfg, site)`` are the names and shapes that ``init(cfg, site)`` gives; the same seed gives the
    same bytes again.
    """
    found = [{name: value.shape for name, value in made.items()} for made in (case.own(), case.shared())]
    shared = case.method.storage.shared
    declared = [
        case.method.shapes(case.config, case.site),
        {} if shared is None else shared.shapes(case.config, [case.site]),
    ]
    require(found == declared, f"init gives {found}, shapes says {declared}")
    require(digests(case.fresh()) == digests(case.fresh()), "init is not a function of its seed")


def inputs_unchanged(case: Case) -> None:
    """The bytes of the parameters, W, b and x are the same after ``attach``, ``run`` and ``fold`` as
    before.
    """
    params, weight, bias, x = case.trained(), case.weight, case.bias, case.x
    everything = {
        **{f"parameter {name}": value for name, value in params.items()},
        "the weight": weight,
        "the bias": bias,
        "x": x,
    }
    before = digests(everything)
    case.method.normal_form(case.config, params, site_of(case, weight, bias))
    results(case, params, weight, bias, x)
    after = digests(everything)
    changed = [name for name, digest in before.items() if after[name] != digest]
    require(not changed, f"changed in place: {', '.join(changed)}")


def additive_law(case: Case) -> None:
    """``fold(W) - W == fold(V) - V`` for any W and V, within 1e-12: the change is the adapter's alone. The
    same for the bias.
    """
    params, other = case.trained(), np.random.default_rng(6).normal(size=case.weight.shape)
    changes = []
    for weight, bias in ((case.weight, case.bias), (other, None if case.bias is None else 2 * case.bias)):
        folded, folded_bias = folded_at(case, params, weight, bias)
        changes.append(
            (folded - weight, 0.0 if folded_bias is None else folded_bias - (0.0 if bias is None else bias))
        )
    require_close(changes[0][0], changes[1][0], "the change depends on the weight")
    require_close(changes[0][1], changes[1][1], "the change of the bias depends on the bias")


def low_rank_law(case: Case) -> None:
    """``rank(fold(0)) <= cfg.rank``: singular values past the rank are below 1e-12 of the first, which is
    their rounding in float64.
    """
    change, _ = folded_at(case, case.trained(), np.zeros_like(case.weight), None)
    require(case.config.rank is not None, "a method of low rank must say its rank")
    values = np.linalg.svd(change, compute_uv=False)
    beyond = values[case.config.rank :]
    require(
        bool((beyond <= EXACT * values[0]).all()), f"singular values {values} for rank {case.config.rank}"
    )


def config_schema(case: Case) -> None:
    """The config is frozen, is rebuilt from its own fields after a turn through JSON, and refuses a field
    that it does not have.
    """
    cls, values = case.method.config, dataclasses.asdict(case.config)
    require(cls.__dataclass_params__.frozen, f"{cls.__name__} is not a frozen dataclass")
    back = json.loads(json.dumps(values, allow_nan=False))
    rebuilt = cls(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in back.items()}
    )
    require(rebuilt == case.config, f"{case.config} came back as {rebuilt}")
    with contextlib.suppress(TypeError):
        require(
            cls(**{**values, "no_such_field": 1}) is None,
            f"{cls.__name__} accepts a field that it does not have",
        )
