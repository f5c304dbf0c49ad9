"""Answers that the model makes itself are scored by functions of the user's, and better ones than their
group's mean become likelier (Shao et al. 2024, https://arxiv.org/abs/2402.03300), by TRL: no reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError
from ...tasks.data.report import DataReport
from .kind import TRAINERS, TrainerKind


@dataclass(frozen=True)
class GRPO:
    """``num_generations``: answers to one prompt. ``max_completion_length``: their most tokens.
    ``temperature``: of their sampling. ``epsilon``: how far a step may change an answer's odds. ``loss_type``
    and ``scale_rewards``: as TRL calls them.
    """

    num_generations: int = 8
    max_completion_length: int = 256
    temperature: float = 1.0
    epsilon: float = 0.2
    loss_type: str = "dapo"
    scale_rewards: str = "group"


def prompts(rows: Any, report: DataReport) -> Any:
    """The rows as they are: the functions that score answers get all their columns.

    Raises:
        ConfigError: they have no prompts.
    """
    if "prompt" not in rows.column_names:
        raise ConfigError(
            "answers need a prompt",
            where=report,
            expected="a column prompt",
            found=", ".join(rows.column_names),
        )
    report.read_as("prompt", (), ())
    return rows


TRAINERS.register(
    TrainerKind(
        "grpo",
        "trl:GRPOTrainer",
        "trl:GRPOConfig",
        ("text-generation",),
        prompts,
        GRPO,
        {"learning_rate": 1e-5},
        rewards=True,
    )
)
