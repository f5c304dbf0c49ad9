"""Speech recognition with an encoder that names a token for every frame (CTC): the text of each recording."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import ConfigError, excerpt
from .audio_classification import prepare
from .data import Encoded, Labels, Result, Row, report_of
from .one_pass import OnePass, PreparedRow
from .session import Arrays, RowHead, RowInputs
from .sounds import FRAMES
from .task import MAIN, SOUND, TASKS, Part, Task, TaskTraining


@dataclass(frozen=True)
class SpeechOptions:
    """``timestamps`` also gives the seconds in which each word is spoken.

    Raises:
        ConfigError: a value is invalid.
    """

    timestamps: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.timestamps, bool):
            raise ConfigError(
                "this must be true or false", where="timestamps", found=excerpt(self.timestamps)
            )


def result(
    session: RowInputs, row: PreparedRow, outputs: Arrays, head: RowHead, options: SpeechOptions
) -> Result:
    """Returns ``text``, and with ``timestamps`` the ``chunks``: the text of each word, and its first and last
    second. They are those of the most likely token of every frame.
    """
    logits = outputs["logits"][0]
    frames = int(outputs[FRAMES][0, 0]) if FRAMES in outputs else len(logits)
    return session.transcript(logits[:frames].argmax(-1).tolist(), options.timestamps)


def encode(
    rows: Any, media: Any, max_length: int, where: object, labels: Labels | None = None
) -> list[Encoded]:
    """Returns what the model hears of each recording, computed when a batch needs it, and the token ids of
    its text. The columns are ``audio``, the path of a file, and ``text`` or ``sentence``.

    Raises:
        ConfigError: other columns, a row without a text, or one whose letters the tokenizer does not know.
    """
    report = report_of(where)
    column = report.read_pair(rows.column_names, "audio", ("text", "sentence"), "speech recognition needs")

    def encode_row(row: Row, place: object) -> Encoded:
        text = row[column]
        if not isinstance(text, str) or not text.strip():
            raise ConfigError("a row without a text", where=place, found=excerpt(text))
        ids = media.tokenizer(text)["input_ids"]
        unknown = ids.count(media.tokenizer.unk_token_id)
        if 2 * unknown >= len(ids):
            raise ConfigError(
                "the tokenizer does not know most letters of a text",
                where=place,
                found=excerpt(text),
                remedy="write texts as the tokenizer's vocab.json does, many of which have capitals only",
            )
        report.cut += len(ids) > max_length
        return {"sound": partial(media.sound, row["audio"], place), "labels": ids[:max_length]}

    return report.encode(rows, encode_row)


TASKS.register(
    Task(
        "automatic-speech-recognition-ctc",
        "AutoModelForCTC",
        OnePass(prepare, result, SpeechOptions),
        ("ForCTC",),
        parts=(Part(MAIN, "frames", SOUND),),
        training=TaskTraining(encode, reads="media"),
    )
)
