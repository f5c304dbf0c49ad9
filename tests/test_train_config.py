"""The training configuration: what is read, translated, refused, and that the schema says the same."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from shipped_schemas import fits
from train_schema import schema

from adapterpack import LoRA
from adapterpack.adapter_methods import methods
from adapterpack.errors import AdapterpackError, ConfigError, StorageError, UnknownMethod
from adapterpack.io import strict_json
from adapterpack.tasks.task import TASKS
from adapterpack.training.config.config import as_mapping, read_config
from adapterpack.training.config.fields import LEAST, NAME, PARTS, POSITIVE, TrainConfig
from adapterpack.training.config.sources import Source, sources_of
from adapterpack.training.config.tools import ours, tool_of, translate
from adapterpack.training.config.unknown_keys import own_settings
from adapterpack.training.data.load import load_rows
from adapterpack.training.trainers.kind import TRAINERS, NoTrainerSettings

pytestmark = pytest.mark.fast

NEEDED = {"model_name_or_path": "base", "train_file": "rows.jsonl", "output_dir": "out/tickets"}
SCHEMA = json.loads((Path(__file__).parent.parent / "schemas" / "train.v1.json").read_text())
MANIFEST = json.loads((Path(__file__).parent.parent / "schemas" / "manifest.v1.json").read_text())


def one(values: dict[str, Any] | None = None, *overrides: str) -> TrainConfig:
    (config,), _ = read_config({**NEEDED, **(values or {})}, overrides)
    return config


def test_yaml_round_trip(tmp_path: Path) -> None:
    """Every setting, each other than its default, through a YAML file: the config that comes back has them
    all.
    """
    hyper = {
        "r": 3,
        "alpha": 5.5,
        "use_rslora": True,
        "dropout": 0.25,
        "targets": ["query", "value"],
        "modules_to_save": ["classifier"],
        "rank_pattern": {"query": 7},
        "alpha_pattern": {"value": 9.0},
    }
    settings = {
        "task": "text-classification",
        "trainer": "sft",
        "adapter_name_or_path": "packs/first",
        "name": "other",
        "method": "lora",
        "eval_file": None,
        "problem_type": "regression",
        "val_set_size": 0.25,
        "on_bad_row": "skip",
        "on_divergence": "warn",
        "max_length": 17,
        "learning_rate": 3e-5,
        "num_train_epochs": 1.5,
        "max_steps": 11,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "auto_find_batch_size": True,
        "eval_samples": 2,
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": {"num_cycles": 0.75},
        "warmup_steps": 0.1,
        "optim": "adafactor",
        "optim_args": "a=1",
        "adam_beta1": 0.8,
        "adam_beta2": 0.99,
        "adam_epsilon": 1e-6,
        "neftune_noise_alpha": 5.0,
        "weight_decay": 0.01,
        "label_smoothing_factor": 0.1,
        "max_grad_norm": 0.5,
        "logging_steps": 7,
        "seed": 5,
        "dtype": "bfloat16",
        "bf16": True,
        "fp16": False,
        "train_on_inputs": True,
        "system_prompt": "Be brief.",
        "chat_template": "axolotl/chatml",
        "chat_template_kwargs": {"enable_thinking": False},
        "special_tokens": {"pad_token": "<pad>"},
        "add_tokens": ("<ask>", "<say>"),
        "add_special_tokens": ("<turn>",),
        "tokenizer": "models/tokenizer",
        "shuffle": False,
        "drop_duplicates": True,
        "gradient_checkpointing": True,
        "group_by_length": True,
        "packing": True,
        "experts": True,
        "allow_unused": True,
        "overwrite_output_dir": True,
        "peft_names": True,
        "layers_to_transform": (1, 2),
        "layers_pattern": ("layers",),
        "max_train_samples": 100,
        "skip_train_samples": 3,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "save_strategy": "epoch",
        "save_steps": 9,
        "save_total_limit": 3,
        "eval_strategy": "epoch",
        "eval_steps": 4,
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
        "greater_is_better": True,
        "early_stopping_patience": 2,
        "report_to": ("tensorboard", "wandb"),
    }
    assert {*settings, *NEEDED} == {f.name for f in dataclasses.fields(TrainConfig)} - PARTS
    path = tmp_path / "train.yaml"
    lists = {key: list(value) for key, value in settings.items() if isinstance(value, tuple)}
    path.write_text(yaml.safe_dump({**NEEDED, **settings, **lists, **hyper}))
    (config,), notes = read_config(path)
    assert notes == []
    assert {key: getattr(config, key) for key in (*NEEDED, *settings)} == {**NEEDED, **settings}
    assert config.method_config == LoRA(
        r=3,
        alpha=5.5,
        use_rslora=True,
        dropout=0.25,
        targets=("query", "value"),
        modules_to_save=("classifier",),
        rank_pattern={"query": 7},
        alpha_pattern={"value": 9.0},
    )
    assert read_config(config) == ([config], [])


def test_defaults_are_the_dataclasses() -> None:
    """The three needed keys alone give the dataclasses' defaults; the name is the folder's."""
    config = one()
    assert config == TrainConfig(**NEEDED, method_config=LoRA(), trainer_config=NoTrainerSettings())
    assert config.pack_name == "tickets"
    assert read_config(TrainConfig(**NEEDED))[0] == [config]


@pytest.mark.parametrize(
    ("foreign", "wanted"),
    [
        # axolotl
        (
            {
                "base_model": "b",
                "adapter": "lora",
                "sequence_len": 99,
                "micro_batch_size": 3,
                "lr_scheduler": "cosine",
                "num_epochs": 2,
                "lora_r": 4,
                "lora_alpha": 6,
                "lora_dropout": 0.1,
                "lora_target_modules": ["q_proj"],
                "lora_modules_to_save": ["lm_head"],
            },
            {
                "model_name_or_path": "b",
                "method": "lora",
                "max_length": 99,
                "per_device_train_batch_size": 3,
                "lr_scheduler_type": "cosine",
                "num_train_epochs": 2.0,
                "r": 4,
                "alpha": 6.0,
                "dropout": 0.1,
                "targets": ("q_proj",),
                "modules_to_save": ("lm_head",),
            },
        ),
        ({"lora_target_linear": True}, {"targets": "all-linear"}),
        ({"adapter": "qlora", "warmup_ratio": 0.1}, {"method": "lora", "warmup_steps": 0.1}),
        # LLaMA-Factory: lists are one text, "all" is all-linear
        (
            {
                "finetuning_type": "lora",
                "lora_rank": 4,
                "lora_target": "q_proj, v_proj",
                "cutoff_len": 33,
                "additional_target": "a,b",
            },
            {
                "method": "lora",
                "r": 4,
                "targets": ("q_proj", "v_proj"),
                "max_length": 33,
                "modules_to_save": ("a", "b"),
            },
        ),
        ({"lora_target": "all"}, {"targets": "all-linear"}),
        (
            {"datasets": [{"path": "a", "type": "alpaca"}], "val_size": 0.1},
            {"train_file": ({"path": "a", "type": "alpaca"},), "val_set_size": 0.1},
        ),
        ({"test_datasets": ["a.jsonl", "b/*.csv"]}, {"eval_file": ("a.jsonl", "b/*.csv")}),
        ({"torch_dtype": "torch.bfloat16"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "fp32"}, {"dtype": "float32"}),
        ({"torch_dtype": "auto"}, {"dtype": "auto"}),
        ({"sample_packing": True}, {"packing": True}),
        # PEFT, and what saved PEFT configs say
        ({"peft_type": "LORA", "target_modules": "all-linear"}, {"method": "lora", "targets": "all-linear"}),
        (
            {"max_seq_length": 5, "batch_size": 6, "dataset": "d", "output": "o", "model_name": "n"},
            {
                "max_length": 5,
                "per_device_train_batch_size": 6,
                "train_file": "d",
                "output_dir": "o",
                "model_name_or_path": "n",
            },
        ),
    ],
)
def test_other_tools_names_are_translated_and_reported(
    foreign: dict[str, Any], wanted: dict[str, Any]
) -> None:
    """The setting has our name and type, and one note a key says what was read as what."""
    done = translate(foreign, ours(), [], "here")
    replaced = set(done.settings)
    (config,), notes = read_config(
        {**{key: value for key, value in NEEDED.items() if key not in replaced}, **foreign}
    )
    for key, value in wanted.items():
        found = getattr(config, key) if hasattr(config, key) else getattr(config.method_config, key)
        assert (found, type(found)) == (value, type(value)), key
    named = [f"{key} is read as {name}" for name, key in done.origins.items() if key != name]
    assert "defaults" in notes[0] or notes == named


@pytest.mark.parametrize(
    ("foreign", "wanted", "said"),
    [
        (
            {"base_model": "b", "adapter": "lora", "sequence_len": 99, "datasets": "a.jsonl"},
            {
                "num_train_epochs": 1.0,
                "per_device_train_batch_size": 1,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 0.03,
                "max_length": 99,
            },
            "axolotl",
        ),
        (
            {
                "base_model": "b",
                "adapter": "lora",
                "micro_batch_size": 4,
                "num_epochs": 2,
                "lr_scheduler": "linear",
                "warmup_ratio": 0.1,
            },
            {
                "num_train_epochs": 2.0,
                "per_device_train_batch_size": 4,
                "lr_scheduler_type": "linear",
                "warmup_steps": 0.1,
            },
            "axolotl",
        ),
        (
            {"model_name_or_path": "b", "stage": "sft", "finetuning_type": "lora", "dataset": "a.jsonl"},
            {
                "max_length": 2048,
                "learning_rate": 5e-5,
                "seed": 42,
                "num_train_epochs": 3.0,
                "per_device_train_batch_size": 8,
            },
            "LLaMA-Factory",
        ),
        ({"base_model": "b"}, {}, None),
    ],
)
def test_what_another_tools_file_leaves_out_is_that_tools_default(
    foreign: dict[str, Any], wanted: dict[str, Any], said: str | None
) -> None:
    """One note says whose file it is, and each taken default says whose it is; what the file says counts, and one
    name of another tool makes no file of it.
    """
    replaced = {*foreign, *translate(foreign, tool_of(foreign), [], "here").settings}
    (config,), notes = read_config(
        {**{key: value for key, value in NEEDED.items() if key not in replaced}, **foreign}
    )
    assert {key: getattr(config, key) for key in wanted} == wanted
    assert any("with its names, defaults and meanings" in note for note in notes) == (said is not None)
    origins = dict(config.origins or {})
    assert {key for key, origin in origins.items() if origin == f"{said}'s default"} >= set(wanted) - replaced


AXOLOTL = {"base_model": "b", "adapter": "lora", "datasets": "a.jsonl"}
FACTORY = {"model_name_or_path": "b", "stage": "dpo", "finetuning_type": "lora", "dataset": "a.jsonl"}


@pytest.mark.parametrize(
    ("file", "kind", "settings"),
    [
        ({**AXOLOTL, "rl": "dpo"}, "dpo", {"loss_type": ("sigmoid",)}),
        ({**AXOLOTL, "rl": "ipo", "rl_beta": 0.3}, "dpo", {"loss_type": ("ipo",), "beta": 0.3}),
        ({**AXOLOTL, "rl": "simpo", "simpo_gamma": 1}, "cpo", {"loss_type": "simpo", "cpo_alpha": 1.0}),
        ({**FACTORY, "pref_loss": "ipo"}, "dpo", {"loss_type": ("ipo",)}),
        ({**FACTORY, "pref_loss": "orpo", "pref_beta": 0.2}, "orpo", {"beta": 0.2}),
        (
            {**FACTORY, "pref_loss": "simpo"},
            "cpo",
            {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5},
        ),
    ],
)
def test_ways_to_learn_preferences_are_trainers_and_losses(
    file: dict[str, Any], kind: str, settings: dict[str, Any]
) -> None:
    """What other tools call ``rl: ipo`` or ``pref_loss: simpo`` is that loss, with that tool's weights."""
    (config,), _ = read_config(
        {**{key: value for key, value in NEEDED.items() if key == "output_dir"}, **file}
    )
    assert config.trainer == kind
    assert {key: getattr(config.trainer_config, key) for key in settings} == settings


def test_names_in_one_text_are_several() -> None:
    """Under each name of the setting, in a file and in an override; a pattern with a comma stays one."""
    for key in ("targets", "target_modules", "lora_target_modules", "lora_target"):
        assert one({}, f"{key}=q_proj,v_proj").method_config.targets == ("q_proj", "v_proj")
        assert one({key: "q_proj, v_proj"}).method_config.targets == ("q_proj", "v_proj")
    assert one({"target_modules": r".*\.(q|v)_proj{1,2}"}).method_config.targets == r".*\.(q|v)_proj{1,2}"
    assert one({"modules_to_save": "a,b"}).method_config.modules_to_save == ("a", "b")


def test_every_alias_leads_to_a_setting() -> None:
    """No renaming is of a key of ours, and none leads nowhere."""
    renamed = {key: rule for key, rule in ours().keys.items() if isinstance(rule, str)}
    assert set(renamed.values()) <= own_settings()
    assert not set(renamed) & own_settings()


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("learning_rate=1e-4", "learning_rate", 1e-4),  # which YAML takes for text
        ("learning_rate=0.5", "learning_rate", 0.5),
        ("num_train_epochs=2", "num_train_epochs", 2.0),
        ("alpha=1e1", "alpha", 10.0),
        ("alpha=null", "alpha", 16.0),
        ("targets=[query, value]", "targets", ("query", "value")),
        ("targets=query", "targets", "query"),
        # one name is a list of one, not of its letters
        ("modules_to_save=classifier", "modules_to_save", ("classifier",)),
        ("rank_pattern={query: 2}", "rank_pattern", {"query": 2}),
        ("lora_r=5", "r", 5),
        ("max_train_samples=null", "max_train_samples", None),
        ("bf16=true", "bf16", True),
        ("eval_file=a=b.csv", "eval_file", "a=b.csv"),
        ("name='12'", "name", "12"),
    ],
)
def test_overrides(text: str, key: str, value: Any) -> None:
    """``key=value`` is read as YAML would, typed as the field is."""
    config = one({}, text)
    found = getattr(config, key) if hasattr(config, key) else getattr(config.method_config, key)
    assert (found, type(found)) == (value, type(value))


def test_overrides_win_over_the_file_under_any_name() -> None:
    """Over the same key, over its alias, over the entries of ``adapters:``; the last of two counts."""
    assert one({"r": 2}, "r=3").method_config.r == 3
    assert one({"lora_r": 2}, "r=3").method_config.r == 3
    assert one({"r": 2}, "lora_rank=3").method_config.r == 3
    assert one({}, "r=3", "r=4").method_config.r == 4
    entries = [
        {"name": "a", "r": 2, "output_dir": "elsewhere"},
        {"name": "b", "lora_r": 9, "learning_rate": 1e-3},
    ]
    configs, _ = read_config({**NEEDED, "adapters": entries}, ["r=5", "output_dir=new"])
    assert [(c.method_config.r, c.learning_rate, c.output_dir) for c in configs] == [
        (5, 2e-4, "new/a"),
        (5, 1e-3, "new/b"),
    ]
    (config,), _ = read_config(
        TrainConfig(**NEEDED, method_config=LoRA(r=2, targets=("q",))), ["r=3", "seed=4"]
    )
    assert (config.method_config, config.seed) == (LoRA(r=3, alpha=4, targets=("q",)), 4)


def test_several_adapters_share_the_common_keys() -> None:
    """An entry takes the common keys and its own; its folder is ``output_dir/name`` unless it names one."""
    entries = [{"name": "a", "train_file": "a.csv"}, {"name": "b", "lora_r": 3, "output_dir": "elsewhere"}]
    configs, notes = read_config({**NEEDED, "lora_r": 5, "adapters": entries})
    assert [(c.pack_name, c.train_file, c.output_dir, c.method_config.r) for c in configs] == [
        ("a", "a.csv", "out/tickets/a", 5),
        ("b", "rows.jsonl", "elsewhere", 3),
    ]
    assert notes == ["lora_r is read as r"]


@pytest.mark.parametrize(
    ("values", "overrides", "words"),
    [
        ({"learning_rat": 1}, [], ["unknown key", "'learning_rat'", "did you mean 'learning_rate'?"]),
        ({"lora_alhpa": 1}, [], ["did you mean 'lora_alpha'?"]),
        ({7: 1}, [], ["unknown key", "7"]),
        (
            {"columns": {"text": "message"}},
            [],
            ["unknown key", "train_file: [{path: tickets.csv, columns: {text: message, label: team}}]"],
        ),
        ({"max_length": "long"}, [], ["max_length", "expected a whole number", "'long' (str)"]),
        ({"max_length": 8.0}, [], ["max_length", "expected a whole number", "8.0 (float)"]),
        ({"max_length": True}, [], ["max_length", "True (bool)"]),
        ({"learning_rate": "fast"}, [], ["learning_rate", "expected a number", "'fast'"]),
        ({"learning_rate": False}, [], ["learning_rate", "expected a number"]),
        ({"bf16": "perhaps"}, [], ["bf16", "expected true or false", "'perhaps'"]),
        ({"dtype": "float16"}, [], ["dtype", "expected one of auto, float32, bfloat16", "'float16'"]),
        ({"train_file": None}, [], ["a key is missing", "train_file"]),
        ({"name": 12}, [], ["name", "expected text", "12 (int)"]),
        (
            {"train_file": {"pth": "a"}},
            [],
            ["train_file", "no such setting", "'pth'", "did you mean 'path'?"],
        ),
        ({"train_file": ["a", {"split": "train"}]}, [], ["train_file, entry 2", "has no path"]),
        ({"train_file": ["a", 5]}, [], ["train_file, entry 2", "a path, or a mapping", "5"]),
        ({"train_file": []}, [], ["a key is missing", "train_file"]),
        ({}, ["train_file=[]"], ["no source"]),
        ({"train_file": {"path": "a", "form": 3}}, [], ["form", "expected text"]),
        ({"train_file": {"path": "a", "columns": ["b"]}}, [], ["columns", "names with names"]),
        ({"eval_file": "a.csv", "val_set_size": 3}, [], ["val_set_size and eval_file"]),
        ({"targets": 5}, [], ["targets", "text or a list of names"]),
        ({"targets": ["q", 5]}, [], ["targets", "text or a list of names"]),
        ({"modules_to_save": {"a": 1}}, [], ["modules_to_save", "a list of names"]),
        ({"rank_pattern": {"q": "two"}}, [], ["rank_pattern", "names with numbers"]),
        ({"rank_pattern": ["q"]}, [], ["rank_pattern", "names with numbers"]),
        ({"r": "8"}, [], ["r", "expected a whole number"]),
        ({"r": 0}, [], ["r must be a whole number of at least 1"]),
        ({"dropout": 1.0}, [], ["dropout must lie in [0, 1)"]),
        ({"learning_rate": float("nan")}, [], ["learning_rate", "more than 0, and finite", "nan"]),
        ({"learning_rate": 0}, [], ["learning_rate", "more than 0"]),
        ({"max_steps": 0}, [], ["max_steps", "at least 1, or -1 for epochs"]),
        ({"learning_rate": "inf"}, [], ["learning_rate", "finite"]),
        ({"per_device_train_batch_size": 0}, [], ["per_device_train_batch_size", "at least 1", "found 0"]),
        ({"seed": -1}, [], ["seed", "at least 0"]),
        ({"name": "../up"}, [], ["'../up'", "name"]),
        ({"output_dir": "out/with space"}, [], ["'with space'", "name"]),
        ({"r": 8, "lora_r": 8}, [], ["given under two names", "found r"]),
        ({"adapters": []}, [], ["adapters must be a list"]),
        ({"adapters": {"name": "a"}}, [], ["adapters must be a list"]),
        ({"adapters": [{"r": 2}]}, [], ["each with a name"]),
        ({"adapters": [{"name": "a"}, {"name": "a"}]}, [], ["the same name", "found a"]),
        (
            {"adapters": [{"name": "a", "output_dir": "x"}, {"name": "b", "output_dir": "x"}]},
            [],
            ["the same output_dir", "found x"],
        ),
        ({"adapters": [{"name": "a", "rr": 2}]}, [], ["adapter a", "'rr'"]),
        ({"adapters": [{"name": "a"}, {"name": "b"}]}, ["name=c"], ["several adapters cannot have one name"]),
        (
            {"learning_rat": 1, "deepspeed": "z3.json", "template": "llama3", "block_size": 4, "qqq": 1},
            [],
            [
                "5 keys are not known",
                "did you mean 'learning_rate'?",
                "deepspeed: leave it out",
                "chat template",
                "a setting of",
                "qqq",
            ],
        ),
        (
            {"rr": 1, "adapters": [{"name": "a", "vall_file": 2}, {"name": "b", "learning_rat": 3}]},
            [],
            ["3 keys are not known", "2 adapters", "'rr', 'vall_file', 'learning_rat'"],
        ),
        ({"load_in_4bit": True, "load_in_8bit": True}, [], ["4 bits or to 8"]),
        ({"save_strategy": "often"}, [], ["save_strategy", "'often'"]),
        ({}, ["learning_rate"], ["key=value", "'learning_rate'"]),
        ({}, ["=5"], ["key=value"]),
        ({}, ["targets=[q"], ["override", "targets", "not valid YAML"]),
        ({}, ["adapters=[]"], ["adapters can only be listed in the file"]),
        ({}, ["leraning_rate=1"], ["did you mean 'learning_rate'?"]),
        (
            {"method": {"type": "lora", "r": 4}},
            [],
            [
                "must be the name of an adapter method",
                "a name, such as lora",
                "settings as keys of their own",
            ],
        ),
    ],
)
def test_what_is_refused(values: dict[Any, Any], overrides: list[str], words: list[str]) -> None:
    """One sentence that names the key, what was expected and what was found."""
    with pytest.raises(ConfigError) as caught:
        read_config({**NEEDED, **values}, overrides)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("key", NEEDED)
def test_a_missing_key_is_named(key: str) -> None:
    """The key that is needed and the line to add."""
    with pytest.raises(ConfigError, match=f"a key is missing.*{key}.*add '{key}: ...'"):
        read_config({other: value for other, value in NEEDED.items() if other != key})


def test_an_unknown_method_is_named() -> None:
    """The nearest method is offered; the name's case does not matter."""
    with pytest.raises(UnknownMethod, match="did you mean 'lora'"):
        one({"method": "lorra"})
    assert one({"method": "LoRA"}).method == "lora"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            b"a: [1\nb: }",
            ["not valid YAML: while parsing a flow sequence, did not find", "bad.yaml, line 2)"],
        ),
        (b"- a\n- b\n", ["must be a mapping", "list"]),
        (b"", ["must be a mapping", "NoneType"]),
        (b"seed: 1\nseed: 2\n", ["a key stands twice: seed"]),
        (b"name: \xff\xfe\n", ["not valid YAML"]),
        (b"!!python/object/apply:os.getcwd []\n", ["not valid YAML"]),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: bytes, words: list[str]) -> None:
    """A sentence that names the file; code in YAML is not run."""
    path = tmp_path / "bad.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    for word in (str(path), *words):
        assert word in str(caught.value)
    with pytest.raises(StorageError, match=r"none\.yaml"):
        read_config(tmp_path / "none.yaml")


def test_data_sets_by_llama_factorys_list(tmp_path: Path) -> None:
    """Its names of data sets, files and columns; a name that the list does not have is an error with the
    nearest one.
    """
    info = {
        "identity": {"file_name": "identity.json"},
        "asked": {
            "hf_hub_url": "org/asked",
            "subset": "en",
            "columns": {"prompt": "q", "response": "a", "history": "before"},
        },
        "chats": {
            "file_name": "chats.json",
            "formatting": "sharegpt",
            "columns": {"messages": "turns", "system": "rules"},
        },
        "openai": {
            "file_name": "openai.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
            },
        },
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    settings = {"model_name_or_path": "b", "output_dir": "o", "dataset_dir": str(tmp_path)}
    (config,), notes = read_config({**settings, "dataset": "identity, asked,chats,openai", "val_size": 0.1})
    assert sources_of(config.train_file, "here") == (
        Source(str(tmp_path / "identity.json"), "alpaca"),
        Source("org/asked", "alpaca", "en", columns={"instruction": "q", "output": "a", "history": "before"}),
        Source(
            str(tmp_path / "chats.json"), "sharegpt", columns={"conversations": "turns", "system": "rules"}
        ),
        Source(str(tmp_path / "openai.json"), "messages", columns={"messages": "messages"}),
    )
    assert any("dataset_info.json" in note for note in notes)
    with pytest.raises(ConfigError, match="did you mean 'identity'"):
        read_config({**settings, "dataset": "identiti"})
    with pytest.raises(ConfigError, match=r"dataset_info\.json.*dataset_dir"):
        read_config({**settings, "dataset": "identity", "dataset_dir": str(tmp_path / "none")})


def test_pictures_in_llama_factorys_list(tmp_path: Path) -> None:
    """They make it a task with images, and their paths start from the list's folder, or from media_dir."""
    entry = {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "m", "images": "i"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"seen": entry}))
    (tmp_path / "a.json").write_text(json.dumps([{"m": [], "i": ["b.png", "data:image/png;base64,"]}]))
    settings = {"model_name_or_path": "b", "output_dir": "o", "dataset_dir": str(tmp_path), "dataset": "seen"}
    for media, folder in ((None, tmp_path), ("elsewhere", Path("elsewhere"))):
        (config,), _ = read_config({**settings, "media_dir": media})
        (source,) = sources_of(config.train_file, "here")
        assert (config.task, source.media_dir) == ("image-text-to-text", str(folder))
        assert load_rows(source)[0]["images"] == [str(folder / "b.png"), "data:image/png;base64,"]


OPENAI = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def listed(folder: Path, entry: dict[str, Any]) -> Source:
    (folder / "dataset_info.json").write_text(json.dumps({"data": entry}))
    (config,), _ = read_config(
        {"model_name_or_path": "b", "output_dir": "o", "dataset_dir": str(folder), "dataset": "data"}
    )
    (source,) = sources_of(config.train_file, "here")
    return source


@pytest.mark.parametrize(
    ("entry", "form", "columns"),
    [
        (
            {
                "ranking": True,
                "columns": {"prompt": "question", "chosen": "better", "rejected": "worse", "system": "rules"},
            },
            "alpaca-pairs",
            {"instruction": "question", "chosen": "better", "rejected": "worse", "system": "rules"},
        ),
        (
            {
                "ranking": True,
                "formatting": "sharegpt",
                "columns": {"messages": "turns", "chosen": "better", "rejected": "worse"},
            },
            "sharegpt-pairs",
            {"conversations": "turns", "chosen": "better", "rejected": "worse"},
        ),
        (
            {"columns": {"prompt": "q", "response": "a", "kto_tag": "good"}},
            "labelled-answers",
            {"prompt": "q", "completion": "a", "label": "good"},
        ),
        (
            {"formatting": "sharegpt", "columns": {"messages": "turns", "kto_tag": "good"}, "tags": OPENAI},
            "labelled-chats",
            {"messages": "turns", "label": "good"},
        ),
    ],
)
def test_preferences_of_llama_factorys_list_keep_their_columns(
    entry: dict[str, Any], form: str, columns: dict[str, str], tmp_path: Path
) -> None:
    """Pairs of answers, and answers with a verdict, in each of its formats."""
    hubs = {"hf_hub_url": "org/data", "ms_hub_url": "other/data"}
    assert listed(tmp_path, {**hubs, **entry}) == Source("org/data", form, columns=columns)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"columns": {"videos": "films"}}, "found columns: videos"),
        ({"columns": {"images": "pictures"}, "ranking": True}, "images with ranking"),
        ({"script_url": "data.py"}, "found script_url"),
        ({"columns": {"chosen": "better", "rejected": "worse"}}, "columns: chosen, columns: rejected"),
        ({"num_samples": 9}, "num_samples"),
        ({"formatting": "sharegpt", "tags": {"role_tag": "who"}}, "tags: role_tag: who"),
        (
            {"ranking": True, "formatting": "sharegpt", "tags": OPENAI},
            "ranking with messages as OpenAI has them",
        ),
    ],
)
def test_what_is_not_read_of_llama_factorys_list_stops_the_run(
    entry: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """By name, in place of other data than the list describes."""
    with pytest.raises(ConfigError, match=words):
        listed(tmp_path, {"file_name": "data.json", **entry})


@pytest.mark.parametrize("name", ["../data.json", "/etc/passwd", "link.json"])
def test_a_list_of_data_sets_names_no_file_elsewhere(name: str, tmp_path: Path) -> None:
    """Whoever wrote it may not have written the other files of this machine."""
    (tmp_path / "list").mkdir()
    (tmp_path / "data.json").write_text("[]")
    (tmp_path / "list" / "link.json").symlink_to(tmp_path / "data.json")
    with pytest.raises(AdapterpackError, match=r"outside of its own folder|leads out of the folder"):
        listed(tmp_path / "list", {"file_name": name})


# --- the schema


def test_the_schema_is_one_and_has_every_setting() -> None:
    """Valid draft 2020-12; its keys are the fields of the dataclasses and ``adapters``, no alias; defaults
    and limits are the code's.
    """
    Draft202012Validator.check_schema(SCHEMA)
    fields = {f.name: f for f in dataclasses.fields(TrainConfig) if f.name not in PARTS}
    theirs = {
        f.name
        for owner in (*methods().values(), *TRAINERS.values())
        for f in dataclasses.fields(owner.config)
    }
    properties = SCHEMA["properties"]
    assert set(properties) == {*fields, *theirs, "adapters"}
    assert not set(fields) & theirs, "a hyper-parameter has the name of a setting of the run"
    assert SCHEMA["additionalProperties"] is False
    assert not {key for key, rule in ours().keys.items() if isinstance(rule, str)} & set(properties)
    entry = SCHEMA["$defs"]["adapter"]
    assert set(entry["properties"]) == {*fields, *theirs}
    assert entry["additionalProperties"] is False
    assert all(value == {"$ref": f"#/properties/{key}"} for key, value in entry["properties"].items())
    assert all(value["description"] for value in properties.values())
    for key, field in fields.items():
        usual = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        usual = list(usual) if isinstance(usual, tuple) else usual
        needed = usual is dataclasses.MISSING
        assert ("default" in properties[key]) is not needed
        assert needed or properties[key]["default"] == usual, key
    assert schema() == SCHEMA, "make golden writes it anew"
    assert SCHEMA["then"]["required"] == [
        f.name
        for f in dataclasses.fields(TrainConfig)
        if f.default is f.default_factory is dataclasses.MISSING
    ]
    own = {f.name for f in dataclasses.fields(TrainConfig)}
    limits = {
        key: value.get("exclusiveMinimum" if key in POSITIVE else "minimum")
        for key, value in properties.items()
        if key in own
    }
    assert {key: value for key, value in limits.items() if value is not None} == LEAST
    assert sorted(properties["task"]["enum"]) == [
        name
        for name, task in TASKS.items()
        if task.training or any(name in kind.tasks for kind in TRAINERS.values())
    ]
    assert (
        properties["name"]["pattern"]
        == NAME
        == MANIFEST["$defs"]["PackInfo"]["properties"]["name"]["pattern"]
    )


GOOD: list[dict[str, Any]] = [
    {},
    {"learning_rate": 1, "num_train_epochs": 2, "alpha": 4, "warmup_steps": 0.1},
    {"learning_rate": "1e-4", "alpha": "2E1", "weight_decay": ".5"},
    {"name": None, "eval_file": None, "alpha": None, "max_train_samples": None},
    {"targets": "query", "modules_to_save": "classifier"},
    {"targets": ["query"], "modules_to_save": [], "rank_pattern": {"q": 2}, "alpha_pattern": {"q": 0.5}},
    {"adapters": [{"name": "a"}, {"name": "b", "r": 4, "learning_rate": 1e-3, "targets": ["q"]}]},
    {"max_steps": -1, "seed": 0, "max_grad_norm": 0, "task": "text-classification"},
    {"dtype": "bfloat16", "bf16": "auto"},
    # which needs tokens
    *({"method": name} for name, method in sorted(methods().items()) if name != "alora"),
    {
        "train_file": [
            "a.jsonl",
            {
                "path": "org/set",
                "name": "en",
                "split": "train[:9%]",
                "revision": "main",
                "form": "alpaca",
                "columns": {"output": "answer"},
            },
        ],
        "eval_file": {"path": "x", "data_files": ["a.csv"]},
    },
]
BAD: list[dict[str, Any]] = [
    {"learning_rat": 1},
    {"max_length": "long"},
    {"max_length": True},
    {"learning_rate": "fast"},
    {"learning_rate": 0},
    {"bf16": "perhaps"},
    {"train_file": None},
    {"train_file": {"pth": "a"}},
    {"train_file": []},
    {"name": 12},
    {"name": "a b"},
    {"targets": 5},
    {"targets": ["q", 5]},
    {"rank_pattern": {"q": "two"}},
    {"r": "8"},
    {"r": -1},
    {"dropout": 1.0},
    {"seed": -1},
    {"adapters": []},
    {"adapters": [{"r": 2}]},
    {"adapters": [{"name": "a", "rr": 2}]},
    {"per_device_train_batch_size": 0},
    {"max_train_samples": 0},
    {"label_smoothing_factor": 1},
]


@pytest.mark.parametrize("values", GOOD)
def test_the_schema_accepts_what_the_reader_accepts(values: dict[str, Any]) -> None:
    """Both take it, and so they do the whole configuration that it stands for, as --print-config has it."""
    settings, _ = read_config({**NEEDED, **values})
    assert fits({**NEEDED, **values}, "train.v1")
    for config in settings:
        whole = strict_json.plain({**as_mapping(config), "name": config.pack_name})
        assert fits(whole, "train.v1")
        assert read_config(whole)[0] == [dataclasses.replace(config, name=config.pack_name)]


@pytest.mark.parametrize("values", BAD)
def test_the_schema_refuses_what_the_reader_refuses(values: dict[str, Any]) -> None:
    """Neither takes it."""
    with pytest.raises(AdapterpackError):
        read_config({**NEEDED, **values})
    assert not fits({**NEEDED, **values}, "train.v1")


def test_needed_keys_may_stand_in_the_entries() -> None:
    """With ``adapters:`` the needed keys may be in each entry; without, the schema asks for them."""
    base = {"model_name_or_path": "b", "adapters": [{"name": "a", "train_file": "x", "output_dir": "o/a"}]}
    assert len(read_config(base)[0]) == 1
    assert fits(base, "train.v1")
    assert not fits({"model_name_or_path": "b"}, "train.v1")


def test_the_shipped_examples_fit_the_schema() -> None:
    """Every configuration under ``examples/``, other tools' names translated, is valid by the schema and by
    the reader.
    """
    files = sorted((Path(__file__).parent.parent / "examples").glob("*.yaml"))
    for file in files:
        values = yaml.safe_load(file.read_text())
        assert fits(translate(values, tool_of(values), [], file).settings, "train.v1"), file
        assert re.fullmatch(NAME, read_config(file)[0][0].pack_name)
    assert files


def test_a_key_of_another_method_names_the_method() -> None:
    """`r` beside `method: ia3` is no slip of the pen: the message says who has it, and what ia3 has."""
    with pytest.raises(ConfigError, match="the method ia3 has no r ") as told:
        one({"method": "ia3", "r": 8})
    assert "feedforward" in str(told.value)
    assert "lora" in str(told.value)


def test_lists_where_one_value_is_meant_are_a_sweep() -> None:
    """An entry for each combination, under a name of its own; a list that a setting takes stays one."""
    swept = {**NEEDED, "learning_rate": [1e-4, "1e-3"], "r": [4, 8], "targets": ["q_proj", "v_proj"]}
    configs, _ = read_config(swept, ["learning_rate=[1e-4, 2e-3]"])
    assert [(one.learning_rate, one.method_config.r) for one in configs] == [
        (1e-4, 4),
        (1e-4, 8),
        (2e-3, 4),
        (2e-3, 8),
    ]
    assert {one.method_config.targets for one in configs} == {("q_proj", "v_proj")}
    assert configs[3].output_dir == "out/tickets/tickets-learning_rate-2e-3-r-8"
    assert [one.method for one in read_config({**NEEDED, "method": ["lora", "ia3"]})[0]] == ["lora", "ia3"]
    with pytest.raises(ConfigError, match="too many combinations"):
        read_config({**NEEDED, "seed": list(range(65))})


def test_an_error_names_the_key_as_the_file_has_it() -> None:
    """So do the notes on keys that a tool does not know, which are near one that it does."""
    file = {"base_model": "b", "adapter": "lora", "datasets": [{"path": "x.jsonl", "type": "alpaca"}]}
    for wrong in ({"lora_r": "big"}, {"micro_batch_size": 0}):
        with pytest.raises(ConfigError, match=rf", {next(iter(wrong))};"):
            read_config({**file, "output_dir": "o", **wrong})
    _, notes = read_config({**file, "output_dir": "o", "lora_rank": 8, "eot_tokens": ["<turn|>"]})
    assert any("lora_rank" in note and "did you mean 'lora_r'" in note for note in notes)
    assert any("eot_tokens: the chat template ends a turn" in note for note in notes)


def test_variables_of_a_chat_template_are_kept() -> None:
    """axolotl's and TRL's go to the template, and so does LLaMA-Factory's, whose default changes nothing."""
    axolotl = {
        "base_model": "b",
        "adapter": "lora",
        "datasets": [{"path": "x.jsonl", "type": "chat_template"}],
    }
    trl = {"model_name_or_path": "b", "use_peft": True, "dataset_name": "x.jsonl"}
    for tool, file in (("axolotl", axolotl), ("trl", trl)):
        asked = {**file, "output_dir": "o", "chat_template_kwargs": {"enable_thinking": False}}
        [config], _ = read_config(asked, tool=tool)
        assert config.chat_template_kwargs == {"enable_thinking": False}
    file = {"model_name_or_path": "b", "finetuning_type": "lora", "stage": "sft", "dataset": "x.jsonl"}
    for value, expected in ((True, {}), (False, {"enable_thinking": False})):
        [config], _ = read_config({**file, "output_dir": "o", "enable_thinking": value})
        assert config.chat_template_kwargs == expected
