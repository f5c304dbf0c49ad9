"""The interface of a running bundle that tasks use to compute answers; :class:`adapterpack.Session`
implements it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from .data import ONE, Picture, ProblemType, Recording, Result, no_head

Arrays = dict[str, np.ndarray]
Span = tuple[int, int]


class RowHead(NamedTuple):
    """The head that computed a row's outputs: whether it was ``trained``, and the ``labels`` of its logits in
    order, None if it was never trained or the task has no labels. ``problem`` says what the logits mean.
    """

    trained: bool
    labels: Sequence[str] | None
    problem: ProblemType = ONE

    def score(self, logits: np.ndarray) -> Result:
        """Returns the result for one row of logits ``[labels]``; logits beyond the head's own labels belong
        to other adapters.
        """
        return no_head("label") if self.labels is None else self.problem.score(logits, self.labels)


class RowInputs(Protocol):
    """A running bundle that can prepare rows."""

    @property
    def bundle(self) -> Any:
        """The bundle's manifest."""

    @property
    def tokenizer(self) -> Any:
        """The bundle's tokenizer."""

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """The base's ``generation_config.json``."""

    def encode(self, texts: Sequence[str]) -> Arrays:
        """Encodes texts as a padded batch: ``input_ids`` and ``attention_mask``."""

    def transcript(self, ids: Sequence[int], timestamps: bool) -> Result:
        """Returns the text of the ids of all frames, and the seconds of its words if they are wanted."""

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> tuple[Arrays, list[list[Span | None]]]:
        """Encodes pairs of texts as a padded batch, with token types if the graph reads them; also returns
        the characters that each token of a second text covers.
        """

    def pixels(self, images: Sequence[Picture]) -> np.ndarray:
        """Returns images as ``pixel_values``."""

    def sized_pixels(self, image: Picture) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns an image as ``pixel_values`` ``[1, ...]``, and its own height and width."""

    def sounds(self, recordings: Sequence[Recording]) -> list[Arrays]:
        """Returns the inputs of each recording, arrays ``[1, ...]``."""


class TaskSession(RowInputs, Protocol):
    """A running bundle as tasks see it. ``adapters`` names the adapter of each row, None for the base."""

    def run(self, inputs: Mapping[str, np.ndarray], adapters: Sequence[str | None]) -> Arrays:
        """Runs one pass and returns output name -> array."""

    def see(self, prompt: Any, pictures: Sequence[Picture]) -> tuple[list[int], list[Any]]:
        """Returns the token ids of a prompt with pictures, and what was read of these."""

    def images(self, seen: Sequence[Any]) -> Arrays:
        """Returns the arrays of pictures that :meth:`see` read, in the order of their rows."""

    def generate(
        self,
        prompts: Sequence[Any],
        adapters: Sequence[str | None],
        *,
        given: Mapping[str, np.ndarray] | None = None,
        **sampling: Any,
    ) -> list[Any]:
        """Generates answers token by token."""
