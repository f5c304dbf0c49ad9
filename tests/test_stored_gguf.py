"""Graphs of GGUF files: products hold the blocks of llama.cpp as they are, against the numbers that the
``gguf`` package reads.
"""
# ruff: noqa: F811 - fixtures of another module are imported, and named as parameters

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnxruntime as ort
import pytest
import torch

# see above
from test_merge_gguf import GROUPS, HEADS, HIDDEN, WORDS, changed, file_of, held, llama, own_name, pack_on  # noqa: F401
from test_stored_codes import graph_of
from transformers import AutoModelForCausalLM

import adapterpack
from adapterpack.base.checkpoint import Checkpoint
from adapterpack.base.gguf.ggml import TYPES
from adapterpack.errors import BaseMismatch, ConfigError
from adapterpack.merging.gguf.base_model import GGUFBase
from adapterpack.quantizing.graphs.quantize_bundle import quantize_file
from adapterpack.quantizing.graphs.stored_weights import StoredWeights


def of_the_model(path: Path, checkpoint: Path) -> dict[str, np.ndarray]:
    """The file's numbers as the package decodes them, float64, under the model's names and in its order of
    rows.
    """
    numbers = {name: values for name, (values, _, _) in held(path).items()}
    by_name = {}
    for name in Checkpoint(checkpoint).tensors:
        rows = numbers[own_name(name)]
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = HEADS if "q_proj" in name else GROUPS
            rows = rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        by_name[name] = rows
    return by_name


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", TYPES)
def test_products_hold_the_blocks(
    kind: str, llama: Path, file_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """q, k and v side by side, in the model's order of rows: y = W x in float64, W by the package, within one
    float32 rounding of W and those of the sums; no product stays float.
    """
    file = shutil.copy(file_of(kind), tmp_path / "model.gguf")
    names = [f"model.layers.0.self_attn.{letter}_proj.weight" for letter in "qkv"]
    base, numbers = GGUFBase(file, llama), of_the_model(Path(file), llama)
    weights = StoredWeights(base)
    path = graph_of(
        tmp_path / "model.onnx", *(base.storage(name, None).reader.matrices("linear")[0][:] for name in names)
    )
    assert quantize_file(path, "as-stored", lambda _: None, stored=weights) == 1
    W, x = (
        np.concatenate([numbers[name] for name in names]),
        np.random.default_rng(0).normal(0, 1, (5, HIDDEN)).astype(np.float32),
    )
    found = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    bound = np.abs(x.astype(float)) @ (np.abs(W) + np.abs(W).max()).T  # codes and minima are summed apart
    assert (np.abs(found - x.astype(float) @ W.T) <= (HIDDEN + 4) * 2.0**-24 * bound).all()
    assert weights.report()[kind]["held"] == 3


def test_a_file_is_exported_as_it_is(llama: Path, file_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Base and adapter of a Q4_1 file: the logits of the package's numbers + s B A in float64, within float
    noise; a file without its checkpoint is refused, and so is one of other numbers.
    """
    file = shutil.copy(file_of("Q4_1"), tmp_path / "model.gguf")
    pack = pack_on(llama, size=0.05)
    bundle = adapterpack.export(file, [pack], tmp_path / "out", checkpoint=llama, in_place=False)
    model: Any = AutoModelForCausalLM.from_pretrained(llama).double().eval()
    model.load_state_dict(
        {name: torch.from_numpy(values) for name, values in of_the_model(Path(file), llama).items()}
    )
    ids, session = (
        np.random.default_rng(2).integers(0, WORDS, (2, 6)),
        adapterpack.Session(tmp_path / "out", "cpu"),
    )
    for name in (None, "one"):
        if name is not None:
            for weight_name, change in changed(pack).items():
                model.get_parameter(weight_name).data += torch.from_numpy(change)
        with torch.no_grad():
            right = model(input_ids=torch.from_numpy(ids)).logits.numpy()
        assert (
            np.abs(session.run({"input_ids": ids}, name)["logits"] - right).max()
            <= 2e-5 * np.abs(right).max()
        )
    assert bundle.quantization is not None
    # seven of the layer and the head; the embedding is looked up in floats
    assert bundle.quantization["stored"]["Q4_1"]["held"] == 8
    with pytest.raises(ConfigError, match="together with the checkpoint"):
        adapterpack.export(file, [pack], tmp_path / "other")
    with pytest.raises(BaseMismatch, match="further away than its grid"):
        adapterpack.export(
            shifted(Path(file), tmp_path / "shifted.gguf"), [pack], tmp_path / "other", checkpoint=llama
        )
    assert not (tmp_path / "other").exists()


def shifted(source: Path, out: Path) -> Path:
    """The file with other codes in all its blocks."""
    raw = bytearray(source.read_bytes())
    for one in gguf.GGUFReader(source).tensors:
        if one.tensor_type.name == "Q4_1":
            part = np.frombuffer(raw, np.uint8, one.n_bytes, one.data_offset).reshape(-1, 20).copy()
            part[:, 4:] = part[:, 4:][:, ::-1] ^ 0x5A
            raw[one.data_offset : one.data_offset + one.n_bytes] = part.tobytes()
    out.write_bytes(raw)
    return out
