"""Reports what a training would do without doing it: which layers it adapts, how many parameters it trains,
the memory and the time that it needs, and which tokens it learns.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from ..hub import folder_of
from ..io import Json
from ..paths import StrPath
from ..readable import seconds, size
from ..tasks import get_task
from ..tasks.data import IGNORED, Row
from ..torch_adapters import adapted_layers
from ..torch_adapters.layers import base_modules, saved_modules
from .config.fields import TrainConfig
from .data.load import token_count
from .loop.arguments import arguments_of
from .loop.build_trainer import own_forward, trainer_for
from .loop.extended_base import ExtendedBase, extended_base
from .loop.media import Media
from .loop.out_of_memory import in_batches_that_fit, memory_errors
from .loop.preparing import PreparedRun, prepare, reader_of
from .loop.rewards import Reward
from .loop.steps import Steps
from .pipeline import checked_configs

_SHOWN = 4
"""How many rows of the first batch are shown."""
_TIMED = 3
"""How many steps are timed."""
_OPTIMIZER = 4
"""Values in memory for each trained parameter with AdamW: the parameter, its gradient, and the running means
of the gradient and of its square.
"""
_ACTIVATIONS = 34
"""Bytes, at two per value, that a transformer layer keeps for each token and unit of width (Korthikanti et
al. 2022, https://arxiv.org/abs/2205.05198, equation 1, without the attention scores).
"""


def dry_run(
    config: StrPath | Mapping[str, Any] | TrainConfig,
    overrides: Iterable[str] = (),
    rewards: Sequence[Reward] = (),
    tool: str | None = None,
    suggest: bool = False,
) -> list[Json]:
    """Returns a report for each adapter, after reading the data, loading the model and attaching the fresh
    adapter.

    An existing output is not an error, because nothing is written.

    Raises:
        ConfigError, StorageError: as for :func:`adapterpack.train`.
    """
    return [_report(one, rewards) for one in checked_configs(config, overrides, rewards, tool, suggest)]


@in_batches_that_fit
def _report(config: TrainConfig, rewards: Sequence[Reward]) -> Json:
    """Returns the report of one adapter."""
    base = folder_of(config.model_name_or_path)
    task = get_task(config.task)
    reader = reader_of(task, config, base)
    extended = extended_base(config)
    ready = prepare(config, task, base, reader, *([] if extended is None else [extended.load]))
    adapted = adapted_layers(ready.model)
    trained = sum(value.numel() for value in ready.model.parameters() if value.requires_grad)
    owned = [value for _, module in base_modules(ready.model) for value in module.parameters(recurse=False)]
    rows = ready.rows.train
    # Some trainers encode rows themselves; their lengths can only be estimated here.
    encoded = ready.rows.collator is not None
    lengths = (
        [token_count(row) for row in rows] if encoded else [_length(row, reader, config) for row in rows]
    )
    batches = math.ceil(
        len(lengths) / (config.per_device_train_batch_size * config.gradient_accumulation_steps)
    )
    steps = config.max_steps if config.max_steps > 0 else math.ceil(batches * config.num_train_epochs)
    return {
        "name": config.pack_name,
        "output_dir": config.output_dir,
        "method": config.method,
        "sites": len(adapted),
        "sites_by_module": dict(Counter(module._site.path.rpartition(".")[2] for module in adapted)),
        "trained_whole": sorted(module._site.path for module in saved_modules(ready.model)),
        "trainable_parameters": trained,
        "base_parameters": sum(value.numel() for value in owned),
        "rows": len(lengths),
        "tokens": sum(lengths),
        "longest_row": max(lengths),
        **({} if extended is None else {"extended_base": _facts_of(extended)}),
        "steps": steps,
        "memory_estimate": {
            key: size(value) for key, value in _memory(config, ready, trained, owned, max(lengths)).items()
        },
        "first_batch": [
            _decode(row, reader) if encoded and isinstance(row.get("input_ids"), list) else _parts(row)
            for row in (
                rows[number] for number in range(min(_SHOWN, config.per_device_train_batch_size, len(rows)))
            )
        ],
        # Comes last, because it trains the model.
        "time_estimate": seconds(steps * _step_time(config, ready, reader, rewards)),
    }


def _facts_of(extended: ExtendedBase) -> Json:
    """Describes the base with more tokens that the training would write."""
    return {
        "folder": str(extended.folder),
        "tokens": list(extended.tokens),
        "rows": extended.rows,
        "written": size(extended.new_bytes),
    }


def _step_time(config: TrainConfig, ready: PreparedRun, reader: Any, rewards: Sequence[Reward]) -> float:
    """Trains a few steps, and returns the seconds that one takes."""
    ends = []
    timed = replace(
        config,
        max_steps=_TIMED + 1,
        save_strategy="no",
        eval_strategy="no",
        load_best_model_at_end=False,
        early_stopping_patience=None,
        report_to="none",
    )
    with TemporaryDirectory() as folder, memory_errors(config, again=True), own_forward(ready.model):
        trainer = trainer_for(
            timed,
            ready,
            arguments_of(timed, folder),
            reader,
            rewards,
            steps=Steps(lambda _: ends.append(time.monotonic()), name="timed"),
        )
        trainer.train()
    # The first step is slower than the others.
    return (ends[-1] - ends[0]) / _TIMED


def _memory(
    config: TrainConfig, ready: PreparedRun, trained: int, owned: Sequence[nn.Parameter], longest: int
) -> dict[str, int]:
    """Estimates the bytes that each part of a training step takes, for a batch of the longest rows."""
    text = ready.model.config.get_text_config()
    tokens = config.per_device_train_batch_size * longest
    wide = (
        2
        if config.bf16
        # the activations of a quantized layer are 16-bit
        else max((value.element_size() if value.is_floating_point() else 2 for value in owned), default=4)
    )
    width = getattr(text, "hidden_size", 0) or 0
    layers = getattr(text, "num_hidden_layers", 0) or 0
    # With gradient checkpointing, one layer at a time has its activations; the others keep only their input.
    kept = 1 if config.gradient_checkpointing else layers
    activations = _ACTIVATIONS * wide // 2 * tokens * width * kept + wide * tokens * width * (layers - kept)
    logits = (
        0
        if not isinstance(ready.rows.train[0].get("labels", []), list)
        else 3 * 4 * tokens * (getattr(text, "vocab_size", 0) or 0)
    )
    parts = {
        "base": sum(value.numel() * value.element_size() for value in owned),
        "adapter_and_optimizer": 4 * _OPTIMIZER * trained,
        "activations": activations,
        "logits": logits,
    }
    return {**parts, "sum": sum(parts.values())}


def _length(row: Row, tokenizer: Any, config: TrainConfig) -> int:
    """Estimates the tokens of a row that the trainer encodes itself, by those of its texts, cut to
    ``max_length``.
    """
    texts = (str(part["text"]) for part in _parts(row))
    return min(
        sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts), config.max_length
    )


def _parts(row: Row) -> list[Json]:
    """Returns a row that is not a single text, column by column."""
    return [
        {"text": f"{key}: {'...' if callable(value) else value} ", "learned": key == "labels"}
        for key, value in row.items()
        if value is not None
    ]


def _decode(row: Row, reader: Any) -> list[Json]:
    """Returns an encoded row as parts of text, each marked as learned or not; a label or answer for the row
    comes last.
    """
    decode = (reader.tokenizer if isinstance(reader, Media) else reader).decode
    ids = row["input_ids"]
    labels = row.get("labels")
    if isinstance(labels, list) and len(labels) == len(ids):
        parts = groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED)
        return [
            {"text": decode([token for token, _ in pairs]), "learned": learned} for learned, pairs in parts
        ]
    if labels is not None:
        answer = decode(labels) if isinstance(labels, list) else str(labels)
    elif "start_positions" in row:
        answer = decode(ids[row["start_positions"] : row["end_positions"] + 1])
    else:
        return [{"text": decode(ids), "learned": True}]
    return [{"text": decode(ids), "learned": False}, {"text": answer, "learned": True}]
