"""Tokens guessed from a row's own text: what is guessed, and that answers are those of single steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterpack import Engine, export
from adapterpack.runtime.generation.prompt_lookup import GuessLength, PassCosts, PromptLookup

Make = Callable[..., Any]
REPEATED = [5, 9, 22, 7, 31, 44] * 4


def test_guesses_follow_the_latest_run() -> None:
    """By the definition alone: the last three tokens, looked for from the end on; the guess is what came after
    them, round and round where that reaches the end.
    """
    rng = np.random.default_rng(0)
    for _ in range(300):
        tokens = [int(token) for token in rng.integers(0, 3, rng.integers(4, 30))]
        places = [at + 3 for at in range(len(tokens) - 3) if tokens[at : at + 3] == tokens[-3:]]
        expected = (tokens[places[-1] :] * 3)[:3] if places else []
        assert PromptLookup(tokens, 8).guess() == expected


def test_guesses_grow_shrink_and_stop() -> None:
    """All right: twice as many, up to the most. Few right: half. None right: as long a pause as there were
    failures, doubling.
    """
    lookup, lengths = PromptLookup(REPEATED * 4, 8), []
    for _ in range(4):
        lengths.append(len(lookup.guess()))
        lookup.length.judge(lengths[-1], lengths[-1])
    assert lengths == [3, 6, 8, 8]
    lookup.length.judge(8, 1)
    assert len(lookup.guess()) == 4
    pauses = []
    for _ in range(9):
        lookup.length.judge(4, 0)
        pauses.append(0)
        while not lookup.guess():
            pauses[-1] += 1
    assert pauses == [1, 3, 7, 15, 31, 63, 64, 64, 64]
    lookup.length.judge(1, 1)
    assert lookup.guess()


def test_costs_are_those_of_the_passes_so_far() -> None:
    """Seconds along a line, with noise: the worth of a guess is the share of its cost in that of a token without
    it. Nothing is known of passes that all had as many tokens, and earlier passes are forgotten.
    """
    rng, costs = np.random.default_rng(1), PassCosts()
    for _ in range(50):
        costs.add(8, 0.016)
    assert costs.worth(8) == 0.0
    for start, each in ((0.012, 0.0006), (0.0, 0.002), (0.02, 0.0)):
        for _ in range(400):
            tokens = int(rng.integers(8, 40))
            costs.add(tokens, (start + each * tokens) * rng.uniform(0.95, 1.05))
        assert costs.worth(8) == pytest.approx(8 * each / (start + 8 * each), abs=0.05)


def test_a_guess_is_as_long_as_it_is_worth() -> None:
    """By the share of tokens that were right of late; a row that guesses nothing tries again later."""
    length = GuessLength(8)
    for _ in range(8):
        length.judge(4, 4)
    assert [length.next(worth) for worth in (0.0, 0.5, 0.99, 1.1)] == [8, 8, 0, 0]
    for _ in range(8):
        length.judge(4, 2)  # two of three tries are right
    assert [length.next(worth) for worth in (0.0, 0.25, 0.5, 0.6)] == [8, 3, 1, 1]
    for _ in range(8):
        length.judge(4, 1)
    waits = 1
    while not length.next(0.6):
        waits += 1
    assert 1 < waits < 30


@pytest.fixture(scope="module")
def bundle(pack_of: Make, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lookup") / "bundle"
    packs = [pack_of("llama", name) for name in ("alpha", "beta")]
    export(tiny_llama, packs, out, mode="bank", in_place=True)
    return out


def _answer(bundle: Path, guesses: int, prompt: list[int], name: str | None, **options: Any) -> Any:
    """The events of one request that runs alone, and how many steps it took."""
    engine = Engine(bundle, "cpu", lookup_tokens=guesses)
    number, events, steps = engine.add(prompt, name, **options), [], 0
    while engine.busy:
        events += engine.step()
        steps += 1
    assert {event.request for event in events} == {number}
    return events, steps


@pytest.mark.parametrize("name", [None, "alpha", "beta"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logit_bias": {7: 100.0}},
        {"temperature": 1.0, "seed": 3},
        {"repetition_penalty": 1.3, "logprobs": 2},
        {"temperature": 0.5, "top_p": 0.9, "seed": 8, "frequency_penalty": 0.2},
    ],
)
def test_answers_are_those_of_single_steps(bundle: Path, name: str | None, options: dict[str, Any]) -> None:
    """Token by token, event by event, with log-probabilities within float noise; never in more steps, and in a
    few where the answer repeats itself.
    """
    for seed in range(3):
        prompt = [*REPEATED] + [int(token) for token in np.random.default_rng(seed).integers(3, 96, 5)]
        wanted = {"max_new_tokens": 40, "ignore_eos": True, **options}
        (single, steps), (ahead, fewer) = (
            _answer(bundle, guesses, prompt, name, **wanted) for guesses in (0, 8)
        )
        assert [event.token for event in ahead] == [event.token for event in single]
        assert [event.finish_reason for event in ahead] == [event.finish_reason for event in single]
        for one, other in zip(single, ahead, strict=True):
            if one.choice is not None and one.choice.logprob is not None:
                assert other.choice.logprob == pytest.approx(one.choice.logprob, abs=1e-4)
        assert fewer <= steps
    if "logit_bias" in options:
        assert fewer < 0.4 * steps


def test_a_row_ends_within_a_guess(bundle: Path) -> None:
    """An end that lies among guessed tokens ends the answer there, and the next row reads a clean cache."""
    (free, _) = _answer(bundle, 0, REPEATED, "alpha", max_new_tokens=40, ignore_eos=True)
    tokens = [event.token for event in free if event.token is not None]
    last = tokens[-1]
    for guesses in (0, 8):
        events, _ = _answer(
            bundle, guesses, REPEATED, "alpha", max_new_tokens=40, stop_token_ids=[last], ignore_eos=True
        )
        assert events[-1].finish_reason == "stop"
        assert sum(event.token is not None for event in events) <= tokens.index(last) + 1
    engine = Engine(bundle, "cpu", lookup_tokens=8)
    found = []
    for _ in range(2):
        engine.add(REPEATED, "alpha", max_new_tokens=40, ignore_eos=True)
        taken = []
        while engine.busy:
            taken += [event.token for event in engine.step() if event.token is not None]
        found.append(taken)
    assert found == [tokens, tokens]
