"""The registry of node kinds by name; the parser of trees, the catalogue and the tests read it."""

from __future__ import annotations

from ...registry import Registry
from .base import NodeKind

NODES: Registry[NodeKind] = Registry(
    "kind of node", NodeKind, "adapterpack.nodes", "adapterpack.adapter_methods.nodes"
)
"""Name -> kind of node. Each file of this folder registers the kinds that it defines."""
