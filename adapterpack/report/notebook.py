"""Shows results in notebooks: each as its page, in a frame that keeps the styles of both apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from markupsafe import Markup

from ..io import strict_json
from ..pack import Pack, describe
from .audit import audit_report
from .bench import bench_report
from .comparison import comparison_report
from .evaluation import evaluation_report
from .inspection import inspect_report
from .training import train_report

_FRAME = Markup(
    '<iframe srcdoc="{}" title="{}" sandbox="allow-same-origin" style="width:100%;height:30em;border:0" '
    "onload=\"this.style.height=Math.min(this.contentDocument.documentElement.scrollHeight,800)+'px'\">"
    "</iframe>"
)


def _pack_page(pack: Pack) -> str:
    """Returns the page of a pack: with the losses of its training, if it knows them."""
    facts = describe(pack, pack.path or "in memory")
    training = dict(pack.manifest.training)
    losses = [(point["step"], point["loss"]) for point in training.get("losses", ())]
    if not losses:
        return inspect_report(facts)
    return train_report([{**facts, "training": training}], {pack.name: losses})


def _validation_page(report: Mapping[str, Any]) -> str:
    """Returns the page of a validation's report: what was not checked, line by line."""
    left_open = "\n".join(report["not_checked"])
    return inspect_report(
        {"checked": report["kind"], **report, "kind": "validation", "not_checked": left_open}
    )


def _merge_page(report: Mapping[str, Any]) -> str:
    """Returns the page of a merge's report: its losses tensor by tensor in a table."""
    loss = dict(report["fold_loss"])
    tables = {"largest_losses": loss.pop("worst", []), "loss_of_each_tensor": loss.pop("tensors", [])}
    return inspect_report({**report, **tables, "kind": "merge", "path": report["out"], "fold_loss": loss})


_PAGES: Mapping[str, Callable[[Any], str]] = {
    "Audit": audit_report,
    "Bench": partial(bench_report, name="a bundle"),
    "Comparison": comparison_report,
    "Evaluated": evaluation_report,
    "GraphReport": _merge_page,
    "Inspection": inspect_report,
    "MergeReport": _merge_page,
    "Pack": _pack_page,
    "Report": _validation_page,
    "TrainConfig": lambda config: inspect_report({"kind": "config", **strict_json.plain(vars(config))}),
}
"""The class of a result -> what writes its page, from its JSON if it has any."""


def frame(result: Any) -> str:
    """Returns a result's page as an element of a notebook.

    Example:
        >>> from adapterpack.artifacts import Inspection
        >>> print(frame(Inspection(kind="pack", name="tickets", sites=4))[:31])
        <iframe srcdoc="&lt;!DOCTYPE ht
    """
    name = type(result).__name__
    return _FRAME.format(_PAGES[name](getattr(result, "to_json", lambda: result)()), name)
