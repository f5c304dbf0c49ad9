"""Suggests settings that save memory when a training runs out of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...errors import AdapterpackError
from ..config.fields import TrainConfig

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory")
"""Parts of torch's messages on devices that raise no error class of their own."""


@contextmanager
def memory_errors(config: TrainConfig) -> Iterator[None]:
    """Turns running out of memory inside the block into an error that suggests settings which save some, the
    cheapest first.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(
            sign in str(error) for sign in _SIGNS
        ):
            raise
        batch = config.per_device_train_batch_size
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
