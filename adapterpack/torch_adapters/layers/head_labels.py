"""Writes the labels of the active adapter's head into the model's config, where pipelines look for them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...tasks.data.problems import MARKED
from .modules_to_save import HeadLabels, SavedModule

_KEPT = "_own_outputs"
"""The attribute of a model that keeps the labels and problem of its config while an adapter's replace
them.
"""


def labels_of(model: nn.Module, name: str) -> HeadLabels | None:
    """Returns the labels that came with an attached adapter's head, or None."""
    heads = (module for module in model.modules() if isinstance(module, SavedModule))
    return next((head._labels[name] for head in heads if head._labels.get(name) is not None), None)


def own_outputs(model: Any) -> tuple[dict[int, str], str | None]:
    """Returns the labels and the problem type of the model itself, whichever adapter is active."""
    config = model.config
    own: tuple[dict[int, str], str | None] = model.__dict__.get(_KEPT) or (
        config.id2label,
        getattr(config, "problem_type", None),
    )
    return own


def keep_outputs(model: Any) -> None:
    """Makes the labels that are now in the config the model's own, after an adapter's head has become the
    model's.
    """
    model.__dict__.pop(_KEPT, None)


def name_outputs(model: Any) -> None:
    """Writes the labels of the last active head that has labels into the model's config; without one,
    restores the model's own.
    """
    if not hasattr(getattr(model, "config", None), "id2label"):
        return
    heads = [module for module in model.modules() if isinstance(module, SavedModule)]
    active = [
        labels for head in heads for name in head._active[-1:] if (labels := head._labels[name]) is not None
    ]
    if not active and _KEPT not in model.__dict__:
        return
    own = own_outputs(model)
    if active:
        model.__dict__[_KEPT] = own
        names, problem = (
            dict(enumerate(active[0].names)),
            active[0].problem if active[0].problem in MARKED else None,
        )
    else:
        names, problem = own
        del model.__dict__[_KEPT]
    # Reset first: the config rejects some combinations of problem type and number of labels.
    model.config.problem_type = None
    model.config.id2label, model.config.label2id = (
        dict(names),
        {label: number for number, label in names.items()},
    )
    model.config.problem_type = problem
    # transformers reshapes logits by this attribute to compute a loss.
    if hasattr(model, "num_labels"):
        model.num_labels = len(names)
