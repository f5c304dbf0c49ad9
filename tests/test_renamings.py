"""The shipped map of names is the one of transformers, which is read here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from renamings import parts_of, written
from safetensors.torch import load_file
from test_names_in_memory import FAMILIES, PATCHES, TEXT, Family, led_by_transformers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from adapterpack.base.renamings import in_memory, renamings_of
from adapterpack.resources import resource


def test_the_map_without_transformers_leads_where_transformers_leads(tmp_path: Path) -> None:
    """Every name of a checkpoint, as this transformers writes it and as it was published, and every name in
    memory.
    """
    siglip = {**FAMILIES["llava"].fields, "vision_config": {"model_type": "siglip_vision_model", **PATCHES}}
    text = {
        "model": "CLIPTextModel",
        "config": "CLIPTextConfig",
        "fields": {**TEXT, "projection_dim": 16},
        "targets": "",
    }
    both = Family("CLIPModel", "CLIPConfig", {"text_config": TEXT, "vision_config": PATCHES}, "")
    for number, family in enumerate(
        [*FAMILIES.values(), FAMILIES["llava"]._replace(fields=siglip), Family(**text), both]
    ):
        model = family.build()
        steps = renamings_of(model.config.to_dict(), family.model)
        model.save_pretrained(folder := tmp_path / str(number))
        stored = load_file(folder / "model.safetensors")
        published = [name.replace("vision_tower.", "vision_tower.vision_model.") for name in stored]
        for name in (*stored, *published, *(f"text_model.{name}" for name in stored), *model.state_dict()):
            assert in_memory(name, steps) == led_by_transformers(model, name)


def test_the_shipped_map_is_what_transformers_says() -> None:
    """``make golden`` renews it: every step of every class and type, and the parts of a sample of the
    classes.
    """
    shipped = json.loads(resource("base/renamings.json").read_text())

    def entry(table: str, name: str) -> Any:
        value = shipped[table][name]
        return shipped[table][value] if isinstance(value, str) else value

    for name in shipped["renamings"]:
        assert entry("renamings", name) == written(get_checkpoint_conversion_mapping(name)), name
    for family in FAMILIES.values():
        model = family.build()
        parts = [part for part in parts_of(model) if part[1] in shipped["renamings"] or part[2]]
        assert (entry("models", family.model)[1] if family.model in shipped["models"] else []) == parts, (
            family.model
        )
