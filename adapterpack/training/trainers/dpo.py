"""Direct preference optimization (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290), by TRL."""

from __future__ import annotations

from dataclasses import dataclass

from ...tasks.preferences.form import pairs_of_answers
from .kind import TRAINERS, TrainerKind


@dataclass(frozen=True)
class DPO:
    """The settings of DPO.

    ``beta``: how strongly the answers' odds are tied to the reference's. ``loss_type``: one or several of
    TRL's losses. ``label_smoothing``: the share of pairs that may be labelled the wrong way round.
    """

    beta: float = 0.1
    loss_type: tuple[str, ...] = ("sigmoid",)
    label_smoothing: float = 0.0


TRAINERS.register(
    TrainerKind(
        "dpo",
        "trl:DPOTrainer",
        "trl:DPOConfig",
        ("text-generation",),
        pairs_of_answers,
        DPO,
        {"learning_rate": 1e-5},
        reference=True,
    )
)
