"""A reward model: a score for each text, higher for the preferred one (Bradley and Terry 1952), by TRL."""

from __future__ import annotations

from dataclasses import dataclass

from ...tasks.preferences.form import pairs_of_answers
from .kind import TRAINERS, TrainerKind


@dataclass(frozen=True)
class Reward:
    """``center_rewards_coefficient``: the weight of a penalty on scores whose mean is not zero; None for
    none.
    """

    center_rewards_coefficient: float | None = None


TRAINERS.register(
    TrainerKind(
        "reward",
        "trl:RewardTrainer",
        "trl:RewardConfig",
        ("text-classification",),
        pairs_of_answers,
        Reward,
        {"learning_rate": 1e-4},
        scores=True,
    )
)
