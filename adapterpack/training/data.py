"""Reads data files, and makes batches of rows of token ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, load_dataset

from ..errors import ConfigError, StorageError
from ..library_errors import library_errors
from ..tasks.task import IGNORED
from .data_files import Place, require_bounded, require_short_texts

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(source: str) -> Dataset:
    """A data file (json, jsonl, csv, parquet) or a hub data set's train split.

    Raises:
        StorageError: there is no such file.
        ConfigError: it cannot be read as such, or it holds no rows.
    """
    require_file(source)
    path = Path(source)
    builder = _BUILDERS.get(path.suffix.lower())
    if builder:
        require_bounded(path)
    with _quiet_datasets(), library_errors("datasets", "the data cannot be read", where=Place(path), kind=ConfigError,
                                           expected="json, jsonl, csv or parquet rows, or a hub data set"):
        rows = load_dataset(builder, data_files=str(path), split="train") if builder else load_dataset(source, split="train")
    require_short_texts(rows, source)
    if not len(rows):
        raise ConfigError("the data holds no rows", where=source)
    return _with_names(rows)


def _with_names(rows: Dataset) -> Dataset:
    """The rows with the names of classes in the place of their numbers, where the data say what the numbers mean."""
    for name, feature in rows.features.items():
        if isinstance(feature, ClassLabel):
            names = [None if number is None or number < 0 else feature.int2str(number) for number in rows[name]]
            rows = rows.remove_columns(name).add_column(name, names)
    return rows


def require_file(source: str) -> None:
    """Checks that a data file is there; the name of a hub data set is let pass.

    Raises:
        StorageError: it is not.
    """
    path = Path(source)
    if path.suffix.lower() in _BUILDERS and not path.is_file():
        raise StorageError("there is no such data file", where=source, remedy="paths are taken from the current folder")


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No progress bars of ``datasets`` inside; as it was afterwards."""
    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()


def labels_in(rows: Dataset, where: object) -> list[str]:
    """The labels of classification rows as text, sorted; numbers in their own order.

    Raises:
        ConfigError: there is no column ``label``, a row has none, or all have the same.
    """
    if "label" not in rows.column_names:
        raise ConfigError("classification needs the columns text and label", where=where, found=", ".join(rows.column_names))
    values = rows["label"]
    for number, label in enumerate(values):
        if label is None or label == "":
            raise ConfigError("a row without a label", where=f"{where}, row {number + 1}")
        if not isinstance(label, str | int | bool) and not (isinstance(label, float) and label.is_integer()):
            raise ConfigError("a label must be one text or whole number: several labels of a row and regression cannot be trained yet",
                              where=f"{where}, row {number + 1}", found=repr(label)[:80])
    distinct = sorted(set(values), key=lambda label: (isinstance(label, str), label))
    labels = list(dict.fromkeys(map(str, distinct)))
    if len(labels) < 2:
        raise ConfigError("there is nothing to tell apart", where=where, expected="at least two labels", found=", ".join(labels))
    return labels


@dataclass(frozen=True)
class Collator:
    """Pads the rows of a batch on the right to the longest: ids, mask and types, and labels where they are sequences."""

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``attention_mask`` ``[batch, longest]``; what else rows have: lists ``[batch, longest]``, numbers ``[batch]``,
        tuples ``[batch, n]``.
        """
        width = max(len(row["input_ids"]) for row in rows)

        def padded(values: list[int], fill: int) -> list[int]:
            return [*values, *[fill] * (width - len(values))]

        batch = {
            "input_ids": [padded(row["input_ids"], self.pad_token_id) for row in rows],
            "attention_mask": [padded([1] * len(row["input_ids"]), 0) for row in rows],
        }
        for key in rows[0].keys() - {"input_ids"}:
            fill = IGNORED if key == "labels" else 0
            batch[key] = [padded(row[key], fill) if isinstance(row[key], list) else row[key] for row in rows]
        return {key: torch.tensor(values) for key, values in batch.items()}
