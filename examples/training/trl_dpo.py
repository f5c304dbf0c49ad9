"""Preferences on top of a pack: `adapterpack train` with TRL's DPO. The reference is what the adapter was in
the beginning; the base is in memory once.

    pip install 'adapterpack[trl]'
    python examples/training/trl_dpo.py SmolLM2-135M-Instruct packs/polite packs/orders
"""

import json
import sys
import tempfile
from pathlib import Path

import adapterpack

ROWS = [
    {
        "prompt": "Where is my parcel?",
        "chosen": " It is on its way, and should arrive on Friday.",
        "rejected": " No idea.",
    },
    {
        "prompt": "I want my money back.",
        "chosen": " Of course: it will be on your account in three days.",
        "rejected": " Tough.",
    },
    {
        "prompt": "The lamp is broken.",
        "chosen": " I am sorry. We will send you a new one today.",
        "rejected": " Then do not drop it.",
    },
]


def main(base: str, out: str, started_from: str | None = None, steps: int = 30) -> adapterpack.Pack:
    """Makes the better answers likelier than the others, and packs."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "preferences.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        settings = {
            "model_name_or_path": base,
            "trainer": "dpo",  # or kto, orpo, reward, grpo
            "beta": 0.1,
            "train_file": str(rows),
            "output_dir": out,
            "max_steps": steps,
            "max_length": 64,
            "per_device_train_batch_size": 3,
        }
        if started_from is not None:
            settings["adapter_name_or_path"] = started_from  # trained further, with its own method and rank
        (pack,) = adapterpack.train(settings)
    return pack


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    print(main(*sys.argv[1:4], *map(int, sys.argv[4:])))
