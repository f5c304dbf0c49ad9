"""How much of an export is proved: by layers, or nothing; what the manifest and validate say about it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from test_export_large import saved
from test_merge import lora_pack
from transformers import BertConfig, BertModel, LlamaConfig, Qwen2MoeConfig

import adapterpack
from adapterpack.base.checkpoint import Checkpoint
from adapterpack.bundle.manifest import read_bundle
from adapterpack.errors import ParityError, StorageError, UnknownName, Unsupported
from adapterpack.exporting import build, bundle_writer
from adapterpack.exporting.arguments import ExportRequest, prepare
from adapterpack.exporting.estimate import estimate
from adapterpack.exporting.frontends import ExportSource
from adapterpack.exporting.proof import plan
from adapterpack.exporting.proof.few_layers import stack_of
from adapterpack.exporting.proof.places import require_places
from adapterpack.exporting.proof.plan import plan_proof
from adapterpack.merging.checkpoint import staging
from adapterpack.quantizing.graphs import onnxruntime_quantizer
from adapterpack.quantizing.graphs.quantize_bundle import quantize_in_place, quantizes_directly

CONFIG = LlamaConfig(
    vocab_size=90,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(CONFIG, tmp_path_factory.mktemp("base") / "llama", torch.bfloat16)


@pytest.fixture(scope="module")
def packs(base: Path) -> list[adapterpack.Pack]:
    """Adapters of every layer, of the first alone, and of the last alone, which no copy of two layers has."""
    return [
        lora_pack(base, "all"),
        *(
            lora_pack(base, name, sites={f"model.layers.{layer}.mlp.up_proj": (96, 64)})
            for name, layer in (("first", 0), ("middle", 1), ("another", 2), ("last", 3))
        ),
    ]


def made(base: Path, packs: list[Any], out: Path, **options: Any) -> dict[str, Any]:
    said: list[str] = []
    adapterpack.export(base, packs, out, frontend="mobius", progress=said.append, **options)
    return {"said": said, **read_bundle(out).parity}


def test_a_proof_by_layers_compares_few_layers_and_the_whole_on_short_rows(
    base: Path, packs: list[Any], tmp_path: Path
) -> None:
    parity = made(base, packs, tmp_path / "bundle", proof="layers")
    assert parity["proof"] == {
        "depth": "layers",
        "layers": 2,
        "of": 4,
        "adapters": ["all", "last"],
        "whole": "torch",
    }
    assert parity["max_abs"].keys() == {"base", "all", "last"}
    assert parity["long_rows"]["few_layers"] == {"layers": 2, "rows": [64]}
    assert any("by layers: 2 of 4" in text for text in parity["said"])
    assert any(text.startswith("2 layers: the engine's graph agrees") for text in parity["said"])
    assert parity["decoder"]["steps"] == 4  # the few layers took twenty
    report = adapterpack.validate(tmp_path / "bundle")
    assert report.valid
    assert any("2 of 5 adapters" in text for text in report.not_checked)


def test_without_the_memory_for_torch_the_places_of_weights_are_compared(
    base: Path, packs: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a graph in which two layers have changed their weights is found out, in floats and in codes."""
    monkeypatch.setattr(plan, "free_memory", lambda: 0)
    parity = made(base, packs[:1], tmp_path / "bundle", proof="layers", in_place=False)
    assert parity["proof"]["whole"] == "places"
    assert parity["proof"]["placed"] == 7 * 4 + 2
    assert parity["alone"] <= 1e-5
    adapterpack.quantize(tmp_path / "bundle", out=tmp_path / "int4", scheme="int4")
    for folder in ("bundle", "int4"):
        bundle = read_bundle(tmp_path / folder)
        assert require_places(tmp_path / folder, bundle.sites, Checkpoint(base)) == 28
        model = ir.load(tmp_path / folder / "model.onnx")
        one, other = (
            model.graph.initializers[bundle.sites[f"model.layers.{layer}.mlp.up_proj"].weight]
            for layer in (0, 2)
        )
        one.const_value, other.const_value = (
            ir.tensor(np.array(value.const_value.numpy()), name=value.name) for value in (other, one)
        )
        ir.save(model, tmp_path / folder / "model.onnx")
        with pytest.raises(ParityError, match="other numbers in the place"):
            require_places(tmp_path / folder, bundle.sites, Checkpoint(base))


def test_what_is_not_proved_is_never_called_proved(base: Path, packs: list[Any], tmp_path: Path) -> None:
    parity = made(base, packs[:1], tmp_path / "bundle", proof="none", in_place=False)
    assert parity["proof"] == {"depth": "none"}
    assert parity["max_abs"] == {}
    assert not any("proved" in text and "NOT" not in text for text in parity["said"] if "will" not in text)
    (finding,) = adapterpack.validate(tmp_path / "bundle").findings
    assert finding.rule == "AB601"
    assert "NOT PROVED" in finding.message


@pytest.mark.fast
def test_a_model_that_is_no_stack_is_not_proved_by_layers(base: Path, tmp_path: Path) -> None:
    BertModel(
        BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50
        )
    ).save_pretrained(tmp_path / "bert")
    with pytest.raises(Unsupported, match="one stack of layers"):
        adapterpack.export(tmp_path / "bert", [], tmp_path / "out", proof="layers", task="feature-extraction")
    with pytest.raises(UnknownName, match="depth"):
        adapterpack.export(base, [], tmp_path / "out", proof="some")


def test_codes_are_written_straight_from_the_checkpoint(
    base: Path, packs: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By layers the graph is quantized as it is written: the codes are those of the float bundle quantized
    afterwards, a part of a weight at a time or whole, and the errors those of the few layers.
    """
    made(base, packs[:2], tmp_path / "whole", proof="full", quantize="int4", accuracy="exact")
    floats: list[Path] = []
    write = bundle_writer.write_graphs

    def watched(folder: Path, *rest: Any) -> None:
        floats.append(folder)
        write(folder, *rest)

    def alone(folder: Path, *rest: Any) -> None:
        assert [path.name for path in folder.parent.iterdir()] == ["bundle"]  # the copy of layers is gone
        quantize_in_place(folder, *rest)

    monkeypatch.setattr(bundle_writer, "write_graphs", watched)
    monkeypatch.setattr(build, "quantize_in_place", alone)
    monkeypatch.setattr(onnxruntime_quantizer, "_MOST", 1000)
    monkeypatch.setattr("adapterpack.onnx_graph.products._WIDEST", 1000)  # proved in parts, too
    parity = made(base, packs[:2], tmp_path / "direct", proof="layers", quantize="int4", accuracy="exact")
    assert [folder.name for folder in floats] == ["bundle"]  # of the few layers
    assert parity["proof"]["placed"] == 7 * 4 + 2
    bundle = read_bundle(tmp_path / "direct")
    assert bundle.quantization is not None
    assert bundle.quantization["measured_layers"] == 2
    for graph in ("model.onnx", "decoder.onnx"):
        stored, expected = (
            {
                name: value.const_value
                for name, value in ir.load(tmp_path / folder / graph).graph.initializers.items()
            }
            for folder in ("direct", "whole")
        )
        assert stored.keys() == expected.keys()
        assert all(stored[name].tobytes() == expected[name].tobytes() for name in stored)
    assert adapterpack.validate(tmp_path / "direct", base, full=True).valid


@pytest.mark.fast
def test_an_export_without_room_on_the_disk_is_refused_before_it_begins(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match="not enough space"):
        adapterpack.export(base, [], tmp_path / "out", progress=said.append)
    assert "a bundle of about" in said[-1]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", [None, "int4", "bf16"])
def test_the_estimate_is_near_the_bundle(base: Path, tmp_path: Path, scheme: str | None) -> None:
    """In floats, in codes and in halves."""
    request = ExportRequest(base, [], tmp_path / "bundle", proof="none", mode="folded", quantize=scheme)
    job = prepare(request)
    source = ExportSource(job.base.folder, job.task)
    found = estimate(job, source, plan_proof(source, "none", quantizes_directly(job.quantize)))
    adapterpack.export(base, [], tmp_path / "bundle", proof="none", mode="folded", quantize=scheme)
    stored = ir.load(tmp_path / "bundle" / "model.onnx").graph.initializers.values()
    written = sum(value.const_value.nbytes for value in stored)
    assert 0.6 * written < found.bundle < 1.5 * written
    assert found.disk >= found.bundle


@pytest.mark.fast
def test_layers_with_other_tensors_are_of_another_kind(tmp_path: Path) -> None:
    """Two layers without experts come first: a copy has the third, too."""
    config = Qwen2MoeConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=2,
        num_experts_per_tok=1,
        mlp_only_layers=[0, 1],
    )
    base = Checkpoint(saved(config, tmp_path / "base", torch.float32))
    stack = stack_of(base, config.to_dict())
    assert stack is not None
    assert stack[:2] == (5, 3)
