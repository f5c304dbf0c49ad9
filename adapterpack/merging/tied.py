"""Tied weights: one tensor of a checkpoint that is the table of the words and the output head at once.

An adapter of one of the two uses cannot be folded into the tensor of both. Asked to untie them, a merge writes the head as a tensor of its
own, and each use is changed by what was trained for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..adapter_methods import LAYOUTS
from ..base.checkpoint import Checkpoint
from ..errors import Unsupported
from ..pack.pack import Pack
from ..tasks.task import NO_TASK, type_of
from .fold.fold import Contribution, slice_of

Found = dict[str, list[Contribution]]
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")
_HEAD = "lm_head"


class Parted(NamedTuple):
    """Contributions by the tensor that they change, and the tensors that the output has besides: new name -> the one that it was."""

    found: Found
    copies: Mapping[str, str]


def parted(base: Checkpoint, found: Found, packs: Mapping[str, Pack], untie: bool) -> Parted:
    """Each contribution to the tensor of its own use.

    Raises:
        Unsupported: one use of a tied tensor is adapted and the other is not, or differently, and they shall stay tied.
    """
    result, copies = dict[str, list[Contribution]](), dict[str, str]()
    for name, each in found.items():
        heads = [one for one in each if _is_head(name, one)]
        tables = [one for one in each if one not in heads]
        pack = packs[each[0].pack]
        if not heads and not (any(LAYOUTS[one.adapter.site.kind].ids for one in tables) and tied_to_a_head(base, pack, name)):
            result[name] = each
            if untie and tied_to_a_head(base, pack, name):  # rows of the table change the head, too
                head = head_of(base, name)
                result[head], copies[head] = list(each), name
            continue
        if untie:
            head = head_of(base, name)
            both = [one for one in tables if not LAYOUTS[one.adapter.site.kind].ids]
            result[name], result[head], copies[head] = tables, [*both, *heads], name
        elif heads and tables and _alike(tables, heads):
            result[name] = tables
        else:
            raise _shared(name, each, heads, tables)
    return Parted({name: each for name, each in result.items() if each}, copies)


def head_of(base: Checkpoint, table: str) -> str:
    """The tensor that the head of a language model is called once it is none with ``table``.

    Raises:
        Unsupported: it is no model of which that is known.
    """
    architecture = base.architecture or ""
    if not architecture.endswith(_LANGUAGE_MODELS) or f"{_HEAD}.weight" in base.tensors:
        raise Unsupported("it is not known what the head of this model is called once it is untied", where=f"{base.where}, {table}",
                          found=architecture or "no architecture in config.json",
                          expected=f"a class that ends with {' or '.join(_LANGUAGE_MODELS)}",
                          remedy="keep the adapter beside the base")
    return f"{_HEAD}.weight"


def tied_to_a_head(base: Checkpoint, pack: Pack, name: str) -> bool:
    """Whether an embedding's tensor is also the output head of the model that the pack was trained on.

    transformers ties them unless a config says otherwise; a head of its own is another tensor with a row for each word. A model that
    gives features or labels has no such head.
    """
    task = pack.manifest.task.type
    if task == NO_TASK:
        task = type_of(next(iter(base.config.get("architectures") or ()), None), base.config)
    headless = task == "feature-extraction" or task.endswith("classification")
    words = base.tensors[name].shape[0]
    own = [other for other, info in base.tensors.items() if other != name and len(info.shape) == 2 and info.shape[0] == words]
    tied = base.config.get("tie_word_embeddings", bool(base.config) and not own)
    return bool(tied) and not headless and words == base.config.get("vocab_size", words)


def module_of(tensor: str) -> str:
    """The last component of the module that a tensor is the weight of, or of the parameter's own name."""
    return tensor.removesuffix(".weight").rpartition(".")[2]


def renamed(tensor: str, path: str) -> bool:
    """Whether a tensor is in the layer that a module is in: then it has another name there, and not another module's weight.

    What transformers ties are embeddings and heads, which are in no layer.
    """
    numbers = [[part for part in name.split(".") if part.isdigit()] for name in (tensor, path)]
    return bool(numbers[0]) and numbers[0] == numbers[1]


def _is_head(name: str, one: Contribution) -> bool:
    path = one.adapter.site.path
    return module_of(name) != module_of(path) and not renamed(name, path)


def _alike(tables: Sequence[Contribution], heads: Sequence[Contribution]) -> bool:
    """Whether what is done to the head is what is done to the table, seen from the other side: equal factors, turned."""
    if len(tables) != len(heads):
        return False
    return all(table.pack == head.pack and table.weight == head.weight and _turned(table, head)
               for table, head in zip(tables, heads, strict=True))


def _turned(table: Contribution, head: Contribution) -> bool:
    forms = []
    for one in (table, head):
        if one.method.traits.reads_weight or not one.method.traits.additive:
            return False
        adapter = slice_of(one, 0).adapter
        forms.append(one.method.attach(adapter.config, adapter.params, adapter.site))
    a, b = forms
    if not (a.is_branch and b.is_branch) or None in (a.up, a.down, b.up, b.down):
        return False
    pairs = [(np.asarray(getattr(one, "matrix", None)), np.asarray(getattr(other, "matrix", None)))
             for one, other in ((a.up, b.down), (a.down, b.up))]
    (up, down_h), (down, up_h) = pairs
    if up.ndim != 2 or up.shape != down_h.T.shape or down.shape != up_h.T.shape:
        return False
    # One scale is in up, the other in up_h: what they multiply to is compared, entry by entry of the smaller products.
    return np.allclose(up.T @ up, down_h @ down_h.T) and np.array_equal(up, down_h.T) and np.array_equal(down, up_h.T)


def _shared(name: str, each: Sequence[Contribution], heads: Sequence[Contribution], tables: Sequence[Contribution]) -> Unsupported:
    said = " and ".join(f"'{one.adapter.site.path}' (pack '{one.pack}')" for one in each)
    if heads and tables:
        what = "this tensor is the input embedding and the output head at once, and the two were adapted differently"
    else:
        use = "head" if heads else "embedding"
        what = f"this tensor is the input embedding and the output head at once, and only the {use} was adapted"
    return Unsupported(what, where=name, found=said,
                       remedy="merge with --untie (untie=True), which writes a head of its own, or keep the adapter beside the base")
