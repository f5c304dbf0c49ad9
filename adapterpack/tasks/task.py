"""Defines a task (:class:`Task`) and the registry of tasks by their Hugging Face pipeline names; each file of
this folder registers its own.

Every stage asks the task: training for the class, its heads and its data, frontends for the graphs, parity
checks for example inputs, and sessions for the inputs and the answer to a row. Another package provides a
task through an entry point of the group ``adapterpack.tasks``.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np

from ..errors import Unsupported, require_among
from ..io import Config
from ..registry import Registry
from .data import LABEL_COLUMNS, Encoded, Result, Row
from .data.problems import IGNORED as IGNORED  # noqa: PLC0414 - a name of this module too
from .one_pass import OnePass
from .session import Arrays, TaskSession
from .sounds import SOUNDS

MAIN = "model"
"""The name of the graph that computes a task's answer."""

TEXT = ("input_ids", "attention_mask")
SOUND = (*SOUNDS, "attention_mask")
DECODER = (*TEXT, "position_ids", "past_key_values")
HEADS = ("classifier", "score")
"""The names of a classifier's head in transformers."""

AXES: dict[str, tuple[str | None, ...]] = {
    "input_ids": ("batch", "sequence"),
    "attention_mask": ("batch", "sequence"),
    "token_type_ids": ("batch", "sequence"),
    "position_ids": ("batch", "sequence"),
    "pixel_values": ("batch", None, None, None),
    "input_features": ("batch", None, None),
    "input_values": ("batch", None),
    "decoder_input_ids": ("batch", "sequence"),
    "patch_positions": ("patches", None),
    "pixel_position_ids": ("patches", None),
    "patch_windows": ("patches",),
    "window_order": ("features",),
    "table_places": ("patches", None),
    "table_weights": ("patches", None),
    "image_features": ("batch", "image_positions", None),
    "position_offsets": ("batch", "sequence", None),
    "past_key_values": ("batch", None, "past", None),
    "indexer_key": ("batch", "past", None),
    "encoder": ("batch", None, "source", None),
    "virtual": ("batch", "virtual", None),
    "virtual_here": ("batch", "virtual"),
    "virtual_cut": ("batch", "virtual"),
}
"""Input -> the names of its axes; an unnamed axis has the model's size. ``past_key_values`` and ``encoder``
are families, followed by ``<layer>.key`` and the like; other members than keys and values stand by their own
name, or have a fixed size. The last three exist only while a graph with room for
a prompt is traced; afterwards they are slots, which slots/prompt_rows.py explains.
"""

ANY_SIZE: dict[str, tuple[str | None, ...]] = {"pixel_values": ("batch", None, "height", "width")}
"""The axes of images whose size depends on the picture, for models that take any."""

SPANS = ("start_logits", "end_logits")
"""Outputs with one number per position: how well a span begins there, and how well it ends there."""

GRID = (
    "patch_positions",
    "pixel_position_ids",
    "patch_windows",
    "window_order",
    "table_places",
    "table_weights",
)
"""What a vision part reads of the grid of an image's patches."""
_SUPPLIED = frozenset(
    {"position_ids", *GRID, "image_features", "position_offsets", "past_key_values", "encoder"}
)
"""Inputs that a session or an earlier part supplies."""

_AT_ONCE = frozenset({"plain", "encoder"})
"""Forms of graphs that read a row in one pass."""

Answer = Callable[[TaskSession, Sequence[Row], Sequence[str | None], Mapping[str, Any]], list[Result]]
"""(session, rows, adapter of each row, sampling parameters) -> the result for each row."""
Encode = Callable[[Any, Any, int, object, Any], list[Encoded]]
"""(rows of data, tokenizer, maximum number of tokens, source of the rows, :class:`.problems.Labels` if the
task has labels) -> token ids and targets of each row that can be learned.
"""
Example = Callable[[Any, Arrays, np.random.Generator], Arrays]
"""(the model's config, the example so far, random generator) -> inputs that no other task has."""


@dataclass(frozen=True)
class Part:
    """One graph of a task.

    ``form`` is the torch module that computes it: a name in ``exporting/tracing/torch_parts.py``, or
    ``module:class`` in another package. ``inputs`` come from the caller or from earlier parts; ``axes``
    describes inputs that :data:`AXES` does not contain. A caller that omits an ``optional`` input gets zeros
    for it.
    """

    name: str
    form: str
    inputs: tuple[str, ...]
    axes: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    optional: tuple[str, ...] = ()

    def axes_of(self, name: str) -> tuple[str | None, ...]:
        """Returns the names of an input's axes; of a state of fixed size, only the first."""
        family, _, member = name.partition(".")
        kept = member.rpartition(".")[2]
        if kept not in {"", "key", "value"}:
            return AXES.get(kept, ("batch",))
        return self.axes.get(family) or AXES[family]

    def first(self, present: Container[str]) -> str:
        """Returns the input that the part begins with; of the inputs for sound, the one that is
        ``present``.
        """
        return next((name for name in SOUNDS if name in self.inputs and name in present), self.inputs[0])


REREADS = "rereading_decoder"
"""The form of a decoder that reads all tokens of a row at each step."""


@dataclass(frozen=True, eq=False)
class TaskTraining:
    """How to train a task. ``encode`` turns data into token ids and ``targets``.

    ``metrics`` compares outputs with targets, and of a labelled task gets the ``names`` of the labels, too;
    where a labelled task has none, the problem compares.
    Where ``judged`` is false, nothing does: only the loss is known.
    ``label_columns`` are the columns in which a labelled task finds the label of a row or, with ``parts``, of
    each of its parts: ``parts`` makes a list of labels of the column's value. Rows are read with the base's
    tokenizer or, if ``reads`` is ``media``, also with processors for pictures and speech; ``constants`` are
    further inputs of each batch. ``adapted`` is the default of a configuration's ``targets``: layers that the
    runtime of the task can change.
    """

    encode: Encode
    targets: tuple[str, ...] = ("labels",)
    metrics: Callable[..., Mapping[str, float]] | None = None
    label_columns: tuple[str, ...] = LABEL_COLUMNS
    parts: Callable[[Any], Any] | None = None
    judged: bool = True
    reads: str = "tokenizer"
    constants: Mapping[str, Any] = field(default_factory=dict)
    adapted: str | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """One task: its graphs, and what each stage needs to know about it.

    Args:
        name: the Hugging Face Hub's name, or another name of that form.
        auto_class: the class of transformers that loads its models.
        answer: computes the results for rows; a :class:`.OnePass` if each row takes one independent pass.
        suffixes: endings of the names of its model classes; a task without suffixes must be named explicitly.
        recognizes: a model's config -> whether a class with such a name belongs to the task; None accepts
            every class that no more specific task takes.
        parts: its graphs in the order in which they run; the last one computes the answer.
        heads: the names of modules that its models add to a base; they are trained in full.
        labelled: its outputs are one logit for each of a set of labels.
        config: settings of its models' config that replace the base's.
        columns: columns of its rows that no other task has -> the types of their values.
        prompt: returns the prompt of a row, if an answer needs nothing else of the row; otherwise None.
        training: how to train it; None if it cannot be trained.
        example: random inputs that no other task has, for tracing and testing its graphs.
        peft_type: PEFT's ``task_type``.
        aliases: other names of the task.
    """

    name: str
    auto_class: str
    answer: Answer | OnePass
    suffixes: tuple[str, ...] = ()
    recognizes: Callable[[Mapping[str, Any]], bool] | None = None
    parts: tuple[Part, ...] = (Part(MAIN, "plain", TEXT),)
    heads: tuple[str, ...] = ()
    labelled: bool = False
    config: Config = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)
    prompt: Callable[[Row], Any] | None = None
    training: TaskTraining | None = None
    example: Example | None = None
    peft_type: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def main(self) -> Part:
        """The part that computes the answer."""
        return self.parts[-1]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs that a caller supplies, in order: all inputs of all parts except those that an earlier
        part or the session supplies.
        """
        return tuple(
            name
            for name in dict.fromkeys(name for part in self.parts for name in part.inputs)
            if name not in _SUPPLIED
        )

    @property
    def generates(self) -> bool:
        """Whether answers are generated token by token with a KV cache."""
        return "past_key_values" in self.main.inputs

    @property
    def has_encoder(self) -> bool:
        """Whether the decoder attends to the output of an encoder."""
        return "encoder" in self.main.inputs

    @property
    def reads_at_once(self) -> bool:
        """Whether a graph reads all tokens of a row in one pass, so that virtual tokens can precede them."""
        return self.parts[0].form in _AT_ONCE and "input_ids" in self.parts[0].inputs

    @property
    def pads_left(self) -> bool:
        """Whether rows of different lengths are padded on the left, because generated tokens must follow a
        row's last token.
        """
        return self.generates and "input_ids" in self.main.inputs

    def fits(self, architecture: str, config: Config) -> bool:
        """Whether a model class with this config belongs to the task."""
        return architecture.endswith(self.suffixes) and (self.recognizes is None or self.recognizes(config))


TASKS = Registry("task", Task, "adapterpack.tasks", "adapterpack.tasks")
"""Name -> task."""


def require_chat(task: Task, where: object) -> None:
    """Checks that a model of this task answers messages: it reads texts and generates one.

    Raises:
        Unsupported: it does not.
    """

    def answers(one: Task) -> bool:
        return one.generates and "input_ids" in one.inputs

    if not answers(task):
        raise Unsupported(
            f"a model for {task.name} answers no messages",
            where=where,
            expected=", ".join(one.name for one in TASKS.values() if answers(one)),
            remedy="give it rows: adapterpack run",
        )


NO_TASK = "other"
"""The type of a pack without a task, by the Hub's name: a plain module, or a PEFT folder without a
``task_type``.
"""


def takes_ids(model: Any) -> bool:
    """Whether a torch model reads token ids."""
    return "input_ids" in signature(model.forward).parameters


def reads_types(model: Any) -> bool:
    """Whether a torch model distinguishes the two texts of a row by token types, and not only by a separator
    token.
    """
    return (
        "token_type_ids" in signature(model.forward).parameters
        and getattr(model.config, "type_vocab_size", 0) > 1
    )


def get_task(name: str) -> Task:
    """Returns the task with that name or alias.

    Raises:
        UnknownName: no task has that name.

    Example:
        >>> get_task("text-generation").auto_class, get_task("translation").name
        ('AutoModelForCausalLM', 'text2text-generation')
    """
    task = TASKS.find(name)
    if task is None:
        aliases = {alias: task for task in TASKS.values() for alias in task.aliases}
        require_among("unknown task", name, [*TASKS, *aliases])
        task = aliases[name]
    return task


def task_of(architecture: str, config: Config | None = None) -> Task:
    """Returns the task of a model class, from the end of the class name and from the config; feature
    extraction if nothing else fits.

    Example:
        >>> task_of("LlamaForCausalLM").name, task_of("GPT2LMHeadModel").name, task_of("BertModel").name
        ('text-generation', 'text-generation', 'feature-extraction')
        >>> task_of("T5ForConditionalGeneration", {"is_encoder_decoder": True}).name
        'text2text-generation'
    """
    return _fitting(architecture, config) or TASKS["feature-extraction"]


def type_of(architecture: str | None, config: Config | None = None) -> str:
    """Returns the name of the task of a model class, as a pack records it; ``NO_TASK`` if there is none.

    Example:
        >>> type_of("BertModel"), type_of("CLIPEncoder"), type_of(None)
        ('feature-extraction', 'other', 'other')
    """
    task = _fitting(architecture or "", config)
    return NO_TASK if task is None else task.name


def _fitting(architecture: str, config: Config | None) -> Task | None:
    """Returns the most specific task that a model class fits: one that recognizes its config, or else the one
    with the longest matching suffix.
    """

    def breadth(task: Task) -> tuple[bool, int]:
        return task.recognizes is None, -max(
            len(suffix) for suffix in task.suffixes if architecture.endswith(suffix)
        )

    return min(
        (task for task in TASKS.values() if task.fits(architecture, config or {})), key=breadth, default=None
    )


def peft_type_of(name: str) -> str | None:
    """Returns PEFT's ``task_type`` for a task's name; None if PEFT has none."""
    task = None if name == NO_TASK else TASKS.find(name)
    return None if task is None else task.peft_type


def task_of_peft(task_type: object) -> str:
    """Returns the name of the task for PEFT's ``task_type``; ``NO_TASK`` if there is none.

    Example:
        >>> task_of_peft("SEQ_CLS"), task_of_peft(None)
        ('text-classification', 'other')
    """
    general_first = sorted(TASKS.values(), key=lambda task: task.recognizes is not None)
    return next(
        (task.name for task in general_first if task.peft_type and task.peft_type == task_type), NO_TASK
    )


def require_encoder(task: Task, architecture: str, config: Config) -> None:
    """Checks that no other generating task is the right one for a model with encoder and decoder: such tasks
    differ in what the encoder reads.

    Raises:
        Unsupported: another task recognizes the model's config; the remedy names it.

    Example:
        >>> require_encoder(TASKS["text-generation"], "LlamaForCausalLM", {"is_encoder_decoder": False})
    """
    if not (task.generates and config.get("is_encoder_decoder")):
        return
    right = next(
        (
            candidate
            for candidate in TASKS.values()
            if candidate.generates and candidate.recognizes and candidate.recognizes(config)
        ),
        task,
    )
    if right is not task:
        raise Unsupported(
            f"an encoder and decoder is exported for {right.name}, not for {task.name}",
            found=architecture,
            remedy=f"export it with --task {right.name}",
        )
