"""Defines the settings of a training and the limits of their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from ...notebook import Shown

Settings = Mapping[str, Any]
"""Settings of a file or of a run, by name."""
Sources = str | Settings | tuple[Any, ...]
"""The types in which a configuration names data; see :class:`.sources.Source`."""

LEAST: dict[str, float] = {
    "eval_samples": 0,
    "max_length": 1,
    "learning_rate": 0,
    "num_train_epochs": 0,
    "max_steps": -1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0,
    "weight_decay": 0,
    "label_smoothing_factor": 0,
    "max_grad_norm": 0,
    "logging_steps": 0,
    "seed": 0,
    "max_train_samples": 1,
    "skip_train_samples": 0,
    "val_set_size": 0,
    "save_steps": 0,
    "save_total_limit": 1,
    "eval_steps": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "adam_epsilon": 0,
    "neftune_noise_alpha": 0,
    "early_stopping_patience": 1,
}
"""The smallest value of each number; the schema has the same limits."""

POSITIVE = frozenset({"learning_rate", "num_train_epochs", "logging_steps", "save_steps", "eval_steps"})
"""The numbers that must be more than zero; steps below one are a share of all."""

PARTS = frozenset({"method_config", "trainer_config", "origins"})
"""Fields that are not settings themselves: the two that contain settings, and the record of where they came
from.
"""

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
"""The names that a manifest allows for a pack; checked before training starts."""


@dataclass(frozen=True)
class TrainConfig(Shown):
    """All settings of one adapter's training.

    ``method_config`` holds the hyper-parameters of its method, ``trainer_config`` the settings of its trainer
    alone. ``adapter_name_or_path`` is a pack to continue training from.

    ``train_file`` and ``eval_file`` are a data file, a glob pattern, a folder, or a data set on the hub; or a
    mapping with one of these under ``path`` and further fields of :class:`.sources.Source`; or a list of
    these. ``problem_type`` is the kind of a classifier's labels, if their values do not show it. ``origins``
    says where the settings came from that are not the defaults here, None if they came from neither file nor
    mapping.
    """

    model_name_or_path: str
    train_file: Sources
    output_dir: str
    overwrite_output_dir: bool = False
    task: str = "text-generation"
    problem_type: (
        Literal["single_label_classification", "multi_label_classification", "regression"] | None
    ) = None
    trainer: str = "sft"
    name: str | None = None
    method: str = "lora"
    adapter_name_or_path: str | None = None
    eval_file: Sources | None = None
    val_set_size: float = 0.0
    on_bad_row: Literal["fail", "skip"] = "fail"
    on_divergence: Literal["fail", "warn"] = "fail"
    max_length: int = 512
    learning_rate: float = 2e-4
    num_train_epochs: float = 3.0
    max_steps: int = -1
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    auto_find_batch_size: bool = False
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: Mapping[str, Any] = field(default_factory=dict)
    warmup_steps: float = 0.0
    optim: str = "adamw_torch_fused"
    optim_args: str | None = None
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    label_smoothing_factor: float = 0.0
    max_grad_norm: float = 1.0
    neftune_noise_alpha: float | None = None
    logging_steps: int | float = 10
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    bf16: bool = False
    fp16: bool = False
    train_on_inputs: bool = False
    system_prompt: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    add_tokens: tuple[str, ...] = ()
    add_special_tokens: tuple[str, ...] = ()
    tokenizer: str | None = None
    shuffle: bool = True
    drop_duplicates: bool = False
    group_by_length: bool = False
    packing: bool | Literal["auto"] = False
    experts: bool = False
    allow_unused: bool = False
    peft_names: bool = False
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    gradient_checkpointing: bool = False
    max_train_samples: int | None = None
    skip_train_samples: int = 0
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    save_steps: int | float = 500
    save_total_limit: int = 2
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    eval_samples: int = 0
    eval_steps: int | float | None = None
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    early_stopping_patience: int | None = None
    report_to: str | tuple[str, ...] = "none"
    method_config: Any = None
    trainer_config: Any = None
    origins: Mapping[str, str] | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        return (
            f"<TrainConfig {self.pack_name}: {self.method} of {self.model_name_or_path}, {self.task}, "
            f"learning rate {self.learning_rate:g}>"
        )

    @property
    def given(self) -> frozenset[str] | None:
        """The settings that the configuration names, None if it came from neither file nor mapping: when a
        pack is trained further, it decides its method's other settings.
        """
        if self.origins is None:
            return None
        return frozenset(name for name, origin in self.origins.items() if not origin.endswith("default"))

    @property
    def own(self) -> tuple[Any, ...]:
        """The settings of the method and of the trainer; in a file they are on the same level as the
        run's.
        """
        return tuple(part for part in (self.method_config, self.trainer_config) if part is not None)

    @property
    def names_tokens(self) -> bool:
        """Whether tokens are named: special ones, or ones to add."""
        return bool(self.special_tokens or self.add_tokens or self.add_special_tokens)

    def on_base(self, folder: str) -> TrainConfig:
        """Returns the same training on another base, with that base's own tokenizer."""
        return replace(self, model_name_or_path=folder, tokenizer=None)

    @property
    def pack_name(self) -> str:
        """The pack's name: ``name``, or that of the output folder."""
        return self.name or Path(self.output_dir).name


def field_names(kind: type[Any]) -> list[str]:
    """Returns the names of a dataclass's fields, in order."""
    return [field.name for field in fields(kind)]


RUN = frozenset(field_names(TrainConfig)) - PARTS
"""The settings of a run, as opposed to those of its method or its trainer."""
