"""The page for users of PEFT: every block of it runs, theirs and ours, and both compute the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter

import adapterpack

pytestmark = pytest.mark.fast
PAGE = Path(__file__).parent.parent / "docs" / "from-peft.md"


def blocks() -> list[tuple[str, str]]:
    """The blocks of code on the page, each with whose it is."""
    found = re.findall(r"```python\n# (PEFT|adapterpack)\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len(found) == PAGE.read_text("utf-8").count("```") // 2
    return found


def folders(base: Path, folder: Path) -> None:
    """Three adapters that PEFT wrote, of one shape."""
    for seed, name in enumerate(("tickets", "orders", "more")):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=3,
            lora_alpha=4,
            target_modules=["q_proj", "v_proj"],
            task_type="CAUSAL_LM",
            init_lora_weights=False,
        )
        peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(
            folder / name
        )


def test_the_blocks_run_and_agree(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, PEFT's in one namespace and ours in another; ``out`` of each pair is the same within 1e-5."""
    monkeypatch.chdir(tmp_path)
    folders(tiny_llama, tmp_path / "adapters")
    ids = torch.tensor([[0, 5, 17, 40], [9, 9, 50, 2], [3, 4, 5, 6]])
    names: dict[str, Any] = {
        name: getattr(peft, name)
        for name in (
            "AutoPeftModelForCausalLM",
            "LoraConfig",
            "PeftModel",
            "get_peft_model",
            "get_peft_model_state_dict",
            "set_peft_model_state_dict",
        )
    }
    common = {
        "torch": torch,
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "BASE": str(tiny_llama),
        "batch": {"input_ids": ids, "attention_mask": (ids != 0).long()},
    }
    spaces: dict[str, dict[str, Any]] = {
        "PEFT": {
            **common,
            **names,
            "rescale_adapter_scale": rescale_adapter_scale,
            "hotswap_adapter": hotswap_adapter,
        },
        "adapterpack": {
            **common,
            "adapterpack": adapterpack,
            "LoRA": adapterpack.LoRA,
            "pipeline": transformers.pipeline,
        },
    }
    pairs = 0
    with torch.no_grad():
        for whose, code in blocks():
            exec(compile(code, f"{PAGE.name}, {whose}", "exec"), spaces[whose])
            if whose == "adapterpack" and "out" in spaces["PEFT"]:
                torch.testing.assert_close(
                    *(torch.as_tensor(space["out"]) for space in spaces.values()),
                    rtol=1e-5,
                    atol=1e-5,
                    msg=code,
                )
                assert ("ids" in spaces["PEFT"]) == ("ids" in spaces["adapterpack"])
                for key in ("ids", "trained"):
                    if key in spaces["PEFT"]:
                        assert torch.equal(*(torch.as_tensor(space.pop(key)) for space in spaces.values()))
                del spaces["PEFT"]["out"]
                pairs += 1
    assert pairs == sum(whose == "PEFT" for whose, _ in blocks())
    both = adapterpack.attach(
        transformers.AutoModelForCausalLM.from_pretrained(tiny_llama), adapterpack.load("packs/both")
    )
    with torch.no_grad():
        torch.testing.assert_close(
            spaces["adapterpack"]["out"], both(**common["batch"]).logits, rtol=1e-5, atol=1e-5
        )
    assert spaces["adapterpack"]["text"].startswith("w5 w6")


def test_every_feature_is_shown_by_a_test_that_there_is() -> None:
    """The page of features names tests of this folder, and scripts that are run by themselves; what names
    none says that there is no such thing here.
    """
    rows = re.findall(
        r"^\| (?!PEFT|---)(.+?) \| (.+?) \| (.*)\|$",
        (PAGE.parent / "peft-features.md").read_text("utf-8"),
        re.MULTILINE,
    )
    assert len(rows) > 40
    for feature, here, shown in rows:
        assert shown.strip() or here.startswith(("not here", "nothing to")), feature
        for file, test in re.findall(r"`(\w[\w/]*\.py)(?:::(\w+))?`", shown):
            part = test or ("main(" if file.startswith("interop/") else "test_")
            assert f"def {part}" in (Path(__file__).parent / file).read_text("utf-8"), (feature, file, test)


@pytest.mark.parametrize(
    ("option", "here"),
    [
        ("lora_alpha", "alpha"),
        ("lora_dropout", "dropout"),
        ("target_modules", "targets"),
        ("rank", "r"),
        ("init_lora_weights", "init"),
        ("use_dora", "DoRA"),
        ("task_type", "leave it out"),
    ],
)
def test_a_setting_by_peft_s_name_is_answered_with_the_name_here(option: str, here: str) -> None:
    """In Python, too, where a wrong name of an argument would be a bare TypeError."""
    with pytest.raises(TypeError, match=rf"LoRA has no setting '{option}': .*{here}"):
        adapterpack.LoRA(**{option: None})
