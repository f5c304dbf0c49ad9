"""Embeddings by sentence-transformers' own trainer and loss, with an adapter in the model that it holds.

pip install sentence-transformers
python examples/training/embeddings.py all-MiniLM-L6-v2 packs/search
"""

import sys

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MultipleNegativesRankingLoss

import adapterpack

PAIRS = [
    ("where is my parcel", "How long does delivery take?"),
    ("the lamp does not light up", "What do I do with a broken item?"),
    ("I was charged twice", "How do I get my money back?"),
    ("please close my account", "How do I delete my data?"),
]


def main(base: str, out: str, steps: int = 40) -> adapterpack.Pack:
    """Brings the texts of a pair together, and packs."""
    model = SentenceTransformer(base, device="cpu")
    inner = model[0].auto_model  # the model of transformers
    adapterpack.adapt(inner, adapterpack.LoRA(r=8, targets="all-linear"), "search")
    rows = Dataset.from_dict(
        {"anchor": [query for query, _ in PAIRS], "positive": [answer for _, answer in PAIRS]}
    )
    arguments = SentenceTransformerTrainingArguments(
        f"{out}.runs",
        max_steps=steps,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    trainer = SentenceTransformerTrainer(model, arguments, rows, loss=MultipleNegativesRankingLoss(model))
    trainer.train()
    print(model.similarity(*(model.encode(list(texts)) for texts in zip(*PAIRS, strict=True))))
    return adapterpack.save(inner, out, base=base)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    print(main(*sys.argv[1:3], *map(int, sys.argv[3:])))
