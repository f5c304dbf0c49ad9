"""A task in one file: how well documents answer a query, by a cross-encoder (`text-ranking` on the Hugging
Face Hub).

Its models are sequence classifiers with one output. A package of yours brings its task by an entry point:
[project.entry-points."adapterpack.tasks"] text-ranking = "new_task:ranking"; then `adapterpack train`,
`export` and `run` know it.
"""

import math
from typing import Any

from adapterpack.errors import ConfigError
from adapterpack.tasks.data.rows import Row
from adapterpack.tasks.data.scores import no_head
from adapterpack.tasks.one_pass import NoOptions, OnePass, PreparedRow
from adapterpack.tasks.session import Arrays, RowHead, RowInputs
from adapterpack.tasks.task import HEADS, MAIN, TASKS, TEXT, Part, Task, TaskTraining


def prepare(session: RowInputs, row: Row, options: NoOptions) -> PreparedRow:
    """The query and the document of a row, in one text."""
    inputs, _ = session.encode_pairs([pair(row)])
    return PreparedRow(inputs)


def result(
    session: RowInputs, row: PreparedRow, outputs: Arrays, head: RowHead, options: NoOptions
) -> dict[str, Any]:
    """``score``, from 0 to 1."""
    return (
        {"score": 1 / (1 + math.exp(-float(outputs["logits"][0, 0])))} if head.trained else no_head("score")
    )


def pair(row: Row) -> tuple[str, str]:
    """The query and the document of a row."""
    if not isinstance(row.get("query"), str) or not isinstance(row.get("document"), str):
        raise ConfigError("a row of this task needs query and document", found=", ".join(map(str, row)))
    return row["query"], row["document"]


def encode(rows: Any, tokenizer: Any, max_length: int, where: object, labels: None) -> list[dict[str, Any]]:
    """Data for training, columns ``query``, ``document`` and ``score``; what is learned is the cross-entropy
    of the score.
    """
    if not {"query", "document", "score"} <= set(rows.column_names):
        raise ConfigError(
            "ranking needs the columns query, document and score",
            where=where,
            found=", ".join(rows.column_names),
        )
    return [
        {
            **tokenizer(
                *pair(row), truncation="only_second", max_length=max_length, return_attention_mask=False
            ),
            "labels": (float(row["score"]),),
        }
        for row in rows
    ]


ranking = TASKS.register(
    Task(
        "text-ranking",
        "AutoModelForSequenceClassification",
        OnePass(prepare, result),
        ("ForSequenceClassification",),
        recognizes=lambda config: len(config.get("id2label") or {}) == 1,
        parts=(Part(MAIN, "plain", (*TEXT, "token_type_ids")),),
        heads=HEADS,
        # one output, and the loss of a yes or no
        config={"num_labels": 1, "problem_type": "multi_label_classification"},
        columns={"query": str, "document": str},
        training=TaskTraining(encode),
        peft_type="SEQ_CLS",
    )
)
