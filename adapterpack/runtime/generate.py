"""Text generation on a decoder bundle: batched prefill, then one step a token on a cache that stays where it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from ..errors import ConfigError, Unsupported
from ..methods import acted
from .bundle import ADAPTER_POSITIONS
from .session import Names, Session, last_places, pad, positions

Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]
Emit = Callable[[int, int, str], None]
"""called with (row, token id, text so far) for every new token"""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; ``temperature`` 0 is greedy. ``stop`` texts end a row and are cut off."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):  # else each of its characters would be a stop text
            object.__setattr__(self, "stop", (self.stop,))
        if self.max_new_tokens < 1 or not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError("sampling parameters out of range", found=self,
                              expected="max_new_tokens >= 1, temperature >= 0, top_k >= 0, 0 < top_p <= 1")


@dataclass(frozen=True)
class Generation:
    """One row's answer: its text, its new token ids, why it ended (``stop`` or ``length``), and which adapter made it."""

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    adapter: str | None
    prompt_tokens: int


def generate(
    session: Session, prompts: Sequence[Prompt], adapters: Names = None, sampling: Sampling | None = None, emit: Emit | None = None
) -> list[Generation]:
    """Answers to ``prompts``, all in one batch, each row with its own adapter.

    A prompt is a text (one user message), a list of messages, or a list of token ids.

    Raises:
        Unsupported: the bundle is not a decoder.
        UnknownAdapter: a name that the bundle does not hold.
        ConfigError: a prompt without a token.
    """
    if session.bundle.task != "text-generation":
        raise Unsupported("the bundle does not generate text", found=session.bundle.task, expected="text-generation")
    if not prompts:
        return []
    options = sampling or Sampling()
    names = session.names(adapters, len(prompts))
    first = session.before(names)
    run = session.pin(names)
    rows = [_ids(session, prompt) for prompt in prompts]
    draws = [np.random.default_rng([options.seed, row]) for row in range(len(rows))]  # a row's draws do not depend on the others
    batch = pad(rows, session.tokenizer.pad_id, left=session.bundle.padding == "left")
    mask = first.covering(batch["attention_mask"])
    feeds: dict[str, Any] = {**batch, "attention_mask": mask, "position_ids": positions(mask)[:, first.width :], **first.cache}
    acting = session.acting(batch, names)
    values = _values(session, {**feeds, ADAPTER_POSITIONS: acting})
    before = acted(acting, None)
    state = _Rows(session, options, emit, len(rows))
    last = last_places(batch["attention_mask"])
    for _ in range(options.max_new_tokens):
        outputs = run(values)
        tokens = _choose(outputs["logits"].numpy()[range(len(rows)), last], options, draws)
        last = np.zeros_like(last)
        state.take(tokens)
        if state.finished:
            break
        mask = np.concatenate([mask, np.ones((len(rows), 1), np.int64)], axis=1)
        step = {"input_ids": tokens[:, None], "attention_mask": mask, "position_ids": positions(mask)[:, -1:]}
        acting = session.acting({**step, "attention_mask": mask[:, -1:]}, names, before)
        before = acted(acting, before)
        values = _values(session, {**step, ADAPTER_POSITIONS: acting})
        values |= {name.replace("present.", "past_key_values."): value for name, value in outputs.items() if name.startswith("present.")}
    return [Generation(state.texts[i], tuple(state.ids[i]), state.reasons[i] or "length", names[i], len(row)) for i, row in enumerate(rows)]


def _values(session: Session, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Those of the arrays that the graph takes, as feeds."""
    return {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items() if name in session.inputs}


class _Rows:
    """What the rows of a batch have said so far."""

    def __init__(self, session: Session, options: Sampling, emit: Emit | None, count: int) -> None:
        self.tokenizer, self.options, self.emit = session.tokenizer, options, emit
        self.ids: list[list[int]] = [[] for _ in range(count)]
        self.texts = [""] * count
        self.reasons: list[str | None] = [None] * count

    @property
    def finished(self) -> bool:
        return all(self.reasons)

    def take(self, tokens: np.ndarray) -> None:
        """One new token for every row; rows that have ended take no notice."""
        for row, token in enumerate(map(int, tokens)):
            if self.reasons[row]:
                continue
            if token in self.tokenizer.eos_ids:
                self.reasons[row] = "stop"
                continue
            self.ids[row].append(token)
            text = self.tokenizer.decode(self.ids[row])
            cut = min((at for at in (text.find(stop) for stop in self.options.stop if stop) if at >= 0), default=None)
            self.texts[row] = text if cut is None else text[:cut]
            if cut is not None:
                self.reasons[row] = "stop"
            if self.emit:
                self.emit(row, token, self.texts[row])


def _ids(session: Session, prompt: Prompt) -> list[int]:
    items = [prompt] if isinstance(prompt, str) else list(prompt)
    if items and all(isinstance(item, int) for item in items):
        return [int(item) for item in items]  # type: ignore[call-overload]
    if not isinstance(prompt, str) and not all(isinstance(item, Mapping) and "content" in item for item in items):
        raise ConfigError("a prompt is a text, a list of messages with role and content, or a list of token ids", found=repr(prompt)[:80])
    ids = session.tokenizer.prompt(prompt) if items else []  # type: ignore[arg-type]
    if not ids:
        raise ConfigError("a prompt has no tokens", where=session.folder, found=repr(prompt))
    return ids


def _choose(logits: np.ndarray, options: Sampling, draws: Sequence[np.random.Generator]) -> np.ndarray:
    """The next token of each row from its logits ``[rows, vocabulary]``: the largest, or drawn after top-k and top-p."""
    if options.temperature == 0:
        greedy: np.ndarray = np.argmax(logits, axis=-1).astype(np.int64)
        return greedy
    chosen = []
    for row, rng in zip(logits.astype(np.float64) / options.temperature, draws, strict=True):
        order = np.argsort(-row, kind="stable")
        order = order[: options.top_k] if options.top_k else order
        weights = np.exp(row[order] - row[order[0]])
        weights /= weights.sum()
        kept = int(np.searchsorted(np.cumsum(weights), options.top_p)) + 1
        order, weights = order[:kept], weights[:kept] / weights[:kept].sum()
        chosen.append(int(rng.choice(order, p=weights)))
    return np.array(chosen, np.int64)
