"""The relatives of LoRA along the whole line: trained, packed, merged, attached and served from one bank,
with one result.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from adapterpack import Session, attach, export, load, merge, train
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.models.load import load_model

Make = Callable[..., Any]
FP32 = 2e-5
"""Absolute, on logits of about 1: float32 on both sides, sums in another order."""
SETTINGS: dict[str, dict[str, Any]] = {
    "dora": {"method": "dora", "r": 3, "alpha": 5},
    "lokr": {"method": "lokr", "r": 2, "alpha": 6, "decompose_factor": 4},
    "adalora": {"method": "adalora", "init_r": 4, "target_r": 2, "alpha": 16, "tfinal": 2, "deltaT": 2},
}


@pytest.fixture(scope="module")
def packs(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each method trained for eight steps on a classifier with biases; name -> the folder of its pack."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("relatives")
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"text": f"w{i % 6 + 40 * (i % 2)} w{i % 9 + 70}", "label": ("no", "yes")[i % 2]})
            + "\n"
            for i in range(48)
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        for name, own in SETTINGS.items():
            train(
                {
                    "task": "text-classification",
                    "model_name_or_path": str(tiny_bert),
                    "train_file": str(rows),
                    "output_dir": str(folder / name),
                    "learning_rate": 3e-2,
                    "max_steps": 8,
                    "max_length": 16,
                    **own,
                }
            )
    return {name: folder / name for name in SETTINGS}


@pytest.fixture(scope="module")
def bank(packs: dict[str, Path], tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bank with all of them."""
    folder = tmp_path_factory.mktemp("banks") / "bank"
    export(tiny_bert, list(packs.values()), folder, mode="bank", slots=4)
    return folder


IDS = np.array([[5, 44, 71, 9, 3], [46, 8, 80, 11, 4], [60, 61, 62, 7, 5]], np.int64)


def logits(model: torch.nn.Module) -> np.ndarray:
    ids = torch.tensor(IDS)
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.double().numpy()


def test_merged_attached_and_served_agree(
    packs: dict[str, Path], bank: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    """Merged checkpoint == attached model == each row of a mixed batch in the bank, within 2e-5, for each of
    the methods.
    """
    served = Session(bank).run({"input_ids": IDS, "attention_mask": np.ones_like(IDS)}, list(SETTINGS))[
        "logits"
    ]
    for row, (name, folder) in enumerate(packs.items()):
        pack = load(folder)
        assert pack.method.name == name
        base = load_model(get_task("text-classification"), tiny_bert, ["no", "yes"])
        before = logits(base)
        attached = logits(attach(base, pack))
        assert np.abs(attached - before).max() > 0.05, "eight steps changed something"
        merge(tiny_bert, [folder], tmp_path / name)
        merged = logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / name))
        np.testing.assert_allclose(merged, attached, rtol=0, atol=FP32, err_msg=name)
        np.testing.assert_allclose(served[row], attached[row], rtol=0, atol=FP32, err_msg=name)


def test_the_budget_is_spent_and_the_pack_is_smaller_for_it(packs: dict[str, Path]) -> None:
    """AdaLoRA: all sites together have the rank that the budget leaves, unevenly shared out; a site that has
    none keeps one zero.
    """
    adapters = list(load(packs["adalora"]).adapters())
    ranks = [adapter.config.r for adapter in adapters]
    assert sum(int(np.count_nonzero(adapter.params["lora_E"])) for adapter in adapters) == 2 * len(adapters)
    assert len(set(ranks)) > 1
    for adapter in adapters:
        assert adapter.params["lora_A"].shape[0] == adapter.params["lora_B"].shape[1] == adapter.config.r
        assert adapter.config.r == 1 or np.all(adapter.params["lora_E"] != 0)


def test_the_whole_bank_is_the_base_without_an_adapter(bank: Path) -> None:
    """A row that names no adapter is the same within 1e-6, whatever its neighbours have."""
    session = Session(bank)
    inputs = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    alone = session.run(inputs, [None, None, None])["logits"]
    mixed = session.run(inputs, [None, "dora", "lokr"])["logits"]
    np.testing.assert_allclose(mixed[0], alone[0], rtol=0, atol=1e-6)
