"""Structured output: compiles a JSON schema, a regular expression or a grammar to a mask of the tokens that
may be next.

llguidance (the extra ``structured``) computes the masks. Grammars are untrusted input: each is compiled in a
sandbox first, with limits of memory and time, and every step of it has a time limit.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import numpy as np

from ...errors import ConfigError, FormatError
from ...extras import needed_by
from ...library_errors import library_errors
from ...sandbox.limits import SandboxLimits
from ...sandbox.sandbox import Sandbox
from ..text import NoTokenizer, Tokenizer
from .grammar_check import limits
from .sampling import GRAMMARS, Sampling

MAX_CHARACTERS = 1 << 17
"""The most characters of a schema, an expression or a grammar."""
SLOW = 0.002
"""Seconds of CPU time. After a step that takes longer, the masks of a grammar are computed on other threads.
"""
STEP = 0.25
"""The most seconds of CPU time for one mask or token; ordinary grammars take a tenth of a millisecond.
"""
_SANDBOX = Sandbox(
    "adapterpack.runtime.generation.grammar_check:check", SandboxLimits(memory=512 << 20, seconds=3)
)


class MaskQueue:
    """Computes the slow masks of one tenant on a few shared threads, one at a time, in turn with those of
    other tenants. The engine's thread meanwhile serves other rows.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs = False
        self._tasks = deque[tuple[Future[bytes], Callable[[], bytes]]]()

    def submit(self, compute: Callable[[], bytes]) -> Future[bytes]:
        """Queues a function and returns the future of its result."""
        future: Future[bytes] = Future()
        with self._lock:
            self._tasks.append((future, compute))
            begins = not self._runs
            self._runs = True
        if begins:
            _threads().submit(self._take_turn)
        return future

    def _take_turn(self) -> None:
        with self._lock:
            future, compute = self._tasks.popleft()
        try:
            future.set_result(compute())
        except BaseException as error:
            future.set_exception(error)
        with self._lock:
            self._runs = bool(self._tasks)
            if self._runs:
                _threads().submit(self._take_turn)


@cache
def _threads() -> ThreadPoolExecutor:
    """Returns the threads for masks; on Linux they run at a lower priority than the engine's."""

    def yield_to_others() -> None:
        if sys.platform == "linux":  # only Linux has a priority for each thread
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)

    return ThreadPoolExecutor(2, "adapterpack-masks", yield_to_others)


@dataclass
class _Speed:
    """Whether a grammar has been ``slow`` in any of its rows; its further masks are then computed in the
    ``queue``, if it has one.
    """

    queue: MaskQueue | None
    slow: bool = False


class TokenMask:
    """The tokens that a grammar of llguidance permits next in a row."""

    def __init__(self, matcher: Any, parameter: str, speed: _Speed) -> None:
        self._matcher = matcher
        self._parameter = parameter
        self._speed = speed
        self._bits: bytes | None = None
        self.finished = False
        """Whether only an end token may follow."""
        self._next: Future[bytes] | None = None

    def copy(self) -> Self:
        """Returns an independent mask in the same state, for another row."""
        self._settle()
        mask = copy.copy(self)
        mask._matcher = self._matcher.deep_copy()
        return mask

    @property
    def pending(self) -> Future[bytes] | None:
        """The computation of the next mask, if it still runs on another thread; :meth:`allowed` waits for
        it.
        """
        return None if self._next is None or self._next.done() else self._next

    def _settle(self) -> None:
        """Waits for the mask that another thread computes, since a matcher is not thread-safe."""
        if self._next is not None:
            pending = self._next
            self._next = None
            self._bits = pending.result()

    def _compute_mask(self) -> bytes:
        bits: bytes = self._step(self._matcher.compute_bitmask)
        return bits

    def allowed(self, vocabulary: int) -> np.ndarray:
        """Returns whether each token may be next, ``[vocabulary]`` bool. End tokens are allowed only where
        the answer may end.

        Raises:
            ConfigError: the grammar has become too large, or takes too long.
        """
        self._settle()
        if self._bits is None:
            self._bits = self._compute_mask()
        bits = np.frombuffer(self._bits, np.uint8)
        allowed = np.zeros(vocabulary, bool)
        # padded vocabularies have more logits than the tokenizer has tokens
        count = min(vocabulary, 8 * len(bits))
        allowed[:count] = np.unpackbits(bits, count=count, bitorder="little")
        return allowed

    def accept(self, token: int) -> None:
        """Advances the grammar by the token that was chosen.

        Raises:
            ConfigError: the grammar does not permit the token, or the step takes too long.
        """
        self._settle()
        self._bits = None
        self._step(self._matcher.consume_token, token)
        self.finished = bool(self._matcher.is_stopped())
        if self._speed.slow and self._speed.queue is not None and not self.finished:
            self._next = self._speed.queue.submit(self._compute_mask)

    def _step(self, step: Any, *arguments: Any) -> Any:
        start = time.thread_time()
        with library_errors("llguidance", "the answer cannot go on", where=self._parameter, kind=ConfigError):
            result = step(*arguments)
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().removesuffix("<non-verbose/>").split())
            raise ConfigError(f"the answer cannot go on: {reason}", where=self._parameter)
        seconds = time.thread_time() - start
        self._speed.slow |= seconds > SLOW
        if seconds > STEP:
            raise ConfigError(
                "a step of the grammar takes too long",
                where=self._parameter,
                expected=f"at most {STEP} s",
                remedy="write it with less ambiguity",
            )
        return result


def grammar_mask(
    tokenizer: Tokenizer | NoTokenizer,
    options: Sampling,
    where: str | None = None,
    queue: MaskQueue | None = None,
) -> TokenMask | None:
    """Returns the mask at the beginning of a row, or None if the options have no grammar. Errors call the
    grammar ``where``, by default the parameter's name. Slow masks are computed in the ``queue``, if there is
    one.

    Raises:
        MissingExtra: llguidance is not installed.
        Unsupported: the tokenizer's tokens cannot be used.
        ConfigError: the schema, expression or grammar is invalid, cannot be enforced, or is too large or too
            slow to compile.
    """
    parameter = next((name for name in GRAMMARS if getattr(options, name) is not None), None)
    if parameter is None:
        return None
    where = where or parameter
    with needed_by(parameter):
        from llguidance import LLMatcher  # noqa: PLC0415 - an extra

    assert isinstance(tokenizer, Tokenizer)  # tokenizer_of returns one for options with a grammar
    text = _text(parameter, getattr(options, parameter), where)
    tokens = tokenizer.for_grammars
    try:
        grammar = _SANDBOX.run(
            json.dumps([parameter, text]).encode(), "this cannot be compiled", where
        ).decode()
    except FormatError as error:
        raise ConfigError(error.what, where=error.where) from error
    with library_errors("llguidance", "this cannot be compiled", where=where, kind=ConfigError):
        mask = TokenMask(LLMatcher(tokens, grammar, log_level=0, limits=limits()), where, _Speed(queue))
    mask.allowed(1)  # a grammar that permits no first token fails here, not while the row runs
    return mask


def _text(parameter: str, value: Any, where: str) -> str:
    if parameter == "json_schema" and not isinstance(value, str):
        try:
            value = json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"this is not a JSON schema: {error}", where=where) from error
    if not isinstance(value, str) or len(value) > MAX_CHARACTERS:
        raise ConfigError(
            "this must be a text, and not too long",
            where=where,
            expected=f"at most {MAX_CHARACTERS} characters",
            found=len(value) if isinstance(value, str) else type(value).__name__,
        )
    return value
