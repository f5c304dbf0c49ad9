"""The relatives of LoRA beside PEFT itself: it loads ours, we load its, and both are the dense float64
formula written here.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from noise import shake
from peft.tuners.lokr.layer import factorization
from torch import nn

import adapterpack
from adapterpack import (
    DEFT,
    OSF,
    AdaLoRA,
    Bat,
    DeLoRA,
    DoRA,
    GraLoRA,
    HiRA,
    KaSA,
    LoHa,
    LoKr,
    MiSS,
    MiSSMini,
    MoRA,
    PaRa,
    PEANuT,
    SuperTuning,
)
from adapterpack.adapter_methods import BlockSums, Repeat, Site, complete, fold, get, run
from adapterpack.adapter_methods.core.operators import rows_of
from adapterpack.adapter_methods.lokr import split_width
from adapterpack.adapter_methods.registry import method_of
from adapterpack.pack import from_peft
from adapterpack.pack.pack import Pack

FP32 = 2e-5
"""Absolute: two float32 layers with outputs of about 1 to 10; sums of 12 products, and a row norm, round at
some 1e-6.
"""
Weights = Mapping[str, np.ndarray]
Dense = Callable[[Any, Weights, np.ndarray], np.ndarray]
"""config at the site, its tensors (float64), W ``[out, in]`` -> W'"""


class Row(NamedTuple):
    """One configuration, on both sides; ``widths`` are those of three layers in a row."""

    ours: Any
    theirs: Any
    dense: Dense
    widths: tuple[int, int, int, int] = (12, 7, 12, 5)


def dora(cfg: Any, t: Weights, W: np.ndarray) -> np.ndarray:
    turned = W + cfg.scale * t["lora_B"] @ t["lora_A"]
    return t["lora_magnitude_vector"][:, None] * turned / np.linalg.norm(turned, axis=1, keepdims=True)


def loha(cfg: Any, t: Weights, W: np.ndarray) -> np.ndarray:
    return W + cfg.scale * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])


def lokr(cfg: Any, t: Weights, W: np.ndarray) -> np.ndarray:
    first, second = (
        t[name] if name in t else t[f"{name}_a"] @ t[f"{name}_b"] for name in ("lokr_w1", "lokr_w2")
    )
    return W + cfg.scale * np.kron(first, second)


def hira(cfg: Any, t: Weights, W: np.ndarray) -> np.ndarray:
    return W + W * (t["hira_B"] @ t["hira_A"])


def gralora(cfg: Any, t: Weights, W: np.ndarray) -> np.ndarray:
    A, B = t["gralora_A"], t["gralora_B"]
    k, narrow, r = A.shape
    wide, each, changed = B.shape[2], r // k, W.copy()
    for i in range(k):
        for j in range(k):
            pair = A[j][:, i * each : (i + 1) * each] @ B[i][j * each : (j + 1) * each]
            changed[i * wide : (i + 1) * wide, j * narrow : (j + 1) * narrow] += cfg.scale * pair.T
    return changed + cfg.scale * t["gralora_B_general"] @ t["gralora_A_general"] if cfg.hybrid_r else changed


def miss(cfg: Any, t: Weights, W: np.ndarray) -> np.ndarray:
    M = t["miss_block"]
    return W + np.stack(
        [[M[j % M.shape[0], i % M.shape[1]] for j in range(W.shape[1])] for i in range(W.shape[0])]
    )


def bat(cfg: Any, t: Weights, W: np.ndarray) -> np.ndarray:
    r, changed = t["miss_block"].shape[1], W.copy()
    for i, M in enumerate(t["miss_block"]):
        for j in range(W.shape[1] // r):
            block = W[i * r : (i + 1) * r, j * r : (j + 1) * r]
            changed[i * r : (i + 1) * r, j * r : (j + 1) * r] += block @ M + M
    return changed


def delora(cfg: Any, t: Weights, W: np.ndarray) -> np.ndarray:
    A, B = t["delora_A"], t["delora_B"]
    share = t["delora_lambda"] / (cfg.r * np.linalg.norm(A, axis=1) * np.linalg.norm(B, axis=0))
    return W + B @ np.diag(share) @ A * np.linalg.norm(W, axis=0)


def kasa(cfg: Any, t: Weights, W: np.ndarray) -> np.ndarray:
    u, values, vt = np.linalg.svd(W)
    kept = len(values) - cfg.r
    return (
        u[:, :kept] @ np.diag(values[:kept]) @ vt[:kept]
        + cfg.scale * t["lora_B"] @ np.diag(t["lora_diag"]) @ t["lora_A"]
    )


def adalora(cfg: Any, t: Weights, W: np.ndarray) -> np.ndarray:
    return W + cfg.alpha / (cfg.init_r + 1e-5) * t["lora_B"] @ np.diag(t["lora_E"][:, 0]) @ t["lora_A"]


def deft(cfg: Any, t: Weights, W: np.ndarray) -> np.ndarray:
    Q = t["deft_P"] if cfg.decomposition_method == "relu" else np.linalg.qr(t["deft_P"])[0]
    Z = np.where(Q > 0, Q, 0) if cfg.decomposition_method == "relu" else Q
    return W - Q @ Z.T @ W + (cfg.alpha / cfg.r if cfg.alpha else 1) * Q @ t["deft_R"]


def para(cfg: Any, t: Weights, W: np.ndarray) -> np.ndarray:
    Q = t["deft_P"] if cfg.decomposition_method == "relu" else np.linalg.qr(t["deft_P"])[0]
    return W - Q @ (np.where(Q > 0, Q, 0) if cfg.decomposition_method == "relu" else Q).T @ W


_ACTS = {"relu": lambda h: np.maximum(h, 0), "silu": lambda h: h / (1 + np.exp(-h)), "identity": lambda h: h}


def peanut(cfg: Any, t: Weights, W: np.ndarray) -> np.ndarray:
    act, kept = _ACTS[cfg.act_fn], []
    h = act(W.T @ t["peanut_A"].T)
    for i in range(cfg.depth):
        kept.append(h)
        h = act(h @ t[f"peanut_encoder_{i}"].T)
    for i in range(cfg.depth):
        h = act(h @ t[f"peanut_decoder_{i}"].T) + kept[cfg.depth - 1 - i]
    return W + cfg.scaling * (h @ t["peanut_B"].T).T


def osf(cfg: Any, t: Weights, W: np.ndarray) -> np.ndarray:
    u, values, vt = np.linalg.svd(W, full_matrices=False)
    kept = len(values) - t["osf_U"].shape[1]
    return (u[:, :kept] * values[:kept]) @ vt[:kept] + t["osf_U"] @ np.diag(t["osf_S"]) @ t["osf_V"]


def supertuning(cfg: Any, t: Weights, W: np.ndarray) -> np.ndarray:
    flat = W.reshape(-1).copy()
    for place, value in zip(t["supertuning_indices"], t["supertuning_values"], strict=True):
        flat[place] += value
    changed = flat.reshape(W.shape)
    return (
        changed
        if cfg.r is None
        else changed + cfg.alpha / cfg.r * t["supertuning_lora_B"] @ t["supertuning_lora_A"]
    )


EVEN = (12, 8, 12, 4)
TABLE: dict[str, Row] = {
    "DoRA": Row(DoRA(r=3, alpha=5), peft.LoraConfig(r=3, lora_alpha=5, use_dora=True), dora),
    "DoRA, rsLoRA, a rank of its own": Row(
        DoRA(r=3, alpha=5, use_rslora=True, rank_pattern={"b": 2}),
        peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, use_rslora=True, rank_pattern={"b": 2}),
        dora,
    ),
    "LoHa by factors": Row(LoHa(r=2, alpha=3), peft.LoHaConfig(r=2, alpha=3), loha),
    "LoHa dense, a rank and an alpha of its own": Row(
        LoHa(r=3, alpha=5, rank_pattern={"b": 4}, alpha_pattern={"a": 2}),
        peft.LoHaConfig(r=3, alpha=5, rank_pattern={"b": 4}, alpha_pattern={"a": 2}, rank_dropout=0.2),
        loha,
    ),
    "LoKr whole": Row(LoKr(r=8, alpha=5), peft.LoKrConfig(r=8, alpha=5), lokr),
    "LoKr with w2 in two": Row(
        LoKr(r=1, alpha=2), peft.LoKrConfig(r=1, alpha=2, init_weights="lycoris"), lokr
    ),
    "LoKr with both in two": Row(
        LoKr(r=1, alpha=2, decompose_both=True, decompose_factor=4),
        peft.LoKrConfig(r=1, alpha=2, decompose_both=True, decompose_factor=4, init_weights="lycoris"),
        lokr,
        EVEN,
    ),
    "LoKr where rank and half a side are equal": Row(
        LoKr(r=2, alpha=2), peft.LoKrConfig(r=2, alpha=2), lokr, EVEN
    ),
    "LoKr with a rank of its own": Row(
        LoKr(r=1, alpha=2, decompose_factor=3, rank_pattern={"a": 3}),
        peft.LoKrConfig(r=1, alpha=2, decompose_factor=3, rank_pattern={"a": 3}),
        lokr,
    ),
    "HiRA": Row(HiRA(r=3), peft.HiraConfig(r=3, rank_pattern={"c": 2}), hira),
    "GraLoRA": Row(GraLoRA(r=6, alpha=5), peft.GraloraConfig(r=6, alpha=5), gralora, EVEN),
    "GraLoRA hybrid": Row(
        GraLoRA(r=4, k=4, alpha=5, hybrid_r=3),
        peft.GraloraConfig(r=4, gralora_k=4, alpha=5, hybrid_r=3),
        gralora,
        EVEN,
    ),
    "DeLoRA": Row(
        DeLoRA(r=3, bound=4, rank_pattern={"b": 2}, bound_pattern={"a": 7}),
        peft.DeloraConfig(r=3, delora_lambda=4, rank_pattern={"b": 2}, lambda_pattern={"a": 7}),
        delora,
    ),
    "KaSA": Row(KaSA(r=3, alpha=5), peft.LoraConfig(r=3, lora_alpha=5, kasa_config=peft.KasaConfig()), kasa),
    "AdaLoRA": Row(
        AdaLoRA(init_r=5, target_r=2, alpha=4),
        peft.AdaLoraConfig(init_r=5, target_r=2, lora_alpha=4, total_step=10),
        adalora,
    ),
    "DEFT": Row(DEFT(r=3), peft.DeftConfig(r=3), deft),
    "DEFT by QR": Row(
        DEFT(r=3, alpha=2, decomposition_method="qr"),
        peft.DeftConfig(r=3, alpha=2, decomposition_method="qr"),
        deft,
    ),
    "PaRa": Row(PaRa(r=3), peft.DeftConfig(r=3, para=True), para),
    "PaRa by QR": Row(
        PaRa(r=2, decomposition_method="qr"), peft.DeftConfig(r=2, para=True, decomposition_method="qr"), para
    ),
    "PEANuT": Row(PEANuT(r=3), peft.PeanutConfig(r=3), peanut),
    "PEANuT, deep": Row(
        PEANuT(r=4, depth=2, act_fn="swish", scaling=0.5),
        peft.PeanutConfig(r=4, depth=2, act_fn="silu", scaling=0.5),
        peanut,
    ),
    "PEANuT, linear": Row(
        PEANuT(r=2, depth=1, act_fn="identity"), peft.PeanutConfig(r=2, depth=1, act_fn="linear"), peanut
    ),
    "OSF": Row(OSF(effective_rank=3), peft.OSFConfig(effective_rank=3), osf),
    "OSF, a share, a rank of its own": Row(
        OSF(effective_rank=0.6, rank_pattern={"b": 2}),
        peft.OSFConfig(effective_rank=0.6, rank_pattern={"[bB]": 2}),
        osf,
    ),
    "Super-Tuning": Row(SuperTuning(sparsity=0.7), peft.SupertuningConfig(sparsity=0.7), supertuning),
    "Supra": Row(
        SuperTuning(sparsity=0.8, select_top=False, r=3, alpha=5),
        peft.SupertuningConfig(sparsity=0.8, select_top=False, r=3, lora_alpha=5),
        supertuning,
    ),
    "MiSS": Row(MiSS(r=5), peft.MissConfig(r=5), miss),
    "MiSS mini": Row(
        MiSSMini(r=3, mini_r=4), peft.MissConfig(r=3, mini_r=4, init_weights="mini"), miss, EVEN
    ),
    "Bat": Row(Bat(r=4), peft.MissConfig(r=4, init_weights="bat"), bat, EVEN),
}
ROWS = pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)


class Three(nn.Module):
    """Three linear layers, the second without a bias."""

    def __init__(self, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        torch.manual_seed(3)
        first, second, third, fourth = widths
        self.a, self.b, self.c = (
            nn.Linear(first, second),
            nn.Linear(second, third, bias=False),
            nn.Linear(third, fourth),
        )

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(input_ids)))))


def outputs(model: nn.Module) -> np.ndarray:
    """What the model makes of two fixed rows."""
    first = next(module for module in model.modules() if isinstance(module, nn.Linear))
    x = torch.randn(2, 3, first.in_features, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return model.eval()(x.to(first.weight.dtype)).double().numpy()


randomise = partial(shake, size=0.3, seed=5)


def densified(row: Row, pack: Pack) -> nn.Module:
    """The base in float64 with the formula written into its weights."""
    model = Three(row.widths).double()
    with torch.no_grad():
        for adapter in pack.adapters():
            layer = model.get_submodule(adapter.site.path)
            tensors = {
                name: np.asarray(value, np.float64) if value.dtype.kind == "f" else value
                for name, value in adapter.params.items()
            }
            layer.weight.copy_(torch.tensor(row.dense(adapter.config, tensors, layer.weight.numpy())))
    return model


def folded(row: Row, pack: Pack) -> dict[str, np.ndarray]:
    """Our merged weights."""
    model, result = Three(row.widths), {}
    for adapter in pack.adapters():
        layer = model.get_submodule(adapter.site.path)
        weight, bias = (
            layer.weight.detach().numpy(),
            None if layer.bias is None else layer.bias.detach().numpy(),
        )
        site = dataclasses.replace(adapter.site, out_features=weight.shape[0], in_features=weight.shape[1])
        if pack.method.traits.reads_weight:
            site = dataclasses.replace(site, weight=weight, base_bias=bias)
        params = complete(pack.method, adapter.config, adapter.wide, site)
        result[f"{site.path}.weight"], new = fold(pack.method, adapter.config, params, site, weight, bias)
        if new is not None:
            result[f"{site.path}.bias"] = new
    return result


def require_same(row: Row, pack: Pack, ours: nn.Module, theirs: peft.PeftModel) -> None:
    """Both models, both merges and the dense formula agree, and the adapter does something."""
    dense = densified(row, pack)
    expected = outputs(dense)
    assert np.abs(expected - outputs(Three(row.widths).double())).max() > 0.05
    np.testing.assert_allclose(outputs(ours), expected, rtol=0, atol=FP32)
    np.testing.assert_allclose(outputs(theirs), expected, rtol=0, atol=FP32)
    merged = theirs.merge_and_unload().state_dict()
    for name, value in folded(row, pack).items():
        np.testing.assert_allclose(value, merged[name].numpy(), rtol=0, atol=FP32, err_msg=name)
        np.testing.assert_allclose(value, dense.state_dict()[name].numpy(), rtol=0, atol=FP32, err_msg=name)


@ROWS
def test_peft_loads_our_pack(row: Row, tmp_path: Path) -> None:
    """PEFT(base, our folder) == ours == dense float64, forward and merged, within 2e-5; no key is missing or
    left over.
    """
    ours = adapterpack.adapt(Three(row.widths), row.ours, "ours", seed=6)
    randomise(ours)
    pack = adapterpack.save(ours, tmp_path / "ours")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(Three(row.widths), tmp_path / "ours")
    assert not [str(warning.message) for warning in said if "key" in str(warning.message)]
    require_same(row, pack, ours, theirs)


@ROWS
def test_we_load_what_peft_wrote(row: Row, tmp_path: Path) -> None:
    """The other way: PEFT's folder, read here, gives PEFT's outputs and merged weights."""
    config = copy.deepcopy(row.theirs)
    config.target_modules = {"a", "b", "c"}
    theirs = peft.get_peft_model(Three(row.widths), config)
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    pack = from_peft.read(tmp_path / "theirs")
    assert pack.method is method_of(row.ours)
    ours = adapterpack.attach(Three(row.widths), pack, check_base=False)
    require_same(row, pack, ours, theirs)


@ROWS
def test_a_pack_is_hardly_larger_than_what_was_trained(row: Row, tmp_path: Path) -> None:
    """Stored tensors take at most 1.05 times the bytes of the trained parameters, at widths as real models
    have them.
    """
    site = Site("layer", 1024, 1024)
    shapes = method_of(row.ours).shapes(type(row.ours)(), site)
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    frozen = method_of(row.ours).traits.frozen
    assert sum(sizes.values()) <= 1.05 * sum(size for name, size in sizes.items() if name not in frozen)


IDENTITIES = {name: row for name, row in TABLE.items() if method_of(row.ours).traits.identity_at_init}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", IDENTITIES.values(), ids=IDENTITIES)
def test_a_fresh_adapter_in_a_model_is_the_base(row: Row, dtype: torch.dtype) -> None:
    """Under torch, in every precision, bit for bit; DoRA's magnitudes and the norms that divide them are the
    same numbers.
    """
    fresh = adapterpack.adapt(Three(row.widths).to(dtype), row.ours)
    np.testing.assert_array_equal(outputs(fresh), outputs(Three(row.widths).to(dtype)))


@pytest.mark.parametrize("how", ["relu", "qr"])
def test_a_fresh_deft_is_the_base_but_by_rounding(how: str) -> None:
    """R begins as Z^T W, which the adapter takes out again: within 1e-6 in float32."""
    fresh = adapterpack.adapt(Three(EVEN), DEFT(r=3, alpha=2, decomposition_method=how))
    np.testing.assert_allclose(outputs(fresh), outputs(Three(EVEN)), rtol=0, atol=1e-6)


def test_widths_are_divided_as_in_peft() -> None:
    """The two sides of a Kronecker product, for every width to 200 and factors of all kinds."""
    for width in range(1, 201):
        for factor in (-1, 1, 2, 3, 4, 8, 16, 50, 199, 300):
            assert split_width(width, factor) == factorization(width, factor), (width, factor)


def test_bone_is_read_as_miss(tmp_path: Path) -> None:
    """A folder of the time when MiSS was called Bone, its tensors `bone_block`: the same adapter."""
    row = TABLE["MiSS"]
    ours = adapterpack.adapt(Three(row.widths), row.ours, "ours")
    randomise(ours)
    pack = adapterpack.save(ours, tmp_path / "ours")
    (tmp_path / "bone").mkdir()
    config = {**json.loads((tmp_path / "ours" / "adapter_config.json").read_text()), "peft_type": "BONE"}
    (tmp_path / "bone" / "adapter_config.json").write_text(json.dumps(config))
    tensors = safetensors.numpy.load_file(tmp_path / "ours" / "adapter_model.safetensors")
    safetensors.numpy.save_file(
        {name.replace("miss", "bone"): value for name, value in tensors.items()},
        tmp_path / "bone" / "adapter_model.safetensors",
    )
    read = from_peft.read(tmp_path / "bone")
    assert read.method.name == "miss"
    np.testing.assert_array_equal(
        outputs(adapterpack.attach(Three(row.widths), read, check_base=False)), outputs(ours)
    )
    assert pack.tensors.keys() == read.tensors.keys()


def test_doras_gradient_is_pefts(tmp_path: Path) -> None:
    """The norm is a constant to the gradient on both sides: gradients of A, B and m agree within 1e-5, from
    the same tensors.
    """
    row = TABLE["DoRA"]
    theirs = peft.get_peft_model(
        Three(row.widths), peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["a", "b", "c"])
    )
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = adapterpack.attach(Three(row.widths), from_peft.read(tmp_path / "theirs"), check_base=False)
    x = torch.randn(4, row.widths[0], generator=torch.Generator().manual_seed(7))
    for layer in (ours.a, ours.b, ours.c):
        layer._trainable(layer._names[0])
    for model in (ours, theirs):
        model(x).square().sum().backward()
    for path in "abc":
        own = dict(getattr(ours, path)._part(getattr(ours, path)._names[0]).named_parameters())
        layer = theirs.base_model.model.get_submodule(path)
        for name, other in (
            ("lora_A", layer.lora_A["default"].weight),
            ("lora_B", layer.lora_B["default"].weight),
            ("lora_magnitude_vector", layer.lora_magnitude_vector["default"].weight),
        ):
            np.testing.assert_allclose(
                own[name].grad.numpy(), other.grad.numpy(), rtol=1e-4, atol=1e-5, err_msg=f"{path}.{name}"
            )


def rotated(n: int, block: int) -> np.ndarray:
    """The rotary matrix of one block, entry by entry: pairs (i, i + n/2) turned by block * 10000^(-2i/n)."""
    turn, half = np.zeros((n, n)), n // 2
    for i in range(half):
        angle = block * 10000.0 ** (-2 * i / n)
        turn[i, i] = turn[i + half, i + half] = np.cos(angle)
        turn[i, i + half], turn[i + half, i] = -np.sin(angle), np.sin(angle)
    return turn


@pytest.mark.parametrize("widths", [(12, 7), (7, 12), (5, 1), (1, 5), (30, 8)], ids=str)
@pytest.mark.parametrize("form", ["rope", "sharing"])
def test_mora_is_its_formula(form: str, widths: tuple[int, int]) -> None:
    """PEFT has no MoRA: forward and fold against the paper's equations 6 and 9, entry by entry in float64,
    within 1e-12.
    """
    out, width = widths
    rng, method, cfg = np.random.default_rng(8), get("mora"), MoRA(r=1, form=form)
    site = Site("layer", width, out)
    ((n, _),) = method.shapes(cfg, site).values()
    M, x = rng.normal(size=(n, n)), rng.normal(size=(3, width))
    blocks = -(-width // n)
    padded = np.stack([x[:, j % width] for j in range(blocks * n)], axis=1)
    parts = [padded[:, b * n : (b + 1) * n] for b in range(blocks)]
    turned = [part @ rotated(n, b).T @ M.T for b, part in enumerate(parts)]
    inner = np.concatenate(turned, axis=1) if form == "rope" else sum(parts) @ M.T
    expected = np.stack([inner[:, o % inner.shape[1]] for o in range(out)], axis=1)
    constants = {
        name: value.astype(np.float64) for name, value in method.storage.constants(cfg, site).items()
    }
    if form == "rope":  # constants are stored as float32, which is not what is tested here
        angles = np.outer(np.arange(blocks), 10000.0 ** (-np.arange(0, n, 2) / n))
        for name, function in (("cos", np.cos), ("sin", np.sin)):
            np.testing.assert_allclose(constants[name], np.tile(function(angles), (1, 2)), rtol=0, atol=1e-7)
            constants[name] = np.tile(function(angles), (1, 2))
    params = {"mora_M": M, **constants}
    np.testing.assert_allclose(
        run(method, cfg, params, site, lambda x: np.zeros((3, out)), x), expected, rtol=0, atol=1e-12
    )
    changed, _ = fold(method, cfg, params, site, np.zeros((out, width)), None)
    np.testing.assert_allclose(x @ changed.T, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("width", "length"), [(5, 13), (5, 15), (5, 3), (1, 4), (4, 4)])
def test_repeat_and_its_transpose_agree_with_their_matrices(width: int, length: int) -> None:
    """apply, rows and after are what the dense matrix does, whose entry [k, j] is one where j = k mod
    width.
    """
    rng = np.random.default_rng(9)
    matrix = np.array([[float(k % width == j) for j in range(width)] for k in range(length)])
    for operator, dense in (
        (Repeat(width, length, np.zeros(1)), matrix),
        (BlockSums(length, width, np.zeros(1)), matrix.T),
    ):
        x, weight = rng.normal(size=(2, 3, dense.shape[1])), rng.normal(size=(4, dense.shape[0]))
        np.testing.assert_array_equal(operator.dense(), dense)
        np.testing.assert_array_equal(rows_of(operator, slice(1, 3)), dense[1:3])
        np.testing.assert_allclose(operator.apply(x), x @ dense.T, rtol=0, atol=1e-14)
        np.testing.assert_allclose(operator.after(weight), weight @ dense, rtol=0, atol=1e-14)
