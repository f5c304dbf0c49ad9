"""The demo on a language model: an adapter that answers as strict JSON, generated through ONNX Runtime and
compared with torch.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from adapterpack.exporting.pipeline import export
from adapterpack.pack.validate.validation import load
from adapterpack.runtime.padding import pad
from adapterpack.runtime.sessions.run import run as answer_rows
from adapterpack.runtime.sessions.session import Session
from adapterpack.torch_adapters.layers.active import active
from adapterpack.training.config.config import read_config
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

TASK = "text-generation"
ADAPTER = "orders"
KEYS = ("item", "quantity", "city")
MAX_NEW_TOKENS = 32
"""The longest of the right answers has 26."""
SHOWN = 8
COMPARED = 4
"""Prompts that are decoded by both runtimes and compared token by token."""
BATCH = 20
"""Prompts that are answered together when answers are counted."""


def run(base: Path, source: str, out: Path, say: Say) -> dict[str, Any]:
    """The whole line for ``base``; everything that is made lies under ``out``. Returns what was measured."""
    stage = Stages(say)
    path = out / "packs" / ADAPTER
    with stage(f"train {ADAPTER}"):
        configs, _ = read_config(
            {
                "model_name_or_path": str(base),
                "task": TASK,
                "name": ADAPTER,
                "output_dir": str(path),
                "train_file": str(data_file(ADAPTER, "train")),
                "method": "lora",
                "r": 8,
                "alpha": 16,
                "targets": "all-linear",
                "learning_rate": 2e-3,
                "lr_scheduler_type": "cosine",
                "num_train_epochs": 0.3,
                "per_device_train_batch_size": 2,
                "max_length": 160,
                "group_by_length": True,
                "seed": 0,
            }
        )
        model = train_one(configs[0])[1].eval()
    with stage("validate"):
        require_valid({ADAPTER: path}, base)
    bundle = out / "bundles" / "bank"
    with stage("export bank"):
        exported = export(base, [path], bundle, mode="bank", in_place=True)
    rows = rows_of(ADAPTER, "test")
    with stage("generate through ONNX Runtime"):
        asked = [{"prompt": row["prompt"], "adapter": name} for name in (None, ADAPTER) for row in rows]
        answers = [
            one["completion"]
            for one in answer_rows(bundle, asked, batch_size=BATCH, max_new_tokens=MAX_NEW_TOKENS)
        ]
        before, after = answers[: len(rows)], answers[len(rows) :]
    expected = [json.loads(row["completion"]) for row in rows]
    with stage("compare with torch"):
        agreement = _agreement(Session(bundle), model, [row["prompt"] for row in rows[:COMPARED]])
    with stage("serve"):
        conversation = _served(bundle, rows[0]["prompt"])
    return {
        "variant": "causal-lm",
        "model": model_facts(base, source),
        "exact_match": {"before": _exact(before, expected), "after": _exact(after, expected), "n": len(rows)},
        "valid_json": {"before": _valid(before), "after": _valid(after)},
        **agreement,
        "examples": [
            {"prompt": row["prompt"], "expected": row["completion"], "base": plain, "adapter": adapted}
            for row, plain, adapted in list(zip(rows, before, after, strict=True))[:SHOWN]
        ],
        "served": conversation,
        "parity": {name: {"max_abs": error} for name, error in exported.parity["max_abs"].items()},
        "sizes": {
            "base checkpoint": folder_size(base),
            f"pack {ADAPTER}": folder_size(path),
            "bundle bank": folder_size(bundle),
        },
        "timings": stage.timings,
        "paths": {"pack": f"packs/{ADAPTER}", "bundle": "bundles/bank"},
        "training": {ADAPTER: training_facts(load(path))},
    }


def _served(bundle: Path, prompt: str) -> dict[str, Any]:
    """What the server says to a conversation, without the adapter and with it."""
    rows = []
    with served(bundle, options=("--name", "base", "--sampling", "greedy")) as client:
        for name in ("base", ADAPTER):
            messages = [{"role": "user", "content": prompt}]
            answer = client.post(
                "/v1/chat/completions", {"model": name, "messages": messages, "max_tokens": MAX_NEW_TOKENS}
            )
            rows.append(
                {
                    "text": prompt,
                    "adapter": answer["adapterpack"]["adapter"],
                    "answer": answer["choices"][0]["message"]["content"],
                    "digest": answer["adapterpack"]["digest"],
                }
            )
    return {"client": client.name, "rows": rows}


def _agreement(session: Session, model: Any, prompts: list[str]) -> dict[str, Any]:
    """Greedy decoding of the same prompts by both runtimes, with the adapter and without: tokens compared,
    and tokens per second.
    """
    same = total = 0
    speed: dict[str, Any] = {}
    for name in (None, ADAPTER):
        active(model, name)
        started = time.perf_counter()
        ours = session.generate(prompts, name, max_new_tokens=MAX_NEW_TOKENS)
        middle = time.perf_counter()
        theirs = _torch_greedy(session, model, prompts)
        ended = time.perf_counter()
        for answer, reference in zip(ours, theirs, strict=True):
            total += max(len(answer.ids), len(reference))
            same += sum(a == b for a, b in zip(answer.ids, reference, strict=False))
        speed = {  # the last round, with the adapter, is the one that is reported
            "onnx": {
                "tokens_per_second": round(sum(len(answer.ids) for answer in ours) / (middle - started), 2),
                "batch": len(prompts),
            },
            "torch": {
                "tokens_per_second": round(sum(map(len, theirs)) / (ended - middle), 2),
                "batch": len(prompts),
            },
        }
    speed["ratio"] = round(speed["onnx"]["tokens_per_second"] / speed["torch"]["tokens_per_second"], 3)
    return {"token_agreement": same / total, "tokens_compared": total, "speed": speed}


def _torch_greedy(session: Session, model: Any, prompts: list[str]) -> list[tuple[int, ...]]:
    """The new token ids of each prompt by ``generate`` in torch, end token left out."""
    tokenizer = session.tokenizer
    batch = pad([tokenizer.prompt(prompt) for prompt in prompts], tokenizer.pad_id, left=True)
    with torch.no_grad():
        output = model.generate(
            **{key: torch.from_numpy(value) for key, value in batch.items()},
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_id,
            eos_token_id=sorted(tokenizer.eos_ids),
        )
    rows = output[:, batch["input_ids"].shape[1] :].tolist()
    return [
        tuple(row[: next((at for at, token in enumerate(row) if token in tokenizer.eos_ids), len(row))])
        for row in rows
    ]


def _parsed(answer: str) -> Any:
    try:
        return json.loads(answer)
    except ValueError:
        return None


def _valid(answers: list[str]) -> float:
    """The share of answers that are one JSON object with exactly the three keys."""
    return sum(
        isinstance(value := _parsed(answer), dict) and tuple(value) == KEYS for answer in answers
    ) / len(answers)


def _exact(answers: list[str], expected: list[Any]) -> float:
    """The share of answers whose JSON is the expected one, in every value."""
    return sum(bool(_parsed(answer) == truth) for answer, truth in zip(answers, expected, strict=True)) / len(
        answers
    )
