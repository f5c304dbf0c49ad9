"""Adapters behind blocks: every method against its formula in float64, in torch, in packs, in graphs; and
where they go.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers as hf
from torch.nn import functional

import adapterpack
from adapterpack import (
    Bottleneck,
    Compacter,
    LoRA,
    LoReFT,
    Pack,
    Session,
    active,
    adapt,
    attach,
    detach,
    export,
    load,
    save,
)
from adapterpack.adapter_methods import get
from adapterpack.adapter_methods.forms.blocks import ACTIVATIONS, EPSILON
from adapterpack.adapter_methods.loreft import orthonormal
from adapterpack.bundle.manifest import read_bundle
from adapterpack.errors import SiteNotFound, Unsupported
from adapterpack.graph_passes.blocks import wanted_blocks
from adapterpack.graph_passes.emit import ACTIVATION_NODES
from adapterpack.quantizing.packs import quantize_pack
from adapterpack.runtime.padding import pad
from adapterpack.slots.blocks import FIELDS
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.layers.block import AdaptedBlock
from adapterpack.torch_adapters.layers.block_targets import select_blocks
from adapterpack.torch_adapters.layers.layer import AdaptedLayer
from adapterpack.torch_adapters.models.load import load_model
from adapterpack.training.config.config import read_config

Make = Callable[..., Any]
Array = np.ndarray

KINDS = ("bert", "llama")
TASKS = {"bert": "feature-extraction", "llama": "text-generation"}
CONFIGS: dict[str, Any] = {
    "houlsby": Bottleneck.houlsby(reduction=5),
    "pfeiffer": Bottleneck.pfeiffer(reduction=7, bias=False),
    "parallel": Bottleneck.parallel(reduction=3, norm=True),
    "compacter": Compacter(phm_dim=3, reduction=8, phm_rank=2),
    "loreft": LoReFT(r=3),
}
"""Odd ranks, biases and none, a norm, widths that phm_dim does and does not divide; every way of reading."""

PLACES = {
    "bert": {
        "attention": ("attention.output.dense", "attention.self.query"),
        "ffn": ("output.dense", "intermediate.dense"),
        "layer": ("", ""),
    },
    "llama": {"attention": ("self_attn", "self_attn"), "ffn": ("mlp", "mlp"), "layer": ("", "")},
}
"""What gives the output, and what takes the input, of the blocks of a layer."""
REACH = {
    "houlsby": ("attention", "ffn"),
    "compacter": ("attention", "ffn"),
    "pfeiffer": ("layer",),
    "parallel": ("ffn",),
    "loreft": ("layer",),
}
LAYER = {"bert": "encoder.layer", "llama": "model.layers"}
RELATIVE = 2e-5
"""Of the largest output: float32 through two layers differs from float64 by about 1e-6 of it."""


def site(kind: str, number: int, place: str, side: int = 0) -> str:
    """The path of a block's output (or, with side 1, input)."""
    end = PLACES[kind][place][side]
    return f"{LAYER[kind]}.{number}.{end}" if end else f"{LAYER[kind]}.{number}"


def gelu(x: Array) -> Array:
    return functional.gelu(torch.from_numpy(x)).numpy()


def added(name: str, params: Mapping[str, Array], shared: Mapping[str, Array], z: Array) -> Array:
    """What an adapter adds, by the formulas of its paper, in float64."""
    p = {key: value.astype(np.float64) for key, value in {**shared, **params}.items()}
    if name == "loreft":
        Q, T = np.linalg.qr(p["rotation"].T)
        R = (Q * np.sign(np.diag(T))).T
        W = R + p["source"]
        return (z @ W.T + p["bias"] - z @ R.T) @ R
    if name == "compacter":
        width, r = z.shape[-1], p["down_bias"].size
        D = sum(
            np.kron(A, s @ t) for A, s, t in zip(p["rule"], p["down_left"], p["down_right"], strict=True)
        )[:r, :width]
        U = sum(np.kron(A, s @ t) for A, s, t in zip(p["rule"], p["up_left"], p["up_right"], strict=True))[
            :width, :r
        ]
        return gelu(z @ D.T + p["down_bias"]) @ U.T + p["up_bias"]
    if name == "parallel":
        z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + EPSILON) * p[
            "norm_weight"
        ] + p["norm_bias"]
    inner = z @ p["down"].T + p.get("down_bias", 0.0)
    inner = inner / (1 + np.exp(-inner)) if name == "houlsby" else np.maximum(inner, 0)
    return (4.0 if name == "parallel" else 1.0) * (inner @ p["up"].T + p.get("up_bias", 0.0))


def dense(model: Any, kind: str, packs: list[tuple[str, Pack]]) -> Any:
    """A plain float64 model whose blocks have the formulas of ``packs`` behind them, one after the other."""
    inputs: dict[str, Array] = {}

    def see(path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            inputs[path] = (args[0] if args else kwargs["hidden_states"]).detach().numpy()

        return hook

    def change(name: str, pack: Pack, path: str, entry: str | None) -> Callable[..., Any]:
        params = pack.params(path)

        def hook(module: Any, args: Any, output: Any) -> Any:
            h = (output[0] if isinstance(output, tuple) else output).detach().numpy()
            h = torch.from_numpy(
                h + added(name, params, pack.shared(), h if entry is None else inputs[entry])
            )
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return hook

    model = copy.deepcopy(model).double()
    for name, pack in packs:
        for number in range(2):
            for place in REACH[name]:
                path, entry = (
                    site(kind, number, place),
                    site(kind, number, place, 1) if name == "parallel" else None,
                )
                if entry is not None:
                    model.get_submodule(entry).register_forward_pre_hook(see(entry), with_kwargs=True)
                model.get_submodule(path).register_forward_hook(change(name, pack, path, entry))
    return model


@pytest.fixture(scope="module")
def plain(base_of: Make) -> Callable[[str], Any]:
    """Base -> the transformers model as it came."""
    return cache(lambda kind: load_model(get_task(TASKS[kind]), base_of(kind)).eval())


@pytest.fixture(scope="module")
def made(base_of: Make, plain: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Pack]:
    """Base and adapter -> a written pack of random tensors."""

    @cache
    def make(kind: str, name: str) -> Pack:
        model = adapt(copy.deepcopy(plain(kind)), CONFIGS.get(name, LoRA(r=3, targets="all-linear")), name)
        scatter(model)
        return save(model, tmp_path_factory.mktemp(f"blocks-{kind}") / name, base=base_of(kind))

    return make


def scatter(model: Any, size: float = 0.3) -> None:
    """Random values for everything that is trained."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def batch_of(kind: str, lengths: tuple[int, ...] = (11, 4, 7)) -> dict[str, Array]:
    rng = np.random.default_rng(3)
    return pad([list(map(int, rng.integers(3, 96, length))) for length in lengths], 0, left=kind == "llama")


def output_of(model: Any, batch: Mapping[str, Array]) -> Array:
    """The logits, or the hidden states of an encoder, over real positions."""
    inputs = {key: torch.from_numpy(value) for key, value in batch.items()}
    if model.config.model_type == "llama":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        result = model(**inputs)
    return (result.logits if "logits" in result else result.last_hidden_state).numpy()[
        batch["attention_mask"] > 0
    ]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_adapted_model_is_the_formula(kind: str, name: str, plain: Make, made: Make) -> None:
    """In float64 model and formula agree to 1e-10 of the largest output, which the adapter moves by far more;
    off is the base, exactly.
    """
    model, batch = copy.deepcopy(plain(kind)).double(), batch_of(kind)
    before, expected = (
        output_of(model, batch),
        output_of(dense(plain(kind), kind, [(name, made(kind, name))]), batch),
    )
    attach(model, made(kind, name), check_base=False)
    assert np.abs(output_of(model, batch) - expected).max() <= 1e-10 * np.abs(expected).max()
    assert np.abs(expected - before).max() > 1e-2 * np.abs(before).max()
    assert np.array_equal(output_of(active(model, None), batch), before)
    assert np.array_equal(output_of(detach(active(model, name)), batch), before)
    assert not any(isinstance(module, AdaptedBlock) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_direft_is_its_formula() -> None:
    """h + W2^T (W1 h + b) without any orthogonality (arXiv 2404.03592, section 3.2), in float64."""
    config, block = (
        LoReFT(r=3, orthogonal=False, targets=("0",)),
        torch.nn.Sequential(torch.nn.Linear(7, 5)).double(),
    )
    x = np.random.default_rng(1).normal(size=(2, 4, 7))
    h = block(torch.from_numpy(x)).detach().numpy()
    model = adapt(block, config, "a")
    scatter(model)
    W2, W1, b = (model[0]._params("a")[name].astype(np.float64) for name in ("rotation", "source", "bias"))
    assert np.abs(W2 @ W2.T - np.eye(3)).max() > 0.1
    np.testing.assert_allclose(
        model(torch.from_numpy(x)).detach().numpy(), h + (h @ W1.T + b) @ W2, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters_stack_in_order(kind: str, plain: Make, made: Make) -> None:
    """What the first gives goes through the second; the other order gives something else."""
    model, batch = copy.deepcopy(plain(kind)).double(), batch_of(kind)
    pair = [("pfeiffer", made(kind, "pfeiffer")), ("loreft", made(kind, "loreft"))]
    for name, pack in (*pair, ("parallel", made(kind, "parallel"))):
        attach(model, pack, name, check_base=False)
    found = []
    for order in (pair, pair[::-1]):
        expected = output_of(dense(plain(kind), kind, order), batch)
        found.append(output_of(active(model, [name for name, _ in order]), batch))
        assert np.abs(found[-1] - expected).max() <= 1e-10 * np.abs(expected).max()
    assert np.abs(found[0] - found[1]).max() > 1e-3 * np.abs(found[0]).max()


@pytest.mark.parametrize("first", ["lora", "parallel"])
def test_a_weight_method_at_the_same_layer_stays_inside(first: str, plain: Make, made: Make) -> None:
    """Whichever comes first, the block's adapter sees the adapted layer's output, and reads the input of an
    adapted layer.
    """
    model, batch = copy.deepcopy(plain("bert")).double(), batch_of("bert")
    for name in (first, "parallel" if first == "lora" else "lora"):
        attach(model, made("bert", name), check_base=False)
    wrapper = model.encoder.layer[0].output.dense
    assert isinstance(wrapper, AdaptedBlock) and isinstance(wrapper._base, AdaptedLayer)
    merged = copy.deepcopy(plain("bert")).double()
    with torch.no_grad():
        for adapter in made("bert", "lora").adapters():
            A, B = (torch.tensor(adapter.params[key]).double() for key in ("lora_A", "lora_B"))
            merged.get_submodule(adapter.site.path).weight += adapter.config.scale * (B @ A)
    expected = output_of(dense(merged, "bert", [("parallel", made("bert", "parallel"))]), batch)
    found = output_of(active(model, ["lora", "parallel"]), batch)
    assert np.abs(found - expected).max() <= 1e-10 * np.abs(expected).max()
    detach(model, "lora")
    assert isinstance(model.encoder.layer[0].output.dense, AdaptedBlock)
    assert isinstance(model.encoder.layer[0].intermediate.dense, torch.nn.Linear)
    alone = output_of(dense(plain("bert"), "bert", [("parallel", made("bert", "parallel"))]), batch)
    assert np.abs(output_of(active(model, "parallel"), batch) - alone).max() <= 1e-10 * np.abs(alone).max()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_comes_back_and_is_valid(kind: str, name: str, base_of: Make, plain: Make, made: Make) -> None:
    """Read from disk it gives the bits that were saved; the manifest says blocks and their width; PEFT has no
    form of it.
    """
    pack = load(made(kind, name).path)
    report = adapterpack.validate(pack.path, base=base_of(kind))
    assert (report.state, list(report.findings)) == ("valid", [])
    width = {"bert": 24, "llama": 32}[kind]
    groups = [group for group in pack.manifest.groups if group.role == "adapter"]
    assert {group.path for group in groups} == {
        site(kind, number, place) for number in range(2) for place in REACH[name]
    }
    assert {(group.kind, group.in_features, group.out_features) for group in groups} == {
        ("block", width, width)
    }
    assert not (pack.path / "adapter_config.json").exists()
    models = [
        attach(copy.deepcopy(plain(kind)), one, "it", check_base=False) for one in (made(kind, name), pack)
    ]
    assert np.array_equal(*(output_of(model, batch_of(kind)) for model in models))
    assert attach(copy.deepcopy(plain(kind)), pack) is not None, "the base is the one that it names"


def test_rules_are_stored_once(made: Make) -> None:
    """Compacter's shared rules are one tensor, whatever the number of sites."""
    pack = made("bert", "compacter")
    assert sum("rule" in name for name in pack.tensors) == 1
    assert pack.shared()["rule"].shape == (3, 3, 3)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_and_leaves_the_base(kind: str, name: str, plain: Make) -> None:
    """Adam halves the loss of a fresh adapter against what another adapter of its kind gives; no bit of the
    base moves.
    """
    model, other = (adapt(copy.deepcopy(plain(kind)), CONFIGS[name]) for _ in range(2))
    scatter(other, 0.2)
    batch = {key: torch.from_numpy(value) for key, value in batch_of(kind, (5, 5)).items()}

    target = other(**batch)[0].detach()
    before = {key: value.clone() for key, value in model.state_dict().items() if "adapter:" not in key}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = ((model(**batch)[0] - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(
    kind: str, name: str, plain: Make, made: Make
) -> None:
    """Blocks that are run again in the backward pass, with an input that is taken up elsewhere, give the same
    numbers.
    """
    found = []
    for again in (False, True):
        model = attach(copy.deepcopy(plain(kind)), made(kind, name), check_base=False).train()
        for wrapper in (module for module in model.modules() if isinstance(module, AdaptedBlock)):
            wrapper._trainable(name)
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        output = model(**{key: torch.from_numpy(value) for key, value in batch_of(kind).items()})[0]
        output.square().mean().backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    assert all(torch.allclose(value, found[1][key], rtol=1e-5, atol=1e-7) for key, value in found[0].items())


def test_half_precision_keeps_the_dtype(plain: Make, made: Make) -> None:
    """A bfloat16 block stays one; its adapters are computed in float32, and only the sum is rounded, to half
    a bit in 8.
    """
    model = attach(copy.deepcopy(plain("bert")).bfloat16(), made("bert", "pfeiffer"), check_base=False)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    block = model.encoder.layer[0]
    block.register_forward_hook(lambda module, args, output: seen.append((module._base(*args), output)))
    with torch.no_grad():
        model(**{key: torch.from_numpy(value) for key, value in batch_of("bert", (5, 5)).items()})
    h, found = (value.double().numpy() for value in seen[0])
    assert seen[0][1].dtype == torch.bfloat16
    expected = h + added("pfeiffer", made("bert", "pfeiffer").params("encoder.layer.0"), {}, h)
    assert (np.abs(found - expected) <= 2.0**-8 * np.abs(expected) + 1e-5).all()


def test_a_copy_of_an_adapted_model_reads_its_own_input(plain: Make, made: Make) -> None:
    """A deep copy watches its own modules: changing the copy's weights changes nothing in the original."""
    model, batch = (
        attach(copy.deepcopy(plain("bert")), made("bert", "parallel"), check_base=False),
        batch_of("bert"),
    )
    before, twin = output_of(model, batch), copy.deepcopy(model)
    assert np.array_equal(output_of(twin, batch), before)
    with torch.no_grad():
        twin.embeddings.word_embeddings.weight.mul_(2)
    changed = output_of(twin, batch)
    fresh = copy.deepcopy(plain("bert"))
    with torch.no_grad():
        fresh.embeddings.word_embeddings.weight.mul_(2)
    assert np.array_equal(
        changed, output_of(attach(fresh, made("bert", "parallel"), check_base=False), batch)
    )
    assert np.array_equal(output_of(model, batch), before)


@pytest.fixture(scope="module")
def bundles(
    base_of: Make, made: Make, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """Base and mode -> one bundle with every adapter but LoReFT, which a bank loads later, and a LoRA on
    every linear layer.
    """

    @cache
    def make(kind: str, mode: str) -> Path:
        folder = tmp_path_factory.mktemp("bundles") / f"{kind}-{mode}"
        names = [name for name in CONFIGS if name != "loreft" or mode == "inputs"]
        packs = [made(kind, name) for name in (*names, "lora")]
        if mode == "bank":
            packs.append(made(kind, "loreft").renamed("another"))
        export(base_of(kind), packs, folder, mode=mode, **({"slots": 9} if mode == "bank" else {}))
        return folder

    return make


@pytest.mark.sampled(4)
@pytest.mark.parametrize("mode", ["inputs", "bank"])
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_equal_the_formula(kind: str, mode: str, bundles: Make, plain: Make, made: Make) -> None:
    """Every adapter in one graph, and the base: ragged and padded, one token, as many rows as features; and
    all in one batch.
    """
    session = Session(bundles(kind, mode), "cpu")
    if mode == "bank":
        session.load(made(kind, "loreft"))
    models = {
        None: copy.deepcopy(plain(kind)).double(),
        **{name: dense(plain(kind), kind, [(name, made(kind, name))]) for name in CONFIGS},
    }
    key = {"bert": "last_hidden_state", "llama": "logits"}[kind]
    for lengths in ((11, 4, 7), (1,), (3,) * {"bert": 24, "llama": 32}[kind]):
        batch = batch_of(kind, lengths)
        expected = {name: output_of(model, batch) for name, model in models.items()}
        for name, values in expected.items():
            found = session.run(batch, name)[key][batch["attention_mask"] > 0]
            assert np.abs(found - values).max() <= RELATIVE * np.abs(values).max(), name
    batch = batch_of(kind, (6, 3, 5, 1, 4, 6))
    names = [None, *CONFIGS]
    mixed = session.run(batch, names)[key]
    for row, name in enumerate(names):
        one = {field: value[row : row + 1] for field, value in batch.items()}
        values = output_of(models[name], one)
        assert (
            np.abs(mixed[row][one["attention_mask"][0] > 0] - values).max() <= RELATIVE * np.abs(values).max()
        ), name


def test_a_graph_has_one_branch_for_each_way(bundles: Make) -> None:
    """Site maps name the blocks, the values that they read and the branches of the packs, no more; sums fused
    into norms come apart.
    """
    sites = read_bundle(bundles("llama", "bank")).sites
    mlp = sites["model.layers.0.mlp"]
    assert {FIELDS[field][0] for field in mlp.fields} == {"output_silu", "input_relu_normed", "output_gelu"}
    assert (mlp.weight, mlp.bias, mlp.rank, mlp.in_features, mlp.out_features) == ("", None, 3, 32, 32)
    assert mlp.entry is not None and "post_attention_layernorm" in mlp.entry
    assert dict(mlp.ranks) == {"output_silu": 6, "input_relu_normed": 10, "output_gelu": 6}, (
        "each as wide as its packs need"
    )
    assert read_bundle(bundles("llama", "bank")).max_rank == 3, (
        "the rank of the LoRA: a wide block pads no layer"
    )
    assert sites["model.layers.0.mlp.down_proj"].entry is None
    assert {FIELDS[field][0] for field in sites["model.layers.1"].fields} == {
        "output_relu",
        "output_identity",
    }
    assert set(read_bundle(bundles("bert", "bank")).sites["encoder.layer.0.output.dense"].fields) >= {
        "down",
        "up",
        "output_silu_down",
    }
    assert adapterpack.validate(bundles("llama", "bank")).state == "valid"
    assert not [
        node for node in ir.load(bundles("llama", "bank") / "model.onnx").graph if "Skip" in node.op_type
    ]


def test_a_branch_that_reads_what_another_changed(base_of: Make, plain: Make, tmp_path: Path) -> None:
    """Beside whole layers, the input of one is the changed output of the one before, in the graph as in the
    model.
    """
    model = adapt(
        copy.deepcopy(plain("llama")), Bottleneck(targets="all-layers", source="input", reduction=6), "beside"
    )
    scatter(model, 1.0)
    save(model, tmp_path / "beside", base=base_of("llama"))
    export(base_of("llama"), [tmp_path / "beside"], tmp_path / "bundle", mode="bank")
    batch = batch_of("llama")
    found = Session(tmp_path / "bundle", "cpu").run(batch, "beside")["logits"][batch["attention_mask"] > 0]
    expected = output_of(model.double(), batch)
    assert np.abs(found - expected).max() <= RELATIVE * np.abs(expected).max()


def test_a_decoder_with_other_norms(tmp_path: Path) -> None:
    """GPT-2, whose sums the frontend fuses into LayerNormalization."""
    hf.set_seed(2)
    config = hf.GPT2Config(
        vocab_size=96, n_layer=2, n_head=2, n_embd=8, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    model = adapt(hf.GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval(), LoReFT(r=2), "it")
    scatter(model, 1.0)
    save(model, tmp_path / "it", base=tmp_path / "base")
    bundle = export(
        tmp_path / "base", [tmp_path / "it"], tmp_path / "bundle", mode="bank", task="text-generation"
    )
    assert set(bundle.sites) == {"transformer.h.0", "transformer.h.1"}
    batch = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), np.int64)}
    found = Session(tmp_path / "bundle", "cpu").run(batch, "it")["logits"][0]
    expected = output_of(model.double(), batch)
    assert np.abs(found - expected).max() <= RELATIVE * np.abs(expected).max()


def test_what_a_bank_has_no_room_for(bundles: Make, base_of: Make, plain: Make) -> None:
    """A pack that is wider than its branch is refused when it is to run there, and one that needs a branch
    that the graph has not when it is loaded.
    """
    session = Session(bundles("llama", "bank"), "cpu")
    for name, config, words in (
        ("wide", Bottleneck.houlsby(reduction=2), "does not fit its slot"),
        ("other", Bottleneck(act="tanh"), "no slot for a part"),
    ):
        pack = save(adapt(copy.deepcopy(plain("llama")), config, name), None, base=base_of("llama"))
        with pytest.raises(Unsupported, match=words):
            session.run(batch_of("llama"), session.load(pack))


def test_a_quantized_bundle_keeps_its_blocks(bundles: Make, plain: Make, made: Make, tmp_path: Path) -> None:
    """int4 weights leave the branches float: rows move as they did, to a quarter of the change."""
    adapterpack.quantize(bundles("llama", "bank"), out=tmp_path / "small", scheme="int4")
    session, batch = Session(tmp_path / "small", "cpu"), batch_of("llama")
    real = batch["attention_mask"] > 0
    for name in ("houlsby", "parallel"):
        small = (session.run(batch, name)["logits"] - session.run(batch)["logits"])[real]
        exact = output_of(dense(plain("llama"), "llama", [(name, made("llama", name))]), batch) - output_of(
            plain("llama"), batch
        )
        assert np.linalg.norm(small - exact) < 0.5 * np.linalg.norm(exact), name


def test_what_needs_a_weight_is_refused(base_of: Make, made: Make, tmp_path: Path) -> None:
    """Merge, fold, compose and int8 name the reason and leave nothing behind."""
    pack = made("llama", "houlsby")
    with pytest.raises(Unsupported, match="'bottleneck' does not act on weights"):
        adapterpack.merge(base_of("llama"), [pack], tmp_path / "merged")
    with pytest.raises(Unsupported, match="'bottleneck' does not act on weights"):
        export(base_of("llama"), [pack], tmp_path / "folded", mode="folded")
    with pytest.raises(Unsupported, match="method bottleneck cannot be combined"):
        adapterpack.compose([pack, pack.renamed("two")], rule="linear", out=tmp_path / "composed")
    with pytest.raises(Unsupported, match="tensors of the method bottleneck stay float"):
        quantize_pack(pack)
    assert not list(tmp_path.iterdir())


def test_two_packs_that_read_other_modules_at_one_block(base_of: Make, plain: Make, made: Make) -> None:
    """One graph has one input at a block; the parity run would find it, but the reason is told before."""
    entry = "encoder.layer.0.attention.output.dense"
    model = adapt(
        copy.deepcopy(plain("bert")), Bottleneck(targets=("layer.0.output.dense",), source=entry), "other"
    )
    other = save(model, None, base=base_of("bert"))
    assert other.config_at(other.manifest.groups[0]).source == entry
    with pytest.raises(Unsupported, match="inputs of different modules"):
        wanted_blocks([made("bert", "parallel"), other])


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 12}
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, str]]] = {
    "bert": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(vocab_size=9, **SMALL)),
        {
            "layer": "bert.encoder.layer.1",
            "attention": "bert.encoder.layer.1.attention.output.dense",
            "ffn": "bert.encoder.layer.1.output.dense",
        },
    ),
    "roberta": (
        lambda: hf.RobertaModel(hf.RobertaConfig(vocab_size=9, **SMALL)),
        {
            "layer": "encoder.layer.1",
            "attention": "encoder.layer.1.attention.output.dense",
            "ffn": "encoder.layer.1.output.dense",
        },
    ),
    "distilbert": (
        lambda: hf.DistilBertModel(
            hf.DistilBertConfig(vocab_size=9, n_layers=2, n_heads=2, dim=8, hidden_dim=12)
        ),
        {
            "layer": "transformer.layer.1",
            "attention": "transformer.layer.1.attention",
            "ffn": "transformer.layer.1.ffn",
        },
    ),
    "qwen2": (
        lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(vocab_size=9, num_key_value_heads=1, **SMALL)),
        {"layer": "model.layers.1", "attention": "model.layers.1.self_attn", "ffn": "model.layers.1.mlp"},
    ),
    "mistral": (
        lambda: hf.MistralForCausalLM(hf.MistralConfig(vocab_size=9, num_key_value_heads=1, **SMALL)),
        {"layer": "model.layers.1", "attention": "model.layers.1.self_attn", "ffn": "model.layers.1.mlp"},
    ),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=9, n_layer=2, n_head=2, n_embd=8, bos_token_id=1, eos_token_id=2)
        ),
        {"layer": "transformer.h.1", "attention": "transformer.h.1.attn", "ffn": "transformer.h.1.mlp"},
    ),
    "opt": (
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                vocab_size=9,
                num_hidden_layers=2,
                num_attention_heads=2,
                hidden_size=8,
                ffn_dim=12,
                word_embed_proj_dim=8,
            )
        ),
        {
            "layer": "model.decoder.layers.1",
            "attention": "model.decoder.layers.1.self_attn",
            "ffn": "model.decoder.layers.1.fc2",
        },
    ),
    "vit": (
        lambda: hf.ViTModel(hf.ViTConfig(image_size=8, patch_size=4, **SMALL)),
        {"layer": "layers.1", "attention": "layers.1.attention", "ffn": "layers.1.mlp"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_where_they_go(family: str) -> None:
    """The words find the blocks of a family by the modules of its layers, and adapters there run, change the
    output and get gradients.
    """
    build, expected = FAMILIES[family]
    hf.set_seed(1)
    model = build().eval()
    words = {
        "all-layers": ("layer",),
        "all-attention": ("attention",),
        "all-ffn": ("ffn",),
        "all-blocks": ("attention", "ffn"),
    }
    for word, places in words.items():
        found = [one.path for one in select_blocks(model, word, get("bottleneck").traits)]
        assert found[len(found) // 2 :] == [expected[place] for place in places] and len(found) == 2 * len(
            places
        )
    inputs = (
        {"pixel_values": torch.randn(2, 3, 8, 8)}
        if family == "vit"
        else {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}
    )
    before = model(**inputs)[0].detach()
    for config in (Bottleneck.houlsby(reduction=2), Bottleneck.parallel()):
        adapted = adapt(copy.deepcopy(model), config)
        assert torch.equal(adapted(**inputs)[0], before)
        scatter(adapted, 1.0)
        output = adapted(**inputs)[0]
        assert (output - before).abs().max() > 1e-4
        output.square().sum().backward()
        assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_places_that_are_refused(plain: Make) -> None:
    """Names that match nothing, models of no known layout, widths that nobody knows, modules that are trained
    whole.
    """
    model = copy.deepcopy(plain("bert"))
    with pytest.raises(SiteNotFound, match="no such block"):
        adapt(model, Bottleneck(targets=("mlp",)))
    with pytest.raises(SiteNotFound, match="no layers of a known layout"):
        adapt(torch.nn.Sequential(torch.nn.Linear(3, 3)), Bottleneck())
    with pytest.raises(Unsupported, match="width of this block's output is not known"):
        adapt(torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(3, 3))), Bottleneck(targets=("0",)))
    with pytest.raises(Unsupported, match="adapted or trained whole"):
        adapt(model, Bottleneck(targets=("pooler.dense",), modules_to_save=("pooler",)))
    with pytest.raises(SiteNotFound, match="no module of which to read the input"):
        adapt(model, Bottleneck(targets=("layer.0.output.dense",), source="nowhere"))
    beside = adapt(model, Bottleneck(targets=("1.intermediate.dense",), source="input"))
    with pytest.raises(Unsupported, match="as wide as the output"):
        output_of(beside, batch_of("bert"))
    detach(model)
    assert not any(isinstance(module, AdaptedBlock) for module in model.modules()), (
        "a refusal leaves the model as it was"
    )


def test_torchs_own_encoder_takes_no_shortcut() -> None:
    """nn.TransformerEncoderLayer would read the weights past the adapter in its fused path."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)).eval()
    x = torch.randn(2, 3, 8)
    adapt(model, Bottleneck(targets=("linear2",), reduction=2))
    scatter(model, 1.0)
    with torch.no_grad():
        assert (model(x) - active(model, None)(x)).abs().max() > 1e-2


def test_activations_are_torchs() -> None:
    """Each activation on numpy and on torch is torch's own function, within 1e-14 in float64, and maps zero
    to zero; graphs know all.
    """
    theirs = {
        "identity": lambda x: x,
        "relu": functional.relu,
        "tanh": torch.tanh,
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }
    assert theirs.keys() == ACTIVATIONS.keys() == ACTIVATION_NODES.keys()
    x = torch.cat([torch.linspace(-9, 9, 91), torch.tensor([0.0, 700.0, -700.0])]).double()
    for name, function in theirs.items():
        for found in (torch.from_numpy(ACTIVATIONS[name](x.numpy())), ACTIVATIONS[name](x)):
            assert torch.allclose(found, function(x), rtol=1e-13, atol=1e-14), name
            assert found[-3] == 0, name


def test_the_schema_knows_every_field() -> None:
    """The bundle's schema allows the fields that the table of branches makes, and no others of the kind."""
    schema = json.loads((Path(__file__).parent.parent / "schemas" / "bundle.v1.json").read_text("utf-8"))
    known = schema["$defs"]["MappedSite"]["properties"]["fields"]["items"]["pattern"]
    assert all(re.fullmatch(known, field) for field in FIELDS)
    assert not re.fullmatch(known, "output_swish_down")


def test_rows_of_a_rotation_are_orthonormal() -> None:
    """R R^T = I to 1e-14, and gradients through it are those of finite differences."""
    V = torch.tensor(np.random.default_rng(0).normal(size=(3, 7)), requires_grad=True)
    R = orthonormal(V)
    assert torch.allclose(R @ R.T, torch.eye(3).double(), atol=1e-13)
    assert torch.autograd.gradcheck(orthonormal, (V,))


def test_a_training_config_names_the_method() -> None:
    """A configuration says the method and its fields; an activation may have AdapterHub's name."""
    values = {
        "model_name_or_path": "base",
        "train_file": "rows.jsonl",
        "output_dir": "out",
        "method": "bottleneck",
        "targets": "all-blocks",
        "act": "swish",
        "reduction": 8,
    }
    (config,), _ = read_config(values)
    assert config.method_config == Bottleneck.houlsby(reduction=8)
