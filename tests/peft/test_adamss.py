"""AdaMSS of PEFT, whose file does not say which rows its groups are: read and written with the base, or
refused.
"""

from __future__ import annotations

import copy
import json
import sys
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
from adapterpack import AdaMSS, adapt, attach, convert, load, save, validate
from adapterpack.errors import ConfigError, FormatError, MissingExtra, Unsupported
from adapterpack.peft import layout

pytestmark = pytest.mark.filterwarnings("ignore")
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"r": 6, "num_subspaces": 3},
    "ranks": {
        "r": 9,
        "num_subspaces": 4,
        "subspace_rank": 3,
        "use_dynamic_rank": True,
        "svd_threshold": 0.3,
        "random_seed": 5,
    },
    # more vectors than the first weight has
    "wide": {"r": 500, "num_subspaces": 2, "subspace_rank": 2, "use_asa": True},
}


def net() -> nn.Sequential:
    """With a bias and without, wide and tall."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(13, 37), nn.Tanh(), nn.Linear(37, 21, bias=False), nn.Tanh(), nn.Linear(21, 83)
    )


def based(folder: Path, model: nn.Module) -> Path:
    folder.mkdir()
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text("{}")
    return folder


def theirs_on(model: nn.Module, targets: list[str], **options: Any) -> Any:
    return shake(
        peft.get_peft_model(copy.deepcopy(model), peft.AdamssConfig(target_modules=targets, **options)),
        0.2,
        5,
    ).eval()


def by_hand(theirs: Any, x: np.ndarray) -> np.ndarray:
    """The formula in float64, with the groups that PEFT made: W'_k = W_k + B_k A_k P, and its bias alike."""
    for layer in theirs.base_model.model:
        if isinstance(layer, nn.Tanh):
            x = np.tanh(x)
            continue
        base = getattr(layer, "base_layer", layer)
        W = base.weight.detach().double().numpy()
        b = np.zeros(len(W)) if base.bias is None else base.bias.detach().double().numpy()
        if base is not layer:
            P = layer.adamss_newB["default"].double().numpy()
            for k, rows in layer.seg_result["default"].items():
                A, B = (
                    side["default"][k].detach().double().numpy() for side in (layer.adamss_A, layer.adamss_B)
                )
                change = B @ A @ P
                W[rows] += change[:, : W.shape[1]]
                b[rows] += change[:, W.shape[1] :].sum(1)
        x = x @ W.T + b
    return x


@pytest.mark.parametrize("name", FORMS)
def test_adamss_of_peft_here_and_there_again(name: str, tmp_path: Path) -> None:
    """The formula, PEFT, the pack attached, merged, and as PEFT's folder again give the same; float32's
    roundings are 1e-5 at most here.
    """
    # the rows of "2" with all its vectors lie equally far from each other
    targets = ["0", "4"] if name == "wide" else ["0", "2", "4"]
    base, theirs = based(tmp_path / "base", net()), theirs_on(net(), targets, **FORMS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    x = torch.randn(5, 13, generator=torch.Generator().manual_seed(1))
    wanted = by_hand(theirs, x.double().numpy())
    assert np.abs(wanted - net()(x).detach().numpy()).max() > 0.1
    convert(tmp_path / "theirs", tmp_path / "pack", to="pack", base=base)
    assert validate(tmp_path / "pack", base=base).findings == ()
    assert not (tmp_path / "pack" / layout.CONFIG).exists()
    pack = load(tmp_path / "pack")
    adapterpack.merge(base, [pack], tmp_path / "merged", durable=False)
    merged = net()
    merged.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    convert(pack, tmp_path / "again", to="peft", base=base)
    for model in (
        theirs,
        attach(net(), pack),
        merged,
        peft.PeftModel.from_pretrained(net(), tmp_path / "again").eval(),
    ):
        np.testing.assert_allclose(model(x).detach().numpy(), wanted, atol=1e-5)
    before, after = (load_file(tmp_path / folder / layout.TENSORS) for folder in ("theirs", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_adamss_of_ours_in_peft(tmp_path: Path) -> None:
    """What is trained here has the groups that PEFT makes, and its file means the same there; a weight
    without a bias gets none.
    """
    base = based(tmp_path / "base", net())
    ours = shake(adapt(net(), AdaMSS(r=7, num_subspaces=3, subspace_rank=2)), 0.2, 5).eval()
    save(ours, tmp_path / "pack")
    with pytest.raises(ConfigError, match="--base"):
        convert(tmp_path / "pack", tmp_path / "out", to="peft")
    convert(tmp_path / "pack", tmp_path / "theirs", to="peft", base=base, allow_structural=True)
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "theirs").eval()
    x = torch.randn(5, 13, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(ours(x).detach().numpy(), theirs(x).detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(ours(x).detach().numpy(), by_hand(theirs, x.double().numpy()), atol=1e-5)
    assert ours[2].bias is None


def test_adamss_of_a_layer_of_a_real_size_in_bfloat16(tmp_path: Path) -> None:
    """A weight with the spectrum of trained ones, in the type in which such models are trained: the groups
    are PEFT's, row for row.
    """
    rng = torch.Generator().manual_seed(2)
    model = nn.Sequential(nn.Linear(384, 768)).bfloat16()
    with torch.no_grad():
        left, right = (torch.linalg.qr(torch.randn(width, 384, generator=rng))[0] for width in (768, 384))
        model[0].weight.copy_(left * torch.arange(1, 385) ** -0.5 @ right.T)
    theirs = theirs_on(model, ["0"], r=64, num_subspaces=5)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "pack", to="pack", base=based(tmp_path / "base", model))
    groups = load(tmp_path / "pack").tensors["base_model.model.0.adamss_groups"]
    segments = theirs.base_model.model[0].seg_result["default"]
    assert {k: np.flatnonzero(groups == k).tolist() for k in range(5)} == {
        k: rows.tolist() for k, rows in segments.items()
    }


@pytest.mark.parametrize("widths", [(96, 200), (200, 96)])
def test_adamss_of_another_random_start(widths: tuple[int, int], tmp_path: Path) -> None:
    """A GPU's random numbers are others than a CPU's: here those of another seed, which the file does not
    name. Its vectors say enough.
    """
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(*widths))
    theirs = theirs_on(model, ["0"], r=24, num_subspaces=4, random_seed=11)
    theirs.save_pretrained(tmp_path / "theirs")
    config = tmp_path / "theirs" / layout.CONFIG
    config.write_text(json.dumps({**json.loads(config.read_text()), "random_seed": 0}))
    base = based(tmp_path / "base", model)
    convert(tmp_path / "theirs", tmp_path / "pack", to="pack", base=base)
    x = torch.randn(5, widths[0], generator=torch.Generator().manual_seed(1))
    found = attach(copy.deepcopy(model), load(tmp_path / "pack"))(x).detach().numpy()
    np.testing.assert_allclose(found, by_hand(theirs, x.double().numpy()), atol=1e-5)
    # a CPU would make others, when it loads the file
    with pytest.raises(Unsupported, match="into other groups"):
        convert(tmp_path / "pack", tmp_path / "again", to="peft", base=base)


def test_adamss_without_scikit_learn_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a training nor a folder of PEFT's is grouped by anything else."""
    base = based(tmp_path / "base", net())
    theirs_on(net(), ["0"], r=6, num_subspaces=3).save_pretrained(tmp_path / "theirs")
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(MissingExtra, match=r"adapterpack\[adamss\]"):
        convert(tmp_path / "theirs", tmp_path / "out", to="pack", base=base)
    with pytest.raises(MissingExtra, match=r"adapterpack\[adamss\]"):
        adapt(net(), AdaMSS(r=7, num_subspaces=3))


def test_what_adamss_does_not_say_is_refused(tmp_path: Path) -> None:
    """Without the base; on another one; where rounding groups the rows; and files that do not fit
    together.
    """
    base, folder = based(tmp_path / "base", net()), tmp_path / "theirs"
    theirs_on(net(), ["0"], r=6, num_subspaces=3).save_pretrained(folder)
    with pytest.raises(Unsupported, match=r"singular vectors of the base.*--base"):
        load(folder)
    other = net()
    with torch.no_grad():
        other[0].weight.mul_(torch.linspace(1, 2, 13))
    with pytest.raises(Unsupported, match="not those of this base"):
        convert(folder, tmp_path / "out", to="pack", base=based(tmp_path / "other", other))
    # U is square: no two rows are nearer than others
    theirs_on(net(), ["2"], r=21, num_subspaces=4).save_pretrained(tmp_path / "even")
    with pytest.raises(Unsupported, match=r"k-means"):
        convert(tmp_path / "even", tmp_path / "out", to="pack", base=base)
    plain, config = load_file(folder / layout.TENSORS), json.loads((folder / layout.CONFIG).read_text())
    A, B = (f"base_model.model.0.adamss_{side}.1" for side in "AB")
    sizes = {k: plain[f"base_model.model.0.adamss_B.{k}"] for k in range(3)}
    moved = {
        f"base_model.model.0.adamss_B.{k}": torch.cat([sizes[k], sizes[k][:1]])
        if k == 0
        else sizes[k][1:]
        if k == 1
        else sizes[k]
        for k in range(3)
    }
    cases: list[tuple[dict[str, torch.Tensor], dict[str, Any], type[Exception], str]] = [
        ({**plain, **moved}, {}, Unsupported, "no groups of the sizes"),
        (
            {key: value for key, value in plain.items() if key != A},
            {},
            FormatError,
            "an A and a B for each group",
        ),
        ({**plain, B: plain[B].repeat(1, 2)}, {}, FormatError, "do not fit"),
        (plain, {"num_subspaces": 4}, FormatError, "wrong shape"),
        (plain, {"num_subspaces": 10**9}, FormatError, "num_subspaces"),
        (plain, {"r": 0}, FormatError, "r must be"),
    ]
    for tensors, change, error, words in cases:
        save_file(tensors, folder / layout.TENSORS)
        (folder / layout.CONFIG).write_text(json.dumps({**config, **change}))
        with pytest.raises(error, match=words):
            convert(folder, tmp_path / "out", to="pack", base=base)
    assert not (tmp_path / "out").exists()
