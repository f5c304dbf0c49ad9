"""Functions that score answers, for ``adapterpack train grpo.yaml --reward rewards.py:polite``."""

from typing import Any

_POLITE = ("please", "thank", "sorry", "happy to")


def polite(completions: list[str], prompts: list[str], **columns: Any) -> list[float]:
    """Scores polite words, and a single sentence."""
    return [
        sum(word in text.lower() for word in _POLITE) - 0.5 * max(0, text.count(".") - 1)
        for text in completions
    ]
