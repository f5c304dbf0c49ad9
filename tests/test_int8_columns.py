"""W8A8: products with a scale for each column of the weight and for each row of activations; what they compute,
and bundles in this scheme.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from adapterpack import Engine, Session, export, quantize
from adapterpack.base import Checkpoint
from adapterpack.bundle.decoder_graph import DECODER
from adapterpack.bundle.manifest import GRAPH, graph_file, read_bundle
from adapterpack.errors import ConfigError, ParityError
from adapterpack.exporting.proof.places import require_places
from adapterpack.onnx_graph.products import is_fast, make_fast, packs_codes
from adapterpack.quantizing.graphs.quantize_bundle import quantize_file
from adapterpack.quantizing.graphs.scheme import GRAPH_SCHEMES

Make = Callable[..., Any]


def _graph(path: Path, weight: np.ndarray, turned: bool) -> None:
    """Writes ``y = x W`` with ``W`` ``[in, out]``, stored as it is or as its transpose that a node turns back."""
    dtype = ir.tensor(weight).dtype
    x = ir.val("x", dtype, ["rows", "tokens", weight.shape[0]])
    stored = ir.tensor(np.ascontiguousarray(weight.T) if turned else weight, name="w")
    table = ir.val("w", const_value=stored)
    nodes, factor = [], table
    if turned:
        nodes.append(ir.node("Transpose", [table], {"perm": [1, 0]}, name="turned"))
        factor = nodes[-1].outputs[0]
    nodes.append(ir.node("MatMul", [x, factor], name="product"))
    y = nodes[-1].outputs[0]
    y.name, y.dtype, y.shape = "y", dtype, ir.Shape(["rows", "tokens", weight.shape[1]])
    graph = ir.Graph([x], [y], nodes=nodes, initializers=[table], opset_imports={"": 21}, name="g")
    ir.save(ir.Model(graph, ir_version=10), path)


def _run(path: Path, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"x": x})[0]
    return found.astype(np.float64)


def _rounded(array: np.ndarray, axis: int) -> np.ndarray:
    """The array in steps of a 127th of its largest along an axis, in float64."""
    step = np.abs(array).max(axis, keepdims=True) / 127
    step[step == 0] = 1
    return np.rint(array / step) * step


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 33), (3, 7, 130)])
def test_both_accuracies_are_the_formula(shape: Any, turned: bool, dtype: Any, tmp_path: Path) -> None:
    """Against float64: exact within float noise of ``x W'``; fast of ``x' W'``, where a rounding that float32
    decides otherwise may move an output by one step of one activation. A row of zeros gives zeros, and a
    column of zeros, too. Made exact again, it gives the same bits as before.
    """
    rng = np.random.default_rng(7)
    weight = (rng.standard_normal((shape[-1], 45)) * rng.uniform(0.1, 9, 45)).astype(dtype)
    weight[:, 3] = 0
    x = rng.standard_normal(shape).astype(dtype)
    x[0, 0] *= 30
    if shape[0] > 1:
        x[1, 2] = 0
    path = tmp_path / "graph.onnx"
    _graph(path, weight, turned)
    assert quantize_file(path, "w8a8", lambda name: GRAPH_SCHEMES["w8a8"].setting) == 1
    assert is_fast(path) is False
    wide, codes = x.astype(np.float64), _rounded(weight.astype(np.float64), 0)
    noise = 1e-5 if dtype == np.float32 else 4e-3
    size = np.abs(wide) @ np.abs(codes)
    exact = _run(path, x)
    assert (np.abs(exact - wide @ codes) <= noise * size + 1e-12).all()
    make_fast(path)
    assert is_fast(path) is True
    found, expected = _run(path, x), _rounded(wide, -1) @ codes
    step = np.abs(wide).max(-1, keepdims=True) / 127 * np.abs(codes).max(0)
    off = np.abs(found - expected) > noise * size + 1e-12
    assert (np.abs(found - expected) <= noise * size + 1.001 * step + 1e-12).all()
    assert off.mean() < 0.1
    assert np.abs(found - wide @ codes).max() > 0
    make_fast(path, fast=False)
    assert is_fast(path) is False
    assert np.array_equal(_run(path, x), exact)


def _moments(second: np.ndarray | None, name: str) -> np.ndarray | None:
    return second


def test_large_inputs_are_smoothed(tmp_path: Path) -> None:
    """With the means of ``x xT`` a few inputs of sixty times the size no longer make the steps of the others
    coarse: the error of the fast product falls to a third, and the exact one stays within its codes' steps.
    """
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((96, 40)).astype(np.float32)
    x = rng.standard_normal((2, 50, 96)).astype(np.float32)
    x[..., [5, 60]] *= 60
    rows = x.reshape(-1, 96)
    wanted, errors = x.astype(np.float64) @ weight.astype(np.float64), []
    moments = {"plain": None, "smoothed": rows.T @ rows / len(rows)}
    for name, second in moments.items():
        path = tmp_path / f"{name}.onnx"
        _graph(path, weight, False)
        quantize_file(
            path, "w8a8", lambda name: GRAPH_SCHEMES["w8a8"].setting, None, partial(_moments, second)
        )
        exact = np.abs(_run(path, x) - wanted).max()
        assert exact < 0.03 * np.abs(wanted).max()
        make_fast(path)
        errors.append(np.sqrt(np.square(_run(path, x) - wanted).mean()))
    assert errors[1] < errors[0] / 3


def test_products_on_one_weight_share_its_codes(tmp_path: Path) -> None:
    """As layers that are used at several places: one set of codes, and each product has nodes of its own."""
    rng, path = np.random.default_rng(9), tmp_path / "graph.onnx"
    weight, x = (
        rng.standard_normal((8, 8)).astype(np.float32),
        rng.standard_normal((1, 3, 8)).astype(np.float32),
    )
    _graph(path, weight, False)
    model = ir.load(path)
    first = model.graph.node("product")
    again = ir.node("MatMul", [first.outputs[0], first.inputs[1]], name="again")
    again.outputs[0].name, first.outputs[0].name = "y", "between"
    again.outputs[0].dtype, again.outputs[0].shape = ir.DataType.FLOAT, first.outputs[0].shape
    model.graph.append(again)
    model.graph.outputs[0] = again.outputs[0]
    ir.save(model, path)
    assert quantize_file(path, "w8a8", lambda name: GRAPH_SCHEMES["w8a8"].setting) == 2
    codes = _rounded(weight.astype(np.float64), 0)
    assert np.allclose(_run(path, x), x @ codes @ codes, atol=1e-4)
    make_fast(path)
    assert sum(value.dtype == ir.DataType.INT8 for value in ir.load(path).graph.initializers.values()) == 1
    expected = _rounded(_rounded(x.astype(np.float64), -1) @ codes, -1) @ codes
    assert np.abs(_run(path, x) - expected).max() < 0.02 * np.abs(expected).max()


@pytest.fixture(scope="module")
def bank(bundle_of: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("w8a8") / "bank"
    quantize(bundle_of("llama", "bank"), folder, scheme="w8a8")
    return folder


def test_a_bank_multiplies_whole_numbers_by_default(bank: Path, bundle_of: Make) -> None:
    """Each site's node is the product of whole numbers on the site's weight; both errors are recorded; the
    adapters still act; a few runs of the graph have its codes prepacked.
    """
    bundle, model = read_bundle(bank), ir.load(bank / GRAPH)
    nodes = {node.name: node for node in model.graph}
    for site in bundle.sites.values():
        if site.kind == "linear" and not site.members:
            assert nodes[site.node].op_type == "MatMulInteger"
            assert nodes[site.node].inputs[1].name == site.weight
            assert model.graph.initializers[site.weight].dtype == ir.DataType.INT8
    report = bundle.quantization
    assert report["scheme"] == "w8a8"
    assert report["accuracy"] == "fast"
    assert "block_size" not in report
    exact, fast = (report["error_by_accuracy"][name] for name in ("exact", "fast"))
    assert 0 < exact < fast < 0.1
    assert packs_codes(model)
    ids = {"input_ids": np.random.default_rng(2).integers(3, 96, (3, 6))}
    names = ["beta", None, "alpha"]
    before, after = (
        Session(one, "cpu").run(ids, names)["logits"] for one in (bundle_of("llama", "bank"), bank)
    )
    moved = np.abs(after - before).max(-1)
    assert np.median(moved) < 0.05 * np.abs(before).max()  # at one place a tiny model's answer turns over
    assert np.abs(after[0] - after[1]).max() > 1e-2


def test_the_engine_decodes_mixed_rows(pack_of: Make, tiny_llama: Path, tmp_path: Path) -> None:
    """Rows of other adapters in one batch get the tokens that each gets alone, and the engine's graph, which
    was proved with exact products, has fast ones.
    """
    packs = [pack_of("llama", name) for name in ("alpha", "beta")]
    export(tiny_llama, packs, tmp_path / "bundle", mode="bank", in_place=True, quantize="w8a8")
    assert is_fast(tmp_path / "bundle" / graph_file(DECODER)) is True
    prompts = [[5, 9, 22, 7], [40, 41, 42, 43, 44, 45], [60]]
    names = ["beta", None, "alpha"]

    def answers(pairs: list[tuple[list[int], Any]]) -> list[list[int]]:
        engine = Engine(tmp_path / "bundle", "cpu", lookup_tokens=0)
        numbers = [engine.add(ids, name, max_new_tokens=12, ignore_eos=True) for ids, name in pairs]
        tokens: dict[int, list[int]] = {number: [] for number in numbers}
        while engine.busy:
            for event in engine.step():
                tokens[event.request] += [] if event.token is None else [event.token]
        return [tokens[number] for number in numbers]

    pairs = list(zip(prompts, names, strict=True))
    assert answers(pairs) == [answers([pair])[0] for pair in pairs]


def test_options_without_a_meaning_are_refused(bundle_of: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not take --block-size"):
        quantize(bundle_of("llama", "bank"), tmp_path / "out", scheme="w8a8", block_size=64)
    assert not (tmp_path / "out").exists()


def test_places_are_proved_without_a_float_graph(tiny_llama: Path, pack_of: Make, tmp_path: Path) -> None:
    """Codes written straight from the checkpoint are its numbers to nearest, and a graph with one code changed
    is found.
    """
    base = Checkpoint(tiny_llama)
    out = tmp_path / "bundle"
    export(tiny_llama, [pack_of("llama", "alpha")], out, mode="bank", quantize="w8a8", proof="none")
    sites = read_bundle(out).sites
    assert require_places(out, sites, base) > 5
    path = next(path for path, site in sites.items() if path.endswith("q_proj"))
    model = ir.load(out / GRAPH)
    codes = model.graph.initializers[sites[path].weight]
    changed = codes.const_value.numpy().copy()
    changed[3, sites[path].at + 1] ^= 4
    codes.const_value = ir.tensor(changed, name=codes.name)
    ir.save(model, tmp_path / "bundle" / GRAPH)
    with pytest.raises(ParityError, match="other numbers"):
        require_places(out, sites, base)
