"""Tied embeddings and vocabularies that grew: what one tensor is twice, and rows that the base has not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, WORDS
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, ZambaConfig

import adapterpack
from adapterpack import LoRA, TrainableTokens, adapt, save
from adapterpack.adapter_methods import Site, get
from adapterpack.base.checkpoint import Checkpoint
from adapterpack.errors import Unsupported
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import build

QWEN = FAMILIES["qwen2"]
"""A decoder whose embeddings are tied."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tied") / "base"
    QWEN.build().save_pretrained(folder, max_shard_size="9KB")
    return folder


def trained(base: Path, *configs: Any) -> Any:
    model = adapt(QWEN.load(base), list(configs) if len(configs) > 1 else configs[0], "one").eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


def require_same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Logits within 1e-5 of the largest, float32."""
    ours, theirs = QWEN(model), QWEN(other)
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize("targets", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head", "q_proj")])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_untied_each_use_is_changed_by_its_own(
    targets: tuple[str, ...], dtype: str | None, base: Path, tmp_path: Path
) -> None:
    """Without leave it is refused, with both uses named; with it the output has a head of its own and
    computes the adapted model.
    """
    model = trained(base, LoRA(r=2, alpha=3, targets=targets))
    pack = save(model, tmp_path / "pack", base=base)
    with pytest.raises(Unsupported, match=r"input embedding and the output head at once.*--untie") as error:
        adapterpack.merge(base, [pack], tmp_path / "out")
    assert all(name in str(error.value) for name in targets if name != "q_proj")
    assert not (tmp_path / "out").exists()
    report = adapterpack.merge(base, [pack], tmp_path / "out", untie=True, dtype=dtype)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert report.tensors_added == 1
    plain, merged = Checkpoint(base), Checkpoint(tmp_path / "out")
    table = plain.read("model.embed_tokens.weight")
    for use, name in (("embed_tokens", "model.embed_tokens.weight"), ("lm_head", "lm_head.weight")):
        assert np.array_equal(merged.read(name), table) == (use not in targets)
    require_same(QWEN.load(tmp_path / "out"), model)


@pytest.mark.parametrize("modules", [("lm_head",), ("embed_tokens", "lm_head")])
def test_uses_that_were_trained_whole_are_two_tables(
    modules: tuple[str, ...], base: Path, tmp_path: Path
) -> None:
    """The head gets a table of its own, and the embedding is the one that was trained, or the base's."""
    model = trained(base, LoRA(r=1, targets=("q_proj",), modules_to_save=modules))
    pack = save(model, tmp_path / "pack", base=base)
    adapterpack.merge(base, [pack], tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    require_same(model, QWEN.load(tmp_path / "out"))


def test_trained_rows_change_both_uses(base: Path, tmp_path: Path) -> None:
    """Rows of the table are the head's too: tied they change once, untied in both tensors."""
    model = trained(base, TrainableTokens(token_indices=(3, 6)), LoRA(r=2, targets=("q_proj",)))
    pack = save(model, tmp_path / "pack", base=base)
    for untie in (False, True):
        out = tmp_path / f"untied-{untie}"
        adapterpack.merge(base, [pack], out, untie=untie)
        assert config_of(out)["tie_word_embeddings"] is not untie
        require_same(QWEN.load(out), model)


def test_both_uses_changed_alike_stay_tied(base: Path, tmp_path: Path) -> None:
    """The same factors on the table and, turned, on the head, as tied training leaves them, are one change of
    the one tensor.
    """
    rng, info = np.random.default_rng(0), Checkpoint(base)
    width = info.tensors["model.embed_tokens.weight"].shape[1]
    a, b = rng.normal(0, 0.1, (2, WORDS)).astype(np.float32), rng.normal(0, 1, (width, 2)).astype(np.float32)
    table, head = Site("model.embed_tokens", WORDS, width, "embedding"), Site("lm_head", width, WORDS)
    for same in (True, False):
        params = {"lora_A": b.T.copy(), "lora_B": a.T.copy() * (1 if same else 2)}
        pack = build(
            "one",
            get("lora"),
            {table: (LoRA(r=2, alpha=2), {"lora_A": a, "lora_B": b}), head: (LoRA(r=2, alpha=2), params)},
            task=m.PackTask("text-generation", "Qwen2ForCausalLM"),
            base=m.Base(),
            weights=dict.fromkeys(("model.embed_tokens", "lm_head"), "model.embed_tokens.weight"),
        )
        if not same:
            with pytest.raises(Unsupported, match="the two were adapted differently"):
                adapterpack.merge(base, [pack], tmp_path / "other")
            continue
        adapterpack.merge(base, [pack], tmp_path / "out")
        assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
        before, after = (
            Checkpoint(each).read("model.embed_tokens.weight").astype(np.float64)
            for each in (base, tmp_path / "out")
        )
        np.testing.assert_allclose(after - before, (b.astype(np.float64) @ a).T, atol=1e-6)


@pytest.mark.parametrize("kept", [True, False])
def test_a_table_that_was_trained_whole(kept: bool, base: Path, tmp_path: Path) -> None:
    """The table alone: refused, or with leave the head keeps the base's rows."""
    rng = np.random.default_rng(0)
    value = rng.normal(0, 1, Checkpoint(base).tensors["model.embed_tokens.weight"].shape).astype(np.float32)
    lora = {
        Site("model.layers.0.self_attn.q_proj", 24, 24): (
            LoRA(r=1),
            {"lora_A": np.ones((1, 24), np.float32), "lora_B": np.ones((24, 1), np.float32)},
        )
    }
    full = {"model.embed_tokens": {"weight": value}, **({} if kept else {"lm_head": {"weight": value}})}
    pack = build(
        "one",
        get("lora"),
        lora,
        task=m.PackTask("text-generation", "Qwen2ForCausalLM"),
        base=m.Base(),
        full=full,
    )
    if kept:
        with pytest.raises(Unsupported, match=r"only one of them was trained.*--untie"):
            adapterpack.merge(base, [pack], tmp_path / "no")
    adapterpack.merge(base, [pack], tmp_path / "out", untie=kept)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is not kept
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert np.array_equal(model.model.embed_tokens.weight.detach().numpy(), value)
    assert np.array_equal(
        model.lm_head.weight.detach().numpy(),
        Checkpoint(base).read("model.embed_tokens.weight") if kept else value,
    )


def test_heads_whose_name_is_not_known_are_not_made(tmp_path: Path) -> None:
    """An encoder and decoder over one table: untied it would be another model."""
    t5 = FAMILIES["t5"]
    model = t5.build()
    model.save_pretrained(tmp_path / "t5")
    adapted = adapt(model, LoRA(r=2, targets=("lm_head",)), "one")
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    pack = save(adapted, tmp_path / "pack", base=tmp_path / "t5")
    with pytest.raises(Unsupported, match=r"not known what the head .* is called"):
        adapterpack.merge(tmp_path / "t5", [pack], tmp_path / "out", untie=True)


# --- vocabularies that grew ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_pefts_folders_of_a_larger_vocabulary(tied: bool, whole: bool, tmp_path: Path) -> None:
    """Four words added, then trained with PEFT, which saves the tables whole: by itself, or because they are
    trained. The merged checkpoint has the rows, the size and the tokenizer, and computes PEFT's model.
    """
    from peft import LoraConfig, get_peft_model

    family = FAMILIES["llama"]
    family = family._replace(fields={**family.fields, "tie_word_embeddings": tied})
    family.build().save_pretrained(tmp_path / "base")
    model: Any = family.load(tmp_path / "base")
    model.resize_token_embeddings(WORDS + 4, mean_resizing=False)
    saved = {"modules_to_save": ["embed_tokens", "lm_head"]} if whole else {}
    peft = get_peft_model(
        model,
        LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path=str(tmp_path / "base"), **saved),
    )
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    peft.save_pretrained(tmp_path / "peft")
    tokenizer = tokenizer_of(WORDS + 4)
    tokenizer.save_pretrained(tmp_path / "peft")
    tokenizer_of(WORDS).save_pretrained(tmp_path / "base")
    adapterpack.merge(tmp_path / "base", [tmp_path / "peft"], tmp_path / "out")
    assert config_of(tmp_path / "out")["vocab_size"] == WORDS + 4
    ids = torch.tensor([[1, 5, WORDS + 1, WORDS + 3, 9]])
    with torch.no_grad():
        theirs = peft.eval()(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits
    assert merged.shape == (1, 5, WORDS + 4)
    torch.testing.assert_close(merged, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        tmp_path / "peft" / "tokenizer.json"
    ).read_bytes()


def tokenizer_of(count: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    )


def test_a_table_that_grew_alone_is_refused(tmp_path: Path) -> None:
    """A head with fewer rows than the table gives no model."""
    family = FAMILIES["llama"]
    family.build().save_pretrained(tmp_path / "base")
    lora = {
        Site("model.layers.0.self_attn.o_proj", 24, 24): (
            LoRA(r=1),
            {"lora_A": np.ones((1, 24), np.float32), "lora_B": np.ones((24, 1), np.float32)},
        )
    }
    pack = build(
        "one",
        get("lora"),
        lora,
        task=m.PackTask("text-generation"),
        base=m.Base(),
        full={"model.embed_tokens": {"weight": np.ones((WORDS + 2, 24), np.float32)}},
    )
    with pytest.raises(Unsupported, match=r"vocabulary grew.*lm_head"):
        adapterpack.merge(tmp_path / "base", [pack], tmp_path / "out")


def words_of_peft(base: Path, out: Path, indices: list[int], **saving: Any) -> Any:
    """A model of PEFT's whose vocabulary grew by two words before these were trained, saved to ``out``."""
    from peft import TrainableTokensConfig, get_peft_model

    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(WORDS + 2)
    tuned = get_peft_model(
        model, TrainableTokensConfig(token_indices=indices, target_modules=["embed_tokens"])
    ).eval()
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(out, **saving)
    return tuned


@pytest.mark.parametrize("with_table", [True, False])
def test_words_that_were_added_and_trained_alone(base: Path, tmp_path: Path, with_table: bool) -> None:
    """Their rows, and those of an old word, come after the base's or into it: the logits of PEFT's model,
    whatever else its file held.
    """
    tuned = words_of_peft(base, tmp_path / "peft", [WORDS + 1, 3, WORDS], save_embedding_layers=with_table)
    adapterpack.convert(tmp_path / "peft", tmp_path / "pack", to="pack")
    adapterpack.merge(base, [tmp_path / "pack"], tmp_path / "out")
    assert config_of(tmp_path / "out")["vocab_size"] == WORDS + 2
    ids = torch.tensor([[1, WORDS, 3, 5, WORDS + 1]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(merged(ids).logits, tuned(ids).logits)


def test_a_new_word_that_was_not_trained_is_missed(base: Path, tmp_path: Path) -> None:
    """Its row is in no file: refused by its number, and nothing is written. So are two packs that both know
    new words.
    """
    words_of_peft(base, tmp_path / "peft", [WORDS + 1])
    adapterpack.convert(tmp_path / "peft", tmp_path / "pack", to="pack")
    with pytest.raises(Unsupported, match=rf"words {WORDS} are new and were not trained"):
        adapterpack.merge(base, [tmp_path / "pack"], tmp_path / "out")
    words_of_peft(base, tmp_path / "other", [WORDS, WORDS + 1])
    packs = [
        adapterpack.convert(tmp_path / "other", tmp_path / name, to="pack") and tmp_path / name
        for name in ("a", "b")
    ]
    with pytest.raises(Unsupported, match="only one of them"):
        adapterpack.merge(base, packs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_block_at_two_places_is_saved_and_not_merged(tmp_path: Path) -> None:
    """Zamba's blocks share their weights: each place has a change of its own, for which one tensor has no
    room.
    """
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 96}
    kinds = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
    config = ZambaConfig(
        **sizes,
        num_hidden_layers=4,
        layers_block_type=kinds,
        attention_hidden_size=64,
        attention_head_dim=32,
        num_key_value_heads=2,
        n_mamba_heads=2,
        mamba_dt_rank=4,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapt(model, LoRA(r=2, targets=("q_proj",)), "one")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    pack = save(model, None, base=tmp_path / "base", name="one")
    weights = {group.weight for group in pack.manifest.adapter_groups}
    assert (len(pack.manifest.adapter_groups), len(weights)) == (2, 1)
    with pytest.raises(Unsupported, match="share this tensor"):
        adapterpack.merge(tmp_path / "base", [pack], tmp_path / "merged")
