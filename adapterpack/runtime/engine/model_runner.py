"""The rows that are in the pool, side by side: those that run first, and behind them those whose prompts are
being read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...adapter_methods.core.token_positions import has_acted
from ...base.thresholds import longrope_length
from ...bundle.decoder_graph import DECODER, LAST_POSITIONS
from ..open_bundle import OpenBundle
from ..ort.values import HOST
from .adapter_feeds import AdapterFeeds, Feeds, ResidentAdapter
from .adapter_reader import AdapterReader
from .bound_step import BoundStep
from .kv_pool import KVPool
from .prefix_cache import PrefixCache
from .sources import Sources

MOST_CAPTURED = 64
"""Shapes of steps that are captured: numbers of rows, and ranks of their adapters. Others run as they are."""


@dataclass(eq=False, kw_only=True)
class SequenceState:
    """One sequence of tokens in the runner. What it needs is held here, and never looked up again by a name.

    ``prompt`` are its tokens, of which ``num_computed_tokens`` have been read; sequences with another
    ``salt`` neither find nor tell what was read of it. ``features`` are other inputs of its pass, and
    ``source`` those of the encoder's. ``kv_len`` counts the positions that it has in the cache, and
    ``next_token`` is the one that comes next. ``request`` is whose it is.
    """

    prompt: Sequence[int]
    adapter: ResidentAdapter | None = None
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    source: Mapping[str, np.ndarray] = field(default_factory=dict)
    salt: bytes = b""
    request: Any = None
    source_length: int = field(init=False, default=0)
    """The positions that the encoder has given it, once it has read the source."""
    num_computed_tokens: int = 0
    kv_len: int = 0
    next_token: int = 0
    acting: np.ndarray | None = field(init=False, default=None)
    """At which of the prompt's tokens its adapter acts; None where it acts everywhere."""
    acted: bool = field(init=False, default=False)
    """Whether it has acted so far."""
    acted_before: bool = field(init=False, default=False)
    """The same before the last step."""
    answered: list[int] = field(init=False, default_factory=list)
    """The tokens after the prompt that are in the cache."""
    begun: bool = field(init=False, default=False)
    """Whether its prompt is being read, or has been."""

    def fork(self) -> SequenceState:
        """Another sequence of the same prompt and request, which has computed nothing yet."""
        return replace(self, num_computed_tokens=0, kv_len=0, next_token=0)

    def follow(self, other: SequenceState) -> None:
        """Makes it a sequence that is as far as another one of the same prompt."""
        self.num_computed_tokens, self.kv_len = other.num_computed_tokens, other.kv_len
        self.source_length, self.acted = other.source_length, other.acted
        self.begun, self.answered = other.begun, list(other.answered)

    def __post_init__(self) -> None:
        if self.adapter is not None and self.adapter.acts is not None:
            whole = np.ones((1, len(self.prompt)), bool)
            self.acting = self.adapter.acts.mask(np.array([self.prompt], np.int64), whole, whole, None)[0]
            self.acted = bool(self.acting.any())

    @property
    def tokens(self) -> list[int]:
        """The tokens that are in its cache, those of the adapter's prompt aside."""
        return [*self.prompt[: self.num_computed_tokens], *self.answered]


class ModelRunner:
    """Up to ``max_rows`` rows of up to ``max_length`` positions; it runs their passes and knows nothing of
    text or sampling.

    ``prefilled`` counts the tokens of prompts that were read, ``reused`` those that were known from rows
    before; these are kept in up to ``prefix_budget`` bytes.
    """

    def __init__(
        self,
        bundle: OpenBundle,
        reader: AdapterReader,
        max_rows: int,
        max_length: int,
        prefix_budget: int = 0,
    ) -> None:
        self.max_rows, self.graph, self._reader = max_rows, bundle.graph(DECODER), reader
        self._pool = KVPool(self.graph, max_rows, max_length)
        self._sources = Sources(bundle, self.graph, max_rows)
        self._feeds = AdapterFeeds(
            reader.layout, max_rows, HOST if self.graph.resolved.captures else self.graph.memory
        )
        self.prefixes = PrefixCache(prefix_budget)
        self.prefilled = self.reused = 0
        self.running: list[SequenceState] = []
        self.reading: list[SequenceState] = []
        self._composition: tuple[int, Sequence[ResidentAdapter | None]] = (0, ())
        self._pass: BoundStep | None = None
        self.fixed = self.graph.resolved.captures
        """Whether steps of one shape have one memory for good, which a captured run needs."""
        self._captured: dict[object, BoundStep] = {}
        self._short = longrope_length(bundle.config) if LAST_POSITIONS in self.graph.inputs else None
        """The most positions of a row whose numbers are those of short ones."""

    def __len__(self) -> int:
        return len(self.running) + len(self.reading)

    def read_cache(self, place: int, length: int) -> dict[str, np.ndarray]:
        """A copy of the first positions ``[heads, length, width]`` of a row's caches, by the graph's inputs
        for them.
        """
        return dict(zip(dict(self._pool.windows(place, 1)), self._pool.read(place, 0, length), strict=True))

    def admit(self, row: SequenceState) -> None:
        """Puts a row behind the others, with what its adapter's prompt puts into its cache."""
        if row.adapter is not None and row.adapter.prompt is not None:
            self._pool.write(len(self), self._reader.caches(row.adapter.prompt))
            row.kv_len = row.adapter.virtual
        self.reading.append(row)

    def next_to_read(self) -> SequenceState:
        """The row whose prompt is read next. When its turn comes, what is known of the prompt is taken over,
        also from rows that were admitted with it.
        """
        row = self.reading[0]
        if self.prefixes.budget and not row.begun and not (row.features or row.source):
            whole = row.kv_len + len(row.prompt)
            row.num_computed_tokens = self.prefixes.restore(
                row, self._pool, len(self.running), self._is_long(whole)
            )
            row.kv_len += row.num_computed_tokens
            self.reused += row.num_computed_tokens
        row.begun = True
        return row

    def prefill(self, tokens: int) -> np.ndarray:
        """Reads the next tokens of the first prompt that is being read; the logits ``[vocabulary]`` after the
        last of them. A row whose prompt has been read is one that runs.
        """
        row = self.reading[0]
        if row.source and not row.source_length and self._sources.read(row, len(self.running)):
            self._pass = None
        acting = (
            None
            if row.acting is None
            else row.acting[row.num_computed_tokens : row.num_computed_tokens + tokens]
        )
        whole = row.kv_len + len(row.prompt) - row.num_computed_tokens
        logits = self._read(
            row,
            len(self.running),
            row.kv_len,
            row.prompt[row.num_computed_tokens : row.num_computed_tokens + tokens],
            acting,
            whole,
        )
        row.num_computed_tokens += tokens
        row.kv_len += tokens
        self.prefilled += tokens
        if row.num_computed_tokens == len(row.prompt):
            self.running.append(self.reading.pop(0))
            self._keep(row, len(self.running) - 1)
        return logits

    def _read(
        self,
        row: SequenceState,
        place: int,
        start: int,
        tokens: Sequence[int],
        acting: np.ndarray | None,
        whole: int,
    ) -> np.ndarray:
        """One pass over tokens of a row from the position ``start`` on; the row has ``whole`` positions in
        the end.
        """
        once = BoundStep(
            self.graph,
            self._pool,
            place,
            1,
            self._feeds.of([row.adapter]),
            self._sources,
            tokens=len(tokens),
            features={**self._no_features(1), **row.features},
        )
        end = start + len(tokens)
        once.ids[0], once.positions[0] = tokens, np.arange(start, end)
        once.last[0], once.longest[...], once.kept[...] = end - 1, end, len(tokens) - 1
        once.ends[...] = whole - 1
        once.read[0] = row.source_length
        once.acting[0] = True if acting is None else acting
        logits: np.ndarray = once.run()[0, 0]
        return logits

    def _reread(self, row: SequenceState, place: int) -> None:
        """Reads again what a row has in its cache, before the token with which it is no longer a short
        one.
        """
        tokens, acting = row.tokens, None
        if row.adapter is not None and row.adapter.acts is not None:
            every = np.ones((1, len(tokens)), bool)
            acting = row.adapter.acts.mask(np.array([tokens], np.int64), every, every, None)[0]
        self._read(row, place, row.kv_len - len(tokens), tokens, acting, row.kv_len + 1)
        self._pass = None

    def _is_long(self, positions: int) -> bool:
        return self._short is not None and positions > self._short

    def _keep(self, row: SequenceState, place: int) -> None:
        if self.prefixes.budget and not (row.features or row.source):
            self.prefixes.keep(row, self._pool, place, self._is_long(row.kv_len))

    def decode(self) -> np.ndarray:
        """One token more in every running row: the logits ``[rows, vocabulary]`` after it."""
        logits = self._decode(self.running, 0).copy()
        for row in self.running:
            _advance(row)
        return logits

    def decode_alone(self, place: int) -> np.ndarray:
        """One token more in one running row by itself: its logits ``[vocabulary]``."""
        row = self.running[place]
        logits: np.ndarray = self._decode([row], place)[0].copy()
        _advance(row)
        return logits

    def retract(self, row: SequenceState) -> None:
        """Takes back the last step of a running row: the next one is the same again."""
        row.kv_len -= 1
        row.answered.pop()
        row.acted = row.acted_before

    def add_rows(self, rows: Sequence[SequenceState]) -> None:
        """Makes room for rows behind the running ones, which go on from others: see :meth:`rearrange`."""
        first = len(self.running)
        for place, row in reversed(list(enumerate(self.reading, first))):
            self._move(row, place, place + len(rows))
        self.running += rows

    def rearrange(self, rows: Sequence[SequenceState], parents: Sequence[int]) -> list[SequenceState]:
        """These running rows of one prompt in another order: the one at each place goes on from the one that
        was at the place that ``parents`` has there. A row stays where it is for the first that goes on from
        it; others take the places of rows from which none does.
        """
        free, kept = [row for place, row in enumerate(rows) if place not in parents], set[int]()
        result = []
        for place in parents:
            row = rows[place]
            if place in kept:
                row = free.pop()
                source, target = (self.running.index(one) for one in (rows[place], row))
                self._pool.move(source, target, rows[place].kv_len)
                if not row.source_length:  # otherwise it has the same source already
                    self._sources.move(source, target, rows[place].source_length)
                row.follow(rows[place])
            kept.add(place)
            result.append(row)
        return result

    def remove(self, row: SequenceState, keep: bool = True) -> None:
        """Takes a row out. The last running row takes the place of one that ran; prompts that are being read
        keep their order. ``keep`` what it has read for others that begin as it did.
        """
        if row in self.running:
            place, last = self.running.index(row), len(self.running) - 1
            if keep:
                self._keep(row, place)
            if place != last:
                self.running[place] = self.running[last]
                self._move(self.running[place], last, place)
            self.running.pop()
            behind, first = list(self.reading), last
        else:
            place = self.reading.index(row)
            self.reading.remove(row)
            behind, first = self.reading[place:], len(self.running) + place
        for offset, other in enumerate(behind):
            self._move(other, first + offset + 1, first + offset)
        if not len(self):
            self._feeds.forget()
            self._sources.forget()
            self._pass = None

    def _move(self, row: SequenceState, source: int, target: int) -> None:
        """Copies what a row has in its place to another place."""
        self._pool.move(source, target, row.kv_len)
        self._sources.move(source, target, row.source_length)

    def _decode(self, rows: Sequence[SequenceState], first: int) -> np.ndarray:
        for place, row in enumerate(rows, first):
            if row.kv_len == self._short:
                self._reread(row, place)
        composition = first, [row.adapter for row in rows]
        if self._pass is None or composition != self._composition:
            self._pass = self._bound(first, len(rows), self._feeds.of(composition[1]))
            self._composition = composition
        one = self._pass
        one.ids[:, 0] = [row.next_token for row in rows]
        one.last[:] = one.positions[:, 0] = one.ends[:, 0] = [row.kv_len for row in rows]
        one.longest[...] = self._pool.length if self.fixed else max(row.kv_len for row in rows) + 1
        one.read[:] = [row.source_length for row in rows]
        one.acting[:, 0] = [_acts(row) for row in rows]
        logits: np.ndarray = one.run()[:, 0]
        return logits

    def _bound(self, first: int, rows: int, feeds: Feeds) -> BoundStep:
        """A step's pass, made anew, or the one of this shape. A host reads the longest row's length when a
        run is recorded, so a captured pass has the pool's.
        """
        if not self.fixed:
            return BoundStep(
                self.graph, self._pool, first, rows, feeds, self._sources, features=self._no_features(rows)
            )
        feed_shapes = tuple((name, tuple(value.shape())) for name, value in feeds.items())
        shape = first, rows, feed_shapes, tuple(self._sources.windows(first, rows))
        one = self._captured.get(shape)
        if one is not None:
            one.feed(feeds)
            return one
        number = len(self._captured) if len(self._captured) < MOST_CAPTURED else None
        one = BoundStep(
            self.graph,
            self._pool,
            first,
            rows,
            feeds,
            self._sources,
            features=self._no_features(rows),
            capture=number,
        )
        if number is not None:
            self._captured[shape] = one
        return one

    def _no_features(self, rows: int) -> dict[str, np.ndarray]:
        value = self.graph.inputs.get("image_features")
        return {} if value is None else {"image_features": np.zeros((rows, 0, value.shape[2]), np.float32)}


def _advance(row: SequenceState) -> None:
    row.kv_len += 1
    row.answered.append(row.next_token)


def _acts(row: SequenceState) -> bool:
    """Whether a row's adapter acts at its next position."""
    if row.adapter is None or row.adapter.acts is None:
        return True
    row.acted_before = row.acted
    one, before = np.ones((1, 1), bool), np.array([row.acted])
    mask = row.adapter.acts.mask(np.array([[row.next_token]], np.int64), one, one, before)
    row.acted = bool(has_acted(mask, before)[0])
    return bool(mask[0, 0])
