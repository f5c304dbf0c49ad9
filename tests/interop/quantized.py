"""Merging into checkpoints that the real libraries wrote, and loading the result with them.

Not part of the test suite: bitsandbytes and torchao are no dependencies. In an environment that has them
beside adapterpack:

    python tests/interop/quantized.py FOLDER

Every line: format, |D| / |W|, then relative to |W| the base's own error, what its grid lets expect, and the
error of the requantized fold; the kept share of D; the largest difference of logits between requantized and
exact fold, beside that between base and exact fold; and the largest difference between a merged weight as the
library dequantizes it and as it is read here, in the library's dtype, of the base and of the merge.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import torch
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

import adapterpack
from adapterpack import LoRA
from adapterpack.adapter_methods import Site, get
from adapterpack.base.checkpoint import Checkpoint
from adapterpack.base.codecs.dequantized_checkpoint import DequantizedCheckpoint
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import Pack, build

FORMATS: dict[str, tuple[Any, torch.dtype]] = {
    "nf4": (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), torch.float32),
    "nf4-double": (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        torch.float32,
    ),
    "fp4": (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"), torch.float32),
    "int8": (BitsAndBytesConfig(load_in_8bit=True), torch.float32),
    "torchao-int8": (TorchAoConfig(Int8WeightOnlyConfig()), torch.bfloat16),
    "torchao-int4": (
        TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
        torch.bfloat16,
    ),
    "torchao-float8": (TorchAoConfig(Float8WeightOnlyConfig()), torch.bfloat16),
}


def pack(base: DequantizedCheckpoint, size: float) -> Pack:
    rng, adapters = np.random.default_rng(1), {}
    for name, info in base.tensors.items():
        if name.endswith("_proj.weight"):
            rows, columns = info.shape
            params = {"lora_A": rng.normal(0, 1, (4, columns)), "lora_B": rng.normal(0, size, (rows, 4))}
            site = Site(name.removesuffix(".weight"), columns, rows)
            adapters[site] = (
                LoRA(r=4, alpha=4),
                {key: value.astype(np.float32) for key, value in params.items()},
            )
    return build(
        "one",
        get("lora"),
        adapters,
        task=m.PackTask("text-generation"),
        base=m.Base("base", structure=base.structure, content=base.content),
        weights={site.path: f"{site.path}.weight" for site in adapters},
    )


def norm(values: Any) -> float:
    return float(np.sqrt(sum(float(np.sum(np.square(value, dtype=np.float64))) for value in values)))


def logits(folder: Path, ids: torch.Tensor, **rest: Any) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **rest)(ids).logits.float()


def apart(folder: Path) -> float:
    """The largest difference between a weight as the library that it is loaded with dequantizes it, and as it
    is read here.
    """
    modules = dict(AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").named_modules())
    base, worst = DequantizedCheckpoint(folder), 0.0
    for name in base.quantized:
        theirs = dequantized(modules[name.removesuffix(".weight")])
        ours = torch.from_numpy(base.matrix(name)[:]).to(theirs.dtype)
        worst = max(worst, float((ours.float() - theirs.float()).abs().max()))
    return worst


def dequantized(module: Any) -> torch.Tensor:
    """The weight of a quantized module of bitsandbytes or torchao, by the library's own code."""
    weight = module.weight
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        return torch.as_tensor(bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state))
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        codes, scale = (weight.data, module.state.SCB) if weight.SCB is None else (weight.CB, weight.SCB)
        return torch.as_tensor(bitsandbytes.functional.int8_vectorwise_dequant(codes, scale))
    return torch.as_tensor(weight.dequantize()).detach()


def main(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "plain")
    plain, ids = Checkpoint(folder / "plain"), torch.arange(20)[None] * 3 % 96
    for name, (settings, dtype) in FORMATS.items():
        quantized = AutoModelForCausalLM.from_pretrained(
            folder / "plain", quantization_config=settings, device_map="cpu", dtype=dtype
        )
        quantized.save_pretrained(folder / name)
        base = DequantizedCheckpoint(folder / name)
        original = {tensor: plain.read(tensor) for tensor in base.quantized}
        whole = norm(original.values())
        own = norm(base.matrix(tensor)[:] - original[tensor] for tensor in base.quantized) / whole
        for number, size in enumerate((0.0002, 0.002, 0.01)):
            same, exact = folder / f"{name}-{number}", folder / f"{name}-{number}-exact"
            report = adapterpack.merge(folder / name, [pack(base, size)], same)
            adapterpack.merge(folder / name, [pack(base, size)], exact, dtype="float32")
            assert report.requantized is not None
            error, grid = report.requantized
            a, b, c = logits(same, ids), logits(exact, ids, dtype=torch.float32), logits(folder / name, ids)
            sys.stdout.write(
                f"{name:15} {norm([loss.change for loss in report.losses]) / whole:.3f}  {own:.4f} "
                f"{grid / whole:.4f} "
                f"{error / whole:.4f}  {report.kept:.3f}  {(a - b).abs().max():.4f} "
                f"{(c - b).abs().max():.4f}  "
                f"{apart(folder / name):.2g} {apart(same):.2g}\n"
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
