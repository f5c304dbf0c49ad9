"""Supervised training: each row holds what is to be learned, and the task says where."""

from __future__ import annotations

from .kind import TRAINERS, TrainerKind

TRAINERS.register(TrainerKind("sft", "transformers:Trainer", "transformers:TrainingArguments"))
