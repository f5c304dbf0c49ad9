"""Works out settings from values that other tools write in a way of their own; the tables in ``tools/`` name
the public functions.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from ...base import dtypes
from ...tasks.conversations.templates import OWN, has_template
from .dataset_info import listed_sources
from .fields import Settings
from .other_datasets import Stop, Type, axolotl_source, split_of, trl_sources


class Forms(Protocol):
    """The forms of data that a tool's table describes: of texts, of pairs of answers, and of answers with a
    verdict; ``templates`` is where its chat templates are.
    """

    types: dict[str, Type]
    pairs: dict[str, Type]
    verdicts: dict[str, Type]
    templates: str


class File(NamedTuple):
    """A file of another tool at one of its keys: all its set ``values``, the key, its value, the tool's
    ``forms`` of data, and for a function that several keys share, ``into`` which setting of ours it leads.
    """

    values: Settings
    key: str
    value: Any
    notes: list[str]
    where: object
    forms: Forms
    into: str = ""

    def says(self, *keys: str) -> Any:
        """Returns the value of the first of the keys that is set, or None."""
        return next((self.values[key] for key in keys if key in self.values), None)

    def note(self, text: str) -> None:
        """Notes a text once."""
        if text not in self.notes:
            self.notes.append(text)


_LOSSES: Mapping[str, Settings] = {
    "ipo": {"trainer": "dpo", "loss_type": "ipo"},
    "simpo": {"trainer": "cpo", "loss_type": "simpo"},
}
"""What other tools name as a way of training, and is a loss of a trainer."""


def nothing(file: File) -> Settings:
    """Leaves a key to the one that reads it too."""
    return {}


def names(file: File) -> Settings:
    """Splits names that stand in one text with commas between them, as LLaMA-Factory writes lists."""
    return {file.into: _names(file.value)}


def several_names(file: File) -> Settings:
    """Splits a text with commas only if all of its parts are plain names: another text may be a pattern."""
    parts = _names(file.value)
    plain = (
        isinstance(file.value, str)
        and len(parts) > 1
        and all(re.fullmatch(r"[\w.-]+", part) for part in parts)
    )
    return {file.into: parts if plain else file.value}


def all_or_named(file: File) -> Settings:
    """Returns LLaMA-Factory's targets, of which ``all`` is every linear layer, and of a model that sees those
    of its language model, as a task's own targets are.
    """
    return {} if file.value == "all" else {"targets": _names(file.value)}


def linear_and_named(file: File) -> Settings:
    """Returns axolotl's targets: every linear layer, named layers, or both."""
    named = several_names(file._replace(value=file.values.get("lora_target_modules"), into="targets"))[
        "targets"
    ]
    if file.says("lora_target_linear") is True:
        more = [] if named is None or isinstance(named, str) else [name for name in named if "." in name]
        return {"targets": ["all-linear", *more] if more else "all-linear"}
    return {} if named is None else {"targets": named}


def target_parameters(file: File) -> Settings:
    """Returns the setting for parameters of fused experts, which are adapted together."""
    if not all("experts" in str(name) for name in file.value):
        raise Stop("only parameters of experts can be adapted by name")
    return {"experts": True}


def method(file: File) -> Settings:
    """Returns the method: names are ours in small letters, with ``qlora`` as LoRA of a base in four bits."""
    if file.says("peft_use_dora", "use_dora") is True:
        return {"method": "dora"}
    named = file.says("adapter", "finetuning_type")
    if not isinstance(named, str):
        return {} if named is None else {"method": named}
    plain = named.lower().replace("-", "_")
    return {"method": {"qlora": "lora", "lntuning": "ln_tuning"}.get(plain, plain)}


def stage(file: File) -> Settings:
    """Returns the trainer of LLaMA-Factory's ``stage`` and axolotl's ``rl``."""
    if file.value == "ppo":
        raise Stop("there is no trainer for PPO; trainer: grpo learns from rewards, too")
    if file.value in _LOSSES:
        return _LOSSES[file.value]
    if file.value == "dpo" and file.says("pref_loss") in ("orpo", "simpo"):  # not losses of DPO but trainers
        return preference_loss(file._replace(value=file.says("pref_loss")))
    return {"trainer": {"rm": "reward", "pt": "sft"}.get(file.value, file.value)}


def preference_loss(file: File) -> Settings:
    """Returns what LLaMA-Factory's losses of preferences are: a trainer of their own, or a loss of DPO."""
    if file.value == "orpo":
        return {"trainer": "orpo"}
    if file.value == "simpo":
        return {**_LOSSES["simpo"], "cpo_alpha": 0.0}
    return {"loss_type": file.value}


def pissa(file: File) -> Settings:
    """Returns PiSSA's initialisation."""
    return {"init": "pissa"} if file.value is True else {}


def loftq(file: File) -> Settings:
    """Returns LoftQ's initialisation, the one thing that axolotl's ``peft`` is for."""
    bits = file.value.get("loftq_config", {}).get("loftq_bits") if isinstance(file.value, Mapping) else None
    if bits != 4 or len(file.value) > 1:
        raise Stop("only LoftQ with four bits is supported: {loftq_config: {loftq_bits: 4}}")
    file.note(
        "LoftQ starts from the error of quantizing each weight to four bits; the base itself is not changed"
    )
    return {"init": "loftq"}


def optimizer(file: File) -> Settings:
    """Returns the optimizer; without a GPU and the package that holds states in fewer bits, the plain one
    with the same update.
    """
    name = str(file.value)
    few = re.fullmatch(
        r"(paged_)?(adamw|adam|lion|ademamix|rmsprop)_?(bnb|torch|32bit)?_?([48]bit|32bit)?", name
    )
    if few and (few[1] or few[3] == "bnb" or few[4]):
        package = "torchao" if few[3] == "torch" else "bitsandbytes"
        if not (_gpu() and importlib.util.find_spec(package)):
            if few[2] not in {"adamw", "adam"}:
                raise Stop(f"it needs {package} and a GPU")
            file.note(f"{name} needs {package} and a GPU: adamw_torch is used, with states in full precision")
            return {"optim": "adamw_torch"}
    return {"optim": {"adamw_hf": "adamw_torch", "adamw": "adamw_torch"}.get(name, name)}


def bfloat16(file: File) -> Settings:
    """Returns whether to compute in bfloat16; ``auto`` is where a GPU can."""
    if file.value in {"auto", "full"}:
        return {"bf16": _gpu() == "bfloat16"}
    return {"bf16": file.value}


def float16(file: File) -> Settings:
    """Returns how to compute where a file asks for float16: in bfloat16 where a GPU can, else in float16."""
    if file.value is not True or _gpu() == "bfloat16":
        return {"bf16": True} if file.value is True else {}
    if _gpu():
        return {"fp16": True}
    file.note(f"{file.key} needs a GPU: this machine computes in float32")
    return {}


def dtype(file: File) -> Settings:
    """Returns the dtype under the name that torch has for it."""
    name = str(file.value).lower().removeprefix("torch.")
    known = dtypes.TORCH.get(dtypes.NAMES.get(name, ""), file.value)
    return {} if known == "float16" else {"dtype": known}


def quantization(file: File) -> Settings:
    """Returns the setting of a base in so many bits."""
    if str(file.value) not in {"4", "8"}:
        raise Stop("a base can be quantized to 4 or to 8 bits")
    return {f"load_in_{file.value}bit": True}


def evaluation_steps(file: File) -> Settings:
    """Returns evaluations every so many steps, or after a share of all; none without rows to evaluate."""
    return {"eval_strategy": "steps", "eval_steps": file.value} if _evaluates(file) else {}


def evaluation_strategy(file: File) -> Settings:
    """Returns when to evaluate; never without rows to evaluate."""
    return {"eval_strategy": file.value} if _evaluates(file) else {}


def evaluations_per_epoch(file: File) -> Settings:
    """Returns evaluations so many times in an epoch, as a share of all steps."""
    share = _share(file)
    if not _evaluates(file) or share is None:
        return {}
    return {"eval_strategy": "steps", "eval_steps": share} if share < 1 else {"eval_strategy": "epoch"}


def saves_per_epoch(file: File) -> Settings:
    """Returns checkpoints so many times in an epoch, as a share of all steps."""
    share = _share(file)
    if share is None:
        return {"save_strategy": "no"}
    return {"save_strategy": "steps", "save_steps": share} if share < 1 else {"save_strategy": "epoch"}


def checkpoint_steps(file: File) -> Settings:
    """Returns checkpoints every so many steps, or after a share of all."""
    return {"save_strategy": file.says("save_strategy") or "steps", "save_steps": file.value}


def held_out(file: File) -> Settings:
    """Returns the share of rows to evaluate on, by default after each epoch."""
    told = file.says("evals_per_epoch", "eval_steps", "eval_strategy", "evaluation_strategy") is not None
    usual = {} if told or not file.value else {"eval_strategy": "epoch"}
    return {"val_set_size": file.value, **usual} if file.value else {}


def whole_batch(file: File) -> Settings:
    """Returns the accumulation steps that make up a batch of so many rows."""
    if file.says("gradient_accumulation_steps") is not None:
        return {}
    return {"gradient_accumulation_steps": max(1, int(file.value) // int(file.says("micro_batch_size") or 1))}


def schedule(file: File) -> Settings:
    """Returns the schedule of the learning rate; a cosine may have a quadratic warm-up, or a lowest rate and
    the share of all steps after which that is reached.
    """
    name = file.says("lr_scheduler") or "cosine"
    least = file.says("cosine_min_lr_ratio")
    if name != "cosine" or not (least or file.says("lr_quadratic_warmup") is True):
        return {"lr_scheduler_type": name}
    if file.says("lr_quadratic_warmup") is True:
        return {"lr_scheduler_type": name, "lr_scheduler_kwargs": {"warmup_power": 2}}
    early = file.says("cosine_constant_lr_ratio")
    ends = {"decay_share": early} if early else {}
    return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": least, **ends}}


def packing(file: File) -> Settings:
    """Returns whether rows are packed: ``auto`` packs where the model keeps packed rows apart."""
    wants = file.says("sample_packing", "packing", "neat_packing")
    return {"packing": "auto" if wants is True else wants}


def special_tokens(file: File) -> Settings:
    """Returns the special tokens by their names in the tokenizer."""
    named = {key: token for key, token in file.value.items() if token}
    more = named.pop("additional_special_tokens", None)
    return {"special_tokens": named, **({"add_special_tokens": more} if more else {})}


def end_token(file: File) -> Settings:
    """Returns the token that ends a text."""
    return {"special_tokens": {"eos_token": file.value}}


def base(file: File) -> Settings:
    """Returns the base, at the revision that the file names."""
    revision = file.says("model_revision", "revision_of_model")
    name = file.says("model_name_or_path", "base_model")
    return {"model_name_or_path": name if revision in {None, "main"} else f"{name}@{revision}"}


def plugins(file: File) -> Settings:
    """Passes plugins that make the same computation faster or report it."""
    same = (
        "cut_cross_entropy",
        "expert_parallel",
        "kernels",
        "liger",
        "lm_eval",
        "nvfp4",
        "spectrum",
        "swanlab",
    )
    for name in file.value:
        if not str(name).removeprefix("axolotl.integrations.").startswith(same):
            raise Stop(f"the plugin {name} is not supported")
    return {}


def axolotl_datasets(file: File) -> Settings:
    """Returns the sources of axolotl's data sets."""
    entries = [file.value] if isinstance(file.value, str | Mapping) else file.value
    rl = file.says("rl")
    types = file.forms.types if rl is None else file.forms.verdicts if rl == "kto" else file.forms.pairs
    sources = [axolotl_source(entry, types) for entry in entries]
    if (count := file.says("dataset_shard_num")) and (index := file.says("dataset_shard_idx")) is not None:
        for source in sources:
            own, first = source.get("shards", 1), source.get("shards_idx", 0)
            source |= {"shards": own * count, "shards_idx": first + own * index}
    return {file.into: sources}


def listed_datasets(file: File) -> Settings:
    """Returns the sources of data sets that LLaMA-Factory's list describes."""
    folder = file.says("dataset_dir") or "data"
    file.note(f"{file.key}: looked up in {folder}/dataset_info.json")
    sources = listed_sources(_names(file.value), folder, file.says("max_samples"), file.says("media_dir"))
    seen = any(isinstance(source, dict) and "media_dir" in source for source in sources)
    return {file.into: sources, **({"task": "image-text-to-text"} if seen else {})}


def trl_dataset(file: File) -> Settings:
    """Returns the sources of the data set that TRL's scripts name."""
    return trl_sources(file.values, _evaluates(file))


def mixed_datasets(file: File) -> Settings:
    """Returns the sources of the alignment handbook's mixture, each with its share of rows."""
    mixer = file.says("dataset_mixer")
    splits = file.says("dataset_splits") or ["train", "test"]
    configs = file.says("dataset_configs") or [None] * len(mixer)
    train, test = ([split for split in splits if ("test" in str(split)) is held] for held in (False, True))
    sources = [
        {
            key: value
            for key, value in {"path": path, "name": name, "share": share}.items()
            if value is not None
        }
        for (path, share), name in zip(mixer.items(), configs, strict=True)
    ]
    taken = {"train_file": [{**source, "split": split_of(train)} for source in sources]}
    if test and _evaluates(file):
        taken["eval_file"] = [
            {**{key: value for key, value in source.items() if key != "share"}, "split": split_of(test)}
            for source in sources
        ]
    return taken


def mixture_of_datasets(file: File) -> Settings:
    """Returns the sources of a mixture of data sets with weights."""
    named = {"id": "path", "config": "name", "split": "split", "weight": "share"}
    held = file.value.get("test_split_size")
    sources = [
        {named[key]: value for key, value in entry.items() if key in named and value is not None}
        for entry in file.value["datasets"]
    ]
    return {"train_file": sources, **({"val_set_size": held} if held and _evaluates(file) else {})}


def predicts(file: File) -> Settings:
    """Stops where a file only runs a model."""
    if file.value is True and file.says("do_train") is not True:
        raise Stop("it runs a model and trains nothing; use adapterpack run")
    return {}


def template(file: File) -> Settings:
    """Returns the tool's chat template of that name; of a name that is not known here, the base's own."""
    if file.value in {"tokenizer_default", "jinja"} or "chat_template_jinja" in file.values:
        return {}
    name = f"{file.forms.templates}/{file.value}"
    if has_template(name):
        return {"chat_template": name}
    file.note(f"{file.key} {file.value} is not known here: the base's own chat template is used")
    return {"chat_template": OWN}


def _names(value: Any) -> Any:
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def _evaluates(file: File) -> bool:
    """Whether the file has rows to evaluate, and does not say that it never evaluates."""
    if file.says("eval_strategy", "evaluation_strategy") in {"no", False}:
        return False
    held = (
        "val_set_size",
        "val_size",
        "test_datasets",
        "eval_dataset",
        "dataset_test_split",
        "eval_dataset_split",
    )
    splits = [str(split) for split in file.says("dataset_splits") or ()]
    return (
        any(map(file.says, held))
        or any("test" in split for split in splits)
        or "dataset_mixture" in file.values
    )


def _share(file: File) -> float | None:
    """Returns the share of all steps between two of so many times an epoch; None for never."""
    return 1 / (file.value * (file.says("num_epochs", "epochs") or 1)) if file.value else None


def _gpu() -> str:
    """Returns the narrowest floats in which a GPU of this machine computes; empty without one."""
    import torch  # noqa: PLC0415 - most configurations need no torch to be read

    if not torch.cuda.is_available():
        return ""
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
