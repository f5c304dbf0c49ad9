"""Extends ``transformers.Trainer`` by what adapter methods add to training: penalties, learning rates, and
updates after each step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import RandomSampler, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...adapter_methods import Progress
from ...errors import Unsupported
from ...torch_adapters import evaluation_mode
from . import hooks, method_states
from .blockwise_loss import BlockwiseLoss, blockwise_loss
from .resuming import seal, written_checkpoints
from .schedules import own_schedule
from .steps import Steps


class AdapterTrainer(transformers.Trainer):  # type: ignore[misc]
    """The trainer of models with adapters; :class:`adapterpack.adapter_methods.Method` defines what a
    method's ``training`` adds.

    ``steps`` watches the loss and the speed of each step.
    """

    lr_scheduler: Any

    def __init__(self, *args: Any, steps: Steps | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(transformers.PrinterCallback)
        self.steps = steps or Steps()
        self.after = AfterStep()
        self._blockwise: BlockwiseLoss | None = None
        self._tried = self._asked = False
        self.model_accepts_loss_kwargs: bool  # as transformers reads it off the signature
        self.add_callback(self.after)
        self.add_callback(self.steps)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Runs an epoch, unless the resumed run had already ended."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Returns the schedule of the learning rate, which may be one of :mod:`.schedules`."""
        rate = own_schedule(self.args, num_training_steps)
        if self.lr_scheduler is None and rate is not None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, rate)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Runs a batch forward and backward; returns its share of the step's loss."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.steps.batch(self.accelerator.reduce(loss, "mean"), _tokens(inputs))
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Returns the loss, in training with the methods' penalties: once per step, over however many batches
        that is.
        """
        wanted = return_outputs and self.compute_metrics is not None
        with _own_loss(model), nullcontext() if wanted else self._without_logits(inputs):
            self._ask_what_the_loss_is_divided_by(model, inputs, num_items_in_batch)
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        loss, outputs = result if return_outputs else (result, None)
        more = hooks.context(self.model) if model.training and "labels" in inputs else None
        if more is not None:
            items = num_items_in_batch if self.model_accepts_loss_kwargs else None
            loss = hooks.with_context(
                loss, inputs["labels"], items, more, self.current_gradient_accumulation_steps
            )
        extra = hooks.penalty(self.model) if model.training else None
        if extra is not None:
            # If the model divides by the items of all batches of a step, the trainer does not divide by the
            # number of batches, so the penalty must be divided here.
            # None means that it depends on the model's parameters.
            scaled = self.loss_is_scaled_for_ga
            whole = (
                self.model_accepts_loss_kwargs and num_items_in_batch is not None
                if scaled is None
                else scaled
            )
            loss = loss + (extra / self.current_gradient_accumulation_steps if whole else extra)
        return (loss, outputs) if return_outputs else loss

    def _ask_what_the_loss_is_divided_by(self, model: Any, inputs: Any, items: Any) -> None:
        """Finds out once whether the model divides its loss by the given number of items.

        Most classifiers accept the number and ignore it: their loss is the mean of a batch, which the trainer
        would wrongly multiply by the processes and by the batches of a step. Doubling the number shows
        whether it has an effect.
        """
        plain = super().compute_loss
        if self._asked or items is None or not self.model_accepts_loss_kwargs or self._blockwise is not None:
            return
        self._asked = True
        # TRL's trainers scale their own losses.
        if plain.__func__ is not transformers.Trainer.compute_loss:
            return
        with torch.no_grad(), evaluation_mode(model):
            once, half = (
                plain(model, dict(inputs), num_items_in_batch=count) for count in (items, 2 * items)
            )
        self.model_accepts_loss_kwargs = not torch.allclose(once, half)

    @contextmanager
    def _without_logits(self, inputs: Any) -> Iterator[None]:
        """Makes the model compute its loss without logits inside the block, if it can."""
        if not self._tried:
            self._tried = True
            # With several GPUs, threads of one process share the head, so it must not be replaced.
            if self.args.n_gpu < 2:
                self._blockwise = blockwise_loss(self.model, inputs, self.args.label_smoothing_factor)
        if self._blockwise is None:
            yield
            return
        smoother = self.label_smoother  # type: ignore[has-type]
        # The blockwise loss smooths labels itself.
        self.label_smoother = None
        try:
            with self._blockwise.instead():
                yield
        finally:
            self.label_smoother = smoother

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Returns the optimizer, with the methods' multiples of the learning rate."""
        if self.optimizer is None:
            hooks.with_rates(super().create_optimizer(model), hooks.rates(self.model))
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Returns the sampler of rows.

        A sampler with its own generator is reseeded from seed and epoch, so that a resumed run gets the same
        order; random samplers are already handled by accelerate.
        """
        sampler = super()._get_train_sampler(train_dataset)
        own = hasattr(sampler, "generator") and not isinstance(sampler, RandomSampler)
        return _SeededByEpoch(sampler, self.args.seed) if own else sampler

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Writes and seals a checkpoint, or raises a named error if the disk is full."""
        with written_checkpoints(str(self.args.output_dir)):
            super()._save_checkpoint(*args, **kwargs)
            # Every process writes files of its own; seal when all are done.
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal(Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Writes the state of the optimizer and of the methods into a checkpoint."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            method_states.write(self.after.states, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads the state of the optimizer and of the methods from a checkpoint."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.after.states = method_states.read(Path(checkpoint))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes no card into the folder of checkpoints: the pack gets its own."""

    def _send_telemetry(self) -> None:
        """Sends nothing, whatever a library's trainer would send."""

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Does not warn that the base is missing from a checkpoint: checkpoints hold only the adapter."""


def adapting(trainer: type[Any]) -> type[Any]:
    """Returns a trainer class, derived from transformers', extended by :class:`AdapterTrainer`."""
    return (
        AdapterTrainer
        if issubclass(AdapterTrainer, trainer)
        else type(trainer.__name__, (AdapterTrainer, trainer), {})
    )


@contextmanager
def _own_loss(model: Any) -> Iterator[None]:
    """Says of a model that its class has no loss, if that is what transformers raises in the block."""
    try:
        yield
    except NotImplementedError as error:
        raise Unsupported(
            "the model has no loss, so it cannot be trained",
            found=type(model).__name__,
            remedy="choose a base whose class computes one",
        ) from error


def _tokens(inputs: Any) -> Tensor | int:
    """Returns the number of tokens in a batch, over all its parts; 0 if the trainer has yet to encode it."""
    if not isinstance(inputs, Mapping):
        return 0
    masks = [value.sum() for key, value in inputs.items() if key.endswith("attention_mask")]
    return (
        sum(masks)
        if masks
        else sum(value.numel() for key, value in inputs.items() if key.endswith("input_ids"))
    )


class _SeededByEpoch(Sampler[int]):
    """Wraps a sampler so that its order depends only on the seed and the epoch."""

    def __init__(self, sampler: Any, seed: int) -> None:
        self._sampler, self._seed = sampler, seed
        self.set_epoch(0)

    def __iter__(self) -> Iterator[int]:
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)

    def set_epoch(self, epoch: int) -> None:
        """Sets the order for that epoch."""
        self._sampler.generator = torch.Generator().manual_seed(self._seed + epoch)


class AfterStep(TrainerCallback):  # type: ignore[misc]
    """Lets methods change their parameters after each optimizer step."""

    def __init__(self) -> None:
        self.states: method_states.States = {}

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Lets the methods change the parameters that the step has updated."""
        self.states = hooks.after_step(model, Progress(state.global_step + 1, state.max_steps), self.states)
