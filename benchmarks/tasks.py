"""What each class of methods makes of a real encoder, beside the frozen encoder with a head: accuracies on
the bundled data.

MiniLM learns the support tickets (6 classes) and the reviews (2) of ``examples/data``, each method with a
head that is trained whole, on the training rows alone; accuracies are on the test rows, over several seeds.
``head`` trains the head alone, under an adapter that changes nothing. Each method has a learning rate of its
own; ``--search`` chooses it anew, as the one that does best in the mean over the seeds on a fifth of the
training rows that is kept apart: one seed alone chooses rates at which others diverge.

    python benchmarks/tasks.py
    python benchmarks/tasks.py --methods lora head --data tickets --search --json
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from adapterpack.demos import MINILM, fetch
from adapterpack.resources import resource
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.layers.layer import Adapted
from adapterpack.training.config.config import read_config
from adapterpack.training.loop.arguments import arguments_of
from adapterpack.training.loop.build_trainer import trainer_for
from adapterpack.training.loop.preparing import prepare, reader_of, training_of
from adapterpack.training.trainers.kind import TRAINERS

HEAD = "head"
METHODS: dict[str, tuple[float, dict[str, Any]]] = {
    "lora": (5e-4, {"method": "lora", "r": 8, "alpha": 16, "targets": "all-linear"}),
    "ia3": (2e-2, {"method": "ia3"}),
    "bottleneck": (5e-3, {"method": "bottleneck"}),
    "prefix_tuning": (2e-2, {"method": "prefix_tuning", "num_virtual_tokens": 16}),
    HEAD: (2e-2, {"method": "lora", "r": 1}),
}
"""Name -> the learning rate and the settings of a method; of the head alone an adapter that is not
trained.
"""
SEARCHED = (1e-3, 5e-3, 2e-2)
KEPT_APART = 0.2


def accuracy(
    base: Path, data: str, method: str, seed: int, rate: float, epochs: float, test: bool
) -> tuple[float, int]:
    """The accuracy of one training on the test rows, or on training rows that were kept apart; and how many
    numbers were trained.
    """
    with tempfile.TemporaryDirectory() as folder:
        (config,), _ = read_config(
            {
                "model_name_or_path": str(base),
                "task": "text-classification",
                "train_file": str(resource(f"examples/data/{data}.train.jsonl")),
                "name": "it",
                "output_dir": f"{folder}/it",
                "learning_rate": rate,
                "num_train_epochs": epochs,
                "per_device_train_batch_size": 16,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 0.1,
                "max_length": 64,
                "group_by_length": True,
                "seed": seed,
                "save_strategy": "no",
                **(
                    {"eval_file": str(resource(f"examples/data/{data}.test.jsonl"))}
                    if test
                    else {"val_set_size": KEPT_APART}
                ),
                **METHODS[method][1],
            }
        )
        task, kind = get_task(config.task), TRAINERS[config.trainer]
        reader = reader_of(task, kind, base)
        ready = prepare(config, task, base, reader)
        if method == HEAD:
            for module in ready.model.modules():
                if isinstance(module, Adapted):
                    module._trainable(config.pack_name, False)
        trained = sum(value.numel() for value in ready.model.parameters() if value.requires_grad)
        trainer = trainer_for(
            config, ready, arguments_of(config, folder, training_of(task, kind).targets), reader
        )
        trainer.train()
        return trainer.evaluate()["eval_accuracy"], trained


def measured(base: Path, data: str, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """A method's accuracies on the test rows, one for each seed."""
    started, rate = time.monotonic(), METHODS[method][0]
    if args.search:
        tried = {
            one: mean(accuracy(base, data, method, seed, one, args.epochs, False)[0] for seed in args.seeds)
            for one in SEARCHED
        }
        rate = max(SEARCHED, key=lambda one: tried[one])
    found = [accuracy(base, data, method, seed, rate, args.epochs, True) for seed in args.seeds]
    scores = [score for score, _ in found]
    return {
        "data": data,
        "method": method,
        "trained": found[0][1],
        "learning_rate": rate,
        "accuracies": scores,
        "mean": mean(scores),
        "seconds": round(time.monotonic() - started),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--data", nargs="+", choices=("tickets", "reviews"), default=["tickets", "reviews"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument(
        "--search",
        action="store_true",
        help="choose each method's learning rate anew; takes four times as long",
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    base, found = fetch(MINILM), []
    if not args.json:
        print("| data | method | trained numbers | learning rate | accuracy of each seed | mean |")
        print("| --- | --- | ---: | ---: | --- | ---: |")
    for data in args.data:
        for method in args.methods:
            one = measured(base, data, method, args)
            found.append(one)
            if not args.json:
                scores = ", ".join(f"{score:.3f}" for score in one["accuracies"])
                print(
                    f"| {data} | {method} | {one['trained']:,} | {one['learning_rate']:g} | {scores} | "
                    f"{one['mean']:.3f} |",
                    flush=True,
                )
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
