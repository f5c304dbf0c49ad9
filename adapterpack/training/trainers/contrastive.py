"""Contrastive training of text embeddings, by the losses of sentence-transformers: texts that belong together
get similar vectors.

Rows are pairs (``anchor`` and ``positive``), triplets (with ``negative`` as well), or scored pairs
(``sentence1``, ``sentence2``, ``score``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ...errors import ConfigError
from ...tasks import TaskTraining
from ...tasks.data import DataReport, Labels, Row, report_of
from .kind import TRAINERS, TrainerKind

FORMS = (
    ("anchor", "positive", "negative"),
    ("anchor", "positive"),
    ("sentence1", "sentence2", "score"),
    ("sentence1", "sentence2"),
    ("query", "positive", "negative"),
    ("query", "positive"),
)
"""The columns of rows, under names that data sets use; the first form with all its columns present applies.
``score`` is a number, the others are texts.
"""


@dataclass(frozen=True)
class Contrastive:
    """The settings of contrastive training.

    ``loss``: ``multiple_negatives`` distinguishes a text's partner from all other partners in the batch, by
    cosines times ``scale`` (Henderson et al. 2017, https://arxiv.org/abs/1705.00652); ``triplet`` keeps the
    negative farther away than the positive by ``margin``; ``cosine`` learns scores. The default follows from
    the columns. ``pooling``: by default the base's own, else the mean.
    """

    loss: Literal["multiple_negatives", "triplet", "cosine"] | None = None
    pooling: Literal["mean", "cls", "last"] | None = None
    scale: float = 20.0
    margin: float = 0.3


def encode(
    rows: Any, tokenizer: Any, max_length: int, where: object, labels: Labels | None = None
) -> list[dict[str, Any]]:
    """Returns the token ids of the texts of each row, and its score.

    Raises:
        ConfigError: the columns have no known form, or a row lacks a text or a score.
    """
    report = report_of(where)
    columns = columns_of(rows, report)
    encoded = []
    for number, row in enumerate(rows):
        with report.row(number) as place:
            made = {}
            for part, column in zip(("anchor", "positive", "negative"), columns, strict=False):
                if column == "score":
                    made["labels"] = value_of(row, column, place)
                else:
                    text = value_of(row, column, place)
                    made[f"{part}_input_ids"] = report.tokenize(tokenizer, max_length, text)["input_ids"]
            encoded.append(made)
    return encoded


def columns_of(rows: Any, report: DataReport) -> tuple[str, ...]:
    """Returns the columns of a table that are read, and records them as its format.

    Raises:
        ConfigError: the columns have no known form.
    """
    columns = next((form for form in FORMS if {*form} <= set(rows.column_names)), None)
    if columns is None:
        raise ConfigError(
            "embeddings are learned from pairs, triplets or scored pairs",
            where=report,
            found=", ".join(rows.column_names),
            expected=", or ".join(map(" + ".join, FORMS)),
        )
    report.read_as(" + ".join(columns), rows.column_names, columns)
    return columns


def value_of(row: Row, column: str, place: object) -> Any:
    """Returns the text of a row in a column, or its score.

    Raises:
        ConfigError: the row does not have it.
    """
    value = row[column]
    if column == "score":
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError("a row without a score", where=place, found=repr(value)[:80])
        return float(value)
    if not isinstance(value, str):
        raise ConfigError("a row without text", where=place, found=f"{column}: {value!r:.80}")
    return value


TRAINERS.register(
    TrainerKind(
        "contrastive",
        "adapterpack.training.loop.embedding_trainer:EmbeddingTrainer",
        "transformers:TrainingArguments",
        ("feature-extraction",),
        config=Contrastive,
        reading=TaskTraining(encode),
        compares=True,
        settings=True,
    )
)
