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

from adapterpack import Session, export, quantize
from adapterpack.bundle.manifest import GRAPH, read_bundle
from adapterpack.errors import ConfigError, UnknownName, Unsupported

Make = Callable[..., Any]
OPTIONS: dict[str, dict[str, Any]] = {
    "int8": {}, "int2": {"block_size": 16}, "fp16": {}, "bf16": {}, "symmetric": {"scheme": "int4", "symmetric": True},
    "k-quant": {"scheme": "int4", "algorithm": "k-quant", "block_size": 16}, "hqq": {"scheme": "int4", "algorithm": "hqq"},
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
        (ConfigError, "no text", {"scheme": "int4", "algorithm": "gptq", "calibration": tmp_path / "empty.jsonl"}),
    ]
    for error, words, options in cases:
        with pytest.raises(error, match=words):
            quantize(bundle, out, **options)
    with pytest.raises(ConfigError, match="algorithm"):
        quantize(pack_of("llama", "alpha"), out, algorithm="rtn")
    assert not out.exists() and read_bundle(bundle).quantization is None
