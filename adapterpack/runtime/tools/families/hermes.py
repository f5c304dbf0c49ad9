"""Tool calls of Hermes, Qwen and many others: ``<tool_call>{"name": ..., "arguments": ...}</tool_call>`` for
each call.
"""

from __future__ import annotations

from ..family import FAMILIES, ToolFamily

_OTHERS = ("<function=", "<arg_key>", "<|tool_call")
"""Templates with these use the same tags around another notation."""

FAMILIES.register(
    ToolFamily(
        "hermes",
        lambda template: "<tool_call>" in template and not any(sign in template for sign in _OTHERS),
        marker="<tool_call>",
        opening="\n",
        closing="\n</tool_call>",
        between="\n",
    )
)
