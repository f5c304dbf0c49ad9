"""Shows what a model in training answers to prompts of its evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...tasks.data import IGNORED

log = logging.getLogger(__name__)
_LONGEST = 64
"""The most tokens of an answer."""


class Samples(TrainerCallback):  # type: ignore[misc]
    """A callback that answers the first ``count`` rows with a prompt after each evaluation, always by the
    likeliest token. The log and the trainer's history have the answers.
    """

    def __init__(self, rows: Any, tokenizer: Any, count: int) -> None:
        self._prompts = [prompt for prompt, _ in zip(_prompts(rows), range(count), strict=False)]
        self._tokenizer = tokenizer

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Answers the prompts."""
        samples = []
        for prompt in self._prompts:
            ids = torch.tensor([prompt], device=model.device)
            with torch.no_grad():
                whole = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=_LONGEST,
                    do_sample=False,
                    pad_token_id=self._tokenizer.eos_token_id,
                )
            asked, said = (
                self._tokenizer.decode(part, skip_special_tokens=True)
                for part in (prompt, whole[0, len(prompt) :])
            )
            log.info("step %d: %r is answered by %r", state.global_step, asked, said)
            samples.append([asked, said])
        state.log_history.append({"step": state.global_step, "samples": samples})


def _prompts(rows: Any) -> Iterator[list[int]]:
    """Yields what comes before the first learned token of each row, where anything does."""
    for row in rows:
        start = next((place for place, label in enumerate(row["labels"]) if label != IGNORED), 0)
        if start:
            yield list(row["input_ids"][:start])
