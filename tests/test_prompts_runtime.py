"""Prompts under ONNX Runtime: what stands in a row's cache, on ragged batches that mix prompts, a LoRA and
the base; against torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from msgspec.structs import replace
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import adapterpack as ap
from adapterpack.errors import AdapterpackError, BaseMismatch, ConfigError, Unsupported
from adapterpack.manifest import manifest as m
from adapterpack.runtime.adapters import soft_prompt
from adapterpack.runtime.padding import pad
from adapterpack.runtime.sessions.decoder import DecoderOnly

Make = Callable[..., Any]
ROWS: list[list[int]] = [
    [5, 6, 7, 30, 31],
    [8, 9],
    [10, 11, 12, 13, 14, 15, 16],
    [60],
    [20, 21, 22],
    [33, 34, 35, 36],
]
NAMES: list[str | None] = ["soft", None, "prefix", "lora", "tasks", "soft"]
CONFIGS: dict[str, Any] = {
    "soft": ap.PromptTuning(num_virtual_tokens=3),
    "prefix": ap.PrefixTuning(num_virtual_tokens=5),
    "tasks": ap.MultitaskPromptTuning(num_virtual_tokens=2, num_tasks=2, default_task=1),
    "lora": ap.LoRA(r=3),
}
CLOSE = 1e-4
"""float32 logits of about 5 on two runtimes."""


@pytest.fixture(scope="module")
def models(tiny_llama: Path) -> dict[str | None, Any]:
    """The torch model with each adapter, and without."""
    torch.set_num_threads(1)
    found: dict[str | None, Any] = {None: AutoModelForCausalLM.from_pretrained(tiny_llama).eval()}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        found[name] = ap.adapt(AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), config, name)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in found[name].parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.5 * torch.randn(parameter.shape, generator=noise))
    return found


@pytest.fixture(scope="module")
def packs(
    models: dict[str | None, Any], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("prompt-packs")
    for name in CONFIGS:
        ap.save(models[name], folder / name, base=tiny_llama)
    return {name: folder / name for name in CONFIGS}


@pytest.fixture(scope="module")
def bundle_in(
    packs: dict[str, Path], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(mode: str) -> Path:
        if mode not in made:
            made[mode] = tmp_path_factory.mktemp("prompt-bundles") / mode
            chosen = {
                "bank": list(packs.values()),
                "inputs": list(packs.values()),
                "small bank": [packs["prefix"]],
            }[mode]
            ap.export(
                tiny_llama,
                chosen,
                made[mode],
                mode=mode.rpartition(" ")[2],
                **({"slots": 4} if mode == "small bank" else {}),
            )
        return made[mode]

    return make


def torch_logits(model: Any, row: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0].numpy()


def torch_tokens(model: Any, row: list[int], count: int) -> tuple[int, ...]:
    ids = list(row)
    for _ in range(count):  # the longhand way: no cache, one row
        ids.append(int(torch_logits(model, ids)[-1].argmax()))
    return tuple(ids[len(row) :])


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("mode", ["bank", "inputs"])
def test_a_mixed_ragged_batch_equals_torch(mode: str, left: bool, bundle_in: Make, models: Any) -> None:
    """Prompts of three lengths, a LoRA and the base in one batch: every row's logits are those of torch on
    that row alone.
    """
    batch = pad(ROWS, 0, left=left)
    session = ap.Session(bundle_in(mode), "cpu")
    found = session.run(batch, NAMES)["logits"]
    assert found.shape[:2] == batch["input_ids"].shape
    for row, name, values, mask in zip(ROWS, NAMES, found, batch["attention_mask"], strict=True):
        np.testing.assert_allclose(
            values[mask > 0], torch_logits(models[name], row), rtol=0, atol=CLOSE, err_msg=str(name)
        )
    unmasked = session.run({"input_ids": np.array([ROWS[0]])}, "soft")["logits"]
    np.testing.assert_allclose(unmasked[0], torch_logits(models["soft"], ROWS[0]), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("mode", ["bank", "inputs"])
def test_generation_equals_torch(mode: str, bundle_in: Make, models: Any) -> None:
    """Greedy tokens of the mixed batch are those of torch, row by row and without a cache; a row alone gives
    the same.
    """
    session = ap.Session(bundle_in(mode), "cpu")
    found = session.generate(ROWS, NAMES, max_new_tokens=6)
    for row, name, answer in zip(ROWS, NAMES, found, strict=True):
        expected = torch_tokens(models[name], row, 6)
        end = expected.index(2) if 2 in expected else len(expected)
        assert answer.ids == expected[:end]
        assert answer.prompt_tokens == len(row), "virtual tokens are nobody's input"
        assert session.generate([row], [name], max_new_tokens=6)[0] == answer
    assert len({torch_tokens(models[name], ROWS[0], 6) for name in models}) > 2, (
        "the adapters say different things"
    )


def test_steps_on_a_cache_count_the_callers_tokens(bundle_in: Make, models: Any) -> None:
    """A second run on the outputs of the first, with masks and positions of the rows' own tokens, equals
    torch on the longer rows.
    """
    session = ap.Session(bundle_in("bank"), "cpu")
    batch = pad(ROWS, 0, left=True)
    first = session.run(batch, NAMES)
    past = {
        key.replace("present.", "past_key_values."): value
        for key, value in first.items()
        if key.startswith("present.")
    }
    assert past["past_key_values.0.key"].shape[2] == 5 + 7, "the longest prompt and the longest row"
    mask = np.concatenate([batch["attention_mask"], np.ones((len(ROWS), 1), np.int64)], axis=1)
    step = {"input_ids": np.full((len(ROWS), 1), 40), "attention_mask": mask, **past}
    for more in ({}, {"position_ids": mask.sum(1, keepdims=True) - 1}):
        found = session.run({**step, **more}, NAMES)["logits"]
        for row, name, values in zip(ROWS, NAMES, found, strict=True):
            np.testing.assert_allclose(
                values[-1], torch_logits(models[name], [*row, 40])[-1], rtol=0, atol=CLOSE
            )
    with pytest.raises(ConfigError, match="attention_mask"):
        session.run({**batch, "attention_mask": np.ones((len(ROWS), 12), np.int64)}, NAMES)


def test_base_rows_do_not_know_of_their_neighbours(bundle_in: Make) -> None:
    """A base row beside prompts, whose positions are hidden from it, equals the base alone within 1e-5."""
    session = ap.Session(bundle_in("bank"), "cpu")
    batch = pad(ROWS, 0, left=True)
    mixed, alone = session.run(batch, NAMES)["logits"], session.run(batch, None)["logits"]
    np.testing.assert_allclose(mixed[1, -2:], alone[1, -2:], rtol=0, atol=1e-5)
    assert np.abs(mixed[2] - alone[2]).max() > 1e-2


def test_prompts_come_and_go(bundle_in: Make, packs: dict[str, Path], models: Any) -> None:
    """A bank without LoRA slots takes prompts of embeddings, gives them back, and takes them again."""
    session = ap.Session(bundle_in("small bank"), "cpu")
    batch = {"input_ids": np.array([ROWS[0]] * 2)}
    for _ in range(2):
        session.load(packs["soft"])
        session.load(packs["tasks"], "other")
        for name, known in (("soft", "soft"), ("other", "tasks")):
            found = session.run(batch, [name, "prefix"])["logits"]
            np.testing.assert_allclose(found[0], torch_logits(models[known], ROWS[0]), rtol=0, atol=CLOSE)
            np.testing.assert_allclose(found[1], torch_logits(models["prefix"], ROWS[0]), rtol=0, atol=CLOSE)
        session.unload("soft")
        session.unload("other")
        with pytest.raises(AdapterpackError, match="no such adapter"):
            session.run(batch, ["soft", None])
    with pytest.raises(Unsupported, match="no slot for a part"):
        session.load(packs["lora"])


def test_a_batch_keeps_its_prompts(bundle_in: Make, packs: dict[str, Path], models: Any) -> None:
    """A prompt that is unloaded between a batch's beginning and its first pass, and whose name another one
    takes, still stands before the batch's rows.
    """
    for mode in ("bank", "inputs"):
        session = ap.Session(bundle_in(mode), "cpu")
        going = DecoderOnly(session, [ROWS[0]], ["prefix"], {})
        session.unload("prefix")
        if mode == "bank":
            session.load(packs["soft"], "prefix")
        found = going.prefill()["logits"].numpy()[0]
        np.testing.assert_allclose(found, torch_logits(models["prefix"], ROWS[0]), rtol=0, atol=CLOSE)


@pytest.mark.long
def test_virtual_embeddings_go_into_a_model_that_reshapes_its_tokens_first(tmp_path: Path) -> None:
    """OPT: rows with the prompt and without, by the engine and in one pass, are those of torch."""
    torch.manual_seed(4)
    config = OPTConfig(
        vocab_size=96,
        hidden_size=32,
        num_attention_heads=4,
        ffn_dim=48,
        num_hidden_layers=1,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path / "base")
    soft: Any = ap.adapt(OPTForCausalLM.from_pretrained(tmp_path / "base").eval(), CONFIGS["soft"], "soft")
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, soft.parameters()):
            parameter.copy_(0.5 * torch.randn(parameter.shape))
    ap.save(soft, tmp_path / "soft", base=tmp_path / "base")
    ap.export(tmp_path / "base", [tmp_path / "soft"], tmp_path / "bundle")
    session = ap.Session(tmp_path / "bundle", "cpu")
    assert session.bundle.decoder
    models = {None: OPTForCausalLM.from_pretrained(tmp_path / "base").eval(), "soft": soft}
    names = ["soft", None, "soft", None, None, "soft"]
    batch = pad(ROWS, 0, left=True)
    found, answers = (
        session.run(batch, names)["logits"],
        session.generate(ROWS, names, max_new_tokens=5, ignore_eos=True),
    )
    for row, name, values, answer in zip(ROWS, names, found, answers, strict=True):
        np.testing.assert_allclose(values[-len(row) :], torch_logits(models[name], row), rtol=0, atol=CLOSE)
        assert answer.ids == torch_tokens(models[name], row, 5)


def test_what_cannot_be_exported_or_loaded_is_said(
    bundle_in: Make,
    packs: dict[str, Path],
    tiny_llama: Path,
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Folding, encoders, a prompt of another model's sizes, and graphs that look tokens up somewhere else;
    nothing is left behind.
    """
    with pytest.raises(Unsupported, match="does not act on weights"):
        ap.export(tiny_llama, [packs["prefix"]], tmp_path / "folded", mode="folded")
    encoder = ap.adapt(
        AutoModelForSequenceClassification.from_pretrained(tiny_bert), ap.PrefixTuning(num_virtual_tokens=2)
    )
    ap.save(encoder, tmp_path / "encoder", base=tiny_bert)
    with pytest.raises(Unsupported, match="decoder's cache"):
        ap.export(tiny_bert, [tmp_path / "encoder"], tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()

    session = ap.Session(bundle_in("small bank"), "cpu")
    other = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
    )
    for name, config in (
        ("wide", ap.PromptTuning(num_virtual_tokens=2)),
        ("tall", ap.PrefixTuning(num_virtual_tokens=2)),
    ):
        ap.adapt(other, config, name)
        stranger = ap.save(other, None, adapter=name)
        anonymous = dataclasses.replace(stranger, manifest=replace(stranger.manifest, base=m.Base()))
        with pytest.raises(BaseMismatch):
            session.load(anonymous)
    monkeypatch.setattr(soft_prompt, "_LOOKUPS", frozenset({"NoSuchOperator"}))
    with pytest.raises(Unsupported, match="looks its tokens up"):
        session.load(packs["soft"])
    assert session.adapters == ["prefix"]
    monkeypatch.undo()
    for name in ("soft", "tasks"):
        session.load(packs[name])  # every slot is free again


def test_a_quantized_bundle_keeps_its_prompts(bundle_in: Make, tmp_path: Path) -> None:
    """int8 weights: logits of prompt rows stay within a tenth of the largest of the float bundle's."""
    ap.quantize(bundle_in("bank"), tmp_path / "small", scheme="int8")
    batch = pad(ROWS, 0, left=True)
    exact, small = (
        ap.Session(folder, "cpu").run(batch, NAMES)["logits"]
        for folder in (bundle_in("bank"), tmp_path / "small")
    )
    real = batch["attention_mask"] > 0
    assert np.abs(small - exact)[real].max() < 0.1 * np.abs(exact[real]).max()


def test_the_graph_itself_holds_no_prompt(bundle_in: Make) -> None:
    """A bundle of prompts alone has a plain decoder's graph: no slots, and an input for the cache."""
    graph = ir.load(bundle_in("small bank") / "model.onnx").graph
    assert not [node for node in graph if node.name and node.name.startswith("adapterpack/")]
    assert {"past_key_values.0.key", "past_key_values.1.value"} <= {value.name for value in graph.inputs}


def test_virtual_tokens_take_room(bundle_in: Make, models: Any) -> None:
    """Of 64 positions a prefix takes five: its rows end sooner, or are refused, and what they say until then
    is torch's.
    """
    session = ap.Session(bundle_in("bank"), "cpu")
    rows, names = [[*range(5, 61)], [*range(5, 61)], [5, 6]], ["prefix", None, "soft"]
    found = session.generate(rows, names, max_new_tokens=12)
    for row, name, answer, room in zip(rows, names, found, (4, 9, 12), strict=True):
        expected = torch_tokens(models[name], row, room)
        assert answer.ids == expected[: expected.index(2) if 2 in expected else room]
        assert answer.finish_reason == ("stop" if 2 in expected else "length")
    with pytest.raises(
        ConfigError, match="row 2; expected at most 64 tokens, found 65, of which 5 are the adapter's prompt"
    ):
        session.generate([[5] * 60, [5] * 60], [None, "prefix"])
