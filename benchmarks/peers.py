"""The two sides of `methods.py`: one small real task, a model with adapterpack's adapter, and one with PEFT's
of the same method.

PEFT starts from the folder that adapterpack wrote: the same tensors, the same hyper-parameters. It loads no
prompts for training, and a few methods have no folder that it could read: there it makes its own, of the same
sizes.
"""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from adapterpack import adapt, save
from adapterpack.adapter_methods import Method
from adapterpack.demos import MINILM, fetch
from adapterpack.tasks import text_classification
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.models.load import load_model
from adapterpack.training.data import load as data

DATA = Path(__file__).parents[1] / "examples" / "data"
RATES = {"weight": 5e-3, "activation": 1e-2, "prompt": 1e-2, "attention": 1e-2}
"""The learning rate by kind of method; both implementations have the same."""
RATES_APART = {
    **dict.fromkeys(("bat", "deft", "miss", "shira"), 1e-3),  # every number moves a weight as it is
    # few numbers
    **dict.fromkeys(
        ("beft", "c3a", "fourierft", "ia3", "ln_tuning", "road", "unilora", "vera", "waveft"), 3e-2
    ),
}
"""Methods that learn at another rate of the same order that their papers use; none is tuned further."""
HEAD_RATE = 1e-2
HEAD = "classifier"
TOKENS = 20
"""The length of prompts."""
OPTIONS: dict[str, dict[str, Any]] = {
    "vblora": {"vector_length": 128},  # PEFT wants a length that divides all widths: 384 and 1536
    "tinylora": {"save_factors": True},  # else there is no file that PEFT reads
    "trainable_tokens": {"token_indices": tuple(range(2000, 2032)), "targets": ("word_embeddings",)},
    "cartridge": {"token_ids": tuple(range(2000, 2000 + TOKENS))},
    "cpt": {"token_ids": tuple(range(2000, 2000 + TOKENS))},
    # the first token of every row
    "alora": {"alora_invocation_tokens": (101,), "targets": ("query", "key", "value")},
}
"""What a method is told beside its defaults."""

Batch = dict[str, torch.Tensor]
Side = tuple[Any, Callable[[Batch], Batch]]
"""A model, and what its batches have beside those of the task."""


class MeanClassifier(transformers.BertForSequenceClassification):  # type: ignore[misc]
    """A classifier of the mean over the tokens' last states.

    ``virtual`` states at the front are a prompt's, which PEFT leaves to the model; adapterpack takes them
    away before the head.
    """

    virtual = 0

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        **others: Any,
    ) -> Any:
        """Logits ``[batch, labels]`` and the loss."""
        states = self.bert(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **others
        ).last_hidden_state
        states = states[:, self.virtual :]
        mask = (
            torch.ones(states.shape[:2]) if attention_mask is None else attention_mask[:, -states.shape[1] :]
        )
        logits = self.classifier((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return transformers.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)


class Task:
    """The support tickets of the examples (6 classes) on MiniLM: the encoded rows and the base.

    ``layers`` leaves the first ones of the model's six, ``tokens`` of each row's: what is cut trains in a
    fraction of the time.
    """

    def __init__(self, layers: int | None = None, tokens: int = 64) -> None:
        self.base = fetch(MINILM)
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.base)
        self.cut = layers is not None
        if layers is not None:
            self._scratch = tempfile.TemporaryDirectory()
            transformers.AutoModel.from_pretrained(self.base, num_hidden_layers=layers).save_pretrained(
                self._scratch.name
            )
            self.base = Path(self._scratch.name)
        train, test = (data.load_rows(str(DATA / f"tickets.{part}.jsonl")) for part in ("train", "test"))
        self.labels = data.labels_in(train, "tickets")
        self.train, self.test = (
            text_classification.encode(rows, tokenizer, tokens, "tickets", self.labels)
            for rows in (train, test)
        )
        self.collate = data.Collator(tokenizer.pad_token_id)

    def model(self) -> Any:
        """A classifier; of a cut model one of the mean over the tokens, as the model is meant to be used: its
        head learns at once.
        """
        if not self.cut:
            return load_model(get_task("text-classification"), self.base, self.labels)
        return MeanClassifier.from_pretrained(self.base, num_labels=len(self.labels))

    def batches(self, seed: int, size: int) -> Iterable[Batch]:
        order = np.random.default_rng(seed).permutation(len(self.train))
        return (
            self.collate([self.train[i] for i in order[start : start + size]])
            for start in range(0, len(order), size)
        )

    def accuracy(self, side: Side) -> float:
        model, completed = side
        model.eval()
        right = 0
        with torch.no_grad():
            for start in range(0, len(self.test), 60):
                batch = self.collate(self.test[start : start + 60])
                right += int((model(**completed(batch)).logits.argmax(-1) == batch["labels"]).sum())
        model.train()
        return right / len(self.test)


def ours(task: Task, method: Method, seed: int) -> Any:
    transformers.set_seed(seed)
    config = dataclasses.replace(method.config(**OPTIONS.get(method.name, {})), modules_to_save=(HEAD,))
    return adapt(task.model(), config, "bench", seed).train()


def theirs(task: Task, method: Method, seed: int) -> Side:
    """PEFT's side.

    Raises:
        ValueError: PEFT has no such method, or cannot train it on this model.
    """
    import peft

    make = _THEIRS.get(method.name)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if make is not None:
            return _made(task, method, seed, make(peft)).train(), _COMPLETED.get(
                method.name, lambda batch: batch
            )
        folder = Path(scratch) / "pack"
        save(ours(task, method, seed), folder, base=task.base)
        if not (folder / "adapter_config.json").is_file():
            raise ValueError("PEFT has no such method")
        transformers.set_seed(seed)
        made = peft.PeftModel.from_pretrained(task.model(), str(folder), is_trainable=True).train()
        for name, value in made.named_parameters():
            # not every config of PEFT can name a head to train
            if f"{HEAD}.{name.rpartition('.')[2]}" in name:
                value.requires_grad_()
        return made, _COMPLETED.get(method.name, lambda batch: batch)


def _made(task: Task, method: Method, seed: int, config: Any) -> Any:
    """PEFT's model of a config; a prompt begins where adapterpack's does, and its states do not reach the
    head.
    """
    import peft

    transformers.set_seed(seed)
    model = task.model()
    made = peft.get_peft_model(model, config)
    if method.kind == "prompt":
        model.virtual = TOKENS
        start = {
            name.rpartition(".")[2]: value
            for name, value in ours(task, method, seed).named_parameters()
            if value.requires_grad
        }
        with torch.no_grad():
            for name, value in made.prompt_encoder.named_parameters():
                value.copy_(start[_start(name)])
    return made


def _start(name: str) -> str:
    """PEFT's name of a prompt's parameter -> adapterpack's."""
    *_, module, leaf = name.split(".")
    if leaf in {"weight", "bias"}:
        return "prompt_embeddings" if module == "embedding" else f"mlp_{int(module) // 2}_{leaf}"
    return leaf


_PROMPT = {"task_type": "SEQ_CLS", "num_virtual_tokens": TOKENS}
_THEIRS: dict[str, Callable[[Any], Any]] = {
    "prompt_tuning": lambda peft: peft.PromptTuningConfig(**_PROMPT),
    "p_tuning": lambda peft: peft.PromptEncoderConfig(**_PROMPT),
    "prefix_tuning": lambda peft: peft.PrefixTuningConfig(**_PROMPT),
    "multitask_prompt_tuning": lambda peft: peft.MultitaskPromptTuningConfig(
        **_PROMPT, num_tasks=1, num_ranks=1
    ),
    "cpt": lambda peft: peft.CPTConfig(**_PROMPT, cpt_token_ids=list(OPTIONS["cpt"]["token_ids"])),
    "psoft": lambda peft: peft.PsoftConfig(r=32, target_modules="all-linear", modules_to_save=[HEAD]),
}
"""Configurations with adapterpack's defaults, where PEFT cannot train on from a folder."""
_COMPLETED: dict[str, Callable[[Batch], Batch]] = {
    "multitask_prompt_tuning": lambda batch: {
        **batch,
        "task_ids": torch.zeros(len(batch["input_ids"]), dtype=torch.int64),
    },
    # of language models alone
    "alora": lambda batch: {
        **batch,
        "alora_offsets": [batch["input_ids"].shape[1]] * len(batch["input_ids"]),
    },
}


def side(who: str, task: Task, method: Method, seed: int) -> Side:
    """One of the two by name."""
    return (
        (ours(task, method, seed), lambda batch: batch)
        if who == "adapterpack"
        else theirs(task, method, seed)
    )


def stepper(made: Side, rate: float, steps: int | None = None) -> Callable[[Batch], float]:
    """A function that takes one step, forward, backward and AdamW, and returns its loss.

    The head has a rate of its own. With ``steps`` the rates rise over a tenth of them, and fall to nothing
    over the others.
    """
    model, completed = made
    wanting = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    head, adapter = (
        [value for name, value in wanting if (HEAD in name) is of_head] for of_head in (True, False)
    )
    optimizer = torch.optim.AdamW(
        [{"params": head, "lr": HEAD_RATE if rate else 0.0}, {"params": adapter, "lr": rate}],
        weight_decay=0.0,
    )
    rise = max(1, (steps or 0) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: 1.0 if steps is None else min((step + 1) / rise, (steps - step) / (steps - rise)),
    )

    def step(batch: Batch) -> float:
        loss = model(**completed(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        return float(loss.detach())

    return step


def trained(task: Task, method: Method, who: str, seed: int, epochs: int, size: int) -> Side:
    """A side after so many epochs in batches of ``size``."""
    made = side(who, task, method, seed)
    step = stepper(made, rate_of(method), epochs * -(-len(task.train) // size))
    for epoch in range(epochs):
        for batch in task.batches(1000 * seed + epoch, size):
            step(batch)
    return made


def rate_of(method: Method) -> float:
    """The learning rate."""
    return RATES_APART.get(method.name, RATES[method.kind])
