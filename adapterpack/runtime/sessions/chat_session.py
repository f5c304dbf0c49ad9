"""Holds a conversation with a decoder in one process; what earlier turns left in the prefix cache is not read
again.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...pack import Pack
from ...paths import StrPath
from ...tasks import Arrays, describe, require_chat
from ...tasks.data import Picture
from ..engine import LONGEST_POOL
from ..generation import Sampling, sampling_of
from ..media import join_pictures
from ..prompts import prompt_ids, see
from ..providers import Device
from .generate import Generation, GrowingEngine, encode_images, generate, length_for, positions_of
from .session import Session

_MOST_TOKENS = 1024
"""The most tokens of an answer, unless the caller says."""
_PREFIXES = 256 << 20
"""The bytes of the prefix cache."""


class _Stopped(Exception):
    """The answer was stopped."""


def chat(
    bundle: StrPath,
    adapter: str | None = None,
    *,
    packs: Sequence[Pack | StrPath] = (),
    system: str | None = None,
    provider: str | Device | None = None,
    **sampling: Any,
) -> ChatSession:
    """Holds a conversation with a model, and streams each answer.

    ``packs`` are loaded besides the bundle's adapters, ``adapter`` answers first (None: the base), and
    ``system`` is the message before all others. ``sampling`` are parameters of answers; the default is what
    the model's ``generation_config.json`` says.

    Raises:
        Unsupported: the model answers no messages.
        UnknownAdapter: the bundle has no adapter of that name.
        ConfigError: a sampling parameter is unknown or invalid.

    Example:
        >>> talk = chat("bundle", "orders")  # doctest: +SKIP
        >>> talk.say("Order 12 mugs for Lisbon", emit=print)["finish_reason"]  # doctest: +SKIP
        'stop'
        >>> talk.adapter = None  # doctest: +SKIP
    """
    session = Session(bundle, provider)
    require_chat(session.task, session.given)
    for pack in packs:
        session.load(pack)
    return ChatSession(session, adapter, system, sampling)


class ChatSession:
    """A conversation: its ``messages``, the ``system`` message before them, and the ``sampling`` of answers,
    all of which may be changed between turns. One thread at a time may call it; :meth:`stop` is for others.
    """

    def __init__(
        self, session: Session, adapter: str | None, system: str | None, sampling: Mapping[str, Any]
    ) -> None:
        self.session, self.system = session, system
        self.messages: list[dict[str, Any]] = []
        self._engines = GrowingEngine(_PREFIXES)
        self._stopping = False
        self.adapter = adapter
        self.sampling = sampling

    @property
    def adapter(self) -> str | None:
        """The name of the adapter that answers next, None for the base."""
        return self._adapter

    @adapter.setter
    def adapter(self, name: str | None) -> None:
        (self._adapter,) = self.session.names([name if name is not None else self.session.default], 1)

    @property
    def sampling(self) -> Mapping[str, Any]:
        """The parameters of answers that differ from the model's own."""
        return self._sampling

    @sampling.setter
    def sampling(self, values: Mapping[str, Any]) -> None:
        self._options(values)
        self._sampling = dict(values)

    @property
    def sees(self) -> bool:
        """Whether messages may have images."""
        return "image_features" in self.session.task.main.inputs

    @property
    def note(self) -> str | None:
        """What is unusual: how a model without a chat template reads a conversation; None with one."""
        if self.session.tokenizer.template is not None:
            return None
        if self.session.task.has_encoder:
            return "this model has no chat template: it reads each message by itself"
        return "this model has no chat template: it continues the text of all messages, a line each"

    def stop(self) -> None:
        """Ends the answer in progress at its next token; any thread and any signal handler may call it."""
        self._stopping = True

    def say(
        self,
        text: str,
        images: Sequence[Picture] = (),
        emit: Callable[[str], object] = lambda piece: None,
    ) -> dict[str, Any]:
        """Answers a message, and adds both to the conversation. ``emit`` gets the answer piece by piece. An
        answer that was stopped is kept as far as it came.

        Returns:
            As a row of :func:`adapterpack.run`: ``adapter``, ``pack``, ``completion``, ``finish_reason`` and
            the numbers of tokens, of which ``reused_tokens`` were known from earlier turns.

        Raises:
            ConfigError: the conversation is longer than the model's context, or an image does not fit.
            NonFinite: the model gives NaN or infinity.
        """
        parts = [{"type": "image", "image": image} for image in images]
        content: Any = [*parts, {"type": "text", "text": text}] if parts else text
        messages = [*self.messages, {"role": "user", "content": content}]
        self._stopping = False
        answer = self._answer(messages, emit)
        if answer["completion"] or not self._stopping:
            self.messages = [*messages, {"role": "assistant", "content": answer["completion"]}]
        return answer

    def _options(self, values: Mapping[str, Any]) -> Sampling:
        given = {
            "sampling": "model",
            "max_new_tokens": _MOST_TOKENS,
            "seed": secrets.randbits(63),
            **values,
        }
        return sampling_of(given, self.session.generation_config, self.session.folder)

    def _read(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], Arrays]:
        """Returns the tokens of a conversation, and its images."""
        session = self.session
        if session.task.has_encoder and session.tokenizer.template is None:
            messages = messages[-1:]
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        if self.sees:
            ids, seen = see(session, [*before, *messages])
            return ids, join_pictures(seen)
        return prompt_ids(session, [*before, *messages]), {}

    def _answer(self, messages: Sequence[Mapping[str, Any]], emit: Callable[[str], object]) -> dict[str, Any]:
        session = self.session
        name = self._adapter
        options = self._options(self._sampling)
        ids, images = self._read(messages)
        pack = None if name is None else session.pack(name)
        shown, reused = "", 0

        def pass_on(row: int, token: int, text: str) -> None:
            nonlocal shown
            if text != shown:
                emit(text[len(shown) :])
            shown = text
            if self._stopping and not session.bundle.decoder:
                raise _Stopped

        if session.bundle.decoder:
            positions = positions_of(session, ids, pack)
            length = max(
                length_for(session, positions, options.max_new_tokens),
                length_for(session, 0, LONGEST_POOL),
            )
            engine = self._engines.of(session, options.num_beams, length)
            (features,) = encode_images(session, [ids], [pack], images)
            request = engine.row(ids, pack, options, features)
            engine.submit(request)
            try:
                while engine.busy and not self._stopping:
                    for event in engine.step():
                        if event.error is not None:
                            raise event.error
                        pass_on(0, 0, event.text)
            finally:
                if engine.busy:
                    engine.cancel(request.number)
                    engine.step()
            made = Generation.of(request.answer, name, len(ids))
            reused = request.sequences[0].reused
        else:
            try:
                (made,) = generate(session, [ids], name, options, pass_on, images)
            except _Stopped:
                made = Generation(shown, (), "cancelled", name, len(ids))
        return {
            "adapter": name,
            "pack": None if pack is None else pack.id,
            **describe(made, session),
            "reused_tokens": reused,
        }
