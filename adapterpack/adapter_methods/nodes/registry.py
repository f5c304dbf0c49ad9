"""The kinds of nodes that are known: the parser, the catalogue and the tests read this."""

from __future__ import annotations

from .arrow import arrow
from .base import NodeKind
from .divided import batch_split, split
from .fuse import fuse
from .gate import gate
from .stacked import stack
from .sums import parallel, weighted_sum
from .xlora import xlora

NODES: dict[str, NodeKind] = {kind.name: kind for kind in (arrow, batch_split, fuse, gate, parallel, split, stack, weighted_sum, xlora)}
"""Name -> the kind of node."""
