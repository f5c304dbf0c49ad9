"""Speech recognition with an encoder-decoder model: the text of each recording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from .data.problems import Labels
from .data.report import report_of
from .data.rows import Row, file_of, map_rows
from .session import TaskSession
from .targets import target_ids
from .task import MAIN, TASKS, Part, Task, TaskTraining
from .text_generation import completions


def answer(
    session: TaskSession, rows: Sequence[Row], adapters: Sequence[str | None], sampling: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Returns ``completion`` for each row: the recognised text."""
    heard = session.sounds(map_rows(rows, lambda row: file_of(row, "audio")))
    inputs = {name: np.concatenate([row[name] for row in heard]) for name in heard[0]}
    return completions(session, [], adapters, sampling, inputs)


def encode(
    rows: Any, media: Any, max_length: int, where: object, labels: Labels | None = None
) -> list[dict[str, Any]]:
    """Returns the features of each recording, computed when a batch needs them, and the token ids of its
    text. The columns are ``audio``, the path of a file, and ``text`` or ``sentence``.

    Raises:
        ConfigError: other columns, or a row without a text.
    """
    report = report_of(where)
    column = report.read_pair(rows.column_names, "audio", ("text", "sentence"), "speech recognition needs")
    start = getattr(media.config, "decoder_start_token_id", None)

    def encode_row(row: Row, place: object) -> dict[str, Any]:
        ids = target_ids(media.tokenizer, row[column], max_length + 1, place, start)
        report.cut += len(ids) > max_length
        return {"sound": partial(media.sound, row["audio"], place), "labels": ids[:max_length]}

    return report.encode(rows, encode_row)


TASKS.register(
    Task(
        "automatic-speech-recognition",
        "AutoModelForSpeechSeq2Seq",
        answer,
        ("ForConditionalGeneration",),
        lambda config: bool(config.get("num_mel_bins")),
        parts=(
            Part("encoder", "encoder", ("input_features",)),
            Part(MAIN, "cross_decoder", ("decoder_input_ids", "past_key_values", "encoder")),
        ),
        training=TaskTraining(encode, reads="media"),
    )
)
