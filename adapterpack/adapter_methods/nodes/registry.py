"""The kinds of nodes by name: the parser of trees, the catalogue and the tests read this."""

from __future__ import annotations

from ...registry import Registry
from .base import NodeKind

NODES: Registry[NodeKind] = Registry(
    "kind of node", NodeKind, "adapterpack.nodes", "adapterpack.adapter_methods.nodes"
)
"""Name -> the kind of node; a file of this folder registers those that it defines."""
