"""LoRA beside trained tokens and tied embeddings, with PEFT as the peer: its folders here, ours there, the
tensors bit for bit.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from noise import shake
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from adapterpack import (
    IA3,
    ALoRA,
    LoRA,
    TrainableTokens,
    adapt,
    attach,
    compose,
    convert,
    detach,
    disabled,
    merge,
    resize,
    save,
)
from adapterpack.errors import FormatError, SiteNotFound, Unsupported
from adapterpack.io.safetensors import SafetensorsFile
from adapterpack.manifest import manifest as m
from adapterpack.pack import from_peft
from adapterpack.pack.validate.validation import load, validate
from adapterpack.peft import layout
from adapterpack.quantizing.packs import quantize_pack

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
FP32 = 1e-5
"""Absolute: float32 sums of a two-layer model with outputs of about 1."""


def llama(tied: bool) -> LlamaForCausalLM:
    """A random Llama of two layers."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=37,
            hidden_size=16,
            intermediate_size=28,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    ).eval()


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=IDS).logits.double().numpy()


def shaken(model: Any) -> Any:
    """Every trained parameter moved by a random amount."""
    return shake(model, 0.3, 7).eval()


def theirs_of(base: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return shaken(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=5, **options)))


def saved(theirs: Any, folder: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(str(folder))
    return load_file(folder / TENSORS)


def loaded(base: Any, folder: Path) -> Any:
    """PEFT's model from a folder; a key that is missing or left over fails."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    assert not [warning for warning in said if "key" in str(warning.message)]
    return model


CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "a list, tied": (True, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "a list, not tied": (
        False,
        {"target_modules": ["q_proj", "v_proj"], "trainable_token_indices": [5, 3, 9]},
    ),
    "a map, tied": (
        True,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}},
    ),
    "a map of both, tied": (
        True,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3], "lm_head": [3]}},
    ),
    "asked to be tied": (
        True,
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5], "ensure_weight_tying": True},
    ),
    "asked to be tied, and not": (
        False,
        {"target_modules": ["q_proj"], "trainable_token_indices": [3], "ensure_weight_tying": True},
    ),
    "a tied embedding": (True, {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "a tied module trained whole": (
        True,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
}


@pytest.mark.parametrize("label", CASES)
def test_a_folder_of_peft_here_and_back(label: str, tmp_path: Path) -> None:
    """PEFT's folder attached gives PEFT's logits (1e-5, float32 sums in another order); written again PEFT
    loads it, with no key missing, gives the same, and saves the tensors that it saved before, bit for bit.
    """
    tied, options = CASES[label]
    base = llama(tied)
    theirs = theirs_of(base, **options)
    before = saved(theirs, tmp_path / "theirs")
    expected = logits(theirs)
    assert np.abs(expected - logits(base)).max() > 0.05
    pack = load(tmp_path / "theirs")
    ours = attach(copy.deepcopy(base), pack, check_base=False)
    np.testing.assert_allclose(logits(ours), expected, rtol=0, atol=FP32)
    assert validate(pack.write(tmp_path / "again").path or "").findings == ()
    again = loaded(base, tmp_path / "again")
    np.testing.assert_allclose(logits(again), expected, rtol=0, atol=FP32)
    ours_written, after = load_file(tmp_path / "again" / TENSORS), saved(again, tmp_path / "after")
    # the base's weights, which PEFT saves along
    own = {name: value for name, value in before.items() if ".base_layer." not in name}
    assert own.keys() == ours_written.keys() == {name for name in after if ".base_layer." not in name}
    assert all(
        torch.equal(value, ours_written[name]) and torch.equal(value, after[name])
        for name, value in own.items()
    )


@pytest.mark.parametrize("tied", [True, False])
def test_both_methods_trained_in_one_adapter(tied: bool, tmp_path: Path) -> None:
    """Trained here, PEFT computes the same; merged, the checkpoint holds the chosen rows exactly; detached,
    the base is back.
    """
    base = llama(tied)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    ours = adapt(
        copy.deepcopy(base),
        [LoRA(r=2, targets=("q_proj", "down_proj")), TrainableTokens(token_indices=(4, 1))],
    )
    assert np.array_equal(logits(ours), logits(base))
    ours(input_ids=IDS, labels=IDS).loss.backward()
    trained = [name for name, value in ours.named_parameters() if value.requires_grad]
    assert {name.rpartition(".")[2] for name in trained} == {"lora_A", "lora_B", "trainable_tokens_delta"}
    assert all(value.grad is not None for value in ours.parameters() if value.requires_grad)
    pack = save(shaken(ours), tmp_path / "pack")
    expected = logits(ours)
    assert (pack.method.name, [method.name for method in pack.methods]) == (
        "lora",
        ["lora", "trainable_tokens"],
    )
    assert pack.manifest.must_understand == (m.METHODS,)
    assert json.loads((tmp_path / "pack" / CONFIG).read_text())["trainable_token_indices"] == {
        "model.embed_tokens": [4, 1]
    }
    assert validate(tmp_path / "pack", tmp_path / "base", full=True).state == "valid"
    np.testing.assert_allclose(logits(loaded(base, tmp_path / "pack")), expected, rtol=0, atol=FP32)
    back = attach(copy.deepcopy(base), load(tmp_path / "pack"))
    assert np.array_equal(logits(back), expected)
    assert np.array_equal(logits(detach(back)), logits(base))
    merge(tmp_path / "base", [pack], tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(logits(merged), expected, rtol=0, atol=FP32)
    rows = next(
        adapter.params["trainable_tokens_delta"]
        for adapter in pack.adapters()
        if adapter.method.name == "trainable_tokens"
    )
    assert np.array_equal(merged.model.embed_tokens.weight[[4, 1]].detach().numpy(), rows)
    again = save(attach(copy.deepcopy(base), load(tmp_path / "pack")), tmp_path / "again", name="pack")
    assert again.tensors.keys() == pack.tensors.keys()
    assert all(np.array_equal(value, again.tensors[name]) for name, value in pack.tensors.items())


def test_tokens_of_an_untied_head_beside_those_of_the_embedding(tmp_path: Path) -> None:
    """Each of the two has its own tokens: attached it is PEFT's model; a head that is one weight with the
    embedding is refused.
    """
    base = llama(False)
    theirs = theirs_of(
        base,
        target_modules=["q_proj"],
        trainable_token_indices={"lm_head": [1, 2], "embed_tokens": [3, 4, 1]},
    )
    saved(theirs, tmp_path / "theirs")
    pack, wanted = load(tmp_path / "theirs"), logits(theirs)
    model = attach(copy.deepcopy(base), pack)
    assert np.abs(logits(model) - wanted).max() < FP32 < 0.1 < np.abs(wanted - logits(base)).max()
    assert np.array_equal(logits(detach(model)), logits(base))
    tied = llama(True)
    before = logits(tied)
    with pytest.raises(Unsupported, match="are one weight"):
        attach(tied, pack)
    assert np.array_equal(logits(tied), before)


def test_two_sets_of_tokens_are_merged_where_none_is_in_both(tmp_path: Path) -> None:
    """The rows of each are its own, whichever comes first; a token of both is refused."""
    llama(False).save_pretrained(tmp_path / "base")
    packs = [
        save(shaken(adapt(llama(False), TrainableTokens(token_indices=ids))), None, name=f"a{ids[0]}")
        for ids in ((3, 1), (4,), (1, 5))
    ]
    merge(tmp_path / "base", packs[:2], tmp_path / "merged", durable=False)
    table = load_file(tmp_path / "merged" / "model.safetensors")["model.embed_tokens.weight"]
    right = llama(False).get_input_embeddings().weight.detach().clone()
    for pack, ids in zip(packs, ((3, 1), (4,)), strict=False):
        right[list(ids)] = torch.tensor(pack.params("model.embed_tokens")["trainable_tokens_delta"])
    assert torch.equal(table, right)
    with pytest.raises(Unsupported, match="puts its own values"):
        merge(tmp_path / "base", packs[::2], tmp_path / "twice", durable=False)


def test_what_needs_one_kind_of_change_says_so(tmp_path: Path) -> None:
    """Rows that replace others have no factors: composing, quantizing and the formats of factors name the
    method; so do a tree, whose members have one method each.
    """
    ours = adapt(llama(True), [LoRA(r=2, targets=("q_proj",)), TrainableTokens(token_indices=(4,))])
    pack = save(shaken(ours), tmp_path / "pack")
    plain = save(shaken(adapt(llama(True), LoRA(r=2, targets=("q_proj",)))), tmp_path / "plain")
    for refused in (
        lambda: compose([pack, pack], rule="linear"),
        lambda: quantize_pack(pack),
        lambda: resize(pack, rank=1),
        lambda: compose([pack, plain], tree="sum(0.5*pack, plain)"),
        lambda: convert(pack, tmp_path / "kohya", to="kohya"),
    ):
        with pytest.raises(Unsupported, match="trainable_tokens"):
            refused()
    assert not (tmp_path / "kohya").exists()


def test_methods_that_cannot_be_one_adapter() -> None:
    """Two methods at one site, the same method twice, one that acts at some positions: refused before the
    model is touched.
    """
    model = llama(True)
    with pytest.raises(Unsupported, match="at one site"):
        adapt(model, [LoRA(r=2, targets=("q_proj",)), IA3(targets=("q_proj",))])
    with pytest.raises(Unsupported, match="each of its methods once"):
        adapt(model, [LoRA(r=2), LoRA(r=3)])
    with pytest.raises(Unsupported, match="same positions"):
        adapt(
            model,
            [
                ALoRA(r=2, targets=("q_proj",), alora_invocation_tokens=(5, 6)),
                TrainableTokens(token_indices=(4,)),
            ],
        )
    assert not [name for name, _ in model.named_parameters() if "adapter" in name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainable_token_indices": None}, "does not account for"),
        ({"trainable_token_indices": [3]}, "wrong shape"),
        ({"trainable_token_indices": {"other": [3, 5]}}, "must be a list of ids"),
        ({"trainable_token_indices": [3, -5]}, "at least 0"),
        ({"trainable_token_indices": "3"}, "must be a list of ids"),
    ],
)
def test_tokens_that_the_tensors_do_not_bear_out(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(theirs_of(llama(True), target_modules=["q_proj"], trainable_token_indices=[3, 5]), tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises((FormatError, Unsupported), match=message):
        from_peft.read(tmp_path / "a")


def test_a_face_that_names_other_tokens_is_told(tmp_path: Path) -> None:
    """The PEFT file of a pack must name the manifest's tokens, and as many as there are rows."""
    save(
        shaken(adapt(llama(True), [LoRA(r=2, targets=("q_proj",)), TrainableTokens(token_indices=(4, 1))])),
        tmp_path / "pack",
    )
    pack = load(tmp_path / "pack")
    config = json.loads((tmp_path / "pack" / CONFIG).read_text())
    held = pack.manifest
    for tokens in ({"model.embed_tokens": [4, 2]}, {"model.embed_tokens": [4]}, None):
        data = json.dumps({**config, "trainable_token_indices": tokens}).encode()
        file = SafetensorsFile(tmp_path / "pack" / TENSORS)
        assert layout.disagreement(tmp_path / "pack", held, data, file) is not None


def test_tokens_that_the_vocabulary_lacks_are_named(tmp_path: Path) -> None:
    """Those of PEFT's folder that was trained on a larger vocabulary, and those of a new adapter."""
    larger = LlamaForCausalLM(LlamaConfig(**{**llama(True).config.to_dict(), "vocab_size": 41}))
    peft.get_peft_model(larger, peft.TrainableTokensConfig(token_indices=[3, 40])).save_pretrained(tmp_path)
    model = llama(True)
    for put in (
        lambda: attach(model, load(tmp_path), check_base=False),
        lambda: adapt(model, TrainableTokens(token_indices=(3, 40))),
    ):
        with pytest.raises(SiteNotFound, match="rows of tokens that the embedding does not have") as error:
            put()
        assert (error.value.expected, error.value.found) == ("ids below 37", "40")
    assert not any("delta" in name for name, _ in model.named_parameters())


def test_a_tied_head_fetches_no_weight_for_the_base(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetching it costs an offloaded or a quantized table much in every pass; with the adapter it is needed."""
    from adapterpack.torch_adapters.layers import layer

    model, ids = AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), torch.tensor([[5, 6, 7]])
    adapt(model, TrainableTokens(token_indices=(5, 6)))
    fetched: list[str] = []
    fetch = layer.weight_of

    def count(module: nn.Module, leaf: str, site: Any) -> torch.Tensor:
        fetched.append(site.path)
        return fetch(module, leaf, site)

    monkeypatch.setattr(layer, "weight_of", count)
    with torch.no_grad():
        model(ids)
        assert fetched
        fetched.clear()
        with disabled(model):
            model(ids)
    assert fetched == []
