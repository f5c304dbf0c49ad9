"""FRoD and Lily, whose layers share tensors: against the real PEFT, and the formulas in float64."""

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
from safetensors.numpy import load_file, save_file
from torch import nn

import adapterpack
from adapterpack import FRoD, Lily, PVeRA, adapt, attach, save
from adapterpack.errors import FormatError, Unsupported
from adapterpack.pack import from_peft

pytestmark = pytest.mark.filterwarnings("ignore")
FP32 = 2e-5
"""Of the largest: float32 sums of a few dozen terms through six layers, and weights put together again of a
basis in float32.
"""


class Block(nn.Module):
    """Two projections of unlike shape."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """With a residual."""
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Three blocks: every role has more rows than inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One block after the other."""
        for layer in self.layers:
            x = layer(x)
        return x


X = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(4))
T = ["up", "down"]


def shaken(model: nn.Module) -> Any:
    """Everything that is trained moved by noise."""
    return shake(model, 0.2, 5).eval()


@torch.no_grad()
def out(model: nn.Module, x: torch.Tensor = X) -> np.ndarray:
    """The outputs in float64."""
    return model(x).double().numpy()


def frod_dense(tensors: dict[str, np.ndarray], net: Net) -> dict[str, np.ndarray]:
    """Path -> U (S + diag l) V^T in float64, from PEFT's file."""
    dense = {}
    for number, leaf in ((number, leaf) for number in range(3) for leaf in T):
        path, role = f"layers.{number}.{leaf}", leaf
        V = tensors[f"base_model.frod_V.{role}"].astype(np.float64)
        weight = net.get_submodule(path).weight.detach().double().numpy()
        columns = weight @ np.linalg.inv(V).T
        S = np.zeros_like(V)
        for (row, column), value in zip(
            tensors[f"base_model.frod_s_indices.{role}"].T,
            tensors[f"base_model.model.{path}.frod_lambda_s_values"],
            strict=True,
        ):
            S[row, column] = value
        middle = S + np.diag(tensors[f"base_model.model.{path}.frod_lambda_l"].astype(np.float64))
        dense[path] = columns / np.linalg.norm(columns, axis=0) @ middle @ V.T
    return dense


def densified(weights: dict[str, np.ndarray]) -> Net:
    """The net in float64 with these weights."""
    net = Net().double()
    with torch.no_grad():
        for path, weight in weights.items():
            net.get_submodule(path).weight.copy_(torch.tensor(weight))
    return net


def test_frod_of_peft_here_and_there_again(tmp_path: Path) -> None:
    """PEFT's folder here == PEFT == the dense formula; written again PEFT reads the same; merged weights
    too.
    """
    theirs = shaken(
        peft.get_peft_model(Net(), peft.FrodConfig(target_modules=T, sparse_rate=0.2, progressbar=False))
    )
    theirs.save_pretrained(tmp_path / "theirs")
    dense = frod_dense(load_file(tmp_path / "theirs" / "adapter_model.safetensors"), Net())
    wanted = out(densified(dense), X.double())
    assert np.abs(wanted - out(Net())).max() > 0.1
    pack = from_peft.read(tmp_path / "theirs")
    ours = attach(Net(), pack, check_base=False).eval()
    pack.write(tmp_path / "again")
    adapterpack.load(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "again").eval()
    for model in (ours, theirs, again, theirs.merge_and_unload()):
        np.testing.assert_allclose(out(model), wanted, rtol=0, atol=FP32 * np.abs(wanted).max())


def test_frod_of_ours(tmp_path: Path) -> None:
    """Fresh it is the base within float32; trained, saved and attached again the same; PEFT, which has other
    signs, is offered no file.
    """
    fresh = adapt(Net(), FRoD(sparse_rate=0.2, targets=tuple(T)))
    np.testing.assert_allclose(out(fresh), out(Net()), rtol=0, atol=FP32)
    assert sum(value.requires_grad for value in fresh.parameters()) == 2 * 6, "V and the places are kept"
    ours = shaken(fresh)
    pack = save(ours, tmp_path / "pack")
    assert not (tmp_path / "pack" / "adapter_config.json").exists()
    assert set(pack.shared()) == {f"frod_{part}_{leaf}" for part in ("V", "indices", "size") for leaf in T}
    tensors = {name: np.asarray(value) for name, value in pack.tensors.items()}
    wanted = out(densified(frod_dense(tensors, Net())), X.double())
    np.testing.assert_allclose(
        out(attach(Net(), adapterpack.load(tmp_path / "pack"), check_base=False)), wanted, rtol=0, atol=FP32
    )
    np.testing.assert_allclose(out(ours), wanted, rtol=0, atol=FP32)


def test_frods_values_are_exchanged_with_what_follows_from_them() -> None:
    """Another basis in the place of the first: U is made anew, and the outputs are the other adapter's."""
    first, other = (
        shaken(adapt(Net(), FRoD(sparse_rate=0.2, regularization_alpha=ridge, targets=tuple(T))))
        for ridge in (1e-3, 1.0)
    )
    state = adapterpack.adapter_state_dict(other, "default")
    assert not torch.equal(
        state["@shared.frod_V_up"], adapterpack.adapter_state_dict(first, "default")["@shared.frod_V_up"]
    )
    adapterpack.load_adapter_state_dict(first, "default", state)
    np.testing.assert_allclose(out(first), out(other), rtol=0, atol=1e-6)


def test_frods_that_mean_nothing_certain(tmp_path: Path) -> None:
    """A file without its basis, a role with fewer rows than inputs, a place outside of S: refused, with the
    reason.
    """
    shaken(
        peft.get_peft_model(
            Net(), peft.FrodConfig(target_modules=T, save_projection=False, progressbar=False)
        )
    ).save_pretrained(tmp_path / "without")
    with pytest.raises(Unsupported, match="leaves out the basis"):
        from_peft.read(tmp_path / "without")
    narrow = nn.Sequential(nn.Linear(9, 4))
    config = peft.FrodConfig(target_modules=["0"], progressbar=False)
    shaken(peft.get_peft_model(copy.deepcopy(narrow), config)).save_pretrained(tmp_path / "narrow")
    with pytest.raises(Unsupported, match="fewer rows together than inputs"):
        attach(narrow, from_peft.read(tmp_path / "narrow"), check_base=False)
    peft.get_peft_model(Net(), peft.FrodConfig(target_modules=T, progressbar=False)).save_pretrained(
        tmp_path / "far"
    )
    file = tmp_path / "far" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.frod_s_indices.up"][0, 0] = 6
    save_file(tensors, file)
    with pytest.raises(FormatError, match="places of S"):
        attach(Net(), from_peft.read(tmp_path / "far"), check_base=False)


def lily_dense(tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The net in float64, each layer with its router's mean over the tokens of the one row; of PEFT's
    names.
    """
    net = Net().double()
    for number in range(3):

        def adapted(leaf: str, given: np.ndarray, number: int = number) -> np.ndarray:
            layer, at = (
                net.get_submodule(f"layers.{number}.{leaf}"),
                f"base_model.model.layers.{number}.{leaf}",
            )
            A, B, R = (
                tensors[f"{at}.lily_{name}.weight"].astype(np.float64) for name in ("A", "B", "router")
            )
            scores = np.exp(given @ A.T @ R.T)
            mean = (scores / scores.sum(axis=1, keepdims=True)).mean(axis=0)
            mixed = sum(p * part for p, part in zip(mean, np.split(B, len(R)), strict=True))
            bias = 0 if layer.bias is None else layer.bias.detach().numpy()
            return given @ layer.weight.detach().numpy().T + bias + 0.7 * given @ A.T @ mixed

        x = x + adapted("down", np.tanh(adapted("up", x)))
    return x


def test_lily_of_peft_and_its_batches(tmp_path: Path) -> None:
    """PEFT's folder here == PEFT == the formula for one row; for several, every row is what PEFT makes of it
    alone. Merging is refused.
    """
    theirs = shaken(
        peft.get_peft_model(Net(), peft.LilyConfig(r=3, stride_A=2, num_B=3, scaling=0.7, target_modules=T))
    )
    theirs.save_pretrained(tmp_path / "theirs")
    pack = from_peft.read(tmp_path / "theirs")
    ours = attach(Net(), pack, check_base=False).eval()
    wanted = lily_dense(load_file(tmp_path / "theirs" / "adapter_model.safetensors"), X[0].double().numpy())
    assert np.abs(wanted - out(Net())[0]).max() > 0.1
    pack.write(tmp_path / "again")
    for model in (ours, theirs, peft.PeftModel.from_pretrained(Net(), tmp_path / "again").eval()):
        np.testing.assert_allclose(out(model)[0], wanted, rtol=0, atol=FP32)
    batch = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(8))
    alone = np.concatenate([out(theirs, row[None]) for row in batch])
    np.testing.assert_allclose(out(ours, batch), alone, rtol=0, atol=FP32)
    assert np.abs(out(theirs, batch) - alone).max() > 100 * FP32, "there, rows of a batch change each other"


def test_lily_of_ours_is_small_and_goes_to_peft(tiny_llama: Path, tmp_path: Path) -> None:
    """Shared tensors are stored once: 2 layers of one A and one B for a name; with `convert --to peft` PEFT
    has the same logits.
    """
    from transformers import LlamaForCausalLM

    ours = shaken(
        adapt(
            LlamaForCausalLM.from_pretrained(tiny_llama),
            Lily(r=3, stride=2, num_experts=3, targets=("q_proj", "up_proj")),
        )
    )
    pack = save(ours, tmp_path / "pack")
    assert len(pack.shared()) == 4 and not (tmp_path / "pack" / "adapter_config.json").exists()
    adapterpack.load(tmp_path / "pack")
    adapterpack.convert(tmp_path / "pack", tmp_path / "theirs", to="peft", base=tiny_llama)
    ids = torch.tensor([[5, 9, 3, 7]])
    with torch.no_grad():
        there = (
            peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_llama), tmp_path / "theirs")
            .eval()(ids)
            .logits
        )
        back = attach(LlamaForCausalLM.from_pretrained(tiny_llama), pack).eval()
        np.testing.assert_allclose(there, ours(ids).logits, rtol=0, atol=FP32)
        np.testing.assert_allclose(back(ids, use_cache=False).logits, ours(ids).logits, rtol=0, atol=FP32)
    with pytest.raises(Unsupported, match="means over the tokens"):
        adapterpack.merge(tiny_llama, [pack], tmp_path / "merged")


def test_pvera_draws_in_training_alone() -> None:
    """In training outputs differ from call to call, around the mean; their spread is |b B std|, over 4000
    calls within a tenth.
    """
    torch.manual_seed(6)
    model = shaken(adapt(nn.Sequential(nn.Linear(7, 5)), PVeRA(r=3, d_initial=0.5)))
    x = X[0, :1, :1].expand(1, 7)
    with torch.no_grad():
        mean = out(model, x)
        np.testing.assert_array_equal(out(model, x), mean)
        layer = model.train()[0]
        drawn = np.stack([out(model, x) for _ in range(4000)])[:, 0]
    tensors = {name: value.detach().double().numpy() for name, value in layer._every("default").items()}
    scores = tensors["pvera_lambda_d"][3:] * (tensors["pvera_A"][3:] @ x[0].double().numpy())
    spread = tensors["pvera_lambda_b"][:, None] * tensors["pvera_B"] * np.exp(0.5 * scores)
    np.testing.assert_allclose(drawn.std(axis=0), np.linalg.norm(spread, axis=1), rtol=0.1)
    np.testing.assert_allclose(
        drawn.mean(axis=0), mean[0], rtol=0, atol=5 * np.linalg.norm(spread, axis=1).max() / 4000**0.5
    )


def test_a_pvera_that_draws_when_asked_is_refused(tmp_path: Path) -> None:
    """PEFT's sample_at_inference makes another adapter of every call."""
    peft.get_peft_model(Net(), peft.PveraConfig(r=3, target_modules=T)).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_at_inference": True}))
    with pytest.raises(Unsupported, match="another output at every call"):
        from_peft.read(tmp_path)
