"""Checks that packs can be combined: they share one base and one task, and their outputs mean the same."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from ..adapter_methods import Site
from ..base import compatibility
from ..errors import BaseMismatch, Unsupported
from ..manifest import manifest as m
from ..pack import Pack
from ..tasks import NO_TASK
from ..tasks.data import ONE

SIDE_BY_SIDE = "compose adapters of one task, or serve them side by side in a bank bundle"


def common_base(packs: Sequence[Pack]) -> m.Base:
    """Returns the base that all packs share, or the base that declares the bases of the others as its
    variants; it lists every variant that any pack declares.

    Raises:
        BaseMismatch: the packs share no base, or two packs name different model types; the message names two
            packs that disagree.
    """
    bases = [pack.manifest.base for pack in packs]
    fitting = [base for base in bases if all(compatibility.agrees(base, other) for other in bases)]
    types = dict.fromkeys(base.model_type for base in bases if base.model_type is not None)
    if not fitting or len(types) > 1:
        pairs = [
            (first, second)
            for first in packs
            for second in packs
            if not compatibility.agrees(first.manifest.base, second.manifest.base)
            or len({first.manifest.base.model_type, second.manifest.base.model_type} - {None}) > 1
        ]
        first, second = next(
            (pair for pair in pairs if _differ(*(pack.manifest.base for pack in pair))), pairs[0]
        )
        fields = ("structure", "content", "files", "probe", "model_type")
        field = next((field for field in fields if _both_differ(field, first, second)), "content")
        raise BaseMismatch(
            "the packs were made for different bases",
            where=f"{field} of '{first.name}' and '{second.name}'",
            expected=_describe(first.manifest.base, field),
            found=_describe(second.manifest.base, field),
            remedy="compose packs that were trained on one base, or declare one base a variant of the other "
            "(adapterpack declare)",
        )
    best = max(
        fitting,
        key=lambda base: (base.content is not None, base.structure is not None, base.name is not None),
    )
    declared = (variant for base in bases if base.content == best.content for variant in base.variants)
    return replace(best, variants=tuple(dict.fromkeys(declared)))


def _differ(first: m.Base, second: m.Base) -> bool:
    types = {first.model_type, second.model_type} - {None}
    return len(types) > 1 or not (compatibility.agrees(first, second) or compatibility.agrees(second, first))


def _both_differ(field: str, first: Pack, second: Pack) -> bool:
    values = getattr(first.manifest.base, field), getattr(second.manifest.base, field)
    return None not in values and values[0] != values[1]


def _describe(base: m.Base, field: str) -> str:
    return f"{base.name or 'an unnamed base'} ({getattr(base, field)[:17]})"


def require_same_site(first: tuple[str, Site], second: tuple[str, Site], what_for: str = "compose") -> None:
    """Checks that two packs, each by its name and its site at one path, adapt the same layer there.

    Raises:
        Unsupported: kinds, widths or kernels differ.
    """
    expected, found = (
        f"{site.kind} [{site.out_features}, {site.in_features}]"
        + (f" with kernel {site.kernel}" if site.kernel else "")
        for _, site in (first, second)
    )
    if expected != found:
        raise Unsupported(
            "two packs describe a site differently",
            where=f"{first[1].path} in '{first[0]}' and '{second[0]}'",
            expected=expected,
            found=found,
            remedy=f"{what_for} packs that were trained on one base",
        )


def common_task(packs: Sequence[Pack]) -> m.PackTask:
    """Returns the task of all packs, with its labels.

    Packs that contain a fully trained module, such as a head, must all have the same labels; other packs may
    leave the labels out.

    Raises:
        Unsupported: the tasks or the labels differ.
    """
    common = common_type(packs)
    whole = any(pack.manifest.full_groups for pack in packs)
    labelled = [
        (pack.name, pack.manifest.task.labels)
        for pack in packs
        if whole or pack.manifest.task.labels is not None
    ]
    for name, labels in labelled[1:]:
        if labels != labelled[0][1]:
            raise Unsupported(
                "the packs have different labels, so their outputs do not mean the same",
                where=f"'{labelled[0][0]}' and '{name}'",
                expected=list_labels(labelled[0][1]),
                found=list_labels(labels),
                remedy=f"{SIDE_BY_SIDE}; or say what becomes of modules trained whole: --whole union "
                "(whole='union'), or --whole pick:NAME",
            )
    return replace(common, labels=labelled[0][1] if labelled else None)


def common_problem(packs: Sequence[Pack]) -> str:
    """Returns the problem type that the packs' heads solve with their logits.

    Raises:
        Unsupported: the packs differ in it.
    """
    problems = {pack.manifest.problem: pack.name for pack in packs if pack.manifest.task.labels is not None}
    if len(problems) > 1:
        raise Unsupported(
            "the logits of the packs' heads are for different problems",
            where=", ".join(map(repr, problems.values())),
            found=", ".join(problems),
            remedy=f"{SIDE_BY_SIDE}; or keep one of the heads: --whole pick:NAME (whole='pick:NAME')",
        )
    return next(iter(problems), ONE.name)


def common_type(packs: Sequence[Pack]) -> m.PackTask:
    """Returns the task of all packs that name one; labels may differ.

    Raises:
        Unsupported: the tasks differ.
    """
    tasks = [pack.manifest.task for pack in packs]
    named = [(pack.name, task.type) for pack, task in zip(packs, tasks, strict=True) if task.type != NO_TASK]
    for name, type_ in named:
        if type_ != named[0][1]:
            raise Unsupported(
                "the packs are for different tasks",
                where=f"'{named[0][0]}' and '{name}'",
                expected=named[0][1],
                found=type_,
                remedy=SIDE_BY_SIDE,
            )
    architecture = next((task.architecture for task in tasks if task.architecture is not None), None)
    return m.PackTask(named[0][1] if named else NO_TASK, architecture, None)


def list_labels(labels: tuple[str, ...] | None) -> str:
    """Formats labels for an error message."""
    return (
        "no labels"
        if labels is None
        else ", ".join(labels[:8]) + (f" and {len(labels) - 8} more" if len(labels) > 8 else "")
    )
