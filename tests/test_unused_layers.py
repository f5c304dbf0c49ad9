"""Layers that a model does not use are found before an adapter is trained there: it would do nothing, and a
merge would do something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from noise import shake
from torch import nn
from torch.nn import functional
from transformers.integrations.bitnet import AutoBitLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear

from adapterpack import LoRA, adapt, attach, detach, export, merge, merge_into, save, unmerge_from
from adapterpack.errors import AdapterpackError, NothingToDo, SiteNotFound
from adapterpack.torch_adapters.layers.layer import Adapted
from adapterpack.torch_adapters.layers.sites import is_plain_linear
from adapterpack.torch_adapters.unused import unused_layers

pytestmark = pytest.mark.fast

TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {**TEXT, "num_hidden_layers": 3, "image_size": 12, "patch_size": 4}
VISION.pop("vocab_size")
IDS = torch.tensor([[5, 17, 40, 8, 61], [9, 50, 2, 11, 72]])


def mamba() -> Any:
    return hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4)
    )


def falcon_mamba() -> Any:
    return hf.FalconMambaForCausalLM(
        hf.FalconMambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4)
    )


def jamba() -> Any:
    return hf.JambaForCausalLM(
        hf.JambaConfig(
            **TEXT,
            **TOKENS,
            num_key_value_heads=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=4,
            mamba_d_state=4,
            mamba_dt_rank=4,
        )
    )


def llava(vision: Any = hf.CLIPVisionConfig, layer: int = -2) -> Any:
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=vision(**VISION),
            text_config=hf.LlamaConfig(**TEXT, **TOKENS),
            image_token_id=7,
            vision_feature_layer=layer,
            vision_feature_select_strategy="full" if layer == -1 else "default",
        )
    )


def siglip() -> Any:
    return llava(hf.SiglipVisionConfig, -1)


def sites(model: nn.Module) -> list[str]:
    return [module._site.path for module in model.modules() if isinstance(module, Adapted)]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("adapterpack")]


FAMILIES: dict[str, tuple[Callable[[], Any], str]] = {
    "mamba": (mamba, "mixer.dt_proj"),
    "falcon mamba": (falcon_mamba, "mixer.dt_proj"),
    "jamba": (jamba, "mamba.dt_proj"),
    "llava": (llava, "vision_tower.encoder.layers.2."),
    "siglip": (siglip, "vision_tower.head.mlp."),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_does_not_use_is_named_and_left_out(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights that a mixer reads itself, the layer behind the one whose features are taken, a head that pools
    for nobody: all other linear layers are adapted, and each of them gets a gradient. Random numbers stay the
    same."""
    make, unused = FAMILIES[family]
    torch.manual_seed(3)
    model = make().train()
    linear = [
        path for path, module in model.named_modules() if type(module) is nn.Linear and path != "lm_head"
    ]
    state = torch.get_rng_state()
    adapt(model, LoRA(r=2), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    found = sites(model)
    assert set(linear) - set(found) == {path for path in linear if unused in path or path.endswith(".router")}
    assert [unused in message for message in said(caplog)] == [True]
    shake(model)
    inputs = {"input_ids": IDS}
    if hasattr(model.config, "vision_config"):
        ids = torch.cat([torch.full((2, 9), model.config.image_token_id), IDS], 1)
        inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 12, 12)}
    model(**inputs).logits.square().mean().backward()
    silent = [
        name for name, value in model.named_parameters() if value.requires_grad and not value.grad.abs().sum()
    ]
    assert silent == []


@pytest.mark.parametrize("family", ["mamba", "jamba"])
def test_a_merged_checkpoint_gives_what_the_attached_adapter_gives(family: str, tmp_path: Path) -> None:
    """In every layer that ``all-linear`` takes: what is never called is not changed by a merge either."""
    torch.manual_seed(4)
    FAMILIES[family][0]().save_pretrained(tmp_path / "base")
    load = hf.AutoModelForCausalLM.from_pretrained
    pack = save(shake(adapt(load(tmp_path / "base"), LoRA(r=2)), 0.2), tmp_path / "pack")
    merge(tmp_path / "base", [pack], tmp_path / "merged")
    with torch.no_grad():
        plain, attached, merged = (
            model.eval()(input_ids=IDS).logits
            for model in (
                load(tmp_path / "base"),
                attach(load(tmp_path / "base"), pack),
                load(tmp_path / "merged"),
            )
        )
    assert (attached - plain).abs().max() > 1e-2
    torch.testing.assert_close(merged, attached, rtol=0, atol=1e-5)


def test_a_target_that_names_only_unused_layers_is_an_error() -> None:
    """A name that matches used layers, too, takes these; what is overruled is adapted as it is named."""
    with pytest.raises(NothingToDo, match="does not use this layer") as error:
        adapt(model := mamba(), LoRA(r=2, targets=("in_proj", "dt_proj")))
    assert error.value.found.startswith("'dt_proj': backbone.layers.0.mixer.dt_proj")
    assert sites(model) == []
    assert len(sites(adapt(model, LoRA(r=2, targets=("dt_proj",)), allow_unused=True))) == 2
    assert [path for path in sites(adapt(llava(), LoRA(r=2, targets=("fc1",)))) if "layers.2" in path] == []


class Reading(nn.Module):
    """Reads the weight of one of its layers; the other it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.proj = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.first(x), self.proj.weight)


class Owner(nn.Module):
    """Does not call one of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = Reading(), nn.ModuleList([Reading(), Reading()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.spare[0](self.used(x))


def test_the_first_pass_of_a_model_without_examples_names_what_it_does_not_call(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Such a layer stays out of the pack and of a merge in memory; a layer of a part that was not called may
    be called yet."""
    model, x = shake(adapt(Owner(), LoRA(r=2))), torch.randn(3, 4)
    assert said(caplog) == []
    y = model(x)
    model(x)
    assert said(caplog) == [
        "adapter 'default' leaves out used.proj, spare.0.proj, which the model does not use"
    ]
    kept = ["used.first", "spare.0.first", "spare.1.first", "spare.1.proj"]
    assert [group.path for group in save(model, None, name="one").manifest.groups] == kept
    torch.testing.assert_close(merge_into(model)(x), y)
    unmerge_from(model)
    detach(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_the_first_pass_refuses_a_target_that_is_never_called() -> None:
    model = adapt(Reading(), LoRA(r=2, targets=("proj",)))
    with pytest.raises(NothingToDo, match="does not use this layer"):
        model(torch.randn(3, 4))
    adapt(overruled := Reading(), LoRA(r=2, targets=("proj",)), allow_unused=True)(torch.randn(3, 4))
    assert [group.path for group in save(overruled, None, name="one").manifest.groups] == ["proj"]


def test_samples_are_examples_of_a_model_that_has_no_others() -> None:
    samples = [{"x": torch.randn(3, 4)}]
    assert unused_layers(Reading(), ["first", "proj"]) is None
    assert unused_layers(Reading(), ["first", "proj"], samples) == ["proj"]
    assert sites(adapt(Reading(), LoRA(r=2), data=samples)) == ["first"]


def test_a_decoder_alone_attends_to_no_encoder() -> None:
    """Its layers have the projections of that attention, whose owner is not called either."""
    sizes = {"vocab_size": 96, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}
    model = hf.BartForCausalLM(hf.BartConfig(**sizes, decoder_ffn_dim=48, **TOKENS))
    adapted = sites(adapt(model, LoRA(r=2, targets=("q_proj", "fc1"))))
    assert [path.split(".", 4)[4] for path in adapted] == ["self_attn.q_proj", "fc1"] * 2


class OneOfTwo(nn.Module):
    """Experts of which the first is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x)


class Cut(nn.Module):
    """A part that passes no gradient on, and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.experts = nn.Linear(4, 4), OneOfTwo()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = self.frozen(x)
        return self.experts(y)


def test_parts_without_a_gradient_and_experts_count_as_used() -> None:
    assert unused_layers(Cut(), ["frozen", "experts.a", "experts.b"], [{"x": torch.randn(3, 4)}]) == []


def test_layers_by_groups_are_no_linear_layers() -> None:
    """DeepSeek V4's product by groups is a subclass of ``nn.Linear``: its model trains, and it is left as it
    is."""
    config = hf.DeepseekV4Config(
        vocab_size=96,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        q_lora_rank=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        o_groups=2,
        o_lora_rank=8,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=8,
        sliding_window=8,
        hc_mult=2,
        max_position_embeddings=64,
        **TOKENS,
    )
    model = hf.DeepseekV4ForCausalLM(config).train()
    groups = [
        path for path, module in model.named_modules() if type(module).__name__ == "DeepseekV4GroupedLinear"
    ]
    adapt(model, LoRA(r=2))
    assert groups
    assert not set(groups) & set(sites(model))
    model(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(AdapterpackError, match="does not support this layer"):
        adapt(hf.DeepseekV4ForCausalLM(config), LoRA(r=2, targets=(groups[0],)))


def test_a_subclass_of_a_linear_layer_is_one_if_its_widths_are() -> None:
    plain = [
        nn.Linear(4, 8),
        FalconLinear(4, 8),
        AutoBitLinear(4, 8),
        IdeficsDecoupledLinear(4, 8, 0, bias=False),
    ]
    assert all(map(is_plain_linear, plain))
    assert not is_plain_linear(IdeficsDecoupledLinear(4, 8, 2, bias=False))


@pytest.mark.long
def test_an_export_says_the_way_out_of_layers_that_the_model_does_not_use(tmp_path: Path) -> None:
    """As PEFT's own all-linear adapts them: no graph has a slot there, and a merge is exact."""
    llava().save_pretrained(tmp_path / "base")
    model = hf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    adapt(model, LoRA(r=2, targets="all-linear"), allow_unused=True)
    pack = save(shake(model), tmp_path / "pack")
    with pytest.raises(SiteNotFound, match=r"vision_tower.encoder.layers.2.*--mode folded.*all-linear"):
        export(tmp_path / "base", [pack], tmp_path / "bundle")
