"""Tiny random vision-language models, one of each family, with a tokenizer and the processor's settings."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers as hf
from architecture_proofs import make_base
from architectures import Architecture
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

_TEXT = {
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
}
_VIT = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "image_size": 12,
    "patch_size": 4,
}
_SIGLIP = {**_VIT, "vision_use_head": False}
_PATCHES = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_PIXTRAL = {**_VIT, "image_size": 32, "head_dim": 8}
_PINS = [[12, 24], [24, 12], [24, 24]]
IMAGE = 7
_TOKENS = {"image_token_id": IMAGE}
_QWEN = {**_TOKENS, "video_token_id": 8, "vision_start_token_id": 5, "vision_end_token_id": 6}
_TURNED = {**_TEXT, "rope_parameters": _ROPE}
_WINDOWS = ["sliding_attention", "full_attention"]
_SQUARE = {"height": 12, "width": 12}


class Family(NamedTuple):
    """A family: its tiny config, transformers' image processor for it, the processor's settings, those of the
    processor for texts with images, and whether it has a chat template.
    """

    config: Callable[[], Any]
    processor: str
    settings: Mapping[str, Any]
    whole: Mapping[str, Any] = MappingProxyType({})
    talks: bool = True


def _idefics(name: str) -> Family:
    vision = {**_VIT, "image_size": 16}
    settings = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    return Family(
        lambda: getattr(hf, f"{name}Config")(
            vision_config=vision, text_config=hf.LlamaConfig(**_TEXT), scale_factor=2, **_TOKENS
        ),
        f"{name}ImageProcessor",
        settings,
    )


def _paligemma(text: Callable[[], Any]) -> Family:
    return Family(
        lambda: hf.PaliGemmaConfig(
            vision_config=hf.SiglipVisionConfig(**_SIGLIP, projection_dim=32),
            text_config=text(),
            projection_dim=32,
            **_TOKENS,
        ),
        "SiglipImageProcessor",
        {"size": _SQUARE},
        {"processor_class": "PaliGemmaProcessor"},
        talks=False,
    )


_QWEN_PICTURES = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 1024}
FAMILIES = {
    "llava": Family(
        lambda: hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**_VIT),
            text_config=hf.LlamaConfig(**_TEXT),
            vision_feature_layer=-1,
            **_TOKENS,
        ),
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 12}, "crop_size": 12},
    ),
    "internvl": Family(
        lambda: hf.InternVLConfig(
            vision_config=hf.InternVLVisionConfig(**{**_VIT, "image_size": [16, 16], "patch_size": [4, 4]}),
            text_config=hf.Qwen2Config(**_TEXT),
            vision_feature_layer=-1,
            **_TOKENS,
        ),
        "GotOcr2ImageProcessor",
        {"size": {"height": 16, "width": 16}, "max_patches": 4},
    ),
    "idefics3": _idefics("Idefics3"),
    "smolvlm": _idefics("SmolVLM"),
    "pixtral": Family(
        lambda: hf.LlavaConfig(
            vision_config=hf.PixtralVisionConfig(**_PIXTRAL),
            text_config=hf.MistralConfig(**_TEXT),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            **_TOKENS,
        ),
        "PixtralImageProcessor",
        {"size": {"longest_edge": 32}},
        {"patch_size": 4},
    ),
    "mistral3": Family(
        lambda: hf.Mistral3Config(
            vision_config=hf.PixtralVisionConfig(**_PIXTRAL),
            text_config=hf.MistralConfig(**_TEXT),
            vision_feature_layer=-1,
            **_TOKENS,
        ),
        "PixtralImageProcessor",
        {"size": {"longest_edge": 32}},
        {"patch_size": 4, "spatial_merge_size": 2},
    ),
    "llava_next": Family(
        lambda: hf.LlavaNextConfig(
            vision_config=hf.CLIPVisionConfig(**_VIT),
            text_config=hf.LlamaConfig(**_TEXT),
            vision_feature_layer=-1,
            image_grid_pinpoints=_PINS,
            **_TOKENS,
        ),
        "LlavaNextImageProcessor",
        {"size": {"shortest_edge": 12}, "crop_size": 12, "image_grid_pinpoints": _PINS},
    ),
    "granite_vision": Family(
        lambda: hf.LlavaNextConfig(
            vision_config=hf.SiglipVisionConfig(**_SIGLIP),
            text_config=hf.GraniteConfig(**_TEXT),
            vision_feature_layer=[-2, -1],
            vision_feature_select_strategy="full",
            image_grid_pinpoints=_PINS,
            **_TOKENS,
        ),
        "LlavaNextImageProcessor",
        {"size": {"shortest_edge": 12}, "crop_size": 12, "image_grid_pinpoints": _PINS},
    ),
    "llava_onevision": Family(
        lambda: hf.LlavaOnevisionConfig(
            vision_config=hf.SiglipVisionConfig(**_SIGLIP),
            text_config=hf.Qwen2Config(**_TEXT),
            vision_feature_layer=-1,
            video_token_id=8,
            image_grid_pinpoints=_PINS,
            vision_aspect_ratio="anyres_max_2",
            **_TOKENS,
        ),
        "LlavaOnevisionImageProcessor",
        {"size": _SQUARE, "image_grid_pinpoints": _PINS},
    ),
    "qwen2_vl": Family(
        lambda: hf.Qwen2VLConfig(
            vision_config={**_PATCHES, "embed_dim": 32, "mlp_ratio": 2}, text_config=_TURNED, **_QWEN
        ),
        "Qwen2VLImageProcessor",
        _QWEN_PICTURES,
    ),
    "qwen2_5_vl": Family(
        lambda: hf.Qwen2_5_VLConfig(
            vision_config={**_PATCHES, "window_size": 16, "fullatt_block_indexes": [1]},
            text_config=_TURNED,
            **_QWEN,
        ),
        "Qwen2VLImageProcessor",
        _QWEN_PICTURES,
    ),
    "qwen3_vl": Family(
        lambda: hf.Qwen3VLConfig(
            vision_config={**_PATCHES, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            text_config={**_TEXT, "rope_parameters": {**_ROPE, "mrope_interleaved": True}},
            **_QWEN,
        ),
        "Qwen2VLImageProcessor",
        _QWEN_PICTURES,
    ),
    # tokens of an image, or of a prompt, attend to later ones of the same
    "gemma3": Family(
        lambda: hf.Gemma3Config(
            vision_config=hf.SiglipVisionConfig(**{**_SIGLIP, "image_size": 16}),
            text_config=hf.Gemma3TextConfig(**_TEXT, sliding_window=3, layer_types=_WINDOWS),
            mm_tokens_per_image=4,
            **_TOKENS,
        ),
        "Gemma3ImageProcessor",
        {"size": {"height": 16, "width": 16}},
    ),
    "paligemma": _paligemma(lambda: hf.GemmaConfig(**_TEXT)),
    "paligemma2": _paligemma(lambda: hf.Gemma2Config(**_TEXT, sliding_window=3, layer_types=_WINDOWS)),
}
LANGUAGE = "all-language"


def photo(width: int, height: int, seed: int = 0) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def url(data: bytes) -> str:
    """A picture as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


PICTURES = [photo(37, 53), photo(61, 22, 1), photo(30, 30, 2)]
_SPECIAL = {
    0: "<pad>",
    1: "<s>",
    2: "</s>",
    IMAGE: "<image>",
    8: "<video>",
    9: "<fake_token_around_image>",
    10: "<global-img>",
    11: "[IMG_BREAK]",
    12: "[IMG_END]",
    13: "<img>",
    14: "</img>",
    3: "<start_of_image>",
    4: "<end_of_image>",
    **{15 + 2 * row + col: f"<row_{row + 1}_col_{col + 1}>" for row in range(2) for col in range(2)},
}
TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }} {% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def architecture(name: str, *targets: str) -> Architecture:
    """A family as a row of the table of architectures, with adapters on its language part by default."""
    family = FAMILIES[name]
    return Architecture(name, "image-text-to-text", lambda _: family.config(), targets or (LANGUAGE,))


def make_family(name: str, folder: Path) -> Path:
    """A base of a family, with a tokenizer of words and the settings of its image processor."""
    torch.set_num_threads(1)
    base = make_base(architecture(name), folder)
    words = {_SPECIAL.get(number, f"w{number}"): number for number in range(_TEXT["vocab_size"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(list(_SPECIAL.values()))
    core.save(str(base / "tokenizer.json"))
    family = FAMILIES[name]
    template = TEMPLATE.replace("<image>", "<start_of_image>") if name == "gemma3" else TEMPLATE
    talks = {"chat_template": template} if family.talks else {}
    (base / "tokenizer_config.json").write_text(
        json.dumps({**talks, "pad_token": "<pad>", "eos_token": "</s>"})
    )
    getattr(hf, f"{family.processor}Pil")(**family.settings).save_pretrained(base)
    if family.whole:
        (base / "processor_config.json").write_text(json.dumps(dict(family.whole)))
    return base
