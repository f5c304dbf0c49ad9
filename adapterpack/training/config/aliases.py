"""Translates setting names and values of PEFT, TRL, axolotl and LLaMA-Factory into this package's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ...base import dtypes
from ...errors import ConfigError
from ...tasks.data.report import OWN_COLUMNS

ALIASES: dict[str, str] = {
    # PEFT and TRL names for the hyper-parameters of a method
    "lora_r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "feedforward_modules": "feedforward",
    "apply_GS": "apply_gs",
    "psoft_dropout": "dropout",
    "psoft_orth": "orth",
    "psoft_mag_a": "mag_a",
    "psoft_mag_b": "mag_b",
    "oft_block_size": "block_size",
    "boft_block_size": "block_size",
    "boft_block_num": "block_num",
    "boft_n_butterfly_factor": "n_butterfly_factor",
    "lora_target_modules": "targets",
    "peft_type": "method",
    # axolotl
    "base_model": "model_name_or_path",
    "adapter": "method",
    "sequence_len": "max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "lr_scheduler": "lr_scheduler_type",
    "num_epochs": "num_train_epochs",
    "lora_modules_to_save": "modules_to_save",
    "lora_target_linear": "targets",
    # LLaMA-Factory
    "lora_rank": "r",
    "lora_target": "targets",
    "cutoff_len": "max_length",
    "finetuning_type": "method",
    "additional_target": "modules_to_save",
    # preference training: axolotl's and LLaMA-Factory's
    "rl": "trainer",
    "stage": "trainer",
    "rl_beta": "beta",
    "dpo_beta": "beta",
    "orpo_alpha": "beta",
    "pref_beta": "beta",
    "pref_loss": "loss_type",
    "dpo_label_smoothing": "label_smoothing",
    "kto_desirable_weight": "desirable_weight",
    "kto_undesirable_weight": "undesirable_weight",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    "lora_model_dir": "adapter_name_or_path",
    # earlier and other names
    "max_seq_length": "max_length",
    "model_name": "model_name_or_path",
    "batch_size": "per_device_train_batch_size",
    "warmup_ratio": "warmup_steps",
    "torch_dtype": "dtype",
    "sample_packing": "packing",
    "dataset": "train_file",
    "datasets": "train_file",
    "test_datasets": "eval_file",
    "eval_dataset": "eval_file",
    "val_size": "val_set_size",
    "output": "output_dir",
}
"""Maps other tools' names of settings to this package's."""

INSTEAD: dict[str, str] = {
    "ref_model": "leave it out: the reference is what the adapter began as",
    "reward_funcs": "name it on the command line, --reward file.py:function: no configuration brings code",
    "reward_model": (
        "name a function on the command line, --reward file.py:function: no configuration brings code"
    ),
    "template": "leave it out: the tokenizer's own chat template is used",
    "chat_template": "leave it out: the tokenizer's own chat template is used",
    "deepspeed": "leave it out, and launch with accelerate",
    "fsdp": "leave it out, and launch with accelerate",
    "pad_to_sequence_len": "leave it out: batches are padded to their longest row",
    "eval_sample_packing": "leave it out: rows are evaluated one by one",
    "tokenizer_type": "leave it out: the base says it",
    "model_type": "leave it out: the base says it",
    "do_train": "leave it out",
    "overwrite_output_dir": "leave it out: an output is never written over",
    "evals_per_epoch": "eval_strategy: epoch",
    "saves_per_epoch": "save_strategy: epoch",
    "columns": OWN_COLUMNS,
    "quantization_bit": "load_in_4bit: true, or load_in_8bit: true",
}
"""Maps keys without an equivalent here, most of them other tools', to what to do instead."""


def _names(value: Any) -> Any:
    """Splits a comma-separated string into names, as LLaMA-Factory writes lists."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def _split(value: Any) -> Any:
    """Splits a comma-separated string only if all of its parts are plain names: another string may be a
    pattern.
    """
    names = _names(value)
    several = isinstance(value, str) and len(names) > 1
    return names if several and all(re.fullmatch(r"[\w.-]+", name) for name in names) else value


def _computes_bf16() -> bool:
    """Whether a GPU is available that computes in bfloat16."""
    import torch  # noqa: PLC0415 - most configurations need no torch to be read

    return bool(torch.cuda.is_available() and torch.cuda.is_bf16_supported())


VALUES: dict[str, Callable[[Any], Any]] = {
    "stage": lambda value: {"rm": "reward", "pt": "sft"}.get(value, value),
    # axolotl's ``qlora`` is LoRA; ``load_in_4bit`` quantizes the base.
    "adapter": lambda value: "lora" if value == "qlora" else value,
    "lora_target": lambda value: "all-linear" if value == "all" else _names(value),
    "additional_target": _names,
    "torch_dtype": lambda value: dtypes.TORCH.get(
        dtypes.NAMES.get(str(value).lower().removeprefix("torch."), ""), value
    ),
    # axolotl allows ``auto``.
    "bf16": lambda value: _computes_bf16() if value == "auto" else value,
    **dict.fromkeys(("targets", "target_modules", "lora_target_modules"), _split),
    **dict.fromkeys(("modules_to_save", "lora_modules_to_save"), _split),
    "lora_target_linear": lambda value: "all-linear" if value is True else value,
}
"""Keys whose values other tools write differently, with the translation of the value."""


class OtherTool(NamedTuple):
    """Another tool, recognised by a key and any one of some further keys, with those of its defaults that
    differ from this package's.
    """

    name: str
    key: str
    others: frozenset[str]
    defaults: Mapping[str, Any]


TOOLS = (
    OtherTool(
        "axolotl",
        "base_model",
        frozenset({"sequence_len", "micro_batch_size", "num_epochs", "lora_target_linear", "datasets"}),
        {
            "num_train_epochs": 1,
            "per_device_train_batch_size": 1,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.03,
        },
    ),
    OtherTool(
        "LLaMA-Factory",
        "finetuning_type",
        frozenset({"stage", "lora_rank", "lora_target", "cutoff_len", "template"}),
        {"max_length": 2048, "learning_rate": 5e-5, "seed": 42},
    ),
)


def with_defaults(
    settings: Mapping[str, Any], translated: Mapping[str, Any], notes: list[str]
) -> dict[str, Any]:
    """Adds the defaults of the tool that ``settings`` were written for to the ``translated`` settings;
    appends a line about them to ``notes``.

    Example:
        >>> with_defaults({"finetuning_type": "lora", "cutoff_len": 9}, {"max_length": 9}, [])
        {'learning_rate': 5e-05, 'seed': 42, 'max_length': 9}
    """
    tool = next((tool for tool in TOOLS if tool.key in settings and tool.others & settings.keys()), None)
    if tool is None:
        return dict(translated)
    taken = {key: value for key, value in tool.defaults.items() if key not in translated}
    if taken:
        shown = ", ".join(f"{key} {value}" for key, value in taken.items())
        notes.append(f"this is a file of {tool.name}, whose defaults hold for what it leaves out: {shown}")
    return {**taken, **translated}


def translate(values: Mapping[str, Any], notes: list[str], where: object) -> dict[str, Any]:
    """Returns the values under this package's names; appends a line to ``notes`` for each name that it
    translates.

    Raises:
        ConfigError: a setting appears under two names.

    Example:
        >>> notes = []
        >>> translate({"lora_target": "q_proj,v_proj"}, notes, "here"), notes
        ({'targets': ['q_proj', 'v_proj']}, ['lora_target is read as targets'])
    """
    translated: dict[str, Any] = {}
    for key, value in values.items():
        name = ALIASES.get(key, key)
        if name in translated:
            raise ConfigError("a setting is given twice", where=where, found=f"{name}, under two names")
        translated[name] = VALUES.get(key, lambda given: given)(value)
        if name != key and (note := f"{key} is read as {name}") not in notes:
            notes.append(note)
    return translated
