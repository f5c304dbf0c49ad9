"""What adapters of experts cost: a step and a prompt of a bundle whose rows each have their own, beside the same
model without adapters.

The model is a random Qwen3 MoE. Both bundles run the same rows alternately in one process; each figure is the
median of the rounds, in milliseconds.

    python benchmarks/expert_adapters.py
    python benchmarks/expert_adapters.py --layers 4 --experts 32 --hidden 1024 --rank 16 --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from adapterpack import LoRA, Session, adapt, export, save
from adapterpack.runtime.sessions.decoder import next_cache

CACHED = 64
"""Tokens before a step."""


def bundles(args: argparse.Namespace, root: Path) -> tuple[Path, Path]:
    """A bundle without adapters, and a bank of two adapters of all experts."""
    config = transformers.AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=512,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=args.hidden // 8,
        num_experts=args.experts,
        num_experts_per_tok=args.chosen,
        moe_intermediate_size=args.hidden // 2,
    )
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / "base")
    packs = []
    for name in ("one", "two"):
        model = transformers.AutoModelForCausalLM.from_pretrained(root / "base")
        model = adapt(model, LoRA(r=args.rank, targets=("all-experts",)), name)
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value.normal_(0, 0.02)
        packs.append(save(model, root / name, base=root / "base", name=name))
    options: dict[str, Any] = {"frontend": "transformers", "proof": "none"}
    export(root / "base", [], root / "without", mode="folded", **options)
    export(root / "base", packs, root / "with", mode="bank", **options)
    return root / "without", root / "with"


def turns(sessions: dict[str, Session], rows: int, tokens: int, cached: int, rounds: int) -> Iterator[float]:
    """Yields the median of each session in turn, on ``tokens`` new tokens in each row after ``cached`` ones."""
    ids = np.random.default_rng(2).integers(3, 500, (rows, cached + tokens))
    names, fed = ["one", "two", None, "one"][:rows], {}
    for key, session in sessions.items():
        fed[key] = {"input_ids": ids[:, cached:], "attention_mask": np.ones_like(ids)}
        if cached:
            begun = {"input_ids": ids[:, :cached], "attention_mask": np.ones((rows, cached), np.int64)}
            fed[key] |= next_cache(session.run(begun, names if key == "with" else None))
    spent: dict[str, list[float]] = {key: [] for key in sessions}
    for _ in range(rounds + 1):
        for key, session in sessions.items():
            began = time.perf_counter()
            session.run(fed[key], names if key == "with" else None)
            spent[key].append(1e3 * (time.perf_counter() - began))
    yield from (statistics.median(times[1:]) for times in spent.values())  # the first warms up


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in {
        "hidden": 256,
        "layers": 2,
        "experts": 16,
        "chosen": 4,
        "rank": 16,
        "rounds": 5,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        sessions = {path.name: Session(path, "cpu") for path in bundles(args, Path(folder))}
        for what, rows, tokens, cached in (
            ("a step of 1 row", 1, 1, CACHED),
            ("a step of 4 rows", 4, 1, CACHED),
            ("a prompt of 256 tokens", 1, 256, 0),
        ):
            without, own = turns(sessions, rows, tokens, cached, args.rounds)
            table[what] = {"without": without, "with": own, "times": own / without}
    if args.json:
        print(json.dumps({"benchmark": "adapters of experts", **vars(args), "milliseconds": table}, indent=2))
        return
    print(f"{'':24}{'without':>10}{'with':>10}{'times':>8}")
    for what, one in table.items():
        print(f"{what:24}{one['without']:10.2f}{one['with']:10.2f}{one['times']:8.2f}")


if __name__ == "__main__":
    main()
