"""Models, fields, prompts, and how tokens are chosen."""

from __future__ import annotations

from typing import Any

from .case import (
    BASE,
    CLIENT,
    MODEL,
    OTHER,
    PROMPT,
    TOKENS,
    case,
    chatted,
    completed,
    ids,
    post,
    refused,
    text,
)

ADAPTERS, FIELDS, CHOOSING = (
    "Adapters",
    "Fields that a server does not know",
    "Prompts, and how tokens are chosen",
)
DRAWN: dict[str, Any] = {"temperature": 1.5, "seed": 7}
OTHERS = ["Two mugs and a plate", "Faro", "Where is my parcel?"]


@case(ADAPTERS)
def by_name() -> bool:
    """An adapter answers where `model` is its name."""
    return len({text(model=name) for name in (BASE, MODEL, OTHER)}) == 3


@case(ADAPTERS)
def in_the_list() -> bool:
    """Adapters are in the list of models, with their base."""
    parents = {model.id: model.parent for model in CLIENT.models.list()}  # type: ignore[attr-defined]
    return parents == {BASE: None, MODEL: BASE, OTHER: BASE}


@case(ADAPTERS)
def with_the_base() -> bool:
    """`base:adapter` is the adapter, too."""
    return text(model=f"{BASE}:{OTHER}") == text(model=OTHER)


@case(ADAPTERS)
def alone_in_the_list() -> bool:
    """One model is looked up by its name."""
    return CLIENT.models.retrieve(OTHER).id == OTHER and refused(
        404, lambda: CLIENT.models.retrieve("nobody")
    )


@case(ADAPTERS)
def unknown_model() -> bool:
    """An unknown model is 404; no other answers in its place."""
    return refused(404, lambda: text(model="nobody"), code="model_not_found")


@case(FIELDS)
def mistyped() -> bool:
    """A mistyped field is 400, with the nearest name."""
    answer = post("/v1/completions", model=MODEL, prompt=PROMPT, temprature=1)
    error = answer.json()["error"]
    return (answer.status_code, error["param"]) == (400, "temprature") and "'temperature'" in error["message"]


@case(FIELDS)
def known_elsewhere() -> bool:
    """A field of another server that decides no answer is left out, with a note."""
    plain, noted = completed(), completed(extra_body={"keep_alive": "5m"})
    return bool(
        plain.choices == noted.choices
        and noted.adapterpack["warnings"] == ["left out: keep_alive, a field of Ollama"]
    )


@case(CHOOSING)
def an_array() -> bool:
    """A prompt in an array is the prompt."""
    return text(prompt=[PROMPT]) == text()


@case(CHOOSING)
def as_ids() -> bool:
    """A prompt as token ids, and several of these."""
    first, second = ids(PROMPT), ids(OTHERS[0])
    both = [choice.text for choice in completed(prompt=[first, second]).choices]
    return text(prompt=first) == text() and both == [text(), text(prompt=OTHERS[0])]


@case(CHOOSING)
def several() -> bool:
    """Several prompts are answered as each is alone."""
    whole = completed(prompt=OTHERS)
    alone = [text(prompt=prompt) for prompt in OTHERS]
    return [choice.text for choice in whole.choices] == alone and len(set(alone)) == len(OTHERS)


@case(CHOOSING)
def n_answers() -> bool:
    """`n` answers, which differ, of a text and of a chat."""
    texts = [choice.text for choice in completed(n=3, **DRAWN).choices]
    chats = [choice.message.content for choice in chatted(n=3, **DRAWN).choices]
    return len(set(texts)) == len(set(chats)) == 3


@case(CHOOSING)
def stop() -> bool:
    """`stop` ends an answer before its text."""
    whole = text()
    cut = completed(stop=["<never>", whole[4:7]]).choices[0]
    return (cut.text, cut.finish_reason) == (whole.partition(whole[4:7])[0], "stop")


@case(CHOOSING)
def seeds() -> bool:
    """A `seed` gives the same answer again, and another one another."""
    first, again, other = (text(temperature=1.5, seed=seed) for seed in (7, 7, 8))
    return first == again != other


@case(CHOOSING)
def logit_bias() -> bool:
    """`logit_bias` makes a token certain, or impossible."""
    (cup,) = ids(" cup")
    first = completed(max_tokens=1, extra_body={"return_token_ids": True}).choices[0].token_ids[0]
    return text(logit_bias={str(cup): 100}) == " cup" * TOKENS and (
        text(max_tokens=1, logit_bias={str(first): -100}) != text(max_tokens=1)
    )


def _favoured(**penalty: float) -> int:
    """How often a token comes whose logit is 3 above its own, while others stay within 1 of it."""
    (cup,) = ids(" cup")
    return text(model=BASE, logit_bias={str(cup): 3}, **penalty).count(" cup")


@case(CHOOSING)
def presence_penalty() -> bool:
    """`presence_penalty` counts once."""
    return (_favoured(), _favoured(presence_penalty=1.9)) == (TOKENS, TOKENS)


@case(CHOOSING)
def frequency_penalty() -> bool:
    """`frequency_penalty` counts every time."""
    return _favoured(frequency_penalty=1.9) == 2


@case(CHOOSING)
def repetition_penalty() -> bool:
    """`repetition_penalty`: nothing comes again."""

    def tokens(**extra: Any) -> list[int]:
        given = {"return_token_ids": True, **extra}
        return list(completed(model=BASE, max_tokens=20, extra_body=given).choices[0].token_ids)

    plain, other = tokens(), tokens(repetition_penalty=2.0)
    return len(set(plain)) < len(plain) and len(set(other)) == len(other)


@case(CHOOSING)
def min_p() -> bool:
    """`min_p` of 1 leaves the likeliest token alone."""
    return text(**DRAWN, extra_body={"min_p": 1.0}) == text() != text(**DRAWN)


@case(CHOOSING)
def top_k() -> bool:
    """`top_k` of 1 leaves the likeliest token alone."""
    return text(**DRAWN, extra_body={"top_k": 1}) == text() != text(**DRAWN)


@case(CHOOSING)
def top_p() -> bool:
    """`top_p` near 0 leaves the likeliest token alone."""
    return text(**DRAWN, top_p=1e-6) == text() != text(**DRAWN)


@case(CHOOSING)
def max_completion_tokens() -> bool:
    """`max_completion_tokens`, the newer name of `max_tokens`."""
    answer = chatted(max_tokens=None, max_completion_tokens=5)
    return (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (5, "length")


@case(CHOOSING)
def streams() -> bool:
    """A stream has the text of the whole answer, of a text and of a chat."""
    texts = [chunk.choices[0].text for chunk in completed(stream=True)]
    chats = [chunk.choices[0].delta.content or "" for chunk in chatted(stream=True)]
    return "".join(texts) == text() and "".join(chats) == chatted().choices[0].message.content


@case(CHOOSING)
def usage_in_streams() -> bool:
    """`stream_options.include_usage`: the last chunk counts tokens."""
    *_, last = chatted(stream=True, stream_options={"include_usage": True})
    return (
        last.choices == []
        and last.usage.completion_tokens == TOKENS
        and (last.usage.prompt_tokens == chatted().usage.prompt_tokens)
    )
