"""Makes trainers of TRL keep the last tokens of a prompt alone, as TRL did while it had
``max_prompt_length``: before it leaves out rows whose prompt fills ``max_length``.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CutPrompts = Callable[[type[Any], int], type[Any]]
"""Returns a trainer class whose prompts have at most so many tokens."""


@dataclass(frozen=True)
class PromptLength:
    """``max_prompt_length``: the most tokens of a prompt, which keeps its last ones."""

    max_prompt_length: int | None = None

    def __post_init__(self) -> None:
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be at least 1, not {self.max_prompt_length}")


def cut_prompt_ids(trainer: type[Any], most: int) -> type[Any]:
    """Of a trainer whose rows have ``prompt_ids``."""

    class _Cut(trainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
            whole = copy.copy(args)
            longest = args.max_length
            whole.max_length = None
            rows = super()._prepare_dataset(dataset, processing_class, whole, name)
            rows = rows.map(lambda row: {"prompt_ids": row["prompt_ids"][-most:]})
            return rows.filter(lambda row: longest is None or len(row["prompt_ids"]) < longest)

    return _Cut


def cut_before_answers(trainer: type[Any], most: int) -> type[Any]:
    """Of a trainer that generates answers to its prompts."""

    class _Cut(trainer):  # type: ignore[misc]
        def _tokenize_prompts(self, prompts: Any) -> Any:
            ids, *rest = super()._tokenize_prompts(prompts)
            return ([prompt[-most:] for prompt in ids], *rest)

    return _Cut


def cut_whole_rows(trainer: type[Any], most: int) -> type[Any]:
    """Of a trainer whose rows are prompts and answers in one, with -100 as the labels of the prompt."""

    class _Cut(trainer):  # type: ignore[misc]
        max_length: int

        def tokenize_row(self, feature: Any, model: Any = None) -> Any:
            longest, self.max_length = self.max_length, sys.maxsize
            try:
                row = super().tokenize_row(feature, model)
            finally:
                self.max_length = longest
            for answer in ("chosen", "rejected"):
                labels = row[f"{answer}_labels"]
                start = max(0, sum(label == -100 for label in labels) - most)
                for part in ("input_ids", "attention_mask", "labels"):
                    row[f"{answer}_{part}"] = row[f"{answer}_{part}"][start:][:longest]
            return row

    return _Cut
