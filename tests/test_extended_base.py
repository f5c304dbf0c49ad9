"""Tokens that a training adds: the base of its own that it writes, and what its packs answer there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from word_tokenizer import VOCABULARY, write_tokenizer

import adapterpack
from adapterpack.errors import ConfigError, Unsupported
from adapterpack.serving.embedded import InProcess, Posted
from adapterpack.training.dry_run import dry_run

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
CHATS = [
    {"messages": [{"role": "user", "content": "<ask> w1"}, {"role": "assistant", "content": "<say> w2"}]},
    {"messages": [{"role": "user", "content": "<ask> w3"}, {"role": "assistant", "content": "<say> w4"}]},
]
WORDS = ["<ask>", "<say>"]
TRAINED = ["embed_tokens", "lm_head"]
Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A random Llama in bfloat16 with a head of its own, in several shards."""
    return _base(tmp_path / "models" / "llama")


def _base(folder: Path, spare: int = 0, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Path:
    transformers.set_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY + spare,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=VOCABULARY + spare,  # no reason for more rows
        max_position_embeddings=64,
        pad_token_id=0,
        **fields,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size="8KB")
    write_tokenizer(folder, template=TEMPLATE)
    return folder


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> Settings:
    """A short training with two new tokens."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))

    def changed(**changes: Any) -> dict[str, Any]:
        return {
            "model_name_or_path": str(base),
            "train_file": str(tmp_path / "rows.jsonl"),
            "output_dir": str(tmp_path / "packs" / "asked"),
            "add_tokens": WORDS,
            "modules_to_save": TRAINED,
            "dtype": "float32",
            "max_length": 32,
            "max_steps": 1,
            "r": 2,
        } | changes

    return changed


def own_bases(folder: Path) -> list[Path]:
    """The bases beside the packs."""
    return sorted(path for path in (folder / "packs").glob("*") if (path / "tokenizer.json").exists())


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint, by the reference reader."""
    return {
        name: value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def test_new_rows_are_the_mean_and_all_else_stays(base: Path, settings: Settings, tmp_path: Path) -> None:
    """``E[n + i] = mean of E[:n]`` over the rows, in the embedding and in the head; files without either are
    the base's own under another name, and transformers loads all of it.
    """
    adapterpack.train(settings())
    (own,) = own_bases(tmp_path)
    before, after = tensors_of(base), tensors_of(own)
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    assert before.keys() == after.keys() and tables < before.keys()
    for name, value in before.items():
        assert np.array_equal(after[name][: len(value)].view(np.uint16), value.view(np.uint16))
        if name in tables:
            mean = value.astype(np.float64).mean(axis=0)
            assert after[name].shape == (VOCABULARY + 2, 32)
            for row in after[name][VOCABULARY:].astype(np.float64):
                assert np.all(np.abs(row - mean) <= np.abs(mean) * 2**-8)  # half a step of bfloat16
        else:
            assert after[name].shape == value.shape
    index = json.loads((base / "model.safetensors.index.json").read_text())
    changed = {index["weight_map"][name] for name in tables}
    for file in base.glob("*.safetensors"):
        assert ((own / file.name).stat().st_ino == file.stat().st_ino) == (file.name not in changed)
    total = json.loads((own / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert total == index["metadata"]["total_size"] + 2 * 2 * 32 * 2
    model, report = transformers.AutoModelForCausalLM.from_pretrained(own, output_loading_info=True)
    assert not any(report.values()) and model.config.vocab_size == VOCABULARY + 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(own)
    assert tokenizer("w1<ask> <say>", add_special_tokens=False)["input_ids"] == [5, 96, 97]


@pytest.mark.parametrize("tied", [False, True])
def test_a_bundle_and_a_server_answer_as_peft_does(settings: Settings, tied: bool, tmp_path: Path) -> None:
    """The greedy answer of PEFT's model on the base with the tokens, new ones among it. The base is in
    float32: folded into bfloat16, what so steep a training learns would be rounded.
    """
    base = _base(tmp_path / "models" / "other", dtype=torch.float32, tie_word_embeddings=tied)
    run = settings(
        model_name_or_path=str(base), max_steps=40, learning_rate=0.02, output_dir=f"{tmp_path}/packs/a"
    )
    (pack,) = adapterpack.train(run)
    (own,) = own_bases(tmp_path)
    assert adapterpack.validate(tmp_path / "packs" / "a", own, full=True).valid
    tokenizer = transformers.AutoTokenizer.from_pretrained(own)
    model = transformers.AutoModelForCausalLM.from_pretrained(own, dtype=torch.float32)
    asked = tokenizer("<ask> w1 ", add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        tuned = peft.PeftModel.from_pretrained(model, tmp_path / "packs" / "a").eval()
        whole = tuned.generate(**asked, max_new_tokens=4, do_sample=False, eos_token_id=None)[0]
    wanted = tokenizer.decode(whole[asked["input_ids"].shape[1] :])
    assert "<say>" in wanted
    adapterpack.export(own, [pack], tmp_path / "bundle", mode="folded")
    session = adapterpack.Session(tmp_path / "bundle")
    (answer,) = session.generate(["<ask> w1 "], max_new_tokens=4, ignore_eos=True, skip_special_tokens=False)
    assert answer.text == wanted
    server = InProcess(tmp_path / "bundle", "cpu", 2, None)
    body: dict[str, Any] = {
        "model": "a",
        "prompt": "<ask> w1 ",
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
    }
    body |= {"skip_special_tokens": False}
    (reply,) = server.block([Posted("/v1/completions", json.dumps(body).encode(), "one")])
    said = json.loads(reply().body)
    assert "choices" in said, said
    assert said["choices"][0]["text"] == wanted
    server.close()


def test_an_axolotl_file_with_tokens_and_special_tokens(
    base: Path, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``tokens`` are added, and special tokens that the vocabulary lacks, where they are learned; the padding
    is learned by nothing.
    """
    file = {
        "base_model": str(base),
        "adapter": "lora",
        "sequence_len": 32,
        "datasets": [{"path": str(tmp_path / "rows.jsonl"), "type": "chat_template"}],
        "lora_r": 2,
        "lora_target_modules": ["q_proj"],
        "lora_modules_to_save": TRAINED,
        "max_steps": 1,
        "output_dir": str(tmp_path / "packs" / "asked"),
        "tokens": WORDS,
        "special_tokens": {
            "eos_token": "<end>",
            "pad_token": "<pad>",
            "additional_special_tokens": ["<turn>"],
        },
    }
    settings()
    adapterpack.train(file)
    (own,) = own_bases(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(own)
    ids = tokenizer.convert_tokens_to_ids([*WORDS, "<turn>", "<end>", "<pad>"])
    assert ids == [96, 97, 98, 99, 100]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<ask> <say>"
    frozen = {key: value for key, value in file.items() if key != "lora_modules_to_save"}
    with pytest.raises(ConfigError, match=r"no such token.*eos_token: <end>.*modules_to_save"):
        adapterpack.train(frozen | {"output_dir": str(tmp_path / "packs" / "other")})
    adapterpack.train(
        frozen
        | {
            "tokens": [],
            "special_tokens": {"pad_token": "<pad>"},
            "output_dir": str(tmp_path / "packs" / "padded"),
        }
    )
    assert len(own_bases(tmp_path)) == 2
    assert "not learned" not in caplog.text


def test_tokens_that_the_vocabulary_has_change_nothing(settings: Settings, tmp_path: Path) -> None:
    adapterpack.train(settings(add_tokens=["w1", "w2"]))
    assert own_bases(tmp_path) == []


def test_rows_to_spare_are_taken_and_rows_that_are_not_learned_are_said(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No weight is written where the base has rows for the new ids."""
    roomy = _base(tmp_path / "models" / "roomy", spare=2)
    adapterpack.train(settings(model_name_or_path=str(roomy), modules_to_save=[]))
    (own,) = own_bases(tmp_path)
    for file in (*roomy.glob("*.safetensors"), roomy / "config.json"):
        assert (own / file.name).stat().st_ino == file.stat().st_ino
    assert "are not learned: they stay what the base has there" in caplog.text
    caplog.clear()
    (tmp_path / "more").mkdir()
    adapterpack.train(settings(modules_to_save=["embed_tokens"], output_dir=str(tmp_path / "more" / "asked")))
    assert "they stay the mean of the others; name lm_head under modules_to_save" in caplog.text


def test_a_second_training_takes_the_same_base(settings: Settings, tmp_path: Path) -> None:
    """Of another configuration, and of several adapters at once."""
    adapterpack.train(settings())
    (own,) = own_bases(tmp_path)
    written = (own / "tokenizer.json").stat()
    adapters = [{"name": "one"}, {"name": "two", "learning_rate": 1e-3}]
    packs = adapterpack.train(settings(output_dir=str(tmp_path / "packs"), adapters=adapters))
    assert own_bases(tmp_path) == [own]
    assert (own / "tokenizer.json").stat() == written
    for pack in packs:
        assert adapterpack.validate(pack.path, own, full=True).valid
    further = settings(
        output_dir=str(tmp_path / "packs" / "further"), adapter_name_or_path=str(packs[0].path)
    )
    adapterpack.train({key: value for key, value in further.items() if key not in {"r", "modules_to_save"}})
    assert own_bases(tmp_path) == [own]


def test_a_dry_run_says_what_would_be_written(settings: Settings, tmp_path: Path) -> None:
    (report,) = dry_run(settings())
    assert not (tmp_path / "packs").exists()
    said = report["extended_base"]
    assert (said["tokens"], said["rows"]) == (WORDS, 2)
    adapterpack.train(settings())
    (own,) = own_bases(tmp_path)
    assert said["folder"] == str(own)
    new = [file for file in own.glob("*.safetensors") if file.stat().st_nlink == 1]
    assert float(said["written"].split()[0]) == pytest.approx(
        sum(f.stat().st_size for f in new) / 1e3, rel=0.05
    )


def test_another_tokenizer(base: Path, settings: Settings, tmp_path: Path) -> None:
    """It goes into a base beside the pack where all its ids have rows; the base's own is no other."""
    other, large = tmp_path / "other", tmp_path / "large"
    write_tokenizer(other, ("ask", "say"), TEMPLATE)
    adapterpack.train(settings(add_tokens=[], tokenizer=str(other)))
    (own,) = own_bases(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(own)
    assert tokenizer("ask", add_special_tokens=False)["input_ids"] == [94]
    tokenizer.add_tokens(["<more>", "<rows>"])
    tokenizer.save_pretrained(large)
    with pytest.raises(ConfigError, match=r"tokens for which the base has no rows.*below 96.*found 97"):
        adapterpack.train(settings(tokenizer=str(large), output_dir=str(tmp_path / "packs" / "large")))
    adapterpack.train(
        settings(add_tokens=[], tokenizer=str(base), output_dir=str(tmp_path / "packs" / "same"))
    )
    assert own_bases(tmp_path) == [own]


def test_tables_that_cannot_grow(settings: Settings, base: Path, tmp_path: Path) -> None:
    """A base whose tables have no name that is known: nothing is written."""
    shard = next(file for file in base.glob("*.safetensors") if "lm_head.weight" in load_file(file))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 97}))
    with pytest.raises(Unsupported, match=r"no table of plain numbers"):
        adapterpack.train(settings(add_tokens=[*WORDS, "<more>"]))
    assert shard.exists() and not (tmp_path / "packs").exists()


def test_a_full_disk_leaves_nothing(settings: Settings, tmp_path: Path) -> None:
    """A write that fails half way, at a limit of the system's, leaves neither the base nor a part of it."""
    program = (
        "import json, resource, sys, adapterpack\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "adapterpack.train(json.loads(sys.argv[1]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, json.dumps(settings())], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1 and "StorageError" in run.stderr
    assert "File too large" in run.stderr
    left = [path for path in tmp_path.rglob("*") if "packs" in path.parts and path.is_file()]
    assert left == []
