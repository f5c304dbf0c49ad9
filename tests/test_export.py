"""Exported graphs: every mode and both frontends against the dense formula in float64; the parity guard;
slots in plain ONNX Runtime.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import noise
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from transformers import RobertaConfig, RobertaForSequenceClassification

import adapterpack
from adapterpack import LoRA, Session, adapt, export, load, save
from adapterpack.adapter_methods import (
    BlockDiagonal,
    Dense,
    Diagonal,
    IdentityPlusLowRank,
    Kronecker,
    Method,
    NormalForm,
    PairRotation,
    Site,
    SiteConfig,
    Traits,
    evaluate,
    get,
    register,
    registry,
)
from adapterpack.base.checkpoint import Checkpoint
from adapterpack.bundle.manifest import read_bundle
from adapterpack.cli.commands.export import command as export_command
from adapterpack.errors import (
    AdapterpackError,
    BaseMismatch,
    ConfigError,
    OutputExists,
    ParityError,
    SiteNotFound,
    UnknownName,
    Unsupported,
)
from adapterpack.exporting.frontends import FRONTENDS, BaseGraph, ExportSource, Frontend
from adapterpack.exporting.proof import parity
from adapterpack.exporting.tracing.example_inputs import example
from adapterpack.graph_passes.attach import MODES, AttachPlan, base_head, with_fields
from adapterpack.graph_passes.sites import find_sites, later_uses, onnxscript_scope, uses_of_modules
from adapterpack.manifest import manifest as m
from adapterpack.onnx_graph.editing import add_initializer
from adapterpack.pack.pack import build
from adapterpack.runtime.padding import pad
from adapterpack.slots.precision import ABSENT
from adapterpack.slots.values import form_arrays, head_values
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.models.load import load_model
from adapterpack.torch_adapters.save import parts_of

stage = importlib.import_module("adapterpack.exporting.build")
arguments = importlib.import_module("adapterpack.exporting.arguments")
mobius = FRONTENDS["mobius"]
Make = Callable[..., Any]

KINDS = ("bert", "llama")
BATCHES: dict[str, tuple[int, ...]] = {
    "ragged": (11, 4, 7),
    "one": (5,),
    "one-token": (1,),
    "tokens": (1, 1, 1),
    "wide": (3,) * 24 + (6,) * 8,
}
"""Lengths of rows. ``wide`` and its first 24 rows: as many rows as BERT has features, and as Llama has, where
a MatMul would broadcast.
"""
RELATIVE = 2e-5
"""Of the largest logit. float32 through two layers differs from float64 by about 1e-6 of it."""


def batch_of(kind: str, lengths: tuple[int, ...], seed: int = 0) -> dict[str, np.ndarray]:
    """Random ids, padded on the left for a decoder and on the right for an encoder."""
    rng = np.random.default_rng(seed)
    return pad([list(map(int, rng.integers(3, 96, length))) for length in lengths], 0, left=kind == "llama")


def logits_of(model: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
    """The float64 model's logits; a decoder counts positions from its first real token."""
    inputs = {key: torch.from_numpy(value) for key, value in batch.items()}
    if model.config.model_type == "llama":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def assert_close(
    found: np.ndarray, expected: np.ndarray, mask: np.ndarray, relative: float = RELATIVE
) -> None:
    """Equal over real positions within ``relative`` of the largest logit; what is wider than expected must be
    switched off.
    """
    assert (found[..., expected.shape[-1] :] == ABSENT).all()
    found = found[..., : expected.shape[-1]]
    assert found.shape == expected.shape
    if expected.ndim == 3:
        found, expected = found[mask > 0], expected[mask > 0]
    assert np.abs(found - expected).max() <= relative * np.abs(expected).max()


@pytest.mark.fast
def test_the_call_and_the_command_take_the_fields_of_the_request() -> None:
    """Every field is a keyword of ``export`` and an option of the command, with the same default."""
    request = importlib.import_module("adapterpack.exporting.arguments").ExportRequest
    fields = dict(inspect.signature(request).parameters)
    assert dict(inspect.signature(export).parameters) == fields
    options = export_command.make_context("export", ["models/base", "-o", "bundle"]).params
    own = {"out", "static_cache", "as_json"}
    assert options.keys() - own == fields.keys() - own - {"progress"}
    for name in fields.keys() - {"base", "packs", "out", "progress"}:
        assert (options[name] or None) == (fields[name].default or None), name


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        pytest.param(kind, mode, marks=[pytest.mark.fast] * (kind == "llama" and mode == "bank"))
        for kind in KINDS
        for mode in MODES
    ],
)
def test_base_and_adapters_equal_the_dense_formula(
    kind: str, mode: str, bundle_of: Make, dense_of: Make
) -> None:
    """logits = model with W + s B A, for the base and each adapter: ragged and padded, one row, one token, as
    many rows as features.
    """
    session = Session(bundle_of(kind, mode), "cpu")
    assert session.bundle.frontend.startswith({"bert": "transformers ", "llama": "mobius-onnx "}[kind])
    for name in (None, "alpha", "beta") if mode != "folded" else ("alpha",):
        for lengths in (*BATCHES.values(), BATCHES["wide"][:24]):
            batch = batch_of(kind, lengths)
            assert_close(
                session.run(batch, name)["logits"],
                logits_of(dense_of(kind, name), batch),
                batch["attention_mask"],
            )


def test_adapters_change_the_output(dense_of: Make) -> None:
    """The tests above can tell the adapters apart: their outputs lie far from the base's and from each
    other's.
    """
    for kind in KINDS:
        batch = batch_of(kind, BATCHES["ragged"])
        found = [logits_of(dense_of(kind, name), batch)[..., :2] for name in (None, "alpha", "beta", "gamma")]
        scale = max(float(np.abs(one).max()) for one in found)
        assert min(float(np.abs(a - b).max()) for i, a in enumerate(found) for b in found[:i]) > 0.01 * scale


@pytest.mark.parametrize("mode", MODES)
def test_a_step_on_the_cache_equals_the_whole_sequence(mode: str, bundle_of: Make, dense_of: Make) -> None:
    """Logits of tokens that follow a cache (past > 0, one or three at a time) are those of the whole sequence
    run at once (past = 0).
    """
    session = Session(bundle_of("llama", mode), "cpu")
    batch = batch_of("llama", (9, 5, 12))
    names = ["alpha"] * 3 if mode == "folded" else ["beta", None, "alpha"]
    expected = np.stack([logits_of(dense_of("llama", name), batch)[row] for row, name in enumerate(names)])
    for step in (1, 3):
        first = {key: value[:, :-step] for key, value in batch.items()}
        outputs = session.run(first, names)
        assert_close(outputs["logits"], expected[:, :-step], first["attention_mask"])
        past = {
            key.replace("present.", "past_key_values."): value
            for key, value in outputs.items()
            if key.startswith("present.")
        }
        after = session.run(
            {"input_ids": batch["input_ids"][:, -step:], "attention_mask": batch["attention_mask"], **past},
            names,
        )
        assert_close(after["logits"], expected[:, -step:], batch["attention_mask"][:, -step:])
        longest = {key: value[-1:] for key, value in past.items()}
        unmasked = session.run({"input_ids": batch["input_ids"][-1:, -step:], **longest}, names[-1:])
        # no padding: no mask is needed
        assert_close(unmasked["logits"], expected[-1:, -step:], np.ones((1, step)))


MIXES: tuple[tuple[str | None, ...], ...] = (
    ("alpha", None, "beta"),
    ("beta", "beta", "alpha"),
    (None, None, None),
    ("alpha", "alpha", "alpha"),
    ("beta", None, None),
)


@pytest.mark.parametrize("mode", ["bank", "inputs"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_mixed_batch_equal_single_runs(kind: str, mode: str, bundle_of: Make) -> None:
    """run(x, [a, b, ...])[i] == run(x, a_i)[i] within 1e-5, and == run(x_i alone, a_i), with duplicates and
    with all rows on the base.
    """
    session = Session(bundle_of(kind, mode), "cpu")
    batch = batch_of(kind, BATCHES["ragged"], seed=1)
    mask = batch["attention_mask"] > 0
    for names in MIXES:
        for _ in range(2):  # again: an output must not live in memory that has been given back
            mixed = session.run(batch, names)
            singles = {name: session.run(batch, name)["logits"] for name in set(names)}
            for row, name in enumerate(names):
                single = singles[name][row]
                real = mask[row] if single.ndim == 2 else slice(None)
                wide = single.shape[-1]
                assert (mixed["logits"][row][..., wide:] == ABSENT).all()
                assert np.abs(mixed["logits"][row][..., :wide] - single)[real].max() <= 1e-5
                alone = session.run({"input_ids": batch["input_ids"][row][mask[row]][None]}, [name])[
                    "logits"
                ][0]
                assert np.abs(mixed["logits"][row][..., :wide][real] - alone).max() <= 1e-5


def test_heads_of_different_width_share_a_batch(bundle_of: Make, dense_of: Make) -> None:
    """Rows of 2 (base), 3 and 5 labels: labels that a row's adapter lacks have the logit -1e9, and
    probability 0 exactly.
    """
    batch = batch_of("bert", (6, 9, 4, 5))
    names = ["alpha", None, "beta", "alpha"]
    for mode in ("bank", "inputs"):
        session = Session(bundle_of("bert", mode), "cpu")
        logits = session.run(batch, names)["logits"]
        assert logits.shape == (4, 5)
        for row, (name, width) in enumerate(zip(names, (3, 2, 5, 3), strict=True)):
            assert (logits[row, width:] == -1e9).all()
            weights = np.exp(logits[row] - logits[row].max())
            assert (weights[width:] == 0).all()
            assert_close(
                logits[row, :width], logits_of(dense_of("bert", name), batch)[row], batch["attention_mask"]
            )
            assert len(session.labels(name)) == width


def test_a_pack_without_a_head_has_the_heads_of_the_base(
    base_of: Make, pack_of: Make, dense_of: Make, tmp_path: Path
) -> None:
    """An adapter that trained no classifier, beside one that did: its logits go through the base's
    classifier.
    """
    bundle = export(
        base_of("bert"),
        [pack_of("bert", "alpha"), pack_of("bert", "gamma")],
        tmp_path / "bundle",
        mode="bank",
    )
    session, batch = Session(tmp_path / "bundle", "cpu"), batch_of("bert", BATCHES["ragged"])
    assert bundle.max_labels == 3
    assert_close(
        session.run(batch, "gamma")["logits"],
        logits_of(dense_of("bert", "gamma"), batch),
        batch["attention_mask"],
    )
    assert session.labels("gamma") == session.labels(None) == ("LABEL_0", "LABEL_1")


@pytest.mark.long
def test_a_head_of_several_layers(tmp_path: Path) -> None:
    """RoBERTa's classifier is two layers, of which only the last is as wide as the labels: both are replaced,
    at their own widths.
    """
    torch.manual_seed(2)
    base = tmp_path / "roberta"
    config = RobertaConfig(
        vocab_size=60,
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=20,
        pad_token_id=1,
        max_position_embeddings=40,
        num_labels=2,
    )
    RobertaForSequenceClassification(config).save_pretrained(base)
    names = {"narrow": 3, "broad": 14}
    models, packs = {}, []
    for name, labels in names.items():
        model = load_model(get_task("text-classification"), base, [f"l{number}" for number in range(labels)])
        adapt(model, LoRA(r=2, targets=("query",), modules_to_save=("classifier",)), name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.5)
        packs.append(save(model, None, base=base, name=name))
        models[name] = model.eval()
    bundle = export(base, packs, tmp_path / "bundle", mode="bank")
    widths = {site.path: site.labels for site in bundle.sites.values() if site.role == "full"}
    assert widths == {"classifier.dense": 12, "classifier.out_proj": 14}
    batch = pad([[5, 9, 7, 30], [8, 9]], 1, left=False)
    for name, labels in names.items():
        with torch.no_grad():
            expected = models[name](
                **{key: torch.from_numpy(value) for key, value in batch.items()}
            ).logits.numpy()
        found = Session(tmp_path / "bundle", "cpu").run(batch, name)["logits"]
        assert found.shape == (2, 14)
        assert expected.shape == (2, labels)
        assert_close(found, expected, batch["attention_mask"])


def test_every_output_of_an_encoder_is_right(tiny_bert: Path, tmp_path: Path) -> None:
    """Features of a bank: hidden states and the pooled output, whose layer sees [batch, 24]; also with 24
    rows.
    """
    model = adapt(
        load_model(get_task("feature-extraction"), tiny_bert),
        LoRA(r=4, targets=("pooler.dense", "key")),
        "one",
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    export(tiny_bert, [save(model, None, base=tiny_bert, name="one")], tmp_path / "bundle", mode="bank")
    session = Session(tmp_path / "bundle", "cpu")
    plain = load_model(get_task("feature-extraction"), tiny_bert).eval()
    for lengths in (BATCHES["ragged"], (4,) * 24):
        batch = batch_of("bert", lengths)
        inputs = {key: torch.from_numpy(value) for key, value in batch.items()}
        with torch.no_grad():
            adapted, base = model.eval()(**inputs), plain(**inputs)
        names = ["one" if row % 2 else None for row in range(len(lengths))]
        outputs = session.run(batch, names)
        for key in ("last_hidden_state", "pooler_output"):
            expected = np.stack(
                [(adapted if name else base)[key][row].numpy() for row, name in enumerate(names)]
            )
            assert np.abs(adapted[key] - base[key]).max() > 0.05
            assert_close(outputs[key], expected, batch["attention_mask"])


# The emitter alone, on graphs of one layer, against the normal form in float64.


@dataclass(frozen=True)
class Everything(SiteConfig):
    """A config of a method that uses the whole normal form."""

    r: int = 2

    @property
    def rank(self) -> int:
        return self.r


def everything_shapes(cfg: Everything, site: Site) -> dict[str, tuple[int, ...]]:
    wide, out = site.in_features, site.out_features
    return {"pre": (wide,), "down": (cfg.r, wide), "up": (out, cfg.r), "scale": (out,), "shift": (out,)}


everything = Method(
    name="everything",
    summary="scales the inputs, adds a low-rank branch, scales the output and its bias, shifts",
    paper="",
    config=Everything,
    traits=Traits(additive=False, identity_at_init=False, row_separable=True, low_rank=False),
    shapes=everything_shapes,
    init=lambda cfg, site, rng: {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in everything_shapes(cfg, site).items()
    },
    normal_form=lambda cfg, p, site: NormalForm(
        Diagonal(p["pre"]), Dense(p["down"]), Dense(p["up"]), p["scale"], p["shift"]
    ),
    examples=(Everything(),),
)


@pytest.fixture
def whole_form(monkeypatch: pytest.MonkeyPatch) -> Iterator[Method]:
    monkeypatch.setattr(registry.METHODS, "_values", dict(registry.METHODS._values))
    yield register(everything)


def formula(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, p: dict[str, np.ndarray] | None
) -> np.ndarray:
    """y' = scale * (W (pre * x) + b + up (down x)) + shift, in float64; the layer itself without an
    adapter.
    """
    b = 0.0 if bias is None else bias.astype(np.float64)
    W, wide = weight.astype(np.float64), x.astype(np.float64)
    if p is None:
        return wide @ W.T + b
    q = {name: value.astype(np.float64) for name, value in p.items()}
    return q["scale"] * ((wide * q["pre"]) @ W.T + b + (wide @ q["down"].T) @ q["up"].T) + q["shift"]


def one_layer(op: str, rank: int, weight: np.ndarray, bias: np.ndarray | None) -> Any:
    """A graph of one linear module: MatMul (with Add), or Gemm on a weight that lies [out, in]."""
    lead = ["batch", *["apart"] * (rank == 4), "tokens"][: rank - 1]
    x = ir.Value(
        name="input_ids", shape=ir.Shape([*lead, weight.shape[1]]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    stored = np.ascontiguousarray(weight if op == "Gemm" else weight.T)
    floats = ir.TensorType(ir.DataType.FLOAT)
    constants = [
        ir.Value(name=name, shape=ir.Shape(array.shape), type=floats, const_value=ir.tensor(array, name=name))
        for name, array in (("weight", stored), ("bias", bias))
        if array is not None
    ]
    if op == "Gemm":
        nodes = [ir.node("Gemm", [x, *constants], {"transB": 1}, name="layer")]
    else:
        nodes = [ir.node("MatMul", [x, constants[0]], name="layer")]
        nodes += (
            [ir.node("Add", [nodes[0].outputs[0], constants[1]], name="plus")] if bias is not None else []
        )
    y = nodes[-1].outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape([*lead, weight.shape[0]]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [y], nodes=nodes, initializers=constants, opset_imports={"": 20}, name="one")
    return ir.Model(graph, ir_version=10)


LAYERS = [
    ("MatMul", 4, True),
    ("MatMul", 3, True),
    ("MatMul", 3, False),
    ("MatMul", 2, True),
    ("MatMul", 2, False),
    ("Gemm", 2, True),
    ("Gemm", 2, False),
]


@pytest.mark.fast
@pytest.mark.parametrize("mode", ["bank", "inputs"])
@pytest.mark.parametrize(("op", "rank", "biased"), LAYERS)
def test_every_field_of_the_normal_form(op: str, rank: int, biased: bool, mode: str, tmp_path: Path) -> None:
    """All five fields on one layer, 7 in and 5 out; 7 rows, too, where a weight [rows, 7, 5] would broadcast
    against [7, 7].
    """
    rng = np.random.default_rng(4)
    weight = rng.normal(size=(5, 7)).astype(np.float32)
    bias = rng.normal(size=5).astype(np.float32) if biased else None
    site = Site("layer", 7, 5, "linear", biased)
    params = [everything.init(Everything(r=r), site, rng) for r in (2, 3)]
    values = [
        {
            f"layer.{field}": array
            for field, array in form_arrays(everything.normal_form(Everything(), p, site), 5).items()
        }
        for p in params
    ]
    model = one_layer(op, rank, weight, bias)
    sites = find_sites(model, lambda node: "layer")
    mapped = with_fields(sites, values)
    assert mapped["layer"].fields == ("down", "pre", "scale", "shift", "up")
    MODES[mode](model, AttachPlan([], values, mapped, base_head(model, mapped), 3, 3))
    ir.save(model, tmp_path / "model.onnx")
    # among others, that no node stands before what it needs
    onnx.checker.check_model(tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for rows in (1, 3, 7):
        x = rng.normal(size=(rows, *(2, 4)[4 - rank :], 7)).astype(np.float32)
        layers = [None, *params]
        if mode == "bank":
            ids = np.arange(rows) % 3
            found = session.run(None, {"input_ids": x, "adapter_ids": ids})[0]
            expected = np.stack([formula(x[row], weight, bias, layers[ids[row]]) for row in range(rows)])
            # sums of up to ten products of size 10 in float32
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
        else:
            for feed, p in zip([{}, *values], layers, strict=True):
                found = session.run(None, {"input_ids": x, **feed})[0]
                np.testing.assert_allclose(found, formula(x, weight, bias, p), rtol=0, atol=2e-5)


@pytest.mark.fast
@pytest.mark.parametrize("mode", ["bank", "inputs"])
@pytest.mark.parametrize(("op", "rank", "biased"), LAYERS)
def test_heads_of_any_width(op: str, rank: int, biased: bool, mode: str, tmp_path: Path) -> None:
    """A module that was trained whole, 6 and 2 labels in place of 4, with a bias or without: y' = W' x + b',
    other labels switched off.
    """
    rng = np.random.default_rng(6)

    def head(labels: int) -> dict[str, np.ndarray]:
        params = {
            "weight": rng.normal(size=(labels, 7)).astype(np.float32),
            "bias": rng.normal(size=labels).astype(np.float32),
        }
        return params if biased else {"weight": params["weight"]}

    base, *heads = (head(labels) for labels in (4, 6, 2))
    values = [head_values("layer", params) for params in heads]
    model = one_layer(op, rank, base["weight"], base.get("bias"))
    mapped = with_fields(find_sites(model, lambda node: "layer"), values)
    assert (mapped["layer"].role, mapped["layer"].labels) == ("full", 6)
    MODES[mode](model, AttachPlan([], values, mapped, base_head(model, mapped), 4, 3))
    model.graph.outputs[0].shape = None
    ir.save(model, tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    x = rng.normal(size=(4, *(2, 3)[4 - rank :], 7)).astype(np.float32)
    for number, params in enumerate((base, *heads)):
        slot = {"adapter_ids": np.full(4, number)} if mode == "bank" else values[number - 1] if number else {}
        found = session.run(None, {"input_ids": x, **slot})[0]
        expected = formula(x, params["weight"], params.get("bias"), None)
        assert found.shape[-1] == (6 if mode == "bank" else expected.shape[-1])
        np.testing.assert_allclose(found[..., : expected.shape[-1]], expected, rtol=0, atol=2e-5)
        assert (found[..., expected.shape[-1] :] == ABSENT).all()


@pytest.mark.fast
def test_a_module_is_replaced_or_adapted() -> None:
    """One pack that replaces a module and another that adapts it cannot share a graph: refused, not half
    done.
    """
    sites = find_sites(one_layer("MatMul", 3, np.ones((4, 7), np.float32), None), lambda node: "layer")
    adapted = {"layer.down": np.ones((7, 1), np.float32), "layer.up": np.ones((1, 4), np.float32)}
    with pytest.raises(Unsupported, match="layer"):
        with_fields(sites, [adapted, head_values("layer", {"weight": np.ones((4, 7), np.float32)})])


@pytest.mark.fast
def test_a_gemm_that_is_more_than_a_layer_is_no_site() -> None:
    """alpha * x W + b is not a linear module's x W + b."""
    model = one_layer("Gemm", 2, np.ones((3, 2), np.float32), None)
    assert list(find_sites(model, lambda node: "layer")) == ["layer"]
    model.graph[0].attributes["alpha"] = ir.AttrFloat32("alpha", 0.5)
    assert find_sites(model, lambda node: "layer") == {}


@pytest.mark.fast
def test_every_use_of_a_shared_module_reads_its_slots() -> None:
    """And what a later use reads is adapted; with another weight, a slot could not tell the uses apart."""
    rng = np.random.default_rng(2)
    weight, down, up = (rng.normal(size=size).astype(np.float32) for size in ((4, 4), (4, 2), (2, 4)))
    model = one_layer("MatMul", 3, weight, None)
    first, end = model.graph[0], model.graph.outputs[0]
    first.outputs[0].name = "between"
    second = ir.node("MatMul", [first.outputs[0], first.inputs[1]], name="again")
    second.outputs[0].name, second.outputs[0].shape, second.outputs[0].type = "y", end.shape, end.type
    first.outputs[0].shape, first.outputs[0].type = end.shape, end.type
    model.graph.append(second)
    model.graph.outputs[0] = second.outputs[0]
    every = uses_of_modules(model, lambda node: "layer")
    values = [{"layer.down": down, "layer.up": up}]
    mapped = with_fields(find_sites(model, lambda node: "layer"), values)
    MODES["bank"](model, AttachPlan([], values, mapped, {}, 2, 2, later=later_uses(model, every)))
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    found = session.run(None, {"input_ids": x, "adapter_ids": np.array([0, 1])})[0]
    for row, matrix in enumerate((weight.T, weight.T + down @ up)):
        np.testing.assert_allclose(found[row], x[row] @ matrix @ matrix, rtol=0, atol=1e-4)
    assert later_uses(model, [every[0], dataclasses.replace(every[1], weight="another")]) == {}


@pytest.mark.fast
def test_rows_must_be_batches() -> None:
    """Bank mode is refused where the first axis of a site's input is not the named batch: tokens, windows, or
    a fixed number.
    """
    for shape in (["tokens", 7], [4, 7], [None, 7], ["windows", "a", "b", 7]):
        model = one_layer("MatMul", 3, np.ones((5, 7), np.float32), None)
        x = model.graph.inputs[0]
        ids = ir.Value(name="ids", shape=ir.Shape(["batch", 3]), type=ir.TensorType(ir.DataType.INT64))
        model.graph.inputs.append(ids)
        x.name, ids.name, x.shape = "x", "input_ids", ir.Shape(shape)
        mapped = with_fields(find_sites(model, lambda node: "layer"), [])
        with pytest.raises(Unsupported, match="first axis"):
            MODES["bank"](model, AttachPlan([], [], mapped, {}, 2, 4))
        ids.shape = ir.Shape([None, 3])
        with pytest.raises(Unsupported, match="named axis"):
            MODES["bank"](model, AttachPlan([], [], mapped, {}, 2, 4))


@pytest.mark.fast
def structures(rng: np.random.Generator) -> list[NormalForm]:
    """One form for every structure that a slot can carry, on a layer of 6 inputs and 5 outputs."""
    some = lambda *shape: rng.normal(size=shape)  # noqa: E731 - a short name for a short thing
    return [
        NormalForm(pre=Dense(some(6, 6))),
        NormalForm(pre=IdentityPlusLowRank(some(2, 6), some(6, 2)), output_scale=some(5)),
        NormalForm(pre=BlockDiagonal(some(3, 2, 2)), shift=some(5)),
        NormalForm(pre=Diagonal(some(6)), post=PairRotation(some(6), some(6), 3, 5), shift=some(5)),
        NormalForm(pre=Diagonal(some(6)), down=Dense(some(5, 6))),
        NormalForm(down=Kronecker(some(5, 2), some(1, 3)), output_scale=some(1)),
        NormalForm(down=Dense(some(3, 6)), up=Dense(some(5, 3))),
    ]


@pytest.mark.fast
@pytest.mark.parametrize("mode", ["bank", "inputs"])
@pytest.mark.parametrize(("op", "rank", "biased"), LAYERS)
def test_every_structure_of_the_normal_form(
    op: str, rank: int, biased: bool, mode: str, tmp_path: Path
) -> None:
    """Forms of all structures share one graph, each in its own slot, and none is felt in another's rows."""
    rng = np.random.default_rng(6)
    weight, bias = (
        rng.normal(size=(5, 6)).astype(np.float32),
        rng.normal(size=5).astype(np.float32) if biased else None,
    )
    forms = structures(rng)
    values = [{f"layer.{field}": array for field, array in form_arrays(form, 5).items()} for form in forms]
    model = one_layer(op, rank, weight, bias)
    mapped = with_fields(find_sites(model, lambda node: "layer"), values)
    MODES[mode](model, AttachPlan([], values, mapped, base_head(model, mapped), len(forms) + 1, 3))
    ir.save(model, tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    base = lambda x: x @ weight.astype(float).T + (0 if bias is None else bias)  # noqa: E731
    for rows in (1, 6, 7):
        x = rng.normal(size=(rows, *(2, 4)[4 - rank :], 6)).astype(np.float32)
        dense = [base(x.astype(float)), *(evaluate(form, base, x.astype(float)) for form in forms)]
        if mode == "bank":
            ids = np.arange(rows) % len(dense)
            found = session.run(None, {"input_ids": x, "adapter_ids": ids})[0]
            # float32 sums of up to six products of size 10, two deep
            np.testing.assert_allclose(
                found, np.stack([dense[ids[row]][row] for row in range(rows)]), rtol=0, atol=1e-4
            )
        else:
            for feed, expected in zip([{}, *values], dense, strict=True):
                np.testing.assert_allclose(
                    session.run(None, {"input_ids": x, **feed})[0], expected, rtol=0, atol=1e-4
                )


@pytest.mark.parametrize("mode", ["bank", "inputs"])
def test_a_method_of_ones_own_in_a_real_model(
    mode: str, whole_form: Method, tiny_llama: Path, tmp_path: Path
) -> None:
    """The whole normal form at three kinds of layer of the Llama, beside a LoRA, equals a model with the
    formula folded into its layers.
    """
    rng, checkpoint = np.random.default_rng(5), Checkpoint(tiny_llama)
    wanted = [
        name
        for name in checkpoint.tensors
        if name.endswith(("q_proj.weight", "down_proj.weight", "gate_proj.weight"))
    ]
    adapters, lora = {}, {}
    for name in wanted:
        out, wide = checkpoint.tensors[name].shape
        site = Site(name.removesuffix(".weight"), wide, out)
        p = everything.init(Everything(r=3), site, rng)
        near = {name: (1 if name in {"pre", "scale"} else 0) + 0.25 * value for name, value in p.items()}
        adapters[site] = (Everything(r=3), near)
        lora[site] = (
            LoRA(r=2),
            {
                "lora_A": 0.3 * rng.normal(size=(2, wide)).astype(np.float32),
                "lora_B": 0.3 * rng.normal(size=(out, 2)).astype(np.float32),
            },
        )
    base = m.Base("tiny", None, None, *checkpoint.fingerprint()[:2])
    task = m.PackTask("text-generation")
    packs = [
        build("whole", whole_form, adapters, task=task, base=base),
        build("lora", get("lora"), lora, task=task, base=base),
    ]
    export(tiny_llama, packs, tmp_path / "bundle", mode=mode)
    model = load_model(get_task("text-generation"), tiny_llama).double().eval()
    for site, (_, p) in adapters.items():
        layer = model.get_submodule(site.path)
        q = {name: torch.from_numpy(value).double() for name, value in p.items()}
        with torch.no_grad():
            layer.weight.copy_(q["scale"][:, None] * (layer.weight * q["pre"] + q["up"] @ q["down"]))
        layer.bias = torch.nn.Parameter(q["shift"])
    batch = batch_of("llama", BATCHES["ragged"])
    session = Session(tmp_path / "bundle", "cpu")
    mixed = session.run(batch, ["whole", "lora", "whole"])["logits"]
    expected = logits_of(model, batch)
    for row in (0, 2):
        real = batch["attention_mask"][row] > 0
        assert np.abs(mixed[row][real] - expected[row][real]).max() <= RELATIVE * np.abs(expected).max()


# Graphs in ONNX Runtime alone: no adapterpack at run time.


@pytest.mark.parametrize("kind", KINDS)
def test_a_bank_in_plain_onnxruntime(kind: str, bundle_of: Make, dense_of: Make) -> None:
    """``session.run`` with ``adapter_ids``: slot 0 is the base, the others as the manifest says, an empty one
    the base again.
    """
    plain = ort.InferenceSession(bundle_of(kind, "bank") / "model.onnx", providers=["CPUExecutionProvider"])
    batch = batch_of(kind, (6, 4, 5, 6))
    feeds = complete(plain, batch)
    assert {"adapter_ids"} == {value.name for value in plain.get_inputs()} - set(feeds)
    logits = plain.run(["logits"], {**feeds, "adapter_ids": np.array([2, 0, 1, 3])})[0]
    for row, name in enumerate(("beta", None, "alpha", None)):
        expected = logits_of(dense_of(kind, name), batch)
        one = {key: value[row : row + 1] for key, value in batch.items()}
        assert_close(logits[row : row + 1], expected[row : row + 1], one["attention_mask"])


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_in_plain_onnxruntime(kind: str, bundle_of: Make, dense_of: Make, tmp_path: Path) -> None:
    """In a process that cannot import adapterpack: without an adapter the graph is the base, with ONNX
    Runtime's own LoraAdapter the adapter, whatever ran before.
    """
    folder, batch = bundle_of(kind, "inputs"), batch_of(kind, BATCHES["ragged"])
    plain = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    np.savez(tmp_path / "feeds.npz", **complete(plain, batch))
    script = Path(__file__).parent / "interop" / "plain_onnxruntime.py"
    subprocess.run(
        [sys.executable, script, folder, tmp_path / "feeds.npz", tmp_path / "out.npz", "alpha", "beta"],
        check=True,
    )
    found = np.load(tmp_path / "out.npz")
    for number, name in enumerate((None, "alpha", "beta", None)):
        assert_close(found[f"run_{number}"], logits_of(dense_of(kind, name), batch), batch["attention_mask"])


def complete(plain: ort.InferenceSession, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The feeds that a graph asks for: positions and an empty cache for a decoder."""
    feeds = dict(batch)
    for value in plain.get_inputs():
        if value.name == "position_ids":
            feeds["position_ids"] = np.clip(batch["attention_mask"].cumsum(1) - 1, 0, None)
        elif value.name.startswith("past_key_values."):
            feeds[value.name] = np.zeros(
                (batch["input_ids"].shape[0], value.shape[1], 0, value.shape[3]), np.float32
            )
    return feeds


def test_norms_have_epsilons_of_their_own(tmp_path: Path) -> None:
    """Of a builder that gives all norms the configuration's, those of latents get back their own."""
    fields = {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "vocab_size": 96,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
    }
    config = transformers.AutoConfig.for_model(
        "deepseek_v3", rms_norm_eps=1e-3, first_k_dense_replace=1, **fields
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    graph = mobius.build(ExportSource(tmp_path / "base", get_task("text-generation"))).model.graph
    found = {
        (onnxscript_scope(node) or "").rpartition(".")[2]: node.attributes.get_float("epsilon")
        for node in graph
        if "epsilon" in node.attributes
    }
    own = {key for key, value in found.items() if value == pytest.approx(1e-6)}
    assert own == {"q_a_layernorm", "kv_a_layernorm"}
    assert found["input_layernorm"] == pytest.approx(1e-3)


# The guard: no graph leaves unproved.


def crooked(change: Callable[[Any], None]) -> Frontend:
    """The real frontend with a fault in its graph."""

    def made(source: ExportSource) -> BaseGraph:
        graph = mobius.build(source)
        change(graph.model)
        return graph

    return Frontend("crooked", mobius.supports, made)


def weight_scaled(model: Any) -> None:
    value = model.graph.initializers["model.layers.1.self_attn.v_proj.weight_t"]
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.01), name=value.name)


def weights_exchanged(model: Any) -> None:
    one, two = (
        model.graph.initializers[f"model.layers.1.mlp.{name}_proj.weight_t"] for name in ("gate", "up")
    )
    one.const_value, two.const_value = (
        ir.tensor(two.const_value.numpy().copy()),
        ir.tensor(one.const_value.numpy().copy()),
    )


def not_a_number(model: Any) -> None:
    value = model.graph.initializers["model.layers.0.mlp.up_proj.weight_t"]
    value.const_value = ir.tensor(np.full_like(value.const_value.numpy(), np.nan), name=value.name)


def cache_exchanged(model: Any) -> None:
    """Right without a past, wrong with one: the past of layer 0 is read as layer 1's, and the other way
    round.
    """
    found = {value.name: value for value in model.graph.inputs}
    names = ["past_key_values.0.key", "past_key_values.1.key"]
    uses = [list(found[name].uses()) for name in names]
    for used, other in zip(uses, reversed(names), strict=True):
        for node, index in used:
            node.replace_input_with(index, found[other])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", [weight_scaled, weights_exchanged, not_a_number, cache_exchanged])
def test_a_wrong_graph_is_never_published(
    change: Callable[[Any], None],
    mode: str,
    tiny_llama: Path,
    pack_of: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A weight off by one per cent, two exchanged, NaN, a wrong cache: ParityError, and nothing is left on
    disk.
    """
    monkeypatch.setattr(stage, "FRONTENDS", {"crooked": crooked(change)})
    with pytest.raises(ParityError, match="crooked"):
        export(tiny_llama, [pack_of("llama", "alpha")], tmp_path / "bundle", mode=mode)
    assert list(tmp_path.iterdir()) == []


def fails(source: ExportSource) -> BaseGraph:
    raise NotImplementedError("query_pre_attn_scalar")


@pytest.mark.parametrize(
    "first",
    [crooked(weight_scaled), Frontend("fails", mobius.supports, fails)],
    ids=lambda frontend: frontend.name,
)
def test_the_next_frontend_is_tried(
    first: Frontend,
    tiny_llama: Path,
    pack_of: Make,
    dense_of: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A graph that is wrong, or cannot be built, leaves the field to the next frontend; the reason is
    told.
    """
    monkeypatch.setattr(stage, "FRONTENDS", {"first": first._replace(rank=0), "mobius": mobius})
    told: list[str] = []
    bundle = export(tiny_llama, [pack_of("llama", "beta")], tmp_path / "bundle", progress=told.append)
    assert bundle.frontend.startswith("mobius-onnx")
    assert any(text.startswith(f"the frontend {first.name} made no graph that fits: ") for text in told)
    batch = batch_of("llama", BATCHES["ragged"])
    found = Session(tmp_path / "bundle", "cpu").run(batch, "beta")["logits"]
    assert_close(found, logits_of(dense_of("llama", "beta"), batch), batch["attention_mask"])


def weight_lost(model: Any) -> None:
    """ONNX Runtime cannot open it: a node reads what nothing gives, as of builders that expect a bias which a
    family has not.
    """
    del model.graph.initializers["model.layers.1.mlp.up_proj.weight_t"]


def rotation_misfits(model: Any) -> None:
    """ONNX Runtime opens it and cannot run it: tables narrower than a rotation, as of an odd rotary size."""
    for node in model.graph:
        if node.op_type == "RotaryEmbedding":
            node.attributes["rotary_embedding_dim"] = ir.AttrInt64("rotary_embedding_dim", 2)


@pytest.mark.parametrize("change", [weight_lost, rotation_misfits])
def test_the_next_frontend_is_tried_whatever_the_first_one_s_graph_raises(
    change: Callable[[Any], None],
    tiny_llama: Path,
    pack_of: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = crooked(change)._replace(rank=0)
    monkeypatch.setattr(stage, "FRONTENDS", {"crooked": first, "mobius": mobius})
    told: list[str] = []
    bundle = export(tiny_llama, [pack_of("llama", "beta")], tmp_path / "bundle", progress=told.append)
    assert bundle.frontend.startswith("mobius-onnx")
    assert any(text.startswith("the frontend crooked made no graph that fits: ") for text in told)


def test_every_frontend_s_reason_is_shown_when_all_fail(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {
        "lost": crooked(weight_lost),
        "misfits": crooked(rotation_misfits),
        "scaled": crooked(weight_scaled),
        "fails": Frontend("fails", mobius.supports, fails),
    }
    monkeypatch.setattr(
        stage, "FRONTENDS", {name: frontend._replace(name=name) for name, frontend in wrong.items()}
    )
    with pytest.raises(ParityError) as caught:
        export(tiny_llama, [], tmp_path / "bundle", mode="folded")
    for reason in (
        "lost: ONNX Runtime cannot open",
        "misfits: ONNX Runtime could not run",
        "scaled: the graph disagrees with torch",
        "fails: this architecture cannot be built: query_pre_attn_scalar",
    ):
        assert reason in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.parametrize("family", ["Glm4", "SeedOss", "GPTNeoX"])
def test_families_whose_first_graph_no_runtime_runs_are_exported(family: str, tmp_path: Path) -> None:
    """The builder expects biases that GLM 4 and Seed-OSS have not, and an even rotary size."""
    transformers.set_seed(5)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 40,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 64,
        "rotary_pct": 0.3,
        "pad_token_id": 0,
    }
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{family}Config")(**sizes)
    ).eval()
    noise.shake(model).save_pretrained(tmp_path / "base")
    export(tmp_path / "base", [], tmp_path / "bundle", mode="folded", task="text-generation")
    ids = np.arange(3, 60)[None]
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    found = Session(tmp_path / "bundle", "cpu").run({"input_ids": ids})["logits"]
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_experts_that_python_chooses_are_refused(tmp_path: Path) -> None:
    """DBRX loops over the experts that some token chose: the line of the model is named."""
    config = transformers.DbrxConfig(
        d_model=32,
        n_heads=4,
        n_layers=1,
        vocab_size=96,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 3, "moe_top_k": 2},
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    with pytest.raises(Unsupported, match="branches on the values of tokens") as caught:
        export(tmp_path / "base", [], tmp_path / "bundle", mode="folded", frontend="transformers")
    assert "for expert_idx in expert_hit" in str(caught.value)


def test_a_row_without_an_image_holds_no_token_of_one() -> None:
    """Whatever token stands for an image: random rows would have it by chance, and transformers refuse
    them.
    """
    llava = next(one for one in ARCHITECTURES if one.name == "llava")
    task, config = get_task(llava.task), llava.config(transformers)
    model = getattr(transformers, task.auto_class).from_config(config).eval()
    plain = example(task, config, model=lambda: model, bare=parity.BARE)["input_ids"]
    for token in {int(token) for token in plain[parity.BARE[0]] if token}:
        config.image_token_id = model.config.image_token_id = token
        batch = example(task, config, model=lambda: model, bare=parity.BARE)
        assert [int((row == token).sum() > 0) for row in batch["input_ids"]] == [1, 0, 1]
        assert np.isfinite(
            model(**{key: torch.from_numpy(value) for key, value in batch.items()}).logits.detach().numpy()
        ).all()


def test_rows_that_take_each_others_adapter_are_found(
    tiny_llama: Path, pack_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bank that gives the first row the last row's adapter is right whenever all rows agree: only the mixed
    run can tell.
    """
    emit = importlib.import_module("adapterpack.graph_passes.emit")
    gather = emit.Emitter.gather

    def reversed_rows(self: Any, site: Any, field: str, bank: Any) -> Any:
        rows = gather(self, site, field, bank)
        name = f"{site.path}.{field}/order"
        order = add_initializer(self.graph, ir.tensor(np.array([2, 1, 0]), name=name))
        turned = ir.node("Gather", [self.ids, order], name=f"{name}/turned")
        rows.producer().replace_input_with(1, turned.outputs[0])
        self.graph.insert_before(rows.producer(), turned)
        return rows

    monkeypatch.setattr(emit.Emitter, "gather", reversed_rows)
    with pytest.raises(ParityError, match="different adapters"):
        export(
            tiny_llama,
            [pack_of("llama", "alpha"), pack_of("llama", "beta")],
            tmp_path / "bundle",
            frontend="mobius",
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fast
@pytest.mark.parametrize("place", [0, 1])
def test_nan_is_no_agreement(place: int, tmp_path: Path) -> None:
    """NaN in the prefill or in the step alone is the largest error of all, and is refused."""
    found = [parity.Errors(0.0, 1.0, 1.0)] * 2
    found[place] = parity.Errors(float("nan"), 1.0, 1.0)
    error, scale, _ = parity._worst(found)
    with pytest.raises(ParityError, match="found nan"):
        parity.require_close("the graph disagrees with torch", error, scale, 1e-4, tmp_path.name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_are_onnx(kind: str, mode: str, bundle_of: Make) -> None:
    """ONNX's own checker finds nothing: nodes are in order, names are unique, slots are inputs with
    defaults.
    """
    path = bundle_of(kind, mode) / "model.onnx"
    onnx.checker.check_model(path)
    graph = onnx.load(path, load_external_data=False).graph
    slots = {
        f"{name}.{field}"
        for name, site in read_bundle(bundle_of(kind, mode)).sites.items()
        for field in site.fields
    }
    assert bool(slots) == (mode != "folded")
    optional = {"token_type_ids"} if kind == "bert" else set()
    assert slots | optional == {value.name for value in graph.input} & {
        value.name for value in graph.initializer
    }
    offsets = [
        int(entry.value)
        for value in graph.initializer
        for entry in value.external_data
        if entry.key == "offset"
    ]
    # as wide as a line of the cache and the widest vector
    assert len(offsets) > 10 and all(offset % 64 == 0 for offset in offsets)


def test_the_manifest_holds_the_proof(bundle_of: Make) -> None:
    """Every difference that was measured stands in the manifest, under the tolerance; folded ones under the
    adapter's name.
    """
    for kind in KINDS:
        for mode in MODES:
            parity = Session(bundle_of(kind, mode), "cpu").bundle.parity
            assert set(parity["max_abs"]) == ({"alpha"} if mode == "folded" else {"base", "alpha", "beta"})
            assert max(parity["max_abs"].values()) < 1e-4
            assert (parity["mixed"] is None) == (mode == "folded")
            assert parity["alone"] < 1e-5
            assert max(parity["max_relative"].values()) < 1e-5
            assert set(parity["argmax_agreement"].values()) == {1.0}


def test_adapters_folded_together(tiny_llama: Path, pack_of: Make, dense_of: Make, tmp_path: Path) -> None:
    """Two packs in one folded bundle sum; rows cannot have one of them."""
    export(
        tiny_llama, [pack_of("llama", "alpha"), pack_of("llama", "beta")], tmp_path / "bundle", mode="folded"
    )
    session, batch = Session(tmp_path / "bundle", "cpu"), batch_of("llama", BATCHES["ragged"])
    model = load_model(get_task("text-generation"), tiny_llama).double().eval()
    alpha, beta = (dict(dense_of("llama", name).named_parameters()) for name in ("alpha", "beta"))
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(alpha[name] + beta[name] - value)
    assert_close(session.run(batch)["logits"], logits_of(model, batch), batch["attention_mask"])
    assert session.adapters == []
    with pytest.raises(Unsupported, match="folded together"):
        session.run(batch, "alpha")


def test_a_bank_without_packs_has_a_slot_at_every_layer(
    tiny_llama: Path, pack_of: Make, dense_of: Make, tmp_path: Path
) -> None:
    """A bank may be exported empty, and filled while it runs."""
    bundle = export(tiny_llama, [], tmp_path / "bundle", slots=3, max_rank=5)
    assert len(bundle.sites) >= 14
    session, batch = Session(tmp_path / "bundle", "cpu"), batch_of("llama", BATCHES["ragged"])
    for name in ("alpha", "beta"):
        session.load(pack_of("llama", name))
    mixed = session.run(batch, ["alpha", None, "beta"])["logits"]
    for row, name in enumerate(("alpha", None, "beta")):
        expected = logits_of(dense_of("llama", name), batch)
        assert_close(mixed[row : row + 1], expected[row : row + 1], batch["attention_mask"][row : row + 1])


@pytest.mark.parametrize(("kind", "mode"), [("llama", "bank"), ("llama", "inputs"), ("bert", "bank")])
def test_slots_without_packs_are_where_training_puts_adapters(
    kind: str, mode: str, base_of: Make, tmp_path: Path
) -> None:
    """Those of ``all-linear``: neither the output embedding, whose factors for every word would be gathered
    for each row and token, nor the heads, which are trained whole.
    """
    base, task = base_of(kind), get_task({"llama": "text-generation", "bert": "text-classification"}[kind])
    model = load_model(task, base)
    if kind == "llama":
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        base = tmp_path / "untied"
        model.save_pretrained(base)
    bundle = export(base, [], tmp_path / "bundle", mode=mode, task=task.name)
    adapt(
        model,
        LoRA(
            r=2,
            targets="all-linear",
            modules_to_save=tuple(name for name in task.heads if hasattr(model, name)),
        ),
        "it",
    )
    slotted = {path for path, site in bundle.sites.items() if not site.members}
    assert slotted == {site.path for site in parts_of(model, "it").adapters}
    assert {path for site in bundle.sites.values() for path in site.members} <= slotted
    assert {site.part for site in bundle.sites.values() if site.fields} == {"model"}


def test_what_export_refuses(base_of: Make, pack_of: Make, tmp_path: Path) -> None:
    """Each refusal names the thing, happens before anything is built, and leaves nothing behind."""
    llama, alpha = base_of("llama"), pack_of("llama", "alpha")
    out = tmp_path / "out" / "bundle"
    cases: list[tuple[type[AdapterpackError], str, dict[str, Any]]] = [
        (UnknownName, "'bnak'.*bank", {"mode": "bnak"}),
        (UnknownName, "'mobios'.*mobius", {"frontend": "mobios"}),
        (UnknownName, "int44.*int4", {"quantize": "int44"}),
        (UnknownName, "unknown task", {"task": "text-generatoin"}),
        (ConfigError, "at least 2", {"slots": 1}),
        (ConfigError, "at least 3", {"max_rank": 2}),
        (ConfigError, "only a bank", {"mode": "inputs", "slots": 3}),
        (ConfigError, "only a bank", {"mode": "folded", "max_rank": 8}),
        (Unsupported, "no frontend exports this task", {"frontend": "mobius", "task": "text-classification"}),
    ]
    for error, text, options in cases:
        with pytest.raises(error, match=text):
            export(llama, [alpha], out, **options)
    with pytest.raises(ConfigError, match="same name"):
        export(llama, [alpha, alpha], out)
    with pytest.raises(Unsupported, match="different tasks"):
        arguments._task(None, [load(alpha), load(pack_of("bert", "alpha"))], Checkpoint(llama))
    with pytest.raises(BaseMismatch, match="another base"):
        export(base_of("bert"), [alpha], out)
    assert not out.parent.exists()
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputExists):
        export(llama, [alpha], tmp_path / "taken")


def test_a_site_that_the_graph_lacks(tiny_llama: Path, tmp_path: Path) -> None:
    """An embedding-tied head that the graph computes otherwise, or a layer that it does not have, is named
    with its nearest.
    """
    checkpoint = Checkpoint(tiny_llama)
    site = Site("model.embed_tokens", 32, 96)
    params = {"lora_A": np.ones((1, 32), np.float32), "lora_B": np.ones((96, 1), np.float32)}
    pack = build(
        "odd",
        get("lora"),
        {site: (LoRA(r=1), params)},
        task=m.PackTask("text-generation"),
        base=m.Base("tiny", None, None, *checkpoint.fingerprint()[:2]),
    )
    with pytest.raises(SiteNotFound, match=r"model\.embed_tokens"):
        export(tiny_llama, [pack], tmp_path / "bundle", mode="bank", frontend="mobius")
    assert list(tmp_path.iterdir()) == []


def test_the_package_is_the_function(bundle_of: Make) -> None:
    """``adapterpack.inspect`` of a bundle says its mode, task, adapters, capacity and proof."""
    found = adapterpack.inspect(bundle_of("llama", "bank"))
    assert (found["kind"], found["mode"], found["task"], found["slots"], found["max_rank"]) == (
        "bundle",
        "bank",
        "text-generation",
        4,
        6,
    )
    assert [(a["name"], a["slot"]) for a in found["adapters"]] == [("alpha", 1), ("beta", 2)]
    assert found["bytes"] > found["graph_bytes"] > 0
