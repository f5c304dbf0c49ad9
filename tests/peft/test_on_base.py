"""PEFT's files that mean something with the base alone: PSOFT in PEFT's singular vectors, TinyLoRA with the
factors that PEFT stores.
"""

from __future__ import annotations

import copy
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
from transformers import LlamaForCausalLM

import adapterpack
from adapterpack import PSOFT, TinyLoRA, adapt, attach, convert, load, save, validate
from adapterpack.errors import BaseMismatch, ConfigError, FormatError, Unsupported
from adapterpack.manifest import manifest as m
from adapterpack.pack import from_peft
from adapterpack.peft import layout

pytestmark = pytest.mark.filterwarnings("ignore")
T = ["q_proj", "v_proj", "down_proj"]
IDS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(7))
SAME = 1e-5
"""Of the largest logit: two decompositions in float32 give vectors that differ by roundings, over the gap of
two singular values.
"""
PSOFTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cayley": ({"r": 6}, {"r": 6, "psoft_alpha": 3}),
    "neumann": (
        {
            "r": 5,
            "ab_svd_init": "pissa_init",
            "mag_a": False,
            "use_cayley_neumann": True,
            "num_cayley_neumann_terms": 6,
        },
        {
            "r": 5,
            "ab_svd_init": "pissa_init",
            "psoft_mag_a": False,
            "use_cayley_neumann": True,
            "num_cayley_neumann_terms": 6,
        },
    ),
    "bounded": (
        {"r": 4, "use_cayley_neumann": True, "cayley_neumann_eps": 0.5},
        {"r": 4, "use_cayley_neumann": True, "cayley_neumann_eps": 0.5},
    ),
    "estimated": (
        {"r": 5, "svd": "lowrank", "svd_lowrank_niter": 2, "random_seed": 7},
        {"r": 5, "psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 2, "random_seed": 7},
    ),
    "free": ({"r": 3, "orth": False, "mag_b": False}, {"r": 3, "psoft_orth": False, "psoft_mag_b": False}),
}


def model_of(base: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(base).eval()


def shaken(model: Any, size: float = 0.1) -> Any:
    return shake(model, size, 5).eval()


@torch.no_grad()
def logits(model: Any) -> np.ndarray:
    found: np.ndarray = model(input_ids=IDS).logits.numpy()
    return found


def require_same(found: np.ndarray, wanted: np.ndarray, base: np.ndarray) -> None:
    assert np.abs(wanted - base).max() > 0.05, "the adapter does something"
    assert np.abs(found - wanted).max() <= SAME * max(1, np.abs(wanted).max())


def theirs_on(base: Path, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(model_of(base), folder).eval()


@pytest.mark.parametrize("name", PSOFTS)
def test_psoft_of_peft_is_read_and_written_again(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """PEFT's logits with the pack made of its folder, and with the folder made of that pack: the same
    tensors, but for zeros' signs.
    """
    theirs = shaken(
        peft.get_peft_model(model_of(tiny_llama), peft.PsoftConfig(target_modules=T, **PSOFTS[name][1]))
    )
    theirs.save_pretrained(tmp_path / "theirs")
    wanted, plain = logits(theirs), logits(model_of(tiny_llama))
    done = convert(tmp_path / "theirs", tmp_path / "pack", to="pack", base=tiny_llama)
    assert any("singular vectors" in note for note in done.notes)
    assert validate(tmp_path / "pack", base=tiny_llama).findings == ()
    pack = load(tmp_path / "pack")
    assert pack.manifest.base.content is not None
    assert not (tmp_path / "pack" / layout.CONFIG).exists(), (
        "on another machine PEFT would read another adapter"
    )
    require_same(logits(attach(model_of(tiny_llama), pack)), wanted, plain)
    convert(pack, tmp_path / "again", to="peft", base=tiny_llama)
    before, after = (load_file(tmp_path / folder / layout.TENSORS) for folder in ("theirs", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    require_same(logits(theirs_on(tiny_llama, tmp_path / "again")), wanted, plain)


@pytest.mark.parametrize("name", PSOFTS)
def test_psoft_of_ours_in_peft(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """PEFT's logits with the folder made of our pack are ours; among the signs are both, so the frames are
    not the same by chance.
    """
    ours = shaken(adapt(model_of(tiny_llama), PSOFT(targets=tuple(T), **PSOFTS[name][0])))
    pack, plain = save(ours, tmp_path / "pack"), logits(model_of(tiny_llama))
    convert(tmp_path / "pack", tmp_path / "theirs", to="peft", base=tiny_llama)
    require_same(logits(theirs_on(tiny_llama, tmp_path / "theirs")), logits(ours), plain)
    mine = {tensor: value for tensor, value in pack.tensors.items() if "psoft_R.weight" in tensor}
    found = load_file(tmp_path / "theirs" / layout.TENSORS)
    assert any(not np.array_equal(value, found[tensor].numpy()) for tensor, value in mine.items())
    assert all(np.array_equal(np.abs(value), found[tensor].abs().numpy()) for tensor, value in mine.items())


def test_psoft_without_its_base_is_refused(tiny_llama: Path, tiny_bert: Path, tmp_path: Path) -> None:
    """Both ways by name; on another base too; and the pack, read as a folder of PEFT, offers no file."""
    peft.get_peft_model(model_of(tiny_llama), peft.PsoftConfig(r=3, target_modules=T)).save_pretrained(
        tmp_path / "theirs"
    )
    for read in (
        lambda: load(tmp_path / "theirs"),
        lambda: convert(tmp_path / "theirs", tmp_path / "out", to="pack"),
    ):
        with pytest.raises(Unsupported, match=r"singular vectors of the base.*convert SRC --to pack --base"):
            read()
    with pytest.raises(adapterpack.AdapterpackError, match=r"no such site|another shape"):
        convert(tmp_path / "theirs", tmp_path / "out", to="pack", base=tiny_bert)
    save(shaken(adapt(model_of(tiny_llama), PSOFT(r=3, targets=tuple(T)))), tmp_path / "pack")
    with pytest.raises(ConfigError, match=r"depends on the weights of the base.*--base"):
        convert(tmp_path / "pack", tmp_path / "out", to="peft")
    with pytest.raises(BaseMismatch):
        convert(tmp_path / "pack", tmp_path / "out", to="peft", base=tiny_bert)
    assert not (tmp_path / "out").exists()


def test_psoft_files_that_mean_nothing_certain(tmp_path: Path) -> None:
    """A weight with twice the same singular value, the other decomposition, a factor that is no number:
    refused, with the reason.
    """
    weight = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1)))[0]
    net = nn.Sequential(nn.Linear(12, 12))
    with torch.no_grad():
        net[0].weight.copy_(weight)
    (tmp_path / "base").mkdir()
    save_file(
        {key: value.contiguous() for key, value in net.state_dict().items()},
        tmp_path / "base" / "model.safetensors",
    )
    (tmp_path / "base" / "config.json").write_text("{}")
    config = tmp_path / "theirs" / layout.CONFIG
    peft.get_peft_model(copy.deepcopy(net), peft.PsoftConfig(r=3, target_modules=["0"])).save_pretrained(
        tmp_path / "theirs"
    )
    with pytest.raises(Unsupported, match="so near to each other"):
        convert(tmp_path / "theirs", tmp_path / "out", to="pack", base=tmp_path / "base")
    plain = json.loads(config.read_text())
    for change, error, words in (
        ({"psoft_svd": "lowrank", "random_seed": None}, Unsupported, "older PEFT"),
        ({"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 101}, FormatError, "svd_lowrank_niter"),
        ({"psoft_alpha": 0}, FormatError, "psoft_alpha"),
    ):
        config.write_text(json.dumps({**plain, **change}))
        with pytest.raises(error, match=words):
            convert(tmp_path / "theirs", tmp_path / "out", to="pack", base=tmp_path / "base")
    save(shaken(adapt(nn.Sequential(nn.Linear(12, 7)), PSOFT(r=9))), tmp_path / "narrow")
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text("{}")
    save_file(
        {"0.weight": torch.randn(7, 12), "0.bias": torch.zeros(7)}, tmp_path / "small" / "model.safetensors"
    )
    with pytest.raises(Unsupported, match="narrower than the rank"):
        convert(
            tmp_path / "narrow", tmp_path / "out", to="peft", base=tmp_path / "small", allow_structural=True
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tying", [0.0, 0.5])
def test_tinylora_of_vectors_alone_in_peft(tying: float, tiny_llama: Path, tmp_path: Path) -> None:
    """With the base, PEFT's folder holds the factors that it takes from there, on any machine; read back it
    is the same adapter.
    """
    ours = shaken(adapt(model_of(tiny_llama), TinyLoRA(r=3, u=5, weight_tying=tying, targets=tuple(T))), 2)
    save(ours, tmp_path / "pack")
    plain, wanted = logits(model_of(tiny_llama)), logits(ours)
    with pytest.raises(ConfigError, match="--base"):
        convert(tmp_path / "pack", tmp_path / "out", to="peft")
    done = convert(tmp_path / "pack", tmp_path / "theirs", to="peft", base=tiny_llama)
    assert done.notes == (), "no note: it means the same everywhere"
    require_same(logits(theirs_on(tiny_llama, tmp_path / "theirs")), wanted, plain)
    config = tmp_path / "theirs" / layout.CONFIG
    # by which layers are told apart again
    config.write_text(json.dumps({**json.loads(config.read_text()), "save_projection": True}))
    theirs_on(tiny_llama, tmp_path / "theirs").save_pretrained(tmp_path / "again")
    require_same(
        logits(attach(model_of(tiny_llama), from_peft.read(tmp_path / "again"), check_base=False)),
        wanted,
        plain,
    )
    assert m.FILE_NAME not in {path.name for path in (tmp_path / "theirs").iterdir()}
