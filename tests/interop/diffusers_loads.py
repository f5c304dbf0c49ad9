"""Packs in pipelines of diffusers: ``python diffusers_loads.py FOLDER``, in an environment with this package
and ``pip install diffusers``.

A LoRA is trained (that is, moved) on a tiny UNet by this package, packed, and written with ``convert --to
diffusers``. The pipeline's own ``load_lora_weights`` reads the file; what its UNet gives then is compared
with the adapted model here and with the base. The other way, what diffusers saves is read as a pack and
attached; and the pack is merged into the UNet's folder, which diffusers opens.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

import adapterpack


def unet() -> UNet2DConditionModel:
    """A random UNet of two levels, one with attention, 20,000 parameters."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        cross_attention_dim=12,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


@torch.no_grad()
def output(model: torch.nn.Module) -> torch.Tensor:
    """What a UNet makes of fixed noise, a step and a text's states."""
    generator = torch.Generator().manual_seed(5)
    sample, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 12, generator=generator)
    result: torch.Tensor = model(sample, 7, encoder_hidden_states=states).sample
    return result


def main(folder: str) -> None:
    """Both ways; raises where an output differs by more than 1e-5, or a LoRA does nothing."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    base = output(unet())
    unet().save_pretrained(out / "unet")
    model = adapterpack.adapt(
        unet(), adapterpack.LoRA(r=3, alpha=5, targets=("to_q", "to_v", "to_out.0")), "style"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    expected = output(model)
    adapterpack.save(model, out / "style")
    adapterpack.convert(out / "style", out / "style.safetensors", to="diffusers", base=out / "unet")
    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(str(out), weight_name="style.safetensors", adapter_name="style")
    loaded = output(pipeline.unet)
    pipeline.unet.save_lora_adapter(str(out / "theirs"), adapter_name="style")
    (theirs,) = (out / "theirs").glob("*.safetensors")
    adapterpack.convert(theirs, out / "again", to="pack", base=out / "unet")
    again = output(adapterpack.attach(unet(), adapterpack.load(out / "again"), check_base=False))
    adapterpack.merge(out / "unet", [out / "style"], out / "merged")
    merged = output(UNet2DConditionModel.from_pretrained(out / "merged").eval())
    change = float((expected - base).abs().max())
    errors = {
        "load_lora_weights": float((loaded - expected).abs().max()),
        "back as a pack": float((again - expected).abs().max()),
        "merged": float((merged - expected).abs().max()),
    }
    sys.stdout.write(f"change {change:.3g}, errors {errors}\n")
    if change < 1e-2 or max(errors.values()) > 1e-5:
        raise SystemExit("diffusers and this package disagree")


if __name__ == "__main__":
    main(sys.argv[1])
