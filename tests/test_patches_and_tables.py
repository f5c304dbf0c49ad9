"""Adapters of patch embeddings and of word embeddings that scale what the layer gives, in graphs beside plain
ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from architecture_proofs import make_base
from architectures import ARCHITECTURES

from adapterpack import OFT, DoRA, FourierFT, LoRA, Pack, Session, adapt, export, load, merge, save
from adapterpack.errors import Unsupported
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.models.load import load_model

BY_NAME = {one.name: one for one in ARCHITECTURES}
CLOSE = 1e-4
"""The share of the largest logit that two ways of computing it may differ by."""
VIT: Mapping[str, Any] = {
    "scaled": DoRA(r=2, targets=("projection", "q_proj")),
    "dense": FourierFT(n_frequency=40, targets=("projection",)),
    "plain": LoRA(r=3, targets=("projection",)),
}
LLAMA: Mapping[str, Any] = {
    "scaled": DoRA(r=2, targets=("embed_tokens", "q_proj")),
    "plain": LoRA(r=3, targets=("embed_tokens",)),
}


def _packs(base: Path, task: str, configs: Mapping[str, Any]) -> list[Pack]:
    packs = []
    for name, config in configs.items():
        model = adapt(load_model(get_task(task), base), config, name)
        torch.manual_seed(len(name))
        with torch.no_grad():
            for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
                parameter.add_(torch.randn_like(parameter) * 0.2)
        packs.append(save(model, base.parent / name, base=base, name=name))
    return packs


@pytest.fixture(scope="module", params=[("vit", VIT), ("llama", LLAMA)], ids=["patches", "words"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The base, its packs, inputs of three rows, and transformers' logits of these with each pack merged."""
    name, configs = request.param
    folder = tmp_path_factory.mktemp(name)
    base, task = make_base(BY_NAME[name], folder / "base"), BY_NAME[name].task
    packs = _packs(base, task, configs)
    rng = np.random.default_rng(3)
    key, value = (
        ("pixel_values", rng.standard_normal((3, 3, 12, 12)).astype(np.float32))
        if name == "vit"
        else ("input_ids", rng.integers(1, 96, (3, 7)))
    )
    expected = {}
    for pack in [None, *packs]:
        where = base
        if pack is not None:
            where = folder / f"merged-{pack.name}"
            merge(base, [pack], where)
        model = getattr(transformers, get_task(task).auto_class).from_pretrained(where).eval()
        with torch.no_grad():
            expected[None if pack is None else pack.name] = model(
                **{key: torch.from_numpy(value)}
            ).logits.numpy()
    return base, packs, {key: value}, expected


@pytest.mark.parametrize("mode", ["bank", "inputs"])
def test_rows_have_the_logits_of_the_merged_models(mode: str, made: Any, tmp_path: Path) -> None:
    base, packs, inputs, expected = made
    export(base, packs, tmp_path / "bundle", mode=mode)
    session = Session(tmp_path / "bundle", "cpu")
    names = [None, *(pack.name for pack in packs)]
    for start in range(len(names)):
        chosen = [names[(start + row) % len(names)] for row in range(3)]
        logits = session.run(inputs, chosen)["logits"]
        for row, name in enumerate(chosen):
            assert (
                np.abs(logits[row] - expected[name][row]).max() <= CLOSE * np.abs(expected[name][row]).max()
            )


def test_a_pack_is_loaded_into_a_running_bank(made: Any, tmp_path: Path) -> None:
    """The lengths of the base's rows come from the graph."""
    base, packs, inputs, expected = made
    export(base, packs[:1], tmp_path / "bundle", slots=4, max_rank=4)
    session = Session(tmp_path / "bundle", "cpu")
    name = session.load(load(base.parent / "scaled"), "again")
    logits = session.run(inputs, name)["logits"]
    assert np.abs(logits - expected["scaled"]).max() <= CLOSE * np.abs(expected["scaled"]).max()


def test_what_changes_the_input_of_patches_is_refused_by_name(tmp_path: Path) -> None:
    base = make_base(BY_NAME["vit"], tmp_path / "base")
    (pack,) = _packs(base, "image-classification", {"turned": OFT(r=4, targets=("projection",))})
    with pytest.raises(Unsupported, match="slots only for what is added to its output or scales it"):
        export(base, [pack], tmp_path / "bundle", mode="bank")
