"""Where attacks run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from attack import Attacks
from attacked_hub import server  # noqa: F401 - a fixture
from attacking_hub import _hub, _other, hub, other  # noqa: F401 - fixtures
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

import adapterpack
from adapterpack import LoRA

TOKENIZER = {
    "version": "1.0",
    "pre_tokenizer": {"type": "Whitespace"},
    "added_tokens": [
        {
            "id": 0,
            "content": "[PAD]",
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
    ],
    "model": {"type": "WordLevel", "vocab": {"[PAD]": 0, "x": 1, "y": 2}, "unk_token": "x"},
}


def pytest_itemcollected(item: pytest.Item) -> None:
    """An attack has many forms, each in a process of its own; five, as that divides no number of ways that
    they are crossed with.
    """
    item.add_marker(pytest.mark.sampled(5))


@pytest.fixture
def attacks(tmp_path: Path) -> Attacks:
    return Attacks(tmp_path)


@pytest.fixture(scope="session")
def good_bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``causal`` and ``classes`` are bases, ``pack`` is a pack for the first, ``tuned`` the first after
    training.
    """
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    bert = BertConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = AutoModelForCausalLM.from_config(llama)
    AutoModelForSequenceClassification.from_config(bert).save_pretrained(folder / "classes")
    model.save_pretrained(folder / "causal")
    for name in ("causal", "classes"):
        (folder / name / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        (folder / name / "tokenizer_config.json").write_text(
            json.dumps({"pad_token": "[PAD]", "eos_token": "y"})
        )
    adapterpack.adapt(model, LoRA(r=2, targets=("q_proj",)), "pack")
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.add_(0.1 * name.endswith("lora_B"))
    adapterpack.save(model, folder / "pack", base=folder / "causal")
    with torch.no_grad():
        adapterpack.detach(model)
        for value in model.parameters():
            value.mul_(1.5)
    model.save_pretrained(folder / "tuned")
    return folder


@pytest.fixture
def base(good_bases: Path, attacks: Attacks) -> Path:
    """A working folder with copies of everything good; the base that is attacked is ``causal``."""
    shutil.copytree(good_bases, attacks.work, dirs_exist_ok=True)
    (attacks.work / "rows.jsonl").write_text('{"prompt": "x", "completion": "y"}\n' * 4)
    (attacks.work / "train.yaml").write_text(
        "task: text-generation\nmodel_name_or_path: causal\ntrain_file: rows.jsonl\noutput_dir: "
        "out\nmethod: lora\nmax_steps: 1\n"
    )
    return attacks.work / "causal"
