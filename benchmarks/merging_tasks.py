"""The two suites of `merging_quality.py`: eight small tasks each over one pretrained base, and how an adapter
of one is trained.

As in the protocol of KnOTS (arXiv 2410.19735) a task's head is fixed before its adapter is trained, so that
adapters alone are merged, and the base has some idea of every task without them. There heads are CLIP's text
embeddings of the names of classes; here they are the mean embeddings, by the base, of a few rows of each
class.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch.nn import functional

import adapterpack
from adapterpack.demos import MINILM, fetch

DATA = Path(__file__).parents[1] / "examples" / "data"
Inputs = tuple[torch.Tensor, ...]
Head = Callable[[torch.Tensor], torch.Tensor]
"""Logits of features."""


class Split(NamedTuple):
    """Some rows of a task: inputs whose first axis is the row, and labels."""

    inputs: Inputs
    labels: torch.Tensor

    def rows(self, chosen: torch.Tensor) -> Split:
        """These rows."""
        return Split(tuple(value[chosen] for value in self.inputs), self.labels[chosen])


class Task(NamedTuple):
    """A task by name with its three splits: what is learnt from, what coefficients are chosen by, and what is
    reported.
    """

    name: str
    train: Split
    val: Split
    test: Split


def divided(inputs: Inputs, seed: int, parts: tuple[float, float]) -> list[tuple[torch.Tensor, Inputs]]:
    """The rows for training, validation and test, dealt out at random: which they are, and their inputs."""
    count = len(inputs[0])
    ends = np.cumsum([int(part * count) for part in parts]).tolist()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    return [(rows, tuple(value[rows] for value in inputs)) for rows in torch.tensor_split(order, ends)]


def task_of(name: str, parts: list[tuple[torch.Tensor, Inputs]], labels: torch.Tensor) -> Task:
    """A task of such rows."""
    return Task(name, *(Split(inputs, labels[rows]) for rows, inputs in parts))


@dataclass
class Suite:
    """Tasks over one base: ``features`` are ``[N, d]`` of the backbone, and ``targets`` the layers that
    adapters change.
    """

    name: str
    base: Path
    tasks: list[Task]
    model: Any
    features: Callable[[Any, Inputs], torch.Tensor]
    heads: dict[str, Head]
    targets: tuple[str, ...]
    rank: int
    steps: int
    rate: float

    def _all(self, model: Any, inputs: Inputs) -> torch.Tensor:
        with torch.no_grad():
            return self.features(model, inputs)

    def accuracies(self, model: Any, part: str) -> dict[str, float]:
        """Of the model on ``val`` or ``test`` of every task; tasks that ask of the same rows share their
        features.
        """
        features: dict[int, torch.Tensor] = {}
        found = {}
        for task in self.tasks:
            split: Split = getattr(task, part)
            if id(split.inputs) not in features:
                features[id(split.inputs)] = self._all(model, split.inputs)
            found[task.name] = float(
                (self.heads[task.name](features[id(split.inputs)]).argmax(dim=1) == split.labels)
                .float()
                .mean()
            )
        return found

    def train(self, task: Task, seed: int, out: Path, batch: int = 32) -> adapterpack.Pack:
        """A LoRA of the task, written to ``out``; every step takes ``batch`` rows."""
        model = copy.deepcopy(self.model)
        adapterpack.adapt(
            model, adapterpack.LoRA(r=self.rank, alpha=2 * self.rank, targets=self.targets), seed=seed
        )
        rng = torch.Generator().manual_seed(seed)
        trained = [value for value in model.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(trained, self.rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, self.steps)
        for _ in range(self.steps):
            rows = task.train.rows(torch.randint(len(task.train.labels), (batch,), generator=rng))
            optimizer.zero_grad()
            functional.cross_entropy(
                self.heads[task.name](self.features(model, rows.inputs)), rows.labels
            ).backward()
            optimizer.step()
            schedule.step()
        return adapterpack.save(model, out, base=self.base, name=task.name)


# The digits of scikit-learn in eight colours, under one view each, and a small vision transformer that knows
# digits of any colour.

PRETRAINING, ROWS = 800, 900
"""Steps, and the rows that the base is made from; the others are the tasks'."""
CHECKERED = torch.tensor([[float((i + j) % 2) for j in range(8)] for i in range(8)])
STRIPES = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 0])[:, None]


class View(NamedTuple):
    """What a task does to digits ``[N, 8, 8]`` of ink 0 to 1, and its colours (red, green, blue; 0 is dark
    paper, 1 light ink).
    """

    changed: Callable[[torch.Tensor], torch.Tensor]
    colour: tuple[float, float, float]

    def images(self, ink: torch.Tensor) -> torch.Tensor:
        """``[N, 3, 8, 8]``."""
        paper = (torch.tensor(self.colour) - 1)[:, None, None]
        return painted(self.changed(ink), paper, paper + 1)


def painted(ink: torch.Tensor, paper: torch.Tensor, light: torch.Tensor) -> torch.Tensor:
    """Digits in the colour ``light`` on ``paper``, ``[3, 1, 1]`` each or one for every row."""
    return paper * (1 - ink[:, None]) + light * ink[:, None]


VIEWS = {
    "rotated": View(lambda x: torch.rot90(x, 1, (-2, -1)), (1, 0, 0)),
    "upside_down": View(lambda x: x.flip(-2), (0, 0, 1)),
    "mirrored": View(lambda x: x.flip(-1), (0, 1, 0)),
    "transposed": View(lambda x: x.transpose(-2, -1), (1, 1, 0)),
    "halves": View(lambda x: x.roll(4, -2), (1, 0, 1)),
    "rolled": View(lambda x: x.roll(4, -1), (0, 1, 1)),
    "checkered": View(lambda x: (x - CHECKERED).abs(), (0, 0, 0)),
    "striped": View(lambda x: x * STRIPES, (1, 1, 1)),
}
"""A colour tells the tasks apart at sight, as CLIP's eight data sets are, so that one network can hold all of
them.
"""


def ink_of(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The digits ``[N, 8, 8]`` with ink from 0 to 1 in the order of a seed, and their labels."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    order = np.random.default_rng(seed).permutation(len(raw.images))
    return torch.tensor(raw.images[order] / 16, dtype=torch.float32), torch.tensor(raw.target[order])


def digits(seed: int, folder: Path) -> Suite:
    """The suite of images, dealt out anew by every seed."""
    ink, labels = ink_of(seed)
    if not folder.exists():
        pretrained(ink[:ROWS], labels[:ROWS], seed)[0].save_pretrained(folder)
    model = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    tasks = [
        task_of(name, divided((view.images(ink[ROWS:]),), seed, (0.5, 0.2)), labels[ROWS:])
        for name, view in VIEWS.items()
    ]
    heads = {task.name: _prototypes(_first_token, model, task.train) for task in tasks}
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
    return Suite("digits", folder, tasks, model, _first_token, heads, targets, 4, 200, 2e-3)


def _first_token(model: Any, inputs: Inputs) -> torch.Tensor:
    found: torch.Tensor = model(pixel_values=inputs[0]).last_hidden_state[:, 0]
    return found


def vision_transformer(**sizes: int) -> Any:
    """A small one with random weights, 128 wide and four layers deep unless ``sizes`` say otherwise."""
    wanted = {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 256} | sizes
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=3,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **wanted,
    )
    return transformers.ViTModel(config, add_pooling_layer=False)


def pretrained(
    ink: torch.Tensor,
    labels: torch.Tensor,
    seed: int,
    start: tuple[Any, Any] | None = None,
    steps: int = PRETRAINING,
    rate: float = 2e-3,
) -> tuple[Any, Any]:
    """A vision transformer that tells upright digits of any colour apart, shifted by up to one pixel and with
    a little noise, and its head; with ``start`` these are trained further.
    """
    torch.manual_seed(seed)
    model = vision_transformer() if start is None else start[0]
    head = torch.nn.Linear(model.config.hidden_size, 10) if start is None else start[1]
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for _ in range(steps):
        chosen = torch.randint(len(ink), (64,))
        x = ink[chosen].roll(tuple(torch.randint(-1, 2, (2,)).tolist()), (-2, -1))
        paper, light = torch.rand(2, len(x), 3, 1, 1)
        images = painted(x, paper - 1, light) + 0.05 * torch.randn(len(x), 3, 8, 8)
        optimizer.zero_grad()
        functional.cross_entropy(head(_first_token(model, (images,))), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    return model, head


# Eight questions about the texts of the examples, and the sentence encoder MiniLM.

LAYERS = (4, 5)
"""The layers that are adapted; what the ones before make of a text is computed once."""
INNER = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
KINDS = ("account", "billing", "delivery", "product", "returns", "technical")
FIRST_PERSON, NEGATED = (
    {"i", "my", "me", "mine", "we", "our"},
    ("not", "n't", "never", "no ", "nobody", "nothing"),
)
QUESTIONS: dict[str, tuple[str, Callable[[dict[str, Any], float], int]]] = {
    "tickets": ("tickets", lambda row, _: KINDS.index(row["label"])),
    "reviews": ("reviews", lambda row, _: int(row["label"] == "positive")),
    "question": ("tickets", lambda row, _: int("?" in row["text"])),
    "number": ("tickets", lambda row, _: int(any(letter.isdigit() for letter in row["text"]))),
    "long": ("tickets", lambda row, median: int(len(row["text"]) > median)),
    "person": (
        "reviews",
        lambda row, _: int(bool(FIRST_PERSON & set(row["text"].lower().replace("'", " ").split()))),
    ),
    "negated": ("reviews", lambda row, _: int(any(word in row["text"].lower() for word in NEGATED))),
    "many": ("orders", lambda row, _: int(json.loads(row["completion"])["quantity"] >= 40)),
}
"""By name the texts that a question is about, and its answer for a row and the median length of the texts."""


def texts(seed: int, folder: Path) -> Suite:
    """The suite of texts: training and test files together, dealt out anew by every seed."""
    base = fetch(MINILM)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModel.from_pretrained(base).eval()
    tasks: list[Task] = []
    heads: dict[str, Head] = {}
    held: dict[str, list[tuple[torch.Tensor, Inputs]]] = {}
    for name, (source, answer) in QUESTIONS.items():
        rows = [
            json.loads(line)
            for part in ("train", "test")
            for line in (DATA / f"{source}.{part}.jsonl").read_text().splitlines()
        ]
        strings = [row["text"] if "text" in row else row["prompt"].partition("\n\n")[2] for row in rows]
        median = float(np.median([len(text) for text in strings]))
        if source not in held:
            held[source] = divided(_before(model, tokenizer, strings), seed, (0.6, 0.15))
        tasks.append(task_of(name, held[source], torch.tensor([answer(row, median) for row in rows])))
        heads[name] = _prototypes(_after, model, tasks[-1].train)
    targets = tuple(f"encoder.layer.{layer}.{inner}" for layer in LAYERS for inner in INNER)
    return Suite("texts", base, tasks, model, _after, heads, targets, 4, 100, 2e-3)


def _prototypes(features: Callable[[Any, Inputs], torch.Tensor], model: Any, train: Split) -> Head:
    """Cosines with the mean of the first eight rows of each class, sharpened as CLIP's are."""
    with torch.no_grad():
        means = torch.stack(
            [
                features(model, train.rows(torch.nonzero(train.labels == label)[:8, 0]).inputs).mean(dim=0)
                for label in range(int(train.labels.max()) + 1)
            ]
        )
    center = means.mean(dim=0)
    means = functional.normalize(means - center)
    return lambda features: 20 * functional.normalize(features - center) @ means.T


def _before(model: Any, tokenizer: Any, strings: list[str]) -> Inputs:
    """The hidden states before the adapted layers, and the mask."""
    encoded = tokenizer(strings, padding="max_length", truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        states = model(**encoded, output_hidden_states=True).hidden_states[LAYERS[0]]
    return states, encoded["attention_mask"]


def _after(model: Any, inputs: Inputs) -> torch.Tensor:
    """The mean over the tokens after the adapted layers."""
    states, mask = inputs
    hidden = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
    for layer in LAYERS:
        made = model.encoder.layer[layer](states, hidden)
        states = made[0] if isinstance(made, tuple) else made
    return (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


SUITES: dict[str, Callable[[int, Path], Suite]] = {"digits": digits, "texts": texts}
