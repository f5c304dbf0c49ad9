"""The promises of a method as plain functions, for our own tests and for those who write a method of their own.

    from adapterpack.testing import prove
    prove(my_method)          # raises AssertionError and names the config, the layer and the broken promise

An invariant is a check and the trait by which a method promises it. Crossed with example configs and a few layers, the invariants are
the test matrix; ``python -m adapterpack.testing`` prints which of its cells are promised. Data are random with a fixed seed, in float64
unless an invariant says otherwise; adapters are fresh ones moved by normal noise, as training would. Some invariants need torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .methods import Method, Params, Site, fold, methods, run
from .pack import manifest as m
from .pack import peft_layout
from .pack.pack import Pack, build
from .pack.validate import load

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
        weight = self.weight if self.method.traits.reads_weight else None
        return Site("block.0.proj", self.layer.in_features, self.layer.out_features, "linear", self.layer.bias, weight)

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

    def fresh(self) -> dict[str, np.ndarray]:
        """The parameters as ``init`` makes them."""
        return self.method.init(self.config, self.site, np.random.default_rng(4))

    def trained(self, dtype: Any = np.float64) -> dict[str, np.ndarray]:
        """The fresh parameters plus normal noise of size 0.3; what is not a float stays."""
        rng = np.random.default_rng(5)
        return {name: (v + 0.3 * rng.normal(size=v.shape)).astype(dtype) if _is_float(v) else v for name, v in self.fresh().items()}


class Invariant(NamedTuple):
    """One column of the matrix: ``check`` raises AssertionError; ``needs`` says of a method whether it promises this, by ``trait``."""

    name: str
    check: Callable[[Case], None]
    needs: Callable[[Method], bool]
    trait: str


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _close(actual: Any, expected: Any, what: str) -> None:
    np.testing.assert_allclose(actual, expected, rtol=EXACT, atol=EXACT, err_msg=what)


def _is_float(value: np.ndarray) -> bool:
    return np.issubdtype(value.dtype, np.floating)


def _site(case: Case, weight: Any) -> Site:
    return dataclasses.replace(case.site, weight=weight) if case.method.traits.reads_weight else case.site


def _base(weight: Any, bias: Any) -> Callable[[Any], Any]:
    return lambda x: x @ weight.T if bias is None else x @ weight.T + bias


def _run(case: Case, params: Params, weight: Any, bias: Any, x: Any) -> Any:
    return run(case.method, case.config, params, _site(case, weight), _base(weight, bias), x)


def _fold(case: Case, params: Params, weight: Any, bias: Any, rows: slice | None = None) -> tuple[Any, Any]:
    site = _site(case, weight) if rows is None else case.site  # which knows the whole weight
    return fold(case.method, case.config, params, site, weight, bias, rows)


def _digests(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in values.items() if value is not None}


def identity_at_init(case: Case) -> None:
    """``run(init(cfg, site), x) == base(x)`` and ``fold(init(cfg, site), W, b) == (W, b)``, bit for bit: nothing may be rounded."""
    weight, bias, x = case.weight, case.bias, case.x
    _require(np.array_equal(_run(case, case.fresh(), weight, bias, x), _base(weight, bias)(x)), "a fresh adapter changes the output")
    folded, folded_bias = _fold(case, case.fresh(), weight, bias)
    _require(np.array_equal(folded, weight), "a fresh adapter changes the weight")
    before, after = (0.0 if value is None else value for value in (bias, folded_bias))
    _require(bool(np.all(after == before)), "a fresh adapter changes the bias")  # no bias and a bias of zeros are the same


def trained_adapter_changes_the_output(case: Case) -> None:
    """``run(trained, x) != base(x)``: an adapter that does nothing would keep every other law. 1e-3 is far above rounding."""
    change = np.abs(_run(case, case.trained(), case.weight, case.bias, case.x) - _base(case.weight, case.bias)(case.x)).max()
    _require(bool(change > 1e-3), f"a trained adapter changes outputs by {change:.1e} only")


def fold_equals_forward(case: Case) -> None:
    """``x @ W'.T + b' == run(x)`` with ``W', b' = fold(W, b)``, within 1e-12 in float64 (:data:`EXACT`)."""
    folded = _base(*_fold(case, case.trained(), case.weight, case.bias))
    expected = _run(case, case.trained(), case.weight, case.bias, case.x)
    _close(folded(case.x), expected, "the folded layer and the adapted layer disagree")


def fold_in_row_blocks(case: Case) -> None:
    """``fold(W, b)[rows] == fold(W[rows], b[rows], rows)`` for blocks of 1 and 3 rows, within 1e-12: blocks may sum in another order."""
    params, out = case.trained(), case.layer.out_features
    weight, bias = _fold(case, params, case.weight, case.bias)
    for rows in (slice(start, min(start + step, out)) for step in (1, 3) for start in range(0, out, step)):
        block, block_bias = _fold(case, params, case.weight[rows], None if case.bias is None else case.bias[rows], rows)
        _close(block, weight[rows], f"rows {rows.start} to {rows.stop} fold otherwise alone")
        _require((block_bias is None) == (bias is None), "a block has a bias where the whole has none, or the reverse")
        if bias is not None:
            _close(block_bias, bias[rows], f"the bias of rows {rows.start} to {rows.stop} folds otherwise alone")


def torch_equals_numpy(case: Case) -> None:
    """``run`` and ``fold`` on torch float64 tensors give what they give on numpy arrays, within 1e-12 (:data:`EXACT`)."""
    here = (case.trained(), case.weight, case.bias)
    there = ({name: _tensor(value) for name, value in here[0].items()}, _tensor(case.weight), _tensor(case.bias))
    _close(_run(case, *there, _tensor(case.x)).numpy(), _run(case, *here, case.x), "run differs under torch")
    for expected, found in zip(_fold(case, *here), _fold(case, *there), strict=True):
        _require((expected is None) == (found is None), "fold gives a bias under one library only")
        if expected is not None:
            _close(found.numpy(), expected, "fold differs under torch")


def gradients_reach_every_parameter(case: Case) -> None:
    """Within two steps of SGD from ``init`` each parameter has had a gradient that is not zero, and the base has not changed by a bit.

    Two, because a factor whose partner starts at zero (LoRA's A) can have none at the first.
    """
    params, weight, bias = _leaves(case.fresh()), _tensor(case.weight), _tensor(case.bias)
    kept = {"weight": weight.numpy(), "bias": None if bias is None else bias.numpy()}
    before, reached = _digests(kept), set()
    for _ in range(2):
        ((_run(case, params, weight, bias, _tensor(case.x)) - 1.0) ** 2).mean().backward()
        reached |= {name for name, value in params.items() if value.grad is not None and bool(value.grad.abs().max() > 0)}
        params = _leaves({name: (v if v.grad is None else v - 0.1 * v.grad).detach().numpy() for name, v in params.items()})
    trained = {name for name, value in params.items() if value.requires_grad}
    _require(reached == trained, f"no gradient reaches {', '.join(sorted(trained - reached))}")
    _require(_digests(kept) == before, "training changed the base")


def loss_falls(case: Case) -> None:
    """50 steps of Adam at rate 0.05 at least halve ``mean (run(x) - run(x; trained))^2`` from ``init``: a target that the method can reach.

    A half is little: Adam moves each parameter by up to 2.5, the target lies 0.3 away.
    """
    import torch  # noqa: PLC0415 - see the module's docstring

    layer, params = (_tensor(case.weight), _tensor(case.bias), _tensor(case.x)), _leaves(case.fresh())
    target = _run(case, {name: _tensor(value) for name, value in case.trained().items()}, *layer)
    optimizer = torch.optim.Adam([value for value in params.values() if value.requires_grad], lr=0.05)
    losses = []
    for _ in range(51):
        optimizer.zero_grad()
        loss = ((_run(case, params, *layer) - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    _require(losses[-1] < 0.5 * losses[0], f"the loss went from {losses[0]:.3g} to {losses[-1]:.3g} only")


def shapes_declared(case: Case) -> None:
    """``shapes(cfg, site)`` are the names and shapes that ``init(cfg, site)`` gives; the same seed gives the same bytes again."""
    found = {name: value.shape for name, value in case.fresh().items()}
    declared = case.method.shapes(case.config, case.site)
    _require(found == declared, f"init gives {found}, shapes says {declared}")
    _require(_digests(case.fresh()) == _digests(case.fresh()), "init is not a function of its seed")


def inputs_unchanged(case: Case) -> None:
    """The bytes of the parameters, W, b and x are the same after ``attach``, ``run`` and ``fold`` as before."""
    params, weight, bias, x = case.trained(), case.weight, case.bias, case.x
    everything = {**{f"parameter {name}": value for name, value in params.items()}, "the weight": weight, "the bias": bias, "x": x}
    before = _digests(everything)
    case.method.attach(case.config, params, _site(case, weight))
    _run(case, params, weight, bias, x)
    _fold(case, params, weight, bias)
    after = _digests(everything)
    changed = [name for name, digest in before.items() if after[name] != digest]
    _require(not changed, f"changed in place: {', '.join(changed)}")


def dtype_kept(case: Case) -> None:
    """When parameters and inputs share a dtype, ``run`` and ``fold`` keep it: float32 and float64 in numpy, bfloat16 in torch."""
    import torch  # noqa: PLC0415 - see the module's docstring

    for dtype in (np.dtype(np.float32), np.dtype(np.float64), torch.bfloat16):

        def cast(value: Any, dtype: Any = dtype) -> Any:
            array = value if isinstance(dtype, np.dtype) else _tensor(value)
            return array if value is None or not _is_float(value) else array.astype(dtype) if array is value else array.to(dtype)

        params, weight, bias = {name: cast(value) for name, value in case.trained().items()}, cast(case.weight), cast(case.bias)
        results = (_run(case, params, weight, bias, cast(case.x)), *_fold(case, params, weight, bias))
        for name, value in zip(("the output", "the weight", "the bias"), results, strict=True):
            _require(value is None or value.dtype == dtype, f"{name} is not {dtype}, though all inputs are")


def additive_law(case: Case) -> None:
    """``fold(W) - W == fold(V) - V`` for any W and V, within 1e-12: the change is the adapter's alone. The same for the bias."""
    params, other = case.trained(), np.random.default_rng(6).normal(size=case.weight.shape)
    changes = []
    for weight, bias in ((case.weight, case.bias), (other, None if case.bias is None else 2 * case.bias)):
        folded, folded_bias = _fold(case, params, weight, bias)
        changes.append((folded - weight, 0.0 if folded_bias is None else folded_bias - (0.0 if bias is None else bias)))
    _close(changes[0][0], changes[1][0], "the change depends on the weight")
    _close(changes[0][1], changes[1][1], "the change of the bias depends on the bias")


def low_rank_law(case: Case) -> None:
    """``rank(fold(0)) <= cfg.rank``: singular values past the rank are below 1e-12 of the first, which is their rounding in float64."""
    change, _ = _fold(case, case.trained(), np.zeros_like(case.weight), None)
    _require(case.config.rank is not None, "a method of low rank must say its rank")
    values = np.linalg.svd(change, compute_uv=False)
    beyond = values[case.config.rank :]
    _require(bool((beyond <= EXACT * values[0]).all()), f"singular values {values} for rank {case.config.rank}")


def config_schema(case: Case) -> None:
    """The config is frozen, is rebuilt from its own fields after a turn through JSON, and refuses a field that it does not have."""
    cls, values = case.method.config, dataclasses.asdict(case.config)
    _require(cls.__dataclass_params__.frozen, f"{cls.__name__} is not a frozen dataclass")
    back = json.loads(json.dumps(values, allow_nan=False))
    rebuilt = cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in back.items()})
    _require(rebuilt == case.config, f"{case.config} came back as {rebuilt}")
    with contextlib.suppress(TypeError):
        _require(cls(**values, no_such_field=1) is None, f"{cls.__name__} accepts a field that it does not have")


def pack_round_trip(case: Case) -> None:
    """``load(write(build(p))) == p``: tensors bit for bit, config, site and id; writing twice gives the same bytes. Needs registration."""
    params, pack = case.trained(np.float32), _pack(case)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("one", "two"):
            pack.write(Path(folder) / name)
        files = [{path.name: path.read_bytes() for path in (Path(folder) / name).iterdir()} for name in ("one", "two")]
        back = load(Path(folder) / "one")
    _require(files[0] == files[1], "writing twice gives other bytes")
    _require(back.id == pack.id, f"the id was {pack.id} and is {back.id}")
    (adapter,) = back.adapters()
    _require(_digests(adapter.params) == _digests(params), "tensors came back with other bytes")
    _require(all(adapter.params[name].dtype == value.dtype for name, value in params.items()), "tensors came back with another dtype")
    _require((adapter.site, adapter.config) == (dataclasses.replace(case.site, weight=None), _resolved(case)), "site or config changed")


def scale_recomputed(case: Case) -> None:
    """The manifest's ``scale`` and ``rank`` of a group are ``cfg.scale`` and ``cfg.rank``, exactly: nobody has to infer them."""
    (group,) = _pack(case).manifest.groups
    cfg = _resolved(case)
    _require(group.scale == cfg.scale and isinstance(group.scale, float), f"the manifest says scale {group.scale}, the config {cfg.scale}")
    _require(group.rank == cfg.rank, f"the manifest says rank {group.rank}, the config {cfg.rank}")


def peft_round_trip(case: Case) -> None:
    """The folder read as PEFT's, without the manifest, gives the same parameters bit for bit, the same config and the same features."""
    with tempfile.TemporaryDirectory() as folder:
        _pack(case).write(Path(folder) / "pack")
        (adapter,) = peft_layout.read(Path(folder) / "pack").adapters()
    _require(_digests(adapter.params) == _digests(case.trained(np.float32)), "tensors came back with other bytes")
    _require(adapter.config == _resolved(case), f"{_resolved(case)} came back as {adapter.config}")
    _require((adapter.site.in_features, adapter.site.out_features) == (case.layer.in_features, case.layer.out_features), "features changed")


def _resolved(case: Case) -> Any:
    """The config at the site without the fields that only select sites: a manifest holds what was selected instead."""
    return dataclasses.replace(case.config.at(case.site.path), targets="all-linear", modules_to_save=())


def _pack(case: Case) -> Pack:
    adapters = {case.site: (_resolved(case), case.trained(np.float32))}
    return build("example", case.method, adapters, task=m.Task("feature-extraction"), base=m.Base("org/base"))


def _tensor(value: Any) -> Any:
    import torch  # noqa: PLC0415 - see the module's docstring

    return None if value is None else torch.tensor(value)


def _leaves(params: Params) -> dict[str, Any]:
    return {name: _tensor(v.astype(np.float64)).requires_grad_() if _is_float(v) else _tensor(v) for name, v in params.items()}


def _always(method: Method) -> bool:
    return method.kind == "weight"


INVARIANTS = (
    Invariant("identity_at_init", identity_at_init, lambda method: method.traits.identity_at_init, "identity_at_init"),
    Invariant("trained_adapter_changes_the_output", trained_adapter_changes_the_output, _always, "kind"),
    Invariant("fold_equals_forward", fold_equals_forward, _always, "kind"),
    Invariant("fold_in_row_blocks", fold_in_row_blocks, lambda method: method.traits.row_separable, "row_separable"),
    Invariant("torch_equals_numpy", torch_equals_numpy, _always, "kind"),
    Invariant("gradients_reach_every_parameter", gradients_reach_every_parameter, _always, "kind"),
    Invariant("loss_falls", loss_falls, _always, "kind"),
    Invariant("shapes_declared", shapes_declared, _always, "kind"),
    Invariant("inputs_unchanged", inputs_unchanged, _always, "kind"),
    Invariant("dtype_kept", dtype_kept, _always, "kind"),
    Invariant("additive_law", additive_law, lambda method: method.traits.additive, "additive"),
    Invariant("low_rank_law", low_rank_law, lambda method: method.traits.low_rank, "low_rank"),
    Invariant("config_schema", config_schema, _always, "kind"),
    Invariant("pack_round_trip", pack_round_trip, _always, "kind"),
    Invariant("scale_recomputed", scale_recomputed, _always, "kind"),
    Invariant("peft_round_trip", peft_round_trip, lambda method: method.peft is not None, "peft"),
)


def cases(method: Method) -> Iterator[Case]:
    """Every row of the matrix for one method: its example configs on every layer."""
    return (Case(method, config, layer) for config in method.examples for layer in LAYERS)


def prove(method: Method) -> int:
    """Checks every invariant that a registered method promises, on every case; returns how many cells were checked.

    Raises:
        AssertionError: one does not hold; names the config, the layer and the invariant.
    """
    cells = [(case, invariant) for case in cases(method) for invariant in INVARIANTS if invariant.needs(method)]
    for case, invariant in cells:
        try:
            invariant.check(case)
        except Exception as error:
            what = f"{method.name}: {invariant.name} does not hold for {case.config} on {case.layer.label}: {error}"
            raise AssertionError(what) from error
    return len(cells)


def render(known: Iterable[Method]) -> str:
    """The matrix as a page of Markdown: which cells are promised and which trait leaves one out, the layers, the configs, the laws."""
    listed = sorted(known, key=lambda method: method.name)
    head = ["invariant", *(method.name for method in listed)]
    body = [[f"`{i.name}`", *("promised" if i.needs(method) else f"n/a ({i.trait})" for method in listed)] for i in INVARIANTS]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])
    configs = "\n".join(f"- {method.name}: `{config}`" for method in listed for config in method.examples)
    meanings = "\n".join(f"- `{i.name}`: {(i.check.__doc__ or '').strip().splitlines()[0]}" for i in INVARIANTS)
    intro = "A cell is promised, and then tested for every config and layer below, or not applicable because of the trait it names."
    sections = ["# Methods and what they promise", f"{intro}\nMade by `python -m adapterpack.testing`.", table,
                "## Layers", ", ".join(layer.label for layer in LAYERS), "## Configs", configs, "## Invariants", meanings]
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    sys.stdout.write(render(methods().values()))
