"""Watches the steps of a training: the loss of each, which has to be finite, the speed, and the time that is left."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ...errors import NonFinite

log = logging.getLogger(__name__)


class Step(NamedTuple):
    """How far a training is: the step that is done, how many there are, its loss, tokens a second, and seconds that are left.

    ``name`` is that of the adapter, where several are trained together.
    """

    done: int
    total: int
    loss: float
    speed: float
    left: float
    name: str = ""

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.left), 60)
        hours, minutes = divmod(minutes, 60)
        place = f"{self.name}, step" if self.name else "step"
        return (f"{place} {self.done} of {self.total}: loss {self.loss:.4g}, {self.speed:,.0f} tokens/s, "
                f"{f'{hours}:{minutes:02}' if hours else minutes}:{seconds:02} left")


_SPEED = ("runtime", "samples_per_second", "steps_per_second", "num_tokens")
"""What a trainer says of an evaluation besides its metrics."""


def evaluated(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an evaluation, without the trainer's prefix; the loss comes last.

    Example:
        >>> evaluated({"eval_loss": 0.5, "eval_accuracy": 1.0, "eval_runtime": 0.1, "epoch": 3})
        {'accuracy': 1.0, 'loss': 0.5}
    """
    named = {key.removeprefix("eval_"): float(value) for key, value in metrics.items() if key.startswith("eval_")}
    return {key: named[key] for key in sorted(named, key=lambda key: key == "loss") if key not in _SPEED}


class Steps(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Counts; checks each step's loss; every ``logging_steps`` steps the log gets a line, and ``progress`` is called after each step.

    What it knows is part of a checkpoint, so that a run which goes on says the same as one that was never interrupted. ``name`` stands
    in what it says, where other runs say something, too.
    """

    def __init__(self, progress: Callable[[Step], None] | None = None, losses: list[float] | None = None, name: str = "") -> None:
        self.progress, self.losses, self.name = progress, list(losses or ()), name
        self._loss: Any = 0.0
        self._tokens: Any = 0
        self._counted, self._started, self._first = 0, time.monotonic(), 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the losses of all steps so far."""
        return {"args": {}, "attributes": {"losses": list(self.losses)}}

    def batch(self, loss: torch.Tensor, tokens: torch.Tensor | int) -> None:
        """Adds a batch to the step."""
        self._loss, self._tokens = self._loss + loss, self._tokens + tokens

    def recent(self, steps: int) -> float:
        """The mean loss of the last steps."""
        last = self.losses[-steps:]
        return sum(last) / len(last)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The clock starts; a run that goes on has steps behind it already, or all of them."""
        control.should_training_stop |= state.global_step >= state.max_steps
        self._started, self._first = time.monotonic(), state.global_step
        self.losses = list((state.stateful_callbacks.get(type(self).__name__) or self.state())["attributes"]["losses"])[: self._first]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Checks the loss and shows the step.

        Raises:
            NonFinite: the loss is NaN or infinite; the parameters are by now.
        """
        loss = float(self._loss)
        self._counted += int(self._tokens) * args.world_size
        self._loss, self._tokens = 0.0, 0
        if not math.isfinite(loss):
            remedy = "lower learning_rate or max_grad_norm, raise warmup_steps" + (", or train without bf16" if args.bf16 else "")
            raise NonFinite("the training diverged: its loss is no number", where=f"step {state.global_step}", found=loss, remedy=remedy)
        self.losses.append(loss)
        seconds, done = max(time.monotonic() - self._started, 1e-9), state.global_step - self._first
        step = Step(state.global_step, state.max_steps, self.recent(args.logging_steps), self._counted / seconds,
                    seconds / done * (state.max_steps - state.global_step), self.name)
        if self.progress is not None:
            self.progress(step)
        if state.is_world_process_zero and (state.global_step % args.logging_steps == 0 or state.global_step == state.max_steps):
            log.info("%s", step)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        """One line for an evaluation."""
        if state.is_world_process_zero:
            log.info("%sevaluated after step %d: %s", f"{self.name}, " if self.name else "", state.global_step,
                     ", ".join(f"{key} {value:.4g}" for key, value in evaluated(metrics or {}).items()))
