"""Adapters attached to ONNX files of other tools: torch.onnx as optimum calls it, transformers.exporters;
what is refused.

The files of onnxruntime-genai's builder are made in an environment of their own:
``tests/interop/genai_builder.py``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from test_export import BATCHES, assert_close, batch_of, logits_of

from adapterpack import LoRA, Session, adapt, export, save, validate
from adapterpack.bundle.manifest import read_bundle
from adapterpack.errors import ConfigError, FormatError, SiteNotFound, Unsupported
from adapterpack.exporting.frontends import FRONTENDS, ExportSource
from adapterpack.onnx_graph.confine import require_safe
from adapterpack.onnx_graph.graph_file import GraphFile
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.models.load import load_model

Make = Callable[..., Any]


class Flat(torch.nn.Module):
    """A decoder with a flat cache, as optimum hands it to torch.onnx."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> Any:
        from transformers import DynamicCache

        pairs = list(zip(past[::2], past[1::2], strict=True))
        answer = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=DynamicCache(pairs),
            use_cache=True,
        )
        return (
            answer.logits,
            *(state for layer in answer.cache.layers for state in (layer.keys, layer.values)),
        )


@pytest.fixture(scope="module")
def optimum_style(base_of: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torch.onnx on the tiny Llama, unoptimized: a weight lies [out, in] and a node turns it; names as
    optimum gives them.
    """
    model = load_model(get_task("text-generation"), base_of("llama")).eval()
    past = [torch.zeros(2, 2, 3, 8) for _ in range(4)]
    example = (
        torch.ones((2, 4), dtype=torch.int64),
        torch.ones((2, 7), dtype=torch.int64),
        torch.ones((2, 4), dtype=torch.int64),
        *past,
    )
    names = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    dim = torch.export.Dim
    axes = [
        {0: dim("batch"), 1: dim("sequence")},
        {0: dim("batch"), 1: dim.DYNAMIC},
        {0: dim("batch"), 1: dim("sequence")},
    ]
    program = torch.onnx.export(
        Flat(model),
        example,
        dynamo=True,
        verbose=False,
        optimize=False,
        opset_version=20,
        input_names=[
            "input_ids",
            "attention_mask",
            "position_ids",
            *(f"past_key_values.{name}" for name in names),
        ],
        output_names=["logits", *(f"present.{name}" for name in names)],
        dynamic_shapes=(*axes, tuple({0: dim("batch"), 2: dim("past")} for _ in past)),
    )
    folder = tmp_path_factory.mktemp("optimum")
    program.save(folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.long
@pytest.mark.parametrize("mode", ["bank", "inputs", "folded"])
def test_a_file_of_torch_onnx(
    mode: str, optimum_style: Path, base_of: Make, pack_of: Make, dense_of: Make, tmp_path: Path
) -> None:
    """Every mode on a file that is not ours: within 2e-5 of the float64 dense formula, mixed rows too; the
    file stays as it was.
    """
    before = optimum_style.read_bytes()
    packs = [pack_of("llama", name) for name in (("alpha",) if mode == "folded" else ("alpha", "beta"))]
    bundle = export(optimum_style, packs, tmp_path / "bundle", mode=mode, checkpoint=base_of("llama"))
    assert bundle.frontend.startswith("external, by ")
    session, batch = Session(tmp_path / "bundle", "cpu"), batch_of("llama", BATCHES["ragged"])
    for name in ("alpha",) if mode == "folded" else (None, "alpha", "beta"):
        assert_close(
            session.run(batch, name)["logits"],
            logits_of(dense_of("llama", name), batch),
            batch["attention_mask"],
        )
    if mode == "bank":
        mixed = session.run(batch, ["beta", None, "alpha"])["logits"]
        for row, name in enumerate(("beta", None, "alpha")):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            assert_close(
                mixed[row : row + 1],
                logits_of(dense_of("llama", name), batch)[row : row + 1],
                one["attention_mask"],
            )
    assert optimum_style.read_bytes() == before


def test_a_file_of_transformers_exporters(base_of: Make, tmp_path: Path) -> None:
    """An encoder's file, folded and attached, against torch with the adapter in it; the proof is in the
    manifest.
    """
    graph, task = tmp_path / "model.onnx", get_task("feature-extraction")
    model = adapt(
        load_model(task, base_of("bert")),
        LoRA(r=4, targets=("query", "key", "pooler.dense", "output.dense")),
        "one",
    )
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.normal_(0, 0.3)
    pack = save(model, None, base=base_of("bert"), name="one")
    ir.save(FRONTENDS["transformers"].build(ExportSource(base_of("bert"), task)).model, graph)
    for mode in ("bank", "inputs", "folded"):
        bundle = export(graph, [pack], tmp_path / mode, mode=mode, checkpoint=base_of("bert"))
        assert bundle.parity["max_abs"]["one"] < 1e-4
        assert bundle.frontend.startswith("external, by ")


def test_what_a_file_is_refused_for(
    optimum_style: Path, base_of: Make, pack_of: Make, tmp_path: Path
) -> None:
    """No checkpoint, the wrong one, one too many; a graph in halves."""
    llama, alpha = base_of("llama"), pack_of("llama", "alpha")
    with pytest.raises(ConfigError, match="--base"):
        export(optimum_style, [alpha], tmp_path / "out")
    with pytest.raises(ConfigError, match="leave --base out"):
        export(llama, [alpha], tmp_path / "out", checkpoint=llama)
    model = ir.load(optimum_style)
    changed = model.graph.initializers["model.model.layers.1.mlp.up_proj.weight"]
    changed.const_value = ir.tensor(changed.const_value.numpy() * np.float32(1.5), name=changed.name)
    ir.save(model, tmp_path / "other.onnx")
    with pytest.raises(SiteNotFound, match=r"layers\.1\.mlp\.up_proj"):
        export(tmp_path / "other.onnx", [alpha], tmp_path / "out", checkpoint=llama)
    changed.const_value = ir.tensor(changed.const_value.numpy().astype(np.float16), name=changed.name)
    changed.dtype = ir.DataType.FLOAT16
    ir.save(model, tmp_path / "half.onnx")
    with pytest.raises((SiteNotFound, Unsupported)):
        export(tmp_path / "half.onnx", [alpha], tmp_path / "out", checkpoint=llama)
    assert not (tmp_path / "out").exists()


@pytest.mark.fast
@pytest.mark.parametrize(
    "location",
    ["../secret", "/etc/hostname", "a/../../secret", "link", "C:\\secret", "..\\secret", "", "absent"],
)
@pytest.mark.parametrize("place", ["initializer", "attribute", "subgraph"])
def test_external_data_is_confined(location: str, place: str, tmp_path: Path) -> None:
    """A path out of the folder, wherever a tensor may hide in a model and whatever its dtype, is refused
    before any of it is read.
    """
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"0" * 64)
    (folder / "link").symlink_to(tmp_path / "secret")
    tensor = onnx.TensorProto(
        name="w", data_type=onnx.TensorProto.INT4, dims=[8], data_location=onnx.TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value=location)
    graph = onnx.GraphProto(name="g")
    inner = graph
    if place != "initializer":
        attribute = graph.node.add(op_type="Constant", output=["c"]).attribute.add(name="value")
        if place == "attribute":
            attribute.type, inner = onnx.AttributeProto.TENSOR, None
            attribute.t.CopyFrom(tensor)
        else:
            attribute.type, inner = onnx.AttributeProto.GRAPH, attribute.g
    if inner is not None:
        inner.initializer.add().CopyFrom(tensor)
    (folder / "model.onnx").write_bytes(onnx.ModelProto(ir_version=10, graph=graph).SerializeToString())
    with pytest.raises(FormatError):
        require_safe(GraphFile(folder / "model.onnx"))


@pytest.mark.fast
def test_a_bundle_whose_graph_reads_elsewhere(bundle_of: Make, tmp_path: Path) -> None:
    """A bundle with consistent digests and a graph that names a file outside: not opened, and named by
    validate.
    """
    folder = tmp_path / "bundle"
    shutil.copytree(bundle_of("llama", "bank"), folder)
    (tmp_path / "secret").write_bytes(b"0" * (1 << 20))
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    stolen = next(
        tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL
    )
    next(entry for entry in stolen.external_data if entry.key == "location").value = "../secret"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    read_bundle(folder).write(folder)
    with pytest.raises(FormatError, match="own folder"):
        Session(folder, "cpu")
    assert [finding.rule for finding in validate(folder).findings] == ["AB105"]
