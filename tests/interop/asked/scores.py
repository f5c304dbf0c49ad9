"""Log-probabilities, of answers and of prompts."""

from __future__ import annotations

from math import exp
from typing import Any

from .case import PROMPT, TOKENS, case, chatted, close, completed, ids, text

GROUP = "Log-probabilities"
PROMPTS = "Log-probabilities of a prompt"


def _after(tokens: list[int]) -> dict[str, float]:
    """The two likeliest tokens after others."""
    return dict(completed(prompt=tokens, max_tokens=1, logprobs=2).choices[0].logprobs.top_logprobs[0])


@case(GROUP)
def of_a_completion() -> bool:
    """`logprobs` of a completion."""
    choice = completed(logprobs=3).choices[0]
    found = choice.logprobs
    best = [max(top.values()) for top in found.top_logprobs]
    return (
        "".join(found.tokens) == choice.text
        and close(found.token_logprobs, best)
        and (all(len(top) == 3 and sum(map(exp, top.values())) <= 1 for top in found.top_logprobs))
    )


@case(GROUP)
def of_a_chat() -> bool:
    """`logprobs` and `top_logprobs` of a chat, with the bytes of its text."""
    choice = chatted(logprobs=True, top_logprobs=2).choices[0]
    data = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    return data.decode("utf-8", "replace") == choice.message.content and all(
        token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
        for token in choice.logprobs.content
    )


@case(GROUP)
def of_a_stream() -> bool:
    """`logprobs` in streams are those of the whole answer."""
    streamed = [chunk.choices[0].logprobs for chunk in completed(stream=True, logprobs=1)]
    found = [value for one in streamed if one for value in one.token_logprobs]
    chat = [chunk.choices[0].logprobs for chunk in chatted(stream=True, logprobs=True)]
    told = [token.logprob for one in chat if one for token in one.content or ()]
    whole = [token.logprob for token in chatted(logprobs=True).choices[0].logprobs.content]
    return close(found, completed(logprobs=1).choices[0].logprobs.token_logprobs) and close(told, whole)


def _right(found: Any, tokens: list[int]) -> bool:
    """Whether log-probabilities at every fourth place are those of an answer to what comes before it."""
    return found.token_logprobs[0] is None and all(
        close(sorted(found.top_logprobs[place].values()), sorted(_after(tokens[:place]).values()))
        for place in range(1, len(tokens), 4)
    )


@case(PROMPTS)
def of_a_prompt() -> bool:
    """`echo` with `logprobs` scores prompt and answer."""
    choice, tokens = completed(echo=True, logprobs=2).choices[0], ids(PROMPT)
    return choice.text == PROMPT + text() and (
        len(choice.logprobs.tokens) == len(tokens) + TOKENS and _right(choice.logprobs, tokens)
    )


@case(PROMPTS)
def of_a_prompt_alone() -> bool:
    """`max_tokens` of 0 scores the prompt alone, as evaluation harnesses ask."""
    answer, tokens = completed(echo=True, logprobs=2, max_tokens=0), ids(PROMPT)
    choice = answer.choices[0]
    return (choice.text, answer.usage.completion_tokens) == (PROMPT, 0) and _right(choice.logprobs, tokens)


@case(PROMPTS)
def by_ids() -> bool:
    """`prompt_logprobs` has them by token ids."""
    found = completed(extra_body={"prompt_logprobs": 1}).choices[0].prompt_logprobs
    told = completed(echo=True, logprobs=1, max_tokens=0).choices[0].logprobs.token_logprobs
    scores = [place[str(token)]["logprob"] for place, token in zip(found[1:], ids(PROMPT)[1:], strict=True)]
    return found[0] is None and close(scores, told[1:])
