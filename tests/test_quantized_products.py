"""The products of quantized graphs: what they compute, how exactly, the head's own scheme, and the table that
embedding and head share.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from adapterpack import LoRA, Session, adapt, export, inspect, quantize, save, validate
from adapterpack.bundle.decoder_graph import DECODER
from adapterpack.bundle.manifest import GRAPH, graph_file, read_bundle
from adapterpack.errors import ConfigError, UnknownName
from adapterpack.onnx_graph.products import divide_products, make_fast
from adapterpack.quantizing.graphs.algorithm import ALGORITHMS
from adapterpack.quantizing.graphs.onnxruntime_quantizer import quantize_product
from adapterpack.quantizing.graphs.product import ConstantProduct, RoundingSetting
from adapterpack.quantizing.graphs.quantize_bundle import quantize_file
from adapterpack.quantizing.graphs.scheme import GRAPH_SCHEMES
from adapterpack.runtime.ort.model import OrtModel
from adapterpack.runtime.providers.device import Device
from adapterpack.runtime.providers.resolved_device import resolve
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.models.load import load_model

Make = Callable[..., Any]


def value(name: str, shape: list[Any], dtype: Any = ir.DataType.FLOAT) -> Any:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def constant(name: str, array: np.ndarray) -> Any:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def dense(node: Any) -> np.ndarray:
    """``(q - z) s`` in float64 ``[rows, columns]``, by the operator's definition alone; without zero points
    ``z`` is the middle.
    """
    count, width, bits = (node.attributes.get_int(name) for name in ("N", "K", "bits"))
    block = node.attributes.get_int("block_size")
    codes, scales, *zeros = (operand.const_value.numpy() for operand in node.inputs[1:])
    shifts = np.arange(0, 8, bits)
    wide = lambda array: (array.reshape(count, -1, 1) >> shifts & (1 << bits) - 1).reshape(count, -1)  # noqa: E731
    scales = scales.reshape(count, -1).astype(np.float64)
    middle = np.full(scales.shape, 1 << (bits - 1))
    zero = (
        middle if not zeros else zeros[0].reshape(count, -1) if zeros[0].dtype != np.uint8 else wide(zeros[0])
    )
    steps, zero = (
        np.repeat(array[:, : scales.shape[1]].astype(np.float64), block, 1)[:, :width]
        for array in (scales, zero)
    )
    return (wide(codes)[:, :width] - zero) * steps


def least(node: Any, block: int) -> Any:
    """What is added to the numbers of each block ``[rows, columns]``, by a product of the sums of its inputs;
    0 where nothing is.
    """
    for use in node.outputs[0].uses():
        if use.node.name.endswith("/shifted"):
            return np.repeat(
                use.node.inputs[1].producer().inputs[1].const_value.numpy().T.astype(np.float64), block, 1
            )
    return 0


def rounded(x: np.ndarray, block: int) -> np.ndarray:
    """The largest error that int8 activations may have at each place: half a step of a block's grid of 127
    steps a side, and some float.
    """
    padded = np.pad(np.abs(x).astype(np.float64), ((0, 0), (0, -x.shape[1] % block)))
    peaks = padded.reshape(len(x), -1, block).max(-1) / 127 * 0.5
    return np.repeat(peaks, block, 1)[:, : x.shape[1]] * 1.01


SETTINGS = [
    GRAPH_SCHEMES["int4"].setting,
    GRAPH_SCHEMES["int8"].setting,
    GRAPH_SCHEMES["int2"].setting,
    RoundingSetting("int4", 4, 16, True),
    RoundingSetting("int8", 8, 64, True),
    RoundingSetting("int4", 4, 16, False, "k-quant"),
    RoundingSetting("int2", 2, 32, False, "k-quant"),
    RoundingSetting("int4", 4, 32, False, "hqq"),
    RoundingSetting("int4", 4, 32, True, "gptq"),
    RoundingSetting("int2", 2, 16, False, "gptq"),
    RoundingSetting("int4", 4, 32, False, "awq"),
]


@pytest.mark.sampled(7)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("accuracy", ["exact", "fast"])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "-".join(map(str, setting)))
@pytest.mark.parametrize(
    ("rows", "width", "count"), [(1, 32, 16), (3, 33, 7), (8, 95, 31), (5, 128, 65), (2, 1, 3)]
)
def test_products_are_those_of_the_dequantized_weights(
    rows: int, width: int, count: int, setting: RoundingSetting, accuracy: str, bias: bool, tmp_path: Path
) -> None:
    """Exact: float noise away from float64. Fast: within what int8 activations can move each output. By every
    algorithm, with blocks that the rows do not fill, and with the division of the inputs where there is one.
    """
    rng = np.random.default_rng(width)
    x, y = value("x", ["rows", width]), value("y", ["rows", count])
    weight, addend = (
        constant("w", rng.standard_normal((width, count), np.float32)),
        constant("b", rng.standard_normal(count, np.float32)),
    )
    product = ir.node("MatMul", [x, weight], name="product")
    nodes, constants = [product], [weight]
    if bias:
        nodes.append(ir.node("Add", [product.outputs[0], addend], name="sum"))
        constants.append(addend)
    nodes[-1].outputs[0].name, nodes[-1].outputs[0].type, nodes[-1].outputs[0].shape = "y", y.type, y.shape
    graph = ir.Graph(
        [x], [nodes[-1].outputs[0]], nodes=nodes, initializers=constants, opset_imports={"": 21}, name="one"
    )
    path = tmp_path / GRAPH
    ir.save(ir.Model(graph, ir_version=10), path)
    sample = rng.standard_normal((50, width), np.float32)
    assert (
        quantize_file(path, setting.scheme, lambda name: setting, second=lambda name: sample.T @ sample / 50)
        == 1
    )
    if accuracy == "fast":
        make_fast(path)
    (node,) = (node for node in ir.load(path).graph if node.op_type == "MatMulNBits")
    batch = rng.standard_normal((rows, width), np.float32)
    (result,) = ort.InferenceSession(path).run(None, {"x": batch})
    matrix = dense(node)
    if node.inputs[0].producer() is not None:
        batch = batch * node.inputs[0].producer().inputs[1].const_value.numpy()
    whole = matrix + least(node, setting.block_size)
    error = np.abs(result - (batch @ whole.T + (addend.const_value.numpy() if bias else 0)))
    noise = 1e-5 * (np.abs(batch) @ np.abs(matrix).T + 1)
    assert (
        error <= noise + (rounded(batch, setting.block_size) @ np.abs(matrix).T if accuracy == "fast" else 0)
    ).all()


def test_zero_points_that_are_fractions_are_made_whole(tmp_path: Path) -> None:
    """Whole zero points and what is added to each block stand for the numbers of ONNX Runtime's own HQQ, in
    float64.
    """
    weight, setting = (
        constant("w", np.random.default_rng(1).standard_normal((64, 9), np.float32)),
        RoundingSetting("int4", 4, 32, False, "hqq"),
    )
    x, node = value("x", ["rows", 64]), ir.node("MatMul", [value("x", ["rows", 64]), weight], name="product")
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "y", ir.Shape(["rows", 9]), x.type
    graph = ir.Graph(
        [node.inputs[0]],
        [node.outputs[0]],
        nodes=[node],
        initializers=[weight],
        opset_imports={"": 21},
        name="one",
    )
    product = ConstantProduct(node, weight, ir.Model(graph, ir_version=10))
    (theirs,) = quantize_product(product, setting, "HQQWeightOnlyQuantConfig")
    (ours,) = (one for one in ALGORITHMS["hqq"].replace(product, setting) if one.op_type == "MatMulNBits")
    assert (
        theirs.inputs[3].const_value.numpy().dtype == np.float32
        and ours.inputs[3].const_value.numpy().dtype == np.uint8
    )
    # a scale is some 0.3, its zero point 8
    np.testing.assert_allclose(dense(ours) + least(ours, 32), dense(theirs), atol=2e-6)


@pytest.fixture(scope="module")
def placed(tiny_llama: Path, pack_of: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float bank with the engine's graph, of a base whose head is its embedding."""
    folder = tmp_path_factory.mktemp("float") / "bank"
    export(
        tiny_llama, [pack_of("llama", "alpha"), pack_of("llama", "beta")], folder, mode="bank", in_place=True
    )
    return folder


@pytest.fixture(scope="module")
def fast(placed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fast") / "int4"
    quantize(placed, folder, scheme="int4", accuracy="fast")
    return folder


def products(folder: Path, part: str) -> list[Any]:
    return [node for node in ir.load(folder / graph_file(part)).graph if node.op_type == "MatMulNBits"]


def test_fast_is_written_into_both_graphs_and_measured(fast: Path, placed: Path) -> None:
    """Every product of the ordinary graph and of the engine's; errors of both accuracies; slots survive,
    canaries pass.
    """
    for part in ("model", DECODER):
        assert {node.attributes.get_int("accuracy_level", 0) for node in products(fast, part)} == {4}
    report = read_bundle(fast).quantization
    assert report is not None and (report["accuracy"], report["head"]) == ("fast", "int8")
    assert 0 < report["error_by_accuracy"]["exact"] != report["error_by_accuracy"]["fast"] > 0
    before, after = (ir.load(folder / GRAPH).graph for folder in (placed, fast))
    assert [item.name for item in after.inputs] == [item.name for item in before.inputs]
    assert not validate(fast, full=True).findings
    names: list[str | None] = ["alpha", None, "beta"]
    assert len(Session(fast, "cpu").generate([[5, 6], [7], [8, 9, 10]], names, max_new_tokens=4)) == 3


@pytest.mark.parametrize(("tolerance", "accuracy", "level"), [(0.053, "exact", 0), (0.1, "fast", 4)])
def test_the_default_is_fast_where_it_keeps_to_the_bound(
    tolerance: float, accuracy: str, level: int, placed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact products move an output by 0.047 of the largest here, fast ones by 0.060."""
    monkeypatch.setitem(
        GRAPH_SCHEMES._values, "int8", dataclasses.replace(GRAPH_SCHEMES["int8"], tolerance=tolerance)
    )
    bundle = quantize(placed, tmp_path / "out", scheme="int8")
    assert bundle.quantization["accuracy"] == accuracy
    for part in ("model", DECODER):
        assert {
            node.attributes.get_int("accuracy_level", 0) for node in products(tmp_path / "out", part)
        } == {level}


def test_the_head_has_eight_bits_and_shares_its_table(fast: Path) -> None:
    """In both graphs the embedding reads the codes of the head: one place in the data file, and nowhere a
    float table.
    """
    for part in ("model", DECODER):
        graph = ir.load(fast / graph_file(part)).graph
        bits = [node.attributes.get_int("bits") for node in products(fast, part)]
        assert sorted(set(bits)) == [4, 8] and bits.count(8) == 1
        (head,) = (
            node for node in graph if node.op_type == "MatMulNBits" and node.attributes.get_int("bits") == 8
        )
        (lookup,) = (node for node in graph if node.op_type == "GatherBlockQuantized")
        one, two = (node.inputs[place].const_value for node, place in ((head, 1), (lookup, 0)))
        assert [value.name for value in head.inputs[2:4]] == [value.name for value in lookup.inputs[2:4]]
        assert (one.location, one.offset, one.length) == (two.location, two.offset, two.length)
        assert not [
            name
            for name, item in graph.initializers.items()
            if tuple(item.shape) == (96, 32) and item.dtype == ir.DataType.FLOAT
        ]


def test_the_shared_table_is_the_heads(fast: Path, tmp_path: Path) -> None:
    """A lookup gives the rows that the head multiplies with."""
    graph = ir.load(fast / GRAPH).graph
    (head,) = (
        node for node in graph if node.op_type == "MatMulNBits" and node.attributes.get_int("bits") == 8
    )
    (lookup,) = (node for node in graph if node.op_type == "GatherBlockQuantized")
    ids, constants = (
        value("ids", ["n"], ir.DataType.INT64),
        [constant(item.name, item.const_value.numpy()) for item in (lookup.inputs[0], *lookup.inputs[2:4])],
    )
    node = ir.Node(
        "com.microsoft",
        "GatherBlockQuantized",
        [constants[0], ids, *constants[1:]],
        list(lookup.attributes.values()),
    )
    node.outputs[0].name, node.outputs[0].type = "rows", ir.TensorType(ir.DataType.FLOAT)
    alone = ir.Graph(
        [ids],
        node.outputs,
        nodes=[node],
        initializers=constants,
        opset_imports={"": 21, "com.microsoft": 1},
        name="rows",
    )
    ir.save(ir.Model(alone, ir_version=10), tmp_path / GRAPH)
    (rows,) = ort.InferenceSession(tmp_path / GRAPH).run(None, {"ids": np.arange(96)})
    np.testing.assert_allclose(rows, dense(head), rtol=1e-6, atol=1e-7)


@pytest.fixture(scope="module")
def embedded(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float bank with an adapter of the embedding, whose table the head shares."""
    model = load_model(get_task("text-generation"), tiny_llama)
    adapt(model, LoRA(r=3, targets=("embed_tokens", "q_proj")), "words")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("embedded") / "bank"
    export(tiny_llama, [save(model, None, base=tiny_llama, name="words")], folder, mode="bank")
    return folder


@pytest.mark.parametrize("head", ["int8", "float"])
def test_an_adapter_of_a_quantized_embedding(head: str, embedded: Path, tmp_path: Path) -> None:
    """Its site names the lookup and the table that it reads, quantized or not; its answers stay near, and it
    still acts.
    """
    bundle = quantize(embedded, tmp_path / "out", scheme="int8", head=head, accuracy="exact")
    graph, site = ir.load(tmp_path / "out" / GRAPH).graph, bundle.sites["model.embed_tokens"]
    (node,) = (node for node in graph if node.name == site.node)
    assert node.op_type == ("Gather" if head == "float" else "GatherBlockQuantized")
    assert site.weight == node.inputs[0].name and site.weight in graph.initializers
    ids = {"input_ids": np.arange(3, 15).reshape(2, 6)}
    before, after = Session(embedded, "cpu"), Session(tmp_path / "out", "cpu")
    exact, changed, base = (
        before.run(ids, "words")["logits"],
        after.run(ids, "words")["logits"],
        after.run(ids)["logits"],
    )
    assert np.abs(changed - exact).max() < 0.05 * np.abs(exact).max() < np.abs(changed - base).max()
    assert not validate(tmp_path / "out", full=True).findings


@pytest.mark.parametrize(("head", "bits"), [("int4", {4}), ("float", {4}), ("int8", {4, 8})])
def test_the_head_is_what_is_wanted(head: str, bits: set[int], placed: Path, tmp_path: Path) -> None:
    bundle = quantize(placed, tmp_path / "out", scheme="int4", head=head)
    nodes = list(ir.load(tmp_path / "out" / GRAPH).graph)
    assert {node.attributes.get_int("bits") for node in nodes if node.op_type == "MatMulNBits"} == bits
    assert bundle.quantization["head"] == head
    assert sum(node.op_type == "GatherBlockQuantized" for node in nodes) == (head != "float")


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_wide_products_are_divided_for_a_few_runs(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two products on one weight of 31 rows, of which ten may be floats at a time: four parts of each on the
    same bytes, and the same numbers.
    """
    rng = np.random.default_rng(5)
    x, weight = value("x", ["rows", 33]), constant("w", rng.standard_normal((33, 31), np.float32))
    nodes = [ir.node("MatMul", [x, weight], name=name) for name in ("first", "second")]
    for node in nodes:
        node.outputs[0].name, node.outputs[0].type = node.name, x.type
    results = [node.outputs[0] for node in nodes]
    graph = ir.Graph([x], results, nodes=nodes, initializers=[weight], opset_imports={"": 21}, name="two")
    path = tmp_path / GRAPH
    ir.save(ir.Model(graph, ir_version=10), path)
    assert quantize_file(path, scheme, lambda name: GRAPH_SCHEMES[scheme].setting) == 2
    model = ir.load(path)
    assert not divide_products(model)
    monkeypatch.setattr("adapterpack.onnx_graph.products._WIDEST", 10 * 33)
    assert divide_products(model)
    counts = [node.attributes.get_int("N") for node in model.graph if node.op_type == "MatMulNBits"]
    assert counts == 2 * [10, 10, 10, 1]
    batch = {"x": rng.standard_normal((5, 33), np.float32)}
    expected = ort.InferenceSession(path).run(None, batch)
    ir.save(model, tmp_path / "divided.onnx")
    divided = ort.InferenceSession(tmp_path / "divided.onnx").run(None, batch)
    np.testing.assert_allclose(divided, expected, rtol=0, atol=1e-5)


def test_quantized_graphs_are_opened_prepacked(fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime lays the weights of every graph of a session out anew, unless the session is for a few
    runs on mapped files and there are many codes.
    """
    entries: list[tuple[str, str | None]] = []

    class Recorded(ort.InferenceSession):
        def __init__(self, path: Any, options: Any, **rest: Any) -> None:
            try:
                entry = options.get_session_config_entry("session.disable_prepacking")
            except Exception:
                entry = None
            # a graph with the operator for LoRAs is opened from memory
            entries.append((graph_file(DECODER) if isinstance(path, bytes) else Path(path).name, entry))
            super().__init__(path, options, **rest)

    monkeypatch.setattr("adapterpack.runtime.ort.model.ort.InferenceSession", Recorded)
    Session(fast, "cpu").generate([[5, 6], [7]], ["alpha", None], max_new_tokens=2)
    assert {name for name, _ in entries} >= {graph_file(DECODER)}
    assert {entry for _, entry in entries} <= {None, "0"}
    entries.clear()
    for most in (1 << 20, 1):
        monkeypatch.setattr("adapterpack.onnx_graph.products.PACKED", most)
        OrtModel(fast, DECODER, resolve(Device(provider="cpu")), mapped=True)
    assert [entry for _, entry in entries] == [None, "1"]


def test_what_says_nothing_is_refused(placed: Path, pack_of: Make, tiny_llama: Path, tmp_path: Path) -> None:
    """Unknown names with the nearest; options of quantized graphs for a pack, and for an export that
    quantizes nothing.
    """
    out = tmp_path / "out"
    for words, options in (("exact", {"accuracy": "exakt"}), ("float", {"head": "flaot"})):
        with pytest.raises(UnknownName, match=words):
            quantize(placed, out, **options)
    for options in ({"accuracy": "fast"}, {"head": "int4"}):
        with pytest.raises(ConfigError, match="--" + next(iter(options))):
            quantize(pack_of("llama", "alpha"), out, **options)
        with pytest.raises(ConfigError, match="--" + next(iter(options))):
            export(tiny_llama, [pack_of("llama", "alpha")], out, **options)
    assert not out.exists()


def test_an_older_report_is_read(fast: Path, tmp_path: Path) -> None:
    """A manifest without the fields that this version adds."""
    manifest = json.loads((fast / "adapterpack.bundle.json").read_text())
    for name in ("accuracy", "head", "error_by_accuracy"):
        del manifest["quantization"][name]
    (tmp_path / "adapterpack.bundle.json").write_text(json.dumps(manifest))
    assert read_bundle(tmp_path).quantization == manifest["quantization"]
    assert inspect(fast)["quantization"]["accuracy"] == "fast"
