"""A loop of your own on several processes with accelerate; all of them call `save`, and the first one writes.

    accelerate launch --multi_gpu --num_processes 2 examples/training/accelerate_ddp.py SmolLM2-135M-Instruct
    packs/orders torchrun --nproc_per_node 2 examples/training/accelerate_ddp.py SmolLM2-135M-Instruct
    packs/orders

The second also runs on a CPU, where `accelerate launch` starts one process alone unless it has MPI.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapterpack

ROWS = Path(__file__).parents[1] / "data" / "orders.train.jsonl"


def main(base: str, out: str, steps: int = 100) -> None:
    """What each process does."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = adapterpack.adapt(
        AutoModelForCausalLM.from_pretrained(base),
        adapterpack.LoRA(r=8, targets="all-linear"),
        "orders",
        seed=0,
    )

    def batch(rows: list[dict]) -> dict:
        made = tokenizer(
            [row["prompt"] + row["completion"] for row in rows],
            padding=True,
            truncation=True,
            max_length=64,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        return {**made, "labels": made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)}

    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wrapped, optimizer, loader = accelerator.prepare(
        model,
        torch.optim.AdamW(trained, lr=1e-3),
        DataLoader(rows, batch_size=4, shuffle=True, collate_fn=batch),
    )
    for _, inputs in zip(range(steps), loader, strict=False):
        loss = wrapped(**inputs).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    pack = adapterpack.save(model, out if accelerator.is_main_process else None, base=base)
    accelerator.wait_for_everyone()
    accelerator.print(f"{accelerator.num_processes} processes: {pack.name}, loss {loss.item():.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
