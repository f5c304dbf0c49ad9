"""Prepares requests for the engine: tokenizes prompts, reads sampling parameters, and compiles grammars, on
threads and within limits.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from ...errors import AdapterpackError, ConfigError
from ...http import HTTPError, invalid_request
from ...io import Json
from ...pack import Pack
from ...runtime import CallReader, DecoderEngine, is_prompt, prompt_ids, see
from ...runtime.adapters import Mix
from ...runtime.generation import GRAMMARS, MaskQueue, Sampling, TokenMask, grammar_mask, sampling_of
from ...runtime.media import SeenPicture, join_pictures
from ...runtime.sessions.generate import encode_images
from ...runtime.tools.family import family_of
from ...tasks import Arrays
from ..tenants import ServerLimits
from .requests import ChatRequest, CompletionRequest, Sampled
from .tools import ToolUse, tool_use


class PreparedRequest(NamedTuple):
    """The prompts of a request, and what its rows share."""

    prompts: list[list[int]]
    features: list[Arrays]
    """What the decoder reads of the images of each prompt."""
    samplings: list[Sampling]
    mask: Callable[[], TokenMask | None]
    """Makes the mask of one row."""
    calls: Callable[[], CallReader] | None = None
    """Makes the reader of tool calls for one answer."""


class Preparer:
    """Prepares requests for an engine. ``sampling`` names the source of parameters that a request leaves out.

    Grammars can take seconds to compile. They have threads of their own, and each tenant compiles one at a
    time, so that they do not delay other requests.
    """

    def __init__(self, engine: DecoderEngine, limits: ServerLimits, sampling: str) -> None:
        self._engine = engine
        self._limits = limits
        self._rule = sampling
        self._tokens, self._forms = (
            ThreadPoolExecutor(count, thread_name_prefix=f"adapterpack-{name}")
            for count, name in ((4, "prompts"), (4, "forms"))
        )
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._mask_queues: WeakValueDictionary[str, MaskQueue] = WeakValueDictionary()
        # an invalid generation config fails here, not in every request
        sampling_of({"sampling": sampling}, engine.bundle.generation_config, engine.bundle.folder)
        self._forms.submit(self._warm)

    def close(self) -> None:
        """Stops the threads."""
        self._tokens.shutdown(wait=False)
        self._forms.shutdown(wait=False)

    def text(self, ids: Sequence[int]) -> str:
        """Decodes token ids, for requests that echo their prompt."""
        return self._engine.bundle.tokenizer.decode(ids)

    async def prepare(self, body: Sampled, tenant: str, pack: Pack | Mix | None) -> PreparedRequest:
        """Tokenizes the prompts of a request, encodes its images for a row with ``pack``, reads its
        parameters, and compiles its grammar.

        Raises:
            HTTPError: the request exceeds a limit, or a prompt exceeds the context.
            AdapterpackError: a prompt, a parameter or a grammar is invalid.
        """
        loop = asyncio.get_running_loop()
        given = body.parameters(self._limits)
        tools = self._tool_use(body)
        form = {name: given[name] for name in GRAMMARS if name in given}
        if tools is not None:
            given = self._with_tools(given, tools)
        read = await loop.run_in_executor(self._tokens, self._prompts, body, pack)
        prompts = [ids for ids, _ in read]
        samplings = self._samplings(body, prompts, given)
        mask: Any = None
        if any(name in given for name in GRAMMARS):
            turn = self._turns.setdefault(tenant, asyncio.Lock())
            queue = self._mask_queues.setdefault(tenant, MaskQueue()) if self._limits.masks_beside else None
            compiled = partial(grammar_mask, self._engine.bundle.tokenizer, queue=queue)
            async with turn:
                if tools is None:
                    mask = await loop.run_in_executor(self._forms, compiled, samplings[0])
                else:
                    # compiled alone first, so that an error names the right field
                    await loop.run_in_executor(self._forms, compiled, Sampling(**form))
                    mask = await loop.run_in_executor(self._forms, compiled, samplings[0], "tools")
        copy = (lambda: None) if mask is None else mask.copy
        features = [seen for _, seen in read]
        return PreparedRequest(prompts, features, samplings, copy, None if tools is None else tools.reader)

    def _tool_use(self, body: Sampled) -> ToolUse | None:
        if not isinstance(body, ChatRequest):
            return None
        family = family_of(self._engine.bundle.tokenizer.template)
        if family is None and any(message.tool_calls for message in body.messages):
            raise HTTPError(
                400, "no_tool_format", "this model's notation of tool calls is not known", param="messages"
            )
        return tool_use(body.tools, body.tool_choice, body.parallel_tool_calls, family, self._limits)

    def _with_tools(self, given: Json, tools: ToolUse) -> Json:
        """Adds the parameters that the tools of a request need. A JSON schema then applies to answers without
        a call.

        Raises:
            HTTPError: the request has a grammar other than a JSON schema.
        """
        form = next((name for name in GRAMMARS if name in given), None)
        schema = None if form is None else given[form]
        if form is not None and not isinstance(schema, dict):
            raise invalid_request(
                "an answer that may call tools has a form only by a JSON schema, as an object",
                "tools",
            )
        more = tools.parameters(self._engine.bundle.tokenizer.special_id, schema)
        given = {name: value for name, value in given.items() if name != form}
        return {**given, **more, "stop": (*given.get("stop", ()), *more.get("stop", ()))}

    def _warm(self) -> None:
        """Loads what the first grammar would otherwise wait for: the tokens in llguidance's form, and a
        sandbox process.
        """
        # on failure every request with a grammar gets the error itself
        with suppress(AdapterpackError):
            grammar_mask(self._engine.bundle.tokenizer, Sampling(regex="a"))

    def _prompts(self, body: Sampled, pack: Pack | Mix | None) -> list[tuple[list[int], Arrays]]:
        if isinstance(body, ChatRequest):
            return [self._conversation(body, pack)]
        assert isinstance(body, CompletionRequest)
        return [(self._text(prompt), {}) for prompt in body.prompts]

    async def count(self, body: ChatRequest) -> int:
        """Returns the number of tokens of a conversation's prompt.

        Raises:
            HTTPError, AdapterpackError: see :meth:`prepare`.
        """
        ids, _ = await asyncio.get_running_loop().run_in_executor(self._tokens, self._read, body)
        return len(ids)

    def unread(self, body: ChatRequest) -> list[str]:
        """Returns the values for the chat template that this model's does not mention."""
        source = self._engine.bundle.tokenizer.template or ""
        given = [*(body.chat_template_kwargs or {}), *(["reasoning_effort"] if body.reasoning_effort else [])]
        return [name for name in given if name not in source]

    def _conversation(self, body: ChatRequest, pack: Pack | Mix | None) -> tuple[list[int], Arrays]:
        ids, pictures = self._read(body)
        bundle = self._engine.bundle
        if "image_features" not in bundle.task.main.inputs:
            return ids, {}
        return ids, encode_images(bundle, [ids], [pack], join_pictures(pictures))[0]

    def _read(self, body: ChatRequest) -> tuple[list[int], list[SeenPicture]]:
        """Returns the tokens of a conversation, and its pictures."""
        if len(body.messages) > self._limits.messages:
            raise invalid_request(
                f"a conversation may have at most {self._limits.messages} messages",
                "messages",
            )
        bundle = self._engine.bundle
        messages = body.conversation()
        if bundle.tokenizer.template is None and not is_prompt(bundle, messages):
            raise HTTPError(
                400,
                "no_chat_template",
                "this model has no chat template: use /v1/completions",
                param="messages",
            )
        tools = [tool.for_template() for tool in body.tools or ()] if body.tool_choice != "none" else []
        if "image_features" in bundle.task.main.inputs:
            return see(bundle, messages, (), tools, body.template_values)
        if any(message.images for message in body.messages):
            raise invalid_request("this model reads no images", "messages")
        return prompt_ids(bundle, messages, tools, values=body.template_values), []

    def _text(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt_ids(self._engine.bundle, prompt)
        ids = self._engine.bundle.tokenizer.encode(prompt)
        if not ids:
            raise ConfigError("a prompt has no tokens", where="prompt")
        return ids

    def _samplings(self, body: Sampled, prompts: Sequence[Sequence[int]], given: Json) -> list[Sampling]:
        """Returns the parameters for each prompt's rows, which differ in the room that the prompt leaves for
        an answer.
        """
        most = self._engine.max_length
        count = body.drawn
        if (longest := max(map(len, prompts))) > most:
            raise HTTPError(
                400,
                "context_length_exceeded",
                f"the prompt has {longest} tokens, and this server takes at most {most}",
                param="messages" if isinstance(body, ChatRequest) else "prompt",
            )
        rooms = [min(body.most_tokens or most, most - len(prompt) + 1) for prompt in prompts]
        if sum(rooms) * count > self._limits.answer_tokens:
            raise invalid_request(
                f"the answers of a request may have at most {self._limits.answer_tokens} tokens in all: "
                "ask for fewer or shorter ones",
                "max_tokens",
            )
        given = {"seed": secrets.randbits(63), **given, "sampling": self._rule}
        bundle = self._engine.bundle
        return [
            sampling_of({**given, "max_new_tokens": room}, bundle.generation_config, bundle.folder)
            for room in rooms
        ]
