"""Runs a decoder over a batch without the engine: a prefill pass over the prompts, then one step for each new
token. There is one class for each kind of model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...adapter_methods.core.token_positions import has_acted
from ...base import longrope_length
from ...bundle import ADAPTER_POSITIONS, ENCODED, PAST, PRESENT
from ...tasks import MAIN, Arrays
from ..media import OFFSETS, TOKEN_TYPES
from ..open_bundle import OpenBundle
from ..ort import array_of, value_of
from ..padding import last_places, pad, positions
from ..pipeline import complete, run_parts, values
from ..prompts import start_ids
from ..text import context_of


class DecoderOnly:
    """A batch of a causal language model, with images if its graph takes them. Each pass returns the complete
    cache as new arrays.

    ``prompts`` are the tokens with which the decoder begins each row. ``last`` ``[rows]`` is the index of
    each row's next-token logits after prefill. ``lengths`` ``[rows]`` are the positions that prefill takes,
    of which ``virtual`` belong to adapters' prompts.
    """

    def __init__(
        self, session: OpenBundle, rows: Sequence[Sequence[int]], names: list[str | None], given: Arrays
    ) -> None:
        self.session, self.names, self.run = session, names, session.pin(names)
        self.prompts = rows
        self.batch = pad(rows, session.pad_id, left=session.pads_left)
        self.last = last_places(self.batch["attention_mask"])
        self.given = given
        self.offsets = given.pop(OFFSETS, None)
        self.prefix = self.run.prefix(session.inputs)
        self.virtual = self.prefix.lengths[:, 0]
        self.lengths = self.virtual + self.batch["attention_mask"].sum(axis=1)
        self.context, self.short = context_of(session), longrope_length(session.config)

    def prefill(self) -> dict[str, Any]:
        """Encodes the images, if any, and runs the decoder over the prompts."""
        session = self.session
        self.mask = self.prefix.covering(self.batch["attention_mask"])
        acting = self.run.acting(self.batch)
        self.acted = has_acted(acting, None)
        images = (
            {}
            if not self.given
            else run_parts(
                session, {**self.given, **self.batch}, self.names, self.run, session.task.parts[:-1]
            )
        )
        self.offsets = images.get(OFFSETS, self.offsets)
        inputs = {
            **self.batch,
            **images,
            **({} if self.offsets is None else {OFFSETS: self.offsets}),
            **({ADAPTER_POSITIONS: acting} if ADAPTER_POSITIONS in session.inputs else {}),
        }
        inputs["position_ids"] = self._places(inputs["input_ids"].shape[1]) - self.prefix.lengths
        return self.run(values(complete(session, session.task.main, inputs, self.run)))

    def step(self, tokens: np.ndarray, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Runs one token for each row on the previous cache. When a row outgrows the short length of LongRoPE
        it runs prefill again, because the long factors change all keys.
        """
        ones = np.ones((len(self.names), 1), np.int64)
        self.mask = np.concatenate([self.mask, ones], axis=1)
        places = self._places(1)
        if self.short is not None:
            new = {"input_ids": tokens[:, None], "attention_mask": ones}
            self.batch = {
                name: np.concatenate([array, new[name]], axis=1) for name, array in self.batch.items()
            }
            if (places == self.short).any():  # the long position factors change every key of the row
                return self.prefill()
        step = {"input_ids": tokens[:, None], "attention_mask": self.mask, "position_ids": places}
        acting = self.run.acting({"input_ids": tokens[:, None], "attention_mask": ones}, self.acted)
        self.acted = has_acted(acting, self.acted)
        if "image_features" in self.session.inputs:
            width = self.session.inputs["image_features"].shape[2]
            step["image_features"] = np.zeros((len(self.names), 0, width), np.float32)
        if TOKEN_TYPES in self.session.inputs:  # an answer's
            step[TOKEN_TYPES] = ones
        if OFFSETS in self.session.inputs:
            none = np.zeros((len(self.names), 1, 3), np.int64)
            step[OFFSETS] = none if self.offsets is None else self.offsets[:, -1:]
        graph = self.session.graph(MAIN)
        feeds = {
            name: graph.cast(name, array)
            for name, array in {**step, ADAPTER_POSITIONS: acting}.items()
            if name in graph.inputs
        }
        return self.run({**values(feeds), **next_cache(outputs)}, MAIN)

    def continuing(self, rows: np.ndarray, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Makes each row continue the one of its number in ``rows``, and returns the caches in this order."""
        self.batch = {name: array[rows] for name, array in self.batch.items()}
        self.acted = self.acted[rows]
        return _take(outputs, rows)

    def _places(self, tokens: int) -> np.ndarray:
        """Returns the position ids of the last tokens. Rows that have ended still run along, so their
        positions are clipped to the context.
        """
        places = positions(self.mask)[:, -tokens:]
        return places if self.context is None else np.minimum(places, self.context - 1)


class EncoderDecoder:
    """A batch of a decoder with cross-attention to an encoder, which reads each row once. ``start`` are the
    tokens with which its rows begin. The attributes are those of :class:`DecoderOnly`.
    """

    def __init__(
        self,
        session: OpenBundle,
        rows: Sequence[Sequence[int]],
        names: list[str | None],
        given: Arrays,
        start: Sequence[int] | None = None,
    ) -> None:
        self.session, self.names, self.run = session, names, session.pin(names)
        self.inputs = given or pad(rows, session.pad_id, left=False)
        self.start = start_ids(session) if start is None else start
        self.prompts = [self.start] * len(names)
        self.last = np.full(len(names), len(self.start) - 1)
        self.virtual = np.array(self.run.in_cache(), np.int64)
        self.lengths = self.virtual + self.last + 1

    def prefill(self) -> dict[str, Any]:
        """Runs the encoder, then the decoder over the start tokens."""
        start = {"decoder_input_ids": np.tile(np.array(self.start, np.int64), (len(self.names), 1))}
        encoded = run_parts(self.session, self.inputs, self.names, self.run)
        feeds = values(
            complete(self.session, self.session.task.main, {**self.inputs, **encoded, **start}, self.run)
        )
        self.encoded = {
            name: value
            for name, value in feeds.items()
            if name.startswith(ENCODED) or name == "attention_mask"
        }
        return self.run(feeds, MAIN)

    def step(self, tokens: np.ndarray, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Runs one token for each row on the previous cache and the encoder's keys and values."""
        return self.run(
            {**values({"decoder_input_ids": tokens[:, None]}), **self.encoded, **next_cache(outputs)}, MAIN
        )

    def continuing(self, rows: np.ndarray, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the caches in the order of ``rows``, which continue rows of the same encoder's output."""
        return _take(outputs, rows)


def _take(outputs: Mapping[str, Any], rows: np.ndarray) -> dict[str, Any]:
    return {
        name: value_of(np.ascontiguousarray(array_of(value)[rows]))
        for name, value in outputs.items()
        if name.startswith(PRESENT)
    }


def next_cache(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the cache among a pass's outputs under the input names of the next pass."""
    return {
        PAST + name.removeprefix(PRESENT): value
        for name, value in outputs.items()
        if name.startswith(PRESENT)
    }
