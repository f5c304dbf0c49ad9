"""Methods made of seeds, shared parameters and sparse or spectral changes, against the real PEFT and the
dense formula in float64.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from families import FAMILIES
from peft.tuners.waveft.wavelet import Wavelet
from safetensors.torch import load_file, save_file
from seeded_formulas import c3a, fourierft, pvera, randlora, shira, tinylora, unilora, vblora, vera, waveft
from torch import nn

import adapterpack
from adapterpack import C3A, FourierFT, PVeRA, RandLoRA, SHiRA, TinyLoRA, UniLoRA, VBLoRA, VeRA, WaveFT
from adapterpack.adapter_methods import complete, fold
from adapterpack.adapter_methods.core.torch_random import TorchGenerator
from adapterpack.adapter_methods.core.wavelets import filters
from adapterpack.errors import FormatError, Unsupported
from adapterpack.manifest import manifest as m
from adapterpack.pack import from_peft
from adapterpack.pack.pack import Pack, build
from adapterpack.torch_adapters.save import parts_of

pytestmark = pytest.mark.filterwarnings("ignore")
FP32 = 2e-6
"""Two float32 computations of sums of a few dozen terms of size one, in another order."""


class Net(nn.Module):
    """Two layers of unlike shapes, one without a bias, under paths of unlike depth."""

    def __init__(self, wide: int = 12, narrow: int = 7) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(wide, narrow)
        self.block = nn.Sequential(nn.Linear(narrow, wide, bias=False), nn.Tanh(), nn.Linear(wide, narrow))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., wide]`` -> ``[..., narrow]``."""
        out: torch.Tensor = self.block(torch.tanh(self.first(x)))
        return out


SITES = ("first", "block.0", "block.2")
Delta = Callable[[Any, Mapping[str, np.ndarray], np.ndarray, Any], np.ndarray]


class Row(NamedTuple):
    """``delta`` is the dense change [out, in] in float64: of the site's config and stored parameters, its
    weight, and the whole net.
    """

    ours: Any
    theirs: Any
    delta: Delta
    net: tuple[int, int] = (12, 7)
    stored: bool = False
    """What a seed would give is stored."""


def weights(net: nn.Module) -> dict[str, np.ndarray]:
    """The weights of the sites in float64."""
    return {path: net.get_submodule(path).weight.detach().double().numpy() for path in SITES}


T = list(SITES)
ROWS: dict[str, Row] = {
    "vera": Row(
        VeRA(r=5, projection_prng_key=3),
        peft.VeraConfig(r=5, projection_prng_key=3, target_modules=T, save_projection=False),
        vera,
    ),
    "vera with its projection": Row(
        VeRA(r=4, save_projection=True), peft.VeraConfig(r=4, target_modules=T), vera, stored=True
    ),
    "pvera": Row(
        PVeRA(r=5, projection_prng_key=3, sample=False),
        peft.PveraConfig(r=5, projection_prng_key=3, target_modules=T, save_projection=False),
        pvera,
    ),
    "pvera with its projection": Row(
        PVeRA(r=4, save_projection=True, sample=False),
        peft.PveraConfig(r=4, target_modules=T),
        pvera,
        stored=True,
    ),
    "fourierft": Row(
        FourierFT(n_frequency=20, scaling=9, random_loc_seed=5),
        peft.FourierFTConfig(n_frequency=20, scaling=9, random_loc_seed=5, target_modules=T),
        fourierft,
    ),
    "fourierft by site": Row(
        FourierFT(n_frequency=20, n_frequency_pattern={"block.2": 30, "first": 100}),
        peft.FourierFTConfig(
            n_frequency=84,
            n_frequency_pattern={"block.2": 9, "first": 8},
            init_weights=True,
            target_modules=T,
        ),
        fourierft,
    ),
    "c3a": Row(C3A(block_size=3), peft.C3AConfig(block_size=3, target_modules=T), c3a, (12, 6)),
    "c3a by site": Row(
        C3A(block_size=12, block_size_pattern={"block.0": 2, "first": 8}),
        peft.C3AConfig(block_size=2, block_size_pattern={"block.0": 8}, target_modules=T),
        c3a,
        (16, 8),
    ),
    "randlora": Row(
        RandLoRA(r=3, alpha=2, projection_prng_key=3),
        peft.RandLoraConfig(
            r=3, randlora_alpha=2, projection_prng_key=3, save_projection=False, target_modules=T
        ),
        randlora,
    ),
    "randlora with its bases": Row(
        RandLoRA(r=4, alpha=2, save_projection=True),
        peft.RandLoraConfig(r=4, randlora_alpha=2, target_modules=T),
        randlora,
        (11, 4),
        stored=True,
    ),
    "randlora sparse": Row(
        RandLoRA(r=5, alpha=2, sparse=True),
        peft.RandLoraConfig(r=5, randlora_alpha=2, sparse=True, target_modules=T),
        randlora,
    ),
    "randlora very sparse": Row(
        RandLoRA(r=2, alpha=2, very_sparse=True),
        peft.RandLoraConfig(r=2, randlora_alpha=2, very_sparse=True, target_modules=T),
        randlora,
        (30, 20),
    ),
    "vblora": Row(
        VBLoRA(r=3, num_vectors=9, vector_length=4, topk=3),
        peft.VBLoRAConfig(r=3, num_vectors=9, vector_length=4, topk=3, target_modules=T),
        vblora,
        (12, 8),
    ),
    "unilora": Row(
        UniLoRA(r=3, theta_d_length=50, proj_seed=3),
        peft.UniLoraConfig(r=3, theta_d_length=50, proj_seed=3, save_indices=True, target_modules=T),
        unilora,
    ),
    "unilora with more numbers than places": Row(
        UniLoRA(r=1, theta_d_length=77),
        peft.UniLoraConfig(r=1, theta_d_length=77, save_indices=True, target_modules=T),
        unilora,
    ),
    "tinylora": Row(
        TinyLoRA(r=3, u=5, projection_seed=3, save_factors=True),
        peft.TinyLoraConfig(r=3, u=5, projection_seed=3, target_modules=T),
        tinylora,
        stored=True,
    ),
    "tinylora tied": Row(
        TinyLoRA(r=8, u=20, weight_tying=0.4, save_factors=True),
        peft.TinyLoraConfig(r=8, u=20, weight_tying=0.4, target_modules=T),
        tinylora,
        stored=True,
    ),
    "waveft": Row(
        WaveFT(n_frequency=30, scaling=4),
        peft.WaveFTConfig(n_frequency=30, scaling=4, target_modules=T),
        waveft,
    ),
    "waveft db4 by site": Row(
        WaveFT(n_frequency=25, scaling=4, wavelet_family="db4", n_frequency_pattern={"block.2": 9}),
        peft.WaveFTConfig(
            n_frequency=25,
            scaling=4,
            wavelet_family="db4",
            n_frequency_pattern={"block.2": 9},
            target_modules=T,
        ),
        waveft,
    ),
    "waveft sym8": Row(
        WaveFT(n_frequency=25, scaling=4, wavelet_family="sym8"),
        peft.WaveFTConfig(n_frequency=25, scaling=4, wavelet_family="sym8", target_modules=T),
        waveft,
    ),
    "waveft db2 in proportion": Row(
        WaveFT(n_frequency=25, wavelet_family="db2", proportional_parameters=True),
        peft.WaveFTConfig(
            n_frequency=25, wavelet_family="db2", proportional_parameters=True, target_modules=T
        ),
        waveft,
        (12, 5),
    ),
    "waveft without a transform": Row(
        WaveFT(n_frequency=9, use_idwt=False),
        peft.WaveFTConfig(n_frequency=9, use_idwt=False, target_modules=T),
        waveft,
    ),
    "shira": Row(SHiRA(r=2, random_seed=3), peft.ShiraConfig(r=2, random_seed=3, target_modules=T), shira),
    "shira without a seed": Row(
        SHiRA(r=1, random_seed=None), peft.ShiraConfig(r=1, target_modules=T), shira, stored=True
    ),
}


# --- the tests ----------------------------------------------------------------------------------------------


def moved(model: nn.Module) -> nn.Module:
    """The model with everything that is trained moved by noise, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.3 * torch.randn(value.shape, generator=generator))
    return model


def our_pack(row: Row, net: nn.Module) -> tuple[Pack, nn.Module]:
    """A trained adapter of ours as a pack, and the adapted model."""
    model = moved(adapterpack.adapt(copy.deepcopy(net), row.ours))
    method, adapters, _, shared, full = parts_of(model, "default")
    return build(
        "ours",
        method,
        adapters,
        shared=shared,
        full=full,
        task=m.PackTask("feature-extraction"),
        base=m.Base("org/base"),
    ), model


def changes(pack: Pack, net: nn.Module) -> dict[str, np.ndarray]:
    """The change of every weight by our fold, in float64, of a pack as it was read: widths come from the
    net.
    """
    found, before = {}, weights(net)
    for adapter in pack.adapters(lambda group: before[group.path].shape):
        weight = before[adapter.site.path]
        site = (
            dataclasses.replace(adapter.site, weight=weight)
            if pack.method.traits.reads_weight
            else adapter.site
        )
        wide = {
            name: v.astype(np.float64) if v.dtype.kind == "f" else v for name, v in adapter.params.items()
        }
        params = complete(pack.method, adapter.config, wide, site)
        found[adapter.site.path] = fold(pack.method, adapter.config, params, site, weight, None)[0] - weight
    return found


def expected(pack: Pack, row: Row, net: nn.Module) -> dict[str, np.ndarray]:
    """The change of every weight by the formula."""
    before = weights(net)
    return {
        adapter.site.path: row.delta(adapter.config, adapter.params, before[adapter.site.path], before)
        for adapter in pack.adapters(lambda group: before[group.path].shape)
    }


def x_for(row: Row) -> torch.Tensor:
    """Random inputs."""
    return torch.randn(3, 5, row.net[0], generator=torch.Generator().manual_seed(2))


def require_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal outputs, within float32 of the largest."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=FP32 * max(1.0, float(wanted.abs().max())))


def require_same(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], tolerance: float) -> None:
    """Every change within a tolerance of the largest."""
    assert found.keys() == wanted.keys() == set(SITES)
    for path, value in wanted.items():
        assert np.abs(value).max() > 1e-3, "the adapter does something"
        np.testing.assert_allclose(
            found[path], value, rtol=0, atol=tolerance * max(1, np.abs(value).max()), err_msg=path
        )


@pytest.mark.parametrize("name", ROWS)
def test_peft_loads_our_pack(name: str, tmp_path: Path) -> None:
    """Our folder is valid; our fold == dense formula (1e-6: constants are float32); PEFT(base, our folder) ==
    ours, unmerged and merged.
    """
    row = ROWS[name]
    net = Net(*row.net)
    pack, model = our_pack(row, net)
    pack.write(tmp_path / "ours")
    assert adapterpack.load(tmp_path / "ours").id == pack.id
    wanted = expected(pack, row, net)
    require_same(changes(pack, net), wanted, 1e-6)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "ours").eval()
    x = x_for(row)
    with torch.no_grad():
        require_close(theirs.get_base_model()(x), model(x))
        require_close(theirs.merge_and_unload()(x), model(x))


@pytest.mark.parametrize("name", ROWS)
def test_we_load_pefts_folder(name: str, tmp_path: Path) -> None:
    """Ours(base, PEFT's folder) == PEFT, unmerged and merged, within float32; our fold of it == dense
    formula.
    """
    row = ROWS[name]
    net = Net(*row.net)
    theirs = moved(peft.get_peft_model(copy.deepcopy(net), copy.deepcopy(row.theirs))).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    pack = from_peft.read(tmp_path / "theirs")
    ours = adapterpack.attach(copy.deepcopy(net), pack, check_base=False).eval()
    x = x_for(row)
    with torch.no_grad():
        require_close(ours(x), theirs(x))
    found = changes(pack, net)
    require_same(found, expected(pack, row, net), 1e-6)
    merged = weights(theirs.merge_and_unload())
    require_same(found, {path: merged[path] - before for path, before in weights(net).items()}, FP32)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row.stored])
def test_a_pack_is_as_small_as_what_is_trained(name: str) -> None:
    """Bytes of all tensors <= 1.05 x bytes of what is trained: seeds instead of random matrices, shared
    tensors once.
    """
    row = ROWS[name]
    pack, model = our_pack(row, Net(*row.net))
    trained = sum(4 * value.numel() for value in model.parameters() if value.requires_grad)
    assert sum(value.nbytes for value in pack.tensors.values()) <= 1.05 * trained


@pytest.mark.parametrize("seed", [0, 5, 2**31 + 7, 2**40 + 3])
def test_torchs_numbers(seed: int) -> None:
    """Uniform numbers and permutations are torch's bit for bit; normal ones within 1e-6, for logarithm and
    sine differ.
    """
    ours, theirs = TorchGenerator(seed), torch.Generator().manual_seed(seed)
    for low, high in ((0.0, 1.0), (-1 / 3, 1 / 3), (-0.0123, 0.7)):
        for shape in ((7,), (300, 100)):
            for dtype, narrow in (
                (torch.float32, np.dtype(np.float32)),
                (torch.bfloat16, np.dtype(ml_dtypes.bfloat16)),
            ):
                expected = (
                    torch.empty(shape, dtype=dtype).uniform_(low, high, generator=theirs).float().numpy()
                )
                assert (
                    ours.uniform(shape, low, high, narrow).astype(np.float32).tobytes() == expected.tobytes()
                )
    for n, first in ((10, 10), (10, 3), (1, 1), (84, 84), (84, 83), (100_000, 2592), (5, 9)):
        wanted = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:first]
        assert TorchGenerator(seed).permute(n, first).tolist() == wanted.tolist()
    for normal in ((3,), (1,), (15,), (16,), (17,), (64, 3, 3), (1000,)):
        wanted = torch.normal(mean=0.0, std=0.7, size=normal, generator=torch.Generator().manual_seed(seed))
        np.testing.assert_allclose(TorchGenerator(seed).normal(normal, 0.7), wanted, rtol=0, atol=1e-6)


def test_more_numbers_than_a_machine_holds_are_refused() -> None:
    """Widths come from files: a matrix of 2^40 numbers is refused before it is made."""
    for draw in (
        lambda: TorchGenerator(0).uniform((1 << 20, 1 << 20), 0, 1),
        lambda: TorchGenerator(0).permute(1 << 40, 3),
    ):
        with pytest.raises(Unsupported):
            draw()


@pytest.mark.parametrize("tying", [0.0, 1.0])
def test_tinyloras_vectors_alone(tying: float, tmp_path: Path) -> None:
    """By default a pack holds the vectors and no more; its fold is the dense formula. PEFT, which has other
    signs, is offered no file.
    """
    net = Net()
    row = Row(TinyLoRA(r=3, u=5, weight_tying=tying), None, tinylora)
    pack, model = our_pack(row, net)
    pack.write(tmp_path / "ours")
    assert not (tmp_path / "ours" / "adapter_config.json").exists()
    assert {name: value.shape for name, value in pack.tensors.items()} == {
        f"base_model.tinylora_v.{group}": (5,) for group in range(3 if tying == 0 else 1)
    }
    back = adapterpack.load(tmp_path / "ours")
    require_same(changes(back, net), expected(back, row, net), 1e-5)
    x = x_for(row)
    with torch.no_grad():
        require_close(adapterpack.attach(copy.deepcopy(net), back, check_base=False)(x), model(x))


def test_tinyloras_order_must_be_known(tmp_path: Path) -> None:
    """Without P, a file of several layers does not say whose vector is whose; with another's P neither."""
    theirs = peft.get_peft_model(
        Net(), peft.TinyLoraConfig(r=2, u=5, target_modules=T, save_projection=False)
    )
    theirs.save_pretrained(tmp_path / "without")
    with pytest.raises(Unsupported, match="in which order"):
        from_peft.read(tmp_path / "without")
    theirs = peft.get_peft_model(Net(), peft.TinyLoraConfig(r=2, u=5, target_modules=T))
    theirs.base_model.model.first.tinylora_P["default"] += 1
    theirs.save_pretrained(tmp_path / "other")
    with pytest.raises(Unsupported, match="not that of projection_seed"):
        from_peft.read(tmp_path / "other")


def test_uniloras_order_must_be_known(tmp_path: Path) -> None:
    """Without indices, or with indices of another seed, a file of several layers could be read in two ways;
    one layer is no question.
    """
    theirs = peft.get_peft_model(Net(), peft.UniLoraConfig(r=3, target_modules=T))
    theirs.save_pretrained(tmp_path / "several")
    with pytest.raises(Unsupported, match="in which order"):
        from_peft.read(tmp_path / "several")
    theirs = peft.get_peft_model(Net(), peft.UniLoraConfig(r=3, target_modules=T, save_indices=True))
    theirs.base_model.model.first.unilora_indices_A["default"] += 1
    theirs.save_pretrained(tmp_path / "other")
    with pytest.raises(Unsupported, match="not those of proj_seed"):
        from_peft.read(tmp_path / "other")
    theirs = moved(peft.get_peft_model(Net(), peft.UniLoraConfig(r=3, target_modules=["block.2"])))
    theirs.save_pretrained(tmp_path / "one")
    x = x_for(ROWS["vera"])
    with torch.no_grad():
        require_close(
            adapterpack.attach(Net(), from_peft.read(tmp_path / "one"), check_base=False)(x), theirs(x)
        )


def test_uniloras_order_is_the_bases(tmp_path: Path) -> None:
    """Without indices the layers are numbered as the base's model has them: OPT's keys before its values
    before its queries.
    """
    torch.manual_seed(0)
    base = FAMILIES["opt"].build()
    base.save_pretrained(tmp_path / "base")
    config = peft.UniLoraConfig(
        r=2, theta_d_length=33, target_modules=["q_proj", "v_proj", "k_proj"], task_type="CAUSAL_LM"
    )
    theirs = moved(peft.get_peft_model(base, config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.tensor([[3, 1, 4, 15]])
    with torch.no_grad():
        wanted, plain = (
            theirs(input_ids=ids).logits,
            FAMILIES["opt"].load(tmp_path / "base").eval()(input_ids=ids).logits,
        )
    with pytest.raises(Unsupported, match="--base"):
        adapterpack.load(tmp_path / "theirs")
    adapterpack.convert(tmp_path / "theirs", tmp_path / "pack", to="pack", base=tmp_path / "base")
    ours = adapterpack.attach(
        FAMILIES["opt"].load(tmp_path / "base").eval(), adapterpack.load(tmp_path / "pack")
    )
    with torch.no_grad():
        found = ours(input_ids=ids).logits
    assert (wanted - plain).abs().max() > 0.01
    require_close(found, wanted)
    (tmp_path / "theirs" / "adapter_config.json").write_text(
        json.dumps(
            {
                **json.loads((tmp_path / "theirs" / "adapter_config.json").read_text()),
                "layers_to_transform": [0],
            }
        )
    )
    with pytest.raises(Unsupported, match="decides which layers"):
        adapterpack.convert(tmp_path / "theirs", tmp_path / "again", to="pack", base=tmp_path / "base")


def test_vbloras_best_weights_alone(tmp_path: Path) -> None:
    """PEFT's small form, of weights without logits, is read, written and read again with equal outputs; it is
    not trained.
    """
    options = {"r": 3, "num_vectors": 9, "vector_length": 4, "topk": 3, "save_only_topk_weights": True}
    net = Net(12, 8)
    theirs = moved(
        peft.get_peft_model(copy.deepcopy(net), peft.VBLoRAConfig(**options, target_modules=T))
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    pack = from_peft.read(tmp_path / "theirs", "ours").write(tmp_path / "ours")
    adapterpack.load(tmp_path / "ours")
    require_same(changes(pack, net), expected(pack, ROWS["vblora"], net), 1e-6)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "ours").eval()
    x = torch.randn(3, 5, 12)
    with torch.no_grad():
        require_close(adapterpack.attach(copy.deepcopy(net), pack, check_base=False)(x), theirs(x))
        require_close(again.get_base_model()(x), theirs(x))
    with pytest.raises(Unsupported, match="cannot be trained"):
        adapterpack.adapt(net, VBLoRA(**options))


def test_a_vector_bank_that_is_missing_is_named(tmp_path: Path) -> None:
    """What all sites share must be there, in PEFT's folder and in a pack."""
    net = Net(12, 8)
    pack, _ = our_pack(ROWS["vblora"], net)
    pack.write(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    del tensors["base_model.vblora_vector_bank"]
    (tmp_path / "cut").mkdir()
    save_file(tensors, tmp_path / "cut" / "adapter_model.safetensors")
    shutil.copy(tmp_path / "whole" / "adapter_config.json", tmp_path / "cut")
    with pytest.raises(FormatError, match="vblora_vector_bank"):
        from_peft.read(tmp_path / "cut")
    adapters = {adapter.site: (adapter.config, pack.params(adapter.site.path)) for adapter in pack.adapters()}
    build("cut", pack.method, adapters, task=m.PackTask("feature-extraction"), base=m.Base()).write(
        tmp_path / "ours"
    )
    with pytest.raises(FormatError, match="vblora_vector_bank"):
        adapterpack.load(tmp_path / "ours")


@pytest.mark.parametrize("options", [{}, {"sparse": True}, {"very_sparse": True}])
def test_randloras_bases_are_the_seeds(options: dict[str, Any], tmp_path: Path) -> None:
    """PEFT stores the bases once for the model and once for every layer; ours are the seed's bit for bit, so
    that none is stored.
    """
    theirs = moved(peft.get_peft_model(Net(40, 33), peft.RandLoraConfig(r=3, target_modules=T, **options)))
    theirs.save_pretrained(tmp_path)
    pack = from_peft.read(tmp_path)
    assert pack.shared() == {}
    stored = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert sum(value.nbytes for value in pack.tensors.values()) < stored / 5


def test_copies_of_the_bases_that_differ_are_refused(tmp_path: Path) -> None:
    """Two layers with bases of their own are no RandLoRA that PEFT made."""
    moved(peft.get_peft_model(Net(), peft.RandLoraConfig(r=3, target_modules=T))).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.first.randlora_A"] = tensors["base_model.model.first.randlora_A"] + 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="two sites have another"):
        from_peft.read(tmp_path)


def test_veras_stored_projection_is_dropped_where_its_seed_gives_it(tmp_path: Path) -> None:
    """PEFT's default stores the pair; ours keeps it only where it is another than the seed's, and says it
    then.
    """
    theirs = moved(peft.get_peft_model(Net(), peft.VeraConfig(r=4, target_modules=T)))
    theirs.save_pretrained(tmp_path / "seeded")
    assert from_peft.read(tmp_path / "seeded").shared() == {}
    theirs.base_model.vera_A["default"].mul_(2)
    theirs.save_pretrained(tmp_path / "other")
    pack = from_peft.read(tmp_path / "other")
    assert {name: value.shape for name, value in pack.shared().items()} == {
        "vera_A": (4, 12),
        "vera_B": (12, 4),
    }
    pack.write(tmp_path / "again")
    adapterpack.load(tmp_path / "again")
    x = x_for(ROWS["vera"])
    with torch.no_grad():
        require_close(adapterpack.attach(Net(), pack, check_base=False)(x), theirs(x))
        again = peft.PeftModel.from_pretrained(Net(), tmp_path / "again")
        require_close(again.get_base_model()(x), theirs(x))


def test_every_wavelet_of_peft() -> None:
    """Ours are computed, PEFT's are a table of 12 digits: the same numbers, and each transform is
    orthonormal.
    """
    for name in (*(f"db{order}" for order in range(1, 11)), *(f"sym{order}" for order in range(2, 11))):
        low, high = map(np.array, filters(name))
        assert np.abs(low - Wavelet(name).rec_lo).max() < 1e-11
        assert np.abs(high - Wavelet(name).rec_hi).max() < 1e-11
        for shift in range(0, len(low), 2):
            assert abs(low[shift:] @ low[: len(low) - shift] - (shift == 0)) < 1e-11
    with pytest.raises(Unsupported, match="wavelet"):
        filters("coif1")
