"""Adapters on a base that accelerate offloads: the same numbers as on one in memory, or an error that names
the module.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from noise import shake
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import adapterpack
from adapterpack import (
    IA3,
    Bottleneck,
    DoRA,
    HiRA,
    KaSA,
    LLaMAAdapter,
    LNTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
    TrainableTokens,
    VeRA,
    adapt,
    attach,
    save,
)
from adapterpack.adapter_methods import SiteConfig
from adapterpack.errors import Unsupported

pytestmark = pytest.mark.fast

IDS = torch.tensor([[5, 17, 40, 8, 61, 33, 7]])
DEVICES = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "disk",
    "lm_head": "cpu",
}
CONFIGS: dict[str, SiteConfig] = {
    "lora": LoRA(r=3, dropout=0.0),
    "an init that reads the weight": LoRA(r=2, init="pissa"),
    "dora": DoRA(r=3),
    "hira": HiRA(r=3),
    "kasa": KaSA(r=2),
    "shared factors": VeRA(r=3),
    "ia3": IA3(targets=("k_proj", "v_proj")),
    "embedding": LoRA(r=2, targets=("embed_tokens",)),
    "tied tokens": TrainableTokens(token_indices=(5, 17), targets=("embed_tokens",)),
    "blocks": Bottleneck(reduction=4),
    "attention": LLaMAAdapter(),
    "prompt": PromptTuning(num_virtual_tokens=3, token_ids=(5, 6, 7)),
    "prefix": PrefixTuning(num_virtual_tokens=3),
}


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


Offload = Callable[[Path, Path], Any]
NO_KERNELS = {"use_kernels": False}
"""transformers 5.25 looks for kernels on the device of the weights, which accelerate leaves on none."""
OFFLOADED: dict[str, Offload] = {
    "a device map": lambda folder, scratch: loaded(folder, device_map=DEVICES, offload_folder=scratch),
    "to disk": lambda folder, scratch: accelerate.disk_offload(
        loaded(folder, **NO_KERNELS), str(scratch), execution_device="cpu"
    ),
    "to memory": lambda folder, scratch: accelerate.cpu_offload(
        loaded(folder, **NO_KERNELS), execution_device="cpu"
    ),
}
everywhere = pytest.mark.parametrize("offload", OFFLOADED.values(), ids=OFFLOADED)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


shaken = partial(shake, size=0.3, seed=1)


@pytest.mark.sampled(5)
@everywhere
@pytest.mark.parametrize("label", CONFIGS)
def test_it_is_the_adapter_on_a_base_in_memory(
    label: str, offload: Offload, tiny_llama: Path, tmp_path: Path
) -> None:
    """Attached (canary and all), trained and saved there: logits to 1e-6, gradients to 1e-5 of the largest,
    and the same pack.
    """
    here = shaken(adapt(loaded(tiny_llama), CONFIGS[label]))
    pack, expected = save(here, None, name="same"), logits(here)
    assert (expected - logits(loaded(tiny_llama))).abs().max() > 1e-2
    attached = attach(offload(tiny_llama, tmp_path / "a"), pack)
    torch.testing.assert_close(logits(attached), expected, rtol=0, atol=1e-6)
    there = shaken(adapt(offload(tiny_llama, tmp_path / "b"), CONFIGS[label]))
    for model in (here, there):
        model.train()(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    found, right = (
        {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        for model in (there, here)
    )
    assert found.keys() == right.keys()
    for name, value in right.items():
        assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
    again = save(there.eval(), None, name="same")
    torch.testing.assert_close(logits(attach(loaded(tiny_llama), again)), expected, rtol=0, atol=1e-6)


@everywhere
@pytest.mark.parametrize(
    ("config", "where"),
    [
        (LNTuning(targets=("model.norm",)), "model.norm"),
        (
            LoRA(r=2, targets=("layers.0.mlp.up_proj",), modules_to_save=("layers.1.mlp",)),
            "model.layers.1.mlp",
        ),
    ],
)
def test_what_changes_a_module_as_a_whole_is_refused_by_name(
    config: SiteConfig, where: str, offload: Offload, tiny_llama: Path, tmp_path: Path
) -> None:
    """A module that is called with other tensors, or copied, must be in memory; the model is left as it
    was.
    """
    model = offload(tiny_llama, tmp_path)
    before, modules = logits(model), set(model.modules())
    with pytest.raises(Unsupported, match="not all in memory") as error:
        adapt(model, config)
    assert (error.value.where, "offload" in str(error.value.remedy)) == (where, True)
    assert torch.equal(logits(model), before) and set(model.modules()) == modules


def test_a_module_that_is_loaded_with_what_is_around_it_is_refused_by_name(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Accelerate's preloaded classes look their tensors up by names that adapters change."""
    model = accelerate.dispatch_model(
        loaded(tiny_llama),
        DEVICES,
        main_device="cpu",
        offload_dir=str(tmp_path),
        preload_module_classes=["LlamaMLP"],
    )
    with pytest.raises(Unsupported, match="not in memory") as error:
        adapt(model, LoRA(r=2))
    assert error.value.where == "model.layers.1.mlp.gate_proj"
    assert logits(adapt(model, LoRA(r=2, targets=("q_proj",)))).isfinite().all()


@pytest.mark.parametrize(
    "config",
    [
        LoRA(r=2),
        DoRA(r=2),
        LNTuning(),
        PromptTuning(num_virtual_tokens=2),
        LoRA(r=2, modules_to_save=("lm_head",)),
        VeRA(r=2),
    ],
)
def test_a_base_without_data_is_refused_by_name(config: SiteConfig, tiny_llama: Path) -> None:
    """A model on the meta device: at adapt, and at attach, whether the base is compared or not."""
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_llama))
    modules = set(empty.modules())
    pack = save(shaken(adapt(loaded(tiny_llama), config)), None, name="one")
    for act in (
        lambda: adapt(empty, config),
        lambda: attach(empty, pack),
        lambda: attach(empty, pack, check_base=False),
    ):
        with pytest.raises(Unsupported, match="in memory") as error:
            act()
        assert error.value.where and "load the base" in str(error.value.remedy)
        assert set(empty.modules()) == modules


def test_an_adapter_that_is_offloaded_itself_is_refused_by_name(tiny_llama: Path) -> None:
    """Accelerate takes the adapter's tensors away with the base's and never loads them: a call and a pack say
    so.
    """
    model = accelerate.cpu_offload(shaken(adapt(loaded(tiny_llama), LoRA(r=2))), execution_device="cpu")
    with pytest.raises(Unsupported, match="adapter's own tensors are not in memory") as error:
        logits(model)
    assert "model.layers.0.self_attn.q_proj" in str(error.value.where)
    with pytest.raises(Unsupported, match="not in memory"):
        adapterpack.save(model, None)
