"""Attacks by base models: code, links, pipes and numbers in the folder of a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attack import Attacks
from transformers import AutoModelForCausalLM

import adapterpack

PLANTED = (
    "from pathlib import Path\nPath({mark!r}).write_text('it ran')\n"
    "from transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
)


COMMANDS = {
    "train": "train train.yaml",
    "export": "export causal pack -o out",
    "export without packs": "export causal -o out --task text-generation",
    "merge": "merge causal pack -o out",
    "merge into GGUF's checkpoint": "convert pack -o out --to gguf --base causal",
    "measure": "measure causal pack --data rows.jsonl -o out",
    "extract, tuned": "extract causal tuned -o out",
    "extract, base": "extract tuned causal -o out",
    "audit": "audit pack --base causal",
    "declare": "declare pack tuned causal -o out",
    "validate": "validate pack --base causal",
    "inspect": "inspect causal",
}


def changed(path: Path, **keys: Any) -> None:
    """A JSON file with other values under these keys."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def planted(base: Path, outside: Path) -> dict[str, Any]:
    """Code next to the configuration that writes a file outside when it runs, and the key that names it."""
    for name in ("odd", "configuration_odd", "modeling_odd", "tokenization_odd"):
        (base / f"{name}.py").write_text(PLANTED.format(mark=str(outside / name)))
    return {
        "auto_map": {
            "AutoConfig": "configuration_odd.C",
            "AutoModelForCausalLM": "modeling_odd.M",
            "AutoTokenizer": ["odd.T", None],
        }
    }


@pytest.mark.parametrize("command", COMMANDS.values(), ids=list(COMMANDS))
def test_code_next_to_a_configuration_never_runs(command: str, base: Path, attacks: Attacks) -> None:
    changed(base / "config.json", model_type="odd", **planted(base, attacks.outside))
    attacks.command(*command.split(), stdin="y\n" * 9).refused(
        "auto_map", "never run", "delete that key", absent=attacks.work / "out"
    )


@pytest.mark.parametrize("name", ["train", "export", "merge", "audit"])
def test_code_beside_a_class_that_transformers_has_is_left_alone(
    name: str, base: Path, attacks: Attacks
) -> None:
    """As in what is published of Phi-3 and DeepSeek: the command does its work, asks nothing, and what it
    writes names no code.
    """
    changed(base / "config.json", **planted(base, attacks.outside))
    done = attacks.command(*COMMANDS[name].split(), stdin="y\n" * 9).held()
    assert done.code == 0, done
    written = attacks.work / "out" / "config.json"
    assert name != "export" or written.is_file()
    assert not written.exists() or "auto_map" not in written.read_text()


NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "a model type that is not known": (
        "config.json",
        {"model_type": "odd", "auto_map": {"AutoConfig": "odd.C"}},
    ),
    "code of another repository": (
        "config.json",
        {"model_type": "odd", "auto_map": {"AutoModelForCausalLM": "somebody/repo--odd.M"}},
    ),
    "in a part": ("config.json", {"text_config": {"vision": [{"auto_map": {"AutoModel": "odd.M"}}]}}),
    "of the tokenizer": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["odd.T", None]}}),
    "of the processor": ("processor_config.json", {"auto_map": {"AutoProcessor": "odd.P"}}),
    "of images": ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "odd.P"}}),
    "of videos": ("video_preprocessor_config.json", {"auto_map": {"AutoVideoProcessor": "odd.P"}}),
    "consent": ("config.json", {"trust_remote_code": True}),
    "kernels for attention": ("config.json", {"attn_implementation": "somebody/kernels"}),
    "kernels for a part": (
        "config.json",
        {"_attn_implementation": {"text_config": "somebody/kernels@main:f"}},
    ),
    "kernels, inside": ("config.json", {"_attn_implementation_internal": "somebody/kernels"}),
    "kernels for experts": ("config.json", {"experts_implementation": "somebody/kernels"}),
    "weights elsewhere": ("config.json", {"backbone": "somebody/weights", "use_pretrained_backbone": True}),
}


@pytest.mark.parametrize(
    "command", ["merge causal pack -o out", "export causal pack -o out"], ids=["merge", "export"]
)
@pytest.mark.parametrize(("file", "keys"), NAMED.values(), ids=list(NAMED))
def test_configurations_that_name_code(
    file: str, keys: dict[str, Any], command: str, base: Path, attacks: Attacks
) -> None:
    planted(base, attacks.outside)
    (base / file).touch()
    (base / file).write_text((base / file).read_text() or "{}")
    changed(base / file, **keys)
    attacks.command(*command.split(), stdin="y\n" * 9).refused("never run", file, absent=attacks.work / "out")


@pytest.mark.parametrize(
    "command",
    ["train train.yaml", "export causal pack -o out", "measure causal pack --data rows.jsonl -o out"],
    ids=["train", "export", "measure"],
)
def test_an_adapter_in_the_bases_folder(command: str, base: Path, attacks: Attacks) -> None:
    """It is never loaded with the base, nor is the base that it names."""
    (base / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/nowhere", "r": 2})
    )
    attacks.command(*command.split()).refused("adapter_config.json", absent=attacks.work / "out")


def attached(base: Path, pack: Path) -> None:
    """What a user of torch does: a model from transformers, an adapter from a folder."""
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False)
    adapterpack.attach(model, adapterpack.load(pack))


def test_attaching_to_a_model_whose_folder_names_code(base: Path, attacks: Attacks) -> None:
    changed(base / "config.json", **planted(base, attacks.outside))
    attacks.call(attached, base, attacks.work / "pack").held()


def linked(path: Path, attacks: Attacks) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(attacks.outside / "secret.txt")


def piped(path: Path, attacks: Attacks) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path, attacks: Attacks) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


PLACES = [
    "merges.txt",
    "chat_template.jinja",
    "tokenizer.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "README.md",
]


@pytest.mark.parametrize(
    ("name", "plant", "command"),
    [
        *(
            (name, plant, command)
            for name in PLACES
            for plant in (linked, piped)
            for command in ("merge causal pack -o out",)
        ),
        *((name, linked, "export causal pack -o out") for name in PLACES),
        *(
            (name, plant, "train train.yaml")
            for name in ("merges.txt", "tokenizer.json")
            for plant in (linked, piped, device)
        ),
    ],
    ids=lambda value: value.__name__ if callable(value) else value.split()[0],
)
def test_files_that_are_not_the_bases_own(
    name: str, plant: Callable[[Path, Attacks], None], command: str, base: Path, attacks: Attacks
) -> None:
    plant(base / name, attacks)
    attacks.command(*command.split()).refused(
        name, "regular" if plant is piped else "leads out", absent=attacks.work / "out"
    )


def test_a_base_out_of_the_hubs_cache_and_links_inside_stay_readable(base: Path, attacks: Attacks) -> None:
    snapshot, blobs = (
        attacks.work / "models--o--n" / "snapshots" / ("a" * 40),
        attacks.work / "models--o--n" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in base.iterdir():
        path.rename(blobs / path.name[::-1])
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name[::-1]}")
    attacks.command("merge", snapshot, "pack", "-o", "out").harmless()
    (attacks.work / "out" / "again.json").symlink_to("config.json")
    (attacks.work / "link").symlink_to("out")
    attacks.command("inspect", attacks.work / "link").harmless()
    blobs_link = snapshot / "merges.txt"
    blobs_link.symlink_to(attacks.outside / "secret.txt")
    attacks.command("merge", snapshot, "pack", "-o", "other").refused("leads out")


COSTLY: dict[str, dict[str, Any]] = {
    "a million layers": {"num_hidden_layers": 10**6},
    "10^12 layers": {"num_hidden_layers": 10**12},
    "a million labels": {"num_labels": 10**8},
    "a width of 10^6": {"hidden_size": 10**6},
    "a vocabulary of 10^12": {"vocab_size": 10**12},
    "heads": {"num_attention_heads": 10**9, "head_dim": 1},
    "the width of a head": {"head_dim": 10**8},
    "inner width": {"intermediate_size": 10**12},
    "positions": {"max_position_embeddings": 10**15},
    "positions that fit into memory": {"max_position_embeddings": 10**8},
    "a number of 400 digits": {"num_hidden_layers": 10**400},
    "layers in words": {"num_hidden_layers": "many"},
    "layers below none": {"num_hidden_layers": -5},
    "kinds of layers": {"layer_types": ["full_attention"] * 300_000},
    "nested": {"text_config": json.loads("[" * 900 + "]" * 900)},
}


@pytest.mark.parametrize(
    "command",
    [
        "export causal pack -o out",
        "export causal -o out --task text-generation",
        "train train.yaml",
        "merge causal pack -o out",
    ],
    ids=["export", "export without packs", "train", "merge"],
)
@pytest.mark.parametrize("keys", COSTLY.values(), ids=list(COSTLY))
def test_configurations_of_models_that_the_checkpoint_does_not_hold(
    keys: dict[str, Any], command: str, base: Path, attacks: Attacks
) -> None:
    changed(base / "config.json", **keys)
    done = attacks.command(*command.split()).held()
    if not command.startswith("merge"):
        done.refused(absent=attacks.work / "out")


@pytest.mark.parametrize("keys", [{"n_positions": 10**9}, {"n_layer": 10**6}, {"n_embd": 10**6}], ids=str)
def test_gpt2s_that_the_checkpoint_does_not_hold(keys: dict[str, Any], base: Path, attacks: Attacks) -> None:
    changed(base / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"], **keys)
    attacks.command("export", "causal", "-o", "out", "--task", "text-generation").refused(
        absent=attacks.work / "out"
    )
