"""Rows into token ids: data files, the forms of data that are known by their columns, and collation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, load_dataset

from ..errors import ConfigError, StorageError

IGNORED = -100
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
Row = Mapping[str, Any]


def load_rows(source: str) -> Dataset:
    """A data file (json, jsonl, csv, parquet) or a hub data set's train split.

    Raises:
        StorageError: there is no such file.
        ConfigError: it cannot be read as such.
    """
    disable_progress_bars()
    path = Path(source)
    builder = _BUILDERS.get(path.suffix)
    if builder and not path.is_file():
        raise StorageError("there is no such data file", where=source, remedy="paths are taken from the current folder")
    try:
        return load_dataset(builder, data_files=str(path), split="train") if builder else load_dataset(source, split="train")
    except Exception as error:
        raise ConfigError(f"the data cannot be read: {str(error).partition(chr(10))[0]}", where=source,
                          expected="json, jsonl, csv or parquet rows, or a hub data set") from error


@dataclass(frozen=True)
class Form:
    """One form of data: the columns that tell it, and how a row becomes (prompt, completion), as chat messages where it is a chat."""

    name: str
    columns: frozenset[str]
    split: Callable[[Row], tuple[list[dict[str, str]], str]]


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


FORMS = (
    Form("messages", frozenset({"messages"}), lambda row: (list(row["messages"][:-1]), row["messages"][-1]["content"])),
    Form("prompt-completion", frozenset({"prompt", "completion"}), lambda row: (_user(row["prompt"]), row["completion"])),
    Form("alpaca", frozenset({"instruction", "output"}),
         lambda row: (_user("\n\n".join(filter(None, [row["instruction"], row.get("input")]))), row["output"])),
    Form("text", frozenset({"text"}), lambda row: ([], row["text"])),
)


def form_of(columns: list[str], where: object) -> Form:
    """The form of data that these columns tell.

    Raises:
        ConfigError: none.
    """
    for form in FORMS:
        if form.columns <= set(columns):
            return form
    known = "; ".join(" + ".join(sorted(form.columns)) for form in FORMS)
    raise ConfigError("these columns are of no known form", where=where, expected=known, found=", ".join(columns))


def encode_causal(rows: Dataset, tokenizer: Any, max_length: int, where: object) -> list[dict[str, list[int]]]:
    """Token ids and labels for causal language modelling: the loss is on the completion alone; the end token is learnt.

    A chat template, where the tokenizer has one, renders the prompt. Rows longer than ``max_length`` tokens are cut at the end.
    """
    form = form_of(rows.column_names, where)
    encoded = []
    for row in rows:
        messages, completion = form.split(row)
        prompt = prompt_ids(messages, tokenizer)
        answer = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = (prompt + answer)[:max_length]
        encoded.append({"input_ids": ids, "labels": ([IGNORED] * len(prompt) + answer)[:max_length]})
    return encoded


def prompt_ids(messages: list[dict[str, str]], tokenizer: Any) -> list[int]:
    """The ids of a prompt, rendered by the chat template if there is one."""
    if not messages:
        return []
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
    plain: list[int] = tokenizer("\n".join(message["content"] for message in messages))["input_ids"]
    return plain


def encode_classification(rows: Dataset, tokenizer: Any, labels: list[str], max_length: int, where: object) -> list[dict[str, Any]]:
    """Token ids and the label's index; columns ``text`` (or ``sentence1`` and ``sentence2``) and ``label``.

    Raises:
        ConfigError: other columns, or a label that is not among ``labels``.
    """
    pairs = {"sentence1", "sentence2"} <= set(rows.column_names)
    if "label" not in rows.column_names or not (pairs or "text" in rows.column_names):
        raise ConfigError("classification needs the columns text and label", where=where, found=", ".join(rows.column_names))
    index = {label: position for position, label in enumerate(labels)}
    encoded = []
    for number, row in enumerate(rows):
        if str(row["label"]) not in index:
            raise ConfigError("a label that the training data does not have", where=f"{where}, row {number + 1}", expected=", ".join(labels),
                              found=row["label"])
        texts = (row["sentence1"], row["sentence2"]) if pairs else (row["text"],)
        ids = tokenizer(*texts, truncation=True, max_length=max_length)["input_ids"]
        encoded.append({"input_ids": ids, "labels": index[str(row["label"])]})
    return encoded


@dataclass(frozen=True)
class Collator:
    """Pads the rows of a batch on the right to the longest: ids and mask, and labels where they are sequences."""

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``attention_mask`` ``[batch, longest]``; ``labels`` ``[batch]`` or ``[batch, longest]``; all int64."""
        width = max(len(row["input_ids"]) for row in rows)

        def padded(values: list[int], fill: int) -> list[int]:
            return [*values, *[fill] * (width - len(values))]

        batch = {
            "input_ids": [padded(row["input_ids"], self.pad_token_id) for row in rows],
            "attention_mask": [padded([1] * len(row["input_ids"]), 0) for row in rows],
            "labels": [padded(row["labels"], IGNORED) if isinstance(row["labels"], list) else row["labels"] for row in rows],
        }
        return {key: torch.tensor(values) for key, values in batch.items()}
