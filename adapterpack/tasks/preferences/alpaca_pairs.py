"""Pairs of answers to instructions in LLaMA-Factory's format: ``instruction`` and ``input``, ``chosen`` and
``rejected``.
"""

from __future__ import annotations

from typing import Any

from ..conversations import alpaca
from ..data.rows import Row
from .form import PREFERENCES, PreferenceForm, answer


def read(row: Row) -> dict[str, Any]:
    """Returns the conversation before the answer, and both answers."""
    *prompt, _ = alpaca.read({**row, "output": ""}).messages
    return {"prompt": prompt, "chosen": answer(row["chosen"]), "rejected": answer(row["rejected"])}


PREFERENCES.register(
    PreferenceForm(
        "alpaca-pairs",
        frozenset({"instruction", "chosen", "rejected"}),
        read,
        frozenset({"input", "system", "history"}),
    )
)
