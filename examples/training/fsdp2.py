"""FSDP2: base and adapter are sharded over the processes, and `save` gathers the adapter.

torchrun --nproc_per_node 2 examples/training/fsdp2.py SmolLM2-135M-Instruct packs/orders
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapterpack

ROWS = Path(__file__).parents[1] / "data" / "orders.train.jsonl"


def main(base: str, out: str, steps: int = 100) -> None:
    """What each process does."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = adapterpack.adapt(
        AutoModelForCausalLM.from_pretrained(base),
        adapterpack.LoRA(r=8, targets="all-linear"),
        "orders",
        seed=0,
    )
    for layer in model.model.layers:  # adapters are sharded with the layers that they are in
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3
    )

    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    for step in range(steps):
        row = rows[(step * world + rank) % len(rows)]  # each process has rows of its own
        ids = tokenizer(
            row["prompt"] + row["completion"], return_tensors="pt", truncation=True, max_length=64
        )["input_ids"]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    pack = adapterpack.save(model, out if rank == 0 else None, base=base)  # by all of them: each holds a part
    if rank == 0:
        print(f"{world} processes: {pack.name}, loss {loss.item():.3f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
