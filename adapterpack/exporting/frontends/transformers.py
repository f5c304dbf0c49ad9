"""transformers.exporters (torch.export): exports every task, and any architecture that torch can trace."""

from __future__ import annotations

from importlib.metadata import version

from ...slots.prompt_rows import virtual_tokens
from ...tasks.task import MAIN
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
