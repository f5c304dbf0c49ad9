"""A loop of your own: adapt, step, save.

python examples/training/plain_loop.py SmolLM2-135M-Instruct packs/orders
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapterpack

ROWS = Path(__file__).parents[1] / "data" / "orders.train.jsonl"


def main(base: str, out: str, steps: int = 100) -> adapterpack.Pack:
    """Trains on the first rows, and packs."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapterpack.adapt(model, adapterpack.LoRA(r=8, alpha=16, targets="all-linear"), "orders")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]  # the adapter alone
    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    model.train()
    for step in range(steps):
        row = rows[step % len(rows)]
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [
            *tokenizer(row["completion"], add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        ids = torch.tensor([[*prompt, *answer][:64]])
        labels = torch.tensor([[*[-100] * len(prompt), *answer][:64]])  # the answer alone is learned
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    return adapterpack.save(model, out, training={"steps": steps})


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    print(main(*sys.argv[1:3], *map(int, sys.argv[3:])))
