"""Single answers with a verdict, as KTO learns from them: ``prompt``, ``completion`` and ``label``, which is
true for a good answer.
"""

from __future__ import annotations

from typing import Any

from ..data.rows import Row
from .form import PREFERENCES, PreferenceForm

_VERDICTS = {True: True, False: False, "true": True, "false": False}


def read(row: Row) -> dict[str, Any]:
    """Returns the three columns, after checking that prompt and completion have the same type."""
    verdict = row["label"].lower() if isinstance(row["label"], str) else row["label"]
    if verdict not in _VERDICTS:
        raise ValueError(f"the label is true or false, not {row['label']!r}")
    if type(row["prompt"]) is not type(row["completion"]) or not isinstance(row["prompt"], str | list):
        raise ValueError("prompt and completion must both be texts, or lists of messages")
    return {"prompt": row["prompt"], "completion": row["completion"], "label": _VERDICTS[verdict]}


PREFERENCES.register(
    PreferenceForm("labelled-answers", frozenset({"prompt", "completion", "label"}), read, paired=False)
)
