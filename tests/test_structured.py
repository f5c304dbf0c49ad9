"""Answers of a given form: a real tokenizer, a model that knows nothing, and every answer is what schema,
expression or grammar says.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner

from adapterpack import Session, export
from adapterpack.cli.commands.run import command
from adapterpack.errors import ConfigError, MissingExtra, Unsupported
from adapterpack.runtime.engine.engine import DecoderEngine
from adapterpack.runtime.engine.requests import Event
from adapterpack.runtime.generation import structured
from adapterpack.runtime.generation.answer import AnswerRequest
from adapterpack.runtime.generation.beam_search import BeamAnswer
from adapterpack.runtime.generation.sampler import Sampler
from adapterpack.runtime.generation.sampling import Sampling
from adapterpack.runtime.generation.structured import MaskQueue, grammar_mask
from adapterpack.runtime.text.tokenizer import Tokenizer

ORDER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "item": {"enum": ["mug", "plate", "größe 🫖"]},
        "quantity": {"type": "integer", "minimum": 1, "maximum": 999},
        "note": {"type": "string", "maxLength": 12},
        "paid": {"type": ["boolean", "null"]},
        "address": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["zip"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["item", "quantity", "paid", "address", "tags"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": "string", "maxLength": 4}},
}
DATE = r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-[0-3][0-9]"
LARK = 'start: expr\nexpr: NUMBER | "(" expr OP expr ")"\nOP: "+" | "*"\nNUMBER: /[0-9]{1,3}/'
GBNF = 'root ::= item ("," item){0,3}\nitem ::= [a-z]{2,4}'


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer(smollm2)


@pytest.fixture(scope="module")
def session(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A random model of one narrow layer with the tokens of a real one, and more logits than tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(5)
    base, folder = tmp_path_factory.mktemp("models") / "random", tmp_path_factory.mktemp("bundles") / "random"
    config = LlamaConfig(
        vocab_size=49_280,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(smollm2 / name, base)
    export(base, [], folder, mode="bank")
    return Session(folder, "cpu")


def valid(fields: dict[str, Any], text: str) -> bool:
    ((kind, form),) = fields.items()
    if kind == "json_schema":
        jsonschema.validate(json.loads(text), form)
        return True
    expression = {
        "regex": str(form),
        "grammar": r"[0-9()+*]+" if form is LARK else r"[a-z]{2,4}(,[a-z]{2,4}){0,3}",
    }[kind]
    return re.fullmatch(expression, text) is not None and (
        form is not LARK or isinstance(eval(re.sub(r"\b0+(?=\d)", "", text)), int)
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"json_schema": ORDER},
        {
            "json_schema": {
                "type": "array",
                "items": {"type": "number", "minimum": 0, "maximum": 1},
                "maxItems": 3,
            }
        },
        {"regex": DATE},
        {"grammar": LARK},
        {"grammar": GBNF},
    ],
    ids=["object", "array", "regex", "lark", "gbnf"],
)
def test_every_answer_has_the_form(fields: dict[str, Any], session: Session) -> None:
    """Sixteen answers of a random model, drawn from nearly even chances: each is a text of the form, and ends
    by itself.
    """
    answers = session.generate(["go"] * 16, max_new_tokens=400, temperature=1.0, seed=2, **fields)
    ended = [answer for answer in answers if answer.finish_reason == "stop"]
    assert len(ended) >= 12, "an expression that nests at random may have no end"
    assert all(valid(fields, answer.text) for answer in ended)
    assert len({answer.text for answer in ended}) > 8
    greedy = session.generate(["go", "on"], max_new_tokens=400, json_schema=ORDER)
    assert [answer.finish_reason for answer in greedy] == ["stop", "stop"]
    jsonschema.validate(json.loads(greedy[0].text), ORDER)


def test_rows_with_and_without_a_form(tokenizer: Tokenizer) -> None:
    """One call for rows of different forms: each chooses what it chooses alone, and an end token only where
    its text may end.
    """
    forms: list[dict[str, Any]] = [
        {},
        {"json_schema": {}},
        {"regex": "[ab]{3}"},
        {"regex": "x*"},
        {"json_schema": json.dumps(ORDER)},
    ]
    logits = np.random.default_rng(0).standard_normal((12, len(forms), 49_280)).astype(np.float32)
    logits[:, :, 2] = 50  # the end token, wherever it may be

    def rows() -> list[Sampler]:
        options = [Sampling(temperature=0.5, logprobs=1, **form) for form in forms]
        return [
            Sampler(option, ends=[2], mask=grammar_mask(tokenizer, option), stream=row)
            for row, option in enumerate(options)
        ]

    together, alone = rows(), rows()
    chosen: list[list[int]] = [[] for _ in forms]
    for step in logits:
        going = [row for row in range(len(forms)) if 2 not in chosen[row] and not together[row].finished]
        choices = [together[row].next(step[row]) for row in going]
        assert choices == [alone[row].next(step[row]) for row in going]
        for row, choice in zip(going, choices, strict=True):
            chosen[row].append(choice.token)
    assert chosen[0] == chosen[3] == [2], "free, or where nothing is a text of the form"
    assert tokenizer.decode(chosen[2]) in {a + b + c for a in "ab" for b in "ab" for c in "ab"}
    assert together[2].finished
    assert 2 not in chosen[4] and 2 not in chosen[1][:1]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"json_schema": {"not": {"type": "string"}}}, "Unimplemented keys"),
        ({"json_schema": {"not": {"type": "string"}, "x-guidance": {"lenient": True}}}, "Unimplemented keys"),
        ({"json_schema": {"type": "string", "format": "nonsense"}}, "Unknown format"),
        ({"json_schema": "{"}, "json_schema"),
        ({"json_schema": {"$ref": "http://example.org/schema"}}, "not present"),
        ({"json_schema": {"enum": [float("nan")]}}, "json_schema"),
        ({"json_schema": {"$ref": "#"}}, "json_schema"),
        ({"json_schema": "false"}, "json_schema"),
        ({"json_schema": 7}, "json_schema"),
        ({"json_schema": {"enum": [object()]}}, "not a JSON schema"),
        ({"json_schema": {"const": "x" * 200_000}}, "too long"),
        ({"json_schema": "[" * 100_000}, "recursion"),
        ({"regex": "(?=a)b"}, "look-ahead"),
        ({"regex": "("}, "regex"),
        ({"regex": 5}, "must be a text"),
        ({"regex": "(" * 50_000 + ")" * 50_000}, "regex"),
        ({"grammar": "start: nothing"}, "nothing"),
        ({"grammar": "start: " + "(" * 9000}, "nested"),
        (
            {
                "grammar": "\n".join(f"r{i}: r{i + 1}" for i in range(7000)).replace("r0", "start", 1)
                + '\nr7000: "a"'
            },
            "compiled",
        ),
        (
            {
                "grammar": "start: T0\n"
                + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(40))
                + '\nT40: "a"'
            },
            "too big",
        ),
        ({"regex": "a", "grammar": 'start: "a"'}, "one form"),
        ({"regex": "a", "min_new_tokens": 2}, "min_new_tokens"),
        ({"json_schema": {}, "ignore_eos": True}, "ignore_eos"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_refused(fields: dict[str, Any], words: str, tokenizer: Tokenizer) -> None:
    """Schemas, expressions and grammars that are none, ask for what cannot be enforced, or would bring the
    process down.
    """
    with pytest.raises(ConfigError, match=words):
        grammar_mask(tokenizer, Sampling(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"grammar": 'start: x\nx: "a" x x x x x x x x x x x x x | "a" | x x x | x x'},
        {"regex": "(.*a.{20}|.*b.{21}|.*c.{22}){1,50}"},
        {"regex": "(((a{1,1000}){1,1000}){1,1000}){1,1000}"},
    ],
    ids=["ambiguous", "states", "nested"],
)
def test_a_form_that_grows_too_large_ends_its_own_row(fields: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Grammars that compile, and whose steps grow without end: the row has an error by name; a row at its
    side goes on.
    """
    options = Sampling(temperature=1.0, **fields)
    rows = [
        Sampler(options, mask=grammar_mask(tokenizer, options)),
        Sampler(Sampling(temperature=1.0)),
    ]
    logits = np.random.default_rng(0).standard_normal((2, 49_152)).astype(np.float32)
    logits[:, 2] = -1000  # no end
    with pytest.raises(ConfigError, match=next(iter(fields))):
        for _ in range(400):
            rows[1].next(logits[1])
            rows[0].next(logits[0])
    assert rows[1].next(logits[1]).token >= 0


def test_a_slow_step_ends_its_row(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "STEP", 0.0)
    with pytest.raises(ConfigError, match="takes too long"):
        grammar_mask(tokenizer, Sampling(regex="[a-z]+"))


def test_the_form_as_an_option(session: Session, tmp_path: Path) -> None:
    """``adapterpack run --json-schema F.json``; a file that is no schema is an error that names the option's
    parameter.
    """
    (tmp_path / "order.json").write_text(json.dumps(ORDER), "utf-8")
    options = ["--prompt", "go", "--max-new-tokens", "400", "--temperature", "1", "--json"]
    done = CliRunner().invoke(
        command, [str(session.folder), "--json-schema", str(tmp_path / "order.json"), *options]
    )
    jsonschema.validate(json.loads(json.loads(done.stdout)["completion"]), ORDER)
    (tmp_path / "order.json").write_text("[]")
    with pytest.raises(ConfigError, match="json_schema"):
        CliRunner().invoke(
            command,
            [str(session.folder), "--json-schema", str(tmp_path / "order.json"), *options],
            catch_exceptions=False,
        )


def test_what_cannot_have_a_form(
    tiny_llama: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer whose tokens are no bytes, one that may take any time for a text, an environment without
    the extra.
    """
    with pytest.raises(Unsupported, match="given form"):
        grammar_mask(Tokenizer(tiny_llama), Sampling(regex="a"))
    content = json.loads(tokenizer.path.read_text("utf-8"))
    content["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(Unsupported, match="any time"):
        grammar_mask(Tokenizer(tmp_path), Sampling(regex="a"))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtra, match=r"adapterpack\[structured\]"):
        grammar_mask(tokenizer, Sampling(regex="a"))


def test_every_beam_of_a_search_has_the_form(tokenizer: Tokenizer) -> None:
    """Random logits, four beams: each of the best sequences is of the form, with penalties, too, and ends
    where nothing can follow.
    """
    dice = np.random.default_rng(4)
    for fields in ({"regex": DATE}, {"grammar": GBNF}, {"regex": DATE, "repetition_penalty": 1.5}):
        options = Sampling(**fields, num_beams=4, num_return_sequences=4, max_new_tokens=30)  # type: ignore[arg-type]
        answer = BeamAnswer(
            AnswerRequest(tokenizer, options, [1, 2, 3], 30, mask=grammar_mask(tokenizer, options))
        )
        while answer.reason is None:
            answer.advance([dice.standard_normal(49_280).astype(np.float32)] * 4)
        form = {name: form for name, form in fields.items() if name != "repetition_penalty"}
        assert len(answer.sequences) == 4
        assert all(valid(form, one.text) and one.finish_reason == "stop" for one in answer.sequences)
        assert len({one.text for one in answer.sequences}) > 1


def drained(engine: DecoderEngine, rows: list[Any]) -> dict[int, list[Event]]:
    """The events of each row, once all have ended."""
    events: dict[int, list[Event]] = {row.number: [] for row in rows}
    for row in rows:
        engine.submit(row)
    while engine.busy:
        for event in engine.step():
            events[event.request].append(event)
    return events


def test_a_slow_grammar_keeps_no_other_row_waiting(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the next masks of a grammar are computed, however long that takes, a row without a form makes all
    of its tokens; then the grammar's rows go on.
    """
    monkeypatch.setattr(structured, "SLOW", -1.0)
    go = threading.Event()

    class Held(MaskQueue):
        def submit(self, compute: Callable[[], bytes]) -> Future[bytes]:
            return super().submit(lambda: compute() if go.wait(120) else b"")

    engine = DecoderEngine(session.folder, "cpu", max_rows=5, max_length=256)
    options = {"temperature": 1.0, "max_new_tokens": 120}
    slow = Sampling(grammar=('start: x\nx: x x | "a" | "b" | "ab" | "ba"'), logit_bias={2: -100.0}, **options)  # type: ignore[arg-type]
    plain = Sampling(ignore_eos=True, **options)  # type: ignore[arg-type]
    mask = grammar_mask(session.tokenizer, slow, queue=Held())
    assert mask is not None
    rows = [engine.row([5, 6], None, slow, None, place, mask.copy()) for place in range(4)]
    rows.append(engine.row([5, 6], None, plain))
    made = dict.fromkeys((row.number for row in rows), 0)

    def step() -> bool:
        events = engine.step()
        for event in events:
            made[event.request] += 1
        return any(event.finish_reason is not None for event in events)

    for row in rows:
        engine.submit(row)
    while not step():
        pass
    *others, own = made.values()
    assert own == 120
    assert all(0 < count < 3 for count in others), others
    go.set()
    while min(made.values()) < 5:
        step()
    for row in rows:
        engine.cancel(row.number)
    while engine.busy:
        engine.step()


@pytest.mark.parametrize("fields", [{"regex": "[a-z]{3,20}"}, {"json_schema": ORDER}, {"grammar": LARK}])
def test_masks_beside_the_steps_choose_the_same_tokens(
    fields: dict[str, Any], session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever they are ready: rows that repeat a step say what they say where nobody waits for anything."""
    monkeypatch.setattr(structured, "SLOW", -1.0)
    engine = DecoderEngine(session.folder, "cpu", max_rows=3, max_length=512)
    sampling = Sampling(temperature=1.0, seed=7, max_new_tokens=60, **fields)
    texts = []
    for queue in (None, MaskQueue()):
        mask = grammar_mask(session.tokenizer, sampling, queue=queue)
        assert mask is not None
        rows = [engine.row([5, 6, number], None, sampling, None, number, mask.copy()) for number in range(5)]
        events = drained(engine, rows)
        assert all(said[-1].finish_reason in ("stop", "length") for said in events.values())
        texts.append([said[-1].text for said in events.values()])
    assert texts[0] == texts[1]
