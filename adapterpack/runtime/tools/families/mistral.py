"""Tool calls of Mistral: ``[TOOL_CALLS]`` and a list; later models write ``[TOOL_CALLS]name[ARGS]{...}`` for
each call.
"""

from __future__ import annotations

from ..family import FAMILIES, ToolFamily

FAMILIES.register(
    ToolFamily(
        "mistral",
        lambda template: "[TOOL_CALLS]" in template and "[ARGS]" not in template,
        marker="[TOOL_CALLS]",
        opening=" ",
        between=", ",
        listed=True,
    )
)
FAMILIES.register(
    ToolFamily(
        "mistral-args",
        lambda template: "[TOOL_CALLS]" in template and "[ARGS]" in template,
        marker="[TOOL_CALLS]",
        named="[ARGS]",
    )
)
