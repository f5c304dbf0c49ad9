"""Two classifiers on one encoder: trained in one run, in one bundle, and measured on held-out rows that are
mixed in one batch.

python examples/cookbook/classification.py all-MiniLM-L6-v2 packs bundle
"""

import json
import sys
from pathlib import Path

import adapterpack

DATA = Path(__file__).parents[1] / "data"
NAMES = ("tickets", "reviews")


def held_out(name: str, most: int) -> list[dict]:
    """Rows of the test set, each with the adapter that is to answer it."""
    lines = (DATA / f"{name}.test.jsonl").read_text("utf-8").splitlines()[:most]
    return [{**json.loads(line), "adapter": name} for line in lines]


def main(base: str, packs: str, bundle: str, steps: int = 200, most: int = 100) -> dict[str, float]:
    """Trains, exports and returns the accuracy of each adapter."""
    trained = adapterpack.train(
        {
            "model_name_or_path": base,
            "task": "text-classification",
            "output_dir": packs,
            "r": 8,
            "learning_rate": 1e-3,
            "max_steps": steps,
            "max_length": 64,
            "adapters": [{"name": name, "train_file": str(DATA / f"{name}.train.jsonl")} for name in NAMES],
        }
    )
    adapterpack.export(base, trained, bundle)
    rows = [row for pair in zip(*(held_out(name, most) for name in NAMES), strict=False) for row in pair]
    asked = [{"text": row["text"], "adapter": row["adapter"]} for row in rows]
    right = dict.fromkeys(NAMES, 0)
    for row, answer in zip(rows, adapterpack.run(bundle, asked, batch_size=32), strict=True):
        right[row["adapter"]] += answer["label"] == row["label"]
    return {name: right[name] / sum(row["adapter"] == name for row in rows) for name in NAMES}


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    print(main(*sys.argv[1:4], *map(int, sys.argv[4:])))
