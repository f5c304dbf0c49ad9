"""Extracts a LoRA pack from a fine-tuned checkpoint and its base, both streamed from disk, and measures its
error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..adapter_methods import LAYOUTS, Arrays, Site
from ..adapter_methods.lora import lora
from ..base import Checkpoint, require_plain
from ..composing.arguments import chosen_name
from ..composing.result import as_lora, truncation
from ..errors import BaseMismatch, NonFinite, NothingToDo, Unsupported, require_among
from ..io import Ticker, in_order, refuse_existing
from ..lowrank import Cut, Factors, Loss
from ..manifest import manifest as m
from ..pack import Pack, build
from ..paths import StrPath
from ..tasks import TASKS, type_of
from ..tasks.data import problem_in
from .classify import ClassifiedTensors, NamedMatrix, classify
from .difference import TensorPair, WeightDifference
from .matrix import extract_matrix

RANK = 128
REST = ("keep", "leave", "refuse")


class SiteChange(NamedTuple):
    """The change that was extracted at one site."""

    matrix: NamedMatrix
    factors: Factors | None
    loss: Loss
    detected: int | None
    noise: float


def extract(
    tuned: StrPath,
    base: StrPath,
    *,
    rank: int | None = None,
    energy: float | None = None,
    modules: Sequence[str] | None = None,
    rest: str = "keep",
    name: str | None = None,
    out: StrPath | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pack:
    """Extracts a LoRA pack that turns the checkpoint ``base`` into ``tuned``, which was fine-tuned from it or
    holds a merged adapter.

    Both are streamed by file offset. At every linear layer that changed, the largest singular values of the
    difference are found by a random range finder (Halko, Martinsson and Tropp 2011). Where the spectrum ends
    in the rounding of the checkpoint's dtype, as that of a merged LoRA does, its rank is known and kept; else
    the ``energy``. The error is measured entry by entry on the factors as stored.

    Args:
        tuned: the fine-tuned checkpoint folder.
        base: the checkpoint folder that it began as.
        rank: the most that any site keeps, 128 by default.
        energy: the share of the squared singular values to keep; by default 0.99 where the change has no rank
            of its own.
        modules: the last parts of the paths of layers to take as factors; all linear layers but heads by
            default.
        rest: what becomes of other tensors that changed (embeddings, heads, norms, biases, new modules):
            ``keep`` holds their modules whole in the pack, ``leave`` leaves them as in the base and lists
            them, ``refuse`` is an error that names them.
        name: the pack's name; by default that of ``out`` or of the tuned folder.
        out: a new folder to write the pack to.
        progress: called with (bytes done, bytes in all), by one thread at a time.

    Returns:
        The pack: float32, scale 1. ``manifest.extensions["x_extract"]`` says what it came from: both
            checkpoints by digest, the
        relative errors, the ranks that were detected, what is kept whole, left out, or only rounding. Merged
        into ``base`` it gives ``tuned`` within that error and the rounding of the dtype.

    Raises:
        NothingToDo: nothing changed, or nothing but rounding.
        BaseMismatch: the checkpoints have no layer in common.
        SiteNotFound: ``modules`` names nothing.
        Unsupported: quantized weights, tied embeddings that changed, or under ``refuse`` any tensor that is
            not factors.
        NonFinite: a checkpoint holds NaN or infinity.

    Example:
        >>> pack = extract("models/tuned", "models/base", out="packs/tuned")  # doctest: +SKIP
        >>> pack.manifest.extensions["x_extract"]["truncation"]["total"]  # doctest: +SKIP
        0.0021
    """
    Cut(rank, energy)
    require_among("unknown way to treat tensors that are no matrices", rest, REST, where="rest")
    refuse_existing(out)
    new, old = Checkpoint(tuned), Checkpoint(base)
    pack_name = chosen_name(
        name or (None if out is not None else new.name.rpartition("/")[2]), out, "extract", []
    )
    for checkpoint in (new, old):
        require_plain(checkpoint)
    plan = classify(new, old, modules)
    if not plan.matrices and not any(plan.whole.values()):
        raise BaseMismatch(
            "the two checkpoints have no tensor in common",
            where=new.folder,
            expected=f"names as in {old.folder}",
            found=", ".join(list(new.tensors)[:3]),
            remedy="name the base that was fine-tuned",
        )
    ticker = Ticker(sum(info.nbytes for info in new.tensors.values()), progress)
    changes = _matrices(new, old, plan.matrices, rank or RANK, energy, ticker)
    changed = [name for name, base_name in plan.whole.items() if _differs(new, old, name, base_name, ticker)]
    kept, left_out = _other_tensors(new, plan, changed, rest)
    sites = [change for change in changes if change.factors is not None and change.matrix.name not in kept]
    if not sites and not kept:
        raise NothingToDo(
            "the checkpoints differ by nothing that a pack would hold",
            where=new.folder,
            found=f"{len(changes)} layers changed by rounding alone"
            if changes
            else "equal weights"
            if not left_out
            else f"changes that were left out: {', '.join(left_out[:3])}",
            remedy="give the fine-tuned checkpoint first and its base second"
            if not left_out
            else "extract with rest keep",
        )
    for checkpoint in (new, old):
        checkpoint.require_unchanged()
    task = _task(new)
    pack = build(
        pack_name,
        lora,
        {_site(new, change): as_lora(_layer_factors(change)) for change in sites},
        task=task,
        base=_base(old),
        full=_modules(new, kept),
        problem=None if task.labels is None else problem_in(new.config),
        weights={change.matrix.path: change.matrix.base_name for change in sites}
        | {n.rpartition(".")[0]: b for n, b in kept.items() if b is not None and n.endswith(".weight")},
        extensions={"x_extract": _provenance(new, old, changes, sites, kept, left_out, plan)},
    )
    return pack if out is None else pack.write(out)


def _matrices(
    new: Checkpoint,
    old: Checkpoint,
    matrices: Sequence[NamedMatrix],
    rank: int,
    energy: float | None,
    ticker: Ticker,
) -> list[SiteChange]:
    """Returns the changes of all matrices that differ, computed in threads, in the order of the
    checkpoint.
    """

    def change_of(matrix: NamedMatrix) -> SiteChange | None:
        pair = TensorPair(new, old, matrix.name, matrix.base_name)
        result = None
        if not pair.same():
            D = WeightDifference(pair)
            if not D.finite:
                raise NonFinite(
                    "the difference holds NaN or infinity",
                    where=matrix.name,
                    remedy="see which of the checkpoints holds it",
                )
            if D.total:
                result = SiteChange(
                    matrix,
                    *extract_matrix(
                        D,
                        total=D.total,
                        noise=D.noise,
                        rank=min(rank, *D.shape),
                        energy=energy,
                        unevenness=D.unevenness,
                    ),
                )
        ticker.add(new.tensors[matrix.name].nbytes)
        return result

    return [change for change in in_order(change_of, matrices) if change is not None]


def _differs(new: Checkpoint, old: Checkpoint, name: str, base_name: str | None, ticker: Ticker) -> bool:
    """Whether a tensor is new or has other values; compares tensors of different dtypes by value."""
    same = base_name is not None and (
        TensorPair(new, old, name, base_name).same() or _equal(new.read(name), old.read(base_name))
    )
    ticker.add(new.tensors[name].nbytes)
    return not same


def _equal(new: np.ndarray, old: np.ndarray) -> bool:
    """Whether two tensors are equal after rounding to the narrower of their dtypes: a cast alone is not a
    change.
    """
    if new.shape != old.shape:
        return False
    narrow = new.dtype if new.dtype.itemsize <= old.dtype.itemsize else old.dtype
    return all(
        np.array_equal(a.astype(narrow), b.astype(narrow))
        for a, b in zip(np.atleast_1d(new), np.atleast_1d(old), strict=True)
    )


def _other_tensors(
    new: Checkpoint, plan: ClassifiedTensors, changed: Sequence[str], rest: str
) -> tuple[dict[str, str | None], list[str]]:
    """Returns the tensors to store in full (tuned name -> base name), and those to leave as in the base.

    A pack stores all tensors of a module, so a layer whose bias changed is stored in full and is not a site.
    """
    if not changed or rest == "leave":
        return {}, list(changed)
    if rest == "refuse":
        raise Unsupported(
            f"{len(changed)} tensors changed that are not matrices of the chosen layers",
            where=new.folder,
            found=", ".join(changed[:5]) + (", ..." if len(changed) > 5 else ""),
            remedy="extract with rest keep, which holds them whole, or rest leave, which leaves them out",
        )
    base_names = {**plan.whole, **{matrix.name: matrix.base_name for matrix in plan.matrices}}
    owners = {name.rpartition(".")[0] for name in changed}
    kept = {name: base_name for name, base_name in base_names.items() if name.rpartition(".")[0] in owners}
    for name in changed:
        if not name.rpartition(".")[0]:
            raise Unsupported(
                "a changed tensor belongs to no module", where=name, remedy="extract with rest leave"
            )
        shape = new.tensors[name].shape
        if (
            new.config.get("tie_word_embeddings")
            and len(shape) == 2
            and shape[0] == new.config.get("vocab_size")
        ):
            raise Unsupported(
                "this tensor is the input embedding and the output head at once, and a pack cannot hold "
                "both whole",
                where=name,
                remedy="extract with rest leave, or untie the embeddings before",
            )
    return kept, []


def _modules(new: Checkpoint, kept: dict[str, str | None]) -> dict[str, Arrays]:
    modules: dict[str, Arrays] = {}
    for name in kept:
        path, _, param = name.rpartition(".")
        modules.setdefault(path, {})[param] = np.array(new.read(name))
    return modules


def _site(new: Checkpoint, change: SiteChange) -> Site:
    shape = new.tensors[change.matrix.name].shape
    matrix = change.matrix
    rows, columns = reversed(shape) if LAYOUTS[matrix.kind].turned else shape
    return Site(matrix.path, columns, rows, matrix.kind, bias=f"{matrix.path}.bias" in new.tensors)


def _layer_factors(change: SiteChange) -> Factors:
    """Returns the factors of the layer's matrix ``[out, in]``, computed from the stored matrix, which may be
    its transpose.
    """
    assert change.factors is not None
    A, B = change.factors
    return Factors(B.T, A.T) if LAYOUTS[change.matrix.kind].turned else Factors(A, B)


def _task(new: Checkpoint) -> m.PackTask:
    architecture = new.architecture
    task = type_of(architecture, new.config)
    labels = new.config.get("id2label") if task in TASKS and TASKS[task].labelled else None
    ordered = None
    if isinstance(labels, dict) and all(key.isdigit() for key in labels):
        ordered = tuple(str(labels[key]) for key in sorted(labels, key=int))
    return m.PackTask(task, architecture, ordered)


def _base(old: Checkpoint) -> m.Base:
    fingerprint = old.fingerprint()
    model_type = old.config.get("model_type")
    return m.Base(
        old.name,
        old.commit,
        model_type if isinstance(model_type, str) else None,
        fingerprint.structure,
        fingerprint.content,
        probe=fingerprint.probe,
    )


def _provenance(
    new: Checkpoint,
    old: Checkpoint,
    changes: Sequence[SiteChange],
    sites: Sequence[SiteChange],
    kept: dict[str, str | None],
    left_out: Sequence[str],
    plan: ClassifiedTensors,
) -> dict[str, Any]:
    noise = sum(site.noise for site in sites)
    total = sum(site.loss.total for site in sites)
    return {
        "tuned": {"name": new.name, "content": new.content},
        "base": {"name": old.name, "content": old.content},
        "truncation": truncation({site.matrix.path: site.loss for site in sites}),
        "rounding": float(np.sqrt(noise / total)) if total else 0.0,
        "detected": {site.matrix.path: site.detected for site in sites if site.detected is not None},
        "ranks": {site.matrix.path: site.factors.rank for site in sites if site.factors is not None},
        "kept_whole": sorted(kept),
        "left_out": list(left_out),
        "rounding_only": [change.matrix.path for change in changes if change.factors is None],
        "not_in_tuned": list(plan.absent),
    }
