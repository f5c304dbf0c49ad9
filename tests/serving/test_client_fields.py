"""What clients ask for beside OpenAI's plain fields: log-probabilities of prompts, token ids, the best of
several answers, beams, the usage of a stream while it lasts.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from servers import Served

from adapterpack import Session, attach
from adapterpack.serving import route

PROMPT = "The parcel is on its way to Lisbon, and the mugs are"


@pytest.fixture(scope="module")
def session(bundle: Path) -> Session:
    return Session(bundle, "cpu")


def completed(server: Served, **body: Any) -> dict[str, Any]:
    answer = server.post(
        "/v1/completions", {"model": "alpha", "prompt": PROMPT, "temperature": 0, "max_tokens": 4, **body}
    )
    assert answer.status_code == 200, answer.text
    given: dict[str, Any] = answer.json()
    return given


def streamed(server: Served, path: str, **body: Any) -> Iterator[dict[str, Any]]:
    with httpx.stream(
        "POST", server.address + path, json={**body, "stream": True}, headers=server.headers, timeout=120
    ) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


def test_log_probabilities_of_a_prompt(server: Served, session: Session, model: Path, packs: Path) -> None:
    """An echo with ``logprobs``, whole and streamed, and ``prompt_logprobs``: those of torch, for every token
    of the prompt, however little is to follow, and with the token that ends the answer.
    """
    import torch
    from transformers import AutoModelForCausalLM

    adapted = AutoModelForCausalLM.from_pretrained(model).eval()
    attach(adapted, packs / "alpha")
    ids = session.tokenizer.encode(PROMPT)
    with torch.no_grad():
        expected = torch.log_softmax(adapted(torch.tensor([ids])).logits[0].double(), -1).numpy()
    for most in (0, 1, 4):
        given = completed(server, echo=True, logprobs=1, max_tokens=most)
        choice = given["choices"][0]
        scores = choice["logprobs"]
        assert given["usage"]["completion_tokens"] == most and choice["text"].startswith(PROMPT)
        assert len(scores["tokens"]) == len(ids) + most and scores["token_logprobs"][0] is None
        assert "".join(scores["tokens"]) == choice["text"] and scores["top_logprobs"][0] is None
        assert scores["text_offset"][:3] == [0, *np.cumsum([len(one) for one in scores["tokens"][:2]])]
        for place, token in enumerate(ids[1:], 1):
            row = expected[place - 1]
            assert scores["token_logprobs"][place] == pytest.approx(row[token], abs=1e-4)
            assert list(scores["top_logprobs"][place].values()) == pytest.approx([row.max()], abs=1e-4)
    assert completed(server, echo=True, max_tokens=0)["choices"][0]["text"] == PROMPT
    pieces = [
        chunk["choices"][0]
        for chunk in streamed(
            server,
            "/v1/completions",
            model="alpha",
            prompt=PROMPT,
            temperature=0,
            max_tokens=4,
            echo=True,
            logprobs=1,
        )
    ]
    assert "".join(piece["text"] for piece in pieces) == choice["text"]
    told = [piece["logprobs"]["tokens"] for piece in pieces if piece["logprobs"]]
    assert [token for tokens in told for token in tokens] == scores[
        "tokens"
    ]  # the likeliest token after the prompt ends the answer: it has a log-probability, and no text
    first = int(expected[-1].argmax())
    ended = completed(server, echo=True, logprobs=1, max_tokens=3, stop_token_ids=[first])["choices"][0]
    assert (ended["text"], ended["finish_reason"]) == (PROMPT, "stop")
    assert ended["logprobs"]["token_logprobs"][len(ids) :] == pytest.approx([expected[-1].max()], abs=1e-4)
    # vLLM's form, by token ids, on both routes
    own = completed(server, prompt_logprobs=2, max_tokens=1)["choices"][0]["prompt_logprobs"]
    assert own[0] is None and len(own) == len(ids)
    for place, token in enumerate(ids[1:], 1):
        assert own[place][str(token)]["logprob"] == pytest.approx(expected[place - 1, token], abs=1e-4)
        best = min(own[place].values(), key=lambda one: one["rank"] or 99)
        assert (best["rank"], best["logprob"]) == (1, pytest.approx(expected[place - 1].max(), abs=1e-4))
    chat = {"model": "alpha", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    answer = server.post("/v1/chat/completions", {**chat, "prompt_logprobs": 0}).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert (
        server.post("/v1/chat/completions", {**chat, "prompt_logprobs": 0, "stream": True}).status_code == 400
    )


def test_known_prompts_are_counted(server: Served) -> None:
    """``cached_tokens``, whole and streamed, of both answers to a prompt once; not of another salt."""
    long = {
        "prompt": f"{PROMPT} {PROMPT} {PROMPT} again",
        "n": 2,
        "seed": 1,
        "max_tokens": 2,
        "temperature": 1,
    }
    before, after, other = (
        completed(server, **long, cache_salt=salt)["usage"] for salt in ("first", "first", "second")
    )
    assert before["prompt_tokens_details"] == other["prompt_tokens_details"] == {"cached_tokens": 0}
    known = (before["prompt_tokens"] - 1) // 16 * 16
    assert after["prompt_tokens_details"] == {"cached_tokens": known} and known > 0
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    *chunks, last = streamed(
        server,
        "/v1/completions",
        model="alpha",
        **long,
        cache_salt="first",
        return_token_ids=True,
        **options,
    )
    assert last["choices"] == [] and last["usage"] == after
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    told = list(accumulate(len(chunk["choices"][0].get("token_ids", ())) for chunk in chunks))
    assert counts == sorted(counts) and counts[-1] == after["completion_tokens"] == told[-1]
    assert all(count >= sent for count, sent in zip(counts, told, strict=True)), (counts, told)
    assert counts[0] > 0, "what the engine has made may be ahead of what is told"


def test_tokens_and_stop_texts_that_are_told(server: Served, session: Session) -> None:
    """``return_token_ids`` on both routes, whole and streamed; a stop text that stays in the answer."""
    (alone,) = session.generate([session.tokenizer.encode(PROMPT)], "alpha", max_new_tokens=4)
    choice = completed(server, return_token_ids=True)["choices"][0]
    assert choice["token_ids"] == list(alone.ids) and choice["logprobs"] is None
    assert choice["prompt_token_ids"] == session.tokenizer.encode(PROMPT)
    chat = {
        "model": "alpha",
        "messages": [{"role": "user", "content": "x"}],
        "temperature": 0,
        "max_tokens": 4,
    }
    whole = server.post("/v1/chat/completions", {**chat, "return_token_ids": True}).json()
    chunks = list(streamed(server, "/v1/chat/completions", **chat, return_token_ids=True))
    assert [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", ())] == whole[
        "choices"
    ][0]["token_ids"]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert (
        session.tokenizer.decode(whole["choices"][0]["token_ids"])
        == whole["choices"][0]["message"]["content"]
    )
    stop = alone.text[2:5]
    for kept, text in ((False, alone.text[:2]), (True, alone.text[:5])):
        cut = completed(server, stop=[stop], include_stop_str_in_output=kept)["choices"][0]
        assert (cut["text"], cut["finish_reason"]) == (text, "stop")


def test_the_best_of_several_and_beams(server: Served, session: Session) -> None:
    """``best_of`` gives the likeliest of the answers that ``n`` gives, and beams are those of the session."""
    drawn = {"seed": 4, "temperature": 1.3, "max_tokens": 5, "logprobs": 0}
    every = completed(server, **drawn, n=4)["choices"]
    means = [np.mean(choice["logprobs"]["token_logprobs"]) for choice in every]
    best = completed(server, **drawn, n=2, best_of=4)
    order = np.argsort(means)[::-1][:2]
    assert [choice["text"] for choice in best["choices"]] == [every[place]["text"] for place in order]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["usage"]["completion_tokens"] == 20
    (beams,) = session.generate(
        [session.tokenizer.encode(PROMPT)],
        "alpha",
        max_new_tokens=4,
        num_beams=3,
        num_return_sequences=3,
        length_penalty=0.5,
    )
    found = completed(server, n=3, use_beam_search=True, length_penalty=0.5, return_token_ids=True)
    assert [choice["text"] for choice in found["choices"]] == [one.text for one in beams.sequences]
    assert [choice["token_ids"] for choice in found["choices"]] == [list(one.ids) for one in beams.sequences]
    assert found["usage"]["completion_tokens"] == sum(len(one.ids) for one in beams.sequences)
    known = found["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert known == (found["usage"]["prompt_tokens"] - 1) // 16 * 16, "the answers before have read it"
    scored = completed(server, n=2, use_beam_search=True, prompt_logprobs=0)["choices"]
    assert [len(choice["prompt_logprobs"]) for choice in scored] == [found["usage"]["prompt_tokens"]] * 2
    for body in ({"best_of": 1, "n": 2}, {"best_of": 2, "stream": True}, {"use_beam_search": True, "n": 5}):
        asked = {"model": "alpha", "prompt": PROMPT, "max_tokens": 2, **body}
        assert server.post("/v1/completions", asked).status_code == 400, body


def test_fields_of_other_servers_are_left_out_with_a_note(server: Served) -> None:
    """Every field of the table, on every route for text, whole and streamed; others stay errors, and so do
    those of the table on routes for something else.
    """
    table = tomllib.loads((Path(route.__file__).parent / "openai" / "client_fields.toml").read_text())
    fields = {name for names in table.values() for name in names}
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
    assert len(fields) == sum(map(len, table.values())) and all(f"`{name}`" in page for name in fields)
    body = {"model": "alpha", "max_tokens": 2, "temperature": 0}
    asked = {"messages": [{"role": "user", "content": "x"}]}
    chat, given = {**body, **asked}, dict.fromkeys(fields, "x")
    plain = server.post("/v1/chat/completions", chat).json()
    noted = server.post("/v1/chat/completions", {**given, **chat}).json()
    assert noted["choices"] == plain["choices"] and "warnings" not in plain["adapterpack"]
    assert len(noted["adapterpack"]["warnings"]) == len(fields)
    assert "left out: verbosity, a field of OpenAI" in noted["adapterpack"]["warnings"]
    first = next(streamed(server, "/v1/chat/completions", **chat, keep_alive="5m"))
    assert first["adapterpack"]["warnings"] == ["left out: keep_alive, a field of Ollama"]
    for path, own in (
        ("/v1/completions", {**body, "prompt": "x"}),
        ("/v1/messages", chat),
        ("/v1/responses", {"model": "alpha", "input": "x", "max_output_tokens": 2}),
    ):
        answer = server.post(path, {**own, "keep_alive": "5m", "speed": "fast"})
        assert answer.status_code == 200 and len(answer.json()["adapterpack"]["warnings"]) == 2, path
        assert server.post(path, {**own, "keep_alive_": "5m"}).status_code == 400, path
    assert server.post("/tokenize", {"model": "alpha", "prompt": "x", "keep_alive": "5m"}).status_code == 400


def test_values_for_the_template_and_a_message_that_goes_on(server: Served, session: Session) -> None:
    """A last message is continued, as transformers renders it; what a template does not read is a note."""
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Two mugs "}]
    chat = {
        "model": "alpha",
        "messages": messages,
        "temperature": 0,
        "max_tokens": 3,
        "return_token_ids": True,
    }
    text = session.tokenizer.render(messages)
    upto = text[: text.rindex("Two mugs ") + len("Two mugs ")]
    answer = server.post("/v1/chat/completions", {**chat, "continue_final_message": True}).json()
    assert answer["prompt_token_ids"] == session.tokenizer.encode(upto, special=False)
    plain = server.post("/v1/chat/completions", {**chat, "add_generation_prompt": False}).json()
    assert session.tokenizer.decode(plain["prompt_token_ids"], False) == text.removesuffix(
        "<|im_start|>assistant\n"
    )
    values = {"enable_thinking": False}
    noted = server.post(
        "/v1/chat/completions", {**chat, "reasoning_effort": "low", "chat_template_kwargs": values}
    ).json()
    assert noted["choices"] == server.post("/v1/chat/completions", chat).json()["choices"]
    assert [note.rpartition(" ")[2] for note in noted["adapterpack"]["warnings"]] == [
        "enable_thinking",
        "reasoning_effort",
    ]
    for wrong in (
        {"chat_template_kwargs": {"messages": []}},
        {"continue_final_message": True, "add_generation_prompt": True},
        {"continue_final_message": True, "messages": [{"role": "assistant", "content": " "}]},
    ):
        assert server.post("/v1/chat/completions", {**chat, **wrong}).status_code == 400, wrong
