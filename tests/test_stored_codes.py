"""Graphs of quantized bases: the codes of every format as operators read them, and whole exports against
torch on the same values.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from stored_formats import COLUMNS, FORMATS, NF4, PATH
from test_merge_quantized import write
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from adapterpack import LoRA, Session, adapt, export, quantize, save, validate
from adapterpack.base.codecs.dequantized_checkpoint import DequantizedCheckpoint
from adapterpack.base.codecs.stored_form import Blocks, Table, side_by_side, stored_form
from adapterpack.cli.main import main
from adapterpack.errors import Unsupported
from adapterpack.io import safetensors as st
from adapterpack.onnx_graph.bnb4 import quant_type
from adapterpack.onnx_graph.editing import save_graph
from adapterpack.quantizing.graphs.quantize_bundle import quantize_file
from adapterpack.quantizing.graphs.stored_weights import StoredWeights

FLOATS = {"torchao Float8Tensor", "floats", "fp8"}
"""Formats whose codes no operator reads."""
OPERATORS = {
    name: "MatMulBnb4" if name.startswith("nf4") else "MatMulNBits" for name in FORMATS if name not in FLOATS
}


def graph_of(path: Path, *weights: np.ndarray) -> Path:
    """A graph of one product with the transpose of weights ``[out, in]`` one below the other."""
    weight = ir.tensor(np.concatenate(weights).T.astype(np.float32).copy(), name="w")
    x = ir.Value(name="x", shape=ir.Shape(["rows", weight.shape[0]]), type=ir.TensorType(ir.DataType.FLOAT))
    value = ir.Value(name="w", shape=weight.shape, type=ir.TensorType(ir.DataType.FLOAT), const_value=weight)
    node = ir.node("MatMul", [x, value], name="product")
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape(["rows", weight.shape[1]]), x.type
    save_graph(
        ir.Model(
            ir.Graph([x], [y], nodes=[node], initializers=[value], opset_imports={"": 20}, name="g"),
            ir_version=10,
        ),
        path,
    )
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_an_operator_multiplies_with_the_formats_own_numbers(name: str, tmp_path: Path) -> None:
    """y = W x in float64 with W by the format's formula: two float32 roundings of W, and those of 96 sums.
    Floats of eight bits stay as they are, and the report says why.
    """
    stored = FORMATS[name]()
    weights = StoredWeights(DequantizedCheckpoint(write(tmp_path / "base", stored)))
    path = graph_of(tmp_path / "model.onnx", weights.base.matrix(f"{PATH}.weight")[:])
    before = path.with_name("model.onnx.data").stat().st_size
    assert quantize_file(path, "as-stored", lambda _: None, stored=weights) == (name in OPERATORS)
    operators = {node.op_type for node in ir.load(path).graph}
    assert operators & {"MatMul", "MatMulNBits", "MatMulBnb4"} == {OPERATORS.get(name, "MatMul")}
    assert ("Gather" in operators) == ("act-order" in name)
    x = np.random.default_rng(0).normal(0, 1, (5, COLUMNS)).astype(np.float32)
    found = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    bound = np.abs(x.astype(float)) @ np.abs(stored.values).T
    assert (np.abs(found - x.astype(float) @ stored.values.T) <= (COLUMNS + 4) * 2.0**-24 * bound).all()
    (report,) = weights.report().values()
    assert (report["held"], report["dequantized"]) == ((1, 0) if name in OPERATORS else (0, 1))
    assert report["difference"] <= 2.0**-23
    if name in OPERATORS:
        assert not report["reasons"]
        assert path.with_name("model.onnx.data").stat().st_size < 0.5 * before
    else:
        assert report["reasons"] == {"no operator multiplies with such codes": 1}


@pytest.mark.parametrize(
    "names",
    [
        ("gptq 3 sym act-order", "gptq 4 sym act-order"),
        ("packed", "packed with zero points", "ints"),
        ("nf4", "nf4 odd blocks"),
        ("gptq 8", "awq", "packed"),
    ],
    ids="+".join,
)
def test_rows_of_several_weights_side_by_side(names: tuple[str, ...], tmp_path: Path) -> None:
    """In the widest codes and the smallest blocks of theirs, with the numbers of each to the bit."""
    bases = [
        DequantizedCheckpoint(write(tmp_path / str(number), FORMATS[name](seed=number)))
        for number, name in enumerate(names)
    ]
    forms = [stored_form(base.quantized[f"{PATH}.weight"], base.parts(f"{PATH}.weight")) for base in bases]
    np.testing.assert_array_equal(
        side_by_side(forms).values(), np.concatenate([base.matrix(f"{PATH}.weight")[:] for base in bases])
    )


def test_what_has_no_form_in_common_says_why() -> None:
    """Inputs in two orders, blocks across two weights, codes of two kinds; and levels that are not the
    operator's.
    """
    ones = np.ones((4, 1), np.float32)
    ordered = [
        Blocks(np.zeros((4, 32), np.uint8), ones, 8 * ones, 32, 4, order=order)
        for order in (np.arange(32), np.arange(32)[::-1])
    ]
    odd = Table(np.zeros((3, 40), np.uint8), np.ones(2, np.float32), 64, NF4)
    for forms, words in (
        (ordered, "another order"),
        ([odd, odd], "end in those of another"),
        ([odd, ordered[0]], "two kinds"),
    ):
        with pytest.raises(Unsupported, match=words):
            side_by_side(forms)
    assert quant_type(NF4) == 1 and quant_type(np.sort(NF4 * np.float32(0.5))) is None


WIDTH, VOCABULARY = 64, 90
MODES = {
    "nf4": "bank",
    "gptq 4 act-order": "inputs",
    "packed with zero points": "folded",
    "awq": "bank",
    "int8": "inputs",
    "fp8": "bank",
}


def llama(folder: Path, name: str, tokenizer: Path) -> tuple[Path, Any]:
    """A base of two layers whose linear weights are all in one format, and its model in torch, float64, by
    the format's formula.
    """
    set_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).double().eval()
    tensors = {
        path: value.float().numpy() for path, value in model.state_dict().items() if path != "lm_head.weight"
    }
    metadata, stored = {"format": "pt"}, None
    for number, (path, layer) in enumerate(model.model.named_modules(prefix="model")):
        if isinstance(layer, torch.nn.Linear):
            more = {"path": path} if name.startswith("torchao") else {}
            stored = FORMATS[name](shape=tuple(layer.weight.shape), seed=number, **more)
            del tensors[f"{path}.weight"]
            tensors |= {f"{path}.{role}": np.asarray(value) for role, value in stored.parts.items()}
            metadata |= stored.metadata
            layer.weight.data = torch.from_numpy(stored.values)
    assert stored is not None
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    st.write(folder / "model.safetensors", tensors, metadata)
    (folder / "config.json").write_text(
        json.dumps(
            {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": stored.config}
        )
    )
    return folder, model


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", MODES)
def test_a_quantized_base_is_exported_as_it_is(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Base and adapter give the logits of W + s B A in float64, W by the format's formula, within the float
    noise of two layers; the report says of every weight what became of it, and a folded adapter's layers are
    floats.
    """
    base, model = llama(tmp_path / "base", name, tiny_llama)
    lora = adapt(copy.deepcopy(model).float(), LoRA(r=3, alpha=5, targets=("q_proj", "down_proj")), "one")
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_(0, 0.2) if parameter.requires_grad else None
    pack, mode = save(lora, tmp_path / "pack", base=base), MODES[name]
    bundle = export(base, [pack], tmp_path / "out", mode=mode)
    session = Session(tmp_path / "out", "cpu")
    ids = np.random.default_rng(5).integers(3, VOCABULARY, (2, 7))
    for adapter in [pack.name] if mode == "folded" else [None, pack.name]:
        if adapter is not None:
            for change in pack.adapters():
                A, B = (torch.from_numpy(change.params[key]).double() for key in ("lora_A", "lora_B"))
                model.get_submodule(change.site.path).weight.data += 5 / 3 * (B @ A)
        with torch.no_grad():
            right = model(input_ids=torch.from_numpy(ids)).logits.numpy()
        found = session.run({"input_ids": ids}, None if mode == "folded" else adapter)["logits"]
        assert np.abs(found - right).max() <= 2e-5 * np.abs(right).max()
    assert bundle.quantization is not None and bundle.quantization["accuracy"] == "exact"
    (report,) = bundle.quantization["stored"].values()
    # q, k and v stand side by side, and so do gate and up: what is folded into one of them makes floats of
    # all
    expected = {"folded": 6, "bank": 14, "inputs": 14}[mode] if name in OPERATORS else 0
    assert (report["held"], report["dequantized"]) == (expected, 14 - expected)
    assert {node.op_type for node in ir.load(tmp_path / "out" / "model.onnx").graph} >= (
        {OPERATORS[name]} if name in OPERATORS else set()
    )
    assert not validate(tmp_path / "out", full=True).findings
    if mode == "bank":
        (answer,) = session.generate([[5, 6, 7]], pack.name, max_new_tokens=4)
        assert (
            list(answer.ids)
            == model.float()
            .generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)[0, 3:]
            .tolist()
        )


def test_floats_where_they_are_wanted(tiny_llama: Path, tmp_path: Path) -> None:
    """With --dequantize the graph has plain products and the same answers; the command says what became of
    the weights.
    """
    base, _ = llama(tmp_path / "base", "packed", tiny_llama)
    for out, options in (("codes", []), ("floats", ["--dequantize"])):
        result = CliRunner().invoke(
            main, ["export", str(base), "-o", str(tmp_path / out), "--no-static-cache", *options]
        )
        assert result.exit_code == 0, result.output
        assert ("14 of 14 weights in compressed-tensors are held as they are stored" in result.output) == (
            out == "codes"
        )
    ids = {"input_ids": np.random.default_rng(5).integers(3, VOCABULARY, (2, 7))}
    codes, floats = (Session(tmp_path / out, "cpu").run(ids)["logits"] for out in ("codes", "floats"))
    assert np.abs(codes - floats).max() <= 1e-5 * np.abs(floats).max()
    assert "MatMulNBits" not in {node.op_type for node in ir.load(tmp_path / "floats" / "model.onnx").graph}
    with pytest.raises(Unsupported, match="export the quantized base itself"):
        quantize(tmp_path / "floats", tmp_path / "again", scheme="as-stored")
