"""Merged output == adapted output, for every foldable method of the registry."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

import adapterpack
from adapterpack import adapt, save
from adapterpack.methods import Method, methods

BUILD: dict[str, tuple[str, Callable[[], torch.nn.Module]]] = {
    "bert": ("linear", lambda: BertModel(BertConfig(vocab_size=41, hidden_size=24, num_hidden_layers=1, num_attention_heads=3,
                                                     intermediate_size=40, max_position_embeddings=16))),
    "gpt2": ("transposed", lambda: GPT2Model(GPT2Config(vocab_size=41, n_embd=24, n_layer=1, n_head=3, n_inner=40, n_positions=16))),
    "llama": ("linear", lambda: LlamaModel(LlamaConfig(vocab_size=41, hidden_size=24, intermediate_size=40, num_hidden_layers=1,
                                                        num_attention_heads=3, num_key_value_heads=3, attention_bias=True, mlp_bias=True))),
}
"""Family -> the kind of its layers, and a tiny one with biases everywhere."""
FOLDABLE = [method for method in methods().values() if method.kind == "weight" and method.examples[0].acts is None]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(3)
    made = {}
    for name, (_, build) in BUILD.items():
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        made[name] = tmp_path_factory.mktemp("families") / name
        model.save_pretrained(made[name])
    return made


CASES = [pytest.param(family, method, id=f"{family}-{method.name}") for family, (kind, _) in BUILD.items() for method in FOLDABLE
         if kind in method.traits.layers]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_merged_is_adapted(families: dict[str, Path], family: str, method: Method, tmp_path: Path) -> None:
    """The merged checkpoint, loaded by transformers, gives the adapted model's hidden states within 1e-5 of their largest (float32)."""
    torch.manual_seed(5)
    fields = {"targets": "all-linear"} if "targets" in {field.name for field in dataclasses.fields(method.config)} else {}
    model = adapt(AutoModel.from_pretrained(families[family]), dataclasses.replace(method.examples[0], **fields), "one").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    pack = save(model, tmp_path / "pack", base=families[family])
    adapterpack.merge(families[family], [pack], tmp_path / "out", durable=False)
    ids = torch.randint(0, 41, (2, 7))
    with torch.no_grad():
        adapted, merged = (each(ids).last_hidden_state for each in (model, AutoModel.from_pretrained(tmp_path / "out").eval()))
        plain = AutoModel.from_pretrained(families[family]).eval()(ids).last_hidden_state
    assert (adapted - plain).abs().max() > 1e-4
    torch.testing.assert_close(merged, adapted, atol=1e-5 * float(adapted.abs().max()), rtol=0)
