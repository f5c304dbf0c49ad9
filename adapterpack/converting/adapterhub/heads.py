"""Converts AdapterHub's prediction heads to fully trained modules, where transformers has the same model with
that head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ...errors import FormatError, Unsupported, excerpt
from ...manifest import manifest as m
from ...resources import table
from .settings import setting

_MOST_LABELS = 10_000


class AdapterHubHead(NamedTuple):
    """A head of AdapterHub's, as ``heads.toml`` lists it; ``pooled``: whether it reads the output of the
    model's pooler.
    """

    model: str
    kind: str
    layers: int
    task: str
    modules: tuple[str, ...]
    pooled: bool | None = None


_HEADS = table("converting/adapterhub/heads.toml", dict[str, list[AdapterHubHead]])["heads"]


class WholeHead(NamedTuple):
    """A head as a pack stores it: its modules by path, and the task with its labels."""

    modules: dict[str, dict[str, np.ndarray]]
    task: m.PackTask


def read(saved: Mapping[str, Any], tensors: Mapping[str, np.ndarray], where: str) -> WholeHead:
    """Reads the head in ``head_config.json`` and its tensors.

    Raises:
        Unsupported: no transformers model has such a head there.
        FormatError: the tensors do not fit the settings.
    """
    config, name, model = (
        setting(saved, key, kind, where)
        for key, kind in (("config", dict), ("name", str), ("model_type", str))
    )
    kind = setting(config, "head_type", str, where)
    layers = setting(config, "layers", int, where)
    head = next((head for head in _HEADS if head[:3] == (model, kind, layers)), None)
    pooled = config.get("use_pooler", False)
    plain = layers == 1 or config.get("activation_function") == "tanh"
    if head is None or head.pooled not in (None, pooled) or not plain:
        raise Unsupported(
            "no model of transformers has this head: it cannot be a module that was trained whole",
            where=where,
            expected="; ".join(f"{known.model}: {known.kind} of {known.layers}" for known in _HEADS),
            found=f"{model}: {kind} of {layers}, {config.get('activation_function')}, use_pooler {pooled}"[
                :200
            ],
            remedy="convert a copy of the folder without the files of the head",
        )
    left = dict(tensors)
    modules = {}
    for number, module in enumerate(head.modules):
        # AdapterHub's head repeats dropout, linear layer, activation
        place = f"heads.{name}.{3 * number + 1}"
        params = {
            leaf: left.pop(f"{place}.{leaf}") for leaf in ("weight", "bias") if f"{place}.{leaf}" in left
        }
        shapes = [value.shape for value in params.values()]
        if (
            "weight" not in params
            or len(shapes[0]) != 2
            or any(shape != shapes[0][:1] for shape in shapes[1:])
        ):
            raise FormatError(
                "the tensors of a head do not fit each other",
                where=where,
                expected=f"{place}.weight [out, in]",
                found={leaf: value.shape for leaf, value in params.items()},
            )
        modules[module.format(model)] = params
    if left:
        raise FormatError(
            "tensors that the head's settings do not account for",
            where=where,
            found=", ".join(sorted(left))[:200],
        )
    return WholeHead(
        modules,
        m.PackTask(head.task, labels=_labels(config, len(next(reversed(modules.values()))["weight"]), where)),
    )


def _labels(config: Mapping[str, Any], count: int, where: str) -> tuple[str, ...] | None:
    """Returns the labels in the order of their ids, if there is one for each output."""
    stated = config.get("label2id")
    if not isinstance(stated, dict) or not 0 < len(stated) == count <= _MOST_LABELS:
        return None
    by_number = {number: label for label, number in stated.items() if type(number) is int}
    if set(by_number) != set(range(count)) or not all(label and len(label) <= 200 for label in stated):
        raise FormatError(
            "the numbers of the labels are not 0, 1, 2 ...",
            where=f"{where}#/config/label2id",
            found=excerpt(stated),
        )
    return tuple(by_number[number] for number in range(count))
