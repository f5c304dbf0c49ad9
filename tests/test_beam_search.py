"""Beam search: the sequences and scores of transformers' own, of decoders and of encoders with a decoder,
each row with its adapter.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from invariants.bundles import Reference
from transformers import GenerationConfig

from adapterpack import Session, export
from adapterpack.cli.commands.run import command
from adapterpack.errors import ConfigError, FormatError
from adapterpack.runtime.engine.engine import Engine
from adapterpack.runtime.engine.requests import Event
from adapterpack.runtime.generation.sampling import Sampling, sampling_of
from adapterpack.tasks.task import get_task

Make = Callable[..., Any]
ENDS = (2, 9, 17, 33, 41, 58, 77)
"""Tiny random models seldom say one certain token."""
STOPS = {"stop_token_ids": ENDS}
CASES = 40


@pytest.fixture(scope="module")
def placed(base_of: Make, pack_of: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("beams") / "bundle"
    export(
        base_of("llama"),
        [pack_of("llama", name) for name in ("alpha", "beta")],
        folder,
        mode="bank",
        in_place=True,
    )
    return folder


@pytest.fixture(scope="module")
def models(
    placed: Path, encoder_decoder_of: Make, dense_of: Make, tmp_path_factory: pytest.TempPathFactory
) -> Make:
    """Family -> its bundle, and the models of transformers in float64 by the adapter that is folded into
    them.
    """

    def get(family: str) -> tuple[Path, dict[str | None, Any]]:
        if family == "llama":
            return placed, {name: dense_of("llama", name) for name in (None, "alpha", "beta")}
        base, bundle, _ = encoder_decoder_of(family)
        task, known = (
            get_task("text2text-generation"),
            {None: Reference(get_task("text2text-generation"), base)},
        )
        for name, pack in Session(bundle, "cpu").packs.items():
            known[name] = Reference(task, base, pack, tmp_path_factory.mktemp("folded") / name)
        return bundle, {name: reference.model for name, reference in known.items()}

    return get


def case(dice: random.Random) -> dict[str, Any]:
    """The parameters of one search."""
    beams = dice.randrange(2, 6)
    return {
        "num_beams": beams,
        "num_return_sequences": dice.randrange(1, beams + 1),
        "max_new_tokens": dice.randrange(1, 12),
        "length_penalty": dice.choice([-1.0, 0.0, 0.6, 1.0, 2.0]),
        "early_stopping": dice.choice([True, False, "never"]),
        **dice.choice(
            [
                {},
                {},
                {"repetition_penalty": 1.3},
                {"min_new_tokens": 1},
                {"no_repeat_ngram_size": 2, "min_length": 4},
                {
                    "forced_bos_token_id": 11,
                    "forced_eos_token_id": ENDS[0],
                    "begin_suppress_tokens": [12, 30],
                },
                {
                    "suppress_tokens": list(range(20, 60)),
                    "bad_words_ids": [[5, 6], *([token] for token in range(70, 90))],
                },
            ]
        ),
    }


def expected(model: Any, prompt: list[int], options: dict[str, Any]) -> list[tuple[tuple[int, ...], float]]:
    """transformers' sequences, without prompt and end token, and their scores."""
    start = getattr(model.config, "decoder_start_token_id", None)
    model.generation_config = GenerationConfig()  # what a base's says is no part of these cases
    config = GenerationConfig(
        **options,
        do_sample=False,
        eos_token_id=list(ENDS),
        pad_token_id=0,
        decoder_start_token_id=start,
        return_dict_in_generate=True,
        output_scores=True,
    )
    with torch.no_grad():
        found = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            generation_config=config,
        )
    before = len(prompt) if not model.config.is_encoder_decoder else 1
    rows = [row[before:] for row in found.sequences.tolist()]
    lengths = [next((at for at, token in enumerate(row) if token in ENDS), len(row)) for row in rows]
    answers = [
        (tuple(row[:length]), score)
        for row, length, score in zip(rows, lengths, found.sequences_scores.tolist(), strict=True)
    ]
    # where rules leave fewer than there are beams, transformers repeats some
    sequences = [sequence for sequence, _ in answers]
    return [answer for number, answer in enumerate(answers) if answer[0] not in sequences[:number]]


def ends_of(engine: Engine, steps: int | None = None) -> dict[int, Event]:
    """The last events of the requests that ended in so many steps, or until all have."""
    ends: dict[int, Event] = {}
    while engine.busy if steps is None else steps:
        ends |= {event.request: event for event in engine.step() if event.finish_reason}
        steps = None if steps is None else steps - 1
    return ends


@pytest.mark.sampled(3)
@pytest.mark.parametrize("family", ["llama", "t5", pytest.param("bart", marks=pytest.mark.long)])
def test_sequences_and_scores_are_those_of_transformers(family: str, models: Make) -> None:
    """Random searches beside each other and beside greedy rows in one pool, each with an adapter of its own:
    as transformers finds them one by one in float64.
    """
    bundle, known = models(family)
    engine, dice = Engine(bundle, "cpu", max_rows=8, prefill_budget=30), random.Random(7)
    asked, ends = {}, dict[int, Event]()
    for _ in range(CASES):
        prompt, name, options = (
            [dice.randrange(3, 90) for _ in range(dice.randrange(1, 20))],
            dice.choice(list(known)),
            case(dice),
        )
        asked[engine.add(prompt, name, **options, **STOPS)] = prompt, name, options
        if dice.random() < 0.3:
            engine.add(prompt[::-1], dice.choice(list(known)), max_new_tokens=6)
        ends |= ends_of(engine, dice.randrange(3))
    ends |= ends_of(engine)
    for number, (prompt, name, options) in asked.items():
        right, found = expected(known[name], prompt, options), ends[number]
        assert [one.ids for one in found.sequences] == [ids for ids, _ in right], (name, prompt, options)
        np.testing.assert_allclose(
            [one.score for one in found.sequences], [score for _, score in right], rtol=2e-4, atol=2e-5
        )
        assert (found.text, found.finish_reason) == (
            found.sequences[0].text,
            found.sequences[0].finish_reason,
        )
        assert found.adapter == (None if name is None else engine.bundle.pack(name).id)
    assert not engine.rows.running and all(
        adapter.users == 0 for adapter in engine.adapters._resident.values()
    )


def test_caches_are_copied_where_a_parent_changes(placed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A beam stays in its row for the first that goes on from it, and a row of the pool is written once a
    step at most.
    """
    engine, moves = Engine(placed, "cpu", max_rows=6), list[tuple[int, int]]()
    move = engine.rows._pool.move
    monkeypatch.setattr(engine.rows._pool, "move", lambda *places: (moves.append(places[:2]), move(*places)))
    parents = list[tuple[int, ...]]()
    request = engine.row([5, 6, 7], None, Sampling(num_beams=4, max_new_tokens=9, ignore_eos=True))
    advance = request.answer.advance

    def recorded(logits: Any) -> Any:
        taken = advance(logits)
        parents.append(taken.parents)
        return taken

    monkeypatch.setattr(request.answer, "advance", recorded)
    engine.submit(request)
    while engine.busy:
        before = len(moves)
        engine.step()
        if request.answer.reason is None:
            assert len(moves) - before == 4 - len(set(parents[-1]))
            assert len({target for _, target in moves[before:]}) == len(moves) - before
    assert len({len(set(step)) for step in parents}) > 1


def test_what_ends_a_search_ends_its_rows_alone(placed: Path) -> None:
    """It is cancelled while it waits, reads and runs; one of its beams fails: its rows are free again, and
    others go on.
    """
    engine, session = Engine(placed, "cpu", max_rows=4, prefill_budget=2), Session(placed, "cpu")
    (alone,) = session.generate([[8, 9]], ["beta"], max_new_tokens=40, ignore_eos=True)
    other = engine.add([8, 9], "beta", max_new_tokens=40, ignore_eos=True)
    engine.step()
    for steps in range(5):
        number = engine.add([5, 6, 7], "alpha", num_beams=3, max_new_tokens=20)
        waiting = engine.add([5, 6, 7], num_beams=2)
        ends_of(engine, steps)
        engine.cancel(number)
        engine.cancel(waiting)
        assert {event.finish_reason for event in ends_of(engine, 1).values()} == {"cancelled"}
        assert len(engine.rows) == 1
    request = engine.row([5, 6, 7], None, Sampling(num_beams=3, max_new_tokens=20))
    engine.submit(request)
    while len(request.sequences) < 3:
        ends_of(engine, 1)
    request.sequences[1].next_token = 10**6
    ends = ends_of(engine)
    assert ends[request.number].finish_reason == "error"
    assert (ends[other].text, ends[other].finish_reason) == (alone.text, alone.finish_reason)


def test_sessions_and_the_command_search(placed: Path, bundle_of: Make, tmp_path: Path) -> None:
    """The best sequence is the answer; several are given with their scores; stop texts end sequences."""
    session = Session(placed, "cpu")
    plain, mixed = (
        session.generate([[5, 6, 7], [8, 9]], names, num_beams=3, num_return_sequences=2, max_new_tokens=6)
        for names in (None, ["alpha", None])
    )
    assert [len(answer.sequences) for answer in plain] == [2, 2]
    assert mixed[1] == plain[1] and mixed[0].ids != plain[0].ids
    for answer in plain:
        assert (answer.text, answer.ids) == (answer.sequences[0].text, answer.sequences[0].ids)
        assert answer.sequences[0].score >= answer.sequences[1].score
    (stopped,) = session.generate([[5, 6, 7]], num_beams=3, max_new_tokens=6, stop=plain[0].text.split()[1])
    assert plain[0].text.split()[1] not in stopped.text
    with pytest.raises(ConfigError, match="before its end"):
        session.generate([[5]], num_beams=2, emit=lambda *event: None)
    ordinary = Session(bundle_of("llama", "bank"), "cpu").generate(
        [[5, 6, 7], [8, 9]], ["alpha", None], num_beams=3, num_return_sequences=2, max_new_tokens=6
    )
    assert [[one.ids for one in answer.sequences] for answer in ordinary] == [
        [one.ids for one in answer.sequences] for answer in mixed
    ]
    done = CliRunner().invoke(
        command, [str(placed), "--prompt", "w1 w2 w3", "--beams", "3", "--max-new-tokens", "6", "--json"]
    )
    assert json.loads(done.stdout)["completion"] == plain[0].text


@pytest.mark.fast
def test_parameters_of_a_search(tmp_path: Path) -> None:
    """What cannot be is refused by name; the model's file says what a caller leaves out, but nothing of a
    search with one beam.
    """
    for options, where in (
        ({"num_beams": 0}, "num_beams"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"early_stopping": True}, "early_stopping"),
        ({"num_beams": 2, "early_stopping": "often"}, "early_stopping"),
        ({"num_beams": 2, "temperature": 1.0}, "temperature"),
        ({"num_beams": 2, "logprobs": 1}, "logprobs"),
    ):
        with pytest.raises(ConfigError) as caught:
            Sampling(**options)
        assert caught.value.where == where
    config = {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "num_return_sequences": 2}
    assert sampling_of({}, config, tmp_path) == Sampling()
    assert sampling_of({"sampling": "model"}, config, tmp_path) == Sampling(**config)
    assert sampling_of({"sampling": "model", "num_beams": 1}, config, tmp_path) == Sampling()
    with pytest.raises(FormatError, match=r"generation_config\.json#temperature"):
        sampling_of({"sampling": "model"}, {**config, "do_sample": True}, tmp_path)


def test_a_search_needs_a_row_for_each_beam(placed: Path) -> None:
    with pytest.raises(ConfigError, match="a row for each beam"):
        Engine(placed, "cpu", max_rows=2).add([5], num_beams=3)
