"""Chooses the sites of a bundle that is exported without packs: the layers that training adapts by
default.
"""

from __future__ import annotations

from pathlib import Path

from ..adapter_methods import get
from ..adapter_methods.lora import LoRA
from ..tasks.task import Task
from ..torch_adapters.loading import empty_model
from ..torch_adapters.sites import select


def default_sites(task: Task, base: Path) -> frozenset[str]:
    """The paths of the layers that ``targets="all-linear"`` names in the task's model: every linear layer
    except the output embedding and the task's heads, which are trained whole. The model is built without its
    weights.
    """
    model = empty_model(base, task)
    heads = tuple(head for head in task.heads if hasattr(model, head))
    return frozenset(site.path for site in select(model, LoRA().targets, get("lora").traits, heads))
