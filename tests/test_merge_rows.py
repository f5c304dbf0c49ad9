"""Modules whose weights and biases are rows of one tensor of the checkpoint: saved, attached and merged."""

from __future__ import annotations

from pathlib import Path

import noise
import numpy as np
import pytest
import torch
from every_family.tiny import make_base
from msgspec.structs import replace

from adapterpack import DoRA, LoRA, adapt, attach, compose, load, merge, save, validate
from adapterpack.base.checkpoint import Checkpoint
from adapterpack.errors import Unsupported
from adapterpack.pack.pack import seal
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.models.load import load_model

pytestmark = pytest.mark.fast
TASK = get_task("feature-extraction")
QKV = "encoder.layer.0.attention.qkv_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(TASK, "gte", tmp_path_factory.mktemp("rows") / "base")


def outputs(folder: Path, *packs: Path) -> torch.Tensor:
    model = load_model(TASK, folder).eval()
    for pack in packs:
        attach(model, load(pack))
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 12).view(1, -1)).last_hidden_state


def trained(base: Path, out: Path, config: LoRA | DoRA) -> Path:
    model = adapt(load_model(TASK, base), config)
    noise.shake(model, 0.3, 1)
    save(model, out, base=base)
    return out


@pytest.mark.parametrize(
    "whole", [(), ("layers.0.self_attn.k_proj",)], ids=["adapted", "and one trained whole"]
)
def test_what_is_rows_of_a_tensor_merges_as_it_is_attached(
    base: Path, tmp_path: Path, whole: tuple[str, ...]
) -> None:
    """DoRA reads rows of the weight and of the bias, and changes both; the rows between stay, bit for bit."""
    targets = ("q_proj", "v_proj", "o_proj")
    pack = trained(base, tmp_path / "one", DoRA(r=2, targets=targets, modules_to_save=whole))
    assert validate(pack, base).valid
    merge(base, [pack], tmp_path / "merged")
    torch.testing.assert_close(outputs(tmp_path / "merged"), outputs(base, pack), rtol=0, atol=2e-5)
    before, after = (Checkpoint(folder).read(QKV) for folder in (base, tmp_path / "merged"))
    thirds = zip(np.split(before, 3), np.split(after, 3), strict=True)
    assert [not np.array_equal(*pair) for pair in thirds] == [True, bool(whole), True]


def test_rows_are_composed_and_written_in_another_dtype(base: Path, tmp_path: Path) -> None:
    pack = trained(base, tmp_path / "one", LoRA(r=2, targets=("q_proj", "k_proj")))
    compose([pack, pack], weights=[0.5, 0.5], out=tmp_path / "twice")
    merge(base, [tmp_path / "twice"], tmp_path / "merged", dtype="float16")
    # float16 keeps 11 bits of each weight
    torch.testing.assert_close(outputs(tmp_path / "merged"), outputs(base, pack), rtol=0, atol=1e-2)


def test_rows_that_several_modules_claim_are_refused(base: Path, tmp_path: Path) -> None:
    pack = load(trained(base, tmp_path / "one", LoRA(r=2, targets=("q_proj", "k_proj"))))
    shifted = tuple(
        replace(group, weight=f"{QKV}[1:{1 + (group.out_features or 0)}]")
        if group.path.endswith("0.self_attn.q_proj")
        else group
        for group in pack.manifest.groups
    )
    seal(replace(pack.manifest, groups=shifted), pack.tensors).write(tmp_path / "shifted")
    with pytest.raises(Unsupported, match="the same rows"):
        merge(base, [tmp_path / "shifted"], tmp_path / "merged")
