"""A task's model on a base: what is trained, traced and compared with, without what training itself needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from ..errors import Unsupported
from ..tasks.task import Task


def load_model(task: Task, folder: Path, labels: list[str] | None = None, seed: int = 0, dtype: str = "float32") -> Any:
    """The task's model on a base, in ``dtype``; a new head, where there is one, is drawn from ``seed``."""
    return loaded(task, folder, labels, seed, dtype)[0]


def loaded(task: Task, folder: Path, labels: list[str] | None = None, seed: int = 0, dtype: str = "float32") -> tuple[Any, list[str]]:
    """The model, and the paths of the modules whose parameters the checkpoint does not hold."""
    kwargs: dict[str, Any] = {}
    if labels:
        kwargs = {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    torch.manual_seed(seed)
    if task.labelled:
        kwargs["ignore_mismatched_sizes"] = True  # a base that came with a head for other labels gets a new one
    with quiet_transformers():  # that a head is new is the point, not news
        auto_class = getattr(transformers, task.auto_class)
        model, report = auto_class.from_pretrained(folder, dtype=getattr(torch, dtype), output_loading_info=True, **kwargs)
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    new = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])} & sizes.keys()
    if 2 * sum(sizes[name] for name in new) > sum(sizes.values()):
        raise Unsupported("the checkpoint holds less than half of the task's model", where=folder, found=type(model).__name__,
                          expected=f"weights such as {min(new)}", remedy="name a base of that architecture")
    return model, sorted({name.rpartition(".")[0] for name in new})


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Neither notes nor progress bars of transformers inside; as it was afterwards."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
