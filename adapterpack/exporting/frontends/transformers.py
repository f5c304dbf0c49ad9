"""transformers.exporters (torch.export): exports every task, and any architecture that torch can trace; where
no step of a decoder goes on from what it keeps, as a graph whose steps read all tokens of a row again.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version

from ...slots import virtual_tokens
from ...tasks import MAIN, REREADS
from .base import FRONTENDS, BaseGraph, ExportSource, Frontend


def _build(source: ExportSource) -> BaseGraph:
    # torch and transformers, which only this frontend needs
    from ..tracing.trace import module_path, trace_model  # noqa: PLC0415

    prompted = source.task.reads_at_once and any(virtual_tokens(pack) for pack in source.packs)
    graphs = trace_model(source.task, source.folder, source.dtype, prompted)
    return BaseGraph(graphs.pop(MAIN), module_path, f"transformers {version('transformers')}", before=graphs)


transformers = FRONTENDS.register(
    Frontend("transformers", lambda source: source.file is None, _build, rank=90)
)


def _reread(source: ExportSource) -> BaseGraph:
    slow = "each step reads all tokens of a row again, since none can go on from what the model keeps"
    return _build(source)._replace(warnings=(slow,))


def _as_rereading(source: ExportSource) -> ExportSource:
    parts = tuple(replace(part, form=REREADS) for part in source.task.parts)
    return source._replace(task=replace(source.task, parts=parts))


def _is_reread(source: ExportSource) -> bool:
    """Whether it is a decoder alone, and no pack holds keys and values, of which none are kept here."""
    prompted = any(pack.method.kind == "prompt" for pack in source.packs)
    return source.file is None and not prompted and [part.form for part in source.task.parts] == ["decoder"]


rereading = FRONTENDS.register(Frontend("rereading", _is_reread, _reread, rank=95, takes=_as_rereading))
