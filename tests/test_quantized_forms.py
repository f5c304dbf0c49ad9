"""Every scheme in every form of a bundle: the graph computes what a float graph of the same values computes, and options are recorded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from test_quantized_products import dense

from adapterpack import Session, export, load, quantize, validate
from adapterpack.bundle.manifest import COMPENSATION, GRAPH, read_bundle
from adapterpack.errors import ConfigError, FormatError, UnknownName, Unsupported

Make = Callable[..., Any]
OPTIONS: dict[str, dict[str, Any]] = {
    "int8": {}, "int2": {"block_size": 16}, "fp16": {}, "bf16": {}, "symmetric": {"scheme": "int4", "symmetric": True},
    "k-quant": {"scheme": "int4", "algorithm": "k-quant", "block_size": 16}, "hqq": {"scheme": "int4", "algorithm": "hqq"},
    "mixed": {"scheme": "mixed", "error_budget": 0.07},
    "gptq": {"scheme": "int4", "algorithm": "gptq"}, "awq": {"scheme": "int4", "algorithm": "awq"},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration rows of all three kinds."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ["where", "is", "my", "parcel", "and", "when", "will", "the", "order", "come"]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 9)) for _ in range(12)]
    lines = [{"text": text} for text in texts[:8]] + [{"prompt": text, "completion": words[0]} for text in texts[8:]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def same_values(float_folder: Path, quantized_folder: Path, out: Path) -> Path:
    """The float bundle with the weights that the quantized graph stands for, in float64 by the operators' definitions."""
    shutil.copytree(float_folder, out)
    model, quantized = ir.load(out / GRAPH), ir.load(quantized_folder / GRAPH).graph
    graph = model.graph
    nodes = {node.name: node for node in graph}
    for node in quantized:
        if node.op_type == "MatMulNBits":
            product = nodes[node.name.rpartition("_Q")[0]]
            matrix, scaled = dense(node), node.inputs[0].producer()
            if scaled is not None and scaled.name.endswith("/scaled"):
                matrix = matrix * scaled.inputs[1].const_value.numpy()
            turned = product.inputs[1].producer()
            value = product.inputs[1] if turned is None else turned.inputs[0]
            value.const_value = ir.tensor((matrix if turned is not None else matrix.T).astype(np.float32), name=value.name)
        elif node.op_type == "Cast" and node.name.endswith("/wide"):
            stored = node.inputs[0].const_value.numpy()
            graph.initializers[node.inputs[0].name].const_value = ir.tensor(stored.astype(np.float32), name=node.inputs[0].name)
    ir.save(ir.from_proto(ir.to_proto(model)), out / GRAPH)
    return out


@pytest.mark.sampled(4)
@pytest.mark.parametrize("mode", ["folded", "inputs", "bank"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_quantized_graph_computes_with_its_own_values(name: str, mode: str, bundle_of: Make, rows: Path, tmp_path: Path) -> None:
    """Base and adapter, exact products: float noise of two layers away. The float bundle's answers are further away than that."""
    options = {"scheme": name, **OPTIONS[name], "accuracy": None if name in {"fp16", "bf16"} else "exact"}
    if name in {"gptq", "awq"}:
        options["calibration"] = rows
    source = bundle_of("llama", mode)
    bundle = quantize(source, tmp_path / "out", **options)
    reference = Session(same_values(source, tmp_path / "out", tmp_path / "same"), "cpu", verify="off")
    session, plain = Session(tmp_path / "out", "cpu"), Session(source, "cpu")
    ids = {"input_ids": np.random.default_rng(5).integers(3, 90, (2, 7))}
    for adapter in [None] if mode == "folded" else [None, "alpha"]:
        found, expected, before = (one.run(ids, adapter)["logits"] for one in (session, reference, plain))
        assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()
        assert np.abs(found - before).max() > 4 * np.abs(found - expected).max()
    report = bundle.quantization
    assert report is not None and report["scheme"] == options["scheme"]
    if name == "mixed":
        assert len({choice["bits"] for choice in report["products"].values()}) > 1
        assert np.sqrt(np.mean([choice["error"] ** 2 for choice in report["products"].values()])) <= 0.07
    assert report.get("algorithm", "rtn") == options.get("algorithm", "rtn")
    assert ("calibration" in report) == ("calibration" in options)


@pytest.mark.parametrize("options", [{"scheme": "fp16"}, {"scheme": "int2"}, {"scheme": "int4", "algorithm": "awq"}], ids=str)
def test_rows_of_the_engine(options: dict[str, Any], tiny_llama: Path, pack_of: Make, rows: Path, tmp_path: Path) -> None:
    """Generation by the engine's graph, whose rows have adapters of their own, says what passes of the ordinary graph say."""
    export(tiny_llama, [pack_of("llama", "alpha")], tmp_path / "float", mode="bank", in_place=True)
    quantize(tmp_path / "float", tmp_path / "out", **options, **({"calibration": rows} if "algorithm" in options else {}))
    session = Session(tmp_path / "out", "cpu")
    names: list[str | None] = ["alpha", None]
    answers = session.generate([[5, 6, 7], [9, 4]], names, max_new_tokens=5)
    for prompt, name, answer in zip(([5, 6, 7], [9, 4]), names, answers, strict=True):
        ids = list(prompt)
        for token in answer.ids:
            logits = session.run({"input_ids": np.array([ids])}, name)["logits"][0, -1]
            assert logits[token] >= logits.max() - 1e-3 * np.abs(logits).max()
            ids.append(token)


def test_what_does_not_go_together_is_refused(bundle_of: Make, pack_of: Make, rows: Path, tmp_path: Path) -> None:
    bundle, out = bundle_of("llama", "bank"), tmp_path / "out"
    (tmp_path / "empty.jsonl").write_text("{}\n")
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (Unsupported, "one scale", {"scheme": "int8-dynamic"}), (Unsupported, "eight-bit", {"scheme": "fp8"}),
        (UnknownName, "gptq", {"scheme": "int4", "algorithm": "gpqt"}),
        (ConfigError, "calibration", {"scheme": "int4", "algorithm": "awq"}),
        (ConfigError, "block-size", {"scheme": "int4", "block_size": 48}),
        (ConfigError, "block-size", {"scheme": "fp16", "block_size": 32}),
        (ConfigError, "nothing here looks", {"scheme": "int4", "calibration": rows}),
        (Unsupported, "symmetric", {"scheme": "int4", "algorithm": "hqq", "symmetric": True}),
        (ConfigError, "budget", {"scheme": "mixed"}), (ConfigError, "budget", {"scheme": "int4", "error_budget": 0.1, "size_budget": 9}),
        (ConfigError, "no text", {"scheme": "int4", "algorithm": "gptq", "calibration": tmp_path / "empty.jsonl"}),
    ]
    for error, words, options in cases:
        with pytest.raises(error, match=words):
            quantize(bundle, out, **options)
    with pytest.raises(ConfigError, match="algorithm"):
        quantize(pack_of("llama", "alpha"), out, algorithm="rtn")
    assert not out.exists() and read_bundle(bundle).quantization is None


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_compensated_bank(calibrated: bool, tiny_llama: Path, pack_of: Make, rows: Path, tmp_path: Path) -> None:
    """At full rank the correction is all of the error, so that every row, the base's and a mixed batch's too, answers as the float bundle
    does, within float noise of codes of two bits; by the ordinary graph, by the engine, after another pack was loaded, and for a mix."""
    export(tiny_llama, [pack_of("llama", "alpha"), pack_of("llama", "beta")], tmp_path / "float", mode="bank", in_place=True, slots=4)
    bundle = quantize(tmp_path / "float", tmp_path / "out", scheme="int2", head="float", accuracy="exact", compensate=64,
                      **({"calibration": rows} if calibrated else {}))
    assert bundle.compensation is not None and bundle.quantization is not None
    assert bundle.quantization["compensation"]["error_left"] < 1e-2
    before, after = Session(tmp_path / "float", "cpu"), Session(tmp_path / "out", "cpu")
    for session in (before, after):
        session.load(pack_of("llama", "gamma"))
    ids = {"input_ids": np.random.default_rng(4).integers(3, 90, (4, 6))}
    names = ["beta", None, "alpha", "gamma"]
    expected, found = (session.run(ids, names)["logits"] for session in (before, after))
    assert np.abs(found - expected).max() <= 5e-3 * np.abs(expected).max()
    prompts = [[5, 6, 7], [9, 4, 8, 3], [11, 12], [30, 31]]
    for adapters in (names, None, [{"alpha": 0.5, "beta": 0.25}] * 4, "gamma"):
        one, two = ([answer.ids for answer in session.generate(prompts, adapters, max_new_tokens=6)] for session in (before, after))
        assert one == two
    assert not validate(tmp_path / "out", full=True).findings


def test_layers_that_stay_float_are_not_corrected(bundle_of: Make, tmp_path: Path) -> None:
    """The slots of a layer whose product is not quantized (a pooler's) are wider, too, and hold what they held."""
    quantize(bundle_of("bert", "bank"), tmp_path / "out", scheme="int2", head="float", accuracy="exact", compensate=64)
    bundle = read_bundle(tmp_path / "out")
    slots = {path for path, site in bundle.sites.items() if "up" in site.fields}
    assert slots > {group.path for group in load(tmp_path / "out" / COMPENSATION).manifest.groups}
    before, after = Session(bundle_of("bert", "bank"), "cpu"), Session(tmp_path / "out", "cpu")
    names = [*before.adapters, None]
    ids = {"input_ids": np.random.default_rng(4).integers(3, 90, (len(names), 6))}
    expected, found = (session.run(ids, names)["logits"] for session in (before, after))
    real = expected > -1e8  # the others are labels that an adapter lacks
    assert np.abs(found - expected)[real].max() <= 5e-3 * np.abs(expected[real]).max()


def test_a_compensation_of_low_rank_is_the_best_of_its_rank(tiny_llama: Path, pack_of: Make, tmp_path: Path) -> None:
    """The factors at a site are the singular value decomposition of the error in float64, cut to the rank."""
    export(tiny_llama, [pack_of("llama", "alpha")], tmp_path / "float", mode="bank")
    quantize(tmp_path / "float", tmp_path / "out", scheme="int4", compensate=3)
    pack = load(tmp_path / "out" / "compensation")
    graphs = [ir.load(tmp_path / name / GRAPH).graph for name in ("float", "out")]
    sites = [read_bundle(tmp_path / name).sites for name in ("float", "out")]
    for adapter in pack.adapters():
        path = adapter.site.path
        rows = slice(sites[0][path].at, sites[0][path].at + sites[0][path].out_features)
        weight = graphs[0].initializers[sites[0][path].weight].const_value.numpy().astype(np.float64)
        weight = (weight.T if sites[0][path].layout == "in_out" else weight)[rows]
        error = weight - dense(next(node for node in graphs[1] if node.name == sites[1][path].node))[rows]
        left, sizes, right = np.linalg.svd(error)
        best = (left[:, :3] * sizes[:3]) @ right[:3]
        found = adapter.wide["lora_B"].astype(np.float64) @ adapter.wide["lora_A"]
        assert np.linalg.norm(error - found) <= np.linalg.norm(error - best) * (1 + 1e-5)


def test_another_compensation_is_refused(tiny_llama: Path, pack_of: Make, tmp_path: Path) -> None:
    """A bundle whose folder holds a pack that its manifest does not name."""
    export(tiny_llama, [pack_of("llama", "alpha")], tmp_path / "float", mode="bank")
    quantize(tmp_path / "float", tmp_path / "out", scheme="int4", compensate=3)
    folder = tmp_path / "out" / COMPENSATION
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "out" / "adapters" / "alpha", folder)
    with pytest.raises(FormatError, match="another compensation"):
        Session(tmp_path / "out", "cpu", verify="off").load(pack_of("llama", "beta"))


def test_a_compensation_is_of_a_bank(bundle_of: Make, tmp_path: Path) -> None:
    for mode in ("folded", "inputs"):
        with pytest.raises(Unsupported, match="bank"):
            quantize(bundle_of("llama", mode), tmp_path / "out", scheme="int4", compensate=4)
