"""PEFT's adapters of convolutions and embeddings: attach == PEFT's own forward, merge == PEFT's merge, and
PEFT loads what is written.

PEFT's folder of several methods does not say of what kind a layer is: the model or the checkpoint does. A
tolerance is 1e-5 of the change or of the output, whichever is larger: float32 sums in another order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
from noise import shake
from safetensors.torch import load_file, save_file
from torch import nn

from adapterpack import attach, convert, load, merge, validate
from adapterpack.adapter_methods.loha import _join
from adapterpack.errors import FormatError, SiteNotFound, Unsupported

pytestmark = pytest.mark.filterwarnings("ignore")
CLOSE = 1e-5


class Base(NamedTuple):
    """A model of layers ``0`` and ``2`` or ``0`` alone, what goes into it, and the kinds of these layers."""

    make: Callable[[], nn.Module]
    x: tuple[int, ...]
    kinds: tuple[str, ...]
    ids: bool = False

    def model(self) -> nn.Module:
        """The model with random weights and biases."""
        torch.manual_seed(0)
        return self.make().eval().requires_grad_(False)

    def input(self) -> torch.Tensor:
        """The input, in float64 or ids."""
        generator = torch.Generator().manual_seed(1)
        return (
            torch.randint(0, 13, self.x, generator=generator)
            if self.ids
            else torch.randn(self.x, generator=generator).double()
        )


BASES = {
    "conv 1d": Base(
        lambda: nn.Sequential(nn.Conv1d(6, 8, 3, stride=2, bias=False), nn.ReLU(), nn.Conv1d(8, 6, 1)),
        (2, 6, 11),
        ("conv",) * 2,
    ),
    "conv 2d": Base(
        lambda: nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1)),
        (2, 6, 5, 4),
        ("conv",) * 2,
    ),
    "a point": Base(
        lambda: nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Linear(4, 6)),
        (2, 6, 3, 4),
        ("conv", "linear"),
    ),
    "one channel": Base(
        lambda: nn.Sequential(nn.Conv1d(1, 5, 2), nn.ReLU(), nn.Conv1d(5, 5, 3)), (2, 1, 9), ("conv",) * 2
    ),
    "points": Base(
        lambda: nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1)), (2, 6, 3, 4), ("conv",) * 2
    ),
    "conv 3d": Base(lambda: nn.Sequential(nn.Conv3d(4, 6, 2)), (1, 4, 3, 4, 3), ("conv",)),
    "groups": Base(
        lambda: nn.Sequential(nn.Conv2d(8, 6, 3, groups=2, dilation=2, padding=2)),
        (2, 8, 6, 6),
        ("grouped_conv",),
    ),
    "embedding": Base(
        lambda: nn.Sequential(nn.Embedding(13, 12), nn.Linear(12, 5)), (2, 5), ("embedding",), ids=True
    ),
    "rows": Base(lambda: nn.Sequential(nn.Embedding(13, 12), nn.Linear(12, 5)), (2, 5), ("table",), ids=True),
}

SHOWN = {"grouped_conv": "conv", "table": "linear"}
"""What a checkpoint shows of a kind: neither groups, nor that a matrix is looked up."""
Make = Callable[..., Any]


def loha(**told: Any) -> Any:
    return peft.LoHaConfig(r=3, alpha=5, **told)


def lokr(**told: Any) -> Any:
    return peft.LoKrConfig(**{"r": 1, "alpha": 3, **told})


CASES: dict[str, tuple[Make, tuple[str, ...]]] = {
    "loha": (loha, ("conv 1d", "conv 2d", "a point", "groups")),
    "loha, kernels apart": (
        lambda **told: loha(use_effective_conv2d=True, **told),
        ("conv 1d", "conv 2d", "groups"),
    ),
    "lokr": (lokr, ("conv 1d", "conv 2d", "a point", "groups")),
    "lokr of both": (
        lambda **told: lokr(decompose_both=True, decompose_factor=2, **told),
        ("conv 2d", "groups"),
    ),
    "lokr, whole": (lambda **told: lokr(r=8, **told), ("one channel", "conv 2d", "a point", "groups")),
    "lokr, kernels apart": (lambda **told: lokr(use_effective_conv2d=True, **told), ("conv 2d", "groups")),
    "hira": (lambda **told: peft.HiraConfig(r=3, **told), ("conv 1d", "conv 2d", "conv 3d", "embedding")),
    "hra": (lambda **told: peft.HRAConfig(r=4, **told), ("conv 2d", "a point")),
    "hra, orthogonal": (lambda **told: peft.HRAConfig(r=3, apply_GS=True, **told), ("conv 2d",)),
    "boft": (lambda **told: peft.BOFTConfig(boft_block_size=2, **told), ("conv 2d",)),
    "tinylora": (lambda **told: peft.TinyLoraConfig(r=2, u=5, **told), ("rows",)),
    "oft": (lambda **told: peft.OFTConfig(oft_block_size=2, **told), ("points", "rows")),
    "ia3": (lambda **told: peft.IA3Config(feedforward_modules=[], **told), ("conv 2d", "conv 3d", "groups")),
    "ia3 of inputs": (
        lambda **told: peft.IA3Config(feedforward_modules=["0"], **told),
        ("conv 2d", "conv 3d"),
    ),
    "adalora": (lambda **told: peft.AdaLoraConfig(init_r=3, total_step=9, **told), ("conv 2d",)),
    "lora": (lambda **told: peft.LoraConfig(r=3, **told), ("conv 2d", "embedding")),
}
"""PEFT's config and the bases that PEFT has it for."""
PAIRS = [(label, base) for label, (_, bases) in CASES.items() for base in bases]


def written(make: Make, base: Base, folder: Path) -> Any:
    """PEFT's model with a trained adapter, which lies in ``folder`` then."""
    targets = ["0", "2"][: len(base.kinds)]
    theirs = peft.get_peft_model(base.model(), make(target_modules=targets))
    shake(theirs, 0.3, 3)
    theirs.save_pretrained(folder)
    return theirs.eval()


@torch.no_grad()
def outputs(model: Any, base: Base, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """What the model gives in that dtype."""
    x = base.input()
    found: np.ndarray = model.to(dtype)(x if base.ids else x.to(dtype)).double().numpy()
    return found


def stored(base: Base, folder: Path) -> Path:
    """The model as a checkpoint."""
    folder.mkdir()
    save_file(
        {name: value.contiguous() for name, value in base.model().named_parameters()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text("{}")
    return folder


def require_close(found: np.ndarray, wanted: np.ndarray, plain: np.ndarray) -> None:
    change = np.abs(wanted - plain).max()
    assert change > 0.01, "the adapter does something"
    assert np.abs(found - wanted).max() <= CLOSE * max(change, np.abs(wanted).max())


@pytest.mark.parametrize(("label", "name"), PAIRS)
def test_merge_is_attach_is_peft(label: str, name: str, tmp_path: Path) -> None:
    """From the folder that PEFT wrote, and from the packs made of it, with the base and without; PEFT gives
    the same from both again.
    """
    make, base = CASES[label][0], BASES[name]
    theirs = written(make, base, tmp_path / "theirs")
    wanted, plain = outputs(theirs, base), outputs(base.model(), base)
    folder = stored(base, tmp_path / "base")
    assert validate(tmp_path / "theirs", base=folder).state == "valid"
    require_close(outputs(attach(base.model(), load(tmp_path / "theirs")), base), wanted, plain)
    merged = outputs(copy.deepcopy(theirs).merge_and_unload(), base)
    require_close(merged, wanted, plain)
    merge(folder, [tmp_path / "theirs"], tmp_path / "merged", durable=False)
    again = base.model()
    again.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    require_close(outputs(again, base), merged, plain)
    for known, kept in ((folder, base.kinds), (None, None)):
        out = tmp_path / f"pack {known is None}"
        convert(tmp_path / "theirs", out, to="pack", base=known)
        assert validate(out, base=folder).state == "valid"
        pack = load(out)
        if kept is not None:
            kinds = [group.kind for group in pack.manifest.groups if group.role == "adapter"]
            assert [SHOWN.get(kind, kind) for kind in kinds] == [SHOWN.get(kind, kind) for kind in kept]
        require_close(outputs(attach(base.model(), pack, check_base=False), base), wanted, plain)
        require_close(outputs(peft.PeftModel.from_pretrained(base.model(), out), base), wanted, plain)


def factors(folder: Path, site: str = "0") -> dict[str, np.ndarray]:
    """The tensors of one site of a folder of PEFT's, in float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    start = f"base_model.model.{site}."
    return {
        name.removeprefix(start): value.double().numpy()
        for name, value in tensors.items()
        if name.startswith(start)
    }


def loha_change(t: dict[str, np.ndarray]) -> np.ndarray:
    """5/3 times the elementwise product of two Tucker forms: FedPara, proposition 3."""
    one, two = (
        np.einsum("ijkl,ip,jq->pqkl", t[f"hada_t{n}"], t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]) for n in (1, 2)
    )
    return 5 / 3 * one * two


def lokr_change(t: dict[str, np.ndarray]) -> np.ndarray:
    """3 times the Kronecker product of w1 and a kernel in Tucker form, entry by entry of the kernel."""
    w2 = np.einsum("ijkl,ip,jq->pqkl", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    return 3 * np.stack(
        [
            np.stack([np.kron(t["lokr_w1"], w2[:, :, k, m]) for m in range(w2.shape[3])], -1)
            for k in range(w2.shape[2])
        ],
        -2,
    )


def ia3_change(t: dict[str, np.ndarray]) -> np.ndarray:
    """The weight times a factor for each channel of its inputs, less the weight."""
    weight = BASES["conv 2d"].model().get_parameter("0.weight").double().numpy()
    return weight * (t["ia3_l"] - 1)


@pytest.mark.parametrize(
    ("label", "change"),
    [
        ("loha, kernels apart", loha_change),
        ("lokr, kernels apart", lokr_change),
        ("ia3 of inputs", ia3_change),
    ],
)
def test_the_formula_of_a_kernel(
    label: str, change: Callable[[dict[str, np.ndarray]], np.ndarray], tmp_path: Path
) -> None:
    """What a merge adds to the weight of a convolution, by the formula in float64 and PEFT's own tensors:
    float32's last digits apart.
    """
    base = BASES["conv 2d"]
    written(CASES[label][0], base, tmp_path / "theirs")
    merge(stored(base, tmp_path / "base"), [tmp_path / "theirs"], tmp_path / "merged", durable=False)
    before, after = (
        load_file(tmp_path / name / "model.safetensors")["0.weight"].double().numpy()
        for name in ("base", "merged")
    )
    np.testing.assert_allclose(
        after - before, change(factors(tmp_path / "theirs")), atol=3e-7 * max(1, np.abs(after).max())
    )


def test_what_is_no_change_of_the_weight(tmp_path: Path) -> None:
    """Refused with the reason when the model or the base shows it: factors of all channels at a convolution
    of groups.
    """
    base = BASES["groups"]
    written(CASES["ia3 of inputs"][0], base, tmp_path / "theirs")
    with pytest.raises(Unsupported, match="which has those of one group"):
        attach(base.model(), load(tmp_path / "theirs"))
    with pytest.raises(Unsupported, match="which has those of one group"):
        merge(stored(base, tmp_path / "base"), [tmp_path / "theirs"], tmp_path / "merged")


def test_a_kernel_of_one_axis(tmp_path: Path) -> None:
    """PEFT's LoKr with a whole w2 at a ``Conv1d``: its change is not the Kronecker product, by more than half
    of it, unless of each side one of the factors has one row.
    """
    theirs = written(CASES["lokr, whole"][0], BASES["conv 1d"], tmp_path / "theirs")
    t = factors(tmp_path / "theirs")
    product = 3 / 8 * np.einsum("ab,cdk->acbdk", t["lokr_w1"], t["lokr_w2"]).reshape(8, 6, 3)
    change = theirs.base_model.model[0].get_delta_weight("default").detach().double().numpy()
    assert np.abs(change - product).max() > 0.5 * np.abs(product).max()
    with pytest.raises(Unsupported, match="its axes mixed up"):
        load(tmp_path / "theirs")


def test_patches_that_overlap(tmp_path: Path) -> None:
    """PEFT's OFT at a kernel of 3 x 3 gives something else merged than in its forward pass; with no rotation
    it gives something else than the base. Once this fails, OFT of such convolutions can be read.
    """
    base = BASES["conv 2d"]
    fresh = peft.get_peft_model(base.model(), peft.OFTConfig(oft_block_size=2, target_modules=["0"]))
    assert np.abs(outputs(fresh, base) - outputs(base.model(), base)).max() > 0.01
    theirs = written(CASES["oft"][0], base, tmp_path / "theirs")
    assert (
        np.abs(outputs(copy.deepcopy(theirs).merge_and_unload(), base) - outputs(theirs, base)).max() > 0.01
    )
    with pytest.raises(Unsupported, match="kernel of more than one point"):
        attach(base.model(), load(tmp_path / "theirs"))
    with pytest.raises(Unsupported, match="kernel of more than one point"):
        merge(stored(base, tmp_path / "base"), [tmp_path / "theirs"], tmp_path / "merged")


def test_a_batch_norm_that_was_trained_along(tmp_path: Path) -> None:
    """Its running statistics are the adapter's, with its count of batches, a number without axes: attached,
    merged, and in PEFT again.
    """
    base = Base(lambda: nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)), (4, 6, 5, 4), ("conv",))
    theirs = peft.get_peft_model(
        base.model(), peft.LoraConfig(r=3, target_modules=["0"], modules_to_save=["1"])
    ).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        theirs(3 + base.input().float())
        for value in theirs.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=generator) * value.requires_grad)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    wanted, plain = outputs(theirs, base), outputs(base.model(), base)
    (tmp_path / "base").mkdir()
    save_file(base.model().state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    merge(tmp_path / "base", [tmp_path / "theirs"], tmp_path / "merged", durable=False)
    merged = base.model()
    merged.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    convert(tmp_path / "theirs", tmp_path / "pack", to="pack", base=tmp_path / "base")
    for model in (
        attach(base.model(), load(tmp_path / "theirs")),
        merged,
        attach(base.model(), load(tmp_path / "pack")),
        peft.PeftModel.from_pretrained(base.model(), tmp_path / "pack"),
    ):
        require_close(outputs(model, base), wanted, plain)


def test_a_pack_of_our_own_is_of_its_kind(tmp_path: Path) -> None:
    """What PEFT's folder leaves open a pack that names its base does not: it goes to no other kind of
    layer.
    """
    written(CASES["hra"][0], BASES["a point"], tmp_path / "theirs")
    convert(
        tmp_path / "theirs", tmp_path / "pack", to="pack", base=stored(BASES["a point"], tmp_path / "base")
    )
    other = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(4, 6))
    attach(other, load(tmp_path / "theirs"))
    with pytest.raises(Unsupported, match="another kind of layer"):
        attach(
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(4, 6)),
            load(tmp_path / "pack"),
            check_base=False,
        )
    with pytest.raises(SiteNotFound, match="another shape"):
        attach(nn.Sequential(nn.Conv2d(6, 8, 2), nn.ReLU(), nn.Linear(4, 6)), load(tmp_path / "theirs"))


def test_a_kernel_that_would_be_far_larger_than_its_parts(tmp_path: Path) -> None:
    """80 kB that stand for factors of 67 million numbers, and parts that do not go together: refused before
    they are made.
    """
    written(CASES["loha, kernels apart"][0], BASES["conv 2d"], tmp_path / "theirs")
    for core, channels in (((1, 1, 128, 128), 4096), ((2, 1, 3, 3), 6)):
        tensors = {
            f"base_model.model.0.hada_{name}": torch.ones(shape)
            for n in (1, 2)
            for name, shape in ((f"t{n}", core), (f"w{n}_a", (1, 8)), (f"w{n}_b", (1, channels)))
        }
        save_file(tensors, tmp_path / "theirs" / "adapter_model.safetensors")
        with pytest.raises(FormatError, match=r"would be made|do not go together"):
            load(tmp_path / "theirs")


@pytest.mark.parametrize("kernel", ["hada_t1", "hada_t2"])
def test_half_of_the_kernels_of_a_loha_is_refused(kernel: str) -> None:
    """A file with one of the two kernels says nothing about the other."""
    names = (kernel, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    with pytest.raises(ValueError, match=kernel):
        _join({name: np.ones((2, 2), np.float32) for name in names})
