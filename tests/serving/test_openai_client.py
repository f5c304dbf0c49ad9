"""What OpenAI's own client hears of a server, whole and streamed, equals what the engine says to the same
prompt alone.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest
from openai.lib._pydantic import to_strict_json_schema
from servers import ANN, BOB, Served

from adapterpack import Session

NAMES: list[str | None] = [None, "alpha", "beta", "gamma"]
TOKENS = 12


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key=ANN, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def session(bundle: Path, packs: Path) -> Session:
    session = Session(bundle, "cpu")
    session.load(packs / "gamma")
    return session


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_models(server: Served, client: openai.OpenAI) -> None:
    """Base and adapters with their digests; a key sees its own, and another's adapter looks like none."""
    cards = {card.id: card for card in client.models.list()}
    assert list(cards) == ["base", "alpha", "beta", "gamma"]
    assert {name: card.root for name, card in cards.items() if name != "base"} == server.adapters  # type: ignore[attr-defined]
    assert cards["beta"].parent == "base"  # type: ignore[attr-defined]
    bob = client.with_options(api_key=BOB)
    assert [card.id for card in bob.models.list()] == ["alpha"]
    assert client.models.retrieve("gamma").id == "gamma"
    messages = []
    for name in ("gamma", "base", "nobody", "base:beta", "../alpha", "hf://org/name"):
        for ask in (
            lambda name=name: (
                bob.models.retrieve(name)
                if "/" not in name
                else bob.completions.create(model=name, prompt="x")
            ),
            lambda name=name: bob.chat.completions.create(model=name, messages=chat("x")),
        ):
            with pytest.raises(openai.NotFoundError) as caught:
                ask()
            assert caught.value.code == "model_not_found"
            said = caught.value.body["message"].replace(name, "NAME")  # type: ignore[index]
            # bob may see alpha, so that is what a name near it can mean
            messages.append(said.replace("; did you mean 'alpha'?", ":"))
    assert len(set(messages)) == 1


def test_many_at_once_say_what_each_says_alone(server: Served, session: Session) -> None:
    """32 requests at a time on four rows, chat and text, streamed and whole, four models: text, reason,
    counts and digest of each are those of a run alone; ``base:adapter`` is the adapter.
    """
    texts = [
        f"Order {number} mugs for {city}"
        for number, city in enumerate(("Lisbon", "Porto", "Faro", "Braga") * 2)
    ]
    asked = [
        (text, name, number % 4 > 1, number % 2 == 1)
        for number, (text, name) in enumerate((text, name) for text in texts for name in NAMES)
    ]

    async def one(
        client: openai.AsyncOpenAI, text: str, name: str | None, is_chat: bool, streamed: bool
    ) -> tuple[Any, ...]:
        model = "base" if name is None else name if is_chat else f"base:{name}"
        options: dict[str, Any] = {"model": model, "max_tokens": TOKENS, "temperature": 0}
        create = client.chat.completions.create if is_chat else client.completions.create
        content: dict[str, Any] = {"messages": chat(text)} if is_chat else {"prompt": text}
        if not streamed:
            answer = await create(**options, **content)
            choice = answer.choices[0]
            said = choice.message.content if is_chat else choice.text
            return (
                said,
                choice.finish_reason,
                answer.usage.prompt_tokens,
                answer.usage.completion_tokens,
                answer.system_fingerprint,
            )
        said, reason, usage, digest = "", None, None, None
        async for chunk in await create(
            **options, **content, stream=True, stream_options={"include_usage": True}
        ):
            usage, digest = chunk.usage or usage, chunk.system_fingerprint
            for choice in chunk.choices:
                said += (choice.delta.content or "") if is_chat else choice.text
                reason = choice.finish_reason or reason
        return said, reason, usage.prompt_tokens, usage.completion_tokens, digest

    async def every() -> list[tuple[Any, ...]]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.address}/v1", api_key=ANN, max_retries=0, timeout=120
        ) as client:
            return await asyncio.gather(*(one(client, *what) for what in asked))

    answers = asyncio.run(every())
    base_digest = {answer[-1] for answer, what in zip(answers, asked, strict=True) if what[1] is None}
    assert len(base_digest) == 1
    texts_by_model = set()
    for (text, name, is_chat, _), (said, reason, prompt_tokens, completion_tokens, digest) in zip(
        asked, answers, strict=True
    ):
        prompt: Any = text if is_chat else session.tokenizer.encode(text)
        (alone,) = session.generate([prompt], [name], max_new_tokens=TOKENS)
        assert (said, reason, prompt_tokens) == (alone.text, alone.finish_reason, alone.prompt_tokens)
        assert completion_tokens == len(alone.ids) + (reason == "stop")
        assert digest == (
            server.adapters[name] if name else base_digest.pop() if len(base_digest) > 1 else digest
        )
        texts_by_model.add((text, said))
    assert len(texts_by_model) > len(texts) * 2  # adapters matter


def test_parameters(client: openai.OpenAI, session: Session) -> None:
    """n, seed, stop, logprobs, token ids, several prompts, echo: as the session has it."""
    ids = session.tokenizer.encode("The parcel is")
    options: dict[str, Any] = {
        "n": 2,
        "seed": 7,
        "temperature": 1.5,
        "top_p": 0.9,
        "max_tokens": 6,
        "logprobs": 2,
        "extra_body": {"top_k": 40, "min_p": 0.001, "repetition_penalty": 1.1},
    }
    drawn, again = (
        client.completions.create(model="alpha", prompt=[ids, ids[:2]], **options) for _ in range(2)
    )
    texts = [choice.text for choice in drawn.choices]
    assert texts == [choice.text for choice in again.choices]
    assert [choice.index for choice in drawn.choices] == [0, 1, 2, 3]
    assert texts[0] != texts[1]
    (alone,) = session.generate(
        [ids],
        "alpha",
        seed=7,
        temperature=1.5,
        top_p=0.9,
        max_new_tokens=6,
        logprobs=2,
        top_k=40,
        min_p=0.001,
        repetition_penalty=1.1,
    )
    assert texts[0] == alone.text
    logprobs = drawn.choices[0].logprobs
    assert logprobs is not None and alone.logprobs is not None
    assert logprobs.token_logprobs == pytest.approx([choice.logprob for choice in alone.logprobs], rel=1e-5)
    assert [len(top) for top in logprobs.top_logprobs or []] == [2] * 6
    assert (
        client.completions.create(model="alpha", prompt="x", temperature=1.9, max_tokens=8).choices[0].text
        != client.completions.create(model="alpha", prompt="x", temperature=1.9, max_tokens=8).choices[0].text
    ), "without a seed each differs"
    whole = (
        client.completions.create(model="beta", prompt="Hi there", max_tokens=8, temperature=0, echo=True)
        .choices[0]
        .text
    )
    assert whole.startswith("Hi there")
    stop = whole.removeprefix("Hi there")[3:6]
    cut = client.completions.create(
        model="beta", prompt="Hi there", max_tokens=8, temperature=0, stop=[stop]
    ).choices[0]
    assert (cut.text, cut.finish_reason) == (whole.removeprefix("Hi there").partition(stop)[0], "stop")
    banned = client.completions.create(model="beta", prompt=ids, max_tokens=1, temperature=0, logprobs=1)
    assert banned.choices[0].logprobs is not None
    first = session.generate([ids], "beta", max_new_tokens=1)[0].ids[0]
    other = client.completions.create(
        model="beta", prompt=ids, max_tokens=1, temperature=0, logit_bias={str(first): -100}
    )
    assert other.choices[0].text != banned.choices[0].text
    assert client.completions.create(model="alpha", prompt="x").usage.completion_tokens <= 16  # type: ignore[union-attr]


def test_chat_logprobs_have_bytes_that_make_up_the_text(client: openai.OpenAI) -> None:
    """Whole and streamed: the bytes of all tokens are those of the text, also where a character has several
    tokens.
    """
    options: dict[str, Any] = {
        "model": "gamma",
        "messages": chat("x"),
        "max_tokens": 40,
        "temperature": 1.0,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 2,
    }
    choice = client.chat.completions.create(**options).choices[0]
    content = choice.logprobs.content
    data = b"".join(bytes(token.bytes) for token in content)
    assert choice.message.content == data.decode("utf-8", "replace")
    assert all(len(token.top_logprobs) == 2 for token in content)
    pieces, tokens = "", 0
    for chunk in client.chat.completions.create(**options, stream=True):
        pieces += chunk.choices[0].delta.content or ""
        tokens += len(chunk.choices[0].logprobs.content) if chunk.choices[0].logprobs else 0
    assert (pieces, tokens) == (choice.message.content, len(content))


SCHEMA = {
    "type": "object",
    "properties": {
        "item": {"enum": ["mug", "plate"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["item", "count"],
    "additionalProperties": False,
}


def test_forms(client: openai.OpenAI) -> None:
    """json_schema, json_object, choices, an expression, a grammar: by OpenAI's field and by vLLM's."""

    def said(model: str = "alpha", **options: Any) -> str:
        answer = client.chat.completions.create(
            model=model, messages=chat("An order"), temperature=1.0, seed=1, max_tokens=200, **options
        )
        assert answer.choices[0].finish_reason == "stop"
        return answer.choices[0].message.content or ""

    schema: Any = {"type": "json_schema", "json_schema": {"name": "order", "schema": SCHEMA, "strict": True}}
    for text in (
        said(response_format=schema),
        said(extra_body={"guided_json": SCHEMA}),
        said(extra_body={"structured_outputs": {"json": json.dumps(SCHEMA)}}),
    ):
        jsonschema.validate(json.loads(text), SCHEMA)
    choices = ["yes", 'no "really"', "größe"]
    for extra in ({"guided_choice": choices}, {"structured_outputs": {"choice": choices}}):
        assert said(extra_body=extra) in choices
    assert said(extra_body={"guided_regex": "[0-9]{4}"}).isdecimal()
    assert said("base", extra_body={"guided_grammar": 'start: "a" "b"~2'}) == "abb"
    with pytest.raises(openai.BadRequestError) as caught:
        said(response_format=schema, extra_body={"guided_regex": "x"})
    assert caught.value.param == "guided_regex"


def test_mixes(server: Served, client: openai.OpenAI, session: Session) -> None:
    """Several adapters with weights among other requests: the text of the engine's own sum, and names,
    digests and weights in header and body. What a key may not have, and what is no mix, is an error with a
    code.
    """
    mix = {"beta": -0.5, "alpha": 1.5}
    extra = {"adapters": [{"name": name, "weight": weight} for name, weight in mix.items()]}
    digest = "+".join(f"{server.adapters[name]}*{mix[name]}" for name in sorted(mix))

    async def every() -> list[Any]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.address}/v1", api_key=ANN, max_retries=0, timeout=120
        ) as other:
            return await asyncio.gather(
                *(
                    other.completions.with_raw_response.create(
                        model=model, prompt="The parcel is", max_tokens=TOKENS, temperature=0, extra_body=body
                    )
                    for model, body in (("alpha", {}), ("base", extra), ("base", {}), ("beta", {}))
                )
            )

    answers = asyncio.run(every())
    said = [raw.parse().choices[0].text for raw in answers]
    prompt = session.tokenizer.encode("The parcel is")
    assert said == [
        row.text
        for row in session.generate([prompt] * 4, ["alpha", mix, None, "beta"], max_new_tokens=TOKENS)
    ]
    mixed = answers[1]
    assert mixed.headers["X-Adapterpack-Adapter"] == "alpha*1.5+beta*-0.5"
    assert mixed.headers["X-Adapterpack-Digest"] == digest == mixed.parse().system_fingerprint
    assert [part["name"] for part in mixed.parse().adapterpack["adapters"]] == ["alpha", "beta"]
    assert {
        chunk.system_fingerprint
        for chunk in client.chat.completions.create(
            model="base", messages=chat("x"), max_tokens=2, stream=True, extra_body=extra
        )
    } == {digest}
    bob = client.with_options(api_key=BOB)
    for who, model, parts, status, code in (
        (client, "base", [{"name": "alpha"}, {"name": "nobody"}], 404, "model_not_found"),
        (client, "base", [{"name": "base"}], 404, "model_not_found"),
        (client, "alpha", [{"name": "beta"}], 400, "invalid_request"),
        (bob, "base", [{"name": "alpha"}], 404, "model_not_found"),
        (client, "base", [], 400, "invalid_request"),
        (client, "base", [{"name": "alpha"}] * 2, 400, "invalid_request"),
        (client, "base", [{"name": "alpha"}] * 9, 400, "invalid_request"),
        (client, "base", [{"name": "alpha", "weight": 11}], 400, "invalid_request"),
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            who.completions.create(model=model, prompt="x", max_tokens=1, extra_body={"adapters": parts})
        assert (caught.value.status_code, caught.value.code) == (status, code), parts
    metrics = server.get("/metrics").text
    assert 'adapter="(mixed)"' in metrics and "*" not in "".join(
        line for line in metrics.splitlines() if line[:1] != "#"
    )


def test_tokens(server: Served, session: Session) -> None:
    """Texts and conversations as tokens, and back, as vLLM has it; with a key alone."""
    tokenizer, messages = session.tokenizer, [{"role": "user", "content": "How many?"}]
    answer = server.post(
        "/tokenize", {"model": "alpha", "prompt": "Größe 🫖", "return_token_strs": True}
    ).json()
    assert answer["tokens"] == tokenizer.encode("Größe 🫖") and answer["count"] == len(
        answer["tokens"]
    ) == len(answer["token_strs"])
    assert answer["max_model_len"] == 512
    assert server.post("/detokenize", {"model": "base", "tokens": answer["tokens"]}).json() == {
        "prompt": "Größe 🫖"
    }
    assert server.post("/tokenize", {"model": "base", "messages": messages}).json()[
        "tokens"
    ] == tokenizer.prompt(messages)
    begun = [*messages, {"role": "assistant", "content": "Two"}]
    going = {"model": "base", "messages": begun, "continue_final_message": True}
    text = tokenizer.decode(server.post("/tokenize", going).json()["tokens"], False)
    assert text.endswith("How many?<|im_end|>\n<|im_start|>assistant\nTwo")
    for path, body, status in (
        ("/tokenize", {"model": "alpha"}, 400),
        ("/tokenize", {**going, "chat_template_kwargs": {"messages": []}}, 400),
        ("/tokenize", {"model": "nobody", "prompt": "x"}, 404),
        ("/detokenize", {"model": "alpha", "tokens": [-1]}, 400),
        ("/detokenize", {"model": "alpha", "tokens": [49_152]}, 400),
    ):
        assert server.post(path, body).status_code == status
        assert server.post(path, body, headers={}).status_code == 401


class Order(pydantic.BaseModel):
    """What an answer has to be, as users of OpenAI's client write it."""

    item: Literal["mug", "plate"]
    count: int = pydantic.Field(ge=1, le=9)


def test_an_answer_that_is_parsed(server: Served, session: Session) -> None:
    """``parse`` and ``stream`` with a class of pydantic, by the client that waits and the one that does not,
    which hear the same.
    """
    given: dict[str, Any] = {
        "model": "beta",
        "messages": chat("An order"),
        "temperature": 0,
        "max_tokens": 100,
        "response_format": Order,
    }

    async def heard() -> list[Any]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.address}/v1", api_key=ANN, max_retries=0, timeout=120
        ) as client:
            parsed = await client.chat.completions.parse(**given)
            async with client.chat.completions.stream(**given) as stream:
                kinds = {event.type async for event in stream}
                final = await stream.get_final_completion()
        assert {"chunk", "content.delta", "content.done"} <= kinds
        return [one.choices[0].message for one in (parsed, final)]

    with openai.OpenAI(base_url=f"{server.address}/v1", api_key=ANN, max_retries=0, timeout=120) as client:
        messages = [client.chat.completions.parse(**given).choices[0].message, *asyncio.run(heard())]
    assert all(isinstance(message.parsed, Order) for message in messages)
    schema = to_strict_json_schema(Order)
    (alone,) = session.generate(["An order"], "beta", max_new_tokens=100, json_schema=schema)
    assert {message.content for message in messages} == {alone.text}
