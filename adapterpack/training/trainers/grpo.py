"""GRPO: reinforcement learning on the model's own answers, by TRL (Shao et al. 2024,
https://arxiv.org/abs/2402.03300).

The user's functions score several answers to each prompt, and those above their group's mean become more
likely; there is no reference model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError
from ...tasks.data import DataReport
from .kind import TRAINERS, TrainerKind
from .prompt_lengths import PromptLength, cut_before_answers


@dataclass(frozen=True)
class GRPO(PromptLength):
    """The settings of GRPO.

    ``num_generations``: the number of answers to each prompt. ``max_completion_length``: their most tokens.
    ``temperature``: of sampling. ``epsilon``: how far a step may change an answer's odds. ``loss_type`` and
    ``scale_rewards``: as in TRL.
    """

    num_generations: int = 8
    max_completion_length: int = 256
    temperature: float = 1.0
    epsilon: float = 0.2
    loss_type: str = "dapo"
    scale_rewards: str = "group"


def prompts(rows: Any, report: DataReport) -> Any:
    """Returns the rows unchanged: the functions that score answers receive all columns.

    Raises:
        ConfigError: the rows have no prompts.
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
        cut_prompts=cut_before_answers,
    )
)
