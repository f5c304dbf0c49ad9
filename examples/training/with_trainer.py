"""`transformers.Trainer` on a classifier: the adapter and the new head are trained, checkpoints hold these
alone.

python examples/training/with_trainer.py all-MiniLM-L6-v2 packs/tickets
"""

import sys
from pathlib import Path

from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import adapterpack

ROWS = Path(__file__).parents[1] / "data" / "tickets.train.jsonl"


def main(base: str, out: str, steps: int = 200) -> adapterpack.Pack:
    """Trains a classifier, and packs it with its labels."""
    rows = load_dataset("json", data_files=str(ROWS), split="train")
    labels = sorted(set(rows["label"]))
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: n for n, label in enumerate(labels)},
    )
    # the new head is trained whole
    adapterpack.adapt(model, adapterpack.LoRA(r=8, targets="all-linear"), "tickets")

    def encode(row: dict) -> dict:
        return {
            **tokenizer(row["text"], truncation=True, max_length=64),
            "labels": labels.index(row["label"]),
        }

    arguments = TrainingArguments(
        f"{out}.runs",
        max_steps=steps,
        learning_rate=1e-3,
        per_device_train_batch_size=16,
        save_steps=100,
        report_to="none",
        logging_steps=20,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows.map(encode, remove_columns=rows.column_names),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    pack = adapterpack.save(model, out)
    print(pack.manifest.task.labels)
    return pack


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    print(main(*sys.argv[1:3], *map(int, sys.argv[3:])))
