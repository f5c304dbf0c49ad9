"""An adapter that onnxruntime runs in a graph of Olive: ``olive_graph.py FOLDER`` in an environment with olive-ai, torch,
transformers and peft makes the graph of a tiny model whose LoRA Olive turned into inputs, a folder of PEFT with
another adapter, and the logits that PEFT gives with it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from olive.common.hf.peft import make_export_compatible_peft
from olive.model import ONNXModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.onnx.extract_adapters import ExtractAdapters
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "v_proj", "down_proj"]


def tiny() -> LlamaForCausalLM:
    """A random model, the same each time."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, use_cache=False
    )
    return LlamaForCausalLM(config).eval()


def adapted(rank: int, targets: list[str]) -> torch.nn.Module:
    """The model with a random adapter of a rank."""
    model = get_peft_model(tiny(), LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.2)
    return model.eval()


class Logits(torch.nn.Module):
    """The logits of a model, the only output of its graph."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids).logits
        return logits


def main(folder: Path) -> None:
    ids = torch.tensor([[5, 9, 2, 44, 17]])
    made = make_export_compatible_peft(adapted(4, TARGETS))  # puts the scale into lora_B
    program = torch.onnx.export(
        Logits(made), (ids,), input_names=["input_ids"], output_names=["logits"], dynamo=True, optimize=True
    )
    program.save(str(folder / "baked.onnx"))
    olive = create_pass_from_dict(ExtractAdapters, {"make_inputs": True}, disable_search=True)
    olive.run(ONNXModelHandler(str(folder / "baked.onnx")), str(folder / "olive"))
    for rank, targets in ((4, TARGETS), (2, TARGETS), (4, TARGETS[:1]), (4, ["o_proj"])):
        other = adapted(rank, targets)
        out = folder / f"r{rank}-{'-'.join(targets)}"
        other.save_pretrained(out)
        np.save(out / "logits.npy", other(ids).logits.detach().numpy())
    np.save(folder / "ids.npy", ids.numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
