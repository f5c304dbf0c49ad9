"""Bottlenecks and Compacter against AdapterHub's library: its models, its tensors, its outputs, as
``interop/adapterhub.py`` kept them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from adapterpack import Bottleneck, Compacter, adapt
from adapterpack.torch_adapters.layers.layer import Adapted

pytestmark = pytest.mark.fast

KEPT = load_file(Path(__file__).parent / "golden" / "adapterhub.safetensors")
SIZES = {
    "vocab_size": 12,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 10,
    "max_position_embeddings": 8,
}
MODELS = {
    "bert": lambda: BertModel(BertConfig(**SIZES), add_pooling_layer=False),
    "llama": lambda: LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=1)),
}
BESIDE = {"bert": {}, "llama": {"source": "post_attention_layernorm"}}
"""In a model that normalizes first, AdapterHub's parallel adapter reads the residual stream, and ours what
the feed-forward reads.
"""
CONFIGS = {
    "houlsby": lambda family: Bottleneck.houlsby(reduction=4),
    "pfeiffer": lambda family: Bottleneck.pfeiffer(reduction=4),
    "parallel": lambda family: Bottleneck.parallel(**BESIDE[family]),
    "compacter": lambda family: Compacter(phm_dim=2, reduction=3),
}
CASES = [(family, name) for family in MODELS for name in CONFIGS if (family, name) != ("bert", "pfeiffer")]
"""Where a model normalizes last, AdapterHub's Pfeiffer adapter reads a norm of its own:
`docs/decisions/0010`.
"""
CLOSE = 1e-5
"""Outputs of about 3 that were kept as float32, from float64 on both sides: 2e-7 of them, and a margin."""


def theirs(family: str, name: str, path: str) -> dict[str, np.ndarray]:
    """AdapterHub's tensors of the adapter at one of our sites, by our names."""
    parts, in_attention = path.split("."), "attention" in path or "self_attn" in path
    layer = ".".join(parts[: next(place for place, part in enumerate(parts) if part.isdigit()) + 1])
    of_layer = {key: value for key, value in KEPT.items() if key.startswith(f"{family}/{name}/{layer}.")}
    mine = {
        key.rpartition(".adapters.")[2].partition(".")[2]: value
        for key, value in of_layer.items()
        if ("attention" in key) == in_attention
    }
    if name != "compacter":
        return {
            "down": mine["adapter_down.0.weight"],
            "down_bias": mine["adapter_down.0.bias"],
            "up": mine["adapter_up.weight"],
            "up_bias": mine["adapter_up.bias"],
        }
    sides = {"down": "adapter_down.0", "up": "adapter_up"}
    turned = {
        f"{side}_{ours}": mine[f"{their}.W_{other}"].transpose(0, 2, 1)
        for side, their in sides.items()
        for ours, other in (("left", "right"), ("right", "left"))
    }
    return {**turned, "down_bias": mine["adapter_down.0.b"], "up_bias": mine["adapter_up.b"]}


@pytest.mark.parametrize(("family", "name"), CASES)
def test_it_gives_what_adapterhub_gives(family: str, name: str) -> None:
    """With AdapterHub's tensors in our sites, by our presets, the model gives AdapterHub's hidden states."""
    base: Any = MODELS[family]()
    base.load_state_dict(
        {
            key.removeprefix(f"{family}/base/"): torch.from_numpy(value)
            for key, value in KEPT.items()
            if key.startswith(f"{family}/base/")
        }
    )
    model = adapt(base.eval(), CONFIGS[name](family), "a")
    filled = 0
    with torch.no_grad():
        for module in [module for module in model.modules() if isinstance(module, Adapted)]:
            tensors = theirs(family, name, module._site.path)
            assert {key: value.shape for key, value in module._params("a").items()} == {
                key: value.shape for key, value in tensors.items()
            }
            for key, value in tensors.items():
                module._part("a")[key].copy_(torch.from_numpy(value))
            filled += len(tensors)
            if name == "compacter":
                module._shared("a")["rule"].copy_(
                    torch.from_numpy(KEPT[f"{family}/compacter/shared_parameters.compacter.phm_rule"]).mT
                )
    kept = sum(key.startswith(f"{family}/{name}/") for key in KEPT)
    assert filled == kept - (name == "compacter"), "every tensor of theirs has a place"
    with torch.no_grad():
        found = model.double()(torch.from_numpy(KEPT["ids"])).last_hidden_state.numpy()
    np.testing.assert_allclose(found, KEPT[f"{family}/out/{name}"], rtol=0, atol=CLOSE)
