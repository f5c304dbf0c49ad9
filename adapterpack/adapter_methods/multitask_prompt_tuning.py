"""Multitask prompt tuning: a prompt that all tasks share, multiplied by a low-rank matrix of each task (Wang
et al. 2023, arXiv 2303.02861, section 3.2).

    P_t = P * (u_t v_t),   P [n, in],   u [tasks, n, r],   v [tasks, r, in]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from . import (
    METHODS,
    Arrays,
    Method,
    NonNegativeInt,
    PositiveInt,
    PromptForm,
    Random,
    Shapes,
    Site,
    Storage,
    normal,
)
from .forms.prompt import STORED, embedding_fields, peft_form, traits
from .prompt_tuning import PEFT_INIT, PromptTuning, start

_COLS, _ROWS = "prefix_task_cols", "prefix_task_rows"


@dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuning(PromptTuning):
    """``default_task`` is the one that holds where a call gives no ``task_ids`` [batch].

    Example:
        >>> MultitaskPromptTuning(num_virtual_tokens=8, num_tasks=3, default_task=2).num_ranks
        1
    """

    num_tasks: PositiveInt = 1
    num_ranks: PositiveInt = 1
    default_task: NonNegativeInt = 0

    task_field: ClassVar[str] = "default_task"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.default_task >= self.num_tasks:
            raise ValueError(
                f"task {self.default_task} is none of {self.num_tasks}, which are counted from 0"
            )


def _shapes(cfg: MultitaskPromptTuning, site: Site) -> Shapes:
    return {
        STORED: (cfg.num_virtual_tokens, site.in_features),
        _COLS: (cfg.num_tasks, cfg.num_virtual_tokens, cfg.num_ranks),
        _ROWS: (cfg.num_tasks, cfg.num_ranks, site.in_features),
    }


def _init(cfg: MultitaskPromptTuning, site: Site, rng: Random) -> Arrays:
    shapes = _shapes(cfg, site)
    small = {name: normal(rng, shapes[name]) for name in (_COLS, _ROWS)}  # PEFT's
    return {STORED: start(cfg, site, rng), **small}


multitask_prompt_tuning = METHODS.register(
    Method(
        name="multitask_prompt_tuning",
        summary="a prompt that tasks share, times a low-rank matrix of each task",
        paper="https://arxiv.org/abs/2303.02861",
        formula="P_t = P * (u_t v_t) before the first token",
        kind="prompt",
        config=MultitaskPromptTuning,
        traits=traits(),
        shapes=_shapes,
        init=_init,
        normal_form=lambda cfg, params, site: PromptForm(
            embeds=params[STORED] * (params[_COLS] @ params[_ROWS]), task=cfg.default_task
        ),
        examples=(
            MultitaskPromptTuning(num_virtual_tokens=3),
            MultitaskPromptTuning(num_virtual_tokens=2, num_tasks=3, num_ranks=2),
        ),
        storage=Storage(
            expanded_size=lambda cfg, site: cfg.num_tasks * cfg.num_virtual_tokens * site.in_features
        ),
        peft=peft_form(
            "MULTITASK_PROMPT_TUNING",
            lambda cfg: {
                **PEFT_INIT,
                "prompt_tuning_init_state_dict_path": None,
                "prompt_tuning_init_task": 0,
                "num_ranks": cfg.num_ranks,
                "num_tasks": cfg.num_tasks,
            },
            lambda config: MultitaskPromptTuning(
                **embedding_fields(config),
                num_ranks=config.get("num_ranks", 1),
                num_tasks=config.get("num_tasks", 1),
            ),
            (STORED, _COLS, _ROWS),
        ),
    )
)
