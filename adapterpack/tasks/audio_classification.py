"""Audio classification: the label of each recording."""

from __future__ import annotations

from functools import partial
from typing import Any

from .data import Encoded, Labels, Row, file_of, report_of
from .one_pass import OnePass, PreparedRow
from .session import RowInputs
from .sounds import positions_of
from .task import MAIN, SOUND, TASKS, Part, Task, TaskTraining
from .text_classification import result

_HEARS = {"conv_dim", "num_mel_bins", "feature_projection_input_dim"}
"""Fields of the configs of models that hear; names of classes alone do not tell them from models of texts."""


def prepare(session: RowInputs, row: Row, options: object) -> PreparedRow:
    """Prepares a recording."""
    (inputs,) = session.sounds([file_of(row, "audio")])
    return PreparedRow(inputs, positions=positions_of(inputs))


def encode(rows: Any, media: Any, max_length: int, where: object, labels: Labels) -> list[Encoded]:
    """Returns what the model hears of each recording, computed when a batch needs it, and the training target
    of its label. The columns are ``audio``, the path of a file, and ``label`` or ``labels``.

    Raises:
        ConfigError: other columns, or a label that is not among ``labels``.
    """
    return report_of(where).encode_labelled(
        rows,
        labels,
        "audio",
        "audio classification needs",
        lambda row, place: {"sound": partial(media.sound, row["audio"], place)},
    )


TASKS.register(
    Task(
        "audio-classification",
        "AutoModelForAudioClassification",
        OnePass(prepare, result),
        ("ForAudioClassification", "ForSequenceClassification"),
        lambda config: bool(_HEARS & {*config}),
        parts=(Part(MAIN, "plain", SOUND),),
        heads=("projector", "classifier"),
        labelled=True,
        training=TaskTraining(encode, reads="media"),
    )
)
