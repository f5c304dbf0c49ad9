"""The kinds of nodes that are known: the parser, the catalogue and the tests read this."""

from __future__ import annotations

from .arrow import arrow
from .base import NodeKind
from .gate import gate
from .stacked import stack
from .sums import parallel, weighted_sum

NODES: dict[str, NodeKind] = {kind.name: kind for kind in (arrow, gate, parallel, stack, weighted_sum)}
"""Name -> the kind of node."""
