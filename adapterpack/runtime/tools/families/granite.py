"""Tool calls of Granite 3 and Phi 4 mini: ``<|tool_call|>`` and a list."""

from __future__ import annotations

from ..family import FAMILIES, ToolFamily

FAMILIES.register(
    ToolFamily(
        "granite",
        lambda template: "<|tool_call|>" in template,
        marker="<|tool_call|>",
        between=", ",
        listed=True,
    )
)
