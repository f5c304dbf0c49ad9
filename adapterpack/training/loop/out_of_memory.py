"""Makes batches smaller when a training runs out of memory, or suggests settings that save some."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from accelerate.utils.memory import clear_device_cache

from ...errors import AdapterpackError
from ...library_errors import is_out_of_memory
from ..config.fields import TrainConfig
from ..trainers.kind import TRAINERS

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)

BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size")
"""The settings that smaller batches change; the product of the first two stays."""


class SmallerBatches(Exception):
    """A training ran out of memory, and may fit with the given configuration: as many rows a step, in smaller
    batches.
    """


def in_batches_that_fit(
    run: Callable[Concatenate[TrainConfig, P], T],
) -> Callable[Concatenate[TrainConfig, P], T]:
    """Makes a function of a configuration begin again with smaller batches as long as it asks for them."""

    @wraps(run)
    def fit(config: TrainConfig, /, *args: P.args, **options: P.kwargs) -> T:
        while True:
            try:
                return run(config, *args, **options)
            except SmallerBatches as error:
                config = error.args[0]
            # The traceback, which holds the model, has gone by now.
            clear_device_cache(garbage_collection=True)
            log.warning(
                "the training does not fit into memory: it goes on with per_device_train_batch_size=%d and "
                "gradient_accumulation_steps=%d, which are as many rows a step",
                config.per_device_train_batch_size,
                config.gradient_accumulation_steps,
            )

    return fit


@contextmanager
def memory_errors(config: TrainConfig, again: bool = False) -> Iterator[None]:
    """Turns running out of memory inside the block into an error that suggests settings which save some, the
    cheapest first; with ``again`` it asks for smaller batches, where the configuration allows that.

    Raises:
        SmallerBatches: the batches can be smaller.
        AdapterpackError: they cannot.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        batch = config.per_device_train_batch_size
        if again and config.auto_find_batch_size and batch > 1:
            parts = next(parts for parts in range(2, batch + 1) if batch % parts == 0)
            evaluated = config.per_device_eval_batch_size
            raise SmallerBatches(
                replace(
                    config,
                    per_device_train_batch_size=batch // parts,
                    gradient_accumulation_steps=config.gradient_accumulation_steps * parts,
                    # The answers to one prompt stay together, where a trainer compares them.
                    per_device_eval_batch_size=evaluated
                    if TRAINERS[config.trainer].rewards
                    else max(evaluated // parts, 1),
                )
            ) from None
        ways = [
            f"gradient_accumulation_steps={2 * config.gradient_accumulation_steps} with "
            f"per_device_train_batch_size={batch // 2}"
            if batch > 1
            else None,
            None if config.gradient_checkpointing else "gradient_checkpointing=true",
            None if config.bf16 else "bf16=true",
            "dtype=bfloat16" if config.dtype == "float32" else None,
            f"max_length={max(config.max_length // 2, 1)}",
        ]
        raise AdapterpackError(
            "the training does not fit into memory",
            where=config.model_name_or_path,
            found=f"batches of {batch} rows of at most {config.max_length} tokens",
            remedy=f"try, in this order, {', '.join(filter(None, ways))}",
        ) from error
