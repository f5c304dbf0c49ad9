"""Generation: tokens equal transformers' own greedy decoding, rows of a batch equal single rows; sampling,
stops.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adapterpack
from adapterpack import Session
from adapterpack.bundle.manifest import read_bundle
from adapterpack.errors import ConfigError, UnknownAdapter, Unsupported
from adapterpack.runtime.padding import pad
from adapterpack.runtime.text.tokenizer import Tokenizer
from adapterpack.tasks.task import MAIN

Make = Callable[..., Any]
PROMPTS: list[list[int]] = [[5, 6, 7, 30, 31], [8, 9], [10, 11, 12, 13, 14, 15, 16], [60]]
NAMES: list[str | None] = ["alpha", None, "beta", "alpha"]
TOKENS = 16


@pytest.fixture(scope="module")
def session(bundle_of: Make) -> Session:
    return Session(bundle_of("llama", "bank"), "cpu")


def greedy(
    model: Any, prompts: list[list[int]], eos: list[int] | None = None, tokens: int = TOKENS
) -> list[tuple[int, ...]]:
    """New token ids by transformers' ``generate(do_sample=False)`` on a float32 copy's left-padded batch, the
    end token left out.
    """
    batch = pad(prompts, 0, left=True)
    eos = eos or [2]
    with torch.no_grad():
        output = model.generate(
            **{key: torch.from_numpy(value) for key, value in batch.items()},
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=eos,
        )
    rows = output[:, batch["input_ids"].shape[1] :].tolist()
    return [
        tuple(row[: next((at for at, token in enumerate(row) if token in eos), len(row))]) for row in rows
    ]


@pytest.mark.parametrize("mode", ["bank", "inputs", "folded"])
def test_greedy_tokens_equal_transformers(mode: str, bundle_of: Make, dense_of: Make) -> None:
    """The same ids for the base and each adapter, on ragged prompts in one batch, against the float64 model
    with W + s B A.
    """
    session = Session(bundle_of("llama", mode), "cpu")
    for name in ("alpha",) if mode == "folded" else (None, "alpha", "beta"):
        found = session.generate(PROMPTS, name, max_new_tokens=TOKENS)
        assert [answer.ids for answer in found] == greedy(dense_of("llama", name), PROMPTS)
        assert all(answer.adapter == name for answer in found)
        assert [answer.prompt_tokens for answer in found] == [len(prompt) for prompt in PROMPTS]
        assert [answer.finish_reason for answer in found] == [
            "length" if len(answer.ids) == TOKENS else "stop" for answer in found
        ]


@pytest.mark.parametrize("mode", ["bank", "inputs"])
def test_a_mixed_batch_equals_single_rows(mode: str, bundle_of: Make) -> None:
    """generate(prompts, names)[i] == generate([prompt_i], [name_i]), in every field, and once more in another
    order.
    """
    session = Session(bundle_of("llama", mode), "cpu")
    together = session.generate(PROMPTS, NAMES, max_new_tokens=TOKENS)
    assert together == [
        session.generate([prompt], [name], max_new_tokens=TOKENS)[0]
        for prompt, name in zip(PROMPTS, NAMES, strict=True)
    ]
    assert together[::-1] == session.generate(PROMPTS[::-1], NAMES[::-1], max_new_tokens=TOKENS)
    assert len({answer.ids for answer in together}) == len(PROMPTS)


def test_the_end_token_ends_a_row(
    bundle_of: Make, dense_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an end token that greedy decoding meets, rows end before it, each at its own step, as under
    transformers; others run on.
    """
    plain = greedy(dense_of("llama", "alpha"), PROMPTS)
    end = plain[0][4]
    folder = Path(shutil.copytree(bundle_of("llama", "bank"), tmp_path / "bundle"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 3]}))
    read_bundle(folder).write(folder)
    found = Session(folder, "cpu").generate(PROMPTS, "alpha", max_new_tokens=TOKENS)
    assert [answer.ids for answer in found] == greedy(dense_of("llama", "alpha"), PROMPTS, [end, 3])
    assert found[0].ids == plain[0][: plain[0].index(end)]
    assert found[0].finish_reason == "stop"
    assert end not in [token for answer in found for token in answer.ids]
    session, calls = Session(folder, "cpu"), []
    graph = session.graph(MAIN)
    call = graph.call
    monkeypatch.setattr(graph, "call", lambda feeds: calls.append(1) or call(feeds))
    session.generate(PROMPTS[:1], "alpha", max_new_tokens=TOKENS)
    assert len(calls) == len(found[0].ids) + 1, "nothing runs after the last row has ended"
    for name, expected in (
        ("generation_config.json", frozenset({end, 3})),
        ("config.json", frozenset({2})),
        (None, frozenset()),
    ):
        assert Tokenizer(folder).eos_ids == expected  # the generation config counts, where it says one
        if name:
            (folder / name).write_text("{}")


def test_stop_texts_end_a_row_and_are_cut_off(session: Session) -> None:
    """A stop text that is met ends its row there, within a token or across tokens; the earliest counts; a
    plain text is one stop text.
    """
    (whole,) = session.generate([PROMPTS[0]], "alpha", max_new_tokens=TOKENS)
    words = whole.text.split(" ")
    assert len(words) > 8
    across = f"{words[3][-1]} {words[4]}"
    for stop in (across, (words[7], across), (across, "not there")):
        (found,) = session.generate([PROMPTS[0]], "alpha", max_new_tokens=TOKENS, stop=stop)
        first = stop if isinstance(stop, str) else min(stop, key=lambda text: whole.text.find(text) % 1000)
        assert found.text == whole.text[: whole.text.find(first)]
        assert found.finish_reason == "stop"
        assert len(found.ids) < len(whole.ids)
    both = session.generate([PROMPTS[0], PROMPTS[2]], "alpha", max_new_tokens=TOKENS, stop=(across,))
    (other,) = session.generate([PROMPTS[2]], "alpha", max_new_tokens=TOKENS)
    assert both[1] == other or across in other.text, "a row that meets no stop text runs on"


@pytest.mark.parametrize("count", [1, 2, 7])
def test_max_new_tokens(session: Session, count: int) -> None:
    """At most so many tokens, the first ones of a longer answer."""
    longer = session.generate(PROMPTS, NAMES, max_new_tokens=TOKENS)
    for short, whole in zip(session.generate(PROMPTS, NAMES, max_new_tokens=count), longer, strict=True):
        assert short.ids == whole.ids[:count]
        assert short.finish_reason == ("length" if len(whole.ids) >= count else "stop")


def test_tokens_are_emitted_in_order(session: Session) -> None:
    """The callback sees (row, token, text so far): step by step, rows in order within a step, and what it saw
    is the answer.
    """
    seen: list[tuple[int, int, str]] = []
    found = session.generate(PROMPTS, NAMES, max_new_tokens=6, emit=lambda *event: seen.append(event))
    assert seen == [
        (row, answer.ids[step], session.tokenizer.decode(answer.ids[: step + 1]))
        for step in range(6)
        for row, answer in enumerate(found)
        if step < len(answer.ids)
    ]
    assert [answer.text for answer in found] == [
        [text for row, _, text in seen if row == number][-1] for number in range(len(PROMPTS))
    ]


def test_sampling_is_reproducible(session: Session) -> None:
    """One seed gives one answer; another seed another; a row's draws do not depend on the rows after it;
    equal prompts differ.
    """
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "temperature": 1.5}
    one, again, other = (session.generate(PROMPTS, NAMES, **options, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert [a.ids for a in one] != [a.ids for a in other]
    assert session.generate(PROMPTS[:2], NAMES[:2], **options, seed=1) == one[:2]
    twins = session.generate([PROMPTS[0]] * 3, "alpha", **options, seed=1)
    assert len({answer.ids for answer in twins}) == 3


def test_narrow_sampling_is_greedy(session: Session) -> None:
    """top_k = 1, a tiny top_p, and a temperature near 0 all take the likeliest token."""
    expected = session.generate(PROMPTS, NAMES, max_new_tokens=TOKENS)
    for options in (
        {"temperature": 2.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1e-7},
    ):
        assert session.generate(PROMPTS, NAMES, max_new_tokens=TOKENS, seed=3, **options) == expected


def test_prompts_in_every_form(session: Session) -> None:
    """A text is one user message; without a chat template messages are their contents; ids are themselves; no
    prompts, no answers.
    """
    ids = session.tokenizer.encode("w1 w2 w3")
    assert ids == [5, 6, 7]
    forms: list[Any] = [
        "w1 w2 w3",
        [{"role": "user", "content": "w1 w2 w3"}],
        ids,
        [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2 w3"}],
    ]
    assert len(set(session.generate(forms, "beta", max_new_tokens=5))) == 1
    assert session.generate([], None) == []


def test_what_generation_refuses(session: Session, bundle_of: Make) -> None:
    """A bundle that is no decoder, an unknown adapter, prompts of no form or without tokens, parameters out
    of range: by name.
    """
    with pytest.raises(Unsupported, match="text-classification"):
        Session(bundle_of("bert", "bank"), "cpu").generate(["w1"])
    with pytest.raises(UnknownAdapter, match="did you mean 'beta'"):
        session.generate(["w1"], ["betta"])
    with pytest.raises(ConfigError, match="expected 1, found 2"):
        session.generate(["w1"], ["beta", None])
    for prompt in ("", [], [{"role": "user", "content": ""}]):
        with pytest.raises(ConfigError, match="no tokens"):
            session.generate(["w1", prompt])
    for prompt in (["w1"], [1, "w1"], [{"role": "user"}], [1.5]):
        with pytest.raises(ConfigError, match="a prompt is"):
            session.generate([prompt])
    for options in (
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ):
        with pytest.raises(ConfigError, match="out of range"):
            session.generate(["w1"], **options)
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        session.generate(["w1"], temprature=1.0)


# Chat templates: see also test_chat_template.


def test_a_bundle_takes_its_template_along(bundle_of: Make, tmp_path: Path) -> None:
    """A prompt given as text goes through the bundle's template; ids do not."""
    folder = Path(shutil.copytree(bundle_of("llama", "bank"), tmp_path / "bundle"))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}w9 {{ m.content }} w10{% endfor %}", "utf-8"
    )
    read_bundle(folder).write(folder)
    session = Session(folder, "cpu")
    text, ids, raw = session.generate(["w1", [13, 5, 14], [5]], "alpha", max_new_tokens=4)
    assert text == ids
    assert raw.prompt_tokens == 1
    (plain,), (as_ids,) = (
        [*adapterpack.run(folder, [{"prompt": "w1"}], provider="cpu", max_new_tokens=4, raw=is_raw)]
        for is_raw in (True, False)
    )
    assert (plain["prompt_tokens"], as_ids["prompt_tokens"], plain["prompt"]) == (1, 3, "w1")
    with pytest.raises(ConfigError, match=r"without the chat template \(at row 1.*leave --raw"):
        list(
            adapterpack.run(
                folder, [{"messages": [{"role": "user", "content": "w1"}]}], provider="cpu", raw=True
            )
        )
