"""Speech recognition by an encoder and a decoder: the text of each recording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .rows import Row, file_of, map_rows
from .session import Session
from .task import MAIN, TASKS, Part, Task
from .text_generation import completions


def answer(session: Session, rows: Sequence[Row], adapters: Sequence[str | None], sampling: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``completion``: what was said."""
    features = session.speech(map_rows(rows, lambda row: file_of(row, "audio")))
    return completions(session, [], adapters, sampling, {"input_features": features})


TASKS.register(Task(
    "automatic-speech-recognition", "AutoModelForSpeechSeq2Seq", answer, ("ForConditionalGeneration",),
    lambda config: bool(config.get("num_mel_bins")),
    parts=(Part("encoder", "encoder", ("input_features",)),
           Part(MAIN, "cross_decoder", ("decoder_input_ids", "past_key_values", "encoder"))),
))
