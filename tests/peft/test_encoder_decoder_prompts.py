"""Prompts of models with an encoder and a decoder: PEFT's folders, row by row, padded, generated, there and
back; and refusals.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES
from noise import shake

import adapterpack
from adapterpack import PrefixTuning, PromptTuning, active, adapt, attach, convert, detach, load
from adapterpack.errors import Unsupported

pytestmark = pytest.mark.filterwarnings("ignore")
CLOSE = 2e-5
"""Of the largest logit: float32 passes over sums in the same order but for the mask's."""
COUNT = 5
ROWS = [[3, 7, 9, 11, 2, 5], [8, 4, 6]]
WANTED = torch.tensor([[0, 4, 9, 12], [0, 6, 6, 3]])
CONFIGS: dict[str, Any] = {
    "prompt_tuning": lambda: peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=COUNT),
    "p_tuning": lambda: peft.PromptEncoderConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=COUNT, encoder_hidden_size=8
    ),
    "prefix_tuning": lambda: peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=COUNT),
}
CASES = [(family, method) for family in ("t5", "bart") for method in CONFIGS]


def theirs(family: str, method: str, folder: Path) -> Any:
    """PEFT's model, moved; its folder."""
    model = peft.get_peft_model(FAMILIES[family].build(), CONFIGS[method]()).eval()
    shake(model, 0.5, 2)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def alone(model: Any) -> torch.Tensor:
    """The logits of each row by itself."""
    return torch.cat(
        [
            model(
                input_ids=torch.tensor([row]),
                attention_mask=torch.ones(1, len(row), dtype=torch.long),
                decoder_input_ids=wanted[None],
            ).logits
            for row, wanted in zip(ROWS, WANTED, strict=True)
        ]
    )


def batch() -> dict[str, torch.Tensor]:
    """Both rows, the shorter one padded on the right."""
    longest = max(map(len, ROWS))
    return {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in ROWS]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ROWS]),
    }


def require_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= CLOSE * wanted.abs().max()


@pytest.mark.parametrize(("family", "method"), CASES)
def test_attached_it_is_peft(family: str, method: str, tmp_path: Path) -> None:
    """Alone and padded; greedy tokens are those of the logits; switched off and taken out the base's own
    bits. PEFT loads the pack; keys and values, which PEFT gives to other layers than their own, once they are
    converted.
    """
    wanted = alone(theirs(family, method, tmp_path / "theirs"))
    base = alone(FAMILIES[family].build())
    assert (wanted - base).abs().max() > 0.05 * base.abs().max(), "the prompt does something"
    pack = load(tmp_path / "theirs")
    assert pack.method.name == method
    model: Any = attach(FAMILIES[family].build(), pack)
    require_same(alone(model), wanted)
    with torch.no_grad():
        padded = model(**batch(), decoder_input_ids=WANTED).logits
        require_same(padded, wanted)
        tokens = model.generate(
            **batch(),
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
            forced_eos_token_id=None,
            min_new_tokens=4,
        )
        said = model(**batch(), decoder_input_ids=tokens[:, :-1]).logits.argmax(-1)
    assert torch.equal(said[:, -4:], tokens[:, -4:])
    assert torch.equal(alone(active(model, None)), base)
    assert torch.equal(alone(detach(model)), base)
    convert(tmp_path / "theirs", tmp_path / "pack", to="pack")
    if method == "prefix_tuning":
        assert not (tmp_path / "pack" / "adapter_config.json").exists()
        require_same(alone(attach(FAMILIES[family].build(), load(tmp_path / "pack"))), wanted)
        convert(tmp_path / "pack", tmp_path / "back", to="peft")
        require_same(
            alone(peft.PeftModel.from_pretrained(FAMILIES[family].build(), tmp_path / "back").eval()), wanted
        )
    else:
        require_same(
            alone(peft.PeftModel.from_pretrained(FAMILIES[family].build(), tmp_path / "pack").eval()), wanted
        )


def test_they_are_trained_and_saved(tmp_path: Path) -> None:
    """A step of each moves the prompt; the pack means the same here and, where PEFT has the same, in PEFT."""
    for number, config in enumerate(
        (PromptTuning(num_virtual_tokens=COUNT), PrefixTuning(num_virtual_tokens=COUNT, init="random"))
    ):
        base = FAMILIES["t5"].build()
        base.save_pretrained(tmp_path / "base")
        model: Any = adapt(FAMILIES["t5"].load(tmp_path / "base"), config)
        before = alone(model)
        optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=5.0)
        model(**batch(), labels=WANTED).loss.backward()
        optimizer.step()
        assert not torch.equal(alone(model), before)
        adapterpack.save(model, tmp_path / f"pack-{number}", base=tmp_path / "base")
        require_same(
            alone(attach(FAMILIES["t5"].load(tmp_path / "base"), load(tmp_path / f"pack-{number}"))),
            alone(model),
        )
    with pytest.raises(Unsupported, match="another form"):  # PEFT gives both layers the keys of the first
        convert(tmp_path / "pack-1", tmp_path / "none", to="peft")
    again = peft.PeftModel.from_pretrained(FAMILIES["t5"].load(tmp_path / "base"), tmp_path / "pack-0").eval()
    require_same(
        alone(again), alone(attach(FAMILIES["t5"].load(tmp_path / "base"), load(tmp_path / "pack-0")))
    )


def test_what_has_no_meaning_is_refused(tmp_path: Path) -> None:
    """States and caches that were made without the prompt, and a prompt of both parts at once."""
    model: Any = attach(FAMILIES["t5"].build(), load(_saved("prompt_tuning", tmp_path)))
    states = active(model, None).get_encoder()(**batch())
    active(model, "prompt_tuning")
    with pytest.raises(Unsupported, match="made without the prompt"):
        model(encoder_outputs=states, attention_mask=batch()["attention_mask"], decoder_input_ids=WANTED)
    prefixed: Any = attach(FAMILIES["t5"].build(), load(_saved("prefix_tuning", tmp_path)))
    cache = active(prefixed, None)(**batch(), decoder_input_ids=WANTED, use_cache=True).past_key_values
    active(prefixed, "prefix_tuning")
    with pytest.raises(Unsupported, match="filled without the prompt"):
        prefixed(**batch(), decoder_input_ids=WANTED, past_key_values=cache)
    config = peft.MultitaskPromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=COUNT, num_tasks=2)
    peft.get_peft_model(FAMILIES["t5"].build(), config).save_pretrained(tmp_path / "both")
    with pytest.raises(Unsupported, match="encoder and a decoder"):
        load(tmp_path / "both")


def _saved(method: str, folder: Path) -> Path:
    theirs("t5", method, folder / method)
    return folder / method
