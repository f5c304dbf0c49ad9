"""Uses names in the graph to decide which of several equal tensors of a checkpoint an initializer is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence

from .graph_file import GraphFile

_SCOPES = ("pkg.torch.onnx.name_scopes", "pkg.onnxscript.name_scopes")
_HOPS = 4


def owners(graph: GraphFile, initializer: str, candidates: Sequence[str]) -> list[str]:
    """Returns the tensor names among ``candidates`` that fit the names in the graph best: one if the names
    decide, several if they do not.
    """
    names = [initializer]
    for node in graph.readers.get(initializer, ()):
        names.append(node.name)
        for entry in node.metadata_props:
            if entry.key in _SCOPES:
                names += _scopes(entry.value)
    texts = [components(text) for text in names if text]
    scores = {
        name: max((_common(components(name), text) for text in texts), default=0) for name in candidates
    }
    best = max(scores.values())
    return [name for name, score in scores.items() if score == best]


def nearest_to(graph: GraphFile, sources: Iterable[str], candidates: Sequence[str]) -> list[str]:
    """Returns the initializers among ``candidates`` that are the fewest nodes after ``sources``, as a bias is
    after its weight.
    """
    reached = dict.fromkeys(sources, 0)
    front = list(reached)
    wanted = set(candidates)
    for hop in range(_HOPS):
        nodes = [node for name in front for node in graph.readers.get(name, ())]
        nearest = sorted({name for node in nodes for name in node.input} & wanted)
        if nearest:
            return nearest
        front = [name for node in nodes for name in node.output if name not in reached]
        reached.update(dict.fromkeys(front, hop + 1))
    return []


def components(text: str) -> list[str]:
    """Splits a name at dots, slashes and the like, so that ``/model/layers.0/attn/q_proj/MatMul`` gives the
    parts of a module's path.

    Example:
        >>> components("/model/layers.0/q_proj/MatMul")
        ['model', 'layers', '0', 'q_proj', 'MatMul']
    """
    return [part for part in re.split(r"[./:\s]+", text) if part]


def _scopes(value: str) -> list[str]:
    try:
        scopes = ast.literal_eval(value) if len(value) < 4096 else []
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return [scope for scope in scopes if isinstance(scope, str)] if isinstance(scopes, list) else []


def _common(first: list[str], second: list[str]) -> int:
    """Returns the length of the longest common subsequence."""
    lengths = [0] * (len(second) + 1)
    for left in first:
        before = 0
        for place, right in enumerate(second, 1):
            before, lengths[place] = (
                lengths[place],
                before + 1 if left == right else max(lengths[place], lengths[place - 1]),
            )
    return lengths[-1]
