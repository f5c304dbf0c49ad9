"""What AdapterHub's library gives for its own configs, kept in ``tests/golden/adapterhub.safetensors``:
``python adapterhub.py FILE``.

It wants an older transformers than this package, so it has an environment of its own: ``pip install
adapters==1.3.0 torch safetensors``. Tensors are named ``FAMILY/base/...``, ``FAMILY/CONFIG/...`` (the
adapter's) and ``FAMILY/out/CONFIG`` (the last hidden states).
"""

from __future__ import annotations

import sys

import adapters
import torch
from adapters import CompacterConfig, DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

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
CONFIGS = {
    "houlsby": DoubleSeqBnConfig(reduction_factor=4),
    "pfeiffer": SeqBnConfig(reduction_factor=4),
    "parallel": ParBnConfig(),
    "compacter": CompacterConfig(phm_dim=2, reduction_factor=3),
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 2, 3, 4, 5, 1]])


def main(path: str) -> None:
    """Random models with a random adapter of every config, and their outputs in float64 rounded to
    float32.
    """
    kept = {"ids": IDS}
    for family, make in MODELS.items():
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.3 * torch.randn_like(value))
        kept |= {f"{family}/base/{name}": value.clone() for name, value in model.state_dict().items()}
        adapters.init(model)
        for name, config in CONFIGS.items():
            model.add_adapter(name, config=config)
            model.set_active_adapters(name)
            mine = {key: value for key, value in model.named_parameters() if f".{name}." in f".{key}."}
            for value in mine.values():
                value.data = 0.5 * torch.randn(value.shape)
            kept |= {f"{family}/{name}/{key}": value.detach().clone() for key, value in mine.items()}
            with torch.no_grad():
                kept[f"{family}/out/{name}"] = model.double().eval()(IDS).last_hidden_state.float()
            model.float()
            model.set_active_adapters(None)
    save_file({key: value.contiguous() for key, value in kept.items()}, path)


if __name__ == "__main__":
    main(sys.argv[1])
