"""Supervised fine-tuning: each row contains what the model should learn, and the task defines where."""

from __future__ import annotations

from .kind import TRAINERS, TrainerKind

TRAINERS.register(TrainerKind("sft", "transformers:Trainer", "transformers:TrainingArguments"))
