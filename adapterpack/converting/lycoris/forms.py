"""Reads the forms of LyCORIS (lycoris-lora 4): maps the tensors of each form to a method of adapterpack.

- LoRA, LoCon: ``alpha / r * up down``, with a kernel's middle factor ``alpha / r * up (mid * down)``; with
  ``dora_scale`` DoRA.
- LoHa: ``alpha / r * (w1_a w1_b) * (w2_a w2_b)``, elementwise.
- LoKr: ``alpha / r * kron(w1, w2)``; the scale is 1 where neither factor is split.
- GLoRA: ``alpha / r * (W a1 a2 + b1 b2)``, which is a LoRA of twice the rank once W is known.
- (IA)^3: ``W * (1 + weight)``, by row or by column.
- full, norm: a difference to the weight and the bias.

alpha = r where a file states none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ...adapter_methods import Arrays, Site, Tensors, check_shapes, get
from ...adapter_methods.loha import with_kernel
from ...errors import BaseMismatch, FormatError, Unsupported, printable
from .. import check_pair, drop_targets, tensor_number
from .kronecker import split_kronecker


class LycorisLayer(NamedTuple):
    """A layer that a file changes. ``shape`` is the shape of its weight, or None if the base is not known,
    ``bias`` says whether it has a bias.

    ``read`` returns its weight (``"weight"``) or its bias (``"bias"``).
    """

    path: str
    where: str
    shape: tuple[int, ...] | None = None
    bias: bool = False
    read: Callable[[str], np.ndarray] | None = None

    def site(self, rows: int, columns: int) -> Site:
        """Returns the site of ``[rows, columns]`` matrices; a convolution's site if the weight has a kernel.

        Raises:
            BaseMismatch: the base's weight has another shape.
        """
        if self.shape is None or len(self.shape) < 2:
            return Site(self.path, columns, rows)
        if (self.shape[0], math.prod(self.shape[1:])) != (rows, columns):
            raise BaseMismatch(
                "the adapter has another shape than the base's weight",
                where=self.where,
                expected=list(self.shape),
                found=f"[{rows}, {columns}]",
                remedy="name the base that it was trained on",
            )
        return Site(
            self.path, columns, rows, "linear" if len(self.shape) == 2 else "conv", self.bias, self.shape[2:]
        )


class LycorisReading(NamedTuple):
    """A module of a file in adapterpack's terms: a site of a method with its config and parameters, or the
    parameters of a fully trained module.
    """

    method: str | None = None
    site: Site | None = None
    config: Any = None
    params: Tensors | None = None


class LycorisForm(NamedTuple):
    """A form: the leaves that it must have, its reader, and the leaves that it may have."""

    needs: frozenset[str]
    read: Callable[[Tensors, LycorisLayer], LycorisReading]
    may: frozenset[str] = frozenset({"alpha"})

    @property
    def scaled(self) -> bool:
        """Whether it is multiplied by ``alpha / r``."""
        return "alpha" in self.may


def form_of(leaves: Iterable[str], where: str) -> LycorisForm:
    """Returns the form of a module with these leaves.

    Raises:
        FormatError: the leaves match no form, or a leaf is missing.
    """
    present = set(leaves)
    for form in FORMS.values():
        if form.needs <= present <= form.needs | form.may:
            return form
    raise FormatError(
        "the tensors of a module do not pair up, or are of no known form",
        where=where,
        expected="; ".join(f"{name}: {', '.join(sorted(form.needs))}" for name, form in FORMS.items()),
        found=printable(", ".join(sorted(present))[:200]),
    )


def _scale(tensors: Tensors, rank: int, layer: LycorisLayer) -> float:
    return (
        tensor_number(tensors["alpha"], f"{layer.where}.alpha") / max(1, rank) if "alpha" in tensors else 1.0
    )


def _flat(value: np.ndarray) -> np.ndarray:
    """Flattens a kernel's factor to a matrix: the first axis, and all others."""
    return value.reshape(len(value), -1) if value.ndim > 2 else value


def _check(
    method: str, layer: LycorisLayer, rows: int, columns: int, params: Arrays, **settings: Any
) -> LycorisReading:
    """Returns a site of ``[rows, columns]`` matrices, with the settings of its config, after checking the
    shapes.
    """
    site = layer.site(rows, columns)
    cfg = drop_targets(get(method).config(**settings))
    check_shapes(get(method), cfg, site, params, layer.where)
    return LycorisReading(method, site, cfg, params)


def _matrices(tensors: Tensors, names: Iterable[str], layer: LycorisLayer) -> None:
    for name in names:
        if tensors[name].ndim != 2 or 0 in tensors[name].shape:
            raise FormatError(
                "a factor must be a matrix", where=f"{layer.where}.{name}", found=list(tensors[name].shape)
            )


def _lora(tensors: Tensors, layer: LycorisLayer) -> LycorisReading:
    down = tensors["lora_down.weight"]
    up = _flat(tensors["lora_up.weight"])
    if "lora_mid.weight" in tensors:
        down = _core(tensors["lora_mid.weight"], _flat(down), layer)
    down = _flat(down)
    check_pair(down, up, layer.where)
    rank = down.shape[0]
    method = "dora" if "dora_scale" in tensors else "lora"
    params = {"lora_A": down, "lora_B": up}
    if method == "dora":
        params["lora_magnitude_vector"] = _lengths(tensors["dora_scale"], up.shape[0], layer)
    alpha = _scale(tensors, rank, layer) * rank
    return _check(method, layer, up.shape[0], down.shape[1], params, r=rank, alpha=alpha)


def _core(core: np.ndarray, factor: np.ndarray, layer: LycorisLayer) -> np.ndarray:
    try:
        return with_kernel(core, factor)
    except ValueError as error:
        raise FormatError(
            f"the factors of a kernel do not fit each other: {error}", where=layer.where
        ) from error


def _lengths(scale: np.ndarray, rows: int, layer: LycorisLayer) -> np.ndarray:
    """Returns the trained lengths of the rows.

    Raises:
        Unsupported: the file stores the lengths of the columns.
    """
    if scale.size != rows or scale.shape[0] != rows:
        raise Unsupported(
            "DoRA with a length for each input (wd_on_output off), where the method here has one for "
            "each output",
            where=f"{layer.where}.dora_scale",
            expected=[rows, 1],
            found=list(scale.shape),
            remedy="merge it with the tool that made it, or train it with wd_on_output",
        )
    return scale.reshape(-1)


def _loha(tensors: Tensors, layer: LycorisLayer) -> LycorisReading:
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    _matrices(tensors, names, layer)
    params = {name: tensors[name] for name in names}
    for number in ("1", "2") if "hada_t1" in tensors else ():
        params[f"hada_w{number}_a"] = np.ascontiguousarray(params[f"hada_w{number}_a"].T)
        params[f"hada_w{number}_b"] = _core(tensors[f"hada_t{number}"], params[f"hada_w{number}_b"], layer)
    (rows, _), (rank, columns) = params["hada_w1_a"].shape, params["hada_w1_b"].shape
    alpha = _scale(tensors, rank, layer) * rank
    return _check("loha", layer, rows, columns, params, r=rank, alpha=alpha)


def _lokr(tensors: Tensors, layer: LycorisLayer) -> LycorisReading:
    points = 1 if layer.shape is None else math.prod(layer.shape[2:])
    params = {name: value for name, value in tensors.items() if name not in ("alpha", "lokr_t2")}
    if "lokr_t2" in tensors:
        params["lokr_w2_a"] = np.ascontiguousarray(params["lokr_w2_a"].T)
        params["lokr_w2_b"] = _core(tensors["lokr_t2"], params["lokr_w2_b"], layer)
    params = {name: _flat(value) for name, value in params.items()}
    split = split_kronecker(params, points, layer.where)
    scale = 1.0 if split.rank is None else _scale(tensors, split.rank, layer)
    return _check("lokr", layer, split.rows, split.columns, params, **split.settings(scale))


def _glora(tensors: Tensors, layer: LycorisLayer) -> LycorisReading:
    a1, a2, b1, b2 = (_flat(tensors[f"{name}.weight"]) for name in ("a1", "a2", "b1", "b2"))
    for down, up in ((a2, a1), (b2, b1)):
        check_pair(down, up, layer.where)
    if layer.shape is None or layer.read is None:
        raise Unsupported(
            "what these factors mean depends on the weight that they change",
            where=layer.where,
            remedy="name the base with --base",
        )
    if len(layer.shape) != 2 or a1.shape[0] != layer.shape[1] or a2.shape[1] != layer.shape[1]:
        raise Unsupported(
            "GLoRA of a layer that is not linear, or of another shape",
            where=layer.where,
            expected=list(layer.shape),
            found=f"a1 {a1.shape}, a2 {a2.shape}",
            remedy="merge it with the tool that made it",
        )
    fed = layer.read("weight").astype(np.float64) @ a1.astype(np.float64)
    down = np.concatenate([a2, b2]).astype(np.float32)
    up = np.concatenate([fed, b1.astype(np.float64)], axis=1).astype(np.float32)
    rank = len(down)
    alpha = _scale(tensors, len(a2), layer) * rank
    return _check("lora", layer, len(up), down.shape[1], {"lora_A": down, "lora_B": up}, r=rank, alpha=alpha)


def _ia3(tensors: Tensors, layer: LycorisLayer) -> LycorisReading:
    weight, stated = tensors["weight"], tensors["on_input"]
    if stated.size != 1 or stated.reshape(-1)[0] not in (0, 1):
        raise FormatError(
            "on_input must be 0 or 1", where=f"{layer.where}.on_input", found=f"{stated.dtype} {stated.shape}"
        )
    on_input = bool(stated.reshape(-1)[0])
    factors = 1 + weight.reshape(-1).astype(np.float64)
    if layer.bias and not on_input:
        raise Unsupported(
            "(IA)^3 of LyCORIS scales the outputs without the bias, and (IA)^3 with it",
            where=layer.where,
            remedy="merge it with the tool that made it, or train it on inputs",
        )
    if layer.shape is None or len(layer.shape) != 2:
        raise Unsupported(
            "(IA)^3 of a layer that is not linear, or not known",
            where=layer.where,
            expected="a matrix",
            found=layer.shape and list(layer.shape),
            remedy="name the base with --base, or merge it where it was made",
        )
    params = {"ia3_l": factors.reshape((1, -1) if on_input else (-1, 1)).astype(np.float32)}
    return _check("ia3", layer, *layer.shape, params, feedforward=on_input)


def _difference(names: Mapping[str, str]) -> Callable[[Tensors, LycorisLayer], LycorisReading]:
    """Returns a reader of fully trained modules that are stored as differences: leaf -> the layer's tensor
    that it changes.
    """

    def read(tensors: Tensors, layer: LycorisLayer) -> LycorisReading:
        if layer.read is None:
            raise Unsupported(
                "a difference to a weight says nothing without that weight",
                where=layer.where,
                remedy="name the base with --base",
            )
        params = {}
        for leaf, name in names.items():
            if leaf not in tensors:
                if name == "weight" or layer.bias:
                    params[name] = layer.read(name).astype(np.float32)
                continue
            if name == "bias" and not layer.bias:
                raise Unsupported(
                    "a bias for a layer that has none",
                    where=f"{layer.where}.{leaf}",
                    remedy="merge it with the tool that made it",
                )
            base = layer.read(name)
            change = tensors[leaf]
            if change.shape != base.shape:
                raise BaseMismatch(
                    "the difference has another shape than the base's tensor",
                    where=f"{layer.where}.{leaf}",
                    expected=list(base.shape),
                    found=list(change.shape),
                    remedy="name the base that it was trained on",
                )
            params[name] = (base.astype(np.float64) + change.astype(np.float64)).astype(np.float32)
        return LycorisReading(params=params)

    return read


_LOHA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_CORE = frozenset({"alpha", "lokr_t2"})

FORMS: dict[str, LycorisForm] = {
    "LoRA": LycorisForm(
        frozenset({"lora_down.weight", "lora_up.weight"}),
        _lora,
        frozenset({"alpha", "lora_mid.weight", "dora_scale"}),
    ),
    "LoHa": LycorisForm(_LOHA, _loha),
    "LoHa of kernels": LycorisForm(_LOHA | {"hada_t1", "hada_t2"}, _loha),
    "LoKr": LycorisForm(frozenset({"lokr_w1", "lokr_w2"}), _lokr),
    "LoKr with w1 split": LycorisForm(frozenset({"lokr_w1_a", "lokr_w1_b", "lokr_w2"}), _lokr),
    "LoKr with w2 split": LycorisForm(frozenset({"lokr_w1", "lokr_w2_a", "lokr_w2_b"}), _lokr, _CORE),
    "LoKr with both split": LycorisForm(
        frozenset({"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}), _lokr, _CORE
    ),
    "GLoRA": LycorisForm(frozenset({"a1.weight", "a2.weight", "b1.weight", "b2.weight"}), _glora),
    "(IA)^3": LycorisForm(frozenset({"weight", "on_input"}), _ia3, frozenset()),
    "full": LycorisForm(
        frozenset({"diff"}), _difference({"diff": "weight", "diff_b": "bias"}), frozenset({"diff_b"})
    ),
    "norm": LycorisForm(
        frozenset({"w_norm"}), _difference({"w_norm": "weight", "b_norm": "bias"}), frozenset({"b_norm"})
    ),
}
LEAVES = frozenset().union(*(form.needs | form.may for form in FORMS.values()))
"""The possible last parts of a kohya key."""
