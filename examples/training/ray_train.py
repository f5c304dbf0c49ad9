"""The adapters of a configuration, trained by Ray Train on any number of workers; the first one writes the
packs.

    pip install 'adapterpack[train,ray]'
    python examples/training/ray_train.py examples/orders.yaml --workers 2
    model_name_or_path=SmolLM2-135M-Instruct

The configuration is that of ``adapterpack train``. All workers must see this folder, the base and the output
at the same paths, as on one machine or a shared disk. After a failed worker Ray starts all of them again, and
the run goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def work(settings: dict[str, Any]) -> None:
    """What each worker does: Ray has given it its rank and connected it with the others."""
    import adapterpack  # noqa: PLC0415 - only the workers need it

    os.chdir(settings["folder"])
    adapterpack.train(settings["config"], settings["overrides"])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Adapters by Ray Train.")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="a card for each worker")
    parser.add_argument("--retries", type=int, default=1)
    parser.add_argument("--results", type=Path, help="where Ray keeps its own records [~/ray_results]")
    args = parser.parse_intermixed_args()
    settings = {"folder": str(Path.cwd()), "config": args.config, "overrides": args.overrides}
    run = RunConfig(
        storage_path=args.results and str(args.results.resolve()), failure_config=FailureConfig(args.retries)
    )
    TorchTrainer(
        work,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=args.gpu),
        run_config=run,
    ).fit()


if __name__ == "__main__":
    main()
