"""A folder as the pages of the guide suppose it: models, packs with the names that they use, and the
examples.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENCODER, DECODER = "MiniLM", "SmolLM2"
NAMES = {ENCODER: ("tickets", "reviews"), DECODER: ("orders", "emails")}
LABELS = {
    "tickets": ["account", "billing", "delivery", "product", "returns", "technical"],
    "reviews": ["negative", "positive"],
}


@pytest.fixture(scope="session")
def guide_packs(base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random LoRAs of tiny models, two classifiers and two for text, under the names of the guide."""
    import torch

    from adapterpack import LoRA, adapt, save
    from adapterpack.tasks.task import get_task
    from adapterpack.torch_adapters.models.load import load_model

    folder = tmp_path_factory.mktemp("guide-packs")
    for model, names in NAMES.items():
        for seed, name in enumerate(names):
            base = base_of("bert" if model == ENCODER else "llama")
            labels = LABELS.get(name)
            made = load_model(get_task("text-classification" if labels else "text-generation"), base, labels)
            if labels is None:
                # else a head that the base does not hold would be trained whole
                made.config._name_or_path = ""
            adapt(made, LoRA(r=3, alpha=6, **({"modules_to_save": ("classifier",)} if labels else {})), name)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in made.parameters():
                    if parameter.requires_grad:
                        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            save(made, folder / name, base=base)
    return folder


@pytest.fixture
def guide_folder(
    guide_packs: Path, base_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The current folder: ``models``, ``packs``, ``examples``, and a file of rows."""
    for name, kind in ((ENCODER, "bert"), (DECODER, "llama")):
        shutil.copytree(base_of(kind), tmp_path / "models" / name)
    shutil.copytree(guide_packs, tmp_path / "packs")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    rows = [{"text": "w1 w2", "adapter": "tickets"}, {"text": "w3 w4 w5", "adapter": None}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAPTERPACK_CACHE", str(tmp_path / "cache"))
    return tmp_path
