"""Classifies the tensors of a fine-tuned checkpoint by name, shape and configuration: which become factors,
and which are kept as full tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..base import Checkpoint, has_transposed
from ..errors import SiteNotFound, nearest
from ..io import FLOATS

_EMBEDDINGS = frozenset({"wte", "wpe", "shared", "relative_attention_bias"})
_HEADS = frozenset({"lm_head", "score", "classifier", "qa_outputs", "embed_out"})


class NamedMatrix(NamedTuple):
    """A matrix that can become factors: its module path, the kind of the layer, its tensor name, and its name
    in the base.
    """

    path: str
    kind: str
    name: str
    base_name: str


class ClassifiedTensors(NamedTuple):
    """The tensors of a fine-tuned checkpoint: ``matrices`` can become factors; ``whole`` (tuned name -> base
    name or None) are stored in full if they changed; ``absent`` are tensors of the base that the tuned
    checkpoint lacks.
    """

    matrices: tuple[NamedMatrix, ...]
    whole: dict[str, str | None]
    absent: tuple[str, ...]


def classify(tuned: Checkpoint, base: Checkpoint, modules: Sequence[str] | None = None) -> ClassifiedTensors:
    """Classifies the tensors of ``tuned`` by those of ``base``; a task model's names may have one prefix more
    or less.

    Matrices of linear layers become factors, if ``modules`` (the last parts of their paths) is None or names
    them; embeddings and heads only if they are named. All other tensors, and tensors whose shape changed, are
    stored in full or left out.

    Raises:
        SiteNotFound: no layer matches ``modules``.
    """
    matrices = []
    whole = {}
    used = set()
    named = set()
    for name, info in tuned.tensors.items():
        base_name = base.tensor_name(name)
        if base_name is not None:
            used.add(base_name)
        path = name.removesuffix(".weight")
        matching = [module for module in modules or () if path == module or path.endswith(f".{module}")]
        named.update(matching)
        kind = _kind(tuned, name)
        fits = base_name is not None and base.tensors[base_name].shape == info.shape and info.dtype in FLOATS
        wanted = (
            bool(matching)
            if modules is not None
            else kind in {"linear", "transposed"} and not is_head(tuned, path, info.shape)
        )
        if kind is not None and fits and wanted and base_name is not None:
            matrices.append(NamedMatrix(path, kind, name, base_name))
        else:
            whole[name] = base_name
    if missing := [module for module in modules or () if module not in named]:
        paths = [name.removesuffix(".weight") for name in tuned.tensors]
        raise SiteNotFound(
            "the fine-tuned checkpoint has no such module",
            where=tuned.folder,
            found=missing[0],
            remedy=nearest(missing[0], {path.rpartition(".")[2] for path in paths}),
        )
    return ClassifiedTensors(tuple(matrices), whole, tuple(name for name in base.tensors if name not in used))


def _kind(tuned: Checkpoint, name: str) -> str | None:
    """Returns the kind of a tensor's layer; None if factors cannot change it, or if its orientation is
    unknown.
    """
    info = tuned.tensors[name]
    if len(info.shape) != 2 or not name.endswith(".weight"):
        return None
    last = name.removesuffix(".weight").rpartition(".")[2]
    if "embed" in last or last in _EMBEDDINGS:
        return "embedding"
    return tuned.linear_kind(name) or (None if has_transposed(tuned.kinds_by_name) else "linear")


def is_head(tuned: Checkpoint, path: str, shape: tuple[int, ...]) -> bool:
    """Whether a module is an output head: by its name, or because it has one row for each word of the
    vocabulary.
    """
    return path.rpartition(".")[2] in _HEADS or shape[0] == tuned.config.get("vocab_size")
