"""The demo on an encoder: two classification tasks, every stage, every accuracy measured on held-out rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapterpack.composing.pipeline import compose
from adapterpack.exporting.pipeline import export
from adapterpack.merging.pipeline import merge
from adapterpack.pack.pack import Pack
from adapterpack.pack.validate.validation import load
from adapterpack.quantizing.pipeline import quantize
from adapterpack.runtime.padding import pad
from adapterpack.runtime.sessions.session import Session
from adapterpack.runtime.text.tokenizer import Tokenizer
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.adapt import attach
from adapterpack.torch_adapters.layers.active import active
from adapterpack.torch_adapters.models.load import load_model
from adapterpack.training.config.config import read_config
from adapterpack.training.config.fields import TrainConfig
from adapterpack.training.pipeline import train_one

from .common import (
    Say,
    Stages,
    data_file,
    folder_size,
    model_facts,
    require_valid,
    rows_of,
    served,
    training_facts,
)

TASK = "text-classification"
EPOCHS = {"tickets": 3, "reviews": 1}
HALF_EPOCHS = 2
"""Enough to be compared: halves are not meant to be used."""
BATCH = 40
"""Texts whose labels are predicted together."""
BUNDLES = {"fp32": "bank", "int8": "bank-int8", "int4": "bank-int4"}
MIXED_TOLERANCE = 1e-5
"""The same row in another batch meets other matrix shapes, so float32 sums in another order; more than this
would be another result.
"""

Predict = Callable[[str, list[str]], np.ndarray]
"""(adapter, texts) -> logits [rows, labels]"""


def run(base: Path, source: str, out: Path, say: Say) -> dict[str, Any]:
    """The whole line for ``base``; everything that is made lies under ``out``. Returns what was measured."""
    stage = Stages(say)
    tokenizer = Tokenizer(base)
    packs: dict[str, Path] = {}
    models: dict[str, Any] = {}
    for name in EPOCHS:
        with stage(f"train {name}"):
            models[name] = train_one(_config(base, out, name, name))[1]
            packs[name] = out / "packs" / name
    half = sum(1 for _ in data_file("tickets", "train").open(encoding="utf-8")) // 2
    halves = {"tickets-first-half": 0, "tickets-second-half": half}
    for name, skip in halves.items():
        with stage(f"train {name}"):
            part = {
                "skip_train_samples": skip,
                "max_train_samples": half,
                "num_train_epochs": float(HALF_EPOCHS),
                "eval_file": None,
            }
            train_one(_config(base, out, name, "tickets", part))
            packs[name] = out / "packs" / name
    with stage("validate"):
        require_valid(packs, base)
    with stage("compose"):
        average = compose(
            [packs[name] for name in halves],
            rule="linear",
            weights=[0.5, 0.5],
            out=out / "packs" / "tickets-average",
        )
    with stage("quantize packs"):
        for name in EPOCHS:
            quantize(packs[name], out / "packs" / f"{name}-int8", scheme="int8")
    with stage("merge"):
        for name in EPOCHS:
            merge(base, [packs[name]], out / "merged" / name)
    bundle = out / "bundles" / "bank"
    with stage("export bank"):
        export(base, [packs[name] for name in EPOCHS], bundle, mode="bank")
    for scheme in ("int8", "int4"):
        with stage(f"quantize bundle {scheme}"):
            quantize(bundle, out / "bundles" / f"bank-{scheme}", scheme=scheme)

    runners: dict[str, Predict] = {
        "torch": lambda name, texts: torch_logits(models[name], tokenizer, texts),
        "merged": lambda name, texts: torch_logits(
            load_model(get_task(TASK), out / "merged" / name), tokenizer, texts
        ),
        **{f"onnx_{kind}": _onnx(out / "bundles" / folder) for kind, folder in BUNDLES.items()},
    }
    accuracy: dict[str, dict[str, float]] = {}
    parity: dict[str, dict[str, dict[str, float]]] = {}
    with stage("evaluate"):
        for name in EPOCHS:
            accuracy[name], parity[name] = _evaluate(name, load(packs[name]), base, tokenizer, runners)
        parts = {
            "first_half": load(packs["tickets-first-half"]),
            "second_half": load(packs["tickets-second-half"]),
            "average": average,
        }
        composed = {**_accuracy_of(base, tokenizer, parts), "both_halves": accuracy["tickets"]["torch"]}
    with stage("mixed batch"):
        mixed = _mixed(Session(bundle))
    with stage("serve"):
        answers = _served(bundle, packs)
    sizes = {
        "base checkpoint": folder_size(base),
        **{f"pack {path.name}": folder_size(path) for path in sorted((out / "packs").iterdir())},
        **{f"merged {name}": folder_size(out / "merged" / name) for name in EPOCHS},
        **{f"bundle {path.name}": folder_size(path) for path in sorted((out / "bundles").iterdir())},
    }
    return {
        "variant": "encoder",
        "model": model_facts(base, source),
        "accuracy": accuracy,
        "compose": {
            **composed,
            "rank": max(group.rank or 0 for group in average.manifest.groups),
            "exact": True,
        },
        "parity": parity,
        "mixed_batch_equal": mixed["equal"],
        "mixed_batch": mixed,
        "served": answers,
        "sizes": sizes,
        "timings": stage.timings,
        "paths": {"pack": "packs/tickets", "bundle": "bundles/bank"},
        "training": {name: training_facts(load(packs[name])) for name in EPOCHS},
    }


def torch_logits(model: Any, tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Logits ``[rows, labels]`` of a torch classifier."""

    def predict(some: list[str]) -> np.ndarray:
        batch = pad([tokenizer.encode(text) for text in some], tokenizer.pad_id, left=False)
        with torch.no_grad():
            logits: np.ndarray = model.eval()(
                **{key: torch.from_numpy(value) for key, value in batch.items()}
            ).logits.numpy()
        return logits

    return _in_batches(predict, texts)


def _in_batches(predict: Callable[[list[str]], np.ndarray], texts: list[str]) -> np.ndarray:
    """Logits of all texts, those of about one length together, so that little is padding."""
    order = np.argsort([len(text) for text in texts], kind="stable")
    logits = np.concatenate(
        [
            predict([texts[row] for row in order[start : start + BATCH]])
            for start in range(0, len(texts), BATCH)
        ]
    )
    return logits[np.argsort(order)]


def _config(base: Path, out: Path, name: str, data: str, extra: dict[str, Any] | None = None) -> TrainConfig:
    configs, _ = read_config(
        {
            "model_name_or_path": str(base),
            "task": TASK,
            "name": name,
            "output_dir": str(out / "packs" / name),
            "train_file": str(data_file(data, "train")),
            "eval_file": str(data_file(data, "test")),
            "method": "lora",
            "r": 8,
            "alpha": 16,
            "targets": "all-linear",
            "learning_rate": 2e-3,
            "lr_scheduler_type": "cosine",
            "num_train_epochs": float(EPOCHS[data]),
            "per_device_train_batch_size": 8,
            "max_length": 128,
            "group_by_length": True,
            "seed": 0,
            **(extra or {}),
        }
    )
    return configs[0]


def _onnx(bundle: Path) -> Predict:
    session = Session(bundle)

    def predict(name: str, texts: list[str]) -> np.ndarray:
        width = len(session.labels(name) or ())
        return _in_batches(lambda some: session.run(session.encode(some), name)["logits"][:, :width], texts)

    return predict


def _evaluate(
    name: str, pack: Pack, base: Path, tokenizer: Tokenizer, runners: dict[str, Predict]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Held-out accuracy on every runner, and how far each is from torch."""
    rows, labels = rows_of(name, "test"), list(pack.manifest.task.labels or ())
    texts, truth = [row["text"] for row in rows], np.array([labels.index(row["label"]) for row in rows])
    untrained = torch_logits(load_model(get_task(TASK), base, labels), tokenizer, texts)
    accuracy = {
        "chance": round(float(np.bincount(truth).max() / len(truth)), 4),
        "base_untrained_head": _share(untrained, truth),
    }
    parity: dict[str, dict[str, float]] = {}
    reference = runners["torch"](name, texts)
    for kind, predict in runners.items():
        logits = reference if kind == "torch" else predict(name, texts)
        accuracy[kind] = _share(logits, truth)
        if kind != "torch":
            parity[kind] = {
                "max_abs": float(np.abs(logits - reference).max()),
                "label_agreement": float((logits.argmax(-1) == reference.argmax(-1)).mean()),
            }
    return accuracy, parity


def _accuracy_of(base: Path, tokenizer: Tokenizer, packs: dict[str, Pack]) -> dict[str, float]:
    """The held-out accuracy of packs for the tickets, one after another in one model."""
    labels, rows = list(packs["average"].manifest.task.labels or ()), rows_of("tickets", "test")
    texts, truth = [row["text"] for row in rows], np.array([labels.index(row["label"]) for row in rows])
    model = load_model(get_task(TASK), base, labels)
    for name, pack in packs.items():
        attach(model, pack, name)
    return {name: _share(torch_logits(active(model, name), tokenizer, texts), truth) for name in packs}


def _share(logits: np.ndarray, truth: np.ndarray) -> float:
    return round(float((logits.argmax(-1) == truth).mean()), 4)


def _served(bundle: Path, packs: dict[str, Path]) -> dict[str, Any]:
    """What three adapters say over HTTP: those of the bundle, and one that the server loads."""
    more = "tickets-first-half"
    rows = []
    with served(bundle, [packs[more]]) as client:
        for name, data in (*((name, name) for name in EPOCHS), (more, "tickets")):
            text = rows_of(data, "test")[0]["text"]
            answer = client.post("/v1/classify", {"model": name, "input": text})
            rows.append(
                {
                    "text": text,
                    "adapter": name,
                    "answer": answer["data"][0]["label"],
                    "digest": answer["adapterpack"]["digest"],
                }
            )
    return {"client": client.name, "rows": rows}


def _mixed(session: Session) -> dict[str, Any]:
    """One batch whose rows use the first adapter, the second and none, against the same rows run with one
    adapter for all.
    """
    texts = [row["text"] for name in EPOCHS for row in rows_of(name, "test")[:4]]
    names: list[str | None] = [name for _ in range(4) for name in (*EPOCHS, None)][: len(texts)]
    inputs = session.encode(texts)
    mixed = session.run(inputs, names)["logits"]
    single = {name: session.run(inputs, name)["logits"] for name in set(names)}
    alone = np.stack([single[name][row] for row, name in enumerate(names)])
    error = float(np.abs(mixed - alone).max())
    same = bool((mixed.argmax(-1) == alone.argmax(-1)).all())
    shown = []
    for text, name, row in zip(texts, names, mixed, strict=True):
        labels = session.labels(name) or ()
        scores = np.exp(row[: len(labels)] - row[: len(labels)].max())
        best = int(scores.argmax())
        shown.append(
            {
                "text": text,
                "adapter": name,
                "label": labels[best] if name else None,
                "score": round(float(scores[best] / scores.sum()), 4) if name else None,
            }
        )
    return {
        "equal": same and error <= MIXED_TOLERANCE,
        "max_abs": error,
        "tolerance": MIXED_TOLERANCE,
        "rows": shown,
    }
