"""Poly of PEFT: each task of a folder is an adapter of its own, and all of them are there when it goes
back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from noise import shake
from safetensors.torch import load_file, save_file
from torch import nn

import adapterpack
from adapterpack import attach, convert, load
from adapterpack.errors import ConfigError, FormatError, Unsupported
from adapterpack.peft import layout

pytestmark = pytest.mark.filterwarnings("ignore")
TASKS, R, SKILLS = 3, 2, 4


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(15, 21), nn.Tanh(), nn.Linear(21, 9, bias=False))


def by_hand(x: np.ndarray, tensors: dict[str, torch.Tensor], task: int, splits: int) -> np.ndarray:
    """The formula in float64, entry by entry: column c of a part mixes the skills with the weights of that
    part.
    """
    values = {key: value.double().numpy() for key, value in tensors.items()}
    for number in (0, 2):
        layer, at = net()[number], f"base_model.model.{number}.poly_"
        W = layer.weight.detach().double().numpy()
        shares = 1 / (1 + np.exp(-values[f"{at}router.module_logits"][task].reshape(splits, SKILLS)))
        shares /= shares.sum(1, keepdims=True)
        out, wide = W.shape
        A, B = np.zeros((R, wide)), np.zeros((out, R))
        for column in range(wide):
            part, within = divmod(column, wide // splits)
            A[:, column] = sum(
                shares[part, s] * values[f"{at}lora_A"][part, s, within] for s in range(SKILLS)
            )
        for row in range(out):
            part, within = divmod(row, out // splits)
            B[row] = sum(shares[part, s] * values[f"{at}lora_B"][part, s, :, within] for s in range(SKILLS))
        x = x @ (W + B @ A / R).T + (0 if layer.bias is None else layer.bias.detach().double().numpy())
        x = np.tanh(x) if number == 0 else x
    return x


@pytest.fixture
def theirs(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """PEFT's model, saved in ``theirs``, and the base in ``base``."""
    splits = getattr(request, "param", 1)
    config = peft.PolyConfig(target_modules=["0", "2"], r=R, n_tasks=TASKS, n_skills=SKILLS, n_splits=splits)
    model = shake(peft.get_peft_model(net(), config), 0.5, 5).eval()
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "base").mkdir()
    save_file(net().state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    return model


@pytest.mark.parametrize(("theirs", "splits"), [(1, 1), (3, 3)], indirect=["theirs"], ids=["1", "3"])
@torch.no_grad()
def test_poly_of_peft_task_by_task(theirs: Any, splits: int, tmp_path: Path) -> None:
    """Attached, merged, and by rows, every task is the formula and what PEFT gives with its number; float32's
    roundings are below 1e-5.
    """
    x = torch.randn(TASKS, 5, 15, generator=torch.Generator().manual_seed(1))
    tensors = load_file(tmp_path / "theirs" / layout.TENSORS)
    mixed = net()
    for task in range(TASKS):
        convert(
            tmp_path / "theirs", tmp_path / f"pack{task}", to="pack", base=tmp_path / "base", part=str(task)
        )
        pack = load(tmp_path / f"pack{task}")
        wanted = by_hand(x.double().numpy(), tensors, task, splits)
        assert np.abs(wanted - net()(x).numpy()).max() > 0.1
        adapterpack.merge(tmp_path / "base", [pack], tmp_path / f"merged{task}", durable=False)
        merged = net()
        merged.load_state_dict(load_file(tmp_path / f"merged{task}" / "model.safetensors"))
        for found in (
            theirs.base_model(x, task_ids=torch.full((TASKS,), task)),
            attach(net(), pack)(x),
            merged(x),
        ):
            np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)
        attach(mixed, pack, f"task{task}")
    order = [2, 0, 1]
    wanted = theirs.base_model(x, task_ids=torch.tensor(order)).numpy()
    with adapterpack.using(mixed, adapters=[f"task{task}" for task in order]):
        np.testing.assert_allclose(mixed(x).numpy(), wanted, atol=1e-5)
    # a pack is PEFT's folder, with every task
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "pack2").eval()
    np.testing.assert_allclose(again.base_model(x, task_ids=torch.tensor(order)).numpy(), wanted, atol=1e-6)
    back = load_file(tmp_path / "pack2" / layout.TENSORS)
    assert back.keys() == tensors.keys() and all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_tasks_that_there_are_not(theirs: Any, tmp_path: Path) -> None:
    """Another task than there are, a file that has fewer, another router, and a part of an adapter that has
    none.
    """
    assert load(tmp_path / "theirs").manifest.config["default_task"] == 0
    for part in ("3", "-1", "one", "9" * 5000):
        with pytest.raises(ConfigError, match="no such task"):
            convert(tmp_path / "theirs", tmp_path / "out", to="pack", part=part)
    config = json.loads((tmp_path / "theirs" / layout.CONFIG).read_text())
    for change, error, words in (
        ({"n_tasks": 7}, FormatError, "poly_router"),
        ({"n_skills": 0}, FormatError, "n_skills"),
        ({"poly_type": "other"}, Unsupported, "poly_type"),
    ):
        (tmp_path / "theirs" / layout.CONFIG).write_text(json.dumps({**config, **change}))
        with pytest.raises(error, match=words):
            load(tmp_path / "theirs")
    peft.get_peft_model(net(), peft.LoraConfig(target_modules=["0"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ConfigError, match="no tasks to choose from"):
        convert(tmp_path / "lora", tmp_path / "out", to="pack", part="0")
    assert not (tmp_path / "out").exists()
