"""Checks what an adapter method promises, for authors of methods.

    from adapterpack.testing import prove
    prove(my_method)          # raises AssertionError and names the config, the layer and the broken promise

An invariant is a check together with the trait by which a method promises it. :func:`prove` checks a method's
mathematics and its packs, on every example config and a few layers. Data are random with a fixed seed, in
float64 unless an invariant says otherwise; adapters are fresh ones moved by normal noise, as training would.
Needs torch. ``tests/invariants`` also checks the built-in methods in torch models, in graphs and in PEFT.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .adapter_methods import (
    PROMPT,
    Arrays,
    Method,
    Params,
    Site,
    complete,
    fold,
    frozen,
    resolve_configs,
    run,
    shapes_of,
)
from .adapter_methods.core.config import from_json
from .adapter_methods.forms.attention import attend
from .adapter_methods.forms.blocks import evaluate_block
from .adapter_methods.forms.prompt import PromptSite
from .manifest import manifest as m
from .pack import Pack, build, load

EXACT = 1e-12
"""The absolute tolerance for two float64 computations of the same small sums in different order: about 1e4
roundings of 1e-16.
"""


class LayerShape(NamedTuple):
    """A linear layer to check a method on: ``weight`` is ``[out_features, in_features]``."""

    out_features: int
    in_features: int
    bias: bool

    @property
    def label(self) -> str:
        """The layer's name in test ids and in the table, for instance ``7x12-bias``."""
        return f"{self.out_features}x{self.in_features}-{'bias' if self.bias else 'plain'}"


LAYERS = (
    LayerShape(7, 12, True),
    LayerShape(7, 12, False),
    LayerShape(12, 7, True),
    LayerShape(12, 7, False),
    LayerShape(1, 5, True),
    LayerShape(5, 1, False),
)
"""Wide, tall, a single row and a single column, with and without a bias, to catch errors that 8x8 without a
bias would hide.
"""

DIVISIBLE = (LayerShape(60, 120, True), LayerShape(120, 60, False))
"""Widths that PEFT's block methods can divide; used only to compare with PEFT."""

BLOCKS = (LayerShape(7, 7, True), LayerShape(12, 12, False), LayerShape(5, 5, True), LayerShape(3, 3, False))
"""Layers that stand for blocks: as wide as their input, because a parallel adapter reads that."""


class DecoderShape(NamedTuple):
    """A decoder to check a prompt on: its width, layers, key heads (there are twice as many query heads), and
    their width.
    """

    hidden: int
    layers: int
    heads: int
    head_dim: int

    @property
    def label(self) -> str:
        """The model's name in test ids and in the table, for instance ``model-12-2x2x4``."""
        return f"model-{self.hidden}-{self.layers}x{self.heads}x{self.head_dim}"

    @property
    def site(self) -> PromptSite:
        """The model as a prompt method sees it, with a random embedding table and a random cache."""
        table = np.random.default_rng(8).normal(size=(VOCABULARY, self.hidden))
        cache = np.random.default_rng(9).normal(size=(self.layers, 2, self.heads, VOCABULARY, self.head_dim))
        return PromptSite(
            PROMPT,
            self.hidden,
            0,
            "prompt",
            layers=self.layers,
            heads=self.heads,
            head_dim=self.head_dim,
            vocabulary=VOCABULARY,
            embed=lambda ids: table[list(ids)],
            prefill=lambda ids: cache[:, :, :, list(ids)],
        )


VOCABULARY = 32
MODELS = (DecoderShape(12, 2, 2, 4), DecoderShape(6, 1, 1, 8), DecoderShape(10, 3, 1, 2))
"""One and several layers, one and several heads, embeddings wider and narrower than the keys."""

NORMS = (LayerShape(7, 1, True), LayerShape(5, 1, False))
"""Normalisation layers as methods see them: one input for every output, with and without a bias."""

TABLES = (LayerShape(7, 12, False), LayerShape(12, 7, False), LayerShape(5, 1, False))
"""Embeddings as methods see them: a row for every token, and no bias."""

SUBJECTS: dict[str, tuple[Any, ...]] = {
    "linear": (*LAYERS, *DIVISIBLE),
    "norm": NORMS,
    "table": TABLES,
    "block": BLOCKS,
    "attention": BLOCKS,
    "prompt": MODELS,
}
"""Maps a kind of site to what a method is checked on, by the first kind that the method takes."""


class Case(NamedTuple):
    """One row of the matrix: a method with one config on one layer or model."""

    method: Method
    config: Any
    layer: Any

    @property
    def site(self) -> Site:
        """The layer as a site, with its weight for a method that reads it; or the model's site."""
        if isinstance(self.layer, DecoderShape):
            return self.layer.site
        kind, (rows, columns, bias) = self.method.traits.layers[0], self.layer
        # A block may have any number of biases, so its site declares none.
        biased = bias and PROOFS[self.method.kind].folds
        reads = self.method.traits.reads_weight
        weight, base_bias = (self.weight, self.bias) if reads else (None, None)
        return Site("block.0.proj", columns, rows, kind, biased, weight=weight, base_bias=base_bias)

    @property
    def weight(self) -> np.ndarray:
        """The weight, ``[out, in]`` float64, the same on every access."""
        return np.random.default_rng(1).normal(size=(self.layer.out_features, self.layer.in_features))

    @property
    def bias(self) -> np.ndarray | None:
        """The bias, ``[out]`` float64, or None."""
        return np.random.default_rng(2).normal(size=self.layer.out_features) if self.layer.bias else None

    @property
    def x(self) -> np.ndarray:
        """The inputs, ``[3, 5, in]`` float64."""
        return np.random.default_rng(3).normal(size=(3, 5, self.layer.in_features))

    def own(self) -> Arrays:
        """Returns the site's own parameters from ``init``."""
        needs = self.method.training.needs
        site = dataclasses.replace(self.site, shared=self.shared())
        if needs is not None and "weight" in needs(self.config):
            site = dataclasses.replace(site, weight=self.weight, base_bias=self.bias)
        return self.method.init(self.config, site, np.random.default_rng(4))

    def shared(self) -> Arrays:
        """Returns the parameters that several sites would share."""
        shared = self.method.storage.shared
        return {} if shared is None else shared.init(self.config, [self.site], np.random.default_rng(7))

    def fresh(self) -> Arrays:
        """Returns everything that the method's functions need, from ``init``."""
        return complete(self.method, self.config, {**self.shared(), **self.own()}, self.site)

    @property
    def trains(self) -> frozenset[str]:
        """The names of the parameters that training changes."""
        stored = {**self.shared(), **self.own()}
        kept = frozen(self.method, self.config, stored)
        return frozenset(name for name, value in stored.items() if is_float(value) and name not in kept)

    def trained(self, dtype: Any = np.float64) -> Arrays:
        """Returns what :meth:`fresh` does after a training: trained parameters are moved by normal noise of
        size 0.3.
        """
        rng = np.random.default_rng(5)
        moving = self.trains
        moved = {
            name: v + 0.3 * rng.normal(size=v.shape) if name in moving else v
            for name, v in self.fresh().items()
        }
        return {name: v.astype(dtype) if is_float(v) else v for name, v in moved.items()}

    def adapted(self, params: Params | None = None) -> AdaptedCase:
        """Returns the layer with these parameters, by default the trained ones."""
        return AdaptedCase(self, self.trained() if params is None else params, self.weight, self.bias)


class AdaptedCase(NamedTuple):
    """The layer of a case with an adapter, in numpy arrays or in tensors."""

    case: Case
    params: Params
    weight: Any
    bias: Any

    @property
    def site(self) -> Site:
        """The case's site, with this weight and bias if the method reads them."""
        if not self.case.method.traits.reads_weight:
            return self.case.site
        return dataclasses.replace(self.case.site, weight=self.weight, base_bias=self.bias)

    @property
    def base(self) -> Callable[[Any], Any]:
        """The layer without the adapter, ``x -> x W^T + b``."""
        return make_layer(self.weight, self.bias)

    def run(self, x: Any) -> Any:
        """Returns the output of the adapted layer or block at ``x``."""
        return PROOFS[self.case.method.kind].output(self, x)

    def fold(self, rows: slice | None = None) -> tuple[Any, Any]:
        """Returns weight and bias with the adapter merged in, or their block ``rows``."""
        block = slice(None) if rows is None else rows
        bias = None if self.bias is None else self.bias[block]
        return fold(
            self.case.method, self.case.config, self.params, self.site, self.weight[block], bias, rows
        )

    def results(self, x: Any) -> dict[str, Any]:
        """Returns all results of the method's functions: the output, and the merged weight and bias for kinds
        that merge.
        """
        found = {"the output": self.run(x)}
        if folds(self.case.method):
            found["the weight"], found["the bias"] = self.fold()
        return found


def require(condition: bool, message: str) -> None:
    """Raises AssertionError with the message unless the condition holds."""
    if not condition:
        raise AssertionError(message)


def require_close(actual: Any, expected: Any, what: str) -> None:
    """Raises AssertionError unless both agree within :data:`EXACT`."""
    np.testing.assert_allclose(actual, expected, rtol=EXACT, atol=EXACT, err_msg=what)


def is_float(value: np.ndarray) -> bool:
    """Whether the array has a floating-point dtype."""
    return np.issubdtype(value.dtype, np.floating)


def make_layer(weight: Any, bias: Any) -> Callable[[Any], Any]:
    """Returns the function ``x -> x W^T + b``."""
    return lambda x: x @ weight.T if bias is None else x @ weight.T + bias


def _on_attention(layer: AdaptedCase, x: Any) -> Any:
    """Returns the output of the adapted attention, with the layer as every projection of a single head and as
    the attention's own output.
    """
    form = layer.case.method.normal_form(layer.case.config, layer.params, layer.case.site)
    keys = layer.base(form.prompt)[None]
    queries = layer.base(x.reshape(1, -1, x.shape[-1]))[:, None]
    return layer.base(x) + attend(form, queries, keys, keys, x.shape[-1] ** -0.5).reshape(x.shape)


class Proof(NamedTuple):
    """How to check a kind of method: by which output, and whether a weight can hold the change."""

    output: Callable[[AdaptedCase, Any], Any]
    folds: bool


PROOFS = {
    "weight": Proof(
        lambda layer, x: run(layer.case.method, layer.case.config, layer.params, layer.site, layer.base, x),
        folds=True,
    ),
    "activation": Proof(
        lambda layer, x: evaluate_block(
            layer.case.method.normal_form(layer.case.config, layer.params, layer.case.site), layer.base(x), x
        ),
        folds=False,
    ),
    "attention": Proof(_on_attention, folds=False),
}
"""Maps a kind of method to how it is checked. A package with a kind of its own adds an entry here and in
SUBJECTS.
"""


def digests(values: Mapping[str, Any]) -> dict[str, str]:
    """Returns the sha256 of each array's bytes."""
    return {
        name: hashlib.sha256(value.tobytes()).hexdigest()
        for name, value in values.items()
        if value is not None
    }


def to_tensor(value: Any) -> Any:
    """Returns a numpy array as a torch tensor, None as None."""
    import torch  # noqa: PLC0415 - see the module's docstring

    return None if value is None else torch.tensor(value)


def make_leaves(case: Case, params: Params) -> dict[str, Any]:
    """Returns the parameters as float64 tensors; trained ones require gradients."""
    trains = case.trains
    return {
        name: to_tensor(v.astype(np.float64) if is_float(v) else v).requires_grad_(name in trains)
        for name, v in params.items()
    }


def resolve_config(case: Case) -> Any:
    """Returns the config at the site without the fields that only select sites, which manifests replace by
    the selected sites.
    """
    selecting = {
        field.name: field.default
        for field in dataclasses.fields(case.config)
        if field.name in {"targets", "modules_to_save"}
    }
    return resolve_configs(
        case.method, [dataclasses.replace(case.config.at(case.site.path), **selecting)], [case.site]
    )[0]


def build_pack(case: Case) -> Pack:
    """Returns a pack of the trained adapter."""
    trained = case.trained(np.float32)
    own, shared = ({name: trained[name] for name in made} for made in (case.own(), case.shared()))
    to_stored = case.method.storage.to_stored
    stored = (
        (resolve_config(case), own) if to_stored is None else to_stored(resolve_config(case), own, case.site)
    )
    return build(
        "example",
        case.method,
        {case.site: stored},
        shared=shared,
        task=m.PackTask("image-classification"),
        base=m.Base("org/base"),
    )


def identity_at_init(case: Case) -> None:
    """``run(init(cfg, site), x) == base(x)`` and ``fold(init(cfg, site), W, b) == (W, b)``, bit for bit:
    nothing may be rounded.
    """
    layer = case.adapted(case.fresh())
    x = case.x
    before = {"the output": layer.base(x), "the weight": layer.weight, "the bias": layer.bias}
    for what, after in layer.results(x).items():
        # No bias and a bias of zeros are equivalent.
        one, two = (0.0 if value is None else value for value in (before[what], after))
        require(bool(np.all(one == two)), f"a fresh adapter changes {what}")


def trained_adapter_changes_the_output(case: Case) -> None:
    """``run(trained, x) != base(x)``: an adapter that does nothing would keep every other law. 1e-3 is far
    above rounding.
    """
    layer = case.adapted()
    change = np.abs(layer.run(case.x) - layer.base(case.x)).max()
    require(bool(change > 1e-3), f"a trained adapter changes outputs by {change:.1e} only")


def fold_equals_forward(case: Case) -> None:
    """``x @ W'.T + b' == run(x)`` with ``W', b' = fold(W, b)``, within 1e-12 in float64 (:data:`EXACT`)."""
    layer = case.adapted()
    folded = make_layer(*layer.fold())(case.x)
    require_close(folded, layer.run(case.x), "the folded layer and the adapted layer disagree")


def fold_in_row_blocks(case: Case) -> None:
    """``fold(W, b)[rows] == fold(W[rows], b[rows], rows)`` for blocks of 1 and 3 rows, within 1e-12: blocks
    may sum in another order.
    """
    layer = case.adapted()
    out = case.layer.out_features
    weight, bias = layer.fold()
    for rows in (slice(start, min(start + step, out)) for step in (1, 3) for start in range(0, out, step)):
        block, block_bias = layer.fold(rows)
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
    found = [shapes_of(made) for made in (case.own(), case.shared())]
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
    layer = case.adapted()
    x = case.x
    everything = {
        **{f"parameter {name}": value for name, value in layer.params.items()},
        "the weight": layer.weight,
        "the bias": layer.bias,
        "x": x,
    }
    before = digests(everything)
    case.method.normal_form(case.config, layer.params, layer.site)
    layer.results(x)
    after = digests(everything)
    changed = [name for name, digest in before.items() if after[name] != digest]
    require(not changed, f"changed in place: {', '.join(changed)}")


def additive_law(case: Case) -> None:
    """``fold(W) - W == fold(V) - V`` for any W and V, within 1e-12: the change is the adapter's alone. The
    same for the bias.
    """
    layer = case.adapted()
    other = np.random.default_rng(6).normal(size=case.weight.shape)
    on_other = layer._replace(weight=other, bias=None if case.bias is None else 2 * case.bias)
    (folded, moved), (folded_other, moved_other) = layer.fold(), on_other.fold()
    require_close(folded - layer.weight, folded_other - other, "the change depends on the weight")
    if moved is not None:
        before, before_other = (0.0 if bias is None else bias for bias in (layer.bias, on_other.bias))
        require_close(
            moved - before, moved_other - before_other, "the change of the bias depends on the bias"
        )


def low_rank_law(case: Case) -> None:
    """``rank(fold(0)) <= cfg.rank``: singular values past the rank are below 1e-12 of the first, which is
    their rounding in float64.
    """
    change, _ = case.adapted()._replace(weight=np.zeros_like(case.weight), bias=None).fold()
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
    cls = case.method.config
    values = dataclasses.asdict(case.config)
    require(cls.__dataclass_params__.frozen, f"{cls.__name__} is not a frozen dataclass")
    back = json.loads(json.dumps(values, allow_nan=False))
    rebuilt = from_json(cls, back)
    require(rebuilt == case.config, f"{case.config} came back as {rebuilt}")
    with contextlib.suppress(TypeError):
        require(
            cls(**{**values, "no_such_field": 1}) is None,
            f"{cls.__name__} accepts a field that it does not have",
        )


def torch_equals_numpy(case: Case) -> None:
    """``run`` and ``fold`` on torch float64 tensors give what they give on numpy arrays, within 1e-12
    (:data:`EXACT`).
    """
    params = {name: to_tensor(value) for name, value in case.trained().items()}
    there = AdaptedCase(case, params, to_tensor(case.weight), to_tensor(case.bias))
    expected = case.adapted().results(case.x)
    found = there.results(to_tensor(case.x))
    for what, value in expected.items():
        require((value is None) == (found[what] is None), f"{what} is given under one library only")
        if value is not None:
            require_close(found[what].numpy(), value, f"{what} differs under torch")


def gradients_reach_every_parameter(case: Case) -> None:
    """Within two steps of SGD from ``init`` each parameter has had a gradient that is not zero, and the base
    has not changed by a bit.

    Two, because a factor whose partner starts at zero (LoRA's A) can have none at the first.
    """
    params = case.fresh()
    weight = to_tensor(case.weight)
    bias = to_tensor(case.bias)
    kept = {"weight": weight.numpy(), "bias": None if bias is None else bias.numpy()}
    before = digests(kept)
    reached = set()
    for _ in range(2):
        leaves = make_leaves(case, params)
        ((AdaptedCase(case, leaves, weight, bias).run(to_tensor(case.x)) - 1.0) ** 2).mean().backward()
        gradients = {name: value.grad for name, value in leaves.items() if value.grad is not None}
        reached |= {name for name, gradient in gradients.items() if bool(gradient.abs().max() > 0)}
        params = {
            name: (value - 0.1 * gradients[name] if name in gradients else value).detach().numpy()
            for name, value in leaves.items()
        }
    require(reached == case.trains, f"no gradient reaches {', '.join(sorted(case.trains - reached))}")
    require(digests(kept) == before, "training changed the base")


def rows_do_not_mix(case: Case) -> None:
    """``run(x)[i] == run(x[i])`` and ``run(x)[i, t] == run(x[i, t])``, within 1e-12 of the largest entry:
    none feels another.

    Of a method that must see a sequence whole the positions of a row may, ``run(x)[i] == run(x[i:i+1])[0]``.
    """
    layer = case.adapted()
    x = case.x
    whole = layer.run(x)
    if case.method.reason_against("cache"):
        parts = {"row": [layer.run(row[None])[0] for row in x]}
    else:
        parts = {
            "row": [layer.run(row) for row in x],
            "position": [[layer.run(position[None])[0] for position in row] for row in x],
        }
    for what, alone in parts.items():
        error = float(np.abs(alone - whole).max())
        require(error <= 1e-12 * np.abs(whole).max(), f"a {what} gives another result alone, by {error:.1e}")


def pack_round_trip(case: Case) -> None:
    """``load(write(build(p))) == p``: tensors bit for bit, config, site and id; writing twice gives the same
    bytes. Needs registration.
    """
    pack = build_pack(case)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("one", "two"):
            pack.write(Path(folder) / name)
        files = [
            {path.name: path.read_bytes() for path in (Path(folder) / name).iterdir()}
            for name in ("one", "two")
        ]
        back = load(Path(folder) / "one")
    require(files[0] == files[1], "writing twice gives other bytes")
    require(back.id == pack.id, f"the id was {pack.id} and is {back.id}")
    (adapter,), (stored,) = back.adapters(), pack.adapters()
    require(digests(adapter.params) == digests(stored.params), "tensors came back with other bytes")
    require(
        all(adapter.params[name].dtype == value.dtype for name, value in stored.params.items()),
        "tensors changed their dtype",
    )
    require((adapter.site, adapter.config) == (stored.site, stored.config), "site or config changed")
    require(
        case.method.storage.to_stored is not None or adapter.config == resolve_config(case),
        "the config is not the one that was packed",
    )


class Invariant(NamedTuple):
    """One column of the matrix.

    ``check`` raises AssertionError; ``needs`` says whether a method promises the invariant, by its ``trait``.
    Slow checks run on some ``layers`` only (default: :data:`LAYERS`), or only for the ``first`` config of a
    method.
    """

    check: Callable[[Case], None]
    needs: Callable[[Method], bool]
    trait: str
    layers: tuple[LayerShape | DecoderShape, ...] | None = None
    first: bool = False

    @property
    def name(self) -> str:
        """The name of the function that checks the invariant."""
        return self.check.__name__

    def holds_for(self, case: Case) -> bool:
        """Whether to check this invariant for the case."""
        subjects = SUBJECTS[case.method.traits.layers[0]]
        # If none of the invariant's layers is a subject of this kind, use all subjects: there are few.
        few = set(self.layers or ()) & set(subjects)
        chosen = case.layer in few if few else case.layer not in DIVISIBLE
        return (
            chosen and (not self.first or case.config == case.method.examples[0]) and self.needs(case.method)
        )


def provable(method: Method) -> bool:
    """Whether an output can be computed at a single site, which is not so for prompts."""
    return method.kind in PROOFS


def folds(method: Method) -> bool:
    """Whether a weight can hold what the method computes."""
    return provable(method) and PROOFS[method.kind].folds and not method.reason_against("fold")


def always(method: Method) -> bool:
    """For invariants that every method promises."""
    return True


FEW = (LAYERS[0], LAYERS[3], *BLOCKS[:2])
"""Wide with a bias, tall without, two blocks: enough for checks that do not depend on the shape."""


INVARIANTS = (
    Invariant(identity_at_init, lambda method: method.traits.identity_at_init, "identity_at_init"),
    Invariant(trained_adapter_changes_the_output, provable, "kind"),
    Invariant(fold_equals_forward, folds, "kind"),
    Invariant(fold_in_row_blocks, lambda method: method.traits.row_separable, "row_separable"),
    Invariant(torch_equals_numpy, provable, "kind"),
    Invariant(gradients_reach_every_parameter, provable, "kind"),
    Invariant(shapes_declared, always, "kind"),
    Invariant(inputs_unchanged, provable, "kind"),
    Invariant(additive_law, lambda method: method.traits.additive, "additive"),
    Invariant(low_rank_law, lambda method: method.traits.low_rank, "low_rank"),
    Invariant(rows_do_not_mix, provable, "kind"),
    Invariant(config_schema, always, "kind"),
    Invariant(pack_round_trip, always, "kind", FEW),
)


def cases(method: Method) -> Iterator[Case]:
    """Returns all rows of the matrix for one method: its example configs on every layer that is wide enough,
    or on every model.
    """
    rows, columns = method.traits.min_features
    every = SUBJECTS[method.traits.layers[0]]
    fitting = [
        one
        for one in every
        if not isinstance(one, LayerShape) or (one.out_features >= rows and one.in_features >= columns)
    ]
    return (Case(method, config, one) for config in method.examples for one in fitting)


def prove(method: Method) -> int:
    """Checks every invariant that a registered method promises, on every case; returns how many cells it
    checked.

    Raises:
        AssertionError: an invariant does not hold; the error names the config, the layer and the invariant.
    """
    cells = [
        (case, invariant) for case in cases(method) for invariant in INVARIANTS if invariant.holds_for(case)
    ]
    for case, invariant in cells:
        try:
            invariant.check(case)
        except Exception as error:
            what = (
                f"{method.name}: {invariant.name} does not hold for {case.config} on {case.layer.label}: "
                f"{error}"
            )
            raise AssertionError(what) from error
    return len(cells)
