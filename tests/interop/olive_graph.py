"""Adapters that are written for a graph of Olive, run by ONNX Runtime in that graph, against PEFT: ``python
olive_graph.py PYTHON``.

``PYTHON`` is that of an environment with olive-ai, torch, transformers and peft, in which this file makes the
graph of a tiny model whose LoRA Olive turns into inputs, folders of PEFT with other adapters, and the logits
that PEFT gives with them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

TARGETS = ["q_proj", "v_proj", "down_proj"]
ADAPTERS = {
    "of the graph's rank": (4, TARGETS),
    "of another rank": (2, TARGETS),
    "of one of its modules": (4, TARGETS[:1]),
}
CLOSE = 2e-5
"""Of the largest logit: float32 on both sides, through two layers."""


def adapted(rank: int, targets: list[str]) -> Any:
    """A random model, the same each time, with a random adapter of a rank."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, use_cache=False))
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.2)
    return model.eval()


def make(folder: Path) -> None:
    """Writes the graph, the adapters, and what PEFT gives."""
    import torch
    from olive.common.hf.peft import make_export_compatible_peft
    from olive.model import ONNXModelHandler
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.passes.onnx.extract_adapters import ExtractAdapters

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_export_compatible_peft(adapted(4, TARGETS))  # puts the scale into lora_B

        def forward(self, input_ids: Any) -> Any:
            return self.model(input_ids).logits

    ids = torch.tensor([[5, 9, 2, 44, 17]])
    names = {"input_names": ["input_ids"], "output_names": ["logits"]}
    torch.onnx.export(Logits(), (ids,), **names, dynamo=True).save(str(folder / "model.onnx"))
    extract = create_pass_from_dict(ExtractAdapters, {"make_inputs": True}, disable_search=True)
    extract.run(ONNXModelHandler(str(folder / "model.onnx")), str(folder / "olive"))
    np.save(folder / "ids.npy", ids.numpy())
    for name, (rank, targets) in ADAPTERS.items():
        model = adapted(rank, targets)
        model.save_pretrained(folder / name)
        np.save(folder / name / "logits.npy", model(ids).logits.detach().numpy())


def main(python: str) -> int:
    """0 if ONNX Runtime gives PEFT's logits with every adapter."""
    import onnxruntime as ort

    import adapterpack

    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        subprocess.run([python, __file__, "--make", scratch], check=True, stdout=subprocess.DEVNULL)
        graph = str(folder / "olive" / "model.onnx")
        for name in ADAPTERS:
            file = folder / f"{name}.onnx_adapter"
            adapterpack.convert(folder / name, file, graph=graph)
            adapter, options = ort.LoraAdapter(), ort.RunOptions()
            adapter.Load(str(file))
            options.add_active_adapter(adapter)
            session, wanted = ort.InferenceSession(graph), np.load(folder / name / "logits.npy")
            (found,) = session.run(None, {"input_ids": np.load(folder / "ids.npy")}, run_options=options)
            error = np.abs(found - wanted).max() / np.abs(wanted).max()
            wrong += not error <= CLOSE
            sys.stdout.write(
                f"{'ok' if error <= CLOSE else 'WRONG':6}olive, an adapter {name}: error {error:.1e}\n"
            )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(make(Path(sys.argv[2])) if sys.argv[1] == "--make" else main(sys.argv[1]))
