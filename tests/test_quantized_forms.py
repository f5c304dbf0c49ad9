"""Every scheme in every form of a bundle: the graph computes what a float graph of the same values computes,
and options are recorded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from test_quantized_products import dense, least

from adapterpack import Session, export, quantize, validate
from adapterpack.bundle.manifest import FILE_NAME, GRAPH, read_bundle
from adapterpack.errors import ConfigError, FormatError, StorageError, UnknownName, Unsupported
from adapterpack.graph_passes.experts import unstack_experts
from adapterpack.quantizing.graphs.algorithm import ALGORITHMS
from adapterpack.quantizing.graphs.options import writable_schemes
from adapterpack.quantizing.graphs.quantize_bundle import quantize_file
from adapterpack.quantizing.graphs.scheme import GRAPH_SCHEMES

Make = Callable[..., Any]
SPECIAL: dict[str, dict[str, Any]] = {
    "int2": {"block_size": 16},
    "k-quant": {"block_size": 16},
    "mixed": {"error_budget": 0.07},
}
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"scheme": name} for name in writable_schemes()},
    "symmetric": {"scheme": "int4", "symmetric": True},
    **{name: {"scheme": "int4", "algorithm": name} for name in ALGORITHMS if name != "rtn"},
    "corrected": {"scheme": "int4", "algorithm": "awq", "compensate": 5},
}
"""Every scheme and every algorithm there is, with options that it needs or that make its case harder."""


def options_of(name: str, rows: Path) -> dict[str, Any]:
    options = {**OPTIONS[name], **SPECIAL.get(name, {})}
    if "algorithm" in options and ALGORITHMS[options["algorithm"]].calibrated:
        options["calibration"] = rows
    return options


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration rows of all three kinds."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ["where", "is", "my", "parcel", "and", "when", "will", "the", "order", "come"]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 9)) for _ in range(12)]
    lines = [{"text": text} for text in texts[:8]] + [
        {"prompt": text, "completion": words[0]} for text in texts[8:]
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def correction(node: Any, codes: dict[str, Any]) -> np.ndarray | float:
    """What a quantized graph adds to the matrix of a product, in float64."""
    down, up = (codes.get(f"{node.name}/{role}") for role in ("down", "up"))
    return 0.0 if down is None or up is None else dense(up) @ dense(down)


def same_values(float_folder: Path, quantized_folder: Path, out: Path) -> Path:
    """The float bundle with the weights that the quantized graph stands for, in float64 by the operators'
    definitions.
    """
    shutil.copytree(float_folder, out)
    model, quantized = ir.load(out / GRAPH), ir.load(quantized_folder / GRAPH).graph
    graph = model.graph
    nodes, codes = (
        {node.name: node for node in graph},
        {node.name: node for node in quantized if node.op_type == "MatMulNBits"},
    )
    for node in quantized:
        if node.op_type == "MatMulNBits" and node.name.rpartition("_Q")[0] in nodes:
            product = nodes[node.name.rpartition("_Q")[0]]
            matrix = dense(node) + least(node, node.attributes.get_int("block_size"))
            scaled = node.inputs[0].producer()
            if scaled is not None and scaled.name.endswith("/scaled"):
                matrix = matrix * scaled.inputs[1].const_value.numpy()
            matrix = matrix + correction(node, codes)
            turned = product.inputs[1].producer()
            value = product.inputs[1] if turned is None else turned.inputs[0]
            value.const_value = ir.tensor(
                (matrix if turned is not None else matrix.T).astype(np.float32), name=value.name
            )
        elif node.op_type == "Mul" and node.name.endswith("/weights"):  # codes of columns, times their scales
            product = nodes[node.name.removesuffix("/weights")]
            matrix = node.inputs[0].producer().inputs[0].const_value.numpy() * np.float64(1)
            product.inputs[1].const_value = ir.tensor(
                (matrix * node.inputs[1].const_value.numpy()).astype(np.float32), name=product.inputs[1].name
            )
        elif node.op_type == "Cast" and node.name.endswith("/wide"):
            stored = node.inputs[0].const_value.numpy()
            graph.initializers[node.inputs[0].name].const_value = ir.tensor(
                stored.astype(np.float32), name=node.inputs[0].name
            )
    ir.save(ir.from_proto(ir.to_proto(model)), out / GRAPH)
    return out


@pytest.mark.sampled(4)
@pytest.mark.parametrize("mode", ["folded", "inputs", "bank"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_quantized_graph_computes_with_its_own_values(
    name: str, mode: str, bundle_of: Make, rows: Path, tmp_path: Path
) -> None:
    """Base and adapter, exact products: float noise of two layers away (with a corrected product, which is
    two sums, 2.1e-5 was seen on a processor with AVX-512), and the likeliest token is the same at 2,160
    positions but for ties. The float bundle's answers are further away than that.
    """
    options = {
        **options_of(name, rows),
        "accuracy": "exact" if "accuracy" in GRAPH_SCHEMES[OPTIONS[name]["scheme"]].takes else None,
    }
    source = bundle_of("llama", mode)
    bundle = quantize(source, tmp_path / "out", **options)
    reference = Session(same_values(source, tmp_path / "out", tmp_path / "same"), "cpu", verify="off")
    session, plain = Session(tmp_path / "out", "cpu"), Session(source, "cpu")
    ids = {"input_ids": np.random.default_rng(5).integers(3, 90, (36, 60))}
    noise = 3e-5 if name == "corrected" else 2e-5
    for adapter in [None] if mode == "folded" else [None, "alpha"]:
        found, expected, before = (one.run(ids, adapter)["logits"] for one in (session, reference, plain))
        assert np.abs(found - expected).max() <= noise * np.abs(expected).max()
        assert np.abs(found - before).max() > 4 * np.abs(found - expected).max()
        assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.999
    report = bundle.quantization
    assert report is not None and report["scheme"] == options["scheme"]
    if name == "mixed":
        assert len({choice["bits"] for choice in report["products"].values()}) > 1
        assert np.sqrt(np.mean([choice["error"] ** 2 for choice in report["products"].values()])) <= 0.07
    assert report.get("algorithm", "rtn") == options.get("algorithm", "rtn")
    assert ("calibration" in report) == ("calibration" in options)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", OPTIONS)
def test_rows_of_the_engine(name: str, tiny_llama: Path, pack_of: Make, rows: Path, tmp_path: Path) -> None:
    """Generation by the engine's graph, whose rows have adapters of their own, says what passes of the
    ordinary graph say.
    """
    export(tiny_llama, [pack_of("llama", "alpha")], tmp_path / "float", mode="bank", in_place=True)
    quantize(tmp_path / "float", tmp_path / "out", **options_of(name, rows))
    session = Session(tmp_path / "out", "cpu")
    adapters: list[str | None] = ["alpha", None]
    answers = session.generate([[5, 6, 7], [9, 4]], adapters, max_new_tokens=5)
    for prompt, adapter, answer in zip(([5, 6, 7], [9, 4]), adapters, answers, strict=True):
        ids = list(prompt)
        for token in answer.ids:
            logits = session.run({"input_ids": np.array([ids])}, adapter)["logits"][0, -1]
            assert logits[token] >= logits.max() - 1e-3 * np.abs(logits).max()
            ids.append(token)


def test_what_does_not_go_together_is_refused(
    bundle_of: Make, pack_of: Make, rows: Path, tmp_path: Path
) -> None:
    bundle, out = bundle_of("llama", "bank"), tmp_path / "out"
    (tmp_path / "empty.jsonl").write_text("{}\n")
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (Unsupported, "one scale", {"scheme": "int8-dynamic"}),
        (Unsupported, "eight-bit", {"scheme": "fp8"}),
        (UnknownName, "gptq", {"scheme": "int4", "algorithm": "gpqt"}),
        (ConfigError, "calibration", {"scheme": "int4", "algorithm": "awq"}),
        (ConfigError, "block-size", {"scheme": "int4", "block_size": 48}),
        (ConfigError, "block-size", {"scheme": "fp16", "block_size": 32}),
        (ConfigError, "use no calibration", {"scheme": "int4", "calibration": rows}),
        (Unsupported, "symmetric", {"scheme": "int4", "algorithm": "hqq", "symmetric": True}),
        (ConfigError, "budget", {"scheme": "mixed"}),
        (ConfigError, "budget", {"scheme": "int4", "error_budget": 0.1, "size_budget": 9}),
        (
            ConfigError,
            "no text",
            {"scheme": "int4", "algorithm": "gptq", "calibration": tmp_path / "empty.jsonl"},
        ),
    ]
    for error, words, options in cases:
        with pytest.raises(error, match=words):
            quantize(bundle, out, **options)
    with pytest.raises(ConfigError, match="algorithm"):
        quantize(pack_of("llama", "alpha"), out, algorithm="rtn")
    assert not out.exists() and read_bundle(bundle).quantization is None


@pytest.mark.parametrize(
    ("algorithm", "calibrated"),
    [
        ("rtn", True),
        pytest.param("rtn", False, marks=pytest.mark.long),
        pytest.param("hqq", False, marks=pytest.mark.long),
    ],
)
def test_a_compensated_bank(
    algorithm: str, calibrated: bool, tiny_llama: Path, pack_of: Make, rows: Path, tmp_path: Path
) -> None:
    """At full rank the correction is all of the error of two bits but for its own rounding to eight, 1 % of
    it, so that every row, the base's and a mixed batch's, of a pack that was loaded later and of a mix,
    answers nearly as the float bundle does.
    """
    export(
        tiny_llama,
        [pack_of("llama", "alpha"), pack_of("llama", "beta")],
        tmp_path / "float",
        mode="bank",
        in_place=True,
        slots=4,
    )
    bundle = quantize(
        tmp_path / "float",
        tmp_path / "out",
        scheme="int2",
        head="float",
        accuracy="exact",
        compensate=64,
        algorithm=algorithm,
        **({"calibration": rows} if calibrated else {}),
    )
    assert bundle.quantization is not None and bundle.max_rank == read_bundle(tmp_path / "float").max_rank
    assert bundle.quantization["compensation"]["error_left"] < 2e-2
    before, after = Session(tmp_path / "float", "cpu"), Session(tmp_path / "out", "cpu")
    for session in (before, after):
        session.load(pack_of("llama", "gamma"))
    ids = {"input_ids": np.random.default_rng(4).integers(3, 90, (4, 6))}
    expected, found = (
        session.run(ids, ["beta", None, "alpha", "gamma"])["logits"] for session in (before, after)
    )
    assert np.abs(found - expected).max() <= 3e-2 * np.abs(expected).max()
    assert not validate(tmp_path / "out", full=True).findings


def test_a_compensation_of_low_rank_is_the_best_of_its_rank(
    tiny_llama: Path, pack_of: Make, tmp_path: Path
) -> None:
    """The correction of a product is the singular value decomposition of its error in float64, cut to the
    rank of all its sites together; rounding the factors to eight bits loses a per mille of what is left.
    """
    export(tiny_llama, [pack_of("llama", "alpha")], tmp_path / "float", mode="bank")
    quantize(tmp_path / "float", tmp_path / "out", scheme="int4", compensate=3)
    before, after = (ir.load(tmp_path / name / GRAPH).graph for name in ("float", "out"))
    codes = {node.name: node for node in after if node.op_type == "MatMulNBits"}
    products = {node.name: node for node in before if node.op_type == "MatMul" and f"{node.name}_Q4" in codes}
    sites = [site.node for site in read_bundle(tmp_path / "float").sites.values() if site.weight]
    for name, node in products.items():
        rank = 3 * max(sites.count(name), 1)
        error = node.inputs[1].const_value.numpy().T.astype(np.float64) - dense(codes[f"{name}_Q4"])
        left, sizes, right = np.linalg.svd(error)
        best = (left[:, :rank] * sizes[:rank]) @ right[:rank]
        found = correction(codes[f"{name}_Q4"], codes)
        assert np.linalg.matrix_rank(found) == rank
        assert np.linalg.norm(error - found) <= np.linalg.norm(error - best) * 1.001
    assert {sites.count(name) for name in products} == {1, 2, 3}, "siblings share a product"


def test_a_bundle_whose_rows_carry_a_correction_is_refused(bundle_of: Make, tmp_path: Path) -> None:
    """As bundles had it before the graph did: without it they would answer otherwise."""
    shutil.copytree(bundle_of("llama", "bank"), tmp_path / "old")
    manifest = tmp_path / "old" / FILE_NAME
    manifest.write_text(
        json.dumps({**json.loads(manifest.read_text()), "compensation": {"pack": "sha256:0", "rank": 4}})
    )
    with pytest.raises(FormatError, match="compensation"):
        read_bundle(tmp_path / "old")


@pytest.mark.parametrize("stored", ["in the graph", "in a file"])
def test_a_stack_is_taken_apart(stored: str, tmp_path: Path) -> None:
    """The same bits by ONNX Runtime before and after, and every matrix is quantized then; a stack that
    something else reads stays.
    """
    rng, path = np.random.default_rng(0), tmp_path / "model.onnx"
    stacks = {name: rng.standard_normal((3, 45, 7)).astype(np.float32) for name in ("cut", "kept")}
    x = ir.Value(name="x", shape=ir.Shape(["n", 45]), type=ir.TensorType(ir.DataType.FLOAT))
    constants = {
        name: ir.Value(name=name, const_value=ir.tensor(value, name=name))
        for name, value in {**stacks, "first": np.array([0])}.items()
    }
    nodes, products = [], []
    for name in stacks:
        split = ir.node("Split", [constants[name]], {"axis": 0, "num_outputs": 3}, num_outputs=3)
        parts = [ir.node("Squeeze", [part, constants["first"]]) for part in split.outputs]
        products += [
            ir.node("MatMul", [x, part.outputs[0]], name=f"{name}{number}")
            for number, part in enumerate(parts)
        ]
        nodes += [split, *parts]
    total = ir.node("Sum", [product.outputs[0] for product in products])
    rest = ir.node(
        "ReduceSum",
        [next(node for node in nodes[::-1] if node.op_type == "Squeeze").outputs[0]],
        {"keepdims": 0},
    )
    outputs = [total.outputs[0], rest.outputs[0]]
    for number, value in enumerate(outputs):
        value.name, value.type = f"y{number}", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x],
        outputs,
        nodes=[*nodes, *products, total, rest],
        initializers=list(constants.values()),
        opset_imports={"": 21},
    )
    ir.save(
        ir.Model(graph, ir_version=10),
        path,
        **({"external_data": "model.onnx.data"} if stored == "in a file" else {}),
    )

    def answer() -> list[np.ndarray]:
        return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
            None, {"x": np.ones((4, 45), np.float32)}
        )

    before = answer()
    assert unstack_experts(path) == 1
    assert all(np.array_equal(one, two) for one, two in zip(before, answer(), strict=True))
    assert quantize_file(path, "int8", lambda name: GRAPH_SCHEMES["int8"].setting) == 3
    assert np.abs(answer()[0] - before[0]).max() <= 0.02 * np.abs(before[0]).max()


@pytest.mark.long
def test_experts_of_a_fused_stack(tmp_path: Path) -> None:
    """A graph that torch traced has a layer's experts in one constant: each is quantized by itself, to codes
    that are within half a step of its weights; one token leaves three of five experts without any.
    """
    from transformers import MixtralConfig, MixtralForCausalLM, set_seed

    set_seed(3)
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=5,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    export(tmp_path / "base", [], tmp_path / "float", frontend="transformers")
    bundle = quantize(tmp_path / "float", tmp_path / "out", scheme="int8", accuracy="exact")
    assert bundle.quantization is not None and bundle.quantization["quantized"] == 2 * (2 + 2 * 5) + 1
    nodes = [node for node in ir.load(tmp_path / "out" / GRAPH).graph if node.op_type == "MatMulNBits"]
    found = {
        node.inputs[1].name.rpartition("_Q")[0]: dense(node) for node in nodes if "/" in node.inputs[1].name
    }
    stacks = [
        stack
        for layer in model.model.layers
        for stack in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj)
    ]
    experts = [weight.detach().numpy() for stack in stacks for weight in stack]
    matched = [
        min(np.abs(weight - one).max() for one in found.values() if one.shape == weight.shape)
        for weight in experts
    ]
    assert len(matched) == 20 and max(matched) <= max(np.ptp(weight) for weight in experts) / 255
    before, after = (Session(tmp_path / name, "cpu") for name in ("float", "out"))
    for ids in ([[5, 6, 7]], [[5]]):
        expected, found_logits = (
            session.run({"input_ids": np.array(ids)})["logits"] for session in (before, after)
        )
        assert np.abs(found_logits - expected).max() <= 0.05 * np.abs(expected).max()


def test_an_export_takes_the_same_options(
    tiny_llama: Path, pack_of: Make, rows: Path, tmp_path: Path
) -> None:
    """Its weights are, byte for byte, those of the float bundle's quantized copy; what cannot be is found
    before a graph is made.
    """
    packs = [pack_of("llama", "alpha")]
    options: dict[str, Any] = {
        "algorithm": "awq",
        "calibration": rows,
        "block_size": 16,
        "compensate": 3,
        "head": "float",
    }
    exported = export(tiny_llama, packs, tmp_path / "out", quantize="int4", in_place=False, **options)
    export(tiny_llama, packs, tmp_path / "float", in_place=False)
    copy = quantize(tmp_path / "float", tmp_path / "copy", scheme="int4", **options)
    assert exported.quantization == copy.quantization and "compensation" in (copy.quantization or {})
    assert (tmp_path / "out" / f"{GRAPH}.data").read_bytes() == (
        tmp_path / "copy" / f"{GRAPH}.data"
    ).read_bytes()
    said: list[str] = []
    for error, wrong in (
        (ConfigError, {"quantize": "int4", "compensate": 1000}),
        (ConfigError, {"block_size": 16}),
        (StorageError, {"quantize": "int4", "algorithm": "gptq", "calibration": tmp_path / "none.jsonl"}),
    ):
        with pytest.raises(error):
            export(tiny_llama, packs, tmp_path / "wrong", progress=said.append, **wrong)
    assert not said
