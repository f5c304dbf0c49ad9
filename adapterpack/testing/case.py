"""Defines a case, a method under one config on one layer, and computes what invariants compare."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..adapter_methods import PROMPT, Method, Params, Site, complete, fold, frozen, resolve_configs, run
from ..adapter_methods.forms.attention import attend
from ..adapter_methods.forms.blocks import run_block
from ..adapter_methods.forms.prompt_config import PromptSite
from ..adapter_methods.forms.shadow import advance, inject
from ..manifest import manifest as m
from ..pack.pack import Pack, build

EXACT = 1e-12
"""Absolute tolerance where two float64 computations of the same small sums differ only in their order: about
1e4 roundings of 1e-16.
"""


class Layer(NamedTuple):
    """A linear layer to prove a method on: ``weight`` is ``[out_features, in_features]``."""

    out_features: int
    in_features: int
    bias: bool

    @property
    def label(self) -> str:
        """How test ids and the table call it, for instance ``7x12-bias``."""
        return f"{self.out_features}x{self.in_features}-{'bias' if self.bias else 'plain'}"


LAYERS = (
    Layer(7, 12, True),
    Layer(7, 12, False),
    Layer(12, 7, True),
    Layer(12, 7, False),
    Layer(1, 5, True),
    Layer(5, 1, False),
)
"""Wide, tall, one row and one column, with a bias and without: what goes wrong on 8x8 without a bias is
found, too.
"""

DIVISIBLE = (Layer(60, 120, True), Layer(120, 60, False))
"""What PEFT is asked for: widths that its block methods can divide."""

BLOCKS = (Layer(7, 7, True), Layer(12, 12, False), Layer(5, 5, True), Layer(3, 3, False))
"""What stands for a block: a layer as wide as its input, since an adapter parallel to it reads that."""


class Model(NamedTuple):
    """A decoder to prove a prompt on: width, layers, heads of the keys (there are twice as many of the
    queries), and their width.
    """

    hidden: int
    layers: int
    heads: int
    head_dim: int

    @property
    def label(self) -> str:
        """How test ids and the table call it, for instance ``model-12-2x2x4``."""
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
MODELS = (Model(12, 2, 2, 4), Model(6, 1, 1, 8), Model(10, 3, 1, 2))
"""Several layers and one, grouped heads and one, and embeddings that are wider and narrower than the keys."""

NORMS = (Layer(7, 1, True), Layer(5, 1, False))
"""What a normalisation layer is for a method: one input for every output, with a bias and without."""

TABLES = (Layer(7, 12, False), Layer(12, 7, False), Layer(5, 1, False))
"""What an embedding is for a method: a row for every token, and no bias."""

SUBJECTS: dict[str, tuple[Any, ...]] = {
    "linear": (*LAYERS, *DIVISIBLE),
    "norm": NORMS,
    "table": TABLES,
    "block": BLOCKS,
    "attention": BLOCKS,
    "layer": BLOCKS,
    "prompt": MODELS,
}
"""Kind of site -> what a method is proved on, by the first kind that it takes."""


class Case(NamedTuple):
    """One row of the matrix: a method under one config on one layer, or on one model."""

    method: Method
    config: Any
    layer: Any

    @property
    def site(self) -> Site:
        """The layer as a site, with its weight for a method that reads it; or the model's."""
        if isinstance(self.layer, Model):
            return self.layer.site
        proof = PROOFS[self.method.kind]
        weight, bias = (self.weight, self.bias) if self.method.traits.reads_weight else (None, None)
        biased = proof.folds and self.layer.bias  # a block may have any number of biases
        kind = self.method.traits.layers[0]
        return Site(
            "block.0.proj",
            self.layer.in_features,
            self.layer.out_features,
            kind,
            biased,
            weight=weight,
            base_bias=bias,
        )

    @property
    def weight(self) -> np.ndarray:
        """``[out, in]`` float64, the same every time."""
        return np.random.default_rng(1).normal(size=(self.layer.out_features, self.layer.in_features))

    @property
    def bias(self) -> np.ndarray | None:
        """``[out]`` float64, or None."""
        return np.random.default_rng(2).normal(size=self.layer.out_features) if self.layer.bias else None

    @property
    def x(self) -> np.ndarray:
        """Inputs ``[3, 5, in]`` float64."""
        return np.random.default_rng(3).normal(size=(3, 5, self.layer.in_features))

    def own(self) -> dict[str, np.ndarray]:
        """The site's own parameters as ``init`` makes them."""
        needs = frozenset() if self.method.training.needs is None else self.method.training.needs(self.config)
        site = (
            dataclasses.replace(self.site, weight=self.weight, base_bias=self.bias)
            if "weight" in needs
            else self.site
        )
        return self.method.init(
            self.config, dataclasses.replace(site, shared=self.shared()), np.random.default_rng(4)
        )

    def shared(self) -> dict[str, np.ndarray]:
        """The parameters that would be shared with other sites."""
        shared = self.method.storage.shared
        return {} if shared is None else shared.init(self.config, [self.site], np.random.default_rng(7))

    def fresh(self) -> dict[str, np.ndarray]:
        """Everything that the method's functions want, as ``init`` makes it."""
        return complete(self.method, self.config, {**self.shared(), **self.own()}, self.site)

    @property
    def trains(self) -> frozenset[str]:
        """The names of the parameters that training changes."""
        stored = {**self.shared(), **self.own()}
        kept = frozen(self.method, self.config, stored)
        return frozenset(name for name, value in stored.items() if is_float(value) and name not in kept)

    def trained(self, dtype: Any = np.float64) -> dict[str, np.ndarray]:
        """The same after a training: what is trained has moved by normal noise of size 0.3."""
        rng, moving = np.random.default_rng(5), self.trains
        moved = {
            name: v + 0.3 * rng.normal(size=v.shape) if name in moving else v
            for name, v in self.fresh().items()
        }
        return {name: v.astype(dtype) if is_float(v) else v for name, v in moved.items()}


def require(condition: bool, message: str) -> None:
    """Raises AssertionError with the message unless the condition holds."""
    if not condition:
        raise AssertionError(message)


def require_close(actual: Any, expected: Any, what: str) -> None:
    """Raises AssertionError unless both agree within :data:`EXACT`."""
    np.testing.assert_allclose(actual, expected, rtol=EXACT, atol=EXACT, err_msg=what)


def is_float(value: np.ndarray) -> bool:
    """Whether the array is of a floating type."""
    return np.issubdtype(value.dtype, np.floating)


def site_of(case: Case, weight: Any, bias: Any) -> Site:
    """The case's site, with this weight and bias for a method that reads them."""
    return (
        dataclasses.replace(case.site, weight=weight, base_bias=bias)
        if case.method.traits.reads_weight
        else case.site
    )


def layer_of(weight: Any, bias: Any) -> Callable[[Any], Any]:
    """``x -> x W^T + b``."""
    return lambda x: x @ weight.T if bias is None else x @ weight.T + bias


def _on_layer(case: Case, params: Params, weight: Any, bias: Any, x: Any) -> Any:
    return run(case.method, case.config, params, site_of(case, weight, bias), layer_of(weight, bias), x)


def _on_block(case: Case, params: Params, weight: Any, bias: Any, x: Any) -> Any:
    return run_block(case.method, case.config, params, case.site, layer_of(weight, bias)(x), x)


def _on_attention(case: Case, params: Params, weight: Any, bias: Any, x: Any) -> Any:
    """With the layer for every projection, of one head, and for what the attention gives."""
    layer, form = layer_of(weight, bias), case.method.normal_form(case.config, params, case.site)
    keys = layer(form.prompt)[None]
    queries = layer(x.reshape(1, -1, x.shape[-1]))[:, None]
    return layer(x) + attend(form, queries, keys, keys, x.shape[-1] ** -0.5).reshape(x.shape)


def _beside(case: Case, params: Params, weight: Any, bias: Any, x: Any) -> Any:
    """With a state that has been moved on by the layer's input once, from nothing."""
    form = case.method.normal_form(case.config, params, case.site)
    return layer_of(weight, bias)(inject(form, x, advance(form, x, 0 * x)))


class Proof(NamedTuple):
    """How a kind of method is proved: by what output, and whether a weight can hold it."""

    output: Callable[[Case, Params, Any, Any, Any], Any]
    folds: bool


PROOFS = {
    "weight": Proof(_on_layer, folds=True),
    "activation": Proof(_on_block, folds=False),
    "attention": Proof(_on_attention, folds=False),
    "shadow": Proof(_beside, folds=False),
}
"""Kind of a method -> how it is proved."""


def adapted(case: Case, params: Params, weight: Any, bias: Any, x: Any) -> Any:
    """The output of the adapted layer, or block, at ``x``."""
    return PROOFS[case.method.kind].output(case, params, weight, bias, x)


def results(case: Case, params: Params, weight: Any, bias: Any, x: Any) -> dict[str, Any]:
    """Everything that the method's functions give: the output, and the folded weight and bias of a kind that
    folds.
    """
    found = {"the output": adapted(case, params, weight, bias, x)}
    if PROOFS[case.method.kind].folds and not case.method.limits.unfoldable:
        found["the weight"], found["the bias"] = folded_at(case, params, weight, bias)
    return found


def folded_at(
    case: Case, params: Params, weight: Any, bias: Any, rows: slice | None = None
) -> tuple[Any, Any]:
    """Weight and bias with the adapter folded in, or the block ``rows`` of them."""
    site = site_of(case, weight, bias) if rows is None else case.site  # which knows the whole weight
    return fold(case.method, case.config, params, site, weight, bias, rows)


def digests(values: Mapping[str, Any]) -> dict[str, str]:
    """The sha256 of each array's bytes."""
    return {
        name: hashlib.sha256(value.tobytes()).hexdigest()
        for name, value in values.items()
        if value is not None
    }


def tensor(value: Any) -> Any:
    """A numpy array as a torch tensor; None stays."""
    import torch  # noqa: PLC0415 - see the module's docstring

    return None if value is None else torch.tensor(value)


def leaves(case: Case, params: Params) -> dict[str, Any]:
    """The parameters as float64 tensors, of which those that are trained want gradients."""
    trains = case.trains
    return {
        name: tensor(v.astype(np.float64) if is_float(v) else v).requires_grad_(name in trains)
        for name, v in params.items()
    }


def resolved(case: Case) -> Any:
    """The config at the site without the fields that only select sites: a manifest holds what was selected
    instead.
    """
    selecting = {
        field.name: field.default
        for field in dataclasses.fields(case.config)
        if field.name in {"targets", "modules_to_save"}
    }
    return resolve_configs(
        case.method, [dataclasses.replace(case.config.at(case.site.path), **selecting)], [case.site]
    )[0]


def pack_of(case: Case) -> Pack:
    """A pack of the trained adapter."""
    trained = case.trained(np.float32)
    own, shared = ({name: trained[name] for name in made} for made in (case.own(), case.shared()))
    to_stored = case.method.storage.to_stored
    stored = (resolved(case), own) if to_stored is None else to_stored(resolved(case), own, case.site)
    return build(
        "example",
        case.method,
        {case.site: stored},
        shared=shared,
        task=m.Task("image-classification"),
        base=m.Base("org/base"),
    )
