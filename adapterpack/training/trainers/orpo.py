"""Odds-ratio preference optimization by TRL, which needs no reference model (Hong et al. 2024,
https://arxiv.org/abs/2403.07691).
"""

from __future__ import annotations

from dataclasses import dataclass

from ...tasks.preferences.form import pairs_of_answers
from .kind import TRAINERS, TrainerKind


@dataclass(frozen=True)
class ORPO:
    """The settings of ORPO.

    ``beta``: the weight of the odds ratio, lambda in the paper.
    """

    beta: float = 0.1


TRAINERS.register(
    TrainerKind(
        "orpo",
        "trl.experimental.orpo:ORPOTrainer",
        "trl.experimental.orpo:ORPOConfig",
        ("text-generation",),
        pairs_of_answers,
        ORPO,
        {"learning_rate": 1e-5},
    )
)
