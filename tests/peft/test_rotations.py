"""The methods that scale, rotate or select, against the real PEFT in both directions and against their
formulas in float64.

Models are in float64 and adapters are the float32 numbers that files hold, so that what is left is the
rounding of two orders of the same sums: 1e-12 beside the dense formulas. PEFT computes some parts in float32,
where a row of the table says so.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
from msgspec.structs import replace
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from adapterpack import (
    BEFT,
    BOFT,
    HRA,
    IA3,
    OFT,
    PSOFT,
    LNTuning,
    RoAd,
    Session,
    TrainableTokens,
    adapt,
    attach,
    detach,
    export,
    merge,
    save,
)
from adapterpack.adapter_methods import PairRotation, Permutation, complete, fold
from adapterpack.adapter_methods.core.operators import rows_of
from adapterpack.errors import AdapterpackError, Unsupported
from adapterpack.manifest.manifest import Base
from adapterpack.pack import from_peft
from adapterpack.slots.values import pack_values
from adapterpack.torch_adapters.layers.active import active
from adapterpack.torch_adapters.layers.layer import Adapted
from adapterpack.torch_adapters.layers.sites import is_norm

pytestmark = pytest.mark.fast

Tensors = dict[str, np.ndarray]
Dense = Callable[[Tensors, np.ndarray, np.ndarray | None], tuple[np.ndarray, np.ndarray | None]]


class Net(nn.Module):
    """A wide layer with a bias, a tall one without, and one of an even number of outputs with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(12, 7)
        self.tall = nn.Linear(7, 12, bias=False)
        self.last = nn.Linear(12, 8)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.tall(torch.tanh(self.wide(x)))))


class Row(NamedTuple):
    """One configuration in our words and in PEFT's, and its formula: a layer's tensors by PEFT's names, its W
    and b -> the new W and b.
    """

    ours: Any
    theirs: peft.PeftConfig
    dense: Dense
    tolerance: float = 1e-9


def ia3_dense(t: Tensors, W: np.ndarray, b: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """y = l (W x + b), or W (l x) + b: told by the shape of l."""
    if t["ia3_l"].shape[1] == 1:
        return t["ia3_l"] * W, None if b is None else t["ia3_l"][:, 0] * b
    return W * t["ia3_l"], b


def blocks_of(
    values: np.ndarray, width: int, exact: bool, terms: int = 5, bound: float | None = None
) -> np.ndarray:
    """The block-diagonal matrix [width, width] of OFT from upper triangles [r, b (b - 1) / 2], one row for
    all blocks or one each.
    """
    size = int((1 + np.sqrt(1 + 8 * values.shape[1])) / 2)
    total = np.zeros((width, width))
    for number in range(width // size):
        Q = np.zeros((size, size))
        Q[np.triu_indices(size, 1)] = values[min(number, len(values) - 1)]
        Q = Q - Q.T
        if bound is not None:
            Q *= min(1, bound / np.sqrt(len(values)) / np.linalg.norm(Q))
        powers = [np.linalg.matrix_power(-Q, k) for k in range(terms)]
        series = powers[0] + 2 * sum(powers[1:-1]) + powers[-1]
        block = slice(number * size, number * size + size)
        total[block, block] = (np.eye(size) + Q) @ np.linalg.inv(np.eye(size) - Q) if exact else series
    return total


def oft_dense(exact: bool, bound: float | None = None) -> Dense:
    """W' = W R."""
    return lambda t, W, b: (W @ blocks_of(t["oft_R.weight"], W.shape[1], exact, bound=bound), b)


def boft_dense(t: Tensors, W: np.ndarray, b: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """W' = diag(s) W B_1 ... B_m: section 4 of the paper, with the permutations as matrices."""
    factors, blocks, size, _ = t["boft_R"].shape
    width = blocks * size
    R = np.eye(width)
    for factor in range(factors):
        D = np.zeros((width, width))
        for number, A in enumerate(t["boft_R"][factor]):
            S, one, block = (A - A.T) / 2, np.eye(size), slice(number * size, number * size + size)
            D[block, block] = np.linalg.inv(one - S) @ (one + S)
        P = np.eye(width)
        # halves of blocks, the even ones before the odd ones, within groups of 2^factor blocks
        if factors > 1:
            group, half = size * 2**factor, size // 2
            order = [
                start + half * unit + k
                for start in range(0, width, group)
                for parity in (0, 1)
                for unit in range(parity, group // half, 2)
                for k in range(half)
            ]
            P = np.eye(width)[order]
        R = R @ P @ D @ P.T
    return t["boft_s"] * (W @ R), b


def hra_dense(apply_gs: bool) -> Dense:
    """W' = W H_1 ... H_r with u_i as they are, or made orthogonal to those before by Gram and Schmidt."""

    def dense(t: Tensors, W: np.ndarray, b: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        known: list[np.ndarray] = []
        for u in t["hra_u"].T:
            for before in known if apply_gs else ():
                u = u - (before @ u) * before  # noqa: PLW2901
            known.append(u / np.linalg.norm(u))
            W = W - 2 * (W @ known[-1])[:, None] * known[-1]
        return W, b

    return dense


def road_dense(variant: str, group: int) -> Dense:
    """W' = R W, b' = R b, with R written out entry by entry: equation 4 of the paper, and figure 2 for the
    variants.
    """

    def dense(t: Tensors, W: np.ndarray, b: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        R, half = np.zeros((len(W), len(W))), group // 2
        for i in range(len(W)):
            start, place = i - i % group, i % group
            mate = start + (place + half) % group
            at = {
                "road_1": (start // 2 + place % half,) * 2,
                "road_2": (i, i),
                "road_4": (2 * start + place, 2 * start + group + place),
            }[variant]
            R[i, i] = t["road_alpha"][at[0]] * np.cos(t["road_theta"][at[0]])
            R[i, mate] = (-1 if place < half else 1) * t["road_alpha"][at[1]] * np.sin(t["road_theta"][at[1]])
        return R @ W, None if b is None else R @ b

    return dense


BOTH = ["wide", "tall"]
ROWS = {
    "ia3": Row(
        IA3(targets=("wide", "tall")), peft.IA3Config(target_modules=BOTH, feedforward_modules=[]), ia3_dense
    ),
    "ia3-feedforward": Row(
        IA3(targets=("wide", "tall"), feedforward=("tall",)),
        peft.IA3Config(target_modules=BOTH, feedforward_modules=["tall"]),
        ia3_dense,
    ),
    "oft": Row(
        OFT(targets=("wide", "tall"), block_size=7),
        peft.OFTConfig(target_modules=BOTH, oft_block_size=7, use_cayley_neumann=False),
        oft_dense(True),
        1e-6,
    ),  # PEFT's identity matrix is in float32
    "oft-blocks": Row(
        OFT(targets="wide", r=4),
        peft.OFTConfig(target_modules=["wide"], r=4, oft_block_size=0, use_cayley_neumann=False),
        oft_dense(True),
        1e-6,
    ),
    "oft-neumann": Row(
        OFT(targets=("wide", "tall"), block_size=8, use_cayley_neumann=True),
        peft.OFTConfig(target_modules=BOTH, oft_block_size=8),
        oft_dense(False),
    ),
    "oft-shared": Row(
        OFT(targets="wide", block_size=3, block_share=True),
        peft.OFTConfig(target_modules=["wide"], oft_block_size=3, block_share=True, use_cayley_neumann=False),
        oft_dense(True),
        1e-6,
    ),
    "coft": Row(
        OFT(targets="wide", block_size=4, coft=True, eps=0.3),
        peft.OFTConfig(
            target_modules=["wide"], oft_block_size=4, coft=True, eps=0.3, use_cayley_neumann=False
        ),
        oft_dense(True, 0.3),
        1e-6,
    ),
    "boft": Row(
        BOFT(targets="wide", block_size=3),
        peft.BOFTConfig(target_modules=["wide"], boft_block_size=3),
        boft_dense,
        1e-6,
    ),
    "boft-blocks": Row(
        BOFT(targets=("wide", "tall"), block_size=0, block_num=1),
        peft.BOFTConfig(target_modules=BOTH, boft_block_size=0, boft_block_num=1),
        boft_dense,
        1e-6,
    ),
    "hra": Row(
        HRA(targets=("wide", "tall"), r=4), peft.HRAConfig(target_modules=BOTH, r=4), hra_dense(False), 1e-6
    ),
    "hra-odd": Row(
        HRA(targets=("wide", "tall"), r=3), peft.HRAConfig(target_modules=BOTH, r=3), hra_dense(False), 1e-6
    ),
    "hra-gs": Row(
        HRA(targets=("wide", "tall"), r=5, apply_gs=True),
        peft.HRAConfig(target_modules=BOTH, r=5, apply_GS=True),
        hra_dense(True),
        1e-6,
    ),
    "beft": Row(
        BEFT(targets=("wide", "last")),
        peft.BeftConfig(target_modules=["wide", "last"]),
        lambda t, W, b: (W, t["beft_bias"][0] + b),
    ),
    **{
        variant: Row(
            RoAd(targets=("tall", "last"), variant=variant, group_size=4),
            peft.RoadConfig(target_modules=["tall", "last"], variant=variant, group_size=4),
            road_dense(variant, 4),
        )
        for variant in ("road_1", "road_2", "road_4")
    },
}


@pytest.fixture
def net() -> Net:
    torch.manual_seed(1)
    return Net()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def shaken(model: nn.Module) -> nn.Module:
    """Every trained parameter moved by noise, to numbers that float32 holds."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_((parameter + 0.3 * torch.randn(parameter.shape, generator=generator)).float())
    return model.eval()


def merged_by_us(model: nn.Module) -> dict[str, np.ndarray]:
    """Weight and bias of every adapted layer with its adapter folded in, in float64."""
    result = {}
    for path, layer in model.named_modules():
        if isinstance(layer, Adapted):
            (name,) = layer._names
            method, cfg = layer._held[name].method, layer._held[name].config
            weight, bias = (
                layer.weight.detach().double().numpy(),
                None if layer.bias is None else layer.bias.detach().double().numpy(),
            )
            site = (
                dataclasses.replace(layer._site, weight=weight, base_bias=bias)
                if method.traits.reads_weight
                else layer._site
            )
            given = {key: value.astype(np.float64) for key, value in layer._params(name).items()}
            params = complete(
                method,
                cfg,
                {**{k: v.detach().numpy() for k, v in layer._shared(name).items()}, **given},
                site,
            )
            result[f"{path}.weight"], new = fold(method, cfg, params, site, weight, bias)
            if new is not None:
                result[f"{path}.bias"] = new
    return result


def by_site(folder: Path) -> dict[str, Tensors]:
    """The tensors of an adapter file in float64: module path -> what follows it in the name -> value."""
    sites: dict[str, Tensors] = {}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        path, _, rest = name.removeprefix("base_model.model.").partition(".")
        sites.setdefault(path, {})[rest] = value.astype(np.float64)
    return sites


def dense_of(row: Row, net: Net, folder: Path) -> dict[str, np.ndarray]:
    """The changed weights by the formula, from the tensors of a file."""
    result = {}
    for path, tensors in by_site(folder).items():
        layer = net.get_submodule(path)
        weight, bias = (
            layer.weight.detach().double().numpy(),
            None if layer.bias is None else layer.bias.detach().double().numpy(),
        )
        result[f"{path}.weight"], new = row.dense(tensors, weight, bias)
        if new is not None:
            result[f"{path}.bias"] = new
    return result


def with_weights(net: Net, weights: dict[str, np.ndarray], x: torch.Tensor) -> np.ndarray:
    """The net's output in float64 with these weights and biases (a bias where there was none, too)."""
    net = net.double()
    for name, value in weights.items():
        path, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(path), leaf, nn.Parameter(torch.tensor(value)))
    return net(x.double()).detach().numpy()


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ROWS)
def test_our_folder_in_peft_and_the_formula(name: str, net: Net, x: torch.Tensor, tmp_path: Path) -> None:
    """What we train gives in PEFT what it gives here, and both give the formula; merged weights too."""
    row = ROWS[name]
    ours = shaken(adapt(copy.deepcopy(net), row.ours))
    save(ours, tmp_path / "pack")
    expected = with_weights(copy.deepcopy(net), dense_of(row, net, tmp_path / "pack"), x)
    assert np.abs(expected - net(x).detach().numpy()).max() > 1e-2
    assert_close(ours(x).detach(), expected, 1e-12)
    for key, value in dense_of(row, net, tmp_path / "pack").items():
        assert_close(merged_by_us(ours)[key], value, 1e-12)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / "pack")).base_model.eval()
    assert_close(theirs(x).detach(), expected, row.tolerance)
    assert_close(ours(x).detach(), theirs(x).detach(), row.tolerance)


@pytest.mark.parametrize("name", ROWS)
def test_their_folder_here(name: str, net: Net, x: torch.Tensor, tmp_path: Path) -> None:
    """What PEFT trains and saves gives here what it gives there, forward and merged."""
    row = ROWS[name]
    theirs = shaken(peft.get_peft_model(copy.deepcopy(net), copy.deepcopy(row.theirs)))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    pack = from_peft.read(tmp_path / "theirs")
    ours = attach(copy.deepcopy(net), pack, check_base=False).eval()
    assert_close(ours(x).detach(), theirs(x).detach(), row.tolerance)
    assert_close(
        ours(x).detach(), with_weights(copy.deepcopy(net), dense_of(row, net, tmp_path / "theirs"), x), 1e-12
    )
    merged = {key: value.detach().numpy() for key, value in theirs.merge_and_unload().state_dict().items()}
    for key, value in merged_by_us(ours).items():
        if key in merged:
            assert_close(value, merged[key], row.tolerance)
    active(ours, None)
    assert torch.equal(ours(x), net(x))


def test_ia3_modules_whose_names_end_alike_load_in_peft(tmp_path: Path) -> None:
    """PEFT takes "0" for the end of "10", too: the list of feedforward modules is then written so that it
    matches whole paths.
    """
    torch.manual_seed(4)
    net = nn.Sequential(*(nn.Linear(6, 6) for _ in range(11))).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    ours = shaken(adapt(copy.deepcopy(net), IA3(feedforward=("0",))))
    pack = save(ours, tmp_path / "pack")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / "pack")).base_model.eval()
    assert_close(ours(x).detach(), theirs(x).detach(), 1e-9)
    again = from_peft.read(tmp_path / "pack")
    assert [adapter.config.feedforward for adapter in again.adapters()] == [
        a.site.path == "0" for a in again.adapters()
    ]
    assert len(list(again.adapters())) == len(list(pack.adapters())) == 11


class TorchBlockDiag:
    """What PEFT's CUDA extension for BOFT does, [m, blocks, b, b] to [m, n, n], by torch: that extension
    cannot be compiled here.
    """

    @staticmethod
    def apply(blocks: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


@pytest.mark.parametrize(("size", "factors"), [(2, 2), (4, 2), (2, 3)])
def test_a_butterfly_of_several_factors(
    size: int, factors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several factors PEFT needs its extension; with torch's block_diag in its place it gives what we
    give, both ways.
    """
    from peft.tuners.boft import layer

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", TorchBlockDiag)
    torch.manual_seed(5)
    net, x = nn.Sequential(nn.Linear(16, 5)).double(), torch.randn(3, 16, dtype=torch.float64)
    config = BOFT(block_size=size, n_butterfly_factor=factors)
    ours = shaken(adapt(copy.deepcopy(net), config))
    save(ours, tmp_path / "pack")
    weight, bias = boft_dense(
        by_site(tmp_path / "pack")["0"], net[0].weight.detach().numpy(), net[0].bias.detach().numpy()
    )
    assert_close(ours(x).detach(), x.numpy() @ weight.T + bias, 1e-12)
    assert_close(merged_by_us(ours)["0.weight"], weight, 1e-12)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / "pack")).base_model.eval()
    assert_close(theirs(x).detach(), ours(x).detach(), 1e-6)
    again = attach(copy.deepcopy(net), from_peft.read(tmp_path / "pack"), check_base=False)
    assert torch.equal(again(x), ours(x))


def test_boft_files_whose_tensors_are_fewer_than_their_config_says(
    net: Net, x: torch.Tensor, tmp_path: Path
) -> None:
    """Without its extension PEFT trains one factor and writes the number that was asked for: it is read as
    what was trained.
    """
    config = peft.BOFTConfig(target_modules=["wide"], boft_block_size=2, boft_n_butterfly_factor=2)
    theirs = shaken(peft.get_peft_model(copy.deepcopy(net).float(), config)).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    pack = from_peft.read(tmp_path / "theirs")
    assert {pack.config_at(group).n_butterfly_factor for group in pack.manifest.groups} == {1}
    ours = attach(copy.deepcopy(net).float(), pack)
    assert_close(ours(x.float()).detach(), theirs(x.float()).detach(), 1e-5)


@pytest.mark.parametrize("r", [2, 8, 12])
def test_a_fresh_hra_adapter_of_even_rank_is_exactly_the_base(r: int, net: Net, x: torch.Tensor) -> None:
    """Pairs of equal vectors cancel bit for bit, in float64 and in float32."""
    for dtype in (torch.float64, torch.float32):
        plain = copy.deepcopy(net).to(dtype)
        assert torch.equal(adapt(copy.deepcopy(plain), HRA(r=r))(x.to(dtype)), plain(x.to(dtype)))


@pytest.mark.parametrize(
    "config", [OFT(block_size=4), BOFT(block_size=2, n_butterfly_factor=2), HRA(r=5), HRA(r=4, apply_gs=True)]
)
def test_rotations_are_orthogonal(config: Any, net: Net) -> None:
    """M M^T = I within rounding, for what acts on the inputs after training."""
    ours = shaken(adapt(net, type(config)(**{**vars(config), "targets": "wide"})))
    layer = ours.get_submodule("wide")
    method, cfg = layer._held["default"].method, layer._held["default"].config
    tensors = {
        key: value.double() if value.is_floating_point() else value
        for key, value in layer._every("default").items()
    }
    form = method.normal_form(cfg, tensors, layer._site)
    matrix = form.pre.apply(torch.eye(12, dtype=torch.float64)).T
    assert_close((matrix @ matrix.T).detach(), np.eye(12), 1e-12)
    assert np.abs(matrix.detach().numpy() - np.eye(12)).max() > 0.1


@pytest.mark.parametrize(
    "operator",
    [
        PairRotation(np.arange(1.0, 7), np.arange(2.0, 8), 3, 6),
        PairRotation(np.arange(1.0, 9), np.arange(2.0, 10), 2, 7),
        Permutation(np.array([2, 0, 1, 4, 3])),
    ],
)
def test_operators_agree_with_their_own_matrix(operator: Any) -> None:
    """apply(x) = x M^T, rows = M[block], after(W) = W M."""
    rng = np.random.default_rng(6)
    matrix = operator.dense()
    x, weight = rng.normal(size=(2, 3, len(matrix))), rng.normal(size=(4, len(matrix)))
    assert_close(operator.apply(x), x @ matrix.T, 1e-12)
    assert_close(operator.after(weight), weight @ matrix, 1e-12)
    assert_close(rows_of(operator, slice(1, 3)), matrix[1:3], 0)
    assert np.abs(matrix - matrix.T).max() > 0.5


@pytest.mark.parametrize("config", [OFT(), BOFT(), HRA(r=2)])
def test_a_layer_of_one_input_cannot_be_turned(config: Any) -> None:
    """It is left out of "all-linear", and an error where it is named."""
    net = nn.Sequential(nn.Linear(1, 6), nn.Linear(6, 1))
    assert [
        path
        for path, module in adapt(copy.deepcopy(net), config).named_modules()
        if isinstance(module, Adapted)
    ] == ["1"]
    with pytest.raises(Unsupported, match="too narrow"):
        adapt(net, dataclasses.replace(config, targets=("0",)))


def test_beft_gives_a_bias_to_a_layer_without_one(net: Net, x: torch.Tensor, tmp_path: Path) -> None:
    """Forward here and in PEFT; neither can merge it."""
    ours = shaken(adapt(copy.deepcopy(net), BEFT(targets="tall")))
    pack = save(ours, tmp_path / "pack")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / "pack")).base_model.eval()
    assert_close(ours(x).detach(), theirs(x).detach(), 1e-12)
    (adapter,) = pack.adapters()
    expected = with_weights(
        copy.deepcopy(net), {"tall.bias": adapter.params["beft_bias"][0].astype(np.float64)}, x
    )
    assert_close(ours(x).detach(), expected, 1e-12)
    (tmp_path / "base").mkdir()
    save_file(
        {key: value.contiguous() for key, value in net.state_dict().items()},
        tmp_path / "base" / "model.safetensors",
    )
    with pytest.raises(Unsupported, match="gives this site a bias, and the base has none"):
        merge(
            tmp_path / "base",
            [dataclasses.replace(pack, manifest=replace(pack.manifest, base=Base()))],
            tmp_path / "merged",
        )


def psoft_dense(R: np.ndarray, W: np.ndarray, config: PSOFT) -> np.ndarray:
    """W + B (R - I) A, with A and B from the decomposition of W in float32, left vectors along the direction
    that the method names.
    """
    U, S, V = np.linalg.svd(W.astype(np.float32), full_matrices=False)
    if config.svd == "lowrank":
        torch.manual_seed(config.random_seed)
        u, s, v = torch.svd_lowrank(
            torch.tensor(W.astype(np.float32)), q=config.r, niter=config.svd_lowrank_niter
        )
        assert np.abs(np.abs(U[:, : config.r]) - u.abs().numpy()).max() > 0.01, (
            "an estimate, and not the vectors"
        )
        U, S, V = u.numpy(), s.numpy(), v.T.numpy()
    flip = np.sign(np.random.default_rng(0).standard_normal(len(U)) @ U)
    U, S, V = (
        (U * flip)[:, : len(R)].astype(float),
        S[: len(R)].astype(float),
        (flip[:, None] * V)[: len(R)].astype(float),
    )
    left, right = (S**0.5, S**0.5) if config.ab_svd_init == "pissa_init" else (S, np.ones(len(R)))
    return W + U * left @ (R - np.eye(len(R))) @ (right[:, None] * V)


PSOFTS = {
    "cayley": (PSOFT(r=5), {}, lambda q: blocks_of(q[None], 5, exact=True)),
    "neumann": (
        PSOFT(
            r=4, ab_svd_init="pissa_init", mag_a=False, use_cayley_neumann=True, num_cayley_neumann_terms=6
        ),
        {
            "ab_svd_init": "pissa_init",
            "psoft_mag_a": False,
            "use_cayley_neumann": True,
            "num_cayley_neumann_terms": 6,
        },
        lambda q: blocks_of(-q[None], 4, exact=False, terms=6),
    ),
    "bounded": (
        PSOFT(r=4, use_cayley_neumann=True, cayley_neumann_eps=0.5),
        {"use_cayley_neumann": True, "cayley_neumann_eps": 0.5},
        lambda q: blocks_of(-q[None], 4, exact=False, bound=0.5),
    ),
    "estimated": (
        PSOFT(r=4, svd="lowrank", svd_lowrank_niter=1, random_seed=5),
        {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 1, "random_seed": 5},
        lambda q: blocks_of(q[None], 4, exact=True),
    ),
    "free": (PSOFT(r=3, orth=False, mag_b=False), {"psoft_orth": False, "psoft_mag_b": False}, lambda q: q),
}


@pytest.mark.parametrize("name", PSOFTS)
def test_psoft_is_the_formula_and_peft_with_the_same_signs(name: str, tmp_path: Path) -> None:
    """PEFT's layer gives what ours gives once its singular vectors have our signs, whatever its alpha.
    float32: sums of twelve products.
    """
    torch.manual_seed(6)
    config, options, rotation = PSOFTS[name]
    net, x = nn.Sequential(nn.Linear(12, 7)), torch.randn(5, 12)
    ours = shaken(adapt(copy.deepcopy(net), config))
    layer = ours.get_submodule("0")
    own = {key: value.astype(float) for key, value in layer._params("default").items()}
    R = rotation(own["psoft_R"])
    R = own.get("vector_b", np.ones(len(R)))[:, None] * R * own.get("vector_a", np.ones(len(R)))
    weight = psoft_dense(R, net[0].weight.detach().double().numpy(), config)
    expected = x.double().numpy() @ weight.T + net[0].bias.detach().double().numpy()
    assert_close(ours(x).detach(), expected, 5e-6)
    assert_close(merged_by_us(ours)["0.weight"], weight, 5e-6)
    theirs = peft.get_peft_model(
        copy.deepcopy(net), peft.PsoftConfig(target_modules=["0"], r=config.r, psoft_alpha=3, **options)
    ).eval()
    wrapped = theirs.base_model.model[0]
    flip = torch.sign((wrapped._psoft_A_cache["default"] * layer._every("default")["A"]).sum(1))
    wrapped._psoft_A_cache["default"] *= flip[:, None]
    wrapped._psoft_B_cache["default"] *= flip
    with torch.no_grad():
        module = wrapped.psoft_R["default"]
        for key, parameter in (
            ("psoft_R", module.weight),
            ("vector_a", module.vector_a),
            ("vector_b", module.vector_b),
        ):
            if parameter is not None:
                parameter.copy_(torch.tensor(own[key]).reshape(parameter.shape))
    assert_close(theirs(x).detach(), expected, 5e-6)


def test_psoft_does_not_depend_on_the_signs_of_the_library(
    net: Net, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every other singular pair the other way round, as another LAPACK may give it, the output is the
    same; PEFT's is not.
    """
    ours = shaken(adapt(copy.deepcopy(net), PSOFT(r=5)))
    theirs = peft.get_peft_model(copy.deepcopy(net).float(), peft.PsoftConfig(target_modules=BOTH, r=5))
    saved, state = save(ours, None), peft.get_peft_model_state_dict(shaken(theirs))
    numpys, torchs = np.linalg.svd, torch.linalg.svd

    def other(svd: Callable[..., Any]) -> Callable[..., Any]:
        def turned(matrix: Any, **options: Any) -> Any:
            U, S, V = svd(matrix, **options)
            flip = (-1.0) ** np.arange(len(S)).astype(np.float32)
            flip = torch.tensor(flip) if isinstance(U, torch.Tensor) else flip
            return U * flip, S, flip[:, None] * V

        return turned

    monkeypatch.setattr(np.linalg, "svd", other(numpys))
    monkeypatch.setattr(torch.linalg, "svd", other(torchs))
    assert_close(attach(copy.deepcopy(net), saved)(x).detach(), ours(x).detach(), 1e-12)
    again = peft.get_peft_model(copy.deepcopy(net).float(), peft.PsoftConfig(target_modules=BOTH, r=5))
    peft.set_peft_model_state_dict(again, state)
    assert np.abs((again(x.float()) - theirs(x.float())).detach().numpy()).max() > 0.1


def ids(rows: int = 2) -> torch.Tensor:
    """Token ids [rows, 6] of the tiny models' vocabulary."""
    return torch.randint(3, 96, (rows, 6), generator=torch.Generator().manual_seed(7))


def hidden(model: nn.Module) -> np.ndarray:
    """What a model gives for them: logits, or the last hidden states."""
    with torch.no_grad():
        return model(input_ids=ids())[0].numpy()


@pytest.mark.parametrize("kind", ["tiny_bert", "tiny_llama"])
def test_ln_tuning_here_in_peft_merged_and_exported(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """LayerNorm with biases, RMSNorm without: one adapter gives the same attached, in PEFT, merged, and as a
    folded graph; PEFT's of a linear layer, too, attached, merged and in PEFT again. float32.
    """
    folder = request.getfixturevalue(kind)
    plain = AutoModel if kind == "tiny_bert" else AutoModelForCausalLM
    base = plain.from_pretrained(folder).eval()
    ours = shaken(adapt(copy.deepcopy(base), LNTuning()))
    norms = [path for path, module in base.named_modules() if "Norm" in type(module).__name__]
    pack = save(ours, tmp_path / "pack")
    assert len(norms) == 5
    assert sorted(adapter.site.path for adapter in pack.adapters()) == sorted(norms)
    by_hand = copy.deepcopy(base)
    for adapter in pack.adapters():
        for leaf, value in adapter.params.items():
            getattr(by_hand.get_submodule(adapter.site.path), leaf).data = torch.tensor(value)
    expected = hidden(by_hand)
    assert np.abs(expected - hidden(base)).max() > 0.1
    assert_close(hidden(ours), expected, 0)
    assert_close(
        hidden(peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "pack")).base_model.eval()),
        expected,
        0,
    )
    linear = "query" if kind == "tiny_bert" else "up_proj"
    theirs = shaken(
        peft.get_peft_model(copy.deepcopy(base), peft.LNTuningConfig(target_modules=[*norms, linear]))
    )
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = from_peft.read(tmp_path / "theirs")
    again.write(tmp_path / "again")
    assert sorted({adapter.site.kind for adapter in again.adapters()}) == ["linear", "norm"]
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "again")).base_model.eval()
    assert_close(hidden(back), hidden(theirs.base_model), 0)
    assert_close(
        hidden(attach(copy.deepcopy(base), again, check_base=False).eval()), hidden(theirs.base_model), 0
    )
    merge(folder, [pack], tmp_path / "merged")
    assert_close(hidden(plain.from_pretrained(tmp_path / "merged").eval()), expected, 0)
    merge(folder, [again], tmp_path / "theirs-merged")
    assert_close(
        hidden(plain.from_pretrained(tmp_path / "theirs-merged").eval()), hidden(theirs.base_model), 0
    )
    with pytest.raises(Unsupported, match="--mode folded"):
        pack_values(pack)
    if kind == "tiny_llama":
        export(folder, [pack], tmp_path / "bundle", mode="folded")
        outputs = Session(tmp_path / "bundle", "cpu").run(
            {"input_ids": ids().numpy(), "attention_mask": np.ones((2, 6), np.int64)}
        )
        assert_close(outputs["logits"], expected, 1e-4)


def test_a_norm_is_told_by_what_it_holds() -> None:
    """A norm with running statistics, a linear layer and a container called norm are none; one that adds 1 to
    its weight is.
    """

    class ShiftedRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)

    class NormOfTwo(nn.Sequential):
        pass

    assert [
        is_norm(module)
        for module in (nn.LayerNorm(6), nn.RMSNorm(6), nn.LayerNorm(6, bias=False), ShiftedRMSNorm())
    ] == [True] * 4
    none = (
        nn.BatchNorm1d(6),
        nn.Linear(6, 6),
        NormOfTwo(nn.Linear(6, 6)),
        nn.LayerNorm(6, elementwise_affine=False),
    )
    assert [is_norm(module) for module in none] == [False] * 4
    torch.manual_seed(8)
    net, x = nn.Sequential(nn.Linear(6, 6), ShiftedRMSNorm()), torch.randn(4, 6)
    ours = adapt(copy.deepcopy(net), LNTuning())
    assert torch.equal(ours(x), net(x))
    shaken(ours)
    by_hand = copy.deepcopy(net)
    by_hand[1].weight.data = ours.get_submodule("1")._every("default")["weight"].detach()
    assert torch.equal(ours(x), by_hand(x))
    ours(x).sum().backward()
    assert ours.get_submodule("1")._every("default")["weight"].grad.abs().max() > 0


@pytest.mark.parametrize("tied", [True, False])
def test_trainable_tokens_here_in_peft_merged_and_exported(
    tied: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    """Rows of the table and of a head that is tied to it, of no other: attached, in PEFT both ways, merged,
    as a folded graph. float32.
    """
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, tie_word_embeddings=tied).eval()
    if not tied:
        base.lm_head.weight.data = torch.randn(
            base.lm_head.weight.shape, generator=torch.Generator().manual_seed(9)
        )
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert (base.lm_head.weight is base.model.embed_tokens.weight) == tied
    chosen = tuple(ids().flatten()[[0, 3, 8]].tolist())
    ours = adapt(copy.deepcopy(base), TrainableTokens(token_indices=chosen))
    assert np.array_equal(hidden(ours.eval()), hidden(base))
    shaken(ours)
    pack = save(ours, tmp_path / "pack")
    (adapter,) = pack.adapters()
    names = ["base_model.model.model.embed_tokens.trainable_tokens_delta"]
    assert list(load_file(tmp_path / "pack" / "adapter_model.safetensors")) == names
    by_hand = copy.deepcopy(base)
    by_hand.model.embed_tokens.weight.data[list(chosen)] = torch.tensor(
        adapter.params["trainable_tokens_delta"]
    )
    expected = hidden(by_hand)
    assert np.abs(expected - hidden(base)).max() > 0.1
    assert_close(hidden(ours), expected, 1e-5)
    assert_close(
        hidden(peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "pack")).base_model.eval()),
        expected,
        1e-5,
    )
    theirs = shaken(
        peft.get_peft_model(copy.deepcopy(base), peft.TrainableTokensConfig(token_indices=list(chosen)))
    )
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = attach(copy.deepcopy(base), from_peft.read(tmp_path / "theirs"), check_base=False).eval()
    assert_close(hidden(again), hidden(theirs.base_model), 1e-5)
    merge(tmp_path / "base", [pack], tmp_path / "merged")
    assert_close(hidden(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected, 0)
    with pytest.raises(Unsupported, match=r"the base.s own weights"):
        pack_values(pack)
    if tied:
        export(tmp_path / "base", [pack], tmp_path / "bundle", mode="folded")
        outputs = Session(tmp_path / "bundle", "cpu").run(
            {"input_ids": ids().numpy(), "attention_mask": np.ones((2, 6), np.int64)}
        )
        assert_close(outputs["logits"], expected, 1e-4)
    detach(ours)
    assert np.array_equal(hidden(ours), hidden(base))


def test_trainable_tokens_train_their_rows_alone(tiny_llama: Path) -> None:
    """The gradient is that of the whole tied table at these rows, from the lookup and from the head; nothing
    else has one.
    """
    base = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    chosen = tuple(ids().flatten()[[1, 5]].tolist())
    ours = adapt(copy.deepcopy(base), TrainableTokens(token_indices=chosen)).eval()
    for model in (ours, base):
        model(input_ids=ids(), labels=ids()).loss.backward()
    trained = {name: value.grad for name, value in ours.named_parameters() if value.grad is not None}
    assert len(trained) == 1
    assert_close(next(iter(trained.values())), base.model.embed_tokens.weight.grad[list(chosen)], 1e-6)


def test_trainable_tokens_of_a_scaled_embedding() -> None:
    """A model that scales what it looks up scales the new rows, too."""

    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * self.embed_scale

    net = nn.Sequential(Scaled(9, 4, padding_idx=2))
    ours = shaken(adapt(copy.deepcopy(net), TrainableTokens(targets="0", token_indices=(2, 7))))
    by_hand = copy.deepcopy(net)
    by_hand[0].weight.data[[2, 7]] = (
        ours.get_submodule("0")._every("default")["trainable_tokens_delta"].detach()
    )
    x = torch.tensor([[0, 2, 7], [7, 8, 2]])
    assert torch.equal(ours(x), by_hand(x))


@pytest.mark.parametrize(
    ("indices", "message"),
    [((), "no token is named"), ((99,), "ids below 9, found 99"), ((1, 1), "twice"), ((-1,), "at least 0")],
)
def test_tokens_that_cannot_be_trained(indices: tuple[int, ...], message: str) -> None:
    with pytest.raises((AdapterpackError, ValueError), match=message):
        adapt(nn.Sequential(nn.Embedding(9, 4)), TrainableTokens(targets="0", token_indices=indices))
