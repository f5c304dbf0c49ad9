"""PEFT's LoRA of bare parameters and of stacks of experts (``target_parameters``): beside the real PEFT, and
W + s B A in float64.
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
from safetensors.numpy import load_file, save_file
from torch import nn

import adapterpack
from adapterpack import LoRA, adapt, attach, convert, load, merge, merge_into, save, unmerge_from
from adapterpack.errors import AdapterpackError, FormatError, SiteNotFound, Unsupported

pytestmark = pytest.mark.filterwarnings("ignore")
FP32 = 2e-5
"""Absolute: float32 sums of a dozen terms of size 1 to 3, through four layers."""


class Experts(nn.Module):
    """Three experts, stored either way round, with the down projection registered after the up projection,
    whose name comes later.
    """

    def __init__(self, turned: bool, wide: int) -> None:
        super().__init__()
        self.is_transposed = turned
        shapes = (
            {"up": (3, 5, wide), "down": (3, wide, 5)}
            if turned
            else {"up": (3, wide, 5), "down": (3, 5, wide)}
        )
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) / 2))

    def forward(self, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """Each token's experts, weighed."""
        up, down = (value.mT if self.is_transposed else value for value in (self.up, self.down))
        return torch.einsum(
            "bte,btei,eoi->bto", share, torch.tanh(torch.einsum("bti,eoi->bteo", x, up)), down
        )


class Router(nn.Module):
    """A bare matrix that is called ``weight``, and the bias that nobody changes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The shares of the experts."""
        return torch.softmax(nn.functional.linear(x, self.weight, self.bias), -1)


class Mixture(nn.Module):
    """A table, a linear layer, and experts with their router."""

    def __init__(self, turned: bool, wide: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table, self.mix, self.out = nn.Embedding(11, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 4)
        self.gate, self.experts = Router(), Experts(turned, wide)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Numbers for each token."""
        x = torch.tanh(self.mix(self.table(input_ids)))
        return self.out(x + self.experts(x, self.gate(x)))


X = torch.tensor([[3, 1, 4, 10], [9, 2, 6, 0]])


@torch.no_grad()
def out(model: nn.Module) -> np.ndarray:
    """The outputs."""
    return model(X).double().numpy()


def dense(
    turned: bool, wide: int, tensors: dict[str, np.ndarray], places: dict[str, str], scales: dict[str, float]
) -> np.ndarray:
    """What the model gives in float64 with the factors of PEFT's file in its parameters, expert by expert."""
    model = Mixture(turned, wide).double()
    parameters = dict(model.named_parameters())
    for name, place in places.items():
        A, B = (
            torch.tensor(tensors[f"base_model.model.{place}.lora_{side}.weight"].astype(np.float64))
            for side in "AB"
        )
        value = parameters[name]
        stack = value.detach()[None] if value.ndim == 2 else value.detach()
        n, r = len(stack), len(A) // len(stack)
        for e in range(n):
            change = scales[name] * sum(torch.outer(B[:, k * n + e], A[e * r + k]) for k in range(r))
            stack[e] += change.T if turned and value.ndim == 3 else change
    return out(model)


TARGETS = ["experts.up", "experts.down", "gate.weight", "mix.weight", "table.weight"]
PLACES = {
    "experts.up": "experts.base_layer",
    "experts.down": "experts",
    "gate.weight": "gate",
    "mix.weight": "mix",
    "table.weight": "table",
    "out.weight": "out",
}


def trained(folder: Path, turned: bool, wide: int, **options: Any) -> tuple[Path, Path, np.ndarray]:
    """A base's folder, PEFT's, and what PEFT's model gives."""
    model = Mixture(turned, wide)
    (folder / "base").mkdir(parents=True)
    save_file(
        {name: value.detach().numpy() for name, value in model.named_parameters()},
        folder / "base" / "model.safetensors",
    )
    settings = {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["out"],
        "target_parameters": TARGETS,
        "rank_pattern": {r".*\.up": 3},
        "alpha_pattern": {"experts.down": 5},
        **options,
    }
    theirs = shake(peft.get_peft_model(model, peft.LoraConfig(**settings)), 0.3, 5).eval()
    theirs.save_pretrained(folder / "theirs")
    return folder / "base", folder / "theirs", out(theirs)


@pytest.mark.parametrize(("turned", "rslora"), [(False, True), (True, False)])
def test_parameters_and_modules_of_one_adapter(turned: bool, rslora: bool, tmp_path: Path) -> None:
    """Read, attached, weighed in memory, merged, and written back: the same outputs as PEFT's and as the
    formula's.
    """
    base, theirs, wanted = trained(tmp_path, turned, 7, use_rslora=rslora)
    root = (lambda r: r**0.5) if rslora else float
    scales = {
        name: (5 if name == "experts.down" else 3) / root(3 if name == "experts.up" else 2) for name in PLACES
    }
    formula = dense(turned, 7, load_file(theirs / "adapter_model.safetensors"), PLACES, scales)
    assert np.abs(wanted - formula).max() < FP32 < 0.1 < np.abs(formula - out(Mixture(turned, 7))).max()

    with pytest.raises(Unsupported, match="which of a module's parameters"):
        load(theirs)
    convert(theirs, tmp_path / "pack", to="pack", base=base)
    pack = load(tmp_path / "pack")
    assert {group.path: group.kind for group in pack.groups} == {
        "experts.up": (kind := "turned_experts" if turned else "experts"),
        "experts.down": kind,
        "out": "linear",
        **dict.fromkeys(("gate.weight", "mix.weight", "table.weight"), "parameter"),
    }
    model = attach(Mixture(turned, 7), pack, "a")
    assert np.abs(out(model) - formula).max() < FP32
    merge_into(model)
    assert np.abs(out(model) - formula).max() < FP32
    unmerge_from(model)
    adapterpack.active(model, None)
    assert np.array_equal(out(model), out(Mixture(turned, 7)))
    merge(base, [pack], tmp_path / "merged", durable=False)
    merged = Mixture(turned, 7)
    merged.load_state_dict(
        {
            name: torch.tensor(value)
            for name, value in load_file(tmp_path / "merged" / "model.safetensors").items()
        }
    )
    assert np.abs(out(merged) - formula).max() < FP32

    convert(tmp_path / "pack", tmp_path / "back", to="peft")
    again = peft.PeftModel.from_pretrained(Mixture(turned, 7), tmp_path / "back").eval()
    assert np.abs(out(again) - wanted).max() < 1e-6  # the same numbers in the same places
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (theirs, tmp_path / "back")
    )
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_experts_in_the_order_of_unsloth(tmp_path: Path) -> None:
    """The configuration says that the columns of one expert lie together, for all or for one parameter; without a
    word Unsloth's folder may be of either order.
    """
    base, theirs, wanted = trained(tmp_path, False, 7, target_modules=[], target_parameters=["experts.up"])
    file, config = (
        theirs / "adapter_model.safetensors",
        json.loads((theirs / "adapter_config.json").read_text()),
    )

    def written(grouped: bool, **more: Any) -> Path:
        tensors = load_file(file)
        for name, value in tensors.items():
            if grouped and name.endswith("lora_B.weight"):
                tensors[name] = np.ascontiguousarray(value.reshape(7, 3, 3).transpose(0, 2, 1)).reshape(7, 9)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({**config, **more}))
        return folder

    order = {"lora_B_layout": "grouped_by_expert"}
    one = {"unsloth_fused_expert_lora": {"parameters": {"up": order}}, "lora_B_layout": "mixed"}
    for folder in (
        written(True, **order),
        written(True, **one),
        written(True, auto_mapping=one),
        written(False, lora_B_layout="rank_major", auto_mapping={"unsloth_fixed": True}),
    ):
        convert(folder, folder / "pack", to="pack", base=base)
        assert np.abs(out(attach(Mixture(False, 7), load(folder / "pack"), "a")) - wanted).max() < FP32
    for more in ({"auto_mapping": {"unsloth_fixed": True}}, {"lora_B_layout": ["x"]}):
        with pytest.raises(Unsupported, match="Unsloth before September 2026"):
            load(written(False, **more))


def test_square_experts_are_as_the_model_stores_them(tmp_path: Path) -> None:
    """No shape tells which way round a square expert is stored: the model does, and a checkpoint without a
    type is refused.
    """
    base, theirs, wanted = trained(tmp_path, True, 5, target_parameters=["experts.up", "gate.weight"])
    assert np.abs(out(attach(Mixture(True, 5), load(theirs), "a")) - wanted).max() < FP32
    with pytest.raises(Unsupported, match="which way round"):
        merge(base, [load(theirs)], tmp_path / "merged", durable=False)
    (base / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))  # whose experts are transposed
    merge(base, [load(theirs)], tmp_path / "merged", durable=False)
    merged = Mixture(True, 5)
    merged.load_state_dict(
        {
            name: torch.tensor(value)
            for name, value in load_file(tmp_path / "merged" / "model.safetensors").items()
        }
    )
    assert np.abs(out(merged) - wanted).max() < FP32


@pytest.mark.parametrize("turned", [False, True])
def test_what_is_trained_here_peft_loads(turned: bool, tmp_path: Path) -> None:
    """Experts, a router, and a linear layer: PEFT's model gives the same outputs."""
    config = LoRA(
        r=2, alpha=3, targets=("experts.up", "experts.down", "gate.weight", "out"), rank_pattern={"down": 3}
    )
    ours = shake(adapt(Mixture(turned, 7), config, "a"), 0.3, 6).eval()
    save(ours, tmp_path / "pack")
    assert not (tmp_path / "pack" / "adapter_config.json").exists()
    convert(tmp_path / "pack", tmp_path / "theirs", to="peft")
    theirs = peft.PeftModel.from_pretrained(Mixture(turned, 7), tmp_path / "theirs").eval()
    assert (
        np.abs(out(theirs) - out(ours)).max() < FP32 < 0.1 < np.abs(out(ours) - out(Mixture(turned, 7))).max()
    )


class Attending(nn.Module):
    """Torch's own attention, which reads the weight of its last layer and never calls it."""

    def __init__(self, **widths: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table, self.attention = (
            nn.Embedding(11, 6),
            nn.MultiheadAttention(6, 2, batch_first=True, **widths),
        )

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Numbers for each token."""
        x = self.table(input_ids)
        return self.attention(x, *(x[..., : self.attention.kdim] for _ in range(2)))[0]


def test_attention_is_written_for_the_peft_that_adds_its_last_layer_twice(tmp_path: Path) -> None:
    """Both parameters, with scales of their own: PEFT's model gives the same, and the folder is read as it
    was written.
    """
    ours = shake(
        adapt(
            Attending(), LoRA(r=2, alpha=3, targets=("attention",), alpha_pattern={"out_proj.weight": 5}), "a"
        ),
        0.3,
        6,
    ).eval()
    save(ours, tmp_path / "pack")
    assert "twice" in convert(tmp_path / "pack", tmp_path / "theirs", to="peft").notes[0]
    theirs = peft.PeftModel.from_pretrained(Attending(), tmp_path / "theirs").eval()
    assert np.abs(out(theirs) - out(ours)).max() < FP32 < 0.05 < np.abs(out(ours) - out(Attending())).max()
    assert np.abs(out(attach(Attending(), load(tmp_path / "theirs"))) - out(ours)).max() < FP32

    half = adapt(Attending(), LoRA(r=2, targets=("attention.in_proj_weight",)), "a")
    with pytest.raises(Unsupported, match="both parameters"):
        convert(save(half, None, name="half"), tmp_path / "half", to="peft")
    apart = save(adapt(Attending(kdim=4, vdim=4), LoRA(r=2, targets=("attention",)), "a"), None, name="apart")
    with pytest.raises(Unsupported, match="a width of their own"):
        convert(apart, tmp_path / "apart", to="peft")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    """A parameter that the model or the base lacks, names that are none, and factors that are no stack's."""
    base, theirs, _ = trained(
        tmp_path, False, 7, target_parameters=["experts.up"], target_modules=[], rank_pattern={}
    )
    pack = load(theirs)
    with pytest.raises(SiteNotFound, match=r"experts\.up"):
        attach(nn.Sequential(nn.Linear(3, 4)), pack)

    def refused(error: type[AdapterpackError], words: str, **values: Any) -> None:
        config = json.loads((theirs / "adapter_config.json").read_text())
        (theirs / "adapter_config.json").write_text(json.dumps({**config, **values}))
        with pytest.raises(error, match=words):
            convert(theirs, tmp_path / "out", to="pack", base=base)
        (theirs / "adapter_config.json").write_text(json.dumps(config))

    refused(Unsupported, r"experts\.across", target_parameters=["experts.across"])
    refused(FormatError, "list of at most", target_parameters="experts.up")
    refused(FormatError, "list of at most", target_parameters=[f"experts.{number}" for number in range(1025)])
    refused(Unsupported, "fit no parameters", r=5)
    refused(Unsupported, "bounded time", target_modules="(?=q)")
    refused(Unsupported, "target_parameters", use_dora=True)


def test_a_layer_and_its_parameter_are_not_changed_at_once(tmp_path: Path) -> None:
    """An adapter of a layer would not see the value that another gives the layer's parameter, in either
    order.
    """
    layer = save(shake(adapt(Mixture(False, 7), LoRA(r=2, targets=("mix",))), 0.3, 6), None, name="layer")
    save_file(
        {
            f"base_model.model.mix.lora_{side}.weight": np.ones(shape, np.float32)
            for side, shape in (("A", (2, 5)), ("B", (5, 2)))
        },
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": 2,
                "lora_alpha": 2,
                "target_modules": [],
                "target_parameters": ["mix.weight"],
            }
        )
    )
    parameter = load(tmp_path)
    with pytest.raises(Unsupported, match="changes a parameter of this layer"):
        attach(attach(Mixture(False, 7), parameter, "parameter"), layer, "layer")
    with pytest.raises(Unsupported, match="another kind of layer"):
        attach(attach(Mixture(False, 7), layer, "layer"), parameter, "parameter")
