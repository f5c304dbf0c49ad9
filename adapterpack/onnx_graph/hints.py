"""Whose an initializer is where several tensors of a checkpoint are equal: told by the names around it, never by content alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence

from .graph_file import GraphFile

_SCOPES = ("pkg.torch.onnx.name_scopes", "pkg.onnxscript.name_scopes")
_HOPS = 4


def texts(graph: GraphFile, initializer: str) -> list[list[str]]:
    """What the graph calls an initializer and the nodes that read it, each as its components."""
    found = [initializer]
    for use in graph.uses.get(initializer, ()):
        found.append(use.node.name)
        for entry in use.node.metadata_props:
            if entry.key in _SCOPES:
                found += _scopes(entry.value)
    return [components(text) for text in found if text]


def owners(graph: GraphFile, initializer: str, candidates: Sequence[str]) -> list[str]:
    """Those of ``candidates``, tensor names, that the graph's names fit best: one where they tell, all where they do not."""
    known = texts(graph, initializer)
    scores = {name: max((_common(components(name), text) for text in known), default=0) for name in candidates}
    best = max(scores.values())
    return [name for name, score in scores.items() if score == best]


def nearest_to(graph: GraphFile, sources: Iterable[str], candidates: Sequence[str]) -> list[str]:
    """Those of ``candidates``, initializers, that are read the fewest nodes after ``sources`` are: a bias after its weight."""
    reached = dict.fromkeys(sources, 0)
    front, wanted = list(reached), set(candidates)
    for hop in range(_HOPS):
        nodes = [use.node for name in front for use in graph.uses.get(name, ())]
        beside = sorted({name for node in nodes for name in node.input} & wanted)
        if beside:
            return beside
        front = [name for node in nodes for name in node.output if name not in reached]
        reached.update(dict.fromkeys(front, hop + 1))
    return []


def components(text: str) -> list[str]:
    """A name cut at dots, slashes and the like: ``/model/layers.0/attn/q_proj/MatMul`` has the parts of a module's path.

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


def _common(one: list[str], other: list[str]) -> int:
    """The length of the longest common subsequence."""
    lengths = [0] * (len(other) + 1)
    for mine in one:
        before = 0
        for place, theirs in enumerate(other, 1):
            before, lengths[place] = lengths[place], before + 1 if mine == theirs else max(lengths[place], lengths[place - 1])
    return lengths[-1]
