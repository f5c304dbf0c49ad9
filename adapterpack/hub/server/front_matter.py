"""Checks the YAML at the head of a README, which strangers write, in time that grows with its length alone."""

from __future__ import annotations

from typing import Any

import yaml

_LONGEST = 256 << 10
_DEEPEST = 32
_SHOWN = 200
_MOST_NODES = 100_000
"""Nodes with every alias in full: what a reader of the result walks through."""


def problem(text: str) -> str | None:
    """What is wrong with the header; None for a mapping.

    Example:
        >>> problem("license: mit"), problem("- mit")
        (None, 'the header is no mapping')
    """
    if len(text) > _LONGEST:
        return f"the header is longer than {_LONGEST} characters"
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        if too_much := _too_much(yaml.parse(text, Loader=loader)):
            return too_much
        value = yaml.load(text, Loader=loader)
    except Exception as error:  # dates, numbers and tags have errors of their own
        return f"the header is not YAML: {' '.join(str(error).split())[:_SHOWN]}"
    return None if isinstance(value, dict) else "the header is no mapping"


def _too_much(events: Any) -> str | None:
    """Counts levels and nodes before anything is made of them, each alias as often as it stands for a node."""
    sizes: dict[str | None, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    total = 0
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, total))
            if len(open_nodes) > _DEEPEST:
                return f"the header is nested more than {_DEEPEST} levels deep"
        if isinstance(event, yaml.NodeEvent):
            total += sizes.get(event.anchor, 0) if isinstance(event, yaml.AliasEvent) else 1
        if isinstance(event, yaml.ScalarEvent) and event.anchor:
            sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = total - before
        if total > _MOST_NODES:
            return f"the header stands for more than {_MOST_NODES} values, through its aliases"
    return None
