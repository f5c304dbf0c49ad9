"""Quantized bundles: slots, site map and adapters survive; the recorded error is the measured one; weights
are within half a step.
"""

from __future__ import annotations

import dataclasses
import gc
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from transformers import LlamaForCausalLM

from adapterpack import OFT, DoRA, Session, adapt, export, quantize, save, validate
from adapterpack.bundle.manifest import GRAPH, read_bundle
from adapterpack.errors import FormatError, NothingToDo, OutputExists, UnknownName, Unsupported
from adapterpack.io.hashing import sha256_of
from adapterpack.pack import canary
from adapterpack.quantizing.graphs import onnxruntime_quantizer, product, replace_products
from adapterpack.quantizing.graphs.quantize_bundle import quantize_file
from adapterpack.quantizing.graphs.scheme import GRAPH_SCHEMES
from adapterpack.runtime.padding import pad
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.models.load import load_model

Make = Callable[..., Any]
CODES = ("int4", "int8")
BUNDLES = [("llama", "bank"), ("llama", "inputs"), ("llama", "folded"), ("bert", "bank"), ("bert", "inputs")]


@pytest.fixture(scope="module")
def quantized(bundle_of: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    made: dict[tuple[str, str, str], Path] = {}

    def get(kind: str, mode: str, scheme: str) -> Path:
        key = (kind, mode, scheme)
        if key not in made:
            folder = tmp_path_factory.mktemp("quantized") / "-".join(key)
            quantize(bundle_of(kind, mode), folder, scheme=scheme, accuracy="exact")
            made[key] = folder
        return made[key]

    return get


@pytest.mark.parametrize("scheme", CODES)
@pytest.mark.parametrize(("kind", "mode"), BUNDLES)
def test_slots_and_sites_survive(kind: str, mode: str, scheme: str, bundle_of: Make, quantized: Make) -> None:
    """The graph's inputs, their shapes and their defaults are the same bytes; every node and weight of the
    site map is in the new graph.
    """
    before, after = (
        ir.load(folder / GRAPH).graph for folder in (bundle_of(kind, mode), quantized(kind, mode, scheme))
    )
    assert [(value.name, str(value.shape)) for value in after.inputs] == [
        (value.name, str(value.shape)) for value in before.inputs
    ]
    assert [value.name for value in after.outputs] == [value.name for value in before.outputs]
    bundle = read_bundle(quantized(kind, mode, scheme))
    slots = [f"{path}.{field}" for path, site in bundle.sites.items() for field in site.fields]
    assert bool(slots) == (mode != "folded")
    for name in slots:
        assert np.array_equal(
            after.initializers[name].const_value.numpy(), before.initializers[name].const_value.numpy()
        )
    nodes = {node.name: node for node in after}
    for site in (site for site in bundle.sites.values() if not site.members):
        assert site.weight in after.initializers
        # a Gemm is a head or a pooler, and stays float
        assert nodes[site.node].op_type in {"MatMulNBits", "Gemm"}
        assert nodes[site.node].inputs[1].name == site.weight
    turned = (
        node for node in before if node.op_type == "Transpose" and node.inputs[0].name in before.initializers
    )
    constants = {*before.initializers, *(node.outputs[0].name for node in turned)}
    quantizable = sum(
        node.op_type == "MatMul" and node.inputs[1].name in constants
        for node in before
        if not node.name.startswith("adapterpack/")
    )
    assert (
        bundle.quantization["quantized"]
        == sum(node.op_type == "MatMulNBits" for node in after)
        == quantizable
        > 0
    )


@pytest.mark.parametrize("scheme", CODES)
@pytest.mark.parametrize(("kind", "mode"), BUNDLES)
def test_the_recorded_error_is_the_measured_one(
    kind: str, mode: str, scheme: str, bundle_of: Make, quantized: Make
) -> None:
    """max|quantized - float| at the last position over the canary's rows, for the base and each adapter, as
    the manifest says. They begin with the token that texts begin with, where the base has one.
    """
    folders = bundle_of(kind, mode), quantized(kind, mode, scheme)
    rows = [(1, *row[1:]) for row in canary.inputs(96)] if kind == "llama" else canary.inputs(96)
    batch = pad(rows, 0, left=kind == "llama")
    report = read_bundle(folders[1]).quantization
    assert set(report["max_error"]) == ({"alpha"} if mode == "folded" else {"base", "alpha", "beta"})
    for key, recorded in report["max_error"].items():
        name = None if key == "base" else key
        exact, found = (Session(folder, "cpu").run(batch, name)["logits"] for folder in folders)
        last = slice(None) if kind == "bert" else (slice(None), -1)
        assert recorded == pytest.approx(float(np.abs(found[last] - exact[last]).max()), rel=1e-4)
        assert recorded > 0
        assert report["label_agreement"][key] == pytest.approx(
            (found[last].argmax(-1) == exact[last].argmax(-1)).mean()
        )


def test_eight_bits_are_nearer_than_four(quantized: Make) -> None:
    """A step of int8 is a seventeenth of int4's, and so, about, is the error."""
    four, eight = (
        read_bundle(quantized("llama", "bank", scheme)).quantization["max_error"]
        for scheme in ("int4", "int8")
    )
    for name, error in four.items():
        assert eight[name] < error / 4


@pytest.mark.parametrize("scheme", CODES)
def test_every_weight_is_within_half_a_step(scheme: str, bundle_of: Make, quantized: Make) -> None:
    """|w - (q - z) s| <= s / 2 (and what rounding z adds, s / 2) for every weight, by the operator's own
    definition of its blocks.
    """
    before, after = (
        ir.load(folder / GRAPH).graph
        for folder in (bundle_of("llama", "bank"), quantized("llama", "bank", scheme))
    )
    floats = read_bundle(bundle_of("llama", "bank")).sites
    setting, nodes = GRAPH_SCHEMES[scheme].setting, {node.name: node for node in after}
    for path, site in (
        (path, site)
        for path, site in read_bundle(quantized("llama", "bank", scheme)).sites.items()
        if site.weight
    ):
        weight = before.initializers[floats[path].weight].const_value.numpy()  # [in, out]
        packed, scales, zeros = (value.const_value.numpy() for value in nodes[site.node].inputs[1:4])
        out = weight.shape[1]
        codes = packed.reshape(out, -1)
        zeros = zeros.reshape(out, -1)
        if setting.bits == 4:
            codes, zeros = (
                np.stack([array & 15, array >> 4], -1).reshape(out, -1) for array in (codes, zeros)
            )
        scales = scales.reshape(out, -1)
        step = np.repeat(scales, setting.block_size, 1)[:, : weight.shape[0]]
        zero = np.repeat(zeros[:, : scales.shape[1]], setting.block_size, 1)[:, : weight.shape[0]]
        found = (codes[:, : weight.shape[0]].astype(np.float64) - zero) * step
        assert (np.abs(found - weight.T) <= np.abs(step) * 1.001).all()


@pytest.fixture(scope="module")
def turned_inputs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank with an adapter that turns the inputs of products, and rows."""
    folder, model = (
        tmp_path_factory.mktemp("turned"),
        load_model(get_task("text-generation"), tiny_llama, None),
    )
    model.config._name_or_path = ""  # else a head that the base does not hold would be trained whole
    adapt(model, OFT(block_size=4), "one")
    save(model, folder / "pack", base=tiny_llama)
    export(tiny_llama, [folder / "pack"], folder / "bundle", mode="bank", in_place=False)
    (folder / "rows.jsonl").write_text('{"text": "some words"}\n{"text": "and more"}\n')
    return folder


@pytest.mark.parametrize("algorithm", ["gptq", "awq", "hqq"])
def test_algorithms_take_inputs_that_an_adapter_changes(
    algorithm: str, turned_inputs: Path, tmp_path: Path
) -> None:
    """The graph states neither type nor shape of such inputs, which calibration reads and hqq sums over."""
    rows = None if algorithm == "hqq" else turned_inputs / "rows.jsonl"
    made = quantize(
        turned_inputs / "bundle", tmp_path / "out", scheme="int4", algorithm=algorithm, calibration=rows
    )
    assert made.quantization["algorithm"] == algorithm
    assert 0 < made.quantization["max_error"]["pack"] < 1


@pytest.mark.parametrize("scheme", CODES)
@pytest.mark.parametrize(("kind", "mode"), [("llama", "bank"), ("llama", "inputs"), ("bert", "bank")])
def test_adapters_still_swap(kind: str, mode: str, scheme: str, quantized: Make) -> None:
    """Mixed rows equal single runs within 1e-4, and each adapter is still another model than the base."""
    session = Session(quantized(kind, mode, scheme), "cpu")
    rng = np.random.default_rng(2)
    batch = {"input_ids": rng.integers(3, 96, (3, 6))}
    names = ["beta", None, "alpha"]
    mixed = session.run(batch, names)["logits"]
    singles = {name: session.run(batch, name)["logits"] for name in names}
    for row, name in enumerate(names):
        wide = singles[name].shape[-1]
        assert np.abs(mixed[row][..., :wide] - singles[name][row]).max() <= 1e-4
        if name:
            assert np.abs(singles[name][row][..., :2] - singles[None][row][..., :2]).max() > 1e-2


def test_a_pack_is_loaded_into_a_quantized_bank(quantized: Make, pack_of: Make) -> None:
    """The float slots of an int8 bank take another pack: the base's rows keep every bit."""
    session = Session(quantized("llama", "bank", "int8"), "cpu")
    ids = {"input_ids": np.random.default_rng(3).integers(3, 96, (2, 5))}
    before = session.run(ids, [None, "beta"])["logits"]
    session.load(pack_of("llama", "gamma"))
    after = session.run(ids, [None, "beta"])["logits"]
    assert np.array_equal(before, after)
    assert np.abs(session.run(ids, "gamma")["logits"][0] - before[0]).max() > 1e-2


def test_the_graph_itself_says_that_weights_are_lost(
    tiny_llama: Path, quantized: Make, tmp_path: Path
) -> None:
    """Codes are never taken for the weights that DoRA's values are made of, whatever a manifest says of
    them.
    """
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    adapt(model, DoRA(r=2), "dora")
    folder = Path(shutil.copytree(quantized("llama", "bank", "int8"), tmp_path / "bundle"))
    dataclasses.replace(read_bundle(folder), quantization=None).write(folder)
    with pytest.raises(Unsupported, match="the base's own weights"):
        Session(folder, "cpu").load(save(model, None, base=tiny_llama))


def test_a_quantized_export_is_a_quantized_bundle(
    tiny_llama: Path, pack_of: Make, quantized: Make, tmp_path: Path
) -> None:
    """``export(quantize=...)`` and ``quantize(export(...))`` give the same graph and record the same
    errors.
    """
    bundle = export(
        tiny_llama,
        [pack_of("llama", "alpha"), pack_of("llama", "beta")],
        tmp_path / "b",
        slots=4,
        max_rank=6,
        quantize="int8",
        accuracy="exact",
    )
    other = read_bundle(quantized("llama", "bank", "int8"))
    assert bundle.quantization == other.quantization
    assert bundle.sites == other.sites
    assert validate(tmp_path / "b").valid
    assert validate(quantized("llama", "bank", "int8"), tiny_llama).valid


def test_the_source_is_left_as_it_was_and_the_copy_is_whole(bundle_of: Make, tmp_path: Path) -> None:
    """Quantizing reads: no byte of the source changes, and the copy keeps packs and tokenizer."""
    source = bundle_of("llama", "inputs")
    before = {path.relative_to(source): sha256_of(path) for path in source.rglob("*") if path.is_file()}
    quantize(source, tmp_path / "copy", scheme="int4")
    assert {
        path.relative_to(source): sha256_of(path) for path in source.rglob("*") if path.is_file()
    } == before
    copied = {
        path.relative_to(tmp_path / "copy") for path in (tmp_path / "copy").rglob("*") if path.is_file()
    }
    assert copied == set(before)


def test_what_is_refused(bundle_of: Make, quantized: Make, tmp_path: Path) -> None:
    """Twice is NothingToDo; an unknown scheme, a taken output and an altered source are named; nothing is
    left behind.
    """
    source, out = bundle_of("llama", "bank"), tmp_path / "out"
    with pytest.raises(NothingToDo, match="quantized already"):
        quantize(quantized("llama", "bank", "int4"), out, scheme="int8")
    with pytest.raises(UnknownName, match="int4, int8"):
        quantize(source, out, scheme="fp3")
    altered = tmp_path / "altered"
    shutil.copytree(source, altered)
    with (altered / f"{GRAPH}.data").open("r+b") as file:
        file.seek(100)
        file.write(b"\x01\x02")
    with pytest.raises(FormatError, match=rf"{GRAPH}\.data"):
        quantize(altered, out, scheme="int8")
    shutil.rmtree(altered)
    shutil.copytree(source, altered)
    (altered / "notes.txt").write_text("mine")
    with pytest.raises(FormatError, match=r"notes\.txt"):
        quantize(altered, out, scheme="int8")
    shutil.rmtree(altered)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    with pytest.raises(OutputExists):
        quantize(source, out, scheme="int8")


def test_a_slot_is_never_taken_for_a_weight(
    bundle_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What may be fed has no numbers to quantize, whatever the nodes that read it are called: the graph's
    inputs stay, with their bytes.
    """
    monkeypatch.setattr(replace_products, "ADDED", "no such prefix")
    quantize(bundle_of("llama", "inputs"), tmp_path / "out", scheme="int8")
    before, after = (
        ir.load(folder / GRAPH).graph for folder in (bundle_of("llama", "inputs"), tmp_path / "out")
    )
    assert [value.name for value in after.inputs] == [value.name for value in before.inputs]
    slots = [value.name for value in before.inputs if value.name in before.initializers]
    assert slots and all(
        np.array_equal(
            after.initializers[name].const_value.numpy(), before.initializers[name].const_value.numpy()
        )
        for name in slots
    )


def products(folder: Path, count: int, width: int) -> Path:
    """A graph of ``count`` products in a row, the second of which shares its weight with the first, then one
    with a stack of matrices.
    """
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", shape=ir.Shape(["batch", width]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, constants, last = [], [], x
    for number in range(count + 1):
        if number != 1:
            shape = (2, width, width) if number == count else (width, width)
            tensor = ir.tensor(rng.standard_normal(shape, np.float32) / width, name=f"w{number}")
            constants.append(
                ir.Value(
                    name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
                )
            )
        nodes.append(ir.node("MatMul", [last, constants[-1]], name=f"product{number}"))
        last = nodes[-1].outputs[0]
        last.name, last.type = f"y{number}", x.type
    graph = ir.Graph(
        [x], [last], nodes=nodes, initializers=constants, opset_imports={"": 21}, name="products"
    )
    ir.save(ir.Model(graph, ir_version=10), folder / GRAPH, external_data=f"{GRAPH}.data")
    return folder / GRAPH


def test_a_shared_weight_is_quantized_once_and_a_stack_is_left(tmp_path: Path) -> None:
    """Both products read the same initializers; a stack of matrices stays float; the graph runs, near the
    float one; no file is left.
    """
    path = products(tmp_path, 3, 64)
    batch = {"x": np.random.default_rng(1).standard_normal((5, 64), np.float32)}
    (exact,) = ort.InferenceSession(path).run(None, batch)
    assert quantize_file(path, "int8", lambda name: GRAPH_SCHEMES["int8"].setting) == 3
    graph = ir.load(path).graph
    assert [node.op_type for node in graph] == ["MatMulNBits"] * 3 + ["MatMul"]
    assert [value.name for value in graph[0].inputs[1:]] == [value.name for value in graph[1].inputs[1:]]
    assert sorted(graph.initializers) == sorted({value.name for node in graph for value in node.inputs[1:]})
    (quantized,) = ort.InferenceSession(path).run(None, batch)
    assert 0 < np.abs(quantized - exact).max() < 0.02 * np.abs(exact).max()
    assert sorted(file.name for file in tmp_path.iterdir()) == [GRAPH, f"{GRAPH}.data"]


PEAK_MEMORY = """
import sys, threading, time
from pathlib import Path

def private_memory():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))

import onnxruntime.quantization.matmul_nbits_quantizer
from adapterpack.quantizing.graphs import replace_products
from adapterpack.quantizing.graphs.scheme import GRAPH_SCHEMES
from adapterpack.quantizing.graphs.quantize_bundle import quantize_file
peak = before = private_memory()

def watch():
    global peak
    while True:
        peak = max(peak, private_memory())
        time.sleep(0.001)

threading.Thread(target=watch, daemon=True).start()
quantize_file(Path(sys.argv[1]), "int4", lambda name: GRAPH_SCHEMES["int4"].setting)
print(peak - before)
"""


def test_memory_does_not_grow_with_the_graph(tmp_path: Path) -> None:
    """48 weights of 4 MB are quantized in less memory than a quarter of them takes: one after another, in a
    few copies each.
    """
    done = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY, products(tmp_path, 48, 1024)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 48 << 20


def test_the_log_stays_as_it_was(bundle_of: Make, tmp_path: Path) -> None:
    """Quantizing leaves the process's logging alone (the quantizer's import would make it tell everything),
    and imports no torch.
    """
    program = (
        "import logging, sys, adapterpack\n"
        "adapterpack.quantize(sys.argv[1], sys.argv[2], scheme='int8')\n"
        "root = logging.getLogger()\n"
        "print(root.handlers, root.level, sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", program, str(bundle_of("llama", "bank")), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("[] 30 []\n", "", 0)


@pytest.mark.fast
def test_a_quantized_weight_is_freed_without_the_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are reference cycles: the parts of a weight, and their codes, would stay until a collection."""
    alive: list[weakref.ref[np.ndarray]] = []

    def watched(matrix: np.ndarray) -> np.ndarray:
        array = np.array(matrix)
        alive.append(weakref.ref(array))
        return array

    monkeypatch.setattr(product, "in_order", watched)
    monkeypatch.setattr(onnxruntime_quantizer, "_MOST", 1024)
    numbers = ir.tensor(np.random.default_rng(0).standard_normal((64, 48), np.float32), name="w")
    weight = ir.val("w", const_value=numbers, shape=numbers.shape, type=ir.TensorType(ir.DataType.FLOAT))
    x = ir.val("x", shape=ir.Shape(["rows", 64]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("MatMul", [x, weight], name="product")
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 20}, name="g")
    whole = product.ConstantProduct(node, weight, ir.Model(graph, ir_version=10))
    gc.disable()
    try:
        made = onnxruntime_quantizer.quantize_product(whole, product.RoundingSetting("int4", 4, 32, False))
        assert len(alive) == 3
        assert all(array() is None for array in alive)
    finally:
        gc.enable()
    assert {value.shape[0] for value in made.initializers.values()} == {48}
