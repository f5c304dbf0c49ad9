"""The engine on an encoder and a decoder: rows come and go, and each says what it says alone on the ordinary
graphs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import transformers

from adapterpack import Session, chat, export, run, validate
from adapterpack.bundle.decoder_graph import DECODER
from adapterpack.bundle.manifest import graph_file, read_bundle
from adapterpack.errors import ConfigError, UnknownAdapter
from adapterpack.runtime.engine.engine import Engine
from adapterpack.runtime.engine.requests import Event
from adapterpack.runtime.generation.sampling import Sampling
from adapterpack.runtime.text.model_files import context_of
from adapterpack.tasks.task import MAIN

Make = Callable[..., Any]
pytestmark = pytest.mark.long  # two graphs each, traced

FAMILIES = ("t5", "bart", "whisper", "vit-mbart")
NAMES: list[str | None] = [None, "low-rank", "diagonal", "rotation"]


def inputs(session: Any, seed: int) -> dict[str, Any]:
    """What a request says: a ragged prompt, or features of speech."""
    dice = np.random.default_rng(seed)
    if "input_ids" in session.task.inputs:
        return {
            "prompt": [
                int(token)
                for token in dice.integers(3, 90, dice.integers(1, (context_of(session) or 150) + 1))
            ]
        }
    (name,) = session.task.parts[0].inputs  # speech or an image
    return {"features": {name: dice.standard_normal((1, *session.shape(name))).astype(np.float32)}}


def alone(session: Session, said: dict[str, Any], name: str | None, **options: Any) -> Any:
    (answer,) = session.generate(
        [said["prompt"]] if "prompt" in said else [], [name], given=said.get("features"), **options
    )
    return answer


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_says_what_it_says_alone(family: str, encoder_decoder_of: Make) -> None:
    """Adds, steps and cancellations in any order, on three rows; greedy and drawn: text, tokens, reason and
    digest are those of a run by itself on the ordinary graphs.
    """
    _, bundle, ordinary = encoder_decoder_of(family)
    engine, session, dice = (
        Engine(bundle, "cpu", max_rows=3, prefill_budget=40),
        Session(ordinary, "cpu"),
        random.Random(5),
    )
    asked: dict[int, tuple[int, str | None, dict[str, Any]]] = {}
    events: dict[int, list[Event]] = {}
    cancelled: set[int] = set()
    while len(asked) < 40 or engine.busy:
        action = dice.random()
        if action < 0.3 and len(asked) < 40:
            seed, name = dice.randrange(10**6), dice.choice(NAMES)
            options = {
                "max_new_tokens": dice.randrange(1, 9),
                **dice.choice([{}, {"temperature": 1.5, "seed": seed, "top_k": 9}]),
            }
            asked[engine.add(adapter=name, **inputs(session, seed), **options)] = seed, name, options
        elif action < 0.4 and asked:
            number = dice.choice([*asked][-3:])
            engine.cancel(number)
            cancelled.add(number)
        else:
            for event in engine.step():
                events.setdefault(event.request, []).append(event)
    assert events.keys() == asked.keys()
    broken = 0
    for number, (seed, name, options) in asked.items():
        expected, last = alone(session, inputs(session, seed), name, **options), events[number][-1]
        tokens = tuple(event.token for event in events[number] if event.token is not None)
        assert {event.adapter for event in events[number]} == {
            None if name is None else session.pack(name).id
        }
        if last.finish_reason == "cancelled":
            assert tokens == expected.ids[: len(tokens)]
            broken += 1
        else:
            assert (tokens, last.text, last.finish_reason) == (
                expected.ids,
                expected.text,
                expected.finish_reason,
            )
    assert broken and broken <= len(cancelled)
    assert engine.rows._sources._pool is None
    assert all(adapter.users == 0 for adapter in engine.adapters._resident.values())


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_rows_of_a_file_come_and_go(family: str, encoder_decoder_of: Make) -> None:
    """``run``, three rows at a time: each says what it says alone on the ordinary graphs, in the order of the
    rows.
    """
    _, bundle, ordinary = encoder_decoder_of(family)
    session = Session(ordinary, "cpu")
    rows = [{**inputs(session, seed), "adapter": NAMES[seed % 4], "id": seed} for seed in range(20)]
    answers = list(run(bundle, rows, provider="cpu", batch_size=3, max_new_tokens=6))
    assert [answer["id"] for answer in answers] == list(range(20))
    for answer in answers:
        expected = alone(session, answer, answer["adapter"], max_new_tokens=6)
        assert (answer["completion"], answer["finish_reason"]) == (expected.text, expected.finish_reason)
        assert (answer["prompt_tokens"], answer["completion_tokens"]) == (
            len(answer["prompt"]),
            len(expected.ids),
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_rows_among_others_are_those_of_rows_alone(family: str, encoder_decoder_of: Make) -> None:
    """1e-5 of the largest logit, rows of different lengths on both sides; the sources of a row follow it when
    another one leaves.
    """
    _, bundle, _ = encoder_decoder_of(family)
    together, single = (Engine(bundle, "cpu", max_rows=count) for count in (4, 1))
    packs = [None if name is None else together.bundle.pack(name) for name in NAMES]

    def row(engine: Engine, seed: int) -> Any:
        said = inputs(Session(bundle, "cpu"), seed)
        return engine.row(said.get("prompt", []), packs[seed], Sampling(), said.get("features")).sequences[0]

    rows = [row(together, seed) for seed in range(4)]
    for one in rows:
        together.rows.admit(one)
        together.rows.prefill(len(one.prompt))
        one.next_token = 7
        together.rows.decode()
    together.rows.remove(rows[0])
    logits = dict(zip(together.rows.running, together.rows.decode(), strict=True))
    for seed in range(1, 4):
        one = row(single, seed)
        single.rows.admit(one)
        single.rows.prefill(len(one.prompt))
        one.next_token = 7
        for _ in range(4 - seed):
            single.rows.decode()
        (expected,) = single.rows.decode()
        assert np.abs(logits[rows[seed]] - expected).max() <= 1e-5 * np.abs(expected).max()
        single.rows.remove(one)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_and_a_session_on_it(family: str, encoder_decoder_of: Make) -> None:
    """The proof is recorded; ``generate`` runs on the engine and says what the ordinary graphs say; the
    ordinary decoder is not opened.
    """
    _, bundle, ordinary = encoder_decoder_of(family)
    assert 0 < read_bundle(bundle).parity["decoder"]["max_relative"] < 1e-5
    assert not validate(bundle).findings
    graph = ir.load(bundle / graph_file(DECODER)).graph
    assert sum(node.op_type == "GroupQueryAttention" for node in graph) == 1
    names = {value.name for value in graph.inputs}
    assert {"input_ids", "position_ids"} <= names and not {"attention_mask", "decoder_input_ids"} & names
    placed, usual = Session(bundle, "cpu"), Session(ordinary, "cpu")
    said = [inputs(usual, seed) for seed in range(4)]
    prompts = [one["prompt"] for one in said if "prompt" in one]
    given = (
        None
        if prompts
        else {name: np.concatenate([one["features"][name] for one in said]) for name in said[0]["features"]}
    )
    assert placed.generate(prompts, NAMES, given=given, max_new_tokens=12) == usual.generate(
        prompts, NAMES, given=given, max_new_tokens=12
    )
    assert MAIN not in placed._opened
    if family == "bart":
        with pytest.raises(ConfigError, match="context"):
            Engine(placed).add([5] * 100)


def test_what_is_at_fault_ends_alone(encoder_decoder_of: Make) -> None:
    """Inputs that an encoder does not take are refused before a row begins; what fails on the way ends its
    row.
    """
    _, bundle, ordinary = encoder_decoder_of("whisper")
    engine, session = Engine(bundle, "cpu", max_rows=2), Session(ordinary, "cpu")
    for features in (
        {"input_features": np.zeros((1, 8, 3), np.float32)},
        {"pixel_values": np.zeros((1, 3, 4, 4), np.float32)},
    ):
        with pytest.raises(ConfigError, match="does not take this input"):
            engine.add(features=features)
    with pytest.raises(UnknownAdapter):
        engine.add(adapter="nobody", **inputs(session, 1))
    text, usual = (
        kind(folder, "cpu")
        for kind, folder in zip((Engine, Session), encoder_decoder_of("t5")[1:], strict=True)
    )
    good = text.add([9, 8, 7], "low-rank", max_new_tokens=5)
    bad = text.row([5, 10**6], None, Sampling())
    text.submit(bad)
    ends = {event.request: event for event in iter_events(text) if event.finish_reason}
    assert ends[bad.number].finish_reason == "error"
    assert ends[good].text == alone(usual, {"prompt": [9, 8, 7]}, "low-rank", max_new_tokens=5).text


def test_a_pack_is_loaded_while_rows_run(encoder_decoder_of: Make) -> None:
    """Its encoder's part, too; the canary is replayed through both graphs."""
    _, bundle, ordinary = encoder_decoder_of("t5")
    engine, session = Engine(bundle, "cpu"), Session(ordinary, "cpu")
    engine.adapters.load(session.pack("low-rank"), "again")
    number = engine.add([9, 8, 7], "again", max_new_tokens=6)
    (last,) = [event for event in iter_events(engine) if event.request == number and event.finish_reason]
    assert last.text == alone(session, {"prompt": [9, 8, 7]}, "low-rank", max_new_tokens=6).text


def iter_events(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    return events


@pytest.mark.parametrize("family", ["m2m_100", "longt5", "umt5", "marian"])
def test_other_builds_of_positions(family: str, tmp_path: Path) -> None:
    """Positions that leave padding out, a bias and a mask added one after the other, a bias for each layer,
    sines in a table.
    """
    sizes = {
        "vocab_size": 96,
        "d_model": 32,
        "decoder_start_token_id": 2,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    pair = {
        **sizes,
        **{
            f"{side}_{what}": count
            for side in ("encoder", "decoder")
            for what, count in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))
        },
        "max_position_embeddings": 64,
    }
    relative = {**sizes, "d_kv": 8, "d_ff": 48, "num_layers": 1 + (family == "umt5"), "num_heads": 4}
    config = transformers.AutoConfig.for_model(family, **(relative if "t5" in family else pair))
    transformers.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "base")
    bundle = export(
        tmp_path / "base", [], tmp_path / "bundle", mode="bank", slots=2, max_rank=2, in_place=True
    )
    assert 0 < bundle.parity["decoder"]["max_relative"] < 1e-5


def test_a_conversation_without_a_template_reads_each_message_alone(encoder_decoder_of: Make) -> None:
    """On the engine and on the ordinary graphs, with another adapter in the middle; an answer can be stopped."""
    for bundle in encoder_decoder_of("t5")[1:]:
        talk, session = chat(bundle, temperature=0, max_new_tokens=6), Session(bundle, "cpu")
        assert talk.note is not None
        for text, name in (("w20 w21 w22", "low-rank"), ("w30 w31", "diagonal"), ("w20 w21 w22", None)):
            talk.adapter = name
            (alone,) = session.generate([text], [name], max_new_tokens=6)
            assert talk.say(text)["completion"] == alone.text
        talk.say("w20 w21 w22", emit=lambda piece, talk=talk: talk.stop())
        assert talk.messages[-1]["content"] != alone.text
