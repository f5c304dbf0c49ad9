"""Admission: the checks that a pack passes before an open bundle runs rows with it, whoever loads it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ..base import Verdict, compatibility
from ..bundle import has_other_tokenizer
from ..errors import FormatError, Unsupported
from ..manifest import Canary
from ..pack import Pack, Signers, canary, require_task, task_of
from ..tasks import NO_TASK
from .canary import NONE, Replay, foreign_inputs, of_graph, widen_canary
from .open_bundle import OpenBundle

log = logging.getLogger(__name__)
_FAILS = "the canary cannot be replayed"
_STRUCTURAL = "its base was accepted by names, dtypes and shapes alone, whatever the weights"


def require_outline(
    bundle: OpenBundle, pack: Pack, *, signers: Signers | None = None, allow_structural: bool = False
) -> Verdict:
    """Checks the signature of a pack, its base and its task, for which its outline is enough, and returns the
    verdict on the base.

    Raises:
        TrustError: ``signers`` are named, and none of them signed it.
        BaseMismatch: the pack belongs to another base, by its manifest; ``allow_structural`` accepts a base
            with the same names, dtypes and shapes.
        Unsupported: the pack is for another task.
    """
    if signers is not None:
        signers.require(pack)
    base = bundle.bundle.base
    verdict = pack.require_levels(
        compatibility.recorded_fingerprint(base),
        name=base.name,
        where=bundle.given,
        model_type=base.model_type,
        allow_structural=allow_structural,
    )
    # A bundle that was exported for another task than its packs' takes more of their kind.
    require_task(pack, bundle.task, {other.manifest.task.type for other in bundle.packs.values()})
    return verdict


def require_runnable(
    bundle: OpenBundle, pack: Pack, *, signers: Signers | None = None, allow_structural: bool = False
) -> str | None:
    """Makes the checks of :func:`require_outline` and returns what :func:`why_not_replayed` says.

    Raises:
        AdapterpackError: see :func:`require_outline` and :func:`why_not_replayed`.
    """
    verdict = require_outline(bundle, pack, signers=signers, allow_structural=allow_structural)
    return why_not_replayed(bundle, verdict, pack)


def why_not_replayed(bundle: OpenBundle, verdict: Verdict, pack: Pack) -> str | None:
    """Returns why the canary of a pack is not replayed on this bundle's graphs, given the ``verdict`` on the
    pack's base, or None if it is to be; :func:`require_canary` goes on from there.

    Raises:
        FormatError, Unsupported: the canary is malformed and cannot be replayed on any graph.
    """
    if has_other_tokenizer(bundle.bundle, pack.manifest):
        log.warning("'%s' was trained with another tokenizer.json than the bundle has", pack.name)
    return _flaw_of_canary(bundle, pack) or (_STRUCTURAL if verdict.name == "structural" else None)


def require_canary(
    bundle: OpenBundle, pack: Pack, not_replayed: str | None, replay: Callable[[], Replay]
) -> None:
    """Checks the canary of a pack, which ``replay`` runs. If it is ``not_replayed``, the log says why.

    Raises:
        BaseMismatch, NothingToDo, ParityError: see :func:`adapterpack.pack.canary.check`.
    """
    if not_replayed is None:
        recorded, without, with_adapter = replay()
        wide = widen_canary(bundle.bundle, recorded, by_engine=True)
        canary.check(wide, without, with_adapter, where=pack.name)
    else:
        level = logging.INFO if not_replayed == NONE else logging.WARNING
        log.log(level, "the canary of '%s' is not replayed: %s", pack.name, not_replayed)


def _flaw_of_canary(bundle: OpenBundle, pack: Pack) -> str | None:
    """Returns why the canary of a sound pack is not replayed on this bundle's graphs, or None if it is.

    Raises:
        FormatError, Unsupported: the canary itself cannot be replayed.
    """
    recorded = pack.manifest.canary
    if recorded is None:
        return NONE
    _require_replayable(bundle, pack, recorded)
    if bundle.bundle.quantization is not None:
        return "the graph is quantized, and it is not known by how much that moves its outputs"
    if pack.manifest.task.type != NO_TASK and task_of(pack) is not bundle.task:
        return f"it is for {pack.manifest.task.type}, and the bundle was exported for {bundle.task.name}"
    return next(of_graph(bundle.bundle, pack, recorded), None)


def _require_replayable(bundle: OpenBundle, pack: Pack, recorded: Canary) -> None:
    where = pack.where
    if problem := canary.flaw(recorded):
        raise FormatError(f"{_FAILS}: {problem}", where=where, remedy="pack the adapter again")
    if problem := next(foreign_inputs(bundle.bundle, recorded), None):
        raise Unsupported(
            f"{_FAILS}: {problem}",
            where=where,
            expected=", ".join(bundle.task.inputs),
            found=", ".join(sorted(canary.input_names(recorded))),
            remedy="use a bundle of the pack's own model",
        )
