"""QLoRA: the base in four bits (bitsandbytes' NF4), the adapter in float32.

    pip install bitsandbytes
    python examples/training/qlora.py SmolLM2-135M-Instruct packs/orders

The pack says that its base was quantized. On the same base in four bits it gives what it gave in training; on
the base in full precision `attach` says how far off it is.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import adapterpack

ROWS = Path(__file__).parents[1] / "data" / "orders.train.jsonl"


def main(base: str, out: str, steps: int = 100) -> adapterpack.Pack:
    """Trains on the base in four bits, and packs."""
    (pack,) = adapterpack.train(
        {
            "model_name_or_path": base,
            "train_file": str(ROWS),
            "output_dir": out,
            "load_in_4bit": True,
            "bf16": torch.cuda.is_available(),
            "r": 8,
            "target_modules": "all-linear",
            "learning_rate": 1e-3,
            "max_steps": steps,
            "max_length": 64,
            "per_device_train_batch_size": 4,
        }
    )
    print(pack.manifest.base_quantization)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization)
    adapterpack.attach(model, pack)  # as it was trained
    return pack


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    print(main(*sys.argv[1:3], *map(int, sys.argv[3:])))
