"""Methods that read the weight on quantized bases: they are given what the layer computes with, or are
refused by name.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from noise import shake as shaken
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from adapterpack import OFT, DoRA, HiRA, KaSA, LoRA, adapt, attach, detach, save, train, validate
from adapterpack.adapter_methods import Site, SiteConfig
from adapterpack.errors import BaseMismatch, Unsupported
from adapterpack.torch_adapters.layers.weights import weight_of
from adapterpack.torch_adapters.layers.wrapper import base_modules, innermost

pytestmark = pytest.mark.fast

IDS = torch.tensor([[5, 17, 40, 8, 61, 33, 7], [9, 9, 50, 2, 11, 72, 90]])
TARGETS = ("q_proj", "up_proj", "down_proj")
CONFIGS: dict[str, SiteConfig] = {
    "dora": DoRA(r=3, targets=TARGETS),
    "hira": HiRA(r=3, targets=TARGETS),
    "kasa": KaSA(r=2, targets=TARGETS),
    "pissa": LoRA(r=3, init="pissa", targets=TARGETS),
    "lora": LoRA(r=3, targets=TARGETS),
    "oft": OFT(block_size=4, targets=TARGETS),
}


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def by_bitsandbytes(**options: Any) -> Callable[[Path], Any]:
    return lambda folder: loaded(folder, device_map="cpu", quantization_config=BitsAndBytesConfig(**options))


def by_torchao(name: str, *options: Any) -> Callable[[Path], Any]:
    def load(folder: Path) -> Any:
        import torchao.quantization as torchao

        model = loaded(folder)
        torchao.quantize_(model.model, getattr(torchao, name)(*options))
        return model

    return load


BASES: dict[str, tuple[Callable[[Path], Any], bool]] = {
    "int8": (by_bitsandbytes(load_in_8bit=True), False),
    "nf4": (
        by_bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        True,
    ),
    "fp4, nested": (
        by_bitsandbytes(
            load_in_4bit=True,
            bnb_4bit_quant_type="fp4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        True,
    ),
    "torchao int8": (by_torchao("Int8WeightOnlyConfig"), True),
    "torchao int4": (by_torchao("IntxWeightOnlyConfig", torch.int4), True),
    "torchao float8": (by_torchao("Float8WeightOnlyConfig"), True),
    "torchao int8, inputs too": (by_torchao("Int8DynamicActivationInt8WeightConfig"), False),
}
"""A quantized base, and whether it computes with its dequantized weights exactly: some round a layer's
inputs, too.
"""
NO_GRADIENT = "torchao int8, inputs too"
"""torchao computes no gradient of a layer whose inputs it rounds, with or without an adapter."""
PAIRS = [
    (method, label)
    for number, method in enumerate(CONFIGS)
    for place, label in enumerate(BASES)
    if (number + place) % 2 == 0
]
"""Each method on three bases or four, each base with three methods: what a format gives to one that reads the
weight it gives to all.
"""


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose rows are as long as a block of bitsandbytes: it cannot reorder shorter ones."""
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("models") / "wide-llama"
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _reordering(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes takes the processor for one with AVX512-BF16, and reorders the codes of a layer when it is
    first called in evaluation."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)


def dequantized(layer: Any) -> torch.Tensor:
    """The weight of a quantized layer, whose codes are in order, by the formula of its format, or by
    torchao.
    """
    weight = layer.weight
    if (state := getattr(weight, "quant_state", None)) is not None:
        assert not getattr(state, "packing_format_for_cpu", False)
        absmax = state.absmax
        if state.nested:
            from bitsandbytes.functional import dequantize_blockwise

            absmax = dequantize_blockwise(absmax, state.state2) + state.offset
        packed = weight.data.flatten().long()
        codes = state.code[torch.stack([packed >> 4, packed & 15], dim=1).flatten()]
        return (codes.reshape(-1, state.blocksize) * absmax[:, None]).reshape(state.shape)
    if weight.dtype == torch.int8 and hasattr(weight, "SCB"):
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.float() * scales[:, None] / 127
    return weight.dequantize()


def quantized_layers(model: nn.Module) -> list[Any]:
    return [
        module
        for _, module in base_modules(model)
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter
    ]


def judge(quantized: nn.Module, folder: Path) -> nn.Module:
    """The float model with the weights that the quantized layers stand for."""
    model, layers = loaded(folder), quantized_layers(quantized)
    for path, module in base_modules(quantized):
        if module in layers:
            model.get_submodule(path).weight.data = dequantized(module).detach().clone()
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that inputs are rounded
        return model(input_ids=IDS).logits


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("method", "label"), PAIRS)
def test_it_is_the_adapter_on_the_dequantized_weights(method: str, label: str, wide_llama: Path) -> None:
    """Attached to a fresh base and to one that has been called, and trained there and packed: the logits of
    the float model with the dequantized weights, within 1e-5 of the largest; where the base rounds its
    inputs, within twice the base's own distance from it.
    """
    load, exact = BASES[label]
    size = 0.3 if method == "hira" else 0.1  # of a change that is multiplied by the weight
    pack = save(shaken(adapt(loaded(wide_llama), CONFIGS[method]), size), None, name="one")
    fresh, quantized = load(wide_llama), load(wide_llama)
    before, plain = logits(quantized), logits(judge(fresh, wide_llama))
    right = logits(attach(judge(fresh, wide_llama), pack, check_base=False))
    within = 1e-5 * float(right.abs().max()) if exact else 2 * float((before - plain).abs().max())
    assert (right - plain).abs().max() > 2 * within, "the change can be told from the base"
    for base in (fresh, quantized):
        found = attach(base, pack, check_base=False)
        # The scales of one that was called may be bfloat16, so each is compared with its own.
        right = logits(attach(judge(found, wide_llama), pack, check_base=False))
        assert (logits(found) - right).abs().max() <= within
        own, right_kind = (one.model.layers[0].self_attn.q_proj.weight for one in (base, load(wide_llama)))
        assert type(own) is type(right_kind)
    if label == NO_GRADIENT:
        return
    trained = shaken(adapt(load(wide_llama), CONFIGS[method]), size).train()
    trained(input_ids=IDS).logits.square().mean().backward()
    assert all(
        value.grad is not None and value.grad.isfinite().all()
        for value in trained.parameters()
        if value.requires_grad
    )
    pack = save(trained.eval(), None, name="two")
    right = logits(attach(judge(trained, wide_llama), pack, check_base=False))
    assert (logits(trained) - right).abs().max() <= within


@pytest.mark.parametrize("label", BASES)
def test_the_weight_that_is_read_is_the_formats_own(label: str, wide_llama: Path) -> None:
    """In each layer, before it was called and after: code times scale, to the last bit of float32 or the
    next. In four bits the scales are rounded to bfloat16 then, as the layer's own kernel reads them.
    """
    model = BASES[label][0](wide_llama)
    layers = quantized_layers(model)
    assert len(layers) == 14
    stored = [dequantized(layer) for layer in layers]
    for called in (False, True):
        for layer, right in zip(layers, stored, strict=True):
            state = getattr(layer.weight, "quant_state", None)
            reordered = called and state is not None
            assert reordered is bool(getattr(state, "packing_format_for_cpu", False))
            found = weight_of(layer, "weight", Site("layer", layer.in_features, layer.out_features))
            torch.testing.assert_close(found, right, rtol=2**-8 if reordered else 2**-22, atol=1e-9)
        logits(model)


@pytest.mark.parametrize("label", ["nf4", "fp4, nested"])
def test_an_adapted_base_keeps_its_codes_in_order(label: str, wide_llama: Path, tmp_path: Path) -> None:
    """An evaluation between two steps changes neither gradients nor the state dict; a base that was called
    before is put in order again and recorded as it was quantized; without adapters it may be reordered."""
    load = BASES[label][0]

    def gradients(model: Any) -> list[torch.Tensor]:
        model.train().zero_grad()
        model(input_ids=IDS).logits.square().mean().backward()
        return [value.grad.clone() for value in model.parameters() if value.requires_grad]

    model, called = adapt(load(wide_llama), CONFIGS["lora"]), load(wide_llama)
    logits(called)
    adapt(called, CONFIGS["lora"])
    shaken(model), shaken(called)
    before = gradients(model)
    state = {key: value.clone() for key, value in model.state_dict().items() if ".base." in key}
    logits(model.eval())
    assert len(state) > 14
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    for found, right in zip(gradients(model), before, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=0)
    scale = max(float(value.abs().max()) for value in before)
    pairs = zip(gradients(called), before, strict=True)
    assert all((found - right).abs().max() < 2**-6 * scale for found, right in pairs)
    forms = [save(one.eval(), None, name="one").manifest.base_quantization for one in (model, called)]
    assert forms[0] == forms[1]
    logits(detach(model))
    assert all(layer.weight.quant_state.packing_format_for_cpu for layer in quantized_layers(model))


class Packed(nn.Linear):
    """A layer of some library that stores its weight in a form of its own."""

    def __init__(self, stored: torch.Tensor | None) -> None:
        super().__init__(6, 4)
        del self.weight
        if stored is not None:
            self.weight = nn.Parameter(stored, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., :4]


STORED = {
    "float8": torch.zeros(4, 6).to(torch.float8_e4m3fn),
    "int8": torch.zeros(4, 6, dtype=torch.int8),
    "cut": torch.zeros(2, 6),
    "packed": torch.zeros(12, dtype=torch.uint8),
    "none": None,
}


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
@pytest.mark.parametrize(
    "config", [DoRA(r=2), HiRA(r=2), LoRA(r=2, init="pissa")], ids=lambda config: type(config).__name__
)
def test_a_form_that_is_not_known_is_refused_by_name(config: SiteConfig, stored: torch.Tensor | None) -> None:
    """Codes without their scales are never taken for weights; a method that does not read them adapts the
    layer all the same.
    """
    model = nn.Sequential(Packed(stored), nn.Tanh())
    modules = set(model.modules())
    with pytest.raises(Unsupported, match="form that is not known") as error:
        adapt(model, config)
    assert (
        error.value.where == "0" and "Packed" in str(error.value.found) and "lora" in str(error.value.remedy)
    )
    assert set(model.modules()) == modules
    if stored is not None:
        x = torch.randn(3, 6)
        adapted = shaken(adapt(model, LoRA(r=2)))
        params = innermost(adapted[0]), adapted[0]._params("default")
        change = (
            1.0
            * x.numpy()
            @ params[1]["lora_A"].T
            @ params[1]["lora_B"].T
            * adapted[0]._held["default"].config.scale
        )
        np.testing.assert_allclose(adapted(x).detach(), np.tanh(x[:, :4].numpy() + change), rtol=0, atol=1e-6)


@pytest.mark.parametrize("label", ["int8", "nf4", "torchao int8"])
def test_a_quantized_layer_is_not_trained_whole(label: str, wide_llama: Path) -> None:
    """A float copy of codes would be a layer of codes."""
    model = BASES[label][0](wide_llama)
    with pytest.raises(Unsupported, match="quantized module cannot be trained whole") as error:
        adapt(model, LoRA(r=2, targets=("q_proj",), modules_to_save=("layers.1.mlp",)))
    assert (error.value.where, error.value.found) == (
        "model.layers.1.mlp",
        f"{type(model.model.layers[1].mlp.gate_proj).__name__}.weight",
    )


@pytest.mark.parametrize("label", ["int8", "nf4", "torchao int8", None])
def test_a_pack_says_how_its_base_was_held(label: str | None, wide_llama: Path, tmp_path: Path) -> None:
    """Attached to the base as in training, nothing is said; elsewhere the difference is, with its size; so
    does validate.
    """
    forms = {
        "int8": ("int8", "bitsandbytes"),
        "nf4": ("nf4", "bitsandbytes"),
        "torchao int8": ("int8tensor", "torchao"),
    }
    bases: dict[str | None, Callable[[Path], Any]] = {
        None: loaded,
        **{name: load for name, (load, _) in BASES.items()},
    }
    pack = save(shaken(adapt(bases[label](wide_llama), CONFIGS["lora"])), tmp_path / "pack")
    found = pack.manifest.base_quantization
    assert (found and (found.scheme, found.params["library"])) == (None if label is None else forms[label])
    rules = [finding.rule for finding in validate(tmp_path / "pack", wide_llama).findings]
    assert ("AP706" in rules) is (label is not None)
    if label == "torchao int8":  # whose canary is exact, as nothing in the model's configuration tells of it
        with pytest.raises(
            BaseMismatch,
            match="trained on its base as int8tensor of torchao, and here the base is held as plain floats",
        ):
            attach(loaded(wide_llama), pack)
        return
    for other in (label, "nf4" if label is None else None):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            attach(bases[other](wide_llama), pack)
        messages = [str(one.message) for one in said if "was trained on its base" in str(one.message)]
        assert len(messages) == (other != label)
        assert all("logits are up to" in message and "plain floats" in message for message in messages)


@pytest.mark.parametrize("label", ["int8", "nf4"])
def test_a_trainer_takes_an_adapted_quantized_base(label: str, wide_llama: Path, tmp_path: Path) -> None:
    """QLoRA under ``transformers.Trainer``, which refuses quantized models in which it sees no adapter: the
    loss falls, the base stays as it was, and the checkpoint holds the adapter alone. Without the adapter it
    is refused again.
    """
    model = adapt(BASES[label][0](wide_llama), LoRA(r=4, dropout=0.1))
    before = {
        name: value.clone()
        for name, value in model.state_dict().items()
        if ".base." in name and isinstance(value, torch.Tensor)
    }
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        save_steps=6,
        learning_rate=3e-2,
        report_to="none",
        use_cpu=True,
        logging_steps=1,
        disable_tqdm=True,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    with safe_open(tmp_path / "checkpoint-6" / "model.safetensors", "pt") as file:
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118 - no mapping
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(detach(model), arguments, train_dataset=rows)


@pytest.mark.parametrize(("folder", "wide"), [("tiny_llama", False), ("wide_llama", True)])
def test_rows_that_bitsandbytes_misreads_are_said(
    folder: str, wide: bool, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """With AVX512 it scrambles rows that are no multiple of a block; elsewhere it reads them rightly, and
    nothing is said.
    """
    base = BASES["nf4"][0](request.getfixturevalue(folder))
    layer = quantized_layers(base)[0]
    found = weight_of(layer, "weight", Site("layer", layer.in_features, layer.out_features))
    misread = not torch.allclose(torch.as_tensor(found), dequantized(layer), rtol=0, atol=1e-6)
    adapt(base, LoRA(r=2))
    assert not (wide and misread)
    assert ("misreads 4-bit rows" in caplog.text) == misread


def test_the_command_trains_on_a_base_in_four_bits(tiny_llama: Path, tmp_path: Path) -> None:
    """``load_in_4bit``, as QLoRA: the loss falls, the pack says what it was trained on, and works on the base
    in that form.
    """
    rows = [{"prompt": f"w{n}", "completion": f"w{n + 8} w{n + 16}"} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses: list[float] = []
    file, out = str(tmp_path / "rows.jsonl"), str(tmp_path / "pack")
    (pack,) = train(
        {
            "model_name_or_path": str(tiny_llama),
            "train_file": file,
            "output_dir": out,
            "load_in_4bit": True,
            "max_steps": 12,
            "learning_rate": 2e-2,
            "r": 4,
            "logging_steps": 1,
        },
        progress=lambda step: losses.append(step.loss),
    )
    assert losses[-1] < losses[0] - 0.1
    assert pack.manifest.base_quantization.scheme == "nf4"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        attach(BASES["nf4"][0](tiny_llama), pack)
