"""The tasks by their Hugging Face pipeline names, as values: model class, heads, and the graphs with their inputs. No heavy import here.

Every stage asks the task: training for the class and its heads, frontends for the graphs, parity and sessions for what goes in and in
which order, canaries for the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

from ..errors import UnknownName, Unsupported, nearest

MAIN = "model"
"""The graph that gives a task's answer."""

AXES: dict[str, tuple[str | None, ...]] = {
    "input_ids": ("batch", "sequence"),
    "attention_mask": ("batch", "sequence"),
    "token_type_ids": ("batch", "sequence"),
    "position_ids": ("batch", "sequence"),
    "pixel_values": ("batch", None, None, None),
    "input_features": ("batch", None, None),
    "decoder_input_ids": ("batch", "sequence"),
    "image_features": ("batch", "image_positions", None),
    "past_key_values": ("batch", None, "past", None),
    "encoder": ("batch", None, "source", None),
}
"""Input -> the names of its axes; those without one are as wide as the model says. The last two are families: ``<layer>.key`` follows."""


SPANS = ("start_logits", "end_logits")
"""Outputs with one number for each position: how well a span begins, and how well it ends there."""


@dataclass(frozen=True)
class Part:
    """One graph of a task: ``form`` says which part of the model it computes, ``inputs`` what it takes, from a caller or earlier parts."""

    name: str
    form: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """One task. ``heads`` are the module names that a task model adds to its base; they are trained whole.

    ``parts`` are its graphs in the order in which they run. ``told_by`` are keys of a config, one of which tells the task's models from
    others whose class names end in the same way. ``pooled`` tasks give one vector for each row.
    """

    name: str
    auto_class: str
    suffixes: tuple[str, ...]
    heads: tuple[str, ...] = ()
    labelled: bool = False
    generates: bool = False
    parts: tuple[Part, ...] = (Part(MAIN, "plain", ("input_ids", "attention_mask")),)
    told_by: tuple[str, ...] = ()
    pooled: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def main(self) -> Part:
        """The part that gives the answer."""
        return self.parts[-1]

    @property
    def inputs(self) -> tuple[str, ...]:
        """What a caller gives, in order: every part's inputs but those that an earlier part gives and those that a session knows."""
        named = dict.fromkeys(name for part in self.parts for name in part.inputs)
        return tuple(name for name in named if name not in _SUPPLIED)

    @property
    def left(self) -> bool:
        """Whether ragged rows are filled up on the left: what follows a row must follow its last token."""
        return self.generates and "input_ids" in self.main.inputs

    def fits(self, architecture: str, config: Mapping[str, Any]) -> bool:
        """Whether a model class with this config is the task's."""
        return architecture.endswith(self.suffixes) and (not self.told_by or any(config.get(key) for key in self.told_by))


_SUPPLIED = frozenset({"position_ids", "image_features", "past_key_values", "encoder"})
_TEXT = ("input_ids", "attention_mask")
_DECODER = (*_TEXT, "position_ids", "past_key_values")
_IMAGE = (Part(MAIN, "plain", ("pixel_values",)),)
_HEADS = ("classifier", "score")

TASKS = {
    task.name: task
    for task in (
        Task("text-classification", "AutoModelForSequenceClassification", ("ForSequenceClassification",), _HEADS, labelled=True),
        Task("token-classification", "AutoModelForTokenClassification", ("ForTokenClassification",), _HEADS, labelled=True),
        Task("question-answering", "AutoModelForQuestionAnswering", ("ForQuestionAnswering",), ("qa_outputs",),
             parts=(Part(MAIN, "plain", (*_TEXT, "token_type_ids")),)),
        Task("fill-mask", "AutoModelForMaskedLM", ("ForMaskedLM",)),
        Task("text-generation", "AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel"), generates=True,
             parts=(Part(MAIN, "decoder", _DECODER),)),
        Task("automatic-speech-recognition", "AutoModelForSpeechSeq2Seq", ("ForConditionalGeneration",), generates=True,
             parts=(Part("encoder", "encoder", ("input_features",)),
                    Part(MAIN, "cross_decoder", ("decoder_input_ids", "past_key_values", "encoder"))),
             told_by=("num_mel_bins",)),
        Task("text2text-generation", "AutoModelForSeq2SeqLM", ("ForConditionalGeneration",), generates=True,
             parts=(Part("encoder", "encoder", _TEXT),
                    Part(MAIN, "cross_decoder", ("decoder_input_ids", "attention_mask", "past_key_values", "encoder"))),
             told_by=("is_encoder_decoder",), aliases=("translation", "summarization")),
        Task("image-text-to-text", "AutoModelForImageTextToText", ("ForConditionalGeneration",), generates=True,
             parts=(Part("vision", "vision", ("pixel_values",)), Part(MAIN, "seeing_decoder", (*_DECODER, "image_features"))),
             told_by=("vision_config",)),
        Task("image-classification", "AutoModelForImageClassification", ("ForImageClassification",), ("classifier",), labelled=True,
             parts=_IMAGE),
        Task("zero-shot-image-classification", "AutoModelForZeroShotImageClassification", ("Model",), pooled=True,
             parts=(Part("text", "text_tower", _TEXT), Part(MAIN, "image_tower", ("pixel_values",))), told_by=("logit_scale_init_value",)),
        Task("image-feature-extraction", "AutoModel", ("Model",), parts=_IMAGE, told_by=("image_size", "patch_size")),
        Task("feature-extraction", "AutoModel", ("Model",)),
    )
}

NO_TASK = "other"
"""The type of a pack that names no task, as the Hub calls it: one of a plain module, or a folder of PEFT's without a ``task_type``."""

_ALIASES = {alias: task.name for task in TASKS.values() for alias in task.aliases}
_NARROW_FIRST = sorted(TASKS.values(), key=lambda task: not task.told_by)


def takes_ids(model: Any) -> bool:
    """Whether a torch model reads token ids."""
    return "input_ids" in signature(model.forward).parameters


def reads_types(model: Any) -> bool:
    """Whether a torch model tells the two texts of a row apart by types, and not by a token between them alone."""
    return "token_type_ids" in signature(model.forward).parameters and getattr(model.config, "type_vocab_size", 0) > 1


def task_named(name: str) -> Task:
    """The task of that name, or of that other name of it.

    Raises:
        UnknownName: there is none.

    Example:
        >>> task_named("text-generation").auto_class, task_named("translation").name
        ('AutoModelForCausalLM', 'text2text-generation')
    """
    known = _ALIASES.get(name, name)
    if known not in TASKS:
        raise UnknownName("unknown task", found=repr(name), remedy=nearest(name, {**TASKS, **_ALIASES}))
    return TASKS[known]


def task_of(architecture: str, config: Mapping[str, Any] | None = None) -> Task:
    """The task of a model class, told by the end of its name and by its config; feature extraction where nothing else fits.

    Example:
        >>> task_of("LlamaForCausalLM").name, task_of("GPT2LMHeadModel").name, task_of("BertModel").name
        ('text-generation', 'text-generation', 'feature-extraction')
        >>> task_of("T5ForConditionalGeneration", {"is_encoder_decoder": True}).name
        'text2text-generation'
    """
    return _fitting(architecture, config) or TASKS["feature-extraction"]


def type_of(architecture: str | None, config: Mapping[str, Any] | None = None) -> str:
    """The name of the task that a model class was made for, as a pack records it; ``NO_TASK`` where there is none.

    Example:
        >>> type_of("BertModel"), type_of("CLIPEncoder"), type_of(None)
        ('feature-extraction', 'other', 'other')
    """
    found = _fitting(architecture or "", config)
    return NO_TASK if found is None else found.name


def _fitting(architecture: str, config: Mapping[str, Any] | None) -> Task | None:
    return next((task for task in _NARROW_FIRST if task.fits(architecture, config or {})), None)


def require_encoder(task: Task, architecture: str, config: Mapping[str, Any]) -> None:
    """Checks of a task that generates that it does not leave out the encoder of a model, or read it from what that does not take.

    Raises:
        Unsupported: it does.

    Example:
        >>> require_encoder(TASKS["text-generation"], "LlamaForCausalLM", {"is_encoder_decoder": False})
    """
    told = next((one for one in TASKS.values() if one.generates and any(config.get(key) for key in one.told_by)), task)
    if task.generates and config.get("is_encoder_decoder") and told is not task:
        raise Unsupported(f"an encoder and decoder is exported for {told.name}, not for {task.name}", found=architecture,
                          remedy=f"export it with --task {told.name}")
