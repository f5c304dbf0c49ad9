"""The engine of encoders: requests arrive one by one, and each step runs one batch of those that wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import AdapterpackError, ConfigError, Unsupported
from ...pack import Pack
from ...paths import StrPath
from ...slots import virtual_room
from ...tasks import OnePass, PreparedRow
from ...tasks.data import Row
from ..adapters import Mix
from ..open_bundle import OpenBundle
from ..providers import Device
from ..text import context_of, require_context
from .adapter_table import AdapterTable, Named
from .base import ENGINES, Engine, EngineKind
from .encoder_adapters import BATCH_ADAPTERS
from .encoder_batch import Bounds, EncoderRow, Padding, collate, next_batch
from .requests import Event


class EncoderEngine(Engine):
    """Runs a bundle whose rows take one pass each: classifiers, embeddings, answers in a text ...

    A step runs one batch: the request that has waited longest, and others of similar length, with any
    adapters. A batch has at most ``max_rows`` rows and ``max_tokens`` positions, of which at most the share
    ``max_padding`` is padding; a longer row runs alone. The defaults suit CPUs, where larger passes no longer
    fit the caches; on a GPU choose larger ones. ``max_length`` is the most tokens of a row, by default the
    model's context. ``adapter_budget`` is the most bytes of adapters that stay in memory without a request.
    ``padding`` counts the positions that passes spent on padding. ``deterministic``: every row runs alone, so
    that its outputs have the same bits whatever runs beside it.

    Raises:
        Unsupported: the rows of the bundle's task do not take one pass each.

    Example:
        >>> engine = Engine("bundle")  # doctest: +SKIP
        >>> requests = [engine.add("Where is my parcel?", "tickets"), engine.add("I love this kettle",
        ...     "reviews")]  # doctest: +SKIP
        >>> [event.result["label"] for event in engine.step()]  # doctest: +SKIP
        ['delivery', 'positive']
    """

    def __init__(
        self,
        bundle: StrPath | OpenBundle,
        provider: str | Device | None = None,
        *,
        threads: int | None = None,
        max_rows: int = 32,
        max_length: int | None = None,
        max_tokens: int = 1024,
        max_padding: float = 0.1,
        adapter_budget: int = 1 << 30,
        deterministic: bool = False,
        verify: str = "cached",
    ) -> None:
        self.bundle = OpenBundle.of(bundle, provider, threads, verify)
        answer = self.bundle.task.answer
        if not isinstance(answer, OnePass):
            raise Unsupported(
                "the rows of this task do not take one pass each",
                where=self.bundle.folder,
                found=self.bundle.task.name,
            )
        if (
            max_rows < 1
            or max_tokens < 1
            or (max_length is not None and max_length < 1)
            or not 0 <= max_padding < 1
        ):
            raise ConfigError(
                "a batch has at least one row and one token, and less padding than tokens and padding "
                "together",
                found=(
                    f"max_rows {max_rows}, max_length {max_length}, max_tokens {max_tokens}, max_padding "
                    f"{max_padding}"
                ),
            )
        self._room, context = virtual_room(self.bundle.bundle.sites), context_of(self.bundle)
        longest = None if context is None else context - self._room
        self.max_length = min(
            (length for length in (max_length, longest) if length is not None), default=None
        )
        # a row takes one step, and a larger choice of waiting rows makes better batches
        self.ahead = 3 * max_rows
        self.max_rows = self.rows_a_turn = max_rows
        self._answer, self._bounds = answer, Bounds(1 if deterministic else max_rows, max_tokens, max_padding)
        self._batches = BATCH_ADAPTERS[self.bundle.bundle.mode](self.bundle)
        self.adapters = AdapterTable(self.bundle, self._batches.read, self._batches.replay, adapter_budget)
        self.padding = Padding()

    def add(self, prompt: str | Sequence[int] | Row, adapter: Named = None, **options: Any) -> int:
        """Adds a request and returns its number; any thread may call it.

        ``prompt`` is a text, token ids, or a row with the columns of the task: ``text`` and ``text_pair``,
        ``question`` and ``context``, ``image`` ... ``options`` are those of the task, such as ``normalize``
        and ``dimensions`` of an embedding. Without an adapter the row runs on the base, or with the adapter
        that is folded into the bundle. The adapter is read here, and the row keeps it, whatever is loaded or
        unloaded meanwhile.

        Raises:
            UnknownAdapter: no adapter has that name.
            BaseMismatch, Unsupported: the pack belongs to another base or task.
            ConfigError: the row is not one of this task, or longer than the model's context, or an option is
                out of range.
        """
        row = self.row(prompt, adapter, **options)
        self.submit(row)
        return row.number

    def row(self, prompt: str | Sequence[int] | Row, adapter: Named = None, **options: Any) -> EncoderRow:
        """Makes a request, which the caller then passes to :meth:`submit` or :meth:`discard`. Its adapter
        stays in memory until then.

        Raises:
            UnknownAdapter, BaseMismatch, ConfigError: see :meth:`add`.
        """
        pack = self.adapters.of_row(adapter)
        return self.bind(*self.prepare(prompt, **options), pack)

    def prepare(self, prompt: str | Sequence[int] | Row, /, **options: Any) -> tuple[PreparedRow, Any]:
        """Returns the inputs and options of a row, for :meth:`bind`: the part of :meth:`row` that does not
        depend on the adapter.

        Raises:
            ConfigError: see :meth:`add`.
        """
        chosen = self._answer.options_of(options)
        prepared = self._answer.prepare(self.bundle, _row(prompt), chosen)
        if "input_ids" in prepared.inputs:
            require_context(self.bundle, np.array([prepared.tokens + self._room]), self._room)
            if self.max_length is not None and prepared.tokens > self.max_length:
                raise ConfigError(
                    "a row is longer than the engine's rows",
                    expected=f"at most {self.max_length} tokens",
                    found=prepared.tokens,
                    remedy="open the engine with a larger max_length",
                )
        return prepared, chosen

    def bind(self, prepared: PreparedRow, options: Any, pack: Pack | Mix | None) -> EncoderRow:
        """Makes a request of a prepared row with a pack, a mix, or the base (None)."""
        head = self.bundle.head(pack)
        resident = None if pack is None else self.adapters.acquire(pack)
        return EncoderRow(next(self._numbers), prepared, options, head, resident)

    def _step(self) -> list[Event]:
        """Takes in messages and runs one batch."""
        events: list[Event] = []
        self._take_messages(events)
        if self._waiting:
            rows = next_batch(self._waiting, self._bounds, self._batches.fit)
            chosen = {row.number for row in rows}
            self._waiting = deque(row for row in self._waiting if row.number not in chosen)
            self._run(rows, events)
        return events

    def _cancel(self, number: int, events: list[Event]) -> None:
        for row in [row for row in self._waiting if row.number == number]:
            self._waiting.remove(row)
            events.append(self._end(row, "cancelled"))

    def _run(self, rows: Sequence[EncoderRow], events: list[Event]) -> None:
        """Runs one pass. If it fails, each row runs again alone, so that only the row at fault ends with the
        error.
        """
        inputs = collate([row.prepared.inputs for row in rows], self.bundle.pad_id)
        try:
            outputs = self._batches.run(inputs, [row.adapter for row in rows])
        except AdapterpackError as error:
            if len(rows) == 1:
                events.append(self._end(rows[0], "error", error=error))
            else:
                for row in rows:
                    self._run([row], events)
            return
        self.padding.count(rows)
        for place, row in enumerate(rows):
            own = {name: array[place : place + 1] for name, array in outputs.items()}
            try:
                result = self._answer.result(self.bundle, row.prepared, own, row.head, row.options)
            except AdapterpackError as error:
                events.append(self._end(row, "error", error=error))
            else:
                events.append(self._end(row, "stop", result=result))

    def _end(
        self,
        row: EncoderRow,
        reason: str,
        *,
        result: Mapping[str, Any] | None = None,
        error: AdapterpackError | None = None,
    ) -> Event:
        self.discard(row)
        return Event(
            row.number,
            row.digest,
            finish_reason=reason,
            error=error,
            result=result,
            prompt_tokens=row.prepared.tokens,
        )


def _row(prompt: str | Sequence[int] | Row) -> Row:
    if isinstance(prompt, Mapping):
        return prompt
    return {"text": prompt} if isinstance(prompt, str) else {"input_ids": prompt}


ENGINES.register(EngineKind("encoder", lambda task: isinstance(task.answer, OnePass), EncoderEngine))
