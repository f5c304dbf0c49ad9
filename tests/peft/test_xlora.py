"""X-LoRA of PEFT: its classifier with the experts beside it is a composed pack, and becomes PEFT's folder
again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from noise import shake
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from adapterpack import attach, compose, convert, load
from adapterpack.errors import FormatError, Unsupported
from adapterpack.peft import layout

pytestmark = pytest.mark.filterwarnings("ignore")
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {
        "xlora_depth": 3,
        "xlora_size": 10,
        "xlora_dropout_p": 0.0,
        "layerwise_scalings": True,
        "softmax_temperature": 0.7,
    },
    "top": {"top_k_lora": 1, "enable_softmax": False, "global_scaling_weight": 1.5},
}
IDS = torch.randint(3, 31, (2, 7), generator=torch.Generator().manual_seed(6))


def model_of(tmp_path: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()


def built(tmp_path: Path, **options: Any) -> Any:
    """PEFT's X-LoRA over two experts at layers that are not all the same, moved and saved in ``theirs``."""
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=31,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,
        )
    ).save_pretrained(tmp_path / "base")
    for number, targets in enumerate((["q_proj", "down_proj"], ["v_proj", "q_proj", "down_proj"])):
        expert = peft.get_peft_model(
            model_of(tmp_path), peft.LoraConfig(r=2 + number, target_modules=targets, task_type="CAUSAL_LM")
        )
        shake(expert, 0.3, 5 + number).save_pretrained(tmp_path / f"expert{number}")
    theirs = peft.get_peft_model(
        model_of(tmp_path),
        peft.XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=24,
            adapters={str(number): str(tmp_path / f"expert{number}") for number in range(2)},
            **options,
        ),
    )
    shake(theirs.base_model.internal_xlora_classifier, 1.0, 9)
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs.eval()


def with_experts(tmp_path: Path) -> Path:
    for number in range(2):
        shutil.copytree(tmp_path / f"expert{number}", tmp_path / "theirs" / "experts" / str(number))
    return tmp_path / "theirs"


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("name", FORMS)
def test_xlora_of_peft_here_and_there_again(name: str, tmp_path: Path) -> None:
    """PEFT's logits with the pack, and with the folder made of the pack, to 1e-5 of the largest: the order of
    sums is another.
    """
    wanted, plain = logits(built(tmp_path, **FORMS[name])), logits(model_of(tmp_path))
    assert (wanted - plain).abs().max() > 1e-2 * wanted.abs().max()
    convert(with_experts(tmp_path), tmp_path / "pack", to="pack", base=tmp_path / "base")
    done = convert(tmp_path / "pack", tmp_path / "again", to="xlora")
    assert any("adapters = " in note for note in done.notes)
    config = peft.XLoraConfig.from_pretrained(tmp_path / "again")
    config.adapters = {key: str(tmp_path / "again" / path) for key, path in config.adapters.items()}
    again = peft.PeftModel.from_pretrained(model_of(tmp_path), tmp_path / "again", config=config).eval()
    for found in (attach(model_of(tmp_path), load(tmp_path / "pack")), again):
        assert (logits(found) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    for folder in ("experts/0", "experts/1"):
        before, after = (load_file(tmp_path / side / folder / layout.TENSORS) for side in ("theirs", "again"))
        assert all(
            any(torch.equal(value, other) for other in after.values()) for value in before.values()
        ) and len(before) == len(after)


def test_folders_of_xlora_that_are_not_read(tmp_path: Path) -> None:
    """Without its experts, or with a link in their place; experts with other names, or too many; a classifier
    of another shape.
    """
    built(tmp_path)
    folder = tmp_path / "theirs"
    with pytest.raises(Unsupported, match=r"experts.*XLORA.*copy the experts"):
        load(folder)
    with pytest.raises(FormatError, match="without its experts"):
        convert(folder, tmp_path / "out", to="pack")
    with_experts(tmp_path)
    config = json.loads((folder / layout.CONFIG).read_text())
    many = {str(number): "x" for number in range(11)}
    for change, error, words in (
        ({"adapters": {"a": "x", "b": "y"}}, FormatError, "by their numbers"),
        ({"adapters": many}, Unsupported, "mixes up"),
        ({"adapters": []}, FormatError, "by their numbers"),
        ({"adapters": {"0": "x"}}, FormatError, "not those of this tree"),
        ({"scaling_pass_value": 0.5}, Unsupported, "first pass"),
        ({"xlora_depth": 10**9}, FormatError, "depth"),
        ({"use_newer": True}, Unsupported, "use_newer"),
    ):
        (folder / layout.CONFIG).write_text(json.dumps({**config, **change}))
        with pytest.raises(error, match=words):
            convert(folder, tmp_path / "out", to="pack")
    (folder / layout.CONFIG).write_text(json.dumps(config))
    (folder / "0" / layout.TENSORS).rename(folder / "0" / "elsewhere")
    save_file(
        {"base_model.internal_xlora_classifier.layers.0.weight": torch.zeros(2, 24)}, folder / layout.TENSORS
    )
    with pytest.raises(FormatError, match=r"a layer of the classifier is missing.*layers.0.bias"):
        convert(folder, tmp_path / "out", to="pack")
    shutil.rmtree(folder / "experts" / "1")
    (folder / "experts" / "1").symlink_to(tmp_path / "expert1")
    with pytest.raises(FormatError, match="a link"):
        convert(folder, tmp_path / "out", to="pack")
    with pytest.raises(Unsupported, match="not composed so"):
        convert(
            compose([tmp_path / "expert0", tmp_path / "expert1"], tree="sum(expert0, expert1)"),
            tmp_path / "out",
            to="xlora",
        )
    assert not (tmp_path / "out").exists()
