"""LoRA's forms in PEFT that are a plain LoRA once trained, and LoRA with a bias: against the real PEFT, and W
+ s B A in float64.
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
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.numpy import load_file, save_file
from torch import nn

import adapterpack
from adapterpack import LoRABias, adapt, attach, save
from adapterpack.adapter_methods.core.peft_form import OfBase, PeftContent
from adapterpack.adapter_methods.peft.lora_variants import as_lora
from adapterpack.errors import FormatError, Unsupported
from adapterpack.pack import from_peft

pytestmark = pytest.mark.filterwarnings("ignore")
FP32 = 2e-5
"""Absolute: float32 sums of a dozen terms of size 1 to 10, through three layers."""


class Net(nn.Module):
    """Layers of a server's two kinds: one split by its outputs, one by its inputs; and one that is not
    split.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.q_proj, self.o_proj, self.head = nn.Linear(6, 8), nn.Linear(8, 6, bias=False), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One after the other."""
        return self.head(torch.tanh(self.o_proj(torch.tanh(self.q_proj(x)))))


T = ["q_proj", "o_proj", "head"]
X = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(4))


def shaken(model: nn.Module) -> Any:
    """Everything that is trained moved by noise."""
    return shake(model, 0.3, 5).eval()


@torch.no_grad()
def out(model: nn.Module) -> np.ndarray:
    """The outputs."""
    return model(X.to(next(model.parameters()).dtype)).double().numpy()


def dense(
    tensors: dict[str, np.ndarray], scale: float, whole: Any = lambda leaf, name, value: value
) -> nn.Module:
    """The net in float64 with s B A in its weights and s c in its biases, from the tensors of PEFT's file."""
    net = Net().double()
    for leaf in T:
        at, layer = f"base_model.model.{leaf}", net.get_submodule(leaf)
        A, B = (
            torch.tensor(whole(leaf, name, tensors[f"{at}.lora_{name}.weight"].astype(np.float64)))
            for name in "AB"
        )
        with torch.no_grad():
            layer.weight += scale * B @ A
            if f"{at}.lora_B.bias" in tensors:
                change = scale * torch.tensor(tensors[f"{at}.lora_B.bias"].astype(np.float64))
                layer.bias = nn.Parameter(change if layer.bias is None else layer.bias + change)
            if f"{at}.base_layer.bias" in tensors:
                layer.bias.copy_(torch.tensor(tensors[f"{at}.base_layer.bias"]))
    return net


def block_diagonal(leaf: str, name: str, value: np.ndarray) -> np.ndarray:
    """Two blocks of B at q_proj, and of A at o_proj, entry by entry."""
    if (leaf, name) not in {("q_proj", "B"), ("o_proj", "A")}:
        return value
    tall, wide = len(value) // 2, value.shape[1]
    return np.array(
        [
            [value[i, j % wide] if i // tall == j // wide else 0.0 for j in range(2 * wide)]
            for i in range(len(value))
        ]
    )


FORMS = {
    "BD-LoRA": (
        {
            "use_bdlora": peft.tuners.lora.config.BdLoraConfig(
                target_modules_bd_a=["o_pr"], target_modules_bd_b=["q_proj"], nblocks=2, match_strict=False
            )
        },
        block_diagonal,
    ),
    "MonteCLoRA": (
        {"monteclora_config": peft.tuners.lora.config.MontecloraConfig(num_samples=2, buffer_size=2)},
        None,
    ),
    "VeLoRA": ({"velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=2)}, None),
    "lora_bias": ({"lora_bias": True}, None),
    "biased_lora": ({"bias": "lora_only"}, None),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_of_peft_here_and_there_again(name: str, tmp_path: Path) -> None:
    """Ours(base, PEFT's folder) == PEFT == float64 dense; what we write of it PEFT reads as the same, and it
    is a valid pack.
    """
    options, whole = FORMS[name]
    theirs = peft.get_peft_model(
        Net(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=T, **copy.deepcopy(options))
    )
    theirs.train()(X).square().sum().backward()  # some store what they see in training
    shaken(theirs).save_pretrained(tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    wanted = out(dense(tensors, 1.5) if whole is None else dense(tensors, 1.5, whole))
    assert np.abs(wanted - out(Net())).max() > 0.05
    pack = from_peft.read(tmp_path / "theirs")
    assert pack.method.name == (name if "bias" in name else "lora")
    pack.write(tmp_path / "ours")
    adapterpack.load(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours").eval()
    for model in (theirs, attach(Net(), pack, check_base=False).eval(), again):
        np.testing.assert_allclose(out(model), wanted, rtol=0, atol=FP32)


def test_lora_with_a_bias_of_ours(tmp_path: Path) -> None:
    """Fresh it is the base; trained, PEFT has its outputs with our folder, merged or not, where the layers
    have biases.
    """
    assert np.array_equal(out(adapt(Net(), LoRABias(r=3))), out(Net()))
    ours = shaken(adapt(Net(), LoRABias(r=3, alpha=5, init="pissa", targets=("q_proj", "head"))))
    save(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours").eval()
    np.testing.assert_allclose(out(theirs), out(ours), rtol=0, atol=FP32)
    np.testing.assert_allclose(out(theirs.merge_and_unload()), out(ours), rtol=0, atol=FP32)


@pytest.mark.parametrize("targets", [T, ["q_proj"]], ids=["every layer is adapted", "one layer is"])
def test_all_biases_are_read_those_of_layers_that_are_not_adapted_too(
    targets: list[str], tmp_path: Path
) -> None:
    """PEFT's bias="all"; what is written of it PEFT reads as the same."""
    theirs = shaken(peft.get_peft_model(Net(), peft.LoraConfig(r=3, target_modules=targets, bias="all")))
    theirs.save_pretrained(tmp_path / "theirs")
    pack = from_peft.read(tmp_path / "theirs")
    pack.write(tmp_path / "ours")
    assert np.abs(out(theirs) - out(Net())).max() > 0.05
    for model in (
        attach(Net(), pack, check_base=False),
        peft.PeftModel.from_pretrained(Net(), tmp_path / "ours").eval(),
    ):
        np.testing.assert_allclose(out(model), out(theirs), rtol=0, atol=FP32)


def test_qalora_is_what_pefts_layer_computes(tmp_path: Path) -> None:
    """PEFT has it for GPTQ layers alone; its own forward of it, on a float layer, is what our reading of such
    a file computes. Which it was the base says: at layers as wide as A it is a plain LoRA, as PEFT loads it,
    and without the base it is neither.
    """
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=T, qalora_group_size=2)
    shaken(peft.get_peft_model(Net(), config)).save_pretrained(tmp_path)
    tensors, rng = load_file(tmp_path / "adapter_model.safetensors"), np.random.default_rng(6)
    for leaf, width in (("q_proj", 6), ("o_proj", 8), ("head", 6)):
        tensors[f"base_model.model.{leaf}.lora_A.weight"] = rng.normal(size=(3, width // 2)).astype(
            np.float32
        )
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_qalora": True}))
    x, base = X, Net()
    with pytest.raises(Unsupported, match=r"layers of GPTQ alone.*--base"):
        from_peft.read(tmp_path)
    narrow = from_peft.import_folder(
        tmp_path, base=OfBase(lambda name: tensors[f"base_model.model.{name[:-7]}.lora_A.weight"].shape, list)
    ).pack
    assert {adapter.site.path: adapter.site.in_features for adapter in narrow.adapters()} == {
        "q_proj": 3,
        "o_proj": 4,
        "head": 3,
    }
    pack = from_peft.import_folder(
        tmp_path, base=OfBase(lambda name: tuple(base.get_parameter(name).shape), list)
    ).pack
    ours = attach(Net(), pack, check_base=False).eval()
    with torch.no_grad():
        for leaf in T:
            layer = Linear(base.get_submodule(leaf), "default", config=config, r=3, lora_alpha=6)
            QALoraLinearVariant.init(layer, "default", config=config)
            for name in "AB":
                getattr(layer, f"lora_{name}")["default"].weight.copy_(
                    torch.tensor(tensors[f"base_model.model.{leaf}.lora_{name}.weight"])
                )
            result = QALoraLinearVariant.forward(layer.eval(), "default", x, base.get_submodule(leaf)(x))
            np.testing.assert_allclose(ours.get_submodule(leaf)(x), result, rtol=0, atol=FP32)
            x = torch.tanh(result)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"nblocks": 1 << 20}, "nblocks"),
        ({"nblocks": 3}, "blocks one below the other"),
        ({"target_modules_bd_a": "o_proj"}, "list of names"),
    ],
)
def test_blocks_that_cannot_be_are_refused(change: dict[str, Any], error: str, tmp_path: Path) -> None:
    """A stranger's number of blocks is bounded, and divides what is stored."""
    peft.get_peft_model(
        Net(), peft.LoraConfig(r=4, target_modules=T, **copy.deepcopy(FORMS["BD-LoRA"][0]))
    ).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "use_bdlora": {**config["use_bdlora"], **change}}))
    with pytest.raises(FormatError, match=error):
        from_peft.read(tmp_path)


@pytest.mark.parametrize(
    "options", [{"use_qalora": True, "qalora_group_size": 1024}, {"use_bdlora": {"nblocks": 64}}]
)
def test_factors_far_larger_than_the_file_are_refused_before_they_are_made(options: dict[str, Any]) -> None:
    """A stranger's group, or number of blocks, times 2^24 numbers: refused by the count alone."""
    A = np.broadcast_to(np.float32(0), (1 << 12, 1 << 12))
    with pytest.raises(ValueError, match="of a file of 16777216"):
        as_lora(PeftContent(None, {}, {"layer": {"lora_A": A}}, written=options))


@pytest.mark.parametrize(("kind", "reason"), [("XLORA", "folders elsewhere"), ("NEW", "not supported")])
def test_what_is_not_read_says_why(kind: str, reason: str, tmp_path: Path) -> None:
    """The error names the type, and the reason that it has."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    save_file({"base_model.model.q.x": np.zeros(1, np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(Unsupported, match=f"{reason}.*{kind}"):
        from_peft.read(tmp_path)
