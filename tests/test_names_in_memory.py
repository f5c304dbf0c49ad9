"""Adapters of PEFT by the names that transformers gives the modules in memory, and by those of the
checkpoint, on checkpoints of either.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from noise import shake
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import WeightConverter
from transformers.conversion_mapping import get_model_conversion_mapping

from adapterpack import Session, attach, convert, export, load, merge, merge_into, validate
from adapterpack.errors import NothingToDo, Unsupported
from adapterpack.pack.on_base import move_paths

TEXT = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
PATCHES = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "intermediate_size": 20,
    "out_hidden_size": 16,
}
IDS = {"image_token_id": 7, "video_token_id": 8, "vision_start_token_id": 9, "vision_end_token_id": 6}


class Family(NamedTuple):
    """A class of models, its configuration's class and fields, and what PEFT adapts of it."""

    model: str
    config: str
    fields: dict[str, Any]
    targets: str
    moves: bool = True

    def build(self) -> Any:
        torch.manual_seed(2)
        return getattr(transformers, self.model)(getattr(transformers, self.config)(**self.fields)).eval()

    def load(self, folder: Path) -> Any:
        return getattr(transformers, self.model).from_pretrained(folder).eval()


BOTH = r".*(q_proj|v_proj|qkv|fc1|linear_1)"
IMAGES = r".*(q_proj|query|fc1|dense|up_proj)"
FAMILIES = {
    "llava": Family(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **PATCHES},
            "image_token_index": 7,
        },
        BOTH,
    ),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {"text_config": {**TEXT, **ROPE}, "vision_config": {**QWEN, "embed_dim": 16, "mlp_ratio": 2}, **IDS},
        BOTH,
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {"text_config": {**TEXT, **ROPE}, "vision_config": {**QWEN, "fullatt_block_indexes": [0]}, **IDS},
        BOTH,
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {"text_config": {**TEXT, **ROPE}, "vision_config": {**QWEN, "deepstack_visual_indexes": [0]}, **IDS},
        BOTH,
        False,
    ),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": TEXT, "vision_config": PATCHES, "mm_tokens_per_image": 4, "image_token_index": 7},
        BOTH,
    ),
    "smolvlm": Family(
        "SmolVLMForConditionalGeneration",
        "SmolVLMConfig",
        {"text_config": {"model_type": "llama", **TEXT}, "vision_config": PATCHES, "image_token_id": 7},
        BOTH,
        False,
    ),
    "vit": Family("ViTForImageClassification", "ViTConfig", {**PATCHES, "num_labels": 3}, IMAGES),
    "deit": Family("DeiTForImageClassification", "DeiTConfig", {**PATCHES, "num_labels": 3}, IMAGES),
    "beit": Family("BeitForImageClassification", "BeitConfig", {**PATCHES, "num_labels": 3}, IMAGES),
    "dinov2": Family(
        "Dinov2ForImageClassification", "Dinov2Config", {**PATCHES, "mlp_ratio": 2, "num_labels": 3}, IMAGES
    ),
}


def _adapter(family: Family, base: Path, out: Path) -> dict[str, torch.Tensor]:
    """PEFT's adapter of the names in memory; returns the weights with it merged."""
    torch.manual_seed(3)
    model = peft.get_peft_model(
        family.load(base), LoraConfig(r=2, target_modules=family.targets, init_lora_weights=False)
    )
    model.save_pretrained(out)
    return _weights(model.merge_and_unload())


def led_by_transformers(model: Any, name: str) -> str:
    """Where a checkpoint's name leads, by transformers itself."""
    for transform in get_model_conversion_mapping(model):
        name = name if isinstance(transform, WeightConverter) else transform.rename_source_key(name)[0]
    return name


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _require_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Equal up to the rounding of one sum in float32, of weights of about one."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, atol=2e-6, rtol=0, msg=lambda said, name=name: f"{name}: {said}"
        )


def _renamed(folder: Path, out: Path, names: dict[str, str]) -> Path:
    """The adapter with other paths of its modules."""
    out.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        path, leaf = re.fullmatch(r"base_model\.model\.(.+)(\.lora_[AB]\.weight)", name).groups()
        tensors[f"base_model.model.{names[path]}{leaf}"] = value
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps({**config, "target_modules": sorted(names.values())}))
    return out


def _proved(
    family: Family, base: Path, adapter: Path, wanted: dict[str, torch.Tensor], work: Path
) -> dict[str, str]:
    """Attached, merged and converted the adapter gives the weights ``wanted``; returns the checkpoint's name
    of each path in memory.
    """
    work.mkdir()
    attached = attach(family.load(base), load(adapter))
    _require_equal(_weights(merge_into(attached, keep=False)), wanted)
    merge(base, [adapter], work / "merged")
    _require_equal(_weights(family.load(work / "merged")), wanted)
    convert(adapter, work / "pack", to="pack", base=base)
    assert validate(work / "pack", base=base).findings == ()
    _require_equal(
        _weights(PeftModel.from_pretrained(family.load(base), work / "pack").merge_and_unload()), wanted
    )
    return {
        group.path: str(group.weight).removesuffix(".weight")
        for group in load(work / "pack").groups
        if group.role == "adapter"
    }


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_of_peft_means_the_same_by_the_names_in_memory_and_by_those_of_the_checkpoint(
    name: str, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    family.build().save_pretrained(tmp_path / "base")
    wanted = _adapter(family, tmp_path / "base", tmp_path / "peft")
    names = _proved(family, tmp_path / "base", tmp_path / "peft", wanted, tmp_path / "new")
    assert any(path != stored for path, stored in names.items()) == family.moves
    if family.moves:
        old = _renamed(tmp_path / "peft", tmp_path / "old", names)
        assert _proved(family, tmp_path / "base", old, wanted, tmp_path / "again") == names


@pytest.mark.parametrize(
    ("name", "whole"),
    [("llava", "multi_modal_projector"), ("llava", "lm_head"), ("qwen2_vl", "merger"), ("vit", "mlp")],
)
def test_modules_that_were_trained_whole_are_found_by_the_names_in_memory(
    name: str, whole: str, tmp_path: Path
) -> None:
    """Beside layers that have other names in the checkpoint, or have them themselves: attached and merged as
    PEFT merges them.
    """
    family = FAMILIES[name]
    family.build().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=[whole])
    model = shake(peft.get_peft_model(family.load(tmp_path / "base"), config), 0.1, 3)
    model.save_pretrained(tmp_path / "adapter")
    wanted = _weights(model.merge_and_unload())
    attached = attach(family.load(tmp_path / "base"), load(tmp_path / "adapter"))
    _require_equal(_weights(merge_into(attached, keep=False)), wanted)
    convert(tmp_path / "adapter", tmp_path / "pack", to="pack", base=tmp_path / "base")
    for source in ("adapter", "pack"):
        merge(tmp_path / "base", [tmp_path / source], tmp_path / f"merged-{source}")
        _require_equal(_weights(family.load(tmp_path / f"merged-{source}")), wanted)


@pytest.mark.long
def test_a_llava_is_exported_with_adapters_of_peft_by_either_names(tmp_path: Path) -> None:
    """Of its language model; the export proves each against the model that it is attached to."""
    family = FAMILIES["llava"]._replace(targets=".*language_model.*q_proj")
    family.build().save_pretrained(tmp_path / "base")
    _adapter(family, tmp_path / "base", tmp_path / "new")
    path = "model.language_model.layers.0.self_attn.q_proj"
    _renamed(tmp_path / "new", tmp_path / "old", {path: "language_model.model.layers.0.self_attn.q_proj"})
    export(tmp_path / "base", [tmp_path / "new", tmp_path / "old"], tmp_path / "bundle", mode="bank")
    assert {
        group.path
        for name in ("new", "old")
        for group in load(tmp_path / "bundle" / "adapters" / name).groups
    } == {path}


@pytest.mark.long
@pytest.mark.parametrize("name", ["vit", "deit", "beit", "dinov2"])
def test_a_bank_holds_an_adapter_of_peft_by_either_names(name: str, tmp_path: Path) -> None:
    """Both give PEFT's logits, in one batch with the base."""
    family = FAMILIES[name]
    family.build().save_pretrained(tmp_path / "base")
    wanted = _adapter(family, tmp_path / "base", tmp_path / "new")
    stored = {
        led_by_transformers(family.build(), one): one
        for one in load_file(tmp_path / "base" / "model.safetensors")
    }
    _renamed(
        tmp_path / "new",
        tmp_path / "old",
        {
            path: stored[f"{path}.weight"].removesuffix(".weight")
            for path in {group.path for group in load(tmp_path / "new").groups}
        },
    )
    export(tmp_path / "base", [tmp_path / "new", tmp_path / "old"], tmp_path / "bundle", mode="bank")
    pixels = torch.linspace(-1, 1, 3 * 3 * 8 * 8).reshape(3, 3, 8, 8).sin()
    found = Session(tmp_path / "bundle", "cpu").run({"pixel_values": pixels.numpy()}, ["new", "old", None])[
        "logits"
    ]
    model = family.load(tmp_path / "base")
    with torch.no_grad():
        base = model(pixel_values=pixels).logits
        model.load_state_dict(wanted)
        adapted = model(pixel_values=pixels).logits
    assert (adapted - base).abs().max() > 0.01
    torch.testing.assert_close(
        torch.from_numpy(found), torch.stack([*adapted[:2], base[2]]), atol=1e-5, rtol=0
    )


def test_a_pack_of_its_base_with_names_of_another_transformers_becomes_one_with_the_names_in_memory(
    tmp_path: Path,
) -> None:
    """Such a pack is what a training wrote under the older version. An export says so and the way out; what
    ``convert`` makes of it holds the same numbers, names its parent, and PEFT reads it.
    """
    family = FAMILIES["vit"]
    family.build().save_pretrained(tmp_path / "base")
    wanted = _adapter(family, tmp_path / "base", tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "new", to="pack", base=tmp_path / "base")
    new = load(tmp_path / "new")
    names = {
        group.path: str(group.weight).removesuffix(".weight")
        for group in new.groups
        if group.role == "adapter"
    }
    old = move_paths(new, names, sealing=True).write(tmp_path / "old")
    assert old.manifest.base == new.manifest.base
    assert old.id != new.id
    with pytest.raises(Unsupported, match="another version of transformers") as refused:
        export(tmp_path / "base", [old], tmp_path / "bundle", mode="bank")
    assert "adapterpack convert PACK -o NEW --to pack --base BASE" in str(refused.value.remedy)
    convert(tmp_path / "old", tmp_path / "again", to="pack", base=tmp_path / "base")
    again = load(tmp_path / "again")
    assert [parent.digest for parent in again.manifest.lineage.parents] == [old.id]
    assert {group.path for group in again.groups} == {group.path for group in new.groups}
    _require_equal(
        _weights(
            PeftModel.from_pretrained(family.load(tmp_path / "base"), tmp_path / "again").merge_and_unload()
        ),
        wanted,
    )
    assert validate(tmp_path / "again", base=tmp_path / "base").findings == ()
    with pytest.raises(NothingToDo):
        convert(tmp_path / "again", tmp_path / "twice", to="pack", base=tmp_path / "base")
    export(tmp_path / "base", [again], tmp_path / "bundle", mode="bank")
