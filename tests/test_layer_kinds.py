"""Layers beyond nn.Linear: what an adapter of each does, in the model, in a pack, in a checkpoint, and in
PEFT.

The right values are always the dense formula in float64: the stored weight with ``s B A`` written into it,
the way that kind stores it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from msgspec.structs import replace
from noise import shake
from safetensors.torch import load_file, save_file
from torch import nn

from adapterpack import (
    LoRA,
    TrainableTokens,
    adapt,
    attach,
    compose,
    convert,
    detach,
    export,
    load,
    merge,
    merge_into,
    quantize,
    save,
)
from adapterpack.adapter_methods import (
    LAYOUTS,
    Dense,
    Kronecker,
    Site,
    from_matrix,
    get,
    matrix_shape,
    to_matrix,
)
from adapterpack.adapter_methods.core.operators import Chain, Diagonal, columns
from adapterpack.errors import AdapterpackError, BaseMismatch, FormatError, SiteNotFound, Unsupported
from adapterpack.manifest.structs import PackTask
from adapterpack.pack.validate.validation import validate
from adapterpack.torch_adapters.layers.active import active
from adapterpack.torch_adapters.layers.conv import AdaptedConv
from adapterpack.torch_adapters.layers.layer import Adapted, NewAdapter
from adapterpack.torch_adapters.layers.sites import select
from adapterpack.torch_adapters.layers.wrapper import base_modules

pytestmark = pytest.mark.fast
torch.set_num_threads(1)

WORDS = 13


class Tokens(nn.Module):
    """An embedding, a layer, and a head that may be the embedding's own table."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(WORDS, 6, padding_idx=0)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, WORDS, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.tokens(x))))


class Scaled(nn.Embedding):
    """As Gemma's and BART's: the table times a number."""

    embed_scale = 2.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.embed_scale


class Attending(nn.Module):
    """Self-attention, which reads the weights of its projections and calls none of them."""

    def __init__(self, **widths: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, **widths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x[..., : self.attention.kdim], x[..., : self.attention.vdim])[0]


class Experts(nn.Module):
    """Fused experts of both orders, and a router that is a bare matrix."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.empty(7, 6))
        self.up = nn.Parameter(torch.empty(7, 6, 5) if transposed else torch.empty(7, 5, 6))
        self.is_transposed = transposed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up if self.is_transposed else self.up.mT
        share = torch.softmax(x @ self.router.T, -1)
        return torch.einsum("...e,...i,eio->...o", share, x, up)


class Mixture(nn.Module):
    """A block with experts."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.experts = Experts(transposed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=WORDS,
        n_embd=6,
        n_layer=2,
        n_head=2,
        n_positions=16,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def ids() -> torch.Tensor:
    return torch.tensor([[1, 4, 4, 0, 12], [7, 2, 11, 3, 5]])


def floats(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, what goes into it, the targets, and the tensors that these are, each with its kind."""

    make: Callable[[], nn.Module]
    x: Callable[[], torch.Tensor]
    targets: tuple[str, ...]
    tensors: dict[str, str]
    peft: bool = True


SUBJECTS = {
    "GPT-2": Subject(
        gpt2,
        ids,
        ("c_attn", "mlp.c_proj"),
        {
            f"transformer.h.{i}.{leaf}.weight": "transposed"
            for i in (0, 1)
            for leaf in ("attn.c_attn", "mlp.c_proj")
        },
    ),
    "embedding": Subject(lambda: Tokens(False), ids, ("tokens",), {"tokens.weight": "embedding"}),
    "tied embedding": Subject(lambda: Tokens(True), ids, ("tokens",), {"tokens.weight": "embedding"}),
    "scaled embedding": Subject(
        lambda: nn.Sequential(Scaled(WORDS, 6)), ids, ("0",), {"0.weight": "embedding"}, peft=False
    ),
    "conv 1d": Subject(
        lambda: nn.Sequential(nn.Conv1d(4, 7, 3, stride=2, bias=False)),
        floats(2, 4, 9),
        ("0",),
        {"0.weight": "conv"},
    ),
    "conv 2d": Subject(
        lambda: nn.Sequential(nn.Conv2d(4, 6, (3, 2), padding=1), nn.ReLU(), nn.Conv2d(6, 3, 1)),
        floats(2, 4, 5, 5),
        ("0", "2"),
        {"0.weight": "conv", "2.weight": "conv"},
    ),
    "conv 3d": Subject(
        lambda: nn.Sequential(nn.Conv3d(2, 3, 2)), floats(1, 2, 3, 4, 3), ("0",), {"0.weight": "conv"}
    ),
    "conv of groups": Subject(
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2, padding_mode="circular")),
        floats(2, 4, 7, 7),
        ("0",),
        {"0.weight": "grouped_conv"},
        peft=False,
    ),
    "attention": Subject(
        Attending,
        floats(2, 3, 6),
        ("attention",),
        {"attention.in_proj_weight": "parameter", "attention.out_proj.weight": "parameter"},
        peft=False,
    ),
    "cross-attention": Subject(
        lambda: Attending(kdim=4, vdim=5),
        floats(2, 3, 6),
        ("attention",),
        {
            f"attention.{name}": "parameter"
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
        },
        peft=False,
    ),
    "experts": Subject(
        lambda: Mixture(False),
        floats(2, 3, 6),
        ("experts.up", "router"),
        {"experts.router": "parameter", "experts.up": "experts"},
        peft=False,
    ),
    "turned experts": Subject(
        lambda: Mixture(True), floats(2, 3, 6), ("up",), {"experts.up": "turned_experts"}, peft=False
    ),
}


def base_of(subject: Subject, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model with every parameter random, biases too, and frozen: torch computes otherwise where a
    gradient is asked for.
    """
    model, generator = subject.make(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.to(dtype).eval().requires_grad_(False)


def outputs(model: nn.Module, subject: Subject) -> torch.Tensor:
    x = subject.x()
    dtype = next(model.parameters()).dtype
    found = model(x.to(dtype) if x.is_floating_point() else x)
    return found.logits if hasattr(found, "logits") else found


def trained(subject: Subject, model: nn.Module, **options: Any) -> nn.Module:
    """The model with an adapter whose tensors are random, in float32 as they are trained and stored."""
    adapt(model, LoRA(r=3, alpha=4, targets=subject.targets, **options), "a")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def change(kind: str, A: np.ndarray, B: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """``4/3 B A`` as a weight of that kind stores it."""
    A, B = A.astype(np.float64), B.astype(np.float64)
    product = 4 / 3 * (np.einsum("eor,eri->eoi", B, A) if A.ndim == 3 else B @ A)
    turned = {
        "transposed": lambda v: v.T,
        "embedding": lambda v: v.T,
        "turned_experts": lambda v: v.transpose(0, 2, 1),
    }
    return turned.get(kind, lambda v: v.reshape(shape))(product)


def factors(model: nn.Module) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Site path -> A and B of the adapter in a model."""
    found = {
        module._site.path: module._params("a") for module in model.modules() if isinstance(module, Adapted)
    }
    return {path: (params["lora_A"], params["lora_B"]) for path, params in found.items()}


def dense_weights(subject: Subject, model: nn.Module) -> dict[str, np.ndarray]:
    """The right values of every adapted tensor, float64."""
    plain, pairs = dict(base_of(subject).named_parameters()), factors(model)
    weights = {}
    for name, kind in subject.tensors.items():
        A, B = pairs[name if name in pairs else name.removesuffix(".weight")]
        old = plain[name].numpy()
        weights[name] = old + change(kind, A, B, old.shape)
    return weights


def expected(subject: Subject, model: nn.Module) -> torch.Tensor:
    """The base in float64, computing with the right weights; a tied head keeps the base's."""
    weights = {name: torch.tensor(value) for name, value in dense_weights(subject, model).items()}
    x, base = subject.x(), base_of(subject)
    found = torch.func.functional_call(
        base, weights, (x.double() if x.is_floating_point() else x,), tie_weights=False
    )
    return found.logits if hasattr(found, "logits") else found


@pytest.mark.parametrize("label", SUBJECTS)
def test_the_model_computes_the_dense_formula(label: str) -> None:
    """Fresh: the base bit for bit. Trained: the formula within 1e-12, float64 sums in another order. Off: the
    base again, bit for bit.
    """
    subject = SUBJECTS[label]
    model = base_of(subject)
    plain, names = outputs(model, subject), list(model.state_dict())
    adapt(model, LoRA(r=2, targets=subject.targets))
    # asked for a gradient, torch's own attention multiplies in another order on some machines
    with torch.no_grad():
        assert torch.equal(outputs(model, subject), plain)
    detach(model)
    trained(subject, model)
    assert {name for name, module in base_modules(model) if name} == {
        name for name, _ in base_of(subject).named_modules() if name
    }
    torch.testing.assert_close(outputs(model, subject), expected(subject, model), rtol=1e-12, atol=1e-12)
    assert (outputs(model, subject) - plain).abs().max() > 0.05
    assert torch.equal(outputs(active(model, None), subject), plain)
    assert torch.equal(outputs(detach(model), subject), plain)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("label", SUBJECTS)
def test_gradients_are_those_of_the_dense_formula(label: str) -> None:
    """``dL/dA`` and ``dL/dB`` by a central difference of the formula itself in float64, along a random
    direction: within 1e-5.
    """
    subject = SUBJECTS[label]
    model = trained(subject, base_of(subject))
    wanting = [value for value in model.parameters() if value.requires_grad]
    generator = torch.Generator().manual_seed(4)
    steps = [torch.randn(value.shape, generator=generator) for value in wanting]
    torch.sin(outputs(model, subject)).sum().backward()
    found = sum(
        float((value.grad.double() * step.double()).sum()) for value, step in zip(wanting, steps, strict=True)
    )
    sides = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for value, step in zip((v for v in moved.parameters() if v.requires_grad), steps, strict=True):
                value.add_(step, alpha=sign * 2.0**-10)
        sides.append(float(torch.sin(expected(subject, moved)).sum()))
    assert found == pytest.approx((sides[0] - sides[1]) * 2.0**9, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("label", SUBJECTS)
def test_two_adapters_add_up(label: str) -> None:
    """Both active: the sum of their changes, which is the output of one adapter that holds both factors.
    Within 1e-12.
    """
    subject = SUBJECTS[label]
    model = trained(subject, base_of(subject))
    first = factors(model)
    both = {path: (np.concatenate([A, A], -2), np.concatenate([B, B], -1)) for path, (A, B) in first.items()}
    pack = save(model, None, name="b")
    attach(model, pack, "b", check_base=False)
    found = outputs(active(model, ["a", "b"]), subject)
    double = base_of(subject)
    adapt(double, LoRA(r=6, alpha=8, targets=subject.targets), "a")
    with torch.no_grad():
        for module in double.modules():
            if isinstance(module, Adapted):
                for key, value in zip(("lora_A", "lora_B"), both[module._site.path], strict=True):
                    dict(module._part("a").named_parameters())[key].copy_(torch.tensor(value))
    torch.testing.assert_close(found, outputs(double, subject), rtol=1e-12, atol=1e-12)


def stored(subject: Subject, folder: Path, config: str = "{}") -> Path:
    """The base as a float32 checkpoint."""
    model = base_of(subject, torch.float32)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        kept = {name: value.contiguous() for name, value in model.named_parameters()}
        save_file(kept, folder / "model.safetensors")
        (folder / "config.json").write_text(config)
    return folder


@pytest.mark.parametrize("label", SUBJECTS)
def test_a_pack_goes_round_and_into_the_checkpoint(label: str, tmp_path: Path) -> None:
    """Saved, validated, loaded and attached: the same output, bit for bit. Merged: the formula in float32;
    the rest is as it was.
    """
    subject = SUBJECTS[label]
    base = stored(subject, tmp_path / "base")
    model = trained(subject, base_of(subject, torch.float32))
    save(model, tmp_path / "pack", base=base)
    assert [str(finding) for finding in validate(tmp_path / "pack").findings] == []
    pack = load(tmp_path / "pack")
    assert sorted((one.site.kind, one.weight) for one in pack.adapters()) == sorted(
        (kind, name) for name, kind in subject.tensors.items()
    )
    again = attach(base_of(subject, torch.float32), pack, "a", check_base=False)
    assert torch.equal(outputs(again, subject), outputs(model, subject))
    assert [one.site for one in save(again, None, base=base).adapters()] == [
        one.site for one in pack.adapters()
    ]
    report = merge(base, [pack], tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    right = dense_weights(subject, model)
    assert report.tensors_changed == len(right)
    assert list(before) == list(after)
    for name, value in after.items():
        if name in right:
            np.testing.assert_allclose(value.numpy(), right[name], rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("label", SUBJECTS)
def test_a_base_in_half_precision(label: str) -> None:
    """bf16: within 3 % of the largest entry of what float64 gives on the same rounded base, some ten
    roundings of 2^-8; off is the base.
    """
    subject = SUBJECTS[label]
    model = base_of(subject, torch.bfloat16)
    plain = outputs(model, subject)
    wide = copy.deepcopy(model).double()
    adapt(model, LoRA(r=2, targets=subject.targets))
    # asked for a gradient, torch's own attention multiplies in another order on some machines
    with torch.no_grad():
        assert torch.equal(outputs(model, subject), plain)
    detach(model)
    pack = save(trained(subject, model), None, name="a")
    right = outputs(attach(wide, pack, check_base=False), subject)
    assert outputs(model, subject).dtype == torch.bfloat16
    assert float((outputs(model, subject).double() - right).abs().max() / right.abs().max()) < 0.03
    assert torch.equal(outputs(active(model, None), subject), plain)


PEFT = [label for label, subject in SUBJECTS.items() if subject.peft]


def theirs_of(subject: Subject, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base_of(subject, torch.float32), str(folder)).eval()


@pytest.mark.parametrize("label", PEFT)
def test_peft_loads_the_pack(label: str, tmp_path: Path) -> None:
    """PEFT, given the folder, computes the formula, and again when merged: within 1e-5 of float64, by float32
    sums.
    """
    subject = SUBJECTS[label]
    model = trained(subject, base_of(subject, torch.float32))
    save(model, tmp_path / "pack", base=stored(subject, tmp_path / "base"))
    right, theirs = expected(subject, model).float(), theirs_of(subject, tmp_path / "pack")
    torch.testing.assert_close(outputs(theirs.get_base_model(), subject), right, rtol=1e-5, atol=1e-5)
    if label != "tied embedding":  # PEFT's merge changes the head with it, and its own output
        torch.testing.assert_close(outputs(theirs.merge_and_unload(), subject), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label", PEFT)
def test_a_folder_of_peft_is_read(label: str, tmp_path: Path) -> None:
    """A folder that PEFT wrote gives its output here, of its own kinds of site, and the same when PEFT's file
    is written again.
    """
    subject = SUBJECTS[label]
    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules=list(subject.targets))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base_of(subject, torch.float32), config).eval()
        with torch.no_grad():
            for name, value in theirs.named_parameters():
                if "lora_" in name:
                    value.copy_(
                        torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))) * 0.5
                    )
        theirs.save_pretrained(tmp_path / "theirs")
    pack = load(tmp_path / "theirs")
    assert {one.site.kind for one in pack.adapters()} == set(subject.tensors.values())
    ours = attach(base_of(subject, torch.float32), pack, check_base=False)
    torch.testing.assert_close(outputs(ours, subject), outputs(theirs, subject), rtol=1e-5, atol=1e-5)
    pack.write(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "again"))
    assert {name: value.shape for name, value in before.items() if "lora" in name} == {
        name: value.shape for name, value in after.items()
    }


def test_what_has_no_form_in_peft_has_no_face_of_it(tmp_path: Path) -> None:
    """Groups keep groups here, PEFT's factors cross them (and it cannot merge that); bare parameters: the
    pack is ours alone, and valid.
    """
    for label in ("conv of groups", "attention", "experts"):
        subject = SUBJECTS[label]
        save(trained(subject, base_of(subject, torch.float32)), tmp_path / label, name="a")
        assert not (tmp_path / label / "adapter_config.json").exists()
        assert validate(tmp_path / label).findings == ()


def test_peft_counts_attentions_out_proj_twice(tmp_path: Path) -> None:
    """PEFT 0.21.2 adds the change of ``out_proj`` twice in every forward pass (its pull request 3774): its
    output is the formula with that change doubled, and so its folders are read. Once this fails, attention
    can have a PEFT form: see ``peft/attention.py``.
    """
    subject = SUBJECTS["attention"]
    theirs = peft.get_peft_model(
        base_of(subject, torch.float32), peft.LoraConfig(r=3, lora_alpha=4, target_modules=["attention"])
    )
    model = trained(subject, base_of(subject))
    with torch.no_grad():
        for path, own in (
            ("attention.in_proj_weight", "attention"),
            ("attention.out_proj.weight", "attention.base_layer.out_proj"),
        ):
            layer = theirs.base_model.model.get_submodule(own)
            for side, value in zip((layer.lora_A, layer.lora_B), factors(model)[path], strict=True):
                side["default"].weight.copy_(torch.tensor(value))
    plain = dict(base_of(subject).named_parameters())
    weights = {name: torch.tensor(value) for name, value in dense_weights(subject, model).items()}
    weights["attention.out_proj.weight"] = (
        2 * weights["attention.out_proj.weight"] - plain["attention.out_proj.weight"]
    )
    doubled = torch.func.functional_call(base_of(subject), weights, (subject.x().double(),))
    torch.testing.assert_close(outputs(theirs, subject), doubled.float(), rtol=1e-4, atol=1e-4)
    assert (outputs(theirs, subject) - expected(subject, model)).abs().max() > 0.1
    theirs.save_pretrained(tmp_path / "theirs")
    base = stored(subject, tmp_path / "base")
    assert validate(tmp_path / "theirs", base=base).valid
    for pack in (
        load(tmp_path / "theirs"),
        convert(tmp_path / "theirs", tmp_path / "pack", to="pack", base=base).pack,
    ):
        torch.testing.assert_close(
            outputs(attach(base_of(subject), pack, check_base=False), subject),
            doubled,
            rtol=1e-12,
            atol=1e-12,
        )
    assert not (tmp_path / "pack" / "adapter_config.json").exists()
    merge(base, [tmp_path / "theirs"], tmp_path / "merged")
    for name, value in load_file(tmp_path / "merged" / "model.safetensors").items():
        torch.testing.assert_close(value, weights.get(name, plain[name]).float(), rtol=1e-6, atol=1e-6)


def test_a_model_in_memory_keeps_its_names_and_its_fingerprint() -> None:
    """With adapters in, a model's own modules, tensors and fingerprint are those of the bare model: a pack of
    it fits a fresh one.
    """
    for label, subject in SUBJECTS.items():
        model = trained(subject, base_of(subject))
        pack = save(model, None, name="a")
        bare = save(trained(subject, base_of(subject)), None, name="b")
        assert pack.manifest.base.content == bare.manifest.base.content, label
        attach(base_of(subject), pack)
        attach(model, bare)
        other = base_of(subject)
        with torch.no_grad():
            next(other.parameters()).add_(1)
        with pytest.raises(BaseMismatch):
            attach(other, pack)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.bfloat16, 0.03)])
def test_every_way_through_a_convolution_is_the_same_change(dtype: torch.dtype, within: float) -> None:
    """Two narrow convolutions, one with the whole change, one with the folded weight: which it is follows
    from a method's traits, and LoRA under other traits goes the other ways. Equal within float64 sums, and in
    bf16 within a few of its roundings.
    """
    layer = nn.Conv2d(4, 6, (3, 2), groups=2).to(dtype).requires_grad_(False)
    rng = np.random.default_rng(0)
    params = {
        "lora_A": rng.normal(size=(2, 12)).astype(np.float32),
        "lora_B": rng.normal(size=(6, 2)).astype(np.float32),
    }
    traits, found = get("lora").traits, []
    for changed in ({}, {"low_rank": False}, {"reads_weight": True}, {"additive": False}):
        wrapper = AdaptedConv(layer, Site("conv", 12, 6, "grouped_conv", True))
        method = get("lora")._replace(traits=dataclasses.replace(traits, **changed))
        wrapper._add("a", NewAdapter(method, LoRA(r=2), params, {}, {}))
        wrapper._active = ("a",)
        found.append(wrapper(floats(2, 4, 5, 5)().to(dtype)))
    for other in found[1:]:
        assert other.dtype == dtype
        torch.testing.assert_close(other, found[0], rtol=within, atol=within * float(found[0].abs().max()))


@pytest.mark.parametrize(
    ("A", "B"), [((3, 4, 1, 1), (7, 1, 3, 1)), ((3, 4, 2, 2), (7, 3)), ((3, 4, 3), (7, 3, 3))]
)
def test_convolutions_that_are_not_pefts_pair_are_refused(
    A: tuple[int, ...], B: tuple[int, ...], tmp_path: Path
) -> None:
    """A kernel of B's own, or another number of axes: matrices could be made of them, but they would be
    another change.
    """
    peft.get_peft_model(
        nn.Sequential(nn.Conv2d(4, 7, 2)), peft.LoraConfig(r=3, target_modules=["0"])
    ).save_pretrained(tmp_path)
    tensors = {
        f"base_model.model.0.lora_{side}.weight": torch.ones(shape) for side, shape in (("A", A), ("B", B))
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="wrong shape"):
        load(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_of_groups_that_peft_adapted(bias: bool, tmp_path: Path) -> None:
    """PEFT's A reads the inputs of all groups, and B has a share of the rank for each: attached it is PEFT's
    output and the dense formula in float64, and PEFT loads it again bit for bit; no weight of groups can hold
    it, so that it is neither merged nor composed.
    """
    base = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1, bias=bias)).eval()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=6, lora_alpha=4, target_modules=["0"], lora_bias=bias)
    ).eval()
    shake(theirs, 0.3).save_pretrained(tmp_path / "theirs")
    x, plain = floats(3, 4, 5, 7)(), copy.deepcopy(base).double()
    model = attach(copy.deepcopy(base), load(tmp_path / "theirs"), "a")
    t = {
        name.removeprefix("base_model.model.0."): value.double()
        for name, value in load_file(tmp_path / "theirs" / "adapter_model.safetensors").items()
    }
    A, B = t["lora_A.weight"], t["lora_B.weight"][:, :, 0, 0]
    dense = torch.cat(
        [torch.einsum("or,rikl->oikl", B[3 * g : 3 * g + 3], A[3 * g : 3 * g + 3]) for g in (0, 1)]
    )
    right = plain(x.double()) + 4 / 6 * torch.nn.functional.conv2d(
        x.double(), dense, t.get("lora_B.bias"), stride=2, padding=1
    )
    assert float((right - plain(x.double())).abs().max()) > 0.1
    with torch.no_grad():
        np.testing.assert_allclose(model.double()(x.double()), right, rtol=0, atol=1e-12)
        np.testing.assert_allclose(theirs(x), right, rtol=0, atol=1e-5)
    save(model, tmp_path / "ours", base=None)
    convert(tmp_path / "theirs", tmp_path / "pack", to="pack", base=_on_disk(base, tmp_path / "base"))
    for folder in ("pack", "ours"):
        assert validate(tmp_path / folder).state == "valid"
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder)
        assert all(
            torch.equal(value, theirs.state_dict()[name]) for name, value in again.state_dict().items()
        )
    assert validate(tmp_path / "pack", base=tmp_path / "base").state == "valid"
    for refused in (
        lambda: merge(tmp_path / "base", [tmp_path / "pack"], tmp_path / "merged"),
        lambda: merge_into(model),
        lambda: compose([load(tmp_path / "pack"), load(tmp_path / "pack").renamed("other")]),
        lambda: adapt(model, LoRA(targets="0"), "b"),
    ):
        with pytest.raises(Unsupported, match=r"no weight of groups can hold|in another way"):
            refused()
    other = nn.Sequential(nn.Conv2d(4, 6, 3, bias=bias))
    with pytest.raises(AdapterpackError):
        attach(other, load(tmp_path / "theirs"))


def _on_disk(model: nn.Module, folder: Path) -> Path:
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.filterwarnings("ignore")
def test_dora_of_a_convolution_of_groups_is_refused(tmp_path: Path) -> None:
    """PEFT's lengths are those of a matrix whose rows it puts together anew."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"], use_dora=True)).save_pretrained(
        tmp_path / "theirs"
    )
    with pytest.raises(Unsupported, match="rows that it mixes up between the groups"):
        load(tmp_path / "theirs")


def test_a_method_says_which_kinds_it_takes() -> None:
    """A kind that is not in the traits is an error that names the layer; "all-linear" takes linear layers of
    both orders and no others.
    """
    only = dataclasses.replace(get("lora").traits, layers=("linear",))
    for label, path in (
        ("GPT-2", "transformer.h.0.attn.c_attn"),
        ("embedding", "tokens"),
        ("conv 2d", "0"),
        ("attention", "attention"),
        ("experts", "experts.router"),
    ):
        with pytest.raises(Unsupported, match="does not support this layer") as error:
            select(SUBJECTS[label].make(), (path,), only)
        assert str(error.value.where) == path
    every = get("lora").traits
    assert {site.kind for site in select(gpt2(), "all-linear", every)} == {"transposed"}
    assert [site.path for site in select(Tokens(False), "all-linear", every)] == ["body", "head"]
    with pytest.raises(SiteNotFound, match="no such layer"):
        select(Mixture(False), "all-linear", every)


class Normalised(nn.Conv2d):
    """A convolution that changes its weight before it uses it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)


@pytest.mark.parametrize(
    "layer",
    [
        Normalised(2, 2, 1),
        nn.Embedding(4, 3, max_norm=1.0),
        nn.ConvTranspose2d(2, 2, 1),
        nn.ParameterList([torch.ones(2, 2)]),
    ],
)
def test_a_layer_that_is_more_than_its_kind_is_refused(layer: nn.Module) -> None:
    """Weights that are normalised, renormed in place, of another layout, or owned by what is never called:
    never adapted in silence.
    """
    with pytest.raises(Unsupported, match="does not support"):
        adapt(nn.Sequential(layer), LoRA(targets=("0",)))


def test_what_cannot_be_wrapped_is_refused() -> None:
    """A parameter of the model itself; dropout on a parameter; an init that looks at inputs; a pack for
    another kind of layer.
    """
    with pytest.raises(Unsupported, match="container"):
        adapt(Experts(False), LoRA(targets=("router",)))
    with pytest.raises(Unsupported, match="dropout"):
        adapt(Mixture(False), LoRA(targets=("router",), dropout=0.1))
    with pytest.raises(Unsupported, match="linear layers only"):
        adapt(Tokens(False), LoRA(targets=("tokens",), init="eva"), data=[{"x": ids()}])
    pack = save(adapt(nn.Sequential(nn.Linear(4, 7)), LoRA(r=2)), None, name="a")
    with pytest.raises(Unsupported, match="another kind of layer"):
        attach(nn.Sequential(nn.Conv1d(4, 7, 1)), pack, check_base=False)


@pytest.mark.parametrize("label", ["embedding", "conv 2d", "GPT-2"])
def test_dropout_acts_on_the_change_alone(label: str) -> None:
    """In training mode outputs differ from run to run, their mean is that without dropout (5 deviations), and
    evaluation has none.

    The base is float64 and itself has no dropout; the head is left out of the mean: only what is linear in
    the change has one.
    """
    subject = dataclasses.replace(SUBJECTS[label], targets=("0",)) if label == "conv 2d" else SUBJECTS[label]
    model = trained(subject, base_of(subject), dropout=0.25)
    layer = next(module for module in model.modules() if isinstance(module, Adapted))
    shape = {"embedding": None, "conv 2d": (2, 4, 5, 5), "GPT-2": (2, 3, 6)}[label]
    x = ids() if shape is None else floats(*shape)().double()
    still = layer(x)
    assert torch.equal(layer(x), still)
    layer.train()
    torch.manual_seed(3)
    runs = torch.stack([layer(x) for _ in range(2500)]).detach()
    assert not torch.equal(runs[0], runs[1])
    deviation = runs.std(0) / 50
    assert bool(((runs.mean(0) - still).abs() <= 5 * deviation + 1e-12).all())


def test_a_change_that_is_not_additive_has_no_dropout_on_a_convolution() -> None:
    """An error when the adapter is put in, not in the middle of a training."""
    method = get("lora")._replace(traits=dataclasses.replace(get("lora").traits, additive=False))
    wrapper = AdaptedConv(nn.Conv1d(2, 3, 2), Site("conv", 4, 3, "conv", True, (2,)))
    with pytest.raises(Unsupported, match="dropout on the input has no place"):
        wrapper._add("a", NewAdapter(method, LoRA(r=1, dropout=0.1), {}, {}, {}))


@pytest.mark.parametrize(("tied", "says"), [(True, True), (True, False), (False, False), (False, True)])
def test_an_embedding_that_is_the_head_too_is_not_merged(tied: bool, says: bool, tmp_path: Path) -> None:
    """Attached, a tied head keeps the base's table. Merged, it would change along: refused, also where the
    config leaves ties to the model's class and the file has no head of its own. Untied, the merge is what
    attaching gives.
    """
    subject = SUBJECTS["tied embedding" if tied else "embedding"]
    config = {"vocab_size": WORDS, **({"tie_word_embeddings": tied} if says else {})}
    base = stored(subject, tmp_path / "base", json.dumps(config))
    pack = save(trained(subject, base_of(subject, torch.float32)), None, name="a", base=base)
    generating = dataclasses.replace(pack, manifest=replace(pack.manifest, task=PackTask("text-generation")))
    if tied:
        with pytest.raises(Unsupported, match="input embedding and the output head at once"):
            merge(base, [generating], tmp_path / "merged")
    else:
        assert merge(base, [generating], tmp_path / "merged").tensors_changed == 1
    assert merge(base, [pack], tmp_path / "features").tensors_changed == 1  # a model without a head


def test_gpt2_is_a_language_model_with_a_tied_head(tmp_path: Path) -> None:
    """A real one: wte adapted trains and runs, and its merge is refused; c_attn merges, and transformers
    loads what came out.
    """
    from transformers import GPT2LMHeadModel

    base = stored(SUBJECTS["GPT-2"], tmp_path / "base")
    model = GPT2LMHeadModel.from_pretrained(base).eval()
    pack = save(trained(dataclasses.replace(SUBJECTS["GPT-2"], targets=("wte",)), model), None, name="a")
    assert pack.manifest.task.type == "text-generation"
    with pytest.raises(Unsupported, match="output head at once"):
        merge(base, [pack], tmp_path / "merged")
    model = trained(SUBJECTS["GPT-2"], GPT2LMHeadModel.from_pretrained(base).eval())
    merge(base, [save(model, None, name="a")], tmp_path / "merged")
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids()).logits, model(ids()).logits, rtol=1e-5, atol=1e-5)


def test_a_weight_in_half_precision_is_rounded_once(tmp_path: Path) -> None:
    """bf16 checkpoints of turned, stacked and kernel weights: the merge is the float32 sum rounded to
    nearest, entry for entry.
    """
    for label in ("GPT-2", "turned experts", "conv of groups", "embedding"):
        subject = SUBJECTS[label]
        model = base_of(subject, torch.bfloat16)
        base = tmp_path / label / "base"
        base.mkdir(parents=True)
        save_file(
            {name: value.contiguous() for name, value in model.named_parameters()}, base / "model.safetensors"
        )
        model = trained(subject, model)
        save(model, tmp_path / label / "pack", base=base)
        merge(base, [tmp_path / label / "pack"], tmp_path / label / "merged")
        before, after = (
            load_file(folder / "model.safetensors") for folder in (base, tmp_path / label / "merged")
        )
        pairs = factors(model)
        for name, kind in subject.tensors.items():
            delta = change(
                kind,
                *pairs[name if name in pairs else name.removesuffix(".weight")],
                tuple(before[name].shape),
            )
            right = before[name].double() + torch.tensor(delta)
            step = torch.finfo(torch.bfloat16).eps / 2 * right.abs() * (1 + 1e-4) + 1e-6
            assert bool(((after[name].double() - right).abs() <= step).all()), name


def test_compose_and_quantize_keep_the_kind(tmp_path: Path) -> None:
    """A composed pack of convolutions is one of them, and PEFT's; int8 tensors come back as matrices; a stack
    is refused by both.
    """
    for label in ("conv 2d", "GPT-2", "embedding", "attention"):
        subject = SUBJECTS[label]
        model = trained(subject, base_of(subject, torch.float32))
        pack = save(model, tmp_path / label / "pack")
        twice = compose([pack, pack.renamed("other")], weights=[0.5, 1.5], out=tmp_path / label / "composed")
        assert [one.site for one in twice.adapters()] == [one.site for one in pack.adapters()]
        assert validate(tmp_path / label / "composed").findings == ()
        found = outputs(attach(base_of(subject, torch.float32), twice, check_base=False), subject)
        attach(model, pack, "again", check_base=False)
        torch.testing.assert_close(
            found, outputs(active(model, ["a", "again"]), subject), rtol=1e-4, atol=1e-4
        )
        small = quantize(pack, tmp_path / label / "int8")
        assert small.manifest.quantization["relative_error"] < 0.02
        near = outputs(attach(base_of(subject, torch.float32), small, "small", check_base=False), subject)
        assert float((near - outputs(active(model, "a"), subject)).abs().max()) < 0.1
    stack = save(trained(SUBJECTS["experts"], base_of(SUBJECTS["experts"], torch.float32)), None, name="a")
    with pytest.raises(Unsupported, match="stack"):
        compose([stack, stack.renamed("other")])
    with pytest.raises(Unsupported, match="stack"):
        quantize(stack, tmp_path / "int8")


def test_columns_are_those_of_the_dense_matrix() -> None:
    """``columns(M, ids) == M.dense()[:, ids]`` for what can be looked up, in numpy and torch; an operator
    that cannot is an error.
    """
    rng = np.random.default_rng(0)
    wide, narrow = rng.normal(size=(3, 12)), rng.normal(size=(5, 3))
    numbers = np.array([[0, 11, 4], [4, 7, 1]])
    for operator in (
        Dense(wide),
        Kronecker(rng.normal(size=(2, 4)), rng.normal(size=(5, 3))),
        Chain(Dense(wide), Dense(narrow)),
    ):
        right = np.moveaxis(np.asarray(operator.dense())[:, numbers], 0, -1)
        np.testing.assert_allclose(columns(operator, numbers), right, atol=1e-14)
    there = columns(Dense(torch.tensor(wide)), torch.tensor(numbers))
    assert np.array_equal(there.numpy(), np.moveaxis(wide[:, numbers], 0, -1))
    with pytest.raises(Unsupported, match="looked up"):
        columns(Diagonal(wide[0]), numbers)


def test_an_embedding_is_seen_as_the_method_lists_it() -> None:
    """LoRA sees ``[width, vocabulary]``, trainable tokens a row for every token; the second way at one
    embedding is refused, and the model is as it was.
    """
    model, ids = Tokens(False).requires_grad_(False), torch.arange(5)[None]
    (seen,) = select(model, ("tokens",), get("lora").traits)
    assert (seen.kind, seen.out_features, seen.in_features) == ("embedding", 6, WORDS)
    (seen,) = select(model, ("tokens",), get("trainable_tokens").traits)
    assert (seen.kind, seen.out_features, seen.in_features) == ("table", WORDS, 6)
    lora, rows = LoRA(r=2, targets="tokens"), TrainableTokens(token_indices=(1, 2), targets="tokens")
    for first, second in ((lora, rows), (rows, lora)):
        adapt(model, first, "a")
        before, modules = model(ids), list(model.modules())
        with pytest.raises(Unsupported, match="in another way"):
            adapt(model, second, "b")
        assert torch.equal(model(ids), before)
        assert list(model.modules()) == modules
        detach(model)


def test_a_layout_turns_and_turns_back() -> None:
    """``from_matrix(to_matrix(W)) == W`` for every kind, and the matrix has the shape that ``matrix_shape``
    says.
    """
    shapes = {1: (3,), 2: (3, 5), 3: (4, 3, 5), 4: (4, 3, 2, 5), 5: (4, 3, 2, 5, 2)}
    for kind, layout in LAYOUTS.items():
        for axes in layout.axes:
            weight = np.random.default_rng(axes).normal(size=shapes[axes])
            matrix = to_matrix(kind, weight)
            assert matrix.shape[-2:] == matrix_shape(kind, weight.shape)
            assert np.array_equal(from_matrix(kind, matrix, weight.shape), weight)
        assert matrix_shape(kind, (3,) * 6) is None
    with pytest.raises(Unsupported, match="no layer is of this kind"):
        matrix_shape("linaer", (3, 5))


def test_the_fused_encoder_does_not_pass_the_adapter_by() -> None:
    """torch's own encoder layer reads attention's weights itself where it can: with an adapter in, it calls
    it.
    """
    model = base_of(
        Subject(
            lambda: nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)),
            floats(2, 3, 6),
            (),
            {},
        )
    )
    subject = Subject(lambda: model, floats(2, 3, 6), ("self_attn",), {})
    with torch.no_grad():
        plain = outputs(model, subject)
        trained(subject, model)
        assert (outputs(model, subject) - plain).abs().max() > 0.05
    with torch.no_grad():
        torch.testing.assert_close(
            outputs(active(model.eval(), None), subject), plain, rtol=1e-10, atol=1e-10
        )


def test_other_formats_take_the_kinds_that_they_have_or_say_so(tmp_path: Path) -> None:
    """PEFT's and ONNX Runtime's files hold transposed layers, PEFT's embeddings, convolutions and parameters,
    too; all else is refused by its kind.
    """
    takes = {
        "GPT-2": {"peft", "onnx_adapter"},
        "embedding": {"peft"},
        "conv 2d": {"peft"},
        "attention": {"peft"},
        "experts": {"peft"},
    }
    for label in ("GPT-2", "embedding", "conv 2d", "conv of groups", "attention", "experts"):
        subject = SUBJECTS[label]
        pack = save(trained(subject, base_of(subject, torch.float32)), tmp_path / label / "pack", name="a")
        for form in ("peft", "onnx_adapter", "kohya"):
            out = tmp_path / label / f"file.{form}"
            if form in takes.get(label, ()):
                convert(tmp_path / label / "pack", out, to=form)
                continue
            with pytest.raises(Unsupported) as error:
                convert(tmp_path / label / "pack", out, to=form)
            assert {group.kind for group in pack.manifest.groups} & set(
                str(error.value.found).replace(",", "").split()
            )
    back = load(tmp_path / "conv 2d" / "file.peft")
    assert [(one.site.path, one.site.kind, one.site.kernel) for one in back.adapters()] == [
        ("0", "conv", (3, 2)),
        ("2", "conv", (1, 1)),
    ]


@pytest.mark.parametrize(
    "label",
    [
        "attention",
        *(
            pytest.param(label, marks=pytest.mark.long)
            for label in ("embedding", "conv of groups", "experts")
        ),
    ],
)
def test_torch_compiles_it_whole(label: str) -> None:
    """Traced in one graph, forward and backward, the output and the gradients are those without, within 1e-6:
    gradients are float32.
    """
    subject = SUBJECTS[label]
    model = trained(subject, base_of(subject))
    torch._dynamo.reset()
    found = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        y = outputs(run, subject)
        y.square().sum().backward()
        found.append([y.detach(), *(value.grad for value in model.parameters() if value.requires_grad)])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def gpt2_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with an untied head, as a checkpoint."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40,
        n_embd=12,
        n_layer=1,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def exported(architecture: str, base: Path, targets: tuple[str, ...], out: Path, mode: str) -> Any:
    """A bundle of a random adapter; the export itself compares base and adapter with torch and fails where
    they differ.
    """
    import transformers

    model = getattr(transformers, architecture).from_pretrained(base)
    pack = save(trained(Subject(lambda: model, ids, targets, {}), model), out / "pack", base=base)
    return export(base, [pack], out / "bundle", mode=mode)


@pytest.mark.long
def test_a_bank_of_gpt2s_transposed_layers(gpt2_base: Path, tmp_path: Path) -> None:
    """Slots at every kind of GPT-2's linear layers, each row with its own adapter: within the export's own
    tolerance of torch.
    """
    bundle = exported(
        "GPT2Model", gpt2_base, ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"), tmp_path, "bank"
    )
    assert sorted(bundle.sites) == [
        f"h.0.{leaf}" for leaf in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert bundle.sites["h.0.mlp.c_fc"].in_features == 12
    assert bundle.parity["max_abs"]["pack"] < 1e-4


@pytest.mark.long
def test_an_embedding_in_a_graph(gpt2_base: Path, tmp_path: Path) -> None:
    """Folded and in a bank, the embedding and fused projections of a language model with a tied head: the
    graph agrees with torch.
    """
    for mode in ("folded", "bank"):
        bundle = exported("GPT2LMHeadModel", gpt2_base, ("wte", "c_attn"), tmp_path / mode, mode)
        assert bundle.parity["max_abs"]["pack"] < 1e-4
    assert {site.kind for site in bundle.sites.values()} == {"linear", "lookup"}
