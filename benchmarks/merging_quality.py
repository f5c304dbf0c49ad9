"""How well the rules of combination merge: eight small adapters of one base become one, which is tested on
all eight tasks.

For every seed a base is taken (digits: pretrained, texts: MiniLM), a LoRA is trained for every task under a
fixed head (see `merging_tasks.py`), and every rule of the registry merges the eight. A figure is *normalized
accuracy*: of the merged adapter on the test rows of a task, in percent of what the task's own adapter reaches
there; the form of the tables of KnOTS (arXiv 2410.19735) and Iso (arXiv 2502.04959). Nothing is chosen but on
validation rows, for all tasks together: of every rule one coefficient, from one ladder of sizes relative to
the plain sum of the eight changes, and of rules that have one the density. All else are the rules' defaults.
Rules that look at data get what `measured` makes of the tasks' training rows: moments, squared gradients, or
a score. Rules that end in a dense matrix are cut to the summed rank of the eight, which is what the others
may have.

Adapters and figures are kept in ``--keep``, so that a run that was broken off goes on.

    pip install 'adapterpack[bench]'
    nice python benchmarks/merging_quality.py --keep build/merging --markdown
    docs/benchmarks/merging-quality.md python benchmarks/merging_quality.py --suites digits --seeds 1 --json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from merging_tasks import SUITES, Split, Suite, Task
from torch.nn import functional

import adapterpack
from adapterpack.composing.rules.rule import rules
from adapterpack.composing.statistics import Statistics
from adapterpack.errors import AdapterpackError, ConfigError
from adapterpack.pack.pack import Pack
from adapterpack.torch_adapters.calibration import measure as see

SIZES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7, 1.0, 1.4)
"""Of the merged change, relative to the sum of all changes; task arithmetic's coefficient itself."""
DENSITIES = (0.2, 0.5)
ROWS = 64
"""Training rows of a task that a rule may look at which looks at data."""
PAIRS = {"slerp": "of two adapters, not of eight", "nuslerp": "of two adapters, not of eight"}
REFERENCE = "task_arithmetic"
Deltas = dict[str, torch.Tensor]


def deltas(pack: Pack) -> Deltas:
    """What a pack adds to each weight."""
    return {
        adapter.site.path: torch.from_numpy(
            adapter.config.scale * adapter.wide["lora_B"] @ adapter.wide["lora_A"]
        )
        for adapter in pack.adapters()
    }


def norm(changes: Deltas) -> float:
    """Of all changes together."""
    return float(torch.stack([change.square().sum() for change in changes.values()]).sum().sqrt())


class Merged:
    """A suite's model with changes added to its weights, at any size."""

    def __init__(self, suite: Suite, changes: Deltas) -> None:
        self.suite, self.changes = suite, changes
        self.weights = {path: suite.model.get_submodule(path).weight for path in changes}
        self.before = {path: weight.detach().clone() for path, weight in self.weights.items()}

    @contextmanager
    def at(self, factor: float) -> Iterator[None]:
        """The suite's model has ``factor`` times the changes inside of the block."""
        with torch.no_grad():
            for path, weight in self.weights.items():
                weight.copy_(self.before[path] + factor * self.changes[path])
        yield
        with torch.no_grad():
            for path, weight in self.weights.items():
                weight.copy_(self.before[path])

    def accuracies(self, part: str, factor: float) -> dict[str, float]:
        """On ``val`` or ``test`` of every task, with ``factor`` times the changes."""
        with self.at(factor):
            return self.suite.accuracies(self.suite.model, part)


class Asked(torch.nn.Module):
    """The suite's model under the head of a task, with the loss; inputs and labels by their ``names`` or in
    their order.
    """

    def __init__(self, suite: Suite, task: str) -> None:
        super().__init__()
        self.model, self.features, self.head = suite.model, suite.features, suite.heads[task]
        self.names = [f"x{place}" for place in range(len(suite.tasks[0].train.inputs) + 1)]

    def forward(self, *values: torch.Tensor, **named: torch.Tensor) -> SimpleNamespace:
        *inputs, labels = values or [named[name] for name in self.names]
        return SimpleNamespace(
            loss=functional.cross_entropy(self.head(self.features(self.model, tuple(inputs))), labels)
        )


def trained(suite: Suite, seed: int, keep: Path) -> list[Pack]:
    """The adapters of all tasks, from the folder where they are there already."""
    found = []
    for task in suite.tasks:
        folder = keep / task.name
        found.append(adapterpack.load(folder) if folder.exists() else suite.train(task, seed, folder))
        say(f"{suite.name}, seed {seed}: {task.name}")
    return found


def climbed(sizes: Sequence[float], start: int, score: Callable[[float], float]) -> tuple[int, float]:
    """The place of the size that scores best, and its score: neighbours are asked, from ``start``, for as
    long as one is better.
    """
    known: dict[int, float] = {}

    def at(place: int) -> float:
        if place not in known:
            known[place] = score(sizes[place]) if 0 <= place < len(sizes) else -1.0
        return known[place]

    place = start
    while (best := max((place, place - 1, place + 1), key=at)) != place:
        place = best
    return place, at(place)


class Judge:
    """What merged changes of one suite and seed are worth; changes that are the same but for their size are
    judged once.
    """

    def __init__(self, suite: Suite, packs: Sequence[Pack]) -> None:
        self.suite, self.packs = suite, packs
        self.total = norm(deltas(adapterpack.compose(packs, rule="cat", weights=[1.0] * len(packs))))
        self.known: list[tuple[Deltas, dict[str, Any]]] = []

    def __call__(self, changes: Deltas) -> dict[str, Any]:
        """The size that is best on validation rows, its accuracy there, and those on test rows."""
        own = norm(changes)
        if not own:
            raise ConfigError("nothing is left of the changes", where="the merged adapter")
        changes = {path: change * (self.total / own) for path, change in changes.items()}
        for before, found in self.known:
            if norm({path: change - before[path] for path, change in changes.items()}) < 1e-4 * self.total:
                return found
        model = Merged(self.suite, changes)
        place, val = climbed(
            SIZES, len(SIZES) // 2, lambda size: float(np.mean(list(model.accuracies("val", size).values())))
        )
        found = {"size": SIZES[place], "val": val, "accuracy": model.accuracies("test", SIZES[place])}
        self.known.append((changes, found))
        return found


def looked_at(task: Task, seed: int) -> Split:
    """The training rows of a task that a rule may look at."""
    return task.train.rows(
        torch.randperm(len(task.train.labels), generator=torch.Generator().manual_seed(seed))[:ROWS]
    )


def measured(suite: Suite, packs: Sequence[Pack], kind: str, seed: int) -> list[Statistics]:
    """Statistics of every pack on some training rows of its task."""
    found = []
    for task, pack in zip(suite.tasks, packs, strict=True):
        asked, rows = Asked(suite, task.name), looked_at(task, seed)
        size = 1 if kind == "fisher" else ROWS
        batches = [
            dict(zip(asked.names, values, strict=True))
            for values in zip(*(value.split(size) for value in (*rows.inputs, rows.labels)), strict=True)
        ]
        sites = [replace(adapter.site, path=f"model.{adapter.site.path}") for adapter in pack.adapters()]
        with Merged(suite, deltas(pack)).at(1.0):
            seen = see(asked, sites, frozenset({kind}), batches)
        suite.model.zero_grad(set_to_none=True)
        matrices = {
            path.removeprefix("model."): np.asarray(getattr(one, kind), np.float32)
            for path, one in seen.items()
        }
        found.append(Statistics(kind, pack.id, ROWS, matrices))
    return found


def few_shot(suite: Suite, seed: int) -> Callable[[Pack], float]:
    """LoRAHub's score: minus the mean loss on a few training rows of every task."""
    rows = {task.name: looked_at(task, seed) for task in suite.tasks}

    def score(pack: Pack) -> float:
        with torch.no_grad(), Merged(suite, deltas(pack)).at(1.0):
            return -float(
                np.mean(
                    [Asked(suite, name)(*split.inputs, split.labels).loss for name, split in rows.items()]
                )
            )

    return score


def judged(suite: Suite, packs: Sequence[Pack], rule: str, seed: int, judge: Judge) -> dict[str, Any]:
    """A rule's coefficient, density and accuracies, or why it cannot merge these packs."""
    if rule in PAIRS:
        return {"refused": PAIRS[rule]}
    value = rules()[rule]
    rank = min(
        suite.rank * len(packs),
        *(min(adapter.site.in_features, adapter.site.out_features) for adapter in packs[0].adapters()),
    )
    more: dict[str, Any] = {"rank": rank} if value.cut else {}
    if value.statistics:
        more["statistics"] = measured(suite, packs, value.statistics, seed)
    if value.search:
        more["score"] = few_shot(suite, seed)
    found = []
    start = time.perf_counter()
    try:
        for density in DENSITIES if "density" in value.parameters else (None,):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                changes = deltas(
                    adapterpack.compose(
                        packs, rule=rule, params={} if density is None else {"density": density}, **more
                    )
                )
            found.append({**judge(changes), **({} if density is None else {"density": density})})
    except AdapterpackError as error:
        return {"refused": error.what if hasattr(error, "what") else str(error)}
    return {**max(found, key=lambda each: each["val"]), "seconds": time.perf_counter() - start}


def measure(
    name: str, seed: int, keep: Path, known: Mapping[tuple[str, int, str], Any]
) -> Iterable[dict[str, Any]]:
    """The rows of one suite and seed that are not known yet."""
    wanted = [rule for rule in ("base", "single", *rules()) if (name, seed, rule) not in known]
    if not wanted:
        return
    suite = SUITES[name](seed, keep / f"{name}-{seed}-base")
    packs = trained(suite, seed, keep / f"{name}-{seed}")
    judge = Judge(suite, packs)
    for rule in wanted:
        if rule == "base":
            row: dict[str, Any] = {"accuracy": suite.accuracies(suite.model, "test")}
        elif rule == "single":
            row = {
                "accuracy": {
                    task.name: Merged(suite, deltas(pack)).accuracies("test", 1.0)[task.name]
                    for task, pack in zip(suite.tasks, packs, strict=True)
                }
            }
        else:
            row = judged(suite, packs, rule, seed, judge)
        yield {"suite": name, "seed": seed, "rule": rule, **row}
        say(f"{name}, seed {seed}: {rule}")


def table(
    rows: Mapping[tuple[str, int, str], dict[str, Any]], suite: str, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """A line a rule: normalized accuracy of every task and of all, mean and spread over the seeds, beside the
    reference's; best first.
    """
    found = []
    for rule in ("base", *rules()):
        each = [
            (
                rows[suite, seed, rule],
                *(rows[suite, seed, other]["accuracy"] for other in ("single", REFERENCE)),
            )
            for seed in seeds
        ]
        if any("refused" in row for row, _, _ in each):
            continue
        normalized = [
            {task: 100 * row["accuracy"][task] / single[task] for task in single} for row, single, _ in each
        ]
        means = [float(np.mean(list(one.values()))) for one in normalized]
        ahead = [
            mean - float(np.mean([100 * reference[task] / single[task] for task in single]))
            for mean, (_, single, reference) in zip(means, each, strict=True)
        ]
        found.append(
            {
                "rule": rule,
                "tasks": {task: float(np.mean([one[task] for one in normalized])) for task in normalized[0]},
                "mean": float(np.mean(means)),
                "spread": float(np.std(means, ddof=1)) if len(means) > 1 else 0.0,
                "ahead": float(np.mean(ahead)),
                "ahead_in": sum(value > 0 for value in ahead),
                "sizes": sorted({row["size"] for row, _, _ in each if "size" in row}),
            }
        )
    return sorted(found, key=lambda line: -line["mean"])


def page(
    rows: Mapping[tuple[str, int, str], dict[str, Any]],
    suites: Sequence[str],
    seeds: Sequence[int],
    command: str,
) -> str:
    """The tables as Markdown."""
    lines = [
        INTRODUCTION.format(
            sizes=len(SIZES),
            least=SIZES[0],
            most=SIZES[-1],
            command=command,
            machine=platform.machine(),
            torch=torch.__version__.partition("+")[0],
        )
    ]
    for suite in suites:
        made = table(rows, suite, seeds)
        tasks = list(made[0]["tasks"])
        single = {
            task: 100 * float(np.mean([rows[suite, seed, "single"]["accuracy"][task] for seed in seeds]))
            for task in tasks
        }
        lines += [
            f"## {suite}, {len(seeds)} seed{'s' * (len(seeds) > 1)}",
            "",
            f"| rule | mean | ahead | size | {' | '.join(tasks)} |",
            "|---" * (4 + len(tasks)) + "|",
            "| *accuracy of the own adapters* | | | | "
            f"{' | '.join(f'*{single[task]:.1f}*' for task in tasks)} |",
        ]
        for line in made:
            sizes = line["sizes"]
            size = "" if not sizes else f"{sizes[0]:g}" if len(sizes) == 1 else f"{sizes[0]:g}-{sizes[-1]:g}"
            ahead = (
                "" if line["rule"] == REFERENCE else f"{line['ahead']:+.1f} ({line['ahead_in']}/{len(seeds)})"
            )
            cells = " | ".join(f"{value:.1f}" for value in line["tasks"].values())
            mean = f"{line['mean']:.1f}" + (f" ± {line['spread']:.1f}" if len(seeds) > 1 else "")
            lines.append(f"| {line['rule']} | {mean} | {ahead} | {size} | {cells} |")
        refused = {
            rule: rows[suite, seeds[0], rule]["refused"]
            for rule in rules()
            if "refused" in rows[suite, seeds[0], rule]
        }
        lines += [
            "",
            *(f"- not for these adapters: {rule} ({why})" for rule, why in refused.items()),
            *([""] if refused else []),
        ]
    return "\n".join(lines)


INTRODUCTION = """# How well the rules merge

Eight adapters of one base are merged into one, and it is tested on all eight tasks. Figures are accuracies on test rows in percent of what
each task's own adapter reaches (*normalized accuracy*): the mean of the tasks with its spread (standard deviation) over the seeds, then
each task. What a rule gives is multiplied by one coefficient, chosen on validation rows from {sizes} sizes between {least:g} and {most:g}
of the plain sum's, the same ones for every rule, task arithmetic among them; all other parameters are the defaults. *Ahead* is the
difference from task arithmetic on the same adapters, and in how many seeds it is above 0. What this shows and what it does not:
[decision 40](../decisions/0040-what-merging-rules-give.md).

Made by `{command}` ({machine}, torch {torch}, CPU).
"""


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--keep", type=Path, help="a folder for adapters and figures, to go on with later")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as scratch:
        keep = arguments.keep or Path(scratch)
        keep.mkdir(parents=True, exist_ok=True)
        file = keep / "rows.jsonl"
        kept = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        rows = {(row["suite"], row["seed"], row["rule"]): row for row in kept}
        for suite in arguments.suites:
            for seed in range(arguments.seeds):
                for row in measure(suite, seed, keep, rows):
                    rows[suite, seed, row["rule"]] = row
                    with file.open("a") as out:
                        out.write(json.dumps(row) + "\n")
    seeds = range(arguments.seeds)
    command = (
        f"python benchmarks/merging_quality.py --suites {' '.join(arguments.suites)} --seeds "
        f"{arguments.seeds}"
    )
    text = page(rows, arguments.suites, seeds, command)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    if arguments.json:
        print(
            json.dumps(
                {
                    "benchmark": "merging_quality",
                    "seeds": arguments.seeds,
                    "suites": {suite: table(rows, suite, seeds) for suite in arguments.suites},
                }
            )
        )
    elif not arguments.markdown:
        print(text)


if __name__ == "__main__":
    main()
