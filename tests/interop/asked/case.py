"""What a case is, and how one asks: OpenAI's and Anthropic's own clients, and plain HTTP."""

from __future__ import annotations

import inspect
import json
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import anthropic
import httpx
import openai

MODEL, OTHER, BASE = "alpha", "beta", "base"
PROMPT = "The parcel is on its way to Lisbon, and the mugs are"
SAID: Any = [{"role": "user", "content": "Order two mugs for Lisbon"}]
TOKENS = 8

CLIENT = openai.OpenAI(max_retries=0)
CLAUDE = anthropic.Anthropic(max_retries=0)
PLAIN = httpx.Client(
    base_url=os.environ["ANTHROPIC_BASE_URL"],
    headers={"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"},
    timeout=120,
)


@dataclass(frozen=True)
class Case:
    """One thing that clients ask: its group and name, what it is in a sentence, why a server of texts may do
    without it, and the function that asks it and returns whether the answer is right.
    """

    group: str
    name: str
    what: str
    excuse: str
    ask: Callable[[], bool]

    def outcome(self) -> str:
        """Returns ``yes``, or ``no`` with what happened."""
        try:
            return "yes" if self.ask() else "no: another answer"
        except openai.APIStatusError as error:
            said = f"{error.status_code} {error.code}"
        except httpx.HTTPStatusError as error:
            said = f"{error.response.status_code} {error.response.json()['error']['code']}"
        except Exception as error:
            said = type(error).__name__
        return f"no: {said}" + (f"; {self.excuse}" if self.excuse else "")


CASES: list[Case] = []
"""All cases, in the order of the table."""


def case(group: str) -> Callable[[Callable[[], bool]], Callable[[], bool]]:
    """Registers a function as a case of a group. Its docstring says what is asked and, in a second paragraph, why a
    server of texts may do without it.
    """

    def registered(ask: Callable[[], bool]) -> Callable[[], bool]:
        what, _, excuse = inspect.cleandoc(ask.__doc__ or "").partition("\n\n")
        CASES.append(
            Case(
                group,
                ask.__name__,
                *(" ".join(part.split()).removesuffix(".") for part in (what, excuse)),
                ask,
            )
        )
        return ask

    return registered


def completed(**body: Any) -> Any:
    """A completion of the adapter, greedy unless the case says else; ``extra_body`` has fields that
    OpenAI's client does not know.
    """
    return CLIENT.completions.create(
        **{"model": MODEL, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, **body}
    )


def chatted(**body: Any) -> Any:
    """A chat's answer of the adapter, greedy unless the case says else."""
    return CLIENT.chat.completions.create(
        **{"model": MODEL, "messages": SAID, "max_tokens": TOKENS, "temperature": 0, **body}
    )


def text(**body: Any) -> str:
    """The text of a completion."""
    return str(completed(**body).choices[0].text)


def post(path: str, **body: Any) -> Any:
    """The answer to plain JSON, whatever its status."""
    return PLAIN.post(path, json=body)


def ids(prompt: str) -> list[int]:
    """The tokens of a text."""
    return list(post("/tokenize", model=MODEL, prompt=prompt).raise_for_status().json()["tokens"])


def text_of(tokens: list[int]) -> str:
    """The text of tokens."""
    return str(post("/detokenize", model=MODEL, tokens=tokens).raise_for_status().json()["prompt"])


def unread() -> str:
    """A prompt of some length that no server has read before."""
    return f"{secrets.token_hex(8)}: " + " ".join(f"mug {number}," for number in range(40))


def chunks(path: str, **body: Any) -> Iterator[dict[str, Any]]:
    """The events of a stream, as they are."""
    with PLAIN.stream("POST", path, json={**body, "stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


def refused(status: int, ask: Callable[[], Any], **fields: Any) -> bool:
    """Whether OpenAI's client raises its error of this status, with these fields (``code``, ``param``)."""
    try:
        ask()
    except openai.APIStatusError as error:
        return error.status_code == status and all(
            getattr(error, name) == value for name, value in fields.items()
        )
    return False


def close(one: Any, other: Any, most: float = 1e-4) -> bool:
    """Whether log-probabilities are the same up to the noise of float32 in batches of another size."""
    return len(one) == len(other) and all(abs(a - b) < most for a, b in zip(one, other, strict=True))
