"""What can be asked for the log-probabilities of a next token: servers of several kinds, and checkpoints into
which an adapter was merged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, NamedTuple, TypeVar
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

import msgspec

from ..errors import FormatError, StorageError, UnknownAdapter, Unsupported, require_among
from ..io import Json

Logprobs = dict[int, float]
"""Log-probabilities of the next token by its id: of the likeliest ones, and of others that were asked for."""
Messages = Sequence[Mapping[str, str]]
Ask = Callable[[Sequence[int], Iterable[int]], Logprobs]
"""Gives the log-probabilities of the token after some tokens, those of some token ids among them."""
Render = Callable[[Messages], list[int]]
"""Gives the token ids as which a conversation is read."""

_LARGEST_ANSWER = 32 << 20
_SECONDS = 120
_SHOWN = 20
"""How many likely tokens to ask for: as many as vLLM shows unless it is told otherwise."""
_SHOWN_BY_LLAMA = 1000
_ANY_LETTER = "root ::= [a-z]"
"""What llama.cpp answers, which does not change the log-probabilities: of a token that ends the text, or is
only a part of a character, it shows nothing.
"""
T = TypeVar("T")
_Token = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_SOME = msgspec.Meta(min_length=1)


class Responder(NamedTuple):
    """Something that runs an adapter: how to ask it with the adapter, without it (None where it cannot be
    switched off), and for its chat template (None where it shows none).
    """

    name: str
    ask: Ask
    ask_base: Ask | None
    render: Render | None = None


class Connection:
    """Sends JSON to one server and reads its JSON; an answer's size and the time between reads are limited.

    ``OPENAI_API_KEY`` is sent along; redirects are not followed, which could lead the key elsewhere.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._open = build_opener(_NoRedirects).open
        key = os.environ.get("OPENAI_API_KEY")
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {key}"} if key else {}
        )

    def send(self, path: str, kind: type[T], body: Json | None = None) -> T:
        """Posts a body, or gets a path without one, and returns the answer as a ``kind``.

        Raises:
            StorageError: nobody answers.
            Unsupported: the server answers with an error.
            FormatError: its answer is too long, or not of that kind.
        """
        url = self.url + path
        data = None if body is None else json.dumps(body).encode()
        try:
            with self._open(Request(url, data, self._headers), timeout=_SECONDS) as response:
                answer = response.read(_LARGEST_ANSWER)
        except HTTPError as error:
            raise Unsupported(
                "the server refuses the request",
                where=url,
                found=f"{error.code} {error.read(300).decode('utf-8', 'replace')}",
                remedy="set OPENAI_API_KEY to its key" if error.code in (401, 403) else None,
            ) from None
        except (OSError, ValueError) as error:
            raise StorageError(
                "the server does not answer", where=url, found=str(error), remedy="start it, or name another"
            ) from None
        try:
            return msgspec.json.decode(answer, type=kind, strict=False)
        except msgspec.DecodeError as error:
            raise FormatError("the server's answer cannot be read", where=url, found=str(error)) from None


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def open_server(url: str, model: str) -> Responder:
    """Opens a server as the first kind that it is; ``model`` is the adapter's name there.

    Raises:
        UnknownAdapter: the server has no adapter of that name.
        Unsupported: it shows no log-probabilities by token id.
        StorageError: nobody answers.
    """
    connection = Connection(url)
    refusals = []
    for open_as in (_llama_cpp, _openai):
        try:
            return open_as(connection, model)
        except (Unsupported, FormatError) as error:
            refusals.append(error)
    raise Unsupported(
        "it cannot be told what this server computes: it shows no log-probabilities of tokens by their ids",
        where=connection.url,
        found=refusals[-1].sentence,
        remedy="ask adapterpack, vLLM or llama.cpp to serve what it serves",
    )


class _Tokens(msgspec.Struct):
    tokens: list[_Token]


class _LlamaPrompt(msgspec.Struct):
    prompt: str


class _LlamaAdapter(msgspec.Struct):
    id: int
    path: str


class _Logprob(msgspec.Struct):
    logprob: Annotated[float, msgspec.Meta(ge=-1e6, le=1)]


class _LlamaLogprob(_Logprob):
    id: _Token


class _LlamaPosition(msgspec.Struct):
    top_logprobs: Annotated[list[_LlamaLogprob], _SOME]


class _LlamaCompletion(msgspec.Struct):
    completion_probabilities: Annotated[list[_LlamaPosition], _SOME]


def _llama_cpp(connection: Connection, model: str) -> Responder:
    """llama-server: its adapters have numbers, and each request says how strong each of them is. One without
    adapters may have been given a merged file.
    """
    numbers = {
        PurePath(one.path).stem: one.id for one in connection.send("/lora-adapters", list[_LlamaAdapter])
    }
    if numbers:
        require_adapter(model, numbers, connection.url)

    def ask(scale: float) -> Ask:
        scales = [{"id": one, "scale": scale if name == model else 0.0} for name, one in numbers.items()]
        options = {
            "n_predict": 1,
            "n_probs": _SHOWN_BY_LLAMA,
            "grammar": _ANY_LETTER,
            "cache_prompt": False,
            "lora": scales,
        }

        def answer(ids: Sequence[int], wanted: Iterable[int]) -> Logprobs:
            body = {"prompt": list(ids), **options}
            first, *_ = connection.send("/completion", _LlamaCompletion, body).completion_probabilities
            found = {one.id: one.logprob for one in first.top_logprobs}
            # a token that is not shown is less likely than all that are
            return dict.fromkeys(wanted, min(found.values())) | found

        return answer

    def render(messages: Messages) -> list[int]:
        text = connection.send("/apply-template", _LlamaPrompt, {"messages": messages}).prompt
        return connection.send("/tokenize", _Tokens, {"content": text, "parse_special": True}).tokens

    return Responder(f"llama.cpp at {connection.url}", ask(1.0), ask(0.0) if numbers else None, render)


class _Model(msgspec.Struct):
    id: str
    parent: str | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Choice(msgspec.Struct):
    prompt_logprobs: Annotated[list[dict[_Token, _Logprob] | None], _SOME]


class _Completion(msgspec.Struct):
    choices: Annotated[list[_Choice], _SOME]


def _openai(connection: Connection, model: str) -> Responder:
    """adapterpack and vLLM: an adapter is a model whose parent is the base. They show the log-probability of
    a prompt's last token, and those of the likeliest ones in its place.
    """
    parents = {one.id: one.parent for one in connection.send("/v1/models", _Models).data}
    require_adapter(model, parents, connection.url)

    def ask(name: str) -> Ask:
        def answer(ids: Sequence[int], wanted: Iterable[int]) -> Logprobs:
            found: Logprobs = {}
            for token in wanted:
                if token not in found:
                    body = {
                        "model": name,
                        "prompt": [*ids, token],
                        "max_tokens": 1,
                        "prompt_logprobs": _SHOWN,
                    }
                    choice, *_ = connection.send("/v1/completions", _Completion, body).choices
                    found |= {id: one.logprob for id, one in (choice.prompt_logprobs[-1] or {}).items()}
            return found

        return answer

    ask(model)([1], [1])  # a server of another kind does not show them
    base = parents[model]

    def render(messages: Messages) -> list[int]:
        return connection.send("/tokenize", _Tokens, {"model": model, "messages": messages}).tokens

    return Responder(f"{model} at {connection.url}", ask(model), None if base is None else ask(base), render)


def require_adapter(model: str, names: Collection[str], where: object) -> None:
    """Checks that a target has an adapter of this name.

    Raises:
        UnknownAdapter: it has none.
    """
    require_among("there is no adapter of this name", model, names, UnknownAdapter, where, found=model)
