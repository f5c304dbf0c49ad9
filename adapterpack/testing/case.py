"""A row of the test matrix, a method under one config on one layer, and what its invariants are computed with."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..methods import Method, Params, Site, complete, fold, run
from ..pack import manifest as m
from ..pack.pack import Pack, build

EXACT = 1e-12
"""Absolute tolerance where two float64 computations of the same small sums differ only in their order: about 1e4 roundings of 1e-16."""


class Layer(NamedTuple):
    """A linear layer to prove a method on: ``weight`` is ``[out_features, in_features]``."""

    out_features: int
    in_features: int
    bias: bool

    @property
    def label(self) -> str:
        """How test ids and the table call it, for instance ``7x12-bias``."""
        return f"{self.out_features}x{self.in_features}-{'bias' if self.bias else 'plain'}"


LAYERS = (Layer(7, 12, True), Layer(7, 12, False), Layer(12, 7, True), Layer(12, 7, False), Layer(1, 5, True), Layer(5, 1, False))
"""Wide, tall, one row and one column, with a bias and without: what goes wrong on 8x8 without a bias is found, too."""


class Case(NamedTuple):
    """One row of the matrix: a method under one config on one layer."""

    method: Method
    config: Any
    layer: Layer

    @property
    def site(self) -> Site:
        """The layer as a site; with its weight for a method that reads it."""
        weight, bias = (self.weight, self.bias) if self.method.traits.reads_weight else (None, None)
        out, width, biased = self.layer
        return Site("block.0.proj", width, out, "linear", biased, weight=weight, base_bias=bias)

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
        needs = frozenset() if self.method.needs is None else self.method.needs(self.config)
        site = dataclasses.replace(self.site, weight=self.weight, base_bias=self.bias) if "weight" in needs else self.site
        return self.method.init(self.config, site, np.random.default_rng(4))

    def shared(self) -> dict[str, np.ndarray]:
        """The parameters that would be shared with other sites."""
        shared = self.method.shared
        return {} if shared is None else shared.init(self.config, [self.site], np.random.default_rng(7))

    def fresh(self) -> dict[str, np.ndarray]:
        """Everything that the method's functions want, as ``init`` makes it."""
        return complete(self.method, self.config, {**self.shared(), **self.own()}, self.site)

    @property
    def trains(self) -> frozenset[str]:
        """The names of the parameters that training changes."""
        stored, frozen = {**self.shared(), **self.own()}, self.config.frozen.union(self.method.traits.frozen)
        return frozenset(name for name, value in stored.items() if is_float(value) and name not in frozen)

    def trained(self, dtype: Any = np.float64) -> dict[str, np.ndarray]:
        """The same after a training: what is trained has moved by normal noise of size 0.3."""
        rng, moving = np.random.default_rng(5), self.trains
        moved = {name: v + 0.3 * rng.normal(size=v.shape) if name in moving else v for name, v in self.fresh().items()}
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
    return dataclasses.replace(case.site, weight=weight, base_bias=bias) if case.method.traits.reads_weight else case.site


def layer_of(weight: Any, bias: Any) -> Callable[[Any], Any]:
    """``x -> x W^T + b``."""
    return lambda x: x @ weight.T if bias is None else x @ weight.T + bias


def adapted(case: Case, params: Params, weight: Any, bias: Any, x: Any) -> Any:
    """The output of the adapted layer at ``x``."""
    return run(case.method, case.config, params, site_of(case, weight, bias), layer_of(weight, bias), x)


def folded_at(case: Case, params: Params, weight: Any, bias: Any, rows: slice | None = None) -> tuple[Any, Any]:
    """Weight and bias with the adapter folded in, or the block ``rows`` of them."""
    site = site_of(case, weight, bias) if rows is None else case.site  # which knows the whole weight
    return fold(case.method, case.config, params, site, weight, bias, rows)


def digests(values: Mapping[str, Any]) -> dict[str, str]:
    """The sha256 of each array's bytes."""
    return {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in values.items() if value is not None}


def tensor(value: Any) -> Any:
    """A numpy array as a torch tensor; None stays."""
    import torch  # noqa: PLC0415 - see the module's docstring

    return None if value is None else torch.tensor(value)


def leaves(case: Case, params: Params) -> dict[str, Any]:
    """The parameters as float64 tensors, of which those that are trained want gradients."""
    trains = case.trains
    return {name: tensor(v.astype(np.float64) if is_float(v) else v).requires_grad_(name in trains) for name, v in params.items()}


def resolved(case: Case) -> Any:
    """The config at the site without the fields that only select sites: a manifest holds what was selected instead."""
    return dataclasses.replace(case.config.at(case.site.path), targets="all-linear", modules_to_save=())


def pack_of(case: Case) -> Pack:
    """A pack of the trained adapter."""
    trained = case.trained(np.float32)
    own, shared = ({name: trained[name] for name in made} for made in (case.own(), case.shared()))
    baked = (resolved(case), own) if case.method.bake is None else case.method.bake(resolved(case), own, case.site)
    return build("example", case.method, {case.site: baked}, shared=shared, task=m.Task("image-classification"), base=m.Base("org/base"))
