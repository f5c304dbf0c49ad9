"""Trains a reward model by TRL: a score for each text, higher for the preferred one (Bradley and Terry
1952).
"""

from __future__ import annotations

from dataclasses import dataclass

from ...tasks.preferences.form import pairs_of_answers
from .kind import TRAINERS, TrainerKind


@dataclass(frozen=True)
class Reward:
    """The settings of reward models.

    ``center_rewards_coefficient``: the weight of a penalty that keeps the mean score at zero; None for no
    penalty.
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
