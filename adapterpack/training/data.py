"""Rows into token ids: data files, the forms of data that are known by their columns, and collation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, load_dataset

from ..chat import ChatTemplate
from ..errors import ConfigError, StorageError

log = logging.getLogger(__name__)

IGNORED = -100
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
Row = Mapping[str, Any]


def load_rows(source: str) -> Dataset:
    """A data file (json, jsonl, csv, parquet) or a hub data set's train split.

    Raises:
        StorageError: there is no such file.
        ConfigError: it cannot be read as such, or it holds no rows.
    """
    require_file(source)
    path = Path(source)
    builder = _BUILDERS.get(path.suffix.lower())
    try:
        with _quiet_datasets():
            rows = load_dataset(builder, data_files=str(path), split="train") if builder else load_dataset(source, split="train")
    except Exception as error:
        reason = str(error.__cause__ or error).partition("\n")[0].rstrip(".")
        raise ConfigError(f"the data cannot be read: {reason}", where=source,
                          expected="json, jsonl, csv or parquet rows, or a hub data set") from error
    if not len(rows):
        raise ConfigError("the data holds no rows", where=source)
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


@dataclass(frozen=True)
class Form:
    """One form of data: the columns that tell it, and how a row becomes (prompt, completion), as chat messages where it is a chat."""

    name: str
    columns: frozenset[str]
    split: Callable[[Row], tuple[list[dict[str, str]], str]]


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": _text(text)}]


def _conversation(row: Row) -> tuple[list[dict[str, str]], str]:
    *before, last = row["messages"]
    if last["role"] != "assistant":
        raise ValueError("the last message is not the assistant's")
    return before, last["content"]


FORMS = (
    Form("messages", frozenset({"messages"}), _conversation),
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

    A chat template, where the tokenizer has one, renders the prompt. Rows longer than ``max_length`` tokens are cut at the end; those of
    which only the prompt would be left are left out, with a warning.

    Raises:
        ConfigError: a row that is not of its columns' form; no row is left; or the tokenizer has no end token.
    """
    form = form_of(rows.column_names, where)
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end token, so the model could not learn where to stop", where=where,
                          remedy="use the tokenizer of a generating model")
    encoded = []
    for number, row in enumerate(rows):
        try:
            messages, completion = form.split(row)
            prompt = prompt_ids(messages, tokenizer)
            answer = tokenizer(_text(completion), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        except Exception as error:
            reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
            raise ConfigError(f"a row is not of the form {form.name}: {reason}", where=f"{where}, row {number + 1}") from error
        if len(prompt) < max_length:
            encoded.append({"input_ids": (prompt + answer)[:max_length], "labels": ([IGNORED] * len(prompt) + answer)[:max_length]})
    left_out = len(rows) - len(encoded)
    if not encoded:
        raise ConfigError("every prompt is longer than max_length, so there is nothing to learn", where=where,
                          found=f"max_length {max_length}", remedy="raise max_length")
    if left_out:
        log.warning("%s: %d of %d rows are left out, their prompts fill max_length (%d)", where, left_out, len(rows), max_length)
    return encoded


def prompt_ids(messages: list[dict[str, str]], tokenizer: Any) -> list[int]:
    """The ids of a prompt, rendered by the chat template if there is one; of no messages, those that begin every text.

    The end token that some tokenizers put behind every text is taken off: here an answer follows.
    """
    if messages and tokenizer.chat_template:
        source = tokenizer.chat_template  # several by name, or one
        template = _template(source if isinstance(source, str) else source.get("default", ""))
        text = template.render(messages, tokenizer.special_tokens_map)
        rendered: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return rendered
    ids: list[int] = tokenizer("\n".join(_text(message["content"]) for message in messages))["input_ids"]
    begins = len(ids) == 1 and tokenizer.bos_token_id == tokenizer.eos_token_id  # some models begin with the token with which they end
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and not begins else ids


@lru_cache(maxsize=1)
def _template(source: str) -> ChatTemplate:
    """A chat template, compiled once for all rows."""
    return ChatTemplate(source)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"text was expected, found {value!r}")  # becomes a ConfigError that names the row
    return value


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
    found = sorted(set(values), key=lambda label: (isinstance(label, str), label))
    labels = list(dict.fromkeys(map(str, found)))
    if len(labels) < 2:
        raise ConfigError("there is nothing to tell apart", where=where, expected="at least two labels", found=", ".join(labels))
    return labels


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
        place = f"{where}, row {number + 1}"
        if str(row["label"]) not in index:
            raise ConfigError("a label that the training data does not have", where=place, expected=", ".join(labels), found=row["label"])
        texts = (row["sentence1"], row["sentence2"]) if pairs else (row["text"],)
        if not all(isinstance(text, str) for text in texts):
            raise ConfigError("a row without text", where=place, found=", ".join(map(repr, texts)))
        ids = tokenizer(*texts, truncation=True, max_length=max_length)["input_ids"]
        encoded.append({"input_ids": ids, "labels": index[str(row["label"])]})
    return encoded


def encode_spans(rows: Dataset, tokenizer: Any, max_length: int, where: object, types: bool) -> list[dict[str, Any]]:
    """Token ids of question and context, and where in them the answer begins and ends; columns ``question``, ``context`` and ``answers``
    (``text`` and ``answer_start``, lists of which the first counts), as those of SQuAD.

    A question without an answer has both at the first token. Contexts are cut at ``max_length``; rows whose answer is cut off are left out,
    with a warning. ``types``: whether the model reads which text a token is of.

    Raises:
        ConfigError: other columns, an answer that is not in its context, or no row is left.
    """
    wanted = ("question", "context", "answers")
    if not set(wanted) <= set(rows.column_names):
        raise ConfigError("question answering needs the columns question, context and answers", where=where,
                          found=", ".join(rows.column_names))
    encoded = []
    for number, row in enumerate(rows):
        place = f"{where}, row {number + 1}"
        try:
            question, context, (start, stop) = _text(row["question"]), _text(row["context"]), _answer(row)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"a row is not of the form of SQuAD: {error}", where=place) from error
        found = tokenizer(question, context, truncation="only_second", max_length=max_length, return_offsets_mapping=True)
        held = [at for at, side in enumerate(found.sequence_ids()) if side == 1]
        inside = [at for at in held if found["offset_mapping"][at][0] < stop and found["offset_mapping"][at][1] > start]
        if stop and (not inside or found["offset_mapping"][inside[-1]][1] < stop):
            continue
        first, last = (inside[0], inside[-1]) if stop else (0, 0)
        kinds = {"token_type_ids": found["token_type_ids"]} if types and "token_type_ids" in found else {}
        encoded.append({"input_ids": found["input_ids"], "start_positions": first, "end_positions": last, **kinds})
    if not encoded:
        raise ConfigError("every answer lies beyond max_length, so there is nothing to learn", where=where,
                          found=f"max_length {max_length}", remedy="raise max_length")
    if len(encoded) < len(rows):
        log.warning("%s: %d of %d rows are left out, their answers lie beyond max_length (%d)", where, len(rows) - len(encoded), len(rows),
                    max_length)
    return encoded


def _answer(row: Row) -> tuple[int, int]:
    """Where the first answer of a row is in its context; ``(0, 0)`` where there is none."""
    texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
    if not texts:
        return 0, 0
    start, text = int(starts[0]), _text(texts[0])
    if not text or row["context"][start : start + len(text)] != text:
        raise ValueError(f"the answer {text!r} is not at {start} of its context")
    return start, start + len(text)


@dataclass(frozen=True)
class Collator:
    """Pads the rows of a batch on the right to the longest: ids, mask and types, and labels where they are sequences."""

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``attention_mask`` ``[batch, longest]``; what else rows have ``[batch]`` or ``[batch, longest]``; all int64."""
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
