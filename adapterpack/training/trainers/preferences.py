"""Trains on preferences by TRL: pairs of answers of which one is better, or answers labelled good or bad."""

from __future__ import annotations

from dataclasses import dataclass

from ...tasks.preferences.form import labelled_answers, pairs_of_answers
from .kind import TRAINERS, TrainerKind
from .prompt_lengths import PromptLength, cut_prompt_ids, cut_whole_rows


@dataclass(frozen=True)
class DPO(PromptLength):
    """The settings of direct preference optimization (Rafailov et al. 2023,
    https://arxiv.org/abs/2305.18290).

    ``beta``: how strongly the answers' odds are tied to the reference's. ``loss_type``: one or several of
    TRL's losses. ``label_smoothing``: the share of pairs that may be labelled the wrong way round.
    """

    beta: float = 0.1
    loss_type: tuple[str, ...] = ("sigmoid",)
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class KTO(PromptLength):
    """The settings of KTO, which learns from answers that are labelled good or bad one by one (Ethayarajh et
    al. 2024, https://arxiv.org/abs/2402.01306).

    ``beta``: how strongly the answers' odds are tied to the reference's. The weights are those of good and of
    bad answers.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True)
class ORPO(PromptLength):
    """The settings of odds-ratio preference optimization, which needs no reference model (Hong et al. 2024,
    https://arxiv.org/abs/2403.07691).

    ``beta``: the weight of the odds ratio, lambda in the paper.
    """

    beta: float = 0.1


@dataclass(frozen=True)
class CPO(PromptLength):
    """The settings of contrastive preference optimization, which needs no reference model (Xu et al. 2024,
    https://arxiv.org/abs/2401.08417), and of SimPO (Meng et al. 2024, https://arxiv.org/abs/2405.14734).

    ``beta``: the scale of the difference between the answers. ``loss_type``: one of TRL's losses; ``simpo``
    takes the mean over an answer's tokens, and wants a difference of ``simpo_gamma``. ``cpo_alpha``: the
    weight of the loss of the better answer, 0 for SimPO as in its paper. ``label_smoothing``: the share of
    pairs that may be labelled the wrong way round.
    """

    beta: float = 0.1
    loss_type: str = "sigmoid"
    cpo_alpha: float = 1.0
    simpo_gamma: float = 0.5
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Reward:
    """The settings of reward models: a score for each text, higher for the preferred one (Bradley and Terry
    1952).

    ``center_rewards_coefficient``: the weight of a penalty that keeps the mean score at zero; None for no
    penalty.
    """

    center_rewards_coefficient: float | None = None


for _kind in (
    TrainerKind(
        "dpo",
        "trl:DPOTrainer",
        "trl:DPOConfig",
        ("text-generation",),
        pairs_of_answers,
        DPO,
        {"learning_rate": 1e-5},
        reference=True,
        cut_prompts=cut_prompt_ids,
    ),
    TrainerKind(
        "kto",
        "trl:KTOTrainer",
        "trl:KTOConfig",
        ("text-generation",),
        labelled_answers,
        KTO,
        {"learning_rate": 1e-5},
        reference=True,
        cut_prompts=cut_prompt_ids,
        least_rows=2,  # each row's divergence is told by the answer of another
        compares=True,
    ),
    TrainerKind(
        "orpo",
        "trl.experimental.orpo:ORPOTrainer",
        "trl.experimental.orpo:ORPOConfig",
        ("text-generation",),
        pairs_of_answers,
        ORPO,
        {"learning_rate": 1e-5},
        cut_prompts=cut_whole_rows,
    ),
    TrainerKind(
        "cpo",
        "trl.experimental.cpo:CPOTrainer",
        "trl.experimental.cpo:CPOConfig",
        ("text-generation",),
        pairs_of_answers,
        CPO,
        {"learning_rate": 1e-5},
        cut_prompts=cut_whole_rows,
    ),
    TrainerKind(
        "reward",
        "trl:RewardTrainer",
        "trl:RewardConfig",
        ("text-classification",),
        pairs_of_answers,
        Reward,
        {"learning_rate": 1e-4},
        scores=True,
    ),
):
    TRAINERS.register(_kind)
