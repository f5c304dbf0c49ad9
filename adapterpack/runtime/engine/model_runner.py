"""Runs the passes of the decoder engine and keeps its rows packed in the KV pool: running rows first, then
rows whose prompts are being read.

A decode pass runs on a contiguous range of rows, so the runner moves rows when one leaves.
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
"""The most step shapes (number of rows, ranks of their adapters) that are captured; further ones run
uncaptured.
"""


@dataclass(eq=False, kw_only=True)
class SequenceState:
    """One sequence of tokens in the runner. It holds its adapter itself, since names may change while it
    runs.

    ``prompt`` are its tokens, of which ``num_computed_tokens`` have been read. Sequences share cached
    prefixes only with those of the same ``salt``. ``features`` are other inputs of its pass, and ``source``
    the inputs of the encoder. ``kv_len`` is the number of its positions in the cache, and ``next_token`` the
    token to read next. ``request`` is the request to which it belongs.
    """

    prompt: Sequence[int]
    adapter: ResidentAdapter | None = None
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    source: Mapping[str, np.ndarray] = field(default_factory=dict)
    salt: bytes = b""
    request: Any = None
    source_length: int = field(init=False, default=0)
    """The length of the encoder's output for it; 0 until the encoder has run."""
    num_computed_tokens: int = 0
    kv_len: int = 0
    next_token: int = 0
    acting: np.ndarray | None = field(init=False, default=None)
    """The prompt tokens at which its adapter acts, ``[tokens]`` bool; None if it acts everywhere."""
    acted: bool = field(init=False, default=False)
    """Whether the adapter has acted at some token so far."""
    acted_before: bool = field(init=False, default=False)
    """The value of ``acted`` before the last step, which :meth:`ModelRunner.retract` restores."""
    answered: list[int] = field(init=False, default_factory=list)
    """The tokens after the prompt that are in the cache."""
    begun: bool = field(init=False, default=False)
    """Whether its prompt is being read, or has been."""

    def fork(self) -> SequenceState:
        """Returns another sequence of the same prompt and request that has computed nothing yet."""
        return replace(self, num_computed_tokens=0, kv_len=0, next_token=0)

    def follow(self, other: SequenceState) -> None:
        """Takes over the progress of another sequence of the same prompt."""
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
        """The tokens in its cache, without the virtual tokens of the adapter's prompt."""
        return [*self.prompt[: self.num_computed_tokens], *self.answered]


class ModelRunner:
    """Runs passes on up to ``max_rows`` rows of up to ``max_length`` positions. It deals in token ids and
    logits only; text and sampling are the caller's.

    ``prefilled`` counts the prompt tokens that were read, ``reused`` those whose keys and values were cached
    by earlier rows, in up to ``prefix_budget`` bytes.
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
        """Whether steps of one shape keep their memory, as a captured (CUDA graph) run requires."""
        self._captured: dict[object, BoundStep] = {}
        self._short = longrope_length(bundle.config) if LAST_POSITIONS in self.graph.inputs else None
        """For models with LongRoPE: the longest row that uses the short position factors."""

    def __len__(self) -> int:
        return len(self.running) + len(self.reading)

    def read_cache(self, place: int, length: int) -> dict[str, np.ndarray]:
        """Returns copies of the first ``length`` positions ``[heads, length, width]`` of a row's caches, by
        graph input.
        """
        return dict(zip(dict(self._pool.windows(place, 1)), self._pool.read(place, 0, length), strict=True))

    def admit(self, row: SequenceState) -> None:
        """Adds a row after the others and writes its adapter's prompt into its cache."""
        if row.adapter is not None and row.adapter.prompt is not None:
            self._pool.write(len(self), self._reader.caches(row.adapter.prompt))
            row.kv_len = row.adapter.virtual
        self.reading.append(row)

    def next_to_read(self) -> SequenceState:
        """Returns the row whose prompt is read next. Looks up cached prefixes only now, so that a row can use
        those of rows that were admitted together with it.
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
        """Reads the next ``tokens`` tokens of the first unread prompt and returns the logits ``[vocabulary]``
        after the last of them. When the prompt is complete, the row becomes a running one.
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
        """Runs one pass over tokens of a row, from the position ``start`` on. ``whole`` is the number of
        positions that the row will have after its prompt.
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
        """Recomputes the cache of a row that is about to exceed the short length of LongRoPE: with the long
        factors all its keys change.
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
        """Reads one more token in every running row and returns the logits ``[rows, vocabulary]``
        after it.
        """
        logits = self._decode(self.running, 0).copy()
        for row in self.running:
            _advance(row)
        return logits

    def decode_alone(self, place: int) -> np.ndarray:
        """Reads one more token in a single running row and returns its logits ``[vocabulary]``."""
        row = self.running[place]
        logits: np.ndarray = self._decode([row], place)[0].copy()
        _advance(row)
        return logits

    def retract(self, row: SequenceState) -> None:
        """Undoes the last step of a running row, so that the next step repeats it."""
        row.kv_len -= 1
        row.answered.pop()
        row.acted = row.acted_before

    def add_rows(self, rows: Sequence[SequenceState]) -> None:
        """Makes room for rows after the running ones; :meth:`rearrange` then fills their caches."""
        first = len(self.running)
        # From the last on, so that no row overwrites one that has yet to move.
        for place, row in reversed(list(enumerate(self.reading, first))):
            self._move(row, place, place + len(rows))
        self.running += rows

    def rearrange(self, rows: Sequence[SequenceState], parents: Sequence[int]) -> list[SequenceState]:
        """Reorders the sequences of a beam search: the sequence at each place continues the one at the place
        that ``parents`` names.

        The first continuation of a row keeps its place in the pool. Further continuations are copied to the
        places of rows that nothing continues.
        """
        # Rows that nothing continues; their places take the copies of rows that are continued more than once.
        free, kept = [row for place, row in enumerate(rows) if place not in parents], set[int]()
        result = []
        for place in parents:
            row = rows[place]
            if place in kept:
                row = free.pop()
                source, target = (self.running.index(one) for one in (rows[place], row))
                self._pool.move(source, target, rows[place].kv_len)
                # sequences of one request have the same source, so one copy is enough
                if not row.source_length:
                    self._sources.move(source, target, rows[place].source_length)
                row.follow(rows[place])
            kept.add(place)
            result.append(row)
        return result

    def remove(self, row: SequenceState, keep: bool = True) -> None:
        """Removes a row. The last running row moves into the gap; unread prompts keep their order. With
        ``keep`` the prefix cache keeps what the row has read.
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
        """Copies the caches of a row to another place."""
        self._pool.move(source, target, row.kv_len)
        self._sources.move(source, target, row.source_length)

    def _decode(self, rows: Sequence[SequenceState], first: int) -> np.ndarray:
        for place, row in enumerate(rows, first):
            if row.kv_len == self._short:
                self._reread(row, place)
        # The bound pass is valid while the rows and their adapters stay the same.
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
        """Returns the bound pass of a step: a new one, or the captured pass of this shape.

        Captured passes treat every row as long as the pool, since a recording fixes the longest length, which
        the host reads.
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
    """Returns whether a row's adapter acts at its next token, and records that in the row."""
    if row.adapter is None or row.adapter.acts is None:
        return True
    row.acted_before = row.acted
    one, before = np.ones((1, 1), bool), np.array([row.acted])
    mask = row.adapter.acts.mask(np.array([[row.next_token]], np.int64), one, one, before)
    row.acted = bool(has_acted(mask, before)[0])
    return bool(mask[0, 0])
