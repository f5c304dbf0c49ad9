"""Tool calls of Llama 3.1 and later: the answer is ``{"name": ..., "parameters": ...}``, or several of them
separated by semicolons.
"""

from __future__ import annotations

from ..family import FAMILIES, ToolFamily

FAMILIES.register(
    ToolFamily(
        "llama",
        lambda template: "<|start_header_id|>" in template and '"parameters": ' in template,
        others=("<|python_tag|>",),
        between="; ",
        arguments="parameters",
    )
)
