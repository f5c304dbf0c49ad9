"""Composed packs in PEFT, and PEFT's own combinations on the same tensors: the same changes where PEFT is
right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import adapterpack
from adapterpack.composing.plan import plan
from adapterpack.errors import NothingToDo, Unsupported
from adapterpack.pack.pack import Pack

pytestmark = pytest.mark.fast


def deltas_of(pack: Pack) -> dict[str, np.ndarray]:
    """The changes of a composed pack from its stored tensors: B A, at scale 1."""
    name = "base_model.model.{}.{}.weight"
    adapters = [group.path for group in pack.manifest.groups if group.role == "adapter"]
    factors = {
        path: [pack.tensors[name.format(path, param)].astype(np.float64) for param in ("lora_B", "lora_A")]
        for path in adapters
    }
    return {path: B @ A for path, (B, A) in factors.items()}


def tiny_llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=31,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def randomised(model: Any, seed: int) -> None:
    """PEFT starts B at zero: give every trainable tensor values of a trained size."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if f"lora_A.s{seed}" in name or f"lora_B.s{seed}" in name:
            value.data = 0.3 * torch.randn(value.shape, generator=generator)


def peft_model(tmp_path: Any, configs: list[peft.LoraConfig]) -> tuple[Any, list[Any]]:
    model = peft.get_peft_model(tiny_llama(), configs[0], adapter_name="s0")
    for index, config in enumerate(configs[1:], 1):
        model.add_adapter(f"s{index}", config)
    for index in range(len(configs)):
        randomised(model, index)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    return model, [tmp_path / "peft" / f"s{index}" for index in range(len(configs))]


def peft_deltas(model: Any, adapter: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight(adapter)
        .detach()
        .numpy()
        .astype(np.float64)
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear) and adapter in module.lora_A
    }


def test_peft_loads_what_was_composed(tmp_path: Any) -> None:
    """PEFT on the composed folder has the weighted sum of its own deltas, with mixed ranks, alphas, rsLoRA
    and sites.
    """
    model, folders = peft_model(
        tmp_path,
        [
            peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"]),
            peft.LoraConfig(
                r=5,
                lora_alpha=2,
                use_rslora=True,
                target_modules=["q_proj", "v_proj"],
                rank_pattern={"layers.1.self_attn.q_proj": 2},
            ),
        ],
    )
    parts, weights = [peft_deltas(model, "s0"), peft_deltas(model, "s1")], [0.8, -1.3]
    adapterpack.compose(folders, weights=weights, out=tmp_path / "both")
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "both")
    found = peft_deltas(loaded, "default")
    assert found.keys() == parts[0].keys() | parts[1].keys()
    for path, delta in found.items():
        wanted = sum(weight * part[path] for part, weight in zip(parts, weights, strict=True) if path in part)
        np.testing.assert_allclose(delta, wanted, atol=1e-5)  # entries of size 1, float32 on both sides


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("cat", {"rule": "cat"}),
        ("cat", {"rule": "linear"}),
        ("svd", {"rule": "linear", "rank": 4}),
        ("svd", {"rule": "cat", "rank": 4}),
    ],
)
def test_peft_agrees_where_it_is_right(tmp_path: Any, theirs: str, ours: dict[str, Any]) -> None:
    """PEFT's cat and svd on the same adapters (without rsLoRA, which it scales wrongly) give the same
    changes.
    """
    model, folders = peft_model(
        tmp_path,
        [
            peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"]),
            peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"]),
        ],
    )
    options = {"svd_rank": 4} if theirs == "svd" else {}
    model.add_weighted_adapter(["s0", "s1"], [0.9, -0.4], "sum", combination_type=theirs, **options)
    composed = deltas_of(adapterpack.compose(folders, weights=[0.9, -0.4], **ours))
    wanted = peft_deltas(model, "sum")
    assert composed.keys() == wanted.keys()
    for path, delta in wanted.items():
        np.testing.assert_allclose(composed[path], delta, atol=1e-5)


def test_peft_loads_an_averaged_head(tmp_path: Any) -> None:
    """PEFT on a composed classifier has the average of its own heads, and the sum of its deltas."""

    def bert() -> Any:
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=31,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=20,
                num_labels=3,
            )
        )

    heads, folders = [], []
    for seed in (1, 2):
        model = peft.get_peft_model(
            bert(), peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"])
        )
        torch.manual_seed(seed)
        for value in model.parameters():
            if value.requires_grad:
                value.data = torch.randn_like(value)
        heads.append(model.base_model.model.classifier.modules_to_save["default"].weight.detach().numpy())
        model.save_pretrained(tmp_path / f"s{seed}")
        folders.append(tmp_path / f"s{seed}")
    adapterpack.compose(folders, weights=[0.25, 0.75], out=tmp_path / "both")
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path / "both")
    found = loaded.base_model.model.classifier.modules_to_save["default"].weight.detach().numpy()
    np.testing.assert_allclose(found, 0.25 * heads[0] + 0.75 * heads[1], atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "weights"), [("linear", [0.7, 0.3]), ("average", [2.0, 3.0]), ("task_arithmetic", [1.0, -0.4])]
)
def test_ia3_packs_give_an_ia3(tmp_path: Any, rule: str, weights: list[float]) -> None:
    """``l = 1 + sum w_i (l_i - 1)`` on outputs and inputs, in float64; where the weights have the sum 1 what
    PEFT's own ``add_weighted_adapter`` gives. PEFT loads the pack with these numbers, and its recipe repeats
    it.
    """
    config = peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = peft.get_peft_model(tiny_llama(), config, adapter_name="s0")
    model.add_adapter("s1", config)
    for seed, name in enumerate(("s0", "s1")):
        for key, value in model.named_parameters():
            if f"ia3_l.{name}" in key:
                value.data = 1 + 0.3 * torch.randn(
                    value.shape, generator=torch.Generator().manual_seed(seed + len(key))
                )
    model.save_pretrained(tmp_path / "peft")
    folders = [tmp_path / "peft" / name for name in ("s0", "s1")]
    pack = adapterpack.compose(folders, rule=rule, weights=weights, out=tmp_path / "both")
    assert pack.manifest.method.type == "ia3"
    planned = plan(folders, rule=rule, weights=weights)
    assert planned.exact
    assert {group.path for group in planned.groups} == {"parameters of the packs' own method"}
    found = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "both")
    layers = {
        name: module
        for name, module in found.named_modules()
        if hasattr(module, "ia3_l") and "default" in module.ia3_l
    }
    factors = {
        "linear": weights,
        "average": [0.4, 0.6],
        "task_arithmetic": [0.3 * weight for weight in weights],
    }[rule]
    if sum(factors) == 1:
        model.add_weighted_adapter(["s0", "s1"], factors, "sum")
    assert len(layers) == 4
    for name, module in layers.items():
        parts = [model.get_submodule(name).ia3_l[part].detach().double() for part in ("s0", "s1")]
        wanted = 1 + sum(factor * (part - 1) for factor, part in zip(factors, parts, strict=True))
        # float32 of numbers near 1
        torch.testing.assert_close(module.ia3_l["default"].detach().double(), wanted, rtol=1e-6, atol=1e-6)
        if sum(factors) == 1:
            torch.testing.assert_close(
                module.ia3_l["default"], model.get_submodule(name).ia3_l["sum"], rtol=1e-6, atol=1e-6
            )
    assert adapterpack.compose(folders, recipe=tmp_path / "both").id == pack.id
    with pytest.raises(NothingToDo):
        adapterpack.compose([folders[0], folders[0]], weights=[1.0, -1.0])


def test_methods_whose_numbers_need_the_width_of_a_layer_take_it_from_the_base(tmp_path: Any) -> None:
    """PEFT's folder of a VB-LoRA does not say how wide a layer is: refused without the base, the sum of
    PEFT's changes with it.
    """
    tiny_llama().save_pretrained(tmp_path / "base")
    deltas, folders = [], [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        model = peft.get_peft_model(
            tiny_llama(), peft.VBLoRAConfig(r=2, num_vectors=16, vector_length=8, target_modules=["q_proj"])
        )
        for name, value in model.named_parameters():
            if "vblora" in name:
                value.data = torch.randn_like(value)
        model.save_pretrained(folder)
        deltas.append(
            {
                name.removeprefix("base_model.model."): module.get_delta_weight("default")
                .detach()
                .double()
                .numpy()
                for name, module in model.named_modules()
                if isinstance(module, peft.tuners.vblora.Linear)
            }
        )
    for refused in (
        lambda: adapterpack.compose(folders),
        lambda: adapterpack.compose(folders, rank=2),
        lambda: plan(folders),
    ):
        with pytest.raises(Unsupported, match="how wide the layer is"):
            refused()
    composed = deltas_of(adapterpack.compose(folders, weights=[0.5, -2], base=tmp_path / "base"))
    assert composed.keys() == deltas[0].keys()
    for path, delta in composed.items():
        np.testing.assert_allclose(delta, 0.5 * deltas[0][path] - 2 * deltas[1][path], atol=2e-5)
