"""Measures what is recognised of speech, by the words and letters that are wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import EVALUATIONS, AnsweredRows, Evaluation, Judgement, ratio, read_files, text_in
from .texts import length_options


def _judge(rows: AnsweredRows) -> Judgement:
    answers = [str(result.get("completion", result.get("text"))) for result in rows.results]
    words, letters = (
        np.array(
            [
                (edits(cut(right), cut(answer)), len(cut(right)))
                for right, answer in zip(rows.expected, answers, strict=True)
            ]
        ).T
        for cut in (str.split, str.strip)
    )
    return Judgement(
        [ratio("wer", words[0], words[1], False), ratio("cer", letters[0], letters[1], False)],
        {"wrong_words": words[0], "wrong_letters": letters[0]},
        words[0] / np.maximum(words[1], 1),
        answers,
    )


def edits(one: Sequence[str], two: Sequence[str]) -> int:
    """Returns how many items must be replaced, inserted or left out to make one sequence of the other.

    Example:
        >>> edits("kitten", "sitting")
        3
    """
    at = np.arange(len(two) + 1)
    others = np.array([*two])
    costs = at
    for number, item in enumerate(one, 1):
        best = np.minimum(costs[1:] + 1, costs[:-1] + (others != item))
        costs = np.minimum.accumulate(np.array([number, *best]) - at) + at
    return int(costs[-1])


_read = read_files("audio", ("text", "sentence"), text_in)
EVALUATIONS.register(
    Evaluation("speech", ("automatic-speech-recognition",), _read, _judge, options=length_options)
)
EVALUATIONS.register(Evaluation("speech-frames", ("automatic-speech-recognition-ctc",), _read, _judge))
