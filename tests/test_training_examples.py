"""The scripts in ``examples/training`` run as they stand, on tiny random models and for a few steps."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architecture_proofs import make_base
from architectures import ARCHITECTURES
from forked import fork_two

import adapterpack

EXAMPLES = Path(__file__).parent.parent / "examples" / "training"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The data sets' cache in a folder of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        yield folder


def main_of(name: str) -> Any:
    """The function of an example."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("plain_loop", "tiny_llama"),
        ("with_trainer", "tiny_bert"),
        *(
            pytest.param(name, base, marks=pytest.mark.long)
            for name, base in (
                ("trl_sft", "tiny_llama"),
                ("embeddings", "tiny_bert"),
                ("qlora", "tiny_llama"),
            )
        ),
    ],
)
def test_a_script_trains_a_pack(name: str, base: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Two steps, and a pack that is valid on the base."""
    folder = request.getfixturevalue(base)
    main_of(name)(str(folder), str(tmp_path / "pack"), 2)
    assert adapterpack.validate(tmp_path / "pack", folder).valid


def test_packs_change_in_a_pipeline(tiny_bert: Path, tmp_path: Path) -> None:
    """A pack's own labels are shown while it is active."""
    main_of("with_trainer")(str(tiny_bert), str(tmp_path / "tickets"), 2)
    answers = main_of("in_a_pipeline")(str(tiny_bert), str(tmp_path / "tickets"))
    assert answers["tickets"]["label"] in adapterpack.load(tmp_path / "tickets").manifest.task.labels


@pytest.mark.long
def test_preferences_on_top_of_a_pack(tiny_llama: Path, tmp_path: Path) -> None:
    """DPO goes on from what the plain loop has packed, and says so."""
    first = main_of("plain_loop")(str(tiny_llama), str(tmp_path / "orders"), 2)
    pack = main_of("trl_dpo")(str(tiny_llama), str(tmp_path / "polite"), str(tmp_path / "orders"), 2)
    assert [parent.digest for parent in pack.manifest.lineage.parents] == [first.id]


@pytest.mark.long
@pytest.mark.parametrize("name", ["accelerate_ddp", "fsdp2"])
def test_two_processes_train_one_pack(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Both talk over gloo, and the first one writes."""
    fork_two(EXAMPLES / f"{name}.py", str(tiny_llama), str(tmp_path / "pack"), "2")
    assert adapterpack.validate(tmp_path / "pack", tiny_llama).valid


@pytest.mark.long
def test_pictures_with_questions(tiny_bert: Path, tmp_path: Path) -> None:
    """A LLaVA of one layer, rows with prepared images."""
    base = make_base(next(one for one in ARCHITECTURES if one.name == "llava"), tmp_path / "base")
    for path in tiny_bert.glob("*token*"):
        shutil.copyfile(path, base / path.name)
    np.save(tmp_path / "image.npy", np.zeros((3, 12, 12), np.float32))
    row = {"image": str(tmp_path / "image.npy"), "prompt": "w1 w2", "completion": "w3"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    main_of("vision_language")(str(base), str(tmp_path / "pack"), str(tmp_path / "rows.jsonl"), 2)
    assert adapterpack.validate(tmp_path / "pack", base).valid


def test_every_script_is_run_here() -> None:
    """A new one needs a test; that of Ray's is in ``serving/test_ray.py``."""
    tested = {
        "plain_loop",
        "with_trainer",
        "trl_sft",
        "trl_dpo",
        "embeddings",
        "qlora",
        "in_a_pipeline",
        "accelerate_ddp",
        "fsdp2",
        "vision_language",
        "ray_train",
    }
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert all(20 <= length <= 80 for length in lengths.values()), lengths
