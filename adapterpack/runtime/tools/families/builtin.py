"""The notations of tool calls of widely used models."""

from __future__ import annotations

from ..family import FAMILIES, ToolFamily

_OTHER_NOTATIONS = ("<function=", "<arg_key>", "<|tool_call")
"""Templates with these use the tags of ``hermes`` around another notation."""

FAMILIES.register(
    ToolFamily(  # Granite 3 and Phi 4 mini: a list
        "granite",
        lambda template: "<|tool_call|>" in template,
        marker="<|tool_call|>",
        between=", ",
        listed=True,
    )
)
FAMILIES.register(
    ToolFamily(  # Hermes, Qwen and many others
        "hermes",
        lambda template: "<tool_call>" in template and not any(sign in template for sign in _OTHER_NOTATIONS),
        marker="<tool_call>",
        opening="\n",
        closing="\n</tool_call>",
        between="\n",
    )
)
FAMILIES.register(
    ToolFamily(  # Llama 3.1 and later: the answer is an object, or several of them separated by semicolons
        "llama",
        lambda template: "<|start_header_id|>" in template and '"parameters": ' in template,
        others=("<|python_tag|>",),
        between="; ",
        arguments="parameters",
    )
)
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
    ToolFamily(  # later models of Mistral: [TOOL_CALLS]name[ARGS]{...} for each call
        "mistral-args",
        lambda template: "[TOOL_CALLS]" in template and "[ARGS]" in template,
        marker="[TOOL_CALLS]",
        named="[ARGS]",
    )
)
