"""The many small tasks of `fleet.py`: which of two words a text has, asked two hundred times over the texts
of the examples.

As in `merging_tasks.py` the model is MiniLM, whose first four layers are computed once, and a task's head is
fixed before its adapter is trained: the cosines with the mean of a few rows of each class. Only adapters are
learnt.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import transformers
from merging_tasks import (
    DATA,
    INNER,
    LAYERS,
    Head,
    Inputs,
    Suite,
    Task,
    _after,
    _prototypes,
    divided,
    task_of,
)

import adapterpack
from adapterpack.demos import MINILM, fetch

TOKENS = 16
"""Of each text; what a question asks is in them."""
SOURCES = ("tickets", "reviews", "orders")
BALANCE = (0.25, 0.75)
"""The share of rows that a question's answer may be yes for."""


def asked(rows: list[set[int]], count: int, seed: int) -> list[np.ndarray]:
    """``count`` questions: whether a row has either of two tokens; drawn from the pairs whose answers are
    balanced.
    """
    common = [
        token
        for token, times in Counter(token for row in rows for token in row).most_common(160)
        if times < 0.6 * len(rows)
    ]
    has = {token: np.array([token in row for row in rows]) for token in common}
    pairs = [
        pair
        for pair in combinations(common, 2)
        if BALANCE[0] <= (has[pair[0]] | has[pair[1]]).mean() <= BALANCE[1]
    ]
    chosen = np.random.default_rng(seed).permutation(len(pairs))[:count]
    return [has[pairs[place][0]] | has[pairs[place][1]] for place in chosen]


def fleet(count: int, rank: int = 16, steps: int = 40, seed: int = 0) -> Suite:
    """``count`` tasks over the texts of the examples, in equal parts."""
    base = fetch(MINILM)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModel.from_pretrained(base).eval()
    tasks: list[Task] = []
    heads: dict[str, Head] = {}
    for number, source in enumerate(SOURCES):
        lines = [
            json.loads(line)
            for part in ("train", "test")
            for line in (DATA / f"{source}.{part}.jsonl").read_text().splitlines()
        ]
        texts = [row["text"] if "text" in row else row["prompt"].partition("\n\n")[2] for row in lines]
        encoded = tokenizer(
            texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        with torch.no_grad():
            states = model(**encoded, output_hidden_states=True).hidden_states[LAYERS[0]]
        inputs: Inputs = (states, encoded["attention_mask"])
        parts = divided(inputs, seed, (0.6, 0.1))
        rows = [set(row) - set(tokenizer.all_special_ids) for row in encoded["input_ids"].tolist()]
        share = count // len(SOURCES) + (number < count % len(SOURCES))
        for place, answers in enumerate(asked(rows, share, seed)):
            name = f"{source}-{place:03d}"
            tasks.append(task_of(name, parts, torch.tensor(answers.astype(np.int64))))
            heads[name] = _prototypes(_after, model, tasks[-1].train)
    targets = tuple(f"encoder.layer.{layer}.{inner}" for layer in LAYERS for inner in INNER)
    return Suite("fleet", base, tasks, model, _after, heads, targets, rank, steps, 3e-3)


def trained(suite: Suite, keep: Path, seeds: bool = False) -> list[adapterpack.Pack]:
    """The adapters of all tasks, from the folder where they are there already; with ``seeds`` each begins at
    other random numbers.
    """
    found = []
    for number, task in enumerate(suite.tasks):
        folder = keep / task.name
        found.append(
            adapterpack.load(folder)
            if folder.exists()
            else suite.train(task, 1000 + number if seeds else 0, folder, batch=16)
        )
    return found
