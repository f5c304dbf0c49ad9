"""Merges adapters of tied weights: a tensor of the checkpoint that is both input embedding and output head.

An adapter of only one of the two uses cannot be merged into the shared tensor. With ``untie`` a merge writes
the head as a separate tensor, and each use is changed by the adapters that were trained for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ...adapter_methods import LAYOUTS
from ...base import Checkpoint
from ...errors import Unsupported
from ...pack import Pack
from ...tasks import NO_TASK, task_of
from ..fold import Contribution, slice_of

Contributions = dict[str, list[Contribution]]
"""The contributions to each tensor."""
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")
_HEAD = "lm_head"


class SplitTied(NamedTuple):
    """Contributions by the tensor that they change, and additional tensors of the output: new name -> the
    tensor that it starts from.
    """

    contributions: Contributions
    copies: Mapping[str, str]


def split_tied(
    base: Checkpoint, contributions: Contributions, packs: Mapping[str, Pack], untie: bool
) -> SplitTied:
    """Assigns each contribution to the tensor that it changes.

    Raises:
        Unsupported: one use of a tied tensor is adapted and the other is not, or differently, and ``untie``
            is off.
    """
    result = {}
    copies = {}
    for name, of_tensor in contributions.items():
        heads = [one for one in of_tensor if _is_head(name, one)]
        tables = [one for one in of_tensor if one not in heads]
        pack = packs[of_tensor[0].pack]
        if not heads and not (any(map(_is_alone, tables)) and tied_to_a_head(base, pack, name)):
            result[name] = of_tensor
            # changed rows of the embedding change the head, too
            if untie and tied_to_a_head(base, pack, name):
                head = head_of(base, name)
                result[head] = list(of_tensor)
                copies[head] = name
            continue
        if untie:
            head = head_of(base, name)
            both = [one for one in tables if not _is_alone(one)]
            result[name] = tables
            result[head] = [*both, *heads]
            copies[head] = name
        elif heads and tables and _alike(tables, heads):
            result[name] = tables
        else:
            raise _shared(name, of_tensor, heads, tables)
    return SplitTied({name: of_tensor for name, of_tensor in result.items() if of_tensor}, copies)


def head_of(base: Checkpoint, table: str) -> str:
    """Returns the name of a language model's head once it is untied from ``table``.

    Raises:
        Unsupported: the name is not known for this model.
    """
    architecture = base.architecture or ""
    if not architecture.endswith(_LANGUAGE_MODELS) or f"{_HEAD}.weight" in base.tensors:
        raise Unsupported(
            "it is not known what the head of this model is called once it is untied",
            where=f"{base.where}, {table}",
            found=architecture or "no architecture in config.json",
            expected=f"a class that ends with {' or '.join(_LANGUAGE_MODELS)}",
            remedy="keep the adapter unmerged",
        )
    return f"{_HEAD}.weight"


def tied_to_a_head(base: Checkpoint, pack: Pack, name: str) -> bool:
    """Whether an embedding's tensor is also the output head of the model that the pack was trained on.

    transformers ties them unless a config says otherwise; a separate head is another tensor with a row for
    each word. A model that outputs features or labels has no such head.
    """
    task = pack.manifest.task.type
    if task == NO_TASK:
        task = task_of(base.architecture or "", base.config).name
    headless = task == "feature-extraction" or task.endswith("classification")
    words = base.tensors[name].shape[0]
    others = [
        other
        for other, info in base.tensors.items()
        if other != name and len(info.shape) == 2 and info.shape[0] == words
    ]
    tied = base.config.get("tie_word_embeddings", bool(base.config) and not others)
    return bool(tied) and not headless and words == base.config.get("vocab_size", words)


def module_of(tensor: str) -> str:
    """Returns the last component of the module to which a weight belongs, or of the parameter's own name."""
    return tensor.removesuffix(".weight").rpartition(".")[2]


def is_other_name(tensor: str, path: str) -> bool:
    """Whether a tensor is in the same layer as a module: then it is that module's weight under another name.

    transformers ties only embeddings and heads, which are in no layer.
    """
    numbers = [[part for part in name.split(".") if part.isdigit()] for name in (tensor, path)]
    return bool(numbers[0]) and numbers[0] == numbers[1]


def _is_alone(one: Contribution) -> bool:
    """Whether a contribution changes only what an embedding looks up, and no head that is tied to it."""
    kind = one.adapter.site.kind
    return LAYOUTS[kind].ids or (kind == "table" and not one.method.traits.tied)


def _is_head(name: str, one: Contribution) -> bool:
    path = one.adapter.site.path
    return module_of(name) != module_of(path) and not is_other_name(name, path)


def _alike(tables: Sequence[Contribution], heads: Sequence[Contribution]) -> bool:
    """Whether head and embedding were changed in the same way: with equal factors, transposed."""
    if len(tables) != len(heads):
        return False
    return all(
        table.pack == head.pack and table.weight == head.weight and _transposed_pair(table, head)
        for table, head in zip(tables, heads, strict=True)
    )


def _transposed_pair(table: Contribution, head: Contribution) -> bool:
    forms = []
    for one in (table, head):
        if one.method.traits.reads_weight or not one.method.traits.additive:
            return False
        adapter = slice_of(one, 0).adapter
        forms.append(one.method.normal_form(adapter.config, adapter.params, adapter.site))
    a, b = forms
    if not (a.is_branch and b.is_branch) or None in (a.up, a.down, b.up, b.down):
        return False
    pairs = [
        (np.asarray(getattr(one, "matrix", None)), np.asarray(getattr(other, "matrix", None)))
        for one, other in ((a.up, b.down), (a.down, b.up))
    ]
    (up, down_h), (down, up_h) = pairs
    if up.ndim != 2 or up.shape != down_h.T.shape or down.shape != up_h.T.shape:
        return False
    # One scale is part of up, the other of up_h, so this compares the small products.
    return (
        np.allclose(up.T @ up, down_h @ down_h.T)
        and np.array_equal(up, down_h.T)
        and np.array_equal(down, up_h.T)
    )


def _shared(
    name: str,
    contributions: Sequence[Contribution],
    heads: Sequence[Contribution],
    tables: Sequence[Contribution],
) -> Unsupported:
    uses = " and ".join(f"'{one.adapter.site.path}' (pack '{one.pack}')" for one in contributions)
    if heads and tables:
        what = (
            "this tensor is the input embedding and the output head at once, and the two were adapted "
            "differently"
        )
    else:
        use = "head" if heads else "embedding"
        what = (
            f"this tensor is the input embedding and the output head at once, and only the {use} was adapted"
        )
    return Unsupported(
        what,
        where=name,
        found=uses,
        remedy=(
            "merge with --untie (untie=True), which writes a head of its own, or keep the adapter unmerged"
        ),
    )
