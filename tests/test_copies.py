"""Adapted models are copied and written whole: a copy computes the same, and goes its own way from then
on.
"""

from __future__ import annotations

import copy
import io
import pickle  # noqa: TID251 - what users may do with a model of their own
from collections.abc import Callable
from typing import Any

import pytest
import torch
from noise import shake
from test_padding import llama

from adapterpack import LoRA, active, adapt, attach, compose, detach, disabled, merge_into, save, unmerge_from
from adapterpack.adapter_methods import Method, methods

pytestmark = pytest.mark.fast

IDS = torch.tensor([[5, 0, 40, 3, 61]])


def by_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # noqa: TID251 - as above


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda one: pickle.loads(pickle.dumps(one)),
    "torch.save": by_torch,
}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def require_copied(model: Any, copied: Any) -> None:
    """The same numbers; what is trained, packed or taken out of the copy is not that of the first."""
    right = logits(model)
    assert torch.equal(logits(copied), right)
    shake(copied.train().eval(), 0.3)
    assert not torch.equal(logits(copied), right)
    assert torch.equal(logits(model), right)
    save(copied, None, name="copied")
    with disabled(copied):
        plain = logits(copied)
    assert torch.equal(logits(detach(copied)), plain)
    assert torch.equal(logits(model), right)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", methods().values(), ids=lambda method: method.name)
def test_a_model_with_an_adapter_is_copied(method: Method) -> None:
    model = shake(adapt(llama(), method.examples[0]), 0.3)
    require_copied(model, by_torch(model))


@pytest.mark.parametrize("way", COPIES)
def test_each_way_to_copy_a_model(way: str) -> None:
    """With several adapters, and one that is merged: the copy takes it out again."""
    model = shake(adapt(shake(adapt(llama(), LoRA(r=2), "a"), 0.3, 1), LoRA(r=3), "b"), 0.3, 2)
    active(model, ["a", "b"])
    right = logits(model)
    merged = COPIES[way](merge_into(model))
    assert (logits(merged) - right).abs().max() <= 1e-5
    assert torch.equal(logits(unmerge_from(merged)), right)
    detach(unmerge_from(model), "a")
    require_copied(model, COPIES[way](model))


@pytest.mark.parametrize("tree", ["sum(0.5*a, b)", "split(a, b, sizes=2:1)", "xlora(a, b, hidden=32)"])
def test_a_composed_adapter_is_copied(tree: str) -> None:
    made = [save(shake(adapt(llama(), LoRA(r=2), name), 0.3, seed), None) for seed, name in enumerate("ab")]
    model = attach(llama(), compose(made, tree=tree), "mixed", check_canary=False)
    # Before a pass with hidden states, whose hooks transformers has no way to write.
    copies = [way(model) for way in COPIES.values()]
    assert all(torch.equal(logits(copied), logits(model)) for copied in copies)
