"""What a task may ask of a running bundle to make its answers; :class:`adapterpack.Session` is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from .data.problems import ONE, ProblemType
from .data.rows import Picture
from .data.scores import no_head

Arrays = dict[str, np.ndarray]
Span = tuple[int, int]


class RowHead(NamedTuple):
    """The head that a row's outputs come from: whether it was ``trained``, and the ``labels`` of its logits,
    in order; None where nobody trained it, or where the task has none. ``problem`` is what the logits are
    for.
    """

    trained: bool
    labels: Sequence[str] | None
    problem: ProblemType = ONE

    def score(self, logits: np.ndarray) -> dict[str, Any]:
        """What a result says of one row of logits ``[labels]``: those beyond the head's own labels are other
        adapters'.
        """
        return no_head("label") if self.labels is None else self.problem.score(logits, self.labels)


class RowInputs(Protocol):
    """A running bundle that prepares rows."""

    @property
    def bundle(self) -> Any:
        """The bundle's manifest."""

    @property
    def tokenizer(self) -> Any:
        """The bundle's tokenizer."""

    @property
    def image_token(self) -> int:
        """The id that stands for one position of an image."""

    @property
    def image_positions(self) -> int:
        """How many positions one image takes in a decoder."""

    def encode(self, texts: Sequence[str]) -> Arrays:
        """Texts as a padded batch: ``input_ids`` and ``attention_mask``."""

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> tuple[Arrays, list[list[Span | None]]]:
        """Pairs of texts as a padded batch, with types where the graph reads them; and the characters of each
        token of a second text.
        """

    def pixels(self, images: Sequence[Picture]) -> np.ndarray:
        """Images as ``pixel_values``."""

    def speech(self, files: Sequence[str | Path]) -> np.ndarray:
        """Files of speech as ``input_features``."""


class TaskSession(RowInputs, Protocol):
    """A running bundle, as tasks see it. ``adapters`` names one for each row, None for the base."""

    def run(self, inputs: Mapping[str, np.ndarray], adapters: Sequence[str | None]) -> Arrays:
        """One pass: output name -> array."""

    def generate(
        self,
        prompts: Sequence[Any],
        adapters: Sequence[str | None],
        *,
        given: Mapping[str, np.ndarray] | None = None,
        **sampling: Any,
    ) -> list[Any]:
        """Answers made token by token."""

    def trained_labels(self, adapter: str | None) -> Sequence[str] | None:
        """The labels of a row's logits, in order; None where nobody trained its head."""

    def head_trained(self, adapter: str | None) -> bool:
        """Whether a row's head was trained, by its adapter or with the base."""
