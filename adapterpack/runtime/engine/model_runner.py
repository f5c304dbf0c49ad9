"""Runs the passes of the decoder engine and keeps its rows packed in the KV pool: running rows first, then
rows whose prompts are being read.

A decode pass runs on a contiguous range of rows, so the runner moves rows when one leaves. Binding inputs and
outputs costs time in every step, so a pass is bound once and reused while its rows stay the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ...adapter_methods import Arrays, Tensors
from ...base import longrope_length
from ...bundle import (
    ADAPTER_POSITIONS,
    CACHE_LENGTHS,
    DECODER,
    LAST_POSITIONS,
    LOGITS_POSITIONS,
    PAST,
    PRESENT,
    SOURCE_LENGTHS,
)
from ...bundle.decoder_graph import LONGEST
from ...errors import Unsupported
from ...onnx_graph import TOKEN_POSITIONS, TOKEN_ROWS
from ..generation import scored
from ..media import OFFSETS, TOKEN_TYPES
from ..open_bundle import OpenBundle
from ..ort import HOST, TYPES, OrtModel, array_of, empty, fill, value_of
from .adapter_feeds import AdapterFeeds, Feeds, ResidentAdapter
from .adapter_reader import AdapterReader
from .kv_pool import KVPool
from .prefix_cache import BLOCK, PrefixCache
from .requests import SequenceState
from .row_states import RowStates
from .sources import Sources

MOST_CAPTURED = 64
"""The most step shapes (number of rows, ranks of their adapters) that are captured; further ones run
uncaptured.
"""

_BY_ROW = frozenset({LAST_POSITIONS, SOURCE_LENGTHS, TOKEN_TYPES})
"""Inputs that say something of each row, so that tokens of several cannot be read as one row."""

LOGITS = 16 << 20
"""The most logits that a pass over a prompt returns: 64 MiB in float32, 110 tokens of 152,000 words."""


class BoundStep:
    """A pass over ``tokens`` tokens of each of ``rows`` consecutive rows of the pool, from row ``first`` on,
    with the adapters' ``feeds``.

    The graph returns the logits after ``count`` tokens of each row, those at ``kept``. ``sources`` holds the
    encoder's keys and values, and ``features`` other inputs of the graph. With a number in ``capture``, the
    provider records the first run (as a CUDA graph) and replays it afterwards; the pass then owns its memory,
    and :meth:`feed` changes its values. In a ``joint`` pass, of one row of the graph, every token may belong
    to another row of the pool, at the ``places`` that the caller writes; :meth:`reshape` fits it to the next
    one.
    """

    def __init__(
        self,
        graph: OrtModel,
        pool: KVPool,
        states: RowStates,
        first: int,
        rows: int,
        feeds: Feeds,
        sources: Sources,
        *,
        tokens: int = 1,
        count: int = 1,
        features: Tensors | None = None,
        capture: int | None = None,
        joint: bool = False,
    ) -> None:
        self.graph, self._binding, self._capture = graph, graph.binding(), capture
        self._joint, self._feeds = joint, dict[str, Any]()
        self._alive: dict[str, Any] = {"pool": pool, "sources": sources}
        self._states, self._place = states, (first, rows)
        self._inputs: dict[str, tuple[np.ndarray, Any]] = {}
        self._room = np.empty(0, np.uint8)
        self.reshape(rows, tokens, count)
        self.rows[...] = np.repeat(np.arange(first, first + rows), tokens)
        if capture is not None:
            feeds = {name: value_of(array_of(value).copy(), graph.memory) for name, value in feeds.items()}
        given = {name: value_of(array, graph.memory) for name, array in (features or {}).items()}
        self.bind_feeds({**feeds, **given})
        # Input and output caches are the same memory: the graph appends keys and values in place.
        for name, window in pool.windows(0, pool.rows) if graph.ragged else pool.windows(first, rows):
            self._binding.bind_input(name, *window)
            self._binding.bind_output(PRESENT + name.removeprefix(PAST), *window)
        for name, read, written in states.windows(first, rows):
            self._binding.bind_input(name, *read)
            self._binding.bind_output(PRESENT + name.removeprefix(PAST), *written)
        for name, window in sources.windows(first, rows):
            self._binding.bind_input(name, *window)

    def reshape(self, rows: int, tokens: int, count: int) -> None:
        """Binds inputs of zeros for ``tokens`` tokens of each row, and the logits after ``count`` of them."""
        self.ids = self._input("input_ids", (rows, tokens))
        self.positions = self._input("position_ids", (rows, tokens))
        self.last = self._input(CACHE_LENGTHS, (rows,))
        self.longest = self._input(LONGEST, ())
        self.rows = self._input(TOKEN_ROWS, (rows * tokens,))
        self.places = self._input(TOKEN_POSITIONS, (rows * tokens,))
        self.ends = self._input(LAST_POSITIONS, (rows, 1))
        self.kept = self._input(LOGITS_POSITIONS, (rows, count))
        self.read = self._input(SOURCE_LENGTHS, (rows,))
        self.acting = self._input(ADAPTER_POSITIONS, (rows, tokens))
        self.offsets = self._input(OFFSETS, (rows, tokens, 3))
        self._input(TOKEN_TYPES, (rows, tokens))  # 0: the tokens of a pass see each other
        logits = self.graph.results["logits"]
        shape, dtype = (rows, count, int(logits.shape[2])), np.dtype(TYPES[logits.type])
        self._near = None
        if self.graph.memory == HOST:
            size = math.prod(shape) * dtype.itemsize
            if size > self._room.size:  # memory of the last pass costs no page faults
                self._room = np.empty(size, np.uint8)
            self._near = self._room[:size].view(dtype).reshape(shape)
        self._logits = empty(shape, dtype, self.graph.memory) if self._near is None else value_of(self._near)
        self._binding.bind_ortvalue_output("logits", self._logits)

    def bind_feeds(self, feeds: Feeds) -> None:
        """Binds the values of adapters, and other inputs, that are not bound yet."""
        for name, value in feeds.items():
            if self._feeds.get(name) is not value:
                self._binding.bind_ortvalue_input(name, value)
        self._feeds |= feeds

    def feed(self, feeds: Feeds) -> None:
        """Copies the values of other adapters, of the same shapes, into the memory of a captured pass."""
        for name, value in feeds.items():
            fill(self._feeds[name], array_of(value))

    def run(self) -> np.ndarray:
        """Runs the pass on the numbers that were written into its inputs and returns the logits ``[rows,
        count, vocabulary]``. The next run overwrites them.
        """
        if self.graph.ragged and not self._joint:
            tokens = self.ids.shape[1]
            self.places[...] = (self.last[:, None] + np.arange(1 - tokens, 1)).reshape(-1)
        for array, value in self._inputs.values():
            fill(value, array)
        with self._states.passing(*self._place):
            self.graph.run_bound(self._binding, self._capture)
        return array_of(self._logits) if self._near is None else self._near

    def _input(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Binds an array of zeros to an input and returns the array. If the graph lacks the input, nothing
        reads the array.
        """
        value = self.graph.inputs.get(name)
        array = np.zeros(shape, TYPES[value.type] if value is not None else np.int64)
        if value is not None:
            # kernels read this length on the host
            memory = HOST if name == LONGEST else self.graph.memory
            bound = value_of(array, memory)
            self._binding.bind_ortvalue_input(name, bound)
            if memory != HOST:
                self._inputs[name] = array, bound
            self._alive[name] = bound
        return array


class _Piece(NamedTuple):
    """Tokens of a row, at a ``place`` of the pool, and how many of the last ones are followed by logits."""

    row: SequenceState
    place: int
    tokens: Sequence[int]
    acting: np.ndarray
    kept: int

    @classmethod
    def of_step(cls, row: SequenceState, place: int, guessed: Sequence[int] = ()) -> _Piece:
        """Returns the next token of a running row, and guessed ones after it."""
        tokens = [row.next_token, *guessed]
        return cls(row, place, tokens, np.full(len(tokens), _acts(row)), len(tokens))

    @property
    def positions(self) -> np.ndarray:
        """The positions of the tokens in the row's cache."""
        return self.row.kv_len + np.arange(len(self.tokens))


class ModelRunner:
    """Runs passes on up to ``max_rows`` rows of up to ``max_length`` positions. It deals in token ids and
    logits only; text and sampling are the caller's.

    ``prefilled`` counts the prompt tokens that were read, ``reused`` those whose keys and values were cached
    by earlier rows, in up to ``prefix_budget`` bytes. With ``deterministic`` each step runs on ``max_rows``
    rows, of which those after the running ones are padding.

    Raises:
        Unsupported: the rows of a deterministic runner have states or sources.
    """

    def __init__(
        self,
        bundle: OpenBundle,
        reader: AdapterReader,
        max_rows: int,
        max_length: int,
        prefix_budget: int = 0,
        deterministic: bool = False,
    ) -> None:
        self.max_rows, self.graph, self._reader = max_rows, bundle.graph(DECODER), reader
        self._pool, self._states = KVPool(self.graph, max_rows, max_length), RowStates(self.graph, max_rows)
        self._sources = Sources(bundle, self.graph, max_rows)
        self._feeds = AdapterFeeds(
            reader.layout,
            max_rows,
            HOST if self.graph.resolved.captures else self.graph.memory,
            max(bundle.bundle.max_rank, 1) if deterministic else 0,
        )
        if deterministic and (len(self._states) or bundle.task.has_encoder):
            raise Unsupported(
                "only decoders whose rows keep keys and values alone run deterministically",
                where=bundle.folder,
                found="states" if len(self._states) else "an encoder",
            )
        self._deterministic = deterministic
        self.prefixes = PrefixCache(prefix_budget)
        self.most_logits = max(1, LOGITS // int(self.graph.results["logits"].shape[2]))
        self.prefilled = self.reused = 0
        self.running: list[SequenceState] = []
        self.reading: list[SequenceState] = []
        self._joint: BoundStep | None = None
        """The last pass over tokens of several rows."""
        self._composition: tuple[int, Sequence[ResidentAdapter | None]] = (0, ())
        self._passes: dict[int, BoundStep] = {}
        """The bound passes of the last step's rows, by the number of tokens that they read of each row."""
        self.fixed = self.graph.resolved.captures
        by_row = len(self._states) or bundle.task.has_encoder or _BY_ROW & self.graph.inputs.keys()
        self._reads_joint = self.graph.ragged and not (by_row or deterministic)
        """Whether steps of one shape keep their memory, as a captured (CUDA graph) run requires."""
        self._captured: dict[object, BoundStep] = {}
        self._short = longrope_length(bundle.config) if LAST_POSITIONS in self.graph.inputs else None
        """For models with LongRoPE: the longest row that uses the short position factors."""

    def __len__(self) -> int:
        return len(self.running) + len(self.reading)

    def read_cache(self, place: int, length: int) -> Arrays:
        """Returns copies of the first ``length`` positions ``[heads, length, width]`` of a row's caches, by
        graph input.
        """
        return dict(zip(dict(self._pool.windows(place, 1)), self._pool.read(place, 0, length), strict=True))

    def admit(self, row: SequenceState) -> None:
        """Adds a row after the others, without states, and writes its adapter's prompt into its cache."""
        self._states.clear(len(self))
        row.whole = row.whole or TOKEN_TYPES in self.graph.inputs
        if row.adapter is not None and row.adapter.prompt is not None:
            self._pool.write(len(self), self._reader.caches(row.adapter.prompt))
            row.kv_len = row.adapter.virtual
        self.reading.append(row)

    def next_to_read(self) -> SequenceState:
        """Returns the row whose prompt is read next. Looks up cached prefixes only now, so that a row can use
        those of rows that were admitted together with it.
        """
        row = self.reading[0]
        if self.prefixes.budget and not row.begun and not row.whole and row.scores is None:
            whole = row.kv_len + len(row.prompt)
            row.num_computed_tokens = self.prefixes.restore(
                row, self._pool, self._states, len(self.running), self._is_long(whole)
            )
            row.kv_len += row.num_computed_tokens
            row.reused = row.num_computed_tokens
            self.reused += row.num_computed_tokens
        row.begun = True
        return row

    def prefill(self, tokens: int) -> np.ndarray:
        """Reads the next ``tokens`` tokens of the first unread prompt and returns the logits ``[vocabulary]``
        after the last of them. When the prompt is complete, the row becomes a running one.
        """
        return self.prefill_beside(tokens, [])[0]

    def prefill_beside(self, tokens: int, riders: Sequence[SequenceState]) -> list[np.ndarray]:
        """Does what :meth:`prefill` does, and reads in the same pass the next token of each of the
        ``riders``, all running rows if :meth:`takes_riders`. Returns the logits after the prompt's last token
        and after each rider's.
        """
        row = self.reading[0]
        if row.source and not row.source_length and self._sources.read(row, len(self.running)):
            self._passes.clear()
        place, end, stops = len(self.running), row.num_computed_tokens + tokens, self._stops(row)
        pieces = range(row.num_computed_tokens, end, self.most_logits) if row.scores is not None else ()
        for stop in sorted(stop for stop in {*stops, *pieces, end} if row.num_computed_tokens < stop <= end):
            logits = self._read_to(row, place, stop, riders)
            if stop in stops:
                self._keep(row, place)
        for rider in riders:
            self.advance(rider)
        if row.num_computed_tokens == len(row.prompt):
            self.running.append(self.reading.pop(0))
        return logits

    def takes_riders(self, row: SequenceState) -> bool:
        """Whether the pass over a piece of a row's prompt can read a token of each running row, too."""
        return row.scores is None and not row.whole and self.joins([row, *self.running])

    def _stops(self, row: SequenceState) -> set[int]:
        """Returns after which tokens of a row's prompt it is kept for later rows: at its end, and where its
        states are of use to them.
        """
        stops = {len(row.prompt)}
        if len(self._states) and self.prefixes.budget and not row.whole:
            stops |= {row.known, (len(row.prompt) - 1) // BLOCK * BLOCK}
        return stops

    def _read_to(
        self, row: SequenceState, place: int, stop: int, riders: Sequence[SequenceState]
    ) -> list[np.ndarray]:
        """Reads a row's prompt up to the token ``stop`` and the riders' next tokens, and returns the logits
        after the last token of each.
        """
        piece, tokens = slice(row.num_computed_tokens, stop), stop - row.num_computed_tokens
        acting = None if row.acting is None else row.acting[piece]
        if riders:
            acting = np.ones(tokens, bool) if acting is None else acting
            one = _Piece(row, place, row.prompt[piece], acting, 1)
            steps = [_Piece.of_step(rider, self.running.index(rider)) for rider in riders]
            logits = [last for last, *_ in self._read_joint([one, *steps])]
        else:
            whole, scores = row.virtual + len(row.prompt), row.scores
            read = self._read(row, place, row.kv_len, row.prompt[piece], acting, whole, scores is not None)
            logits = [read[-1]]
            if scores is not None:
                pairs = zip(read, row.prompt[piece.start + 1 : stop + 1], strict=False)
                row.scored += [scored(one, token, scores) for one, token in pairs]
        row.num_computed_tokens, row.kv_len = stop, row.kv_len + tokens
        self.prefilled += tokens
        return logits

    def _read(
        self,
        row: SequenceState,
        place: int,
        start: int,
        tokens: Sequence[int],
        acting: np.ndarray | None,
        whole: int,
        scores: bool = False,
    ) -> np.ndarray:
        """Runs one pass over tokens of a row, from the position ``start`` on, and returns the logits after
        the last of them ``[1, vocabulary]``, or with ``scores`` after each. ``whole`` is the number of
        positions that the row will have after its prompt.
        """
        count = len(tokens) if scores else 1
        once = BoundStep(
            self.graph,
            self._pool,
            self._states,
            place,
            1,
            self._feeds.of([row.adapter]),
            self._sources,
            tokens=len(tokens),
            count=count,
            features={
                **self._no_features(1),
                **{name: array for name, array in row.features.items() if name != OFFSETS},
            },
        )
        end = start + len(tokens)
        once.ids[0], once.positions[0] = tokens, np.arange(start, end)
        once.last[0], once.longest[...], once.kept[0] = end - 1, end, np.arange(-count, 0) + len(tokens)
        once.ends[...] = whole - 1
        once.read[0] = row.source_length
        once.acting[0] = True if acting is None else acting
        once.offsets[0] = row.offsets(np.arange(start, end) - row.virtual)
        logits: np.ndarray = once.run()[0]
        return logits

    def _reread(self, row: SequenceState, place: int) -> None:
        """Recomputes the cache of a row that is about to exceed the short length of LongRoPE: with the long
        factors all its keys change.
        """
        tokens, start = row.tokens, row.virtual
        self._states.clear(place)
        self._read(row, place, start, tokens, row.acting_at(tokens), row.kv_len + 1)
        self._passes.clear()

    def _is_long(self, positions: int) -> bool:
        return self._short is not None and positions > self._short

    def _keep(self, row: SequenceState, place: int) -> None:
        if self.prefixes.budget and not row.whole:
            whole = max(row.kv_len, row.virtual + len(row.prompt))
            self.prefixes.keep(row, self._pool, self._states, place, self._is_long(whole))

    def decode(self, place: int | None = None) -> np.ndarray:
        """Reads one more token in every running row, or in the one at a place alone, and returns the logits
        ``[rows, vocabulary]`` after it.
        """
        rows, first = (self.running, 0) if place is None else ([self.running[place]], place)
        logits = self._decode(rows, first).copy()
        for row in rows:
            self.advance(row)
        return logits

    def can_read_ahead(self, row: SequenceState, count: int) -> bool:
        """Whether a pass can read ``count`` further tokens of a row after its next one, and leave out those
        that turn out wrong: a state that has read them could not be taken back.
        """
        end = row.kv_len + count
        return (
            not self.fixed
            and not len(self._states)
            and (row.adapter is None or row.adapter.acts is None)
            and end < self._pool.length
            and (self._short is None or not row.kv_len <= self._short <= end)
        )

    def joins(self, rows: Sequence[SequenceState]) -> bool:
        """Whether one pass can read a different number of tokens of each of these rows."""
        return self._reads_joint and self._feeds.joins(row.adapter for row in rows)

    def read_ahead(self, rows: Sequence[SequenceState], guessed: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Reads the next token of each of these running rows and guessed ones after it in one pass, and
        returns the logits ``[1 + guessed, vocabulary]`` after each. :meth:`advance` then takes in each that
        is right. Several rows :meth:`joins`.
        """
        if len(rows) == 1:
            return [self._read_ahead(rows[0], guessed[0])]
        pieces = [
            _Piece.of_step(row, self.running.index(row), more)
            for row, more in zip(rows, guessed, strict=True)
        ]
        return self._read_joint(pieces)

    def _read_joint(self, pieces: Sequence[_Piece]) -> list[np.ndarray]:
        """Reads pieces of several rows in one pass, and returns the logits after the last tokens of each."""
        lengths = [len(piece.tokens) for piece in pieces]
        ends = np.cumsum(lengths)
        kept = np.concatenate(
            [np.arange(end - piece.kept, end) for piece, end in zip(pieces, ends, strict=True)]
        )
        adapters = [piece.row.adapter for piece in pieces for _ in piece.tokens]
        feeds, one = self._feeds.of(adapters, joint=True), self._joint
        if one is None:
            one = self._joint = BoundStep(
                self.graph,
                self._pool,
                self._states,
                0,
                1,
                feeds,
                self._sources,
                features=self._no_features(1),
                joint=True,
            )
        one.reshape(1, len(adapters), len(kept))
        one.bind_feeds(feeds)
        one.kept[0], one.rows[...] = kept, np.repeat([piece.place for piece in pieces], lengths)
        one.ids[0] = [token for piece in pieces for token in piece.tokens]
        one.places[...] = one.positions[0] = np.concatenate([piece.positions for piece in pieces])
        one.acting[0] = np.concatenate([piece.acting for piece in pieces])
        if OFFSETS in self.graph.inputs:
            one.offsets[0] = np.concatenate(
                [piece.row.offsets(piece.positions - piece.row.virtual) for piece in pieces]
            )
        logits: np.ndarray = one.run()[0]
        return np.split(logits, np.cumsum([piece.kept for piece in pieces])[:-1])

    def _read_ahead(self, row: SequenceState, guessed: Sequence[int]) -> np.ndarray:
        tokens, place = [row.next_token, *guessed], self.running.index(row)
        one, end = self._pass_of([row], place, len(tokens)), row.kv_len + len(tokens)
        one.ids[0], one.positions[0] = tokens, np.arange(row.kv_len, end)
        one.last[0] = one.ends[0] = end - 1
        one.longest[...], one.kept[0], one.acting[0] = end, np.arange(len(tokens)), True
        one.read[0], one.offsets[0] = row.source_length, row.offsets([-1])
        logits: np.ndarray = one.run()[0]
        return logits

    def advance(self, row: SequenceState) -> None:
        """Counts the next token of a row as read."""
        row.kv_len += 1
        row.answered.append(row.next_token)

    def retract(self, row: SequenceState) -> None:
        """Undoes the last step of a running row, so that the next step repeats it."""
        self._states.take_back(self.running.index(row))
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
                self._states.move(source, target)
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
            self._passes.clear()
            self._joint = None

    def _move(self, row: SequenceState, source: int, target: int) -> None:
        """Copies the caches and states of a row to another place."""
        self._pool.move(source, target, row.kv_len)
        self._states.move(source, target)
        self._sources.move(source, target, row.source_length)

    def _decode(self, rows: Sequence[SequenceState], first: int) -> np.ndarray:
        for place, row in enumerate(rows, first):
            if row.kv_len == self._short:
                self._reread(row, place)
        one, count = self._pass_of(rows, first), len(rows)
        one.ids[:count, 0] = [row.next_token for row in rows]
        # the padding writes keys, too: in a row whose prompt is being read where its next token replaces them
        held = [*rows, *self.reading] if len(one.last) > count else rows
        one.last[: len(held)] = [row.kv_len for row in held]
        one.positions[:, 0] = one.ends[:, 0] = one.last
        one.longest[...] = self._pool.length if self.fixed else int(one.last.max()) + 1
        one.read[:count] = [row.source_length for row in rows]
        one.acting[:count, 0] = [_acts(row) for row in rows]
        if OFFSETS in self.graph.inputs:
            one.offsets[:count] = [row.offsets([-1]) for row in rows]
        return one.run()[:count, 0]

    def _pass_of(self, rows: Sequence[SequenceState], first: int, tokens: int = 1) -> BoundStep:
        """Returns the bound pass over ``tokens`` tokens of each of the rows from the place ``first`` on; it
        is valid while the rows and their adapters stay the same.
        """
        more = self.max_rows - len(rows) if self._deterministic and len(rows) == len(self.running) else 0
        composition = first, [*(row.adapter for row in rows), *[None] * more]
        if composition != self._composition:
            self._passes.clear()
            self._composition = composition
        if tokens not in self._passes:
            adapters = composition[1]
            self._passes[tokens] = self._bound(first, len(adapters), self._feeds.of(adapters), tokens)
        return self._passes[tokens]

    def _bound(self, first: int, rows: int, feeds: Feeds, tokens: int) -> BoundStep:
        """Returns the bound pass of a step: a new one, or the captured pass of this shape.

        Captured passes treat every row as long as the pool, since a recording fixes the longest length, which
        the host reads.
        """
        shape: object = None
        number = None
        if self.fixed:
            feed_shapes = tuple((name, tuple(value.shape())) for name, value in feeds.items())
            shape = first, rows, feed_shapes, tuple(self._sources.windows(first, rows))
            if (one := self._captured.get(shape)) is not None:
                one.feed(feeds)
                return one
            number = len(self._captured) if len(self._captured) < MOST_CAPTURED else None
        one = BoundStep(
            self.graph,
            self._pool,
            self._states,
            first,
            rows,
            feeds,
            self._sources,
            tokens=tokens,
            count=tokens,
            features=self._no_features(rows),
            capture=number,
        )
        if number is not None:
            self._captured[shape] = one
        return one

    def _no_features(self, rows: int) -> Arrays:
        value = self.graph.inputs.get("image_features")
        return {} if value is None else {"image_features": np.zeros((rows, 0, value.shape[2]), np.float32)}


def _acts(row: SequenceState) -> bool:
    """Returns whether a row's adapter acts at its next token, and records that in the row."""
    acting = row.acting_at([row.next_token], row.acted)
    if acting is None:
        return True
    row.acted_before, row.acted = row.acted, row.acted or bool(acting[0])
    return bool(acting[0])
