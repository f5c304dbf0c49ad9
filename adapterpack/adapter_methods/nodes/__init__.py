"""The kinds of nodes in composition trees (sum, stack, gate, arrow ...), one small file each, registered in a
table.
"""

from .base import Leaf, Node, NodeKind, NodeSettings, Tree
from .registry import NODES
from .tree import as_text, decode, encode, get_kind, leaves, node, nodes, shares, traits

__all__ = [
    "NODES", "Leaf", "Node", "NodeKind", "NodeSettings", "Tree", "as_text", "decode", "encode",
    "get_kind", "leaves", "node", "nodes", "shares", "traits",
]  # fmt: skip
