"""Schedules and shards of axolotl's files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import adapterpack
from adapterpack.errors import ConfigError
from adapterpack.training.config.config import read_config
from adapterpack.training.config.sources import sources_of
from adapterpack.training.data.load import load_rows

WARMUP, STEPS, RATE = 4, 20, 0.01


def quadratic(step: int) -> float:
    """axolotl's ``get_cosine_schedule_with_quadratic_warmup``, with half a cycle."""
    if step < WARMUP:
        return (step / WARMUP) ** 2
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * (step - WARMUP) / (STEPS - WARMUP))))


def constant(step: int) -> float:
    """Its ``get_cosine_schedule_with_warmup_decay_constant``, with a lowest rate of 0.1 from 0.8 on."""
    if step < WARMUP:
        return step / WARMUP
    last = int(STEPS * 0.8)
    done = (min(step, last) - WARMUP) / max(1, last - WARMUP)
    return max(0.0, (1 - 0.1) * 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * done))) + 0.1


def plain(step: int) -> float:
    """The cosine of transformers."""
    return quadratic(step) if step >= WARMUP else step / WARMUP


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"lr_quadratic_warmup": True}, quadratic),
        ({"lr_quadratic_warmup": True, "cosine_min_lr_ratio": 0.1}, quadratic),
        ({"cosine_min_lr_ratio": 0.1, "cosine_constant_lr_ratio": 0.8}, constant),
        ({"cosine_constant_lr_ratio": 0.8, "lr_quadratic_warmup": False, "lr_div_factor": 6}, plain),
    ],
)
def test_the_learning_rate_of_every_step(
    settings: Mapping[str, Any], wanted: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    """As axolotl's formulas have it, which need both ratios for a constant end."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "w1 w2 w3"}) + "\n")
    file = {
        "base_model": str(tiny_llama),
        "adapter": "lora",
        "datasets": [{"path": str(rows), "type": "completion"}],
        "lora_target_modules": ["q_proj"],
        "learning_rate": RATE,
        "lr_scheduler": "cosine",
        "warmup_steps": WARMUP,
        "max_steps": STEPS,
        "sequence_len": 16,
        "output_dir": str(tmp_path / "pack"),
        **settings,
    }
    found: dict[int, float] = {}

    def heard(step: Any) -> None:
        found.update(
            {entry["step"]: entry["learning_rate"] for entry in step.log if "learning_rate" in entry}
        )

    adapterpack.train(file, progress=heard)
    assert {*found} >= {*range(1, STEPS)}
    for step, rate in found.items():  # of the step that was made, the rate that was logged
        assert rate == pytest.approx(RATE * wanted(step - 1), rel=1e-9, abs=1e-15)


def test_other_schedules_leave_a_cosines_settings_alone() -> None:
    file = {"base_model": "b", "adapter": "lora", "datasets": [{"path": "x.jsonl", "type": "completion"}]}
    (config,), _ = read_config(
        {**file, "lr_scheduler": "linear", "cosine_min_lr_ratio": 0.1, "lr_quadratic_warmup": True}
    )
    assert (config.lr_scheduler_type, config.lr_scheduler_kwargs) == ("linear", {})


@pytest.mark.parametrize(
    ("entry", "whole", "wanted"),
    [
        ({"shards": 3, "shards_idx": 1}, {}, [1, 4, 7, 10]),
        ({"shards": 3}, {}, [0, 3, 6, 9]),
        ({}, {"dataset_shard_num": 4, "dataset_shard_idx": 2}, [2, 6, 10]),
        ({"shards": 2, "shards_idx": 1}, {"dataset_shard_num": 3, "dataset_shard_idx": 1}, [3, 9]),
        ({}, {"dataset_shard_num": 4}, list(range(12))),
    ],
)
def test_shards_of_the_data(
    entry: dict[str, Any], whole: dict[str, Any], wanted: list[int], tmp_path: Path
) -> None:
    """Each row is in one of them; a shard of the whole is the same shard of what is left of each source."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"w{number}"}) + "\n" for number in range(12)))
    file = {"base_model": "b", "adapter": "lora", **whole}
    (config,), _ = read_config(
        {**file, "datasets": [{"path": str(rows), "type": "completion", "shards": None, **entry}]}
    )
    (source,) = sources_of(config.train_file, "here")
    assert load_rows(source)["text"][:] == [f"w{number}" for number in wanted]


def test_a_shard_that_is_not_there(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "w1"}) + "\n")
    (source,) = sources_of({"path": str(rows), "shards": 2, "shards_idx": 2}, "here")
    with pytest.raises(ConfigError, match=r"no such part of the data.*less than shards, 2, found 2"):
        load_rows(source)
