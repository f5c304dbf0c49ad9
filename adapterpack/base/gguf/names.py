"""Maps llama.cpp's tensor names to transformers' module paths, and its row order to the model's, for each
model family.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np

from ...errors import Unsupported
from ...resources import table


class GGUFFamily(NamedTuple):
    """A model family: llama.cpp's name for it, whether llama.cpp reorders the rows of queries and keys, and
    whether it adds one to norms.
    """

    name: str
    reorders: bool = False
    norms_plus_one: bool = False


class ModuleNames(msgspec.Struct, frozen=True):
    """llama.cpp's names of tensors outside of layers and of those in a layer, in that of some families too,
    mapped to transformers' modules.
    """

    outer: dict[str, str]
    layer: dict[str, str]
    special: dict[str, dict[str, str]] = {}


class GGUFNames(msgspec.Struct, frozen=True):
    """The contents of ``names.toml``."""

    families: dict[str, GGUFFamily]
    modules: ModuleNames
    bert: ModuleNames


_NAMES = table("base/gguf/names.toml", GGUFNames)
FAMILIES = _NAMES.families
"""Maps ``model_type`` to its family, for models whose linear weights llama.cpp's converter copies row by row
or reorders as below.
"""


def module_of(family: GGUFFamily, name: str) -> str | None:
    """Returns the path in transformers' model of llama.cpp's tensor ``name`` (without ``.weight``); None if
    it is unknown, or the tensor's values differ from the module's.

    Example:
        >>> module_of(FAMILIES["llama"], "blk.3.attn_q"), module_of(FAMILIES["bert"], "blk.0.ffn_up")
        ('model.layers.3.self_attn.q_proj', 'encoder.layer.0.intermediate.dense')
    """
    if family.norms_plus_one and name.endswith("norm"):
        return None
    first, number, rest = (*name.split("."), "", "")[:3]
    bert = family.name == "bert"
    names = _NAMES.bert if bert else _NAMES.modules
    if first != "blk":
        return names.outer.get(name)
    module = {**names.layer, **names.special.get(family.name, {})}.get(rest)
    layers = "encoder.layer" if bert else "model.layers"
    return None if module is None or not number.isdecimal() else f"{layers}.{number}.{module}"


def rope_row_order(family: GGUFFamily, path: str, rows: int, heads: int, groups: int) -> np.ndarray | None:
    """Returns, for each row of one head in the file, its row in the model's head, if llama.cpp reorders the
    rows of module ``path``; else None.

    A head's rows ``[first half, second half]`` become pairs with one row of each.

    Raises:
        Unsupported: the number of rows is not that of complete heads.

    Example:
        >>> rope_row_order(FAMILIES["llama"], "model.layers.0.self_attn.k_proj", 12, 4, 2).tolist()
        [0, 3, 1, 4, 2, 5]
    """
    owner = path.rpartition(".")[2]
    if not family.reorders or owner not in ("q_proj", "k_proj"):
        return None
    count = heads if owner == "q_proj" else groups
    if rows % (2 * count):
        raise Unsupported(
            "the rows of a query or key are not whole heads",
            where=path,
            found=rows,
            expected=f"a multiple of {2 * count}",
        )
    return np.arange(rows // count).reshape(2, -1).T.reshape(-1)
