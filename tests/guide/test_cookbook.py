"""Every script of the cookbook runs on a tiny model, for a few steps."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import adapterpack
from adapterpack.errors import WronglySigned

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "cookbook"


def script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(SCRIPTS / f"{name}.py"))


@pytest.mark.long
def test_domain_adaptation(guide_folder: Path) -> None:
    """Repeated lines surprise the trained model less, and the merged checkpoint is another one."""
    (guide_folder / "notes.txt").write_text("w1 w2 w3 w4 w5 w6\n" * 30)
    result = script("domain_adaptation")["main"]("models/SmolLM2", "notes.txt", "out", "merged", 20)
    assert result["after"] < result["before"]
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in ("models/SmolLM2", "merged"))
    assert any(not np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.long
def test_classification(guide_folder: Path) -> None:
    """Both adapters answer, each with its own labels."""
    result = script("classification")["main"]("models/MiniLM", "out", "bundle", 2, 6)
    assert result.keys() == {"tickets", "reviews"}
    assert all(0 <= share <= 1 for share in result.values())


@pytest.mark.long
def test_vision_language(guide_folder: Path, tiny_bert: Path, tmp_path: Path) -> None:
    """A LLaVA of one layer answers about a prepared image."""
    from architecture_proofs import make_base
    from architectures import ARCHITECTURES

    base = make_base(next(one for one in ARCHITECTURES if one.name == "llava"), tmp_path / "llava")
    for path in tiny_bert.glob("*token*"):
        shutil.copyfile(path, base / path.name)
    np.save(tmp_path / "image.npy", np.zeros((3, 12, 12), np.float32))
    (tmp_path / "pictures.jsonl").write_text(
        json.dumps({"image": "image.npy", "prompt": "w1 w2", "completion": "w3"}) + "\n"
    )
    assert isinstance(script("vision_language")["main"](str(base), "pictures.jsonl", "out", "bundle", 2), str)


@pytest.mark.long
def test_qlora(guide_folder: Path) -> None:
    """The pack says how its base was held, and is merged into the base in full precision."""
    result = script("qlora")["main"](
        "models/SmolLM2", str(ROOT / "examples/data/orders.train.jsonl"), "out", "merged", 2
    )
    assert "nf4" in result["trained on"]
    assert (guide_folder / "merged" / "model.safetensors").is_file()


def test_multi_tenant(guide_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key reaches its own adapter, and the other one does not exist for it."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    adapterpack.export("models/MiniLM", ["packs/tickets"], "bundle", slots=4)
    (guide_folder / "watched").mkdir()
    shutil.move("packs/reviews", "watched/reviews")
    own, others, not_own, second = script("multi_tenant")["main"]("bundle", "watched", "keys.yaml")
    for answer, name in ((own, "packs/tickets"), (second, "watched/reviews")):
        assert answer.get("system_fingerprint") == adapterpack.load(name).id, answer
    assert others["error"]["code"] == not_own["error"]["code"] == "model_not_found"


def test_air_gapped(guide_folder: Path) -> None:
    """What was signed arrives and is merged; a byte that was changed on the way is refused before anything is
    read.
    """
    sys.path.insert(0, str(Path(__file__).parent))
    import error_causes

    error_causes._keys(guide_folder)
    (guide_folder / "medium").mkdir()
    functions = script("air_gapped")
    left = functions["leave"]("packs/orders", "key.pem", "medium")
    (guide_folder / "inside").mkdir()
    assert functions["arrive"]("medium", "key.pub", "models/SmolLM2", "inside") == [left]
    assert (guide_folder / "inside" / "orders" / "model.safetensors").is_file()
    error_causes._flip(guide_folder / "medium" / "orders" / "adapter_model.safetensors")
    with pytest.raises(WronglySigned):
        functions["arrive"]("medium", "key.pub", "models/SmolLM2", "again")


@pytest.mark.long
def test_thousand_adapters(guide_folder: Path) -> None:
    """A few of them: the fleet answers for each, and bases of their whole rank make no error but that of
    eight bits.
    """
    result = script("thousand_adapters")["main"](
        "models/SmolLM2", "fleet", "bundle", ["packs/orders", "packs/emails"], 6
    )
    assert result["worst error"] < 0.02  # eight bits: half a step of 1/127 of the largest
    assert result["fleet"] > 0


def test_every_script_is_run_here_and_shown() -> None:
    """A new one needs a test and a page; each is short enough to be read."""
    names = {path.stem for path in SCRIPTS.glob("*.py")}
    tests = Path(__file__).read_text("utf-8")
    assert names == set(re.findall(r"^def test_(\w+)\(guide_folder", tests, re.MULTILINE))
    pages = {
        path.stem.replace("-", "_"): path.read_text("utf-8")
        for path in (ROOT / "docs" / "cookbook").glob("*.md")
    }
    assert all(f'"examples/cookbook/{name}.py"' in pages[name] for name in names)
    lengths = {path.name: len(path.read_text("utf-8").splitlines()) for path in SCRIPTS.glob("*.py")}
    assert all(30 <= length <= 80 for length in lengths.values()), lengths
