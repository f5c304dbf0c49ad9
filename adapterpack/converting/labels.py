"""Names the labels of a head, which PEFT's folders cannot store."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from ..errors import ConfigError, Unsupported
from ..pack import Pack, descend, seal
from ..tasks import TASKS

LONGEST = 200
"""The most characters of a label."""


def name_labels(pack: Pack, labels: Sequence[str], *, child: bool) -> Pack:
    """Returns the pack with names for its labels, in the order of its logits; ``child``: records the pack as
    the parent of the result.

    Raises:
        Unsupported: the pack has no head with labels.
        ConfigError: the number of labels is not that of the head's logits, or labels are not distinct.
    """
    width = _width(pack)
    if not width:
        raise Unsupported(
            "only a classifier with a head of its own has labels to name",
            where=pack.where,
            found=(
                f"the task {pack.manifest.task.type}, {'another' if list(pack.full()) else 'no'} module "
                "trained whole"
            ),
            remedy="leave --labels (labels=) out",
        )
    if (
        len(labels) != width
        or len(set(labels)) != width
        or not all(0 < len(label) <= LONGEST for label in labels)
    ):
        raise ConfigError(
            "the labels do not fit the head",
            where=pack.where,
            found=", ".join(map(repr, labels)),
            expected=f"{width} different ones of 1 to {LONGEST} characters",
            remedy="name one for each logit, in the order of the label ids of the training",
        )
    task = replace(pack.manifest.task, labels=tuple(labels))
    lineage = descend("convert", [pack], {"labels": "named"}) if child else pack.manifest.lineage
    return seal(replace(pack.manifest, task=task, lineage=lineage, files=()), pack.tensors, pack.extra)


def unnamed_note(pack: Pack) -> tuple[str, ...]:
    """Returns a note if the pack has a head whose labels have no names."""
    width = 0 if pack.manifest.task.labels else _width(pack)
    return (
        (
            f"nothing names the {width} labels of its head: they will be called LABEL_0 to "
            f"LABEL_{width - 1}, or as --labels names them",
        )
        if width
        else ()
    )


def _width(pack: Pack) -> int:
    """Returns the number of labels of a pack's head; 0 if it has no head with labels."""
    task = TASKS.find(pack.manifest.task.type)
    if task is None or not task.labelled:
        return 0
    heads = [
        params
        for path, params in pack.full().items()
        if not task.heads or set(task.heads) & set(path.split("."))
    ]
    return len(next(iter(heads[-1].values()))) if heads else 0
