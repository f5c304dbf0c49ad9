"""A draft guesses the tokens of a row: answers stay what they are, and come in fewer passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterpack import Engine, export
from adapterpack.errors import Unsupported

Make = Callable[..., Any]
NAMES = ("alpha", "beta")


@pytest.fixture(scope="module")
def bundles(pack_of: Make, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One base in float32 and in eight bits, with slots for two packs, and without any."""
    folder, packs = tmp_path_factory.mktemp("drafts"), [pack_of("llama", name) for name in NAMES]
    export(tiny_llama, packs, folder / "float", mode="bank")
    export(tiny_llama, packs, folder / "int8", mode="bank", quantize="int8")
    export(tiny_llama, [], folder / "bare", mode="folded", task="text-generation")
    return {name: folder / name for name in ("float", "int8", "bare")}


def _answers(engine: Engine, asked: list[tuple[list[int], str | None]], **options: Any) -> list[list[Any]]:
    """The tokens of requests that run one after another, with their log-probabilities, and the passes they took."""
    answers = []
    for prompt, name in asked:
        engine.add(prompt, name, **options)
        events, passes = [], 0
        while engine.busy:
            events += engine.step()
            passes += 1
        answers.append([[(one.token, one.finish_reason) for one in events], passes])
    return answers


@pytest.fixture(scope="module")
def asked() -> list[tuple[list[int], str | None]]:
    dice = np.random.default_rng(4)
    prompts = [dice.integers(4, 60, dice.integers(2, 20)).tolist() for _ in range(6)]
    return [(prompt, name) for prompt in prompts for name in (None, *NAMES)]


@pytest.mark.parametrize("draft", ["int8", "bare"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "seed": 3},
        {"repetition_penalty": 1.3},
        {"bad_words_ids": [[7], [9, 12]], "temperature": 0},
    ],
)
def test_answers_are_those_of_single_steps(
    bundles: dict[str, Path], asked: list[tuple[list[int], str | None]], draft: str, options: dict[str, Any]
) -> None:
    """Whatever the draft guesses: with the row's adapter in eight bits, or as the base."""
    fixed = {"max_new_tokens": 24, **options}
    plain = _answers(Engine(bundles["float"], "cpu", lookup_tokens=0), asked, **fixed)
    drafted = _answers(Engine(bundles["float"], "cpu", lookup_tokens=0, draft=bundles[draft]), asked, **fixed)
    assert [tokens for tokens, _ in drafted] == [tokens for tokens, _ in plain]


def test_it_guesses_with_the_rows_own_adapter(
    bundles: dict[str, Path], asked: list[tuple[list[int], str | None]]
) -> None:
    """Greedy answers take less than half as many passes; a draft that knows the base alone helps adapters less."""

    def passes(draft: str | None, name: str | None) -> int:
        engine = Engine(bundles["float"], "cpu", lookup_tokens=0, draft=draft and bundles[draft])
        some = [one for one in asked if one[1] == name]
        return sum(
            count for _, count in _answers(engine, some, max_new_tokens=24, temperature=0, ignore_eos=True)
        )

    for name in (None, *NAMES):
        assert 2 * passes("int8", name) < passes(None, name)
    assert passes("bare", None) < passes(None, None) / 2
    assert passes("int8", "alpha") < passes("bare", "alpha")


def test_rows_in_a_batch_take_single_steps_and_go_on_with_guesses(bundles: dict[str, Path]) -> None:
    """What was answered beside others is read by the draft in one pass once the row is alone."""
    engines = [
        Engine(bundles["float"], "cpu", lookup_tokens=0, draft=draft) for draft in (None, bundles["int8"])
    ]
    told = []
    for engine in engines:
        long = engine.add([5, 6, 7], "alpha", max_new_tokens=40, temperature=0, ignore_eos=True)
        engine.add([8, 9], "beta", max_new_tokens=9, temperature=0, ignore_eos=True)
        events = []
        while engine.busy:
            events += engine.step()
        told.append([event.token for event in events if event.request == long])
    assert told[0] == told[1]


def test_what_cannot_be_a_draft(bundles: dict[str, Path], bundle_of: Make) -> None:
    with pytest.raises(Unsupported, match="reads no token ahead"):
        Engine(bundles["float"], "cpu", draft=bundles["int8"], deterministic=True)
    with pytest.raises(Unsupported):
        Engine(bundles["float"], "cpu", draft=bundle_of("bert", "bank"))
