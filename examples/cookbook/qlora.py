"""QLoRA on one GPU: the base in four bits while it is trained, in half precision where it is served.

pip install 'adapterpack[all]' bitsandbytes
python examples/cookbook/qlora.py meta-llama/Llama-3.2-3B-Instruct rows.jsonl packs/orders merged
"""

import sys

import torch

import adapterpack


def main(base: str, rows: str, out: str, merged: str, steps: int = 500) -> dict[str, str]:
    """Trains in four bits, checks the pack, and merges it into the base in full precision; returns what the
    pack says of its base.
    """
    gpu = torch.cuda.is_available()
    (pack,) = adapterpack.train(
        {
            "model_name_or_path": base,
            "train_file": rows,
            "output_dir": out,
            "load_in_4bit": True,  # NF4
            "bf16": gpu,
            "gradient_checkpointing": gpu,  # less memory for more time
            "packing": False,  # True joins short rows, where the model's attention keeps them apart
            "r": 16,
            "lora_alpha": 32,
            "target_modules": "all-linear",
            "learning_rate": 2e-4,
            "max_steps": steps,
            "max_length": 512 if gpu else 48,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4 if gpu else 1,
            "save_steps": 100,  # the same command goes on after a stop
        }
    )
    report = adapterpack.validate(out, base)
    assert report.valid, report.findings
    adapterpack.merge(base, [pack], merged, dtype="bfloat16")  # the base's own weights, not the four-bit ones
    held = pack.manifest.base_quantization
    return {"trained on": str(held), "merged into": merged}


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    print(main(*sys.argv[1:5], *map(int, sys.argv[5:])))
