"""What was read before is not read again: the same logits, whatever adapters act where."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import adapterpack as ap
from adapterpack.runtime.engine.engine import Engine
from adapterpack.runtime.engine.prefix_cache import BLOCK
from adapterpack.runtime.engine.requests import SequenceState

Make = Callable[..., Any]
INVOCATION = (7, 8)


@pytest.fixture(scope="module")
def bundle(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA, five activated ones, one that acts at a prompt's ends, and one with a prompt of its own."""
    folder = tmp_path_factory.mktemp("reuse")
    configs: dict[str, Any] = {
        "lora": ap.LoRA(r=2),
        "ends": ap.LoReFT(r=2, positions="f2+l1"),
        "soft": ap.PromptTuning(num_virtual_tokens=3),
    }
    configs |= {
        f"activated{number}": ap.ALoRA(r=3, alpha=5, alora_invocation_tokens=INVOCATION)
        for number in range(5)
    }
    for seed, (name, config) in enumerate(configs.items()):
        model = ap.adapt(AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), config, name)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=noise))
        ap.save(model, folder / name, base=tiny_llama)
    ap.export(tiny_llama, [folder / name for name in configs], folder / "bundle", mode="bank", in_place=True)
    return folder / "bundle"


def answer(
    engine: Engine, prompt: list[int], name: str | None, steps: int = 2, salt: bytes = b""
) -> np.ndarray:
    """The logits after a prompt and a few steps."""
    adapter = None if name is None else engine.adapters.acquire(engine.adapters.pack(name))
    row = SequenceState(prompt=prompt, adapter=adapter, salt=salt)
    engine.rows.admit(row)
    engine.rows.next_to_read()
    logits = [engine.rows.prefill(len(prompt) - row.num_computed_tokens).copy()]
    for token in range(9, 9 + steps):
        row.next_token = token
        logits.append(engine.rows.decode()[0])
    engine.rows.remove(row)
    return np.stack(logits)


def conversation(length: int = 2 * BLOCK + 5) -> list[int]:
    dice = random.Random(3)
    return [dice.choice([3, 4, 5, 6, 9, 11]) for _ in range(length)]


def test_what_a_prompt_has_in_common_with_one_before_is_not_read_again(bundle: Path) -> None:
    """The whole blocks of the same tokens and adapter are known; of another adapter, or with a token changed
    at the beginning, none is.
    """
    fresh, reusing = (Engine(bundle, "cpu", max_rows=2, prefix_budget=budget) for budget in (0, 1 << 24))
    prompt = conversation()
    whole = len(prompt) // BLOCK * BLOCK
    cases: list[tuple[str | None, list[int], int]] = [
        (None, prompt, 0),
        (None, prompt, whole),
        ("lora", prompt, 0),
        ("lora", prompt, whole),
        (None, [20, *prompt[1:]], 0),
        (None, [*prompt[:BLOCK], 5, 6], BLOCK),
        (None, prompt[:BLOCK], 0),
        ("soft", prompt, 0),
        ("soft", prompt, whole),
        ("ends", prompt, 0),
        ("ends", [*prompt[:-1], 3], whole),
    ]
    for name, tokens, known in cases:
        before = reusing.rows.reused
        one, two = answer(fresh, tokens, name), answer(reusing, tokens, name)
        assert reusing.rows.reused - before == known, (name, known)
        assert np.abs(one - two).max() <= 1e-5 * np.abs(one).max()


@pytest.mark.parametrize("name", [None, "lora", "soft"])
def test_rows_of_another_salt_share_nothing(name: str | None, bundle: Path) -> None:
    """The time that a prompt takes tells nobody whether somebody else has sent its beginning."""
    engine, prompt = Engine(bundle, "cpu", max_rows=2, prefix_budget=1 << 24), conversation()
    known = []
    for salt in (b"a" * 32, b"b" * 32, b"a" * 32):
        before = engine.rows.reused
        answer(engine, prompt, name, salt=salt)
        known.append(engine.rows.reused - before)
    assert known == [0, 0, len(prompt) // BLOCK * BLOCK]


def test_activated_adapters_share_one_reading_of_a_conversation(bundle: Path) -> None:
    """Five aLoRAs are invoked behind one conversation: the base's keys and values of it are read once, a
    quarter of the tokens in all, and the logits are those of readings by themselves.
    """
    fresh, reusing = (Engine(bundle, "cpu", max_rows=2, prefix_budget=budget) for budget in (0, 1 << 24))
    for number in range(5):
        prompt = [*conversation(3 * BLOCK), *INVOCATION, 5, 6]
        one, two = (answer(engine, prompt, f"activated{number}") for engine in (fresh, reusing))
        assert np.abs(one - two).max() <= 1e-5 * np.abs(one).max()
    assert fresh.rows.prefilled >= 3 * reusing.rows.prefilled
    # only the last invocation counts
    twice = [*conversation(BLOCK), *INVOCATION, *conversation(BLOCK), *INVOCATION, 3]
    one, two = (answer(engine, twice, "activated0") for engine in (fresh, reusing))
    assert np.abs(one - two).max() <= 1e-5 * np.abs(one).max()


def test_an_answer_is_known_when_the_conversation_goes_on(bundle: Path) -> None:
    engine = Engine(bundle, "cpu", max_rows=2)
    prompt = conversation(BLOCK)
    number = engine.add(prompt, "lora", max_new_tokens=BLOCK + 1, ignore_eos=True)
    made: list[int] = []
    while engine.busy:
        made += [
            event.token for event in engine.step() if event.request == number and event.token is not None
        ]
    before = engine.rows.reused
    engine.add([*prompt, *made, 5], "lora", max_new_tokens=1)
    while engine.busy:
        engine.step()
    assert engine.rows.reused - before == 2 * BLOCK


def test_no_more_is_kept_than_the_budget(bundle: Path) -> None:
    """The blocks of the prompt that was read last are kept, from its beginning."""
    engine = Engine(bundle, "cpu", max_rows=1)
    answer(engine, conversation(), None)
    size = engine.rows.prefixes.nbytes
    small = Engine(bundle, "cpu", max_rows=1, prefix_budget=size // 2)
    for start in range(4):
        prompt = [start + 20, *conversation()]
        answer(small, prompt, None)
        assert 0 < small.rows.prefixes.nbytes <= size // 2
        before = small.rows.reused
        answer(small, prompt, None)
        assert small.rows.reused - before == BLOCK


@pytest.mark.parametrize("kind", [pytest.param("lfm2", marks=pytest.mark.long), "mamba"])
def test_states_are_kept_where_prompts_end_and_where_they_part(kind: str, tmp_path: Path) -> None:
    """A prompt that goes on, and a third one with the same beginning, go on from the states there; with and
    without keys beside them.
    """
    config = {
        "lfm2": transformers.Lfm2Config(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            layer_types=["conv", "full_attention"],
            max_position_embeddings=128,
        ),
        "mamba": transformers.MambaConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=2
        ),
    }[kind]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    ap.export(tmp_path / "base", [], tmp_path / "bundle", mode="folded", in_place=True)
    fresh, reusing = (
        Engine(tmp_path / "bundle", "cpu", max_rows=2, prefix_budget=budget) for budget in (0, 1 << 24)
    )
    shared, whole = conversation(BLOCK + 3), conversation(3 * BLOCK + 1)
    cases = (
        (whole, 0),
        (whole, 3 * BLOCK),
        ([*whole, 7, 8, 7], 3 * BLOCK),
        ([*shared, 20, *conversation(BLOCK)], 0),  # whose beginning has no states yet
        ([*shared, 21, *conversation(2 * BLOCK)], BLOCK),
        ([*shared, 21, *conversation(BLOCK), 7], BLOCK),
        ([*shared, 21, *conversation(BLOCK), 8], 2 * BLOCK),
    )
    for prompt, known in cases:
        before = reusing.rows.reused
        one, two = (answer(engine, prompt, None) for engine in (fresh, reusing))
        assert reusing.rows.reused - before == known
        assert np.abs(one - two).max() <= 1e-5 * np.abs(one).max()
    small = Engine(tmp_path / "bundle", "cpu", prefix_budget=reusing.rows.prefixes.nbytes // 4)
    for prompt, _ in cases:
        one, two = (answer(engine, prompt, None) for engine in (fresh, small))
        assert 0 < small.rows.prefixes.nbytes <= small.rows.prefixes.budget
        assert np.abs(one - two).max() <= 1e-5 * np.abs(one).max()
