"""Extends ``transformers.Trainer`` by what methods add to a training: penalties, learning rates, updates after each step."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapter_methods import Progress
from . import hooks


class AdapterTrainer(transformers.Trainer):  # type: ignore[misc]
    """The trainer of models with adapters; see :class:`adapterpack.adapter_methods.Method` for ``training``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(AfterStep())

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        """The loss, and in training the penalties: once a step, however many batches a step has."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch, **kwargs)
        more = hooks.context(self.model) if model.training else None
        if more is not None:
            items = num_items_in_batch if self.model_accepts_loss_kwargs else None
            loss = hooks.with_context(loss, inputs["labels"], items, more, self.current_gradient_accumulation_steps)
        extra = hooks.penalty(self.model) if model.training else None
        if extra is not None:
            # Where the model divides by the items of all batches of a step, the trainer does not divide by their number.
            whole = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            loss = loss + (extra / self.current_gradient_accumulation_steps if whole else extra)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer, with the methods' own multiples of the learning rate."""
        if self.optimizer is None:
            hooks.with_rates(super().create_optimizer(model), hooks.rates(self.model))
        return self.optimizer


class AfterStep(TrainerCallback):  # type: ignore[misc]
    """Lets methods change their parameters after each optimizer step."""

    def __init__(self) -> None:
        self.states: dict[tuple[str, str], Any] = {}

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """See :func:`adapterpack.training.hooks.after_step`."""
        self.states = hooks.after_step(model, Progress(state.global_step + 1, state.max_steps), self.states)
