"""KTO: learns from answers that are labelled good or bad one by one, by TRL (Ethayarajh et al. 2024,
https://arxiv.org/abs/2402.01306).
"""

from __future__ import annotations

from dataclasses import dataclass

from ...tasks.preferences.form import labelled_answers
from .kind import TRAINERS, TrainerKind


@dataclass(frozen=True)
class KTO:
    """The settings of KTO.

    ``beta``: how strongly the answers' odds are tied to the reference's. The weights are those of good and of
    bad answers.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


TRAINERS.register(
    TrainerKind(
        "kto",
        "trl:KTOTrainer",
        "trl:KTOConfig",
        ("text-generation",),
        labelled_answers,
        KTO,
        {"learning_rate": 1e-5},
        reference=True,
    )
)
