"""Speech recognition with an encoder-decoder model: the text of each recording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..errors import ConfigError, excerpt
from ..io import Config
from .data import Encoded, Labels, Result, Row, file_of, map_rows, report_of
from .session import TaskSession
from .targets import target_ids
from .task import MAIN, TASKS, Part, Task, TaskTraining
from .text_generation import completions


def answer(
    session: TaskSession, rows: Sequence[Row], adapters: Sequence[str | None], sampling: Mapping[str, Any]
) -> list[Result]:
    """Returns ``completion`` for each row: the recognised text. Besides the parameters of generation,
    ``language`` is the code of the language spoken, by default the likeliest, and ``speech_task`` is
    ``transcribe``, or ``translate`` into English.
    """
    sampling = {"language": None, "speech_task": "transcribe", **sampling}
    language, task = sampling.pop("language"), sampling.pop("speech_task")
    if first := first_tokens(session.generation_config, language, task):
        sampling.setdefault("first_tokens", first)
    heard = session.sounds(map_rows(rows, lambda row: file_of(row, "audio")))
    inputs = {name: np.concatenate([row[name] for row in heard]) for name in heard[0]}
    return completions(session, [], adapters, sampling, inputs)


def languages_of(config: Config) -> dict[str, Any]:
    """Returns the languages that a ``generation_config.json`` names, by their codes -> their tokens."""
    named = config.get("lang_to_id")
    return {str(name).strip("<|>"): token for name, token in named.items()} if isinstance(named, dict) else {}


def first_tokens(config: Config, language: str | None, task: str = "transcribe") -> list[Sequence[Any]]:
    """Returns with what an answer begins, as transformers begins it: the language, which is the likeliest
    where None is given, the task, and that no times follow. A model that names no languages begins as it
    will.

    Raises:
        ConfigError: the model does not know the language or the task.

    Example:
        >>> known = {"lang_to_id": {"<|de|>": 4, "<|en|>": 5}, "task_to_id": {"transcribe": 7}}
        >>> first_tokens(known, None), first_tokens(known, "de")
        ([[4, 5], [7]], [[4], [7]])
    """
    languages = languages_of(config)
    tasks = config.get("task_to_id")
    if not languages and language is None and task == "transcribe":
        return []
    tasks = tasks if isinstance(tasks, dict) else {}
    for where, value, known in (("language", language, languages), ("speech_task", task, tasks)):
        if value is not None and (not isinstance(value, str) or value not in known):
            raise ConfigError(
                "the model does not know this",
                where=where,
                expected=f"one of {', '.join(known)}" if known else "none: its files name none",
                found=excerpt(value),
            )
    spoken = list(languages.values()) if language is None else [languages[language]]
    timeless = config.get("no_timestamps_token_id")
    return [spoken, [tasks[task]], *([] if timeless is None else [[timeless]])]


def encode(
    rows: Any, media: Any, max_length: int, where: object, labels: Labels | None = None
) -> list[Encoded]:
    """Returns the features of each recording, computed when a batch needs them, and the token ids of its
    text. The columns are ``audio``, the path of a file, and ``text`` or ``sentence``.

    Raises:
        ConfigError: other columns, or a row without a text.
    """
    report = report_of(where)
    column = report.read_pair(rows.column_names, "audio", ("text", "sentence"), "speech recognition needs")
    start = getattr(media.config, "decoder_start_token_id", None)

    def encode_row(row: Row, place: object) -> Encoded:
        ids = target_ids(media.tokenizer, row[column], max_length + 1, place, start)
        report.cut += len(ids) > max_length
        return {"sound": partial(media.sound, row["audio"], place), "labels": ids[:max_length]}

    return report.encode(rows, encode_row)


def _hears(config: Config) -> bool:
    """Whether a model with encoder and decoder reads bands of sound, by its config or that of its encoder."""
    encoder = config.get("encoder_config")
    nested = config.get("is_encoder_decoder") and isinstance(encoder, dict) and encoder.get("num_mel_bins")
    return bool(config.get("num_mel_bins") or nested)


TASKS.register(
    Task(
        "automatic-speech-recognition",
        "AutoModelForSpeechSeq2Seq",
        answer,
        ("ForConditionalGeneration",),
        _hears,
        parts=(
            Part("encoder", "encoder", ("input_features",)),
            Part(MAIN, "cross_decoder", ("decoder_input_ids", "past_key_values", "encoder")),
        ),
        training=TaskTraining(encode, reads="media"),
    )
)
