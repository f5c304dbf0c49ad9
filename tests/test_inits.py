"""Initialisations: each against its formula in float64, the base untouched, and PEFT's result of the same
idea beside ours.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from adapterpack import LoRA, adapt, attach, detach, load, save
from adapterpack.adapter_methods import INITS, Calibration, Site
from adapterpack.adapter_methods.inits.loftq import nf4
from adapterpack.errors import AdapterpackError, ConfigError
from adapterpack.torch_adapters.save import parts_of

pytestmark = pytest.mark.fast
OUT, WIDE = 14, 23
RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(OUT, WIDE))
INPUTS = RNG.normal(size=(200, WIDE)) @ np.diag(np.linspace(3, 0.1, WIDE))
MOMENT = INPUTS.T @ INPUTS / len(INPUTS)
GRADIENT = RNG.normal(size=(OUT, WIDE))
SITE = Site("layer", WIDE, OUT, weight=WEIGHT, calibration=Calibration(MOMENT, GRADIENT))


def start(name: str, r: int, scale: float = 1.5, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    init = INITS[name]
    A, B = init.make(r, scale, SITE, {**init.options, **options}, np.random.default_rng(1))
    assert (A.shape, B.shape, A.dtype, B.dtype) == ((r, WIDE), (OUT, r), np.float32, np.float32)
    return A.astype(np.float64), B.astype(np.float64)


def best(matrix: np.ndarray, r: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix)
    return u[:, :r] * s[:r] @ vt[:r]


@pytest.mark.parametrize("scale", [1.5, -0.25])
@pytest.mark.parametrize("iterations", [0, 6])
def test_pissa_is_the_principal_part(scale: float, iterations: int) -> None:
    """s B A = U_r S_r V_r^T; by random projection nearly so. float32 rounds factors of size 3 at 1e-7, sums
    of three of them at 1e-6.
    """
    A, B = start("pissa", 3, scale, iterations=iterations)
    np.testing.assert_allclose(scale * B @ A, best(WEIGHT, 3), atol=5e-6 if iterations == 0 else 5e-2)
    np.testing.assert_allclose(A @ A.T, np.diag(np.diag(A @ A.T)), atol=1e-5)  # the directions are orthogonal


def test_olora_is_the_qr_decomposition() -> None:
    """B has orthonormal columns and B A = Q_r R_r: the projection of W on the span of its first r columns."""
    A, B = start("olora", 4)
    np.testing.assert_allclose(B.T @ B, np.eye(4), atol=1e-6)
    first = WEIGHT[:, :4]
    np.testing.assert_allclose(B @ A, first @ np.linalg.lstsq(first, WEIGHT, rcond=None)[0], atol=5e-6)


def test_mica_is_the_smallest_directions() -> None:
    """A is zero; W^T B has the r smallest singular values of W."""
    A, B = start("mica", 3)
    assert not A.any()
    np.testing.assert_allclose(np.linalg.norm(WEIGHT.T @ B, axis=0), np.linalg.svd(WEIGHT)[1][-3:], atol=1e-5)
    assert LoRA(init="mica").frozen >= {"lora_B"}


def test_loftq_is_what_quantization_loses() -> None:
    """After one step s B A is the best rank-r part of W - nf4(W); more steps leave no more than one does of W
    - nf4(W - s B A) - s B A.
    """
    A, B = start("loftq", 3)
    np.testing.assert_allclose(1.5 * B @ A, best(WEIGHT - nf4(WEIGHT), 3), atol=5e-6)
    lost = []
    for iterations in (1, 5):
        A, B = start("loftq", 3, iterations=iterations)
        lost.append(np.linalg.norm(WEIGHT - nf4(WEIGHT - 1.5 * B @ A) - 1.5 * B @ A))
    assert lost[1] <= lost[0] < np.linalg.norm(WEIGHT - nf4(WEIGHT))


def test_nf4_rounds_to_the_nearest_value_of_its_block() -> None:
    """Every value goes to the nearest of the sixteen, times its block's largest magnitude; zeros stay; an odd
    end is a block of its own.
    """
    from adapterpack.adapter_methods.inits.loftq import NF4

    values = RNG.normal(size=130)
    rounded = nf4(values)
    for begin in range(0, 130, 64):
        block = values[begin : begin + 64]
        grid = NF4 * np.abs(block).max()
        np.testing.assert_allclose(
            rounded[begin : begin + 64], grid[np.abs(block[:, None] - grid).argmin(axis=1)], atol=1e-12
        )
    assert not nf4(np.zeros((3, 5))).any()


def test_eva_is_the_principal_directions_of_the_inputs() -> None:
    """A's rows are the right singular vectors of X; B is zero."""
    A, B = start("eva", 4)
    assert not B.any()
    # the span, whatever the signs
    np.testing.assert_allclose(A.T @ A, (v := np.linalg.svd(INPUTS)[2][:4]).T @ v, atol=1e-5)


def test_eva_shares_ranks_out() -> None:
    """The sum stays; a layer whose inputs lie on a line gets one, one with many equal directions more, at
    most rho times as many.
    """
    line, many = np.zeros((WIDE, WIDE)), np.eye(WIDE)
    line[0, 0] = 1
    sites = [
        Site("line", WIDE, OUT, calibration=Calibration(line)),
        Site("many", WIDE, OUT, calibration=Calibration(many)),
    ]
    cfg = LoRA(r=4, init="eva", init_options={"rho": 1.75})
    from adapterpack.adapter_methods import get

    plan = get("lora").training.allocate
    assert plan is not None
    planned = plan(cfg, sites)
    ranks = {site.path: planned.at(site.path).r for site in sites}
    assert ranks == {"line": 1, "many": 7}
    assert {planned.at(site.path).scale for site in sites} == {cfg.scale}
    assert plan(LoRA(r=4, init="eva", init_options={"rho": 1.0}), sites).rank_pattern == {}


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_is_the_weight_seen_through_the_inputs(mode: str) -> None:
    """s B A C = the r largest (or smallest) singular directions of W C, with the damped covariance C of the
    inputs.
    """
    A, B = start("corda", 3, mode=mode)
    damped = MOMENT + 0.01 * np.trace(MOMENT) / WIDE * np.eye(WIDE)
    u, s, vt = np.linalg.svd(WEIGHT @ damped, full_matrices=False)
    part = slice(0, 3) if mode == "ipm" else slice(OUT - 3, OUT)
    # entries up to 100 in float32
    np.testing.assert_allclose(1.5 * B @ A @ damped, u[:, part] * s[part] @ vt[part], atol=1e-4)


def test_lora_ga_follows_the_gradient() -> None:
    """B spans the first r left singular directions of G, A the next r right ones, both of length out^(1/4) /
    sqrt(gamma).
    """
    A, B = start("lora_ga", 3, gamma=4.0)
    u, _, vt = np.linalg.svd(GRADIENT)
    k = OUT**0.25 / 2
    np.testing.assert_allclose(np.abs(B), np.abs(k * u[:, :3]), atol=1e-6)
    np.testing.assert_allclose(np.abs(A), np.abs(k * vt[3:6]), atol=1e-6)


def test_plain_inits() -> None:
    """Deviations as stated; orthogonal factors cancel but are not zero."""
    A, B = start("gaussian", 8)
    assert not B.any() and abs(A.std() - 1 / 8) < 0.02
    A, B = start("zeros", 8)
    assert not A.any() and 0.3 < np.abs(B).max() <= 8**-0.5
    A, B = start("orthogonal", 6)
    assert np.abs(B @ A).max() < 1e-8 and np.abs(A).max() > 0.01 < np.abs(B).max()
    with pytest.raises(ValueError, match="even"):
        start("orthogonal", 3)


def test_a_rank_wider_than_the_layer() -> None:
    """Directions that a narrow layer does not have are zeros."""
    narrow = Site(
        "narrow",
        3,
        5,
        weight=RNG.normal(size=(5, 3)),
        calibration=Calibration(np.eye(3), RNG.normal(size=(5, 3))),
    )
    for name, init in INITS.items():
        A, B = init.make(8, 1.0, narrow, init.options, np.random.default_rng(0))
        assert (A.shape, B.shape) == ((8, 3), (5, 8)), name
        assert np.isfinite(A).all() and np.isfinite(B).all()


def test_configs_that_no_init_has() -> None:
    """An unknown init names the nearest, an unknown option the known ones."""
    with pytest.raises(AdapterpackError, match="pissa"):
        LoRA(init="pisa")
    with pytest.raises(ValueError, match="iterations"):
        LoRA(init="pissa", init_options={"steps": 3})


def llama(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def batches(vocabulary: int, labels: bool) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for rows, length in ((2, 7), (3, 5)):
        ids = torch.randint(1, vocabulary, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 3:] = 0
        made.append(
            {
                "input_ids": ids,
                "attention_mask": mask,
                **({"labels": ids.masked_fill(mask == 0, -100)} if labels else {}),
            }
        )
    return made


@pytest.mark.parametrize("name", INITS)
def test_in_a_model_the_base_is_untouched_and_the_pack_is_plain(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Fresh: the very outputs of the base, on and off, and its very weights. Trained, packed, loaded,
    attached: what was trained; and PEFT, which knows nothing of the start, gives the same logits from the
    same folder.
    """
    base, model = llama(tiny_llama), llama(tiny_llama)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    needs = INITS[name].needs
    data = batches(model.config.vocab_size, "gradient" in needs)
    x = data[0]["input_ids"]
    adapt(model, LoRA(r=4, alpha=6, targets=("q_proj", "down_proj"), init=name), "a", data=data)
    with torch.no_grad():
        expected = base(input_ids=x).logits
        assert torch.equal(model(input_ids=x).logits, expected)
    trained = [value for value in model.parameters() if value.requires_grad]
    for value in trained:
        value.data += 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        adapted = model(input_ids=x).logits
    assert (adapted - expected).abs().max() > 1e-3
    pack = save(model, tmp_path / "a", base=tiny_llama)
    assert set(pack.manifest.config) == {"r", "alpha", "use_rslora", "dropout"}
    assert {group.rank for group in pack.manifest.groups} <= (
        {8} if INITS[name].cancels else set(range(1, 9))
    )
    detach(model)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(input_ids=x).logits, expected)
        again = attach(llama(tiny_llama), load(tmp_path / "a"))(input_ids=x).logits
        peft = PeftModel.from_pretrained(llama(tiny_llama), tmp_path / "a").eval()(input_ids=x).logits
    torch.testing.assert_close(again, adapted, rtol=0, atol=1e-5)  # float32 logits of size 1, two layers
    torch.testing.assert_close(peft, adapted, rtol=0, atol=1e-5)


def test_what_is_measured(tiny_llama: Path) -> None:
    """EVA's A spans what numpy finds in the recorded inputs without padding; LoRA-GA's B what autograd finds
    where the weight trains.
    """
    model = llama(tiny_llama)
    data = batches(model.config.vocab_size, True)
    path = "model.layers.1.mlp.down_proj"
    layer, inputs = model.get_submodule(path), []
    handle = layer.register_forward_hook(lambda module, args, output: inputs.append(args[0].detach()))
    model.requires_grad_(False)
    layer.weight.requires_grad_(True)
    for batch in data:
        model(**batch).loss.backward()
    handle.remove()
    gradient = layer.weight.grad.double().numpy()
    kept = np.concatenate(
        [x[batch["attention_mask"].bool()].double().numpy() for x, batch in zip(inputs, data, strict=True)]
    )
    eva = copy.deepcopy(model)
    adapt(eva, LoRA(r=3, targets=path, init="eva", init_options={"rho": 1.0}), data=data)
    ((_, params),) = parts_of(eva, "default").adapters.values()
    v = np.linalg.svd(kept)[2][:3]
    np.testing.assert_allclose(params["lora_A"].T @ params["lora_A"], v.T @ v, atol=1e-4)
    adapt(model, LoRA(r=3, targets=path, init="lora_ga"), data=data)
    ((_, params),) = parts_of(model, "default").adapters.values()
    u = np.linalg.svd(gradient)[0][:, :3]
    start_B = params["lora_B"][:, 3:]
    unit = start_B / np.linalg.norm(start_B, axis=0)
    np.testing.assert_allclose(np.abs(unit.T @ u), np.eye(3), atol=1e-3)


def test_data_are_asked_for(tiny_llama: Path) -> None:
    """An init that looks at data says so, as does one that finds no labels; the model is left as it was."""
    model = llama(tiny_llama)
    with pytest.raises(ConfigError, match="sample data"):
        adapt(model, LoRA(init="eva"))
    with pytest.raises(ConfigError, match="labels"):
        adapt(model, LoRA(init="lora_ga"), data=batches(model.config.vocab_size, False))
    assert not any("adapter" in key for key in model.state_dict())


@pytest.mark.parametrize(("name", "theirs"), [("pissa", "pissa"), ("olora", "olora"), ("mica", "mica")])
def test_the_start_is_the_one_that_peft_takes(name: str, theirs: str) -> None:
    """B A of PEFT's fresh adapter, which it takes off the base's own weight, is ours (MiCA's B up to signs)
    within float32's rounding.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDE, OUT))
    site = Site("0", WIDE, OUT, weight=model[0].weight.detach().numpy())
    init, cfg = INITS[name], LoRA(r=4, alpha=6)
    A, B = init.make(4, cfg.scale, site, init.options, np.random.default_rng(0))
    layer = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=6, init_lora_weights=theirs, target_modules=["0"])
    ).base_model.model[0]
    peft_A, peft_B = (getattr(layer, key)["default"].weight.detach().numpy() for key in ("lora_A", "lora_B"))
    np.testing.assert_allclose(B @ A, peft_B @ peft_A, atol=1e-5)
    np.testing.assert_allclose(B @ B.T, peft_B @ peft_B.T, atol=1e-5)
