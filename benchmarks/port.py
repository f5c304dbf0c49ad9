"""What an adapter is worth on the next version of its base: on pairs of bases whose relation is known.

A LoRA is learnt on the old base for every task, and carried to the new one in five ways: by
`adapterpack.port`; copied as it is; as Cross-LoRA does (arXiv 2508.05232: the leading singular vectors of the old
weight become those of the new one, pair by pair); as LoRA-X does (arXiv 2501.16559: the change is projected
onto the leading singular vectors of the new weight); and learnt anew. Figures are accuracies on test rows, in
percent, the mean over the tasks.

The bases are the small vision transformers of `merging_tasks.py`, whose fixed heads are made of eight rows a
class on each base; with ``--decoder`` SmolLM2-135M, trained further on this guide, with the orders of the
examples as the task and exact answers as the figure, which takes half an hour.

    pip install 'adapterpack[bench]'
    python benchmarks/port.py --keep build/port
    python benchmarks/port.py --keep build/port --decoder
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from merging_tasks import DATA, ROWS, digits, ink_of, pretrained, vision_transformer

import adapterpack
from adapterpack.composing.as_factors import represent
from adapterpack.demos import SMOLLM2, fetch
from adapterpack.errors import BaseMismatch
from adapterpack.porting.units import closest

Deltas = Mapping[str, np.ndarray]
Score = Callable[[Any], float]
METHODS = ("base", "ported", "copied", "Cross-LoRA", "LoRA-X", "retrained")


class Singular(NamedTuple):
    """The singular vectors of a weight, the largest entry of each left one positive."""

    left: np.ndarray
    right: np.ndarray


def singular(weight: np.ndarray) -> Singular:
    """Of ``[m, n]``: ``[m, k]`` and ``[n, k]``, with k the narrower side."""
    u, _, vt = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    signs = np.sign(u[np.abs(u).argmax(axis=0), np.arange(u.shape[1])])
    return Singular(u * signs, vt.T * signs)


def cross_lora(old: Singular, new: Singular, change: np.ndarray) -> np.ndarray:
    """``U_t U_s^T D V_s V_t^T`` of rank 320 or half of the narrower side, whichever is less: the linear map
    between the subspaces that is best by Frobenius, where the vectors are paired by their order.
    """
    k = min(320, old.left.shape[1] // 2, new.left.shape[1] // 2)
    core = old.left[:, :k].T @ change @ old.right[:, :k]
    return new.left[:, :k] @ core @ new.right[:, :k].T


def lora_x(new: Singular, change: np.ndarray) -> np.ndarray:
    """``U_t U_t^T D V_t V_t^T`` with all singular vectors, which loses least."""
    return new.left @ (new.left.T @ change @ new.right) @ new.right.T


class Trained(NamedTuple):
    """A base: its folder, its model, how well a model does a task, and how an adapter of a task is learnt."""

    folder: Path
    model: Any
    score: Callable[[Any, str], float]
    train: Callable[[str, Path], adapterpack.Pack]


def changes_of(pack: adapterpack.Pack) -> Deltas:
    """What a pack adds to each weight, by the path of its module."""
    return {adapter.site.path: represent(adapter).factors.dense() for adapter in pack.adapters()}


def scored(base: Trained, task: str, changes: Deltas) -> float:
    """How well the base does a task with these changes added to its weights."""
    weights = {path: base.model.get_submodule(path).weight for path in changes}
    before = {path: weight.detach().clone() for path, weight in weights.items()}
    with torch.no_grad():
        for path, weight in weights.items():
            weight.add_(torch.from_numpy(np.ascontiguousarray(changes[path], np.float32)))
        found = 100 * base.score(base.model, task)
        for path, weight in weights.items():
            weight.copy_(before[path])
    return found


def kept(base: Trained, task: str, folder: Path) -> adapterpack.Pack:
    """The adapter of a task, from the folder where it is there already."""
    return adapterpack.load(folder / task) if (folder / task).exists() else base.train(task, folder / task)


def row(old: Trained, new: Trained, tasks: list[str], keep: Path, named: str) -> dict[str, Any]:
    """The figures of one pair of bases."""
    vectors: dict[tuple[str, str], Singular] = {}

    def of(which: str, base: Trained, path: str) -> Singular:
        if (which, path) not in vectors:
            vectors[which, path] = singular(base.model.get_submodule(path).weight.detach().numpy())
        return vectors[which, path]

    figures: dict[str, list[float]] = {method: [] for method in METHODS}
    distances, verdict = [float("nan")], ""
    for task in tasks:
        pack = kept(old, task, keep / "old")
        changes = changes_of(pack)
        own = {path for path, module in new.model.named_modules() if hasattr(module, "weight")}
        sources, ported = {path: path for path in changes if path in own}, {}
        try:
            carried = adapterpack.port(pack, old.folder, new.folder)
        except BaseMismatch:
            verdict = "refused"
        else:
            said, ported = carried.manifest.lineage.params, changes_of(carried)
            sources = {path: site["source"] for path, site in said["sites"].items()}
            distances, verdict = [site["distance"] for site in said["sites"].values()], said["verdict"]
        if verdict == "refused":
            distances = [
                closest(*(base.model.get_submodule(path).weight.detach().numpy() for base in (old, new)), 0)[
                    0
                ]
                for path in sources
            ]
        moved: dict[str, dict[str, np.ndarray]] = {method: {} for method in METHODS[2:5]}
        for path, source in sources.items():
            change, there = changes[source], of("new", new, path)
            moved["Cross-LoRA"][path] = cross_lora(of("old", old, source), there, change)
            if (len(there.left), len(there.right)) == change.shape:
                moved["copied"][path], moved["LoRA-X"][path] = change, lora_x(there, change)
        every = {
            "base": {},
            "ported": ported,
            **moved,
            "retrained": changes_of(kept(new, task, keep / named.replace(" ", "_"))),
        }
        for method in METHODS:
            figures[method].append(scored(new, task, every[method]))
    means = {method: float(np.mean(values)) for method, values in figures.items()}
    return {"new base": named, "distance": float(np.median(distances)), "verdict": verdict, **means}


def of_images(seed: int, folder: Path) -> Trained:
    """A small vision transformer in a folder, and the eight views of digits."""
    suite = digits(seed, folder)
    tasks = {task.name: task for task in suite.tasks}

    def score(model: Any, task: str) -> float:
        logits = suite.heads[task](suite.features(model, tasks[task].test.inputs))
        return float((logits.argmax(dim=1) == tasks[task].test.labels).float().mean())

    return Trained(folder, suite.model, score, lambda task, out: suite.train(tasks[task], seed, out))


def reordered(model: Any) -> Any:
    """The same function with the heads and the hidden units of every layer in another order."""
    made, rng = copy.deepcopy(model), torch.Generator().manual_seed(7)
    heads, width = model.config.num_attention_heads, model.config.hidden_size
    for layer in made.layers:
        order = torch.randperm(heads, generator=rng)[:, None] * (width // heads) + torch.arange(
            width // heads
        )
        units = torch.randperm(model.config.intermediate_size, generator=rng)
        attention, mlp = layer.attention, layer.mlp
        for inner, place in (
            *((part, order.ravel()) for part in (attention.q_proj, attention.k_proj, attention.v_proj)),
            (mlp.fc1, units),
        ):
            inner.weight.data = inner.weight.data[place]
            inner.bias.data = inner.bias.data[place]
        attention.o_proj.weight.data = attention.o_proj.weight.data[:, order.ravel()]
        mlp.fc2.weight.data = mlp.fc2.weight.data[:, units]
    return made


def without_layer(model: Any) -> Any:
    """The model without its second layer."""
    made = copy.deepcopy(model)
    del made.layers[1]
    made.config.num_hidden_layers -= 1
    return made


def without_units(model: Any) -> Any:
    """The model with the stronger three quarters of the hidden units of each layer."""
    units = model.config.intermediate_size * 3 // 4
    made = vision_transformer(intermediate_size=units)
    state = model.state_dict()
    for number, layer in enumerate(model.layers):
        first, second = layer.mlp.fc1.weight, layer.mlp.fc2.weight
        stay = (first.norm(dim=1) * second.norm(dim=0)).topk(units).indices.sort().values
        stem = f"layers.{number}.mlp"
        for name in ("fc1.weight", "fc1.bias"):
            state[f"{stem}.{name}"] = state[f"{stem}.{name}"][stay]
        state[f"{stem}.fc2.weight"] = state[f"{stem}.fc2.weight"][:, stay]
    made.load_state_dict(state)
    return made


def image_pairs(seed: int, old: Trained, keep: Path) -> Iterator[tuple[str, Any]]:
    """New bases by what became of the old one."""
    ink, labels = (value[:ROWS] for value in ink_of(seed))
    _, head = pretrained(ink, labels, seed)

    def further(model: Any, steps: int, rate: float) -> Any:
        start = copy.deepcopy(model), copy.deepcopy(head)
        return pretrained(ink, labels, seed + 1, start, steps, rate)[0]

    for steps, rate in ((100, 1e-4), (100, 2e-4), (100, 5e-4), (200, 5e-4), (200, 1e-3), (800, 2e-3)):
        yield f"{steps} more steps at {rate:g}", further(old.model, steps, rate)
    merged = copy.deepcopy(old.model)
    for path, change in changes_of(kept(old, "striped", keep / "old")).items():
        merged.get_submodule(path).weight.data += torch.from_numpy(change)
    yield "adapter of another task merged", merged
    yield "heads and hidden units reordered", reordered(old.model)
    healed = (200, 1e-3)
    yield "a layer removed, 200 more steps at 0.001", further(without_layer(old.model), *healed)
    yield "a quarter of the hidden units removed, 200 more steps", further(without_units(old.model), *healed)
    yield "other random beginnings", pretrained(ink, labels, seed + 1)[0]
    wide = vision_transformer(hidden_size=192, intermediate_size=384)
    yield "192 wide", pretrained(ink, labels, seed, (wide, torch.nn.Linear(192, 10)))[0]


# SmolLM2 and the orders of the examples.

GUIDE = DATA.parents[1] / "docs"
ROWS_OF_GUIDE, CUT = 3, 64


def of_text(folder: Path) -> Trained:
    """SmolLM2, or a version of it, and orders that become JSON."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = {}
    for part in ("train", "test"):
        lines = [json.loads(line) for line in (DATA / f"orders.{part}.jsonl").read_text().splitlines()]
        rows[part] = [
            (tokenizer(line["prompt"] + "\n")["input_ids"], [*tokenizer(line["completion"])["input_ids"], 2])
            for line in lines
        ]

    def batch(chosen: list[Any]) -> dict[str, torch.Tensor]:
        longest = max(len(prompt) + len(answer) for prompt, answer in chosen)
        made = {
            name: torch.zeros(len(chosen), longest, dtype=torch.long)
            for name in ("input_ids", "attention_mask")
        }
        made["labels"] = torch.full((len(chosen), longest), -100)
        for number, (prompt, answer) in enumerate(chosen):
            end = len(prompt) + len(answer)
            made["input_ids"][number, :end] = torch.tensor(prompt + answer)
            made["attention_mask"][number, :end] = 1
            made["labels"][number, len(prompt) : end] = torch.tensor(answer)
        return made

    def score(one: Any, task: str) -> float:
        """The share of answers that greedy decoding gives exactly: every token of them is the likeliest."""
        right = 0
        for start in range(0, len(rows["test"]), 10):
            inputs = batch(rows["test"][start : start + 10])
            labels = inputs.pop("labels")[:, 1:]
            found = one(**inputs).logits[:, :-1].argmax(dim=-1)
            right += int(((found == labels) | (labels == -100)).all(dim=1).sum())
        return right / len(rows["test"])

    def train(task: str, out: Path) -> adapterpack.Pack:
        adapted = copy.deepcopy(model)
        config = adapterpack.LoRA(r=8, alpha=16, targets="all-linear")
        adapterpack.adapt(adapted, config, seed=0)
        rng = np.random.default_rng(0)
        _fit(
            adapted,
            16,
            3e-3,
            lambda: batch([rows["train"][i] for i in rng.integers(len(rows["train"]), size=6)]),
        )
        return adapterpack.save(adapted, out, base=folder, name=task)

    return Trained(folder, model, score, train)


def _fit(model: Any, steps: int, rate: float, batch: Callable[[], Mapping[str, torch.Tensor]]) -> None:
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()


def trained_on_guide(folder: Path, out: Path, steps: int = 80, rate: float = 3e-4) -> None:
    """Trains SmolLM2 further on the pages of this guide, all its weights."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "".join(path.read_text("utf-8") for path in sorted(GUIDE.rglob("*.md")))
    ids = torch.tensor(tokenizer(text)["input_ids"])
    ids = ids[: len(ids) // CUT * CUT].view(-1, CUT)
    rng = torch.Generator().manual_seed(0)

    def batch() -> dict[str, torch.Tensor]:
        rows = ids[torch.randint(len(ids), (ROWS_OF_GUIDE,), generator=rng)]
        return {"input_ids": rows, "labels": rows}

    _fit(model, steps, rate, batch)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, help="where bases and adapters are kept for the next time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decoder", action="store_true", help="SmolLM2 in place of the vision transformers")
    parser.add_argument("--only", help="pairs whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep = args.keep or Path(tempfile.mkdtemp())
    keep = keep / ("decoder" if args.decoder else f"images-{args.seed}")
    keep.mkdir(parents=True, exist_ok=True)
    names = ("new base", "distance", "verdict", *METHODS)
    print("| " + " | ".join(names) + " |\n" + "| --- " * len(names) + "|", flush=True)
    for found in by_text(keep) if args.decoder else by_images(args.seed, keep, args.only):
        cells = [f"{value:.3g}" if isinstance(value, float) else value for value in found.values()]
        print("| " + " | ".join(cells) + " |", flush=True)


def by_text(keep: Path) -> Iterator[dict[str, Any]]:
    """The row of SmolLM2."""
    old, folder = of_text(fetch(SMOLLM2)), keep / "trained-further"
    if not folder.exists():
        trained_on_guide(old.folder, folder)
    yield row(old, of_text(folder), ["orders"], keep, "80 steps at 3e-4 on this guide")


def by_images(seed: int, keep: Path, only: str | None) -> Iterator[dict[str, Any]]:
    """The rows of the vision transformers."""
    old = of_images(seed, keep / "base")
    tasks = ["rotated", "upside_down", "mirrored", "transposed", "halves", "rolled", "checkered"]
    for name, model in image_pairs(seed, old, keep):
        if only is None or only in name:
            folder = keep / f"base-{name.replace(' ', '-')}"
            if not folder.exists():
                model.save_pretrained(folder)
            yield row(old, of_images(seed, folder), tasks, keep, name)


if __name__ == "__main__":
    main()
