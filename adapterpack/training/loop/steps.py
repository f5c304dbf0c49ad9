"""Watches a training step by step: checks that losses are finite and do not run away, and reports speed and
remaining time.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ...errors import NonFinite
from ...readable import stretches

log = logging.getLogger(__name__)


class Step(NamedTuple):
    """The progress of a training: the current step, the number of steps, the loss, tokens per second, and the
    seconds left.

    ``name`` is that of the adapter, if several are trained together; ``log`` what the trainer has measured so
    far, with the step of each entry.
    """

    done: int
    total: int
    loss: float
    speed: float
    left: float
    name: str = ""
    log: Sequence[Mapping[str, Any]] = ()

    @property
    def evaluations(self) -> list[dict[str, float]]:
        """The evaluations so far."""
        return evaluations_of(self.log)

    @property
    def figures(self) -> str:
        """The loss, and the speed where rows have tokens."""
        return f"loss {self.loss:.4g}" + (f", {self.speed:,.0f} tokens/s" if self.speed else "")

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.left), 60)
        hours, minutes = divmod(minutes, 60)
        place = f"{self.name}, step" if self.name else "step"
        return (
            f"{place} {self.done} of {self.total}: {self.figures}, "
            f"{f'{hours}:{minutes:02}' if hours else minutes}:{seconds:02} left"
        )


_SPEED = ("runtime", "samples_per_second", "steps_per_second", "num_tokens")
"""Entries of an evaluation that are not metrics."""


def evaluation_scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of an evaluation without the trainer's prefix, the loss last.

    Example:
        >>> evaluation_scores({"eval_loss": 0.5, "eval_accuracy": 1.0, "eval_runtime": 0.1, "epoch": 3})
        {'accuracy': 1.0, 'loss': 0.5}
    """
    named = {
        key.removeprefix("eval_"): float(value) for key, value in metrics.items() if key.startswith("eval_")
    }
    return {key: named[key] for key in sorted(named, key=lambda key: key == "loss") if key not in _SPEED}


_WINDOW = 10
_SHARE = 0.4
_LONG = 20
"""A loss counts as far above where so large a share of the last steps is; it has run away where that is so
for so many steps, or at the end.
"""


class Divergence:
    """Detects losses that run away from where they began: warns once, and raises after many such steps or at
    the end.

    The first loss may be low by luck. So an error also requires losses far above the median of the first
    steps (unless these were running away themselves), and above ``least``, the loss of a model that has
    learned nothing. With ``fails`` false there is only the warning.
    """

    def __init__(self, fails: bool = True, least: float = 0.0) -> None:
        self._fails = fails
        self._least = least
        self._warned = False
        self._far = 0

    def see(self, losses: Sequence[float], step: int, last: bool) -> None:
        """Judges the losses of all steps so far.

        Raises:
            NonFinite: the losses have run away.
        """
        # The warning compares with the first loss. The error compares with the median of the first steps,
        # too, which is capped: losses that ran away at once must not raise the bar.
        recent = losses[max(1, len(losses) - _WINDOW) :]
        first = max(losses[0], self._least)
        begun = max(first, min(statistics.median(losses[:_WINDOW]), _far_above(_far_above(first))))
        self._far = self._far + 1 if _mostly_above(recent, _far_above(begun)) else 0
        if not self._warned and _mostly_above(recent, _far_above(first)):
            self._warned = True
            log.warning(
                "step %d: the loss is far above its start: %.4g, which was %.4g at first; %s",
                step,
                losses[-1],
                losses[0],
                _CALMER,
            )
        if self._fails and (self._far >= _LONG or (last and self._far)):
            raise NonFinite(
                "the training diverged: its loss has risen far above its start",
                where=f"step {step}",
                found=f"{losses[-1]:.4g}",
                expected=f"about {losses[0]:.4g} or less",
                remedy=f"{_CALMER}; on_divergence: warn packs it nevertheless",
            )


_CALMER = "lower learning_rate or max_grad_norm, or raise warmup_steps"


def _far_above(loss: float) -> float:
    """Returns the limit above which a loss counts as far above ``loss``."""
    return 2 * loss + 2


def _mostly_above(losses: Sequence[float], limit: float) -> bool:
    """Whether enough of the losses are above the limit."""
    return bool(losses) and sum(loss > limit for loss in losses) >= _SHARE * len(losses)


class Steps(TrainerCallback, ExportableState):  # type: ignore[misc]
    """A callback that checks each step's loss, logs every ``logging_steps`` steps, and calls ``progress``
    after each.

    Its state is part of checkpoints, so a resumed run reports the same as an uninterrupted one. ``name``
    marks its log lines if several runs log.
    """

    def __init__(
        self,
        progress: Callable[[Step], None] | None = None,
        name: str = "",
        divergence: Divergence | None = None,
    ) -> None:
        self.progress = progress
        self.losses: list[float] = []
        self.name = name
        self._divergence = divergence or Divergence(fails=False)
        self._loss: Any = 0.0
        self._tokens: Any = 0
        self._counted = 0
        self._started = time.monotonic()
        self._first = 0

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint stores: the losses of all steps so far."""
        return {"args": {}, "attributes": {"losses": list(self.losses)}}

    def batch(self, loss: torch.Tensor, tokens: torch.Tensor | int) -> None:
        """Adds a batch to the current step."""
        self._loss, self._tokens = self._loss + loss, self._tokens + tokens

    def recent(self, steps: int) -> float:
        """Returns the mean loss of the last steps."""
        last = self.losses[-steps:]
        return sum(last) / len(last)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Starts the clock; a resumed run has some of its steps done already, or all."""
        control.should_training_stop |= state.global_step >= state.max_steps
        self._started = time.monotonic()
        self._first = state.global_step
        self.losses = list(
            (state.stateful_callbacks.get(type(self).__name__) or self.state())["attributes"]["losses"]
        )[: self._first]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Checks the loss and reports the step.

        Raises:
            NonFinite: the loss is NaN or infinite, as the parameters are by now; or it has run away.
        """
        loss = float(self._loss)
        self._counted += int(self._tokens) * args.world_size
        self._loss, self._tokens = 0.0, 0
        if not math.isfinite(loss):
            remedy = _CALMER + (", or train without bf16" if args.bf16 else "")
            raise NonFinite(
                "the training diverged: its loss is NaN or infinite",
                where=f"step {state.global_step}",
                found=loss,
                remedy=remedy,
            )
        self.losses.append(loss)
        self._divergence.see(self.losses, state.global_step, state.global_step >= state.max_steps)
        seconds = max(time.monotonic() - self._started, 1e-9)
        done = state.global_step - self._first
        step = Step(
            state.global_step,
            state.max_steps,
            self.recent(state.logging_steps),
            self._counted / seconds,
            seconds / done * (state.max_steps - state.global_step),
            self.name,
            state.log_history,
        )
        if self.progress is not None:
            self.progress(step)
        if state.is_world_process_zero and (
            state.global_step % state.logging_steps == 0 or state.global_step == state.max_steps
        ):
            log.info("%s", step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Logs one line for the rewards of the last steps, where a trainer measures some."""
        told = {key: value for key, value in (logs or {}).items() if key.startswith("reward")}
        if told and state.is_world_process_zero:
            values = ", ".join(f"{key} {value:.4g}" for key, value in told.items())
            log.info("%sstep %d: %s", f"{self.name}, " if self.name else "", state.global_step, values)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Logs one line for an evaluation."""
        if state.is_world_process_zero:
            log.info(
                "%sevaluated after step %d: %s",
                f"{self.name}, " if self.name else "",
                state.global_step,
                ", ".join(f"{key} {value:.4g}" for key, value in evaluation_scores(metrics or {}).items()),
            )


_POINTS = 64


def losses_of(losses: Sequence[float]) -> list[dict[str, float]]:
    """Returns the losses of all steps as at most 64 points: the mean loss of neighbouring steps, rounded to
    six digits, at the last of them.

    Example:
        >>> losses_of([2.0, 1.0])
        [{'step': 1, 'loss': 2.0}, {'step': 2, 'loss': 1.0}]
    """
    return [
        {"step": end, "loss": _six(math.fsum(losses[start:end]) / (end - start))}
        for start, end in stretches(len(losses), _POINTS)
    ]


def evaluations_of(log: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Returns at most 64 evaluations from a trainer's log: the step, and the metrics rounded to six digits.

    Example:
        >>> evaluations_of([{"loss": 1.0, "step": 1}, {"eval_loss": 0.5, "eval_runtime": 0.1, "step": 2}])
        [{'step': 2, 'loss': 0.5}]
    """
    found = {int(entry["step"]): scores for entry in reversed(log) if (scores := evaluation_scores(entry))}
    every = [
        {"step": step, **{name: _six(value) for name, value in found[step].items() if math.isfinite(value)}}
        for step in sorted(found)
    ]
    return [every[end - 1] for _, end in stretches(len(every), _POINTS)]


def _six(value: float) -> float:
    """Rounds to six significant digits."""
    return float(f"{value:.6g}")
