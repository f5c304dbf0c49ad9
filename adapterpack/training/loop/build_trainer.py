"""Builds the trainer of a run, transformers' or another package's, extended by what adapters need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainingArguments

from ...chat_templates.template import ChatTemplate
from ...errors import Unsupported
from ..config.fields import TrainConfig
from ..trainers.kind import TRAINERS, TrainerKind
from .arguments import class_at, set_up_reporters
from .preparing import PreparedRun
from .reference_model import Reference
from .rewards import Reward
from .trainer import adapting


def trainer_for(
    config: TrainConfig,
    ready: PreparedRun,
    arguments: TrainingArguments,
    reader: Any,
    rewards: Sequence[Reward] = (),
    **options: Any,
) -> Any:
    """Returns the trainer that a configuration names for a prepared run; ``options`` are passed on to it.

    Raises:
        MissingExtra: its package is not installed.
        Unsupported: the trainer cannot use the base's tokenizer.
    """
    kind = TRAINERS[config.trainer]
    rows = ready.rows
    given = {
        "model": ready.model,
        "args": arguments,
        "train_dataset": rows.train,
        "eval_dataset": rows.evaluation,
        **options,
    }
    if rows.collator is not None:
        given |= {
            "data_collator": rows.collator,
            "compute_metrics": None if rows.metrics is None else partial(_compare, rows.metrics),
        }
    else:
        given |= {"processing_class": _padding(reader, kind)}
    if kind.reference:
        given["ref_model"] = Reference(ready.model, ready.reference)
    if kind.settings:
        given["settings"] = config.trainer_config or kind.config()
    if kind.rewards:
        given["reward_funcs"] = list(rewards)
    made = class_at(kind.trainer, kind)
    most = getattr(config.trainer_config, "max_prompt_length", None)
    if kind.cut_prompts is not None and most is not None:
        made = kind.cut_prompts(made, most)
    trainer = adapting(made)(**given)
    set_up_reporters(trainer)
    return trainer


@contextmanager
def own_forward(model: Any) -> Iterator[None]:
    """Restores a model's ``forward`` after the block: trainers replace it for their losses and for mixed
    precision.
    """
    before = model.__dict__.get("forward")
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)
        if before is not None:
            model.__dict__["forward"] = before


def _padding(tokenizer: Any, kind: TrainerKind) -> Any:
    """Returns the tokenizer with a padding token and a bounded chat template, for trainers that call it
    themselves.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise Unsupported(
            f"the trainer {kind.name} calls the tokenizer itself, and this one may take any time for a text",
            where="tokenizer",
            remedy="choose a base whose tokenizer has plainer rules",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return with_bounded_template(tokenizer)


def _compare(
    compare: Callable[[Any, Any], Mapping[str, float]], prediction: EvalPrediction
) -> dict[str, float]:
    """Computes metrics from a trainer's predictions."""
    return dict(compare(prediction.predictions, prediction.label_ids))


def with_bounded_template(tokenizer: Any) -> Any:
    """Replaces the tokenizer's ``apply_chat_template`` by one that first renders under limits of time, memory
    and length; returns the tokenizer.

    The templates that trainers bring themselves are limited, too.
    """
    tokenizer.apply_chat_template = partial(_apply, tokenizer)
    return tokenizer


def _apply(
    tokenizer: Any,
    conversation: Any,
    tools: Any = None,
    documents: Any = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = False,
    **options: Any,
) -> Any:
    """Returns what ``apply_chat_template`` of transformers returns.

    Raises:
        OutOfLimits: the template exceeds the limits of time or memory.
        FormatError: the template fails to render.
    """
    template = ChatTemplate(
        tokenizer.get_chat_template(chat_template, tools), "the tokenizer's chat template"
    )
    values = {
        **tokenizer.special_tokens_map,
        "tools": tools,
        "documents": documents,
        "add_generation_prompt": add_generation_prompt,
    }
    several = bool(conversation) and not isinstance(conversation[0], Mapping)
    for messages in conversation if several else [conversation]:
        template.render(messages, values)
    return type(tokenizer).apply_chat_template(
        tokenizer, conversation, tools, documents, chat_template, add_generation_prompt, **options
    )
