"""Exports of large models: memory that does not grow with them, kills at any moment, and the reference of
models in halves.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file
from test_merge import lora_pack
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
)

import adapterpack
from adapterpack import DoRA, LoRA, Session
from adapterpack.errors import ParityError
from adapterpack.exporting.bundle_writer import write_graphs
from adapterpack.exporting.frontends.base import ExportSource
from adapterpack.exporting.frontends.mobius import mobius
from adapterpack.exporting.proof import parity
from adapterpack.exporting.proof import reference as ref
from adapterpack.exporting.tracing import unread_weights
from adapterpack.exporting.tracing.trace import trace_model
from adapterpack.onnx_graph.sliced_tensor import SlicedTensor
from adapterpack.slots.precision import precision
from adapterpack.tasks.task import MAIN, get_task
from adapterpack.torch_adapters.adapt import attach
from adapterpack.torch_adapters.models.load import load_model

TASK = get_task("text-generation")
_IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
LARGE = LlamaConfig(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=16,
    num_attention_heads=16,
    num_key_value_heads=4,
    tie_word_embeddings=False,
    **_IDS,
)
"""246 million numbers: 492 MB in halves, twice that in float32."""
LARGEST, REST = 32000 * 1024 * 4, 600 << 20
MIDDLE = LlamaConfig(
    vocab_size=8000,
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    **_IDS,
)
"""8 million numbers."""
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "x"},
}


def saved(config: Any, folder: Path, dtype: torch.dtype, shard: str = "5GB") -> Path:
    """A random model of a config."""
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return folder


def test_weights_in_halves_are_widened_slice_by_slice(tmp_path: Path) -> None:
    """By the builder mobius, which widens and turns each as a whole: slices are those of the checkpoint."""
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    source = ExportSource(saved(config, tmp_path / "base", torch.bfloat16), get_task("text-generation"))
    stored = load_file(source.folder / "model.safetensors")
    (model,) = mobius.build(source).parts.values()
    graph = {name: value.const_value for name, value in model.graph.initializers.items()}
    sliced = {name: one for name, one in graph.items() if isinstance(one, SlicedTensor)}
    assert {name.removesuffix("_t") for name in sliced} == set(stored)
    for name, tensor in sliced.items():
        weight = stored[name.removesuffix("_t")].float()
        whole = (weight.T if name.endswith("_t") else weight).numpy()
        assert np.array_equal(tensor.read((slice(1, 3),)), whole[1:3])
        with (tmp_path / "numbers").open("wb") as file:
            tensor.tofile(file)
        assert (tmp_path / "numbers").read_bytes() == whole.tobytes()


WATCHED = """
import sys, threading, time

def held():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))

import mobius, torch, onnxruntime, adapterpack.exporting.proof.reference
from adapterpack.exporting.pipeline import export
peak = before = held()

def watch():
    global peak
    while True:
        peak = max(peak, held())
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
export(sys.argv[1], sys.argv[3:], sys.argv[2], mode="bank", frontend="mobius")
print(peak - before)
"""


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_does_not_grow_with_the_model(dtype: torch.dtype, tmp_path: Path) -> None:
    """A process that exports and proves 246 million numbers, base and adapter, takes no more memory of its
    own than 1.5 times the largest tensor and 600 MB, the frontend included; the graph alone is 984 MB, and so
    is the model in torch.
    """
    base = saved(LARGE, tmp_path / "base", dtype, "400MB")
    lora_pack(base, size=0.02, sites={"model.layers.3.mlp.up_proj": (2816, 1024)}).write(tmp_path / "pack")
    command = [sys.executable, "-W", "ignore", "-c", WATCHED, base, tmp_path / "bundle", tmp_path / "pack"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) <= 1.5 * LARGEST + REST
    assert (tmp_path / "bundle" / "model.onnx").stat().st_size < 2 << 20
    assert (tmp_path / "bundle" / "model.onnx.data").stat().st_size > 0.95e9
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


KILLED = """
import os, random, signal, sys
import mobius, torch, onnxruntime, adapterpack.exporting.proof.reference
from adapterpack.exporting.pipeline import export
base, pack, folder, seed = *sys.argv[1:4], int(sys.argv[4])
chance = random.Random(seed)
MOMENTS = [(None, "build"), ("int8", "load"), (None, "proved"), ("int8", "quantize")]

def child(out, quantize, word=None, files=0):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    opened = []
    def die(event, _):
        if event == "open":
            opened.append(event)
            if len(opened) == files:
                os.kill(os.getpid(), signal.SIGKILL)
    def progress(text):
        if word is not None and text.startswith(word):
            sys.addaudithook(die)
    try:
        export(base, [pack], out, mode="bank", frontend="mobius", quantize=quantize, progress=progress)
        code = 0
    except BaseException as error:
        print(repr(error), flush=True)
        code = 1
    os._exit(code)

assert child(folder + "/float", None) == 0 and child(folder + "/int8", "int8") == 0
for kill, (kind, word) in enumerate(MOMENTS):
    out = f"{folder}/{kill}-{kind or 'float'}"
    killed = os.WIFSIGNALED(child(out, kind, word, chance.randrange(1, 5)))
    assert os.path.exists(out) or killed
    if not os.path.exists(out):
        assert child(out, kind) == 0
    print("killed" if killed else "too late", flush=True)
"""


@pytest.mark.long
def test_killed_at_any_moment_its_output_is_absent_or_whole(tmp_path: Path) -> None:
    """Processes killed with SIGKILL as they open a file while they build, write, prove or quantize: the output is absent, or
    every byte of it is there; asked for again, the export gives the uninterrupted one's bytes, every file of
    it.
    """
    base = saved(MIDDLE, tmp_path / "base", torch.float32)
    lora_pack(base, size=0.02).write(tmp_path / "pack")
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-W", "ignore", "-c", KILLED, base, tmp_path / "pack", out, "5"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.split() == ["killed"] * 4
    expected = {kind: digests(out / kind) for kind in ("float", "int8")}
    others = [path for path in out.iterdir() if path.name not in expected and not path.name.startswith(".")]
    assert len(others) == 4
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")], (
        "what a killed one left is removed by the next"
    )
    for path in others:
        assert digests(path) == expected[path.name.partition("-")[2]], path.name


def digests(folder: Path) -> dict[str, str]:
    """Every file by its path; a hidden one fails."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert not folder.name.startswith(".")
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}


@pytest.mark.fast
def test_every_form_of_a_tensor_lies_in_the_file_as_its_bytes(tmp_path: Path) -> None:
    """Plain, turned, turned in the middle, in halves, of several numbers a byte, and computed when written:
    the file holds what ``tobytes`` says, and ONNX Runtime reads it.
    """
    rng = np.random.default_rng(0)
    plain = rng.standard_normal((70, 5000), np.float32)
    arrays = {
        "plain": plain,
        "turned": plain.T,
        "middle": rng.standard_normal((5, 200, 30), np.float32).transpose(0, 2, 1),
        "every second": plain[:, ::2],
        "halves": plain.astype(ml_dtypes.bfloat16).T,
        "ids": rng.integers(0, 9, 300),
        "odd": rng.integers(0, 9, 301).astype(np.uint8),
    }
    tensors = {name: ir.tensor(array, name=name) for name, array in arrays.items()}
    tensors["late"] = ir.LazyTensor(
        lambda: ir.tensor(plain.T), ir.DataType.FLOAT, ir.Shape(plain.T.shape), name="late"
    )
    tensors["nibbles"] = ir.tensor(rng.integers(0, 8, (9, 101)).astype(ml_dtypes.int4), name="nibbles")
    tensors["small"] = ir.tensor(np.ones(3, np.float32), name="small")
    (tmp_path / "other").write_bytes(bytes(8) + np.arange(3, dtype=np.float32).tobytes())
    tensors["small elsewhere"] = ir.ExternalTensor(
        "other", 8, 12, ir.DataType.FLOAT, shape=ir.Shape([3]), name="small elsewhere", base_dir=tmp_path
    )
    values = {
        name: ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        for name, tensor in tensors.items()
    }
    x = ir.Value(name="x", shape=ir.Shape([5000, 70]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Add", [x, values["late"]])
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", x.shape, x.type
    graph = ir.Graph(
        [x], [y], nodes=[node], initializers=list(values.values()), opset_imports={"": 21}, name="g"
    )
    model = ir.Model(graph, ir_version=10)
    expected = {name: tensor.tobytes() for name, tensor in tensors.items()}
    write_graphs(tmp_path, {MAIN: model}, lambda text: None)
    stored = {
        name: value.const_value for name, value in ir.load(tmp_path / "model.onnx").graph.initializers.items()
    }
    assert {name: tensor.tobytes() for name, tensor in stored.items()} == expected
    assert {name for name, tensor in stored.items() if not isinstance(tensor, ir.ExternalTensor)} == {
        "small",
        "small elsewhere",
    }
    zeros = np.zeros((5000, 70), np.float32)
    assert np.array_equal(ort.InferenceSession(tmp_path / "model.onnx").run(None, {"x": zeros})[0], plain.T)


SMALL: dict[str, Any] = {
    "llama": LlamaConfig(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        **_IDS,
    ),
    "gpt2": GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4, **_IDS),
    "opt": OPTConfig(
        vocab_size=90,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        **_IDS,
    ),
    "gemma3": Gemma3TextConfig(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        **_IDS,
    ),
    "mixtral": MixtralConfig(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        **_IDS,
    ),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", SMALL)
def test_a_reference_in_halves_computes_in_float32(
    kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that stay in halves give the logits that the whole model in float32 gives, or the whole model
    is taken.
    """
    base = saved(SMALL[kind], tmp_path / kind, dtype)
    monkeypatch.setattr(unread_weights, "_LARGE", 0)
    monkeypatch.setattr(ref, "_BLOCK", 500)  # several blocks a layer
    found = ref.reference(TASK, base)
    assert found.light == (kind != "gemma3")  # whose factor is a number that the model would keep in halves
    ids = torch.arange(3, 25).reshape(2, 11)
    with torch.no_grad():
        expected = load_model(TASK, base).eval()(ids).logits
        logits = found.model(ids).logits
    assert logits.dtype == torch.float32
    assert float((logits - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


@pytest.mark.long
@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_a_graph_traced_without_its_weights_holds_them(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph whose weights stay in the checkpoint until they are written has the numbers of the graph of a
    model that was loaded: tied, turned, stacked.
    """
    base = saved(SMALL[kind], tmp_path / kind, torch.bfloat16)
    whole = trace_model(TASK, base, "float32", prompted=False)[MAIN]
    monkeypatch.setattr(unread_weights, "_LARGE", 0)
    monkeypatch.setattr(unread_weights, "_STAND_IN", 100)
    graph = trace_model(TASK, base, "float32", prompted=False)[MAIN]
    late = 0
    for node, other in zip(graph.graph, whole.graph, strict=True):
        assert node.op_type == other.op_type
        for value, right in zip(node.inputs, other.inputs, strict=True):
            if right is not None and right.const_value is not None:
                late += isinstance(value.const_value, ir.LazyTensor)
                assert np.array_equal(value.const_value.numpy(), right.const_value.numpy())
    assert late


@pytest.mark.parametrize(
    "config", [LoRA(r=3, targets="all-linear"), DoRA(r=3, targets="all-linear")], ids=["lora", "dora"]
)
def test_adapters_on_a_reference_in_halves(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters attach to it, those too that read the weight that they stand at."""
    base = saved(SMALL["llama"], tmp_path / "base", torch.bfloat16)
    model = adapterpack.adapt(load_model(TASK, base), config, "one")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    pack = adapterpack.save(model, tmp_path / "pack", base=base)
    monkeypatch.setattr(unread_weights, "_LARGE", 0)
    found = ref.reference(TASK, base)
    assert found.light
    ids = torch.arange(3, 25).reshape(2, 11)
    with torch.no_grad():
        expected = model.eval()(ids).logits
        logits = attach(found.model, pack, check_base=False)(ids).logits
    assert float((logits - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


def test_a_model_that_no_halves_suit_is_taken_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the light reference fails or disagrees, the whole model decides; a wrong graph is refused by
    both.
    """
    base = saved(SMALL["llama"], tmp_path / "base", torch.bfloat16)
    monkeypatch.setattr(unread_weights, "_LARGE", 0)

    def rounding(model: Any) -> Any:
        model.lm_head.register_forward_hook(lambda module, inputs, output: output.bfloat16().float())
        return widened(model)

    widened = ref.widen
    monkeypatch.setattr(ref, "widen", rounding)
    bundle = adapterpack.export(base, [], tmp_path / "rounded", mode="folded", frontend="mobius")
    assert bundle.parity["max_relative"]["base"] < 1e-5
    monkeypatch.setattr(ref, "widen", lambda model: model.register_forward_pre_hook(_refuse) and model)
    bundle = adapterpack.export(base, [], tmp_path / "refused", mode="folded", frontend="mobius")
    assert bundle.parity["max_relative"]["base"] < 1e-5
    monkeypatch.setattr(parity, "precision", lambda name: precision(name)._replace(tolerance=0.0))
    with pytest.raises(ParityError):
        adapterpack.export(base, [], tmp_path / "wrong", mode="folded", frontend="mobius")
    assert not (tmp_path / "wrong").exists()
    assert Session(tmp_path / "rounded", "cpu").run({"input_ids": np.array([[5, 6]])})["logits"].shape == (
        1,
        2,
        90,
    )


def _refuse(module: Any, inputs: Any) -> None:
    raise RuntimeError("expected m1 and m2 to have the same dtype")
