"""Prepares a training: encodes the rows, loads the task's model, and attaches the adapter."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import BitsAndBytesConfig

from ...adapter_methods import PROMPT, Acts
from ...errors import ConfigError, MissingExtra, NothingToDo, Unsupported
from ...pack import Pack
from ...readable import things
from ...runtime import context_length
from ...tasks import TASKS, Task, TaskTraining, reads_types
from ...tasks.conversations.encoding import require_end
from ...tasks.conversations.templates import OWN, chat_template, with_defaults
from ...tasks.data import IGNORED, NUMBER, PROBLEMS, DataReport, Labels, Row
from ...torch_adapters import adapted_layers, load_config, load_for_task, load_tokenizer
from ...torch_adapters.adapt import adapt
from ...torch_adapters.canaries.inputs import token_types
from ...torch_adapters.layers import Prompts, Wrapper
from ...torch_adapters.layers.sites import language_part
from ...torch_adapters.models.load import stored_dtype
from ..config.fields import TrainConfig
from ..config.sources import names_of
from ..data import load as data
from ..data.encode import read, tables
from ..data.pack_sequences import pack_sequences, require_apart
from ..trainers.kind import TRAINERS, TrainerKind
from .continue_training import load_start, put_back
from .extended_base import add_tokens, tokenizer_folder
from .media import Media
from .targets import in_blocks, named_layers

log = logging.getLogger(__name__)

SAMPLES = 256
"""How many training rows a data-driven initialisation may read."""


class TrainingRows(NamedTuple):
    """Rows to train and to evaluate on, in the trainer's form: encoded, with the collator for batches, or
    raw.

    ``labels`` are those of a head; ``metrics`` compares outputs with targets.
    """

    train: Any
    evaluation: Any
    labels: Labels | None = None
    collator: data.Collator | None = None
    metrics: Callable[[Any, Any], Mapping[str, float]] | None = None


class PreparedRun(NamedTuple):
    """A model with its active adapter, and its rows.

    ``reference`` names a frozen copy of the adapter's starting point; None if that was the base alone, or the
    loss compares with nothing. ``started`` is the pack that the training continues from. ``chat_template`` is
    the template of its texts, if the configuration has one or sets its variables.
    """

    model: Any
    rows: TrainingRows
    reference: str | None
    started: Pack | None
    chat_template: str | None = None


Load = Callable[..., tuple[Any, list[str]]]
"""Loads a model, as :func:`adapterpack.torch_adapters.models.load.load_for_task` does."""


def prepare(
    config: TrainConfig, task: Task, folder: Path, reader: Any, load: Load = load_for_task
) -> PreparedRun:
    """Reads the data with ``reader`` (:func:`reader_of`), loads the model, and attaches the adapter.

    Raises:
        ConfigError: the data has no known form, rows are longer than the model can read, or settings
            contradict the pack that the training continues from.
        NothingToDo: the adapter would act in no row.
    """
    kind = TRAINERS[config.trainer]
    started = None if config.adapter_name_or_path is None else load_start(config)
    given = (
        None
        if started is None or started.manifest.task.labels is None
        else Labels(started.manifest.task.labels, PROBLEMS[started.manifest.problem])
    )
    rows = (
        _encode(config, task, kind, reader, folder, given)
        if kind.rows is None
        else _tables(config, kind, kind.rows, folder)
    )
    names, problem = (None, None) if rows.labels is None else (rows.labels.names, rows.labels.problem.name)
    dtype = _dtype(config, folder)
    model, new = load(
        task, folder, names, dtype=dtype, quantization=_quantization(config, dtype), problem=problem
    )
    _hold_statistics(model)
    if rows.collator is not None and not reads_types(model):
        for row in (*rows.train, *(rows.evaluation or ())):
            row.pop("token_type_ids", None)
            if {"images", "input_ids", "labels"} <= row.keys():
                row.update(_seen_together(model, row))
    if rows.collator is not None:
        collator = dataclasses.replace(rows.collator, dtype=model.dtype)
        rows = rows._replace(collator=collator)
        if task.labelled and getattr(model.config, "pad_token_id", 0) is None:
            # A classifying decoder needs the padding id to find the last real token.
            model.config.pad_token_id = collator.pad_token_id
    reference = None
    if started is None:
        _adapt(model, rows, config, task, new)
    else:
        reference = put_back(model, started, config, kind.reference)
    _require_seen(model, kind)
    template = None
    if config.chat_template not in {None, OWN} or config.chat_template_kwargs:
        template = (reader.tokenizer if isinstance(reader, Media) else reader).chat_template
    return PreparedRun(model, _packed(model, rows, config), reference, started, template)


def _seen_together(model: Any, row: Row) -> dict[str, list[int]]:
    """Returns the types of a row's tokens, where images or prompts of the model see later tokens of theirs: a
    prompt ends with the first token that is learned.
    """
    ids, learned = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
    types = token_types(model, ids, (learned != IGNORED).cumsum(1) > 0)
    return {name: one[0].tolist() for name, one in types.items()}


def _stay(module: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
    return module


def _hold_statistics(model: torch.nn.Module) -> None:
    """Keeps batch norms in evaluation: a pack does not hold the statistics that they take of batches."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.train = partial(_stay, module)  # type: ignore[method-assign]


def _adapt(model: Any, rows: TrainingRows, config: TrainConfig, task: Task, new: list[str]) -> None:
    """Puts a fresh adapter into the model, with the task's heads and the modules ``new`` to be trained in
    full.
    """
    heads = _heads(task, model, new) if task.heads else ()
    targets = named_layers(model, config.method_config.targets, config.peft_names)
    if config.experts:
        targets = tuple(dict.fromkeys([*targets, "all-experts"]))
    method_config = dataclasses.replace(
        config.method_config,
        modules_to_save=tuple(dict.fromkeys([*config.method_config.modules_to_save, *heads])),
        targets=targets[0] if len(targets) == 1 else targets,  # a prompt has no targets but the default
    )
    if config.layers_to_transform:
        method_config = in_blocks(model, method_config, config.layers_to_transform, config.layers_pattern)
    if method_config.acts is not None and rows.collator is not None:
        _require_acting(method_config.acts, rows.train, names_of(config.train_file))
    samples = None if rows.collator is None else map(rows.collator, _samples(rows.train, config))
    adapt(model, method_config, config.pack_name, config.seed, samples, config.allow_unused)
    if task.training is not None and task.training.adapted == "all-language":
        _say_served(model)


def _say_served(model: Any) -> None:
    """Warns of what a server cannot do with an adapter that changes layers outside of the language model."""
    inside = (*language_part(model), PROMPT)
    head = model.get_output_embeddings()
    paths = [module._site.path for module in adapted_layers(model) if module is not head]
    others = [path for path in paths if not path.startswith(inside)]
    if others:
        count = things(len(others), "layer")
        log.warning(
            "the adapter changes %s outside of the language model, such as %s: a server answers with it from "
            "a bank that was exported with it, and cannot load it while it runs or mix it with others; "
            "targets: all-language leaves them out",
            count,
            others[0],
        )


def reader_of(
    task: Task, config: TrainConfig, folder: Path, load: Callable[[Path], Any] = load_tokenizer
) -> Any:
    """Returns what reads the rows of a task: the base's tokenizer with the template and tokens of the
    configuration, or a :class:`Media` with it.

    Raises:
        ConfigError: there is no such template, or the tokenizer lacks a token.
    """
    kind = TRAINERS[config.trainer]
    reads = "tokenizer" if kind.rows else training_of(task, kind).reads
    if reads != "media":
        tokenizer = _as_configured(load(tokenizer_folder(config, folder)), config)
        if kind.rows:
            require_end(tokenizer, folder)
        return tokenizer
    media = Media(folder, task)
    # models of images alone have no tokenizer
    if config.names_tokens or config.chat_template or config.chat_template_kwargs:
        _as_configured(media.tokenizer, config)
    return media


def _as_configured(tokenizer: Any, config: TrainConfig) -> Any:
    """Gives a tokenizer the special tokens and the chat template that a configuration names."""
    add_tokens(tokenizer, config)
    for key, token in config.special_tokens.items():
        setattr(tokenizer, key, token)
    if (config.chat_template == OWN or config.chat_template_kwargs) and not (
        tokenizer.chat_template or config.chat_template not in {None, OWN}
    ):
        raise ConfigError(
            "the base has no chat template of its own",
            where="chat_template",
            remedy="name one, such as axolotl/chatml, or write it out in Jinja",
        )
    if config.chat_template not in {None, OWN}:
        tokenizer.chat_template = chat_template(str(config.chat_template))
    if config.chat_template_kwargs:
        tokenizer.chat_template = with_defaults(tokenizer.chat_template, config.chat_template_kwargs)
    return tokenizer


def _encode(
    config: TrainConfig, task: Task, kind: TrainerKind, reader: Any, folder: Path, labels: Labels | None
) -> TrainingRows:
    """Returns the rows as the task, or the trainer, encodes them; ``labels`` of a head that was trained
    before stay.
    """
    training = training_of(task, kind)
    train, evaluation, labels = read(config, task, training, reader, labels)
    _require_readable(max(map(data.token_count, [*train, *(evaluation or ())])), "are", folder, config)
    padding = 0
    if data.token_count(train[0]):
        tokenizer = reader.tokenizer if isinstance(reader, Media) else reader
        padding = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        )
    return TrainingRows(
        train,
        evaluation,
        labels,
        data.Collator(padding, training.constants),
        _metrics_of(training, labels) if training.judged else None,
    )


def _metrics_of(
    training: TaskTraining, labels: Labels | None
) -> Callable[[Any, Any], Mapping[str, float]] | None:
    if labels is None or training.metrics is None:
        return training.metrics if labels is None else labels.problem.metrics
    return partial(training.metrics, names=labels.names)


def _tables(
    config: TrainConfig, kind: TrainerKind, make: Callable[[Any, DataReport], Any], folder: Path
) -> TrainingRows:
    """Returns the rows for a trainer that encodes them itself.

    Raises:
        ConfigError: the data has no known form, or rows of ``max_length`` would be longer than the model can
            read.
    """
    _require_readable(config.max_length, "may be", folder, config)
    return TrainingRows(*tables(config, make), Labels(("score",), NUMBER) if kind.scores else None)


def _require_seen(model: Any, kind: TrainerKind) -> None:
    """Raises if a trainer with a loss of its own would miss part of the adapter.

    Such trainers multiply by the output layer's weight themselves, and do not learn labels inside a prompt.

    Raises:
        Unsupported: the output layer is adapted, or a prompt has labels.
    """
    if kind.rows is None:
        return
    if any(
        getattr(held.config, "learnt", ())
        for prompts in model.modules()
        if isinstance(prompts, Prompts)
        for held in prompts._held.values()
    ):
        raise Unsupported(
            f"the trainer {kind.name} does not learn from the labels in a prompt's context",
            where="token_types",
            remedy="train it with sft, or mark no labels: token_types without multiples of 4",
        )
    if isinstance(model.get_output_embeddings(), Wrapper):
        raise Unsupported(
            f"the trainer {kind.name} applies the output layer's weight itself, without an adapter of it",
            where="targets",
            remedy="take the output layer out of targets and of modules_to_save",
        )


def _packed(model: Any, ready: TrainingRows, config: TrainConfig) -> TrainingRows:
    """Returns the rows packed if the configuration says so, or says ``auto`` and the model can."""
    if not config.packing:
        return ready
    try:
        return _pack(model, ready, config)
    except (ConfigError, Unsupported) as error:
        if config.packing != "auto":
            raise
        log.warning("rows are not packed, which gives the same in more time: %s", error.what)
        return ready


def _pack(model: Any, ready: TrainingRows, config: TrainConfig) -> TrainingRows:
    """Packs the rows, if they are sequences for a language model and the model keeps packed rows apart."""
    rows = ready.train
    if ready.collator is None or not all(
        row.keys() == {"input_ids", "labels"} and isinstance(row["labels"], list) for row in rows
    ):
        raise ConfigError(
            "only rows of language models can be packed",
            where="packing",
            found=f"task {config.task}",
            remedy="leave packing out; group_by_length saves padding, too",
        )
    if config.method_config.acts is not None:
        raise ConfigError(
            "an adapter that acts at some positions of a row cannot tell them in packed rows",
            where="packing",
            remedy="leave packing out; group_by_length saves padding, too",
        )
    require_apart(model, rows)
    result = pack_sequences(rows, config.max_length)
    share = sum(len(row["input_ids"]) for row in rows) / (len(result) * config.max_length)
    log.info("%d rows are packed into %d, which are full to %.0f %%", len(rows), len(result), 100 * share)
    return ready._replace(train=result)


def _dtype(config: TrainConfig, folder: Path) -> str:
    """Returns the dtype to load the base in, by default the stored one; float32 instead of float16, whose
    range is too small for gradients.
    """
    if config.dtype != "auto":
        return config.dtype
    stored = stored_dtype(folder)
    if stored == "float16":
        log.info(
            "the base is stored in float16, and held in float32; dtype: bfloat16 would take half of that"
        )
        return "float32"
    return stored


def _quantization(config: TrainConfig, dtype: str) -> Any:
    """Returns the quantization config for transformers, or None.

    Raises:
        MissingExtra: bitsandbytes is not installed.
    """
    if not (config.load_in_4bit or config.load_in_8bit):
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra(
            "bases are quantized by bitsandbytes, which is not installed",
            where="load_in_4bit or load_in_8bit",
            remedy="pip install bitsandbytes",
        )
    return BitsAndBytesConfig(
        load_in_4bit=config.load_in_4bit,
        load_in_8bit=config.load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16 if config.bf16 else getattr(torch, dtype),
    )


def training_of(task: Task, kind: TrainerKind) -> TaskTraining:
    """Returns how the rows of a task are read: as the trainer says, or else as the task says.

    Raises:
        Unsupported: neither says so.
    """
    if kind.reading is not None:
        return kind.reading
    if task.training is None:
        raise Unsupported(
            "this task cannot be trained yet",
            found=task.name,
            expected=", ".join(name for name, trainable in TASKS.items() if trainable.training is not None),
        )
    return task.training


def _require_readable(longest: int, are: str, folder: Path, config: TrainConfig) -> None:
    """Raises if rows that ``are`` as long as ``longest`` have more tokens than the model has positions."""
    most = context_length(load_config(folder).to_dict(), folder)
    if most is not None and longest > most:
        raise ConfigError(
            f"rows {are} longer than the model can read",
            where=names_of(config.train_file),
            expected=f"at most {most} tokens",
            found=f"{longest} tokens",
            remedy=f"set max_length to {most}, or choose a base that reads longer texts",
        )


def _require_acting(acts: Acts, rows: list[dict[str, Any]], where: object) -> None:
    """Raises if an adapter that acts at certain positions would act in no row; logs how many rows have
    none.
    """
    acting = 0
    for row in rows:
        ids = np.array([row["input_ids"]])
        labels = row.get("labels")
        prompt = (
            np.cumsum(np.array([labels]) != IGNORED, axis=1) == 0
            if isinstance(labels, list)
            else np.ones_like(ids, bool)
        )
        acting += bool(acts.mask(ids, np.ones_like(prompt), prompt, None).any())
    if not acting:
        raise NothingToDo(
            "the adapter acts in no row of the training data",
            where=where,
            expected=str(acts)[:80],
            remedy=(
                "put the invocation into the rows, as the tokenizer splits it there, or choose other "
                "positions"
            ),
        )
    if acting < len(rows):
        log.warning("%s: in %d of %d rows the adapter acts nowhere", where, len(rows) - acting, len(rows))


def _samples(rows: list[dict[str, Any]], config: TrainConfig) -> Iterator[list[dict[str, Any]]]:
    """Returns batches of the first rows, for a data-driven initialisation."""
    size = config.per_device_train_batch_size
    return (rows[start : start + size] for start in range(0, min(len(rows), SAMPLES), size))


def _heads(task: Task, model: Any, new: list[str]) -> tuple[str, ...]:
    """Returns the modules to train in full: the task's heads, and what the checkpoint lacks. Of a head with
    norms of its own these are the linear layers, which a graph can hold for each adapter.
    """
    heads = dict.fromkeys(
        path
        for name in task.heads
        if hasattr(model, name)
        for path in linear_parts(name, getattr(model, name))
    )
    heads.update(dict.fromkeys(path for path in new if path.partition(".")[0] not in heads))
    return tuple(heads)


def linear_parts(name: str, head: torch.nn.Module) -> list[str]:
    """Returns the path of a head if it is made of linear layers, or else the paths of those in it."""
    layers = {path: layer for path, layer in head.named_modules() if [*layer.parameters(recurse=False)]}
    linear = [path for path, layer in layers.items() if isinstance(layer, torch.nn.Linear)]
    return [f"{name}.{path}" for path in linear] if 0 < len(linear) < len(layers) else [name]
