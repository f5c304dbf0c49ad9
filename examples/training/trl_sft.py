"""TRL's `SFTTrainer` on a model with an adapter: it is an ordinary model to it.

pip install 'adapterpack[trl]'
python examples/training/trl_sft.py SmolLM2-135M-Instruct packs/orders
"""

import sys
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import adapterpack

ROWS = Path(__file__).parents[1] / "data" / "orders.train.jsonl"


def main(base: str, out: str, steps: int = 100) -> adapterpack.Pack:
    """Trains on prompts and completions, and packs."""
    rows = load_dataset("json", data_files=str(ROWS), split="train").select_columns(["prompt", "completion"])
    model = adapterpack.adapt(
        AutoModelForCausalLM.from_pretrained(base), adapterpack.LoRA(r=8, targets="all-linear"), "orders"
    )
    settings = SFTConfig(
        f"{out}.runs",
        max_steps=steps,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        max_length=64,
        bf16=False,
        save_strategy="no",
        report_to="none",
    )
    trainer = SFTTrainer(
        model, args=settings, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(base)
    )
    trainer.train()
    return adapterpack.save(model, out)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    print(main(*sys.argv[1:3], *map(int, sys.argv[3:])))
