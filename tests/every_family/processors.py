"""The processor of a tiny model that sees: its type's own, by transformers' mappings, with settings that follow
from the model's configuration, and a tokenizer in which every token of an image is a word.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers.models.auto import image_processing_auto, processing_auto

from adapterpack.exporting.tracing.vision_parts import Vision

from .sizes import WORDS

IMAGE, VIDEO = "<image>", "<video>"
TOKENS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "aya_vision": {"image_token": "<|IMG_PATCH|>"},
        "gemma3": {
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        "gemma4": {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"},
        "internvl": {"context_image_token": IMAGE, "start_image_token": "<img>", "end_image_token": "</img>"},
        "mistral3": {"image_token": "[IMG]"},
        "ovis2": {"image_token": "<IMG_ATOM>"},
    }
)
"""What a type's own tokens are called, where its processor does not take any name."""
OTHERS = (
    "<img> </img> [IMG_BREAK] [IMG_END] <fake_token_around_image> <global-img> <row_1_col_1> <row_1_col_2> "
    "<row_2_col_1> <row_2_col_2> <|START_OF_IMG|> <|END_OF_IMG|> TILE_GLOBAL TILE_1 TILE_2 TILE_3 TILE_4 "
    "<IMG_START> <IMG_GRID> <IMG_COL> <IMG_ROW> <IMG_END> <image> <video> <end_of_utterance>"
)
"""Tokens that processors write around those of images."""
WITHOUT_TEMPLATE = ("paligemma",)
"""Types whose processor makes a prompt of a text itself."""


def make_processor(kind: str, model: Any, folder: Path) -> Any:
    """The processor of a type, saved in ``folder`` with its tokenizer, or None where transformers makes it only
    with a library that is not installed; its settings are in the folder all the same.
    """
    settings = _settings(model)
    tokenizer = _tokenizer(kind, model.config)
    name = processing_auto.PROCESSOR_MAPPING_NAMES[kind]
    of = processing_auto.processor_class_from_name(name)
    module: Any = sys.modules.get(of.__module__)  # None where a library that it needs is not installed
    if module is not None and vars(module).get("num2words", True) is None:
        module.num2words = str  # for texts about videos, of which there are none
    images = whole = None
    try:
        images = _image_processor(kind, settings)
        whole = _seeing(of, image_processor=images, tokenizer=tokenizer, **settings)
    except ImportError:  # torchvision
        pass
    mark = getattr(whole, "image_token", tokenizer.image_token)
    if kind not in WITHOUT_TEMPLATE:
        tokenizer.chat_template = TEMPLATE.replace(IMAGE, mark)
    for part in filter(None, (tokenizer, whole or images)):
        part.save_pretrained(folder)
    if whole is None:
        said = {key: value for key, value in settings.items() if isinstance(value, int | str)}
        (folder / "processor_config.json").write_text(json.dumps({"processor_class": name, **said}))
    return whole


TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }} {% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def _seeing(of: Any, **given: Any) -> Any:
    """A processor that reads images and texts alone, whatever else it could."""

    def check(self: Any, name: str, part: object) -> object:
        return part is None or of.check_argument_for_proper_class(self, name, part)

    takes = signature(of.__init__).parameters
    chosen = {name: value for name, value in given.items() if name in takes}
    absent = dict.fromkeys({"video_processor", "feature_extractor"} & takes.keys())
    made = type(of.__name__, (of,), {"check_argument_for_proper_class": check})(**chosen, **absent)
    made.get_attributes = lambda: ["image_processor", "tokenizer"]
    for name in absent:
        delattr(made, name)
    return made


def _settings(model: Any) -> dict[str, Any]:
    """Settings of processors by their names, as far as a model's configuration says what they are."""
    config = model.config
    vision, layout = config.vision_config, Vision(model).layout
    size = getattr(vision, "image_size", None)
    edge = size[0] if isinstance(size, list | tuple) else size
    patch = getattr(vision, "patch_size", None)
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    names = [name for name, _ in model.named_parameters()]
    tokens = layout.positions - any("image_newline" in name for name in names)
    found = {
        "edge": edge,
        "patch_size": patch,
        "merge_size": getattr(vision, "spatial_merge_size", None),
        "temporal_patch_size": getattr(vision, "temporal_patch_size", None),
        "img_size": edge,
        "max_patches": 4,
        "max_soft_tokens": 70,
        "pooling_kernel_size": getattr(vision, "pooling_kernel_size", None),
        "num_additional_image_tokens": int(any("class_embedding" in name for name in names)),
        **dict.fromkeys(("image_seq_length", "image_seq_len", "num_image_tokens"), tokens),
    }
    own = (
        "vision_feature_select_strategy",
        "downsample_factor",
        "spatial_merge_size",
        "vision_aspect_ratio",
        "image_grid_pinpoints",
    )
    found |= {name: getattr(config, name, None) for name in own}
    found["vision_feature_select_strategy"] = getattr(config, own[0], "default")
    return {name: value for name, value in found.items() if value is not None}


def _image_processor(kind: str, settings: Mapping[str, Any]) -> Any:
    whole, parts = (
        processing_auto.PROCESSOR_MAPPING_NAMES,
        image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES,
    )
    same = [kind, *(other for other in parts if whole.get(other) == whole[kind])]
    names = next(parts[other] for other in same if other in parts)
    of = getattr(transformers, names.get("pil") or names["torchvision"])
    usual = of().to_dict()
    edge = settings.get("edge", 0)
    unit = settings["patch_size"] * settings.get("merge_size", 1)
    sizes: Mapping[frozenset[str], Mapping[str, int]] = {
        frozenset({"height", "width"}): {"height": edge, "width": edge},
        frozenset({"shortest_edge"}): {"shortest_edge": edge},
        frozenset({"longest_edge"}): {"longest_edge": 2 * edge if "max_image_size" in usual else edge},
        # of pixels
        frozenset({"shortest_edge", "longest_edge"}): {
            "shortest_edge": unit**2,
            "longest_edge": 16 * unit**2,
        },
    }
    known = {
        **settings,
        "size": sizes.get(frozenset(usual.get("size") or ())),
        "crop_size": edge,
        "max_image_size": {"longest_edge": edge},
    }
    made = of(**{name: known[name] for name in usual.keys() & known.keys()})
    if "image_seq_length" in settings:
        made.image_seq_length = settings["image_seq_length"]
    return made


def _tokenizer(kind: str, config: Any) -> Any:
    """A word for each id; the special tokens have the ids of the configuration."""
    words = {number: f"w{number}" for number in range(WORDS)} | dict(enumerate(_SPECIAL.values()))
    named = {"image_token": IMAGE, "video_token": VIDEO, **TOKENS.get(kind, {})}
    for field, number in config.to_dict().items():
        name = field.removesuffix("_index").removesuffix("_id")
        if field != name and name.endswith("_token") and number in range(len(_SPECIAL), WORDS):
            words[number] = named.setdefault(name, f"<{name}>")
    others = [
        text for text in dict.fromkeys((*OTHERS.split(), *named.values())) if text not in words.values()
    ]
    words |= dict(enumerate(others, len(_SPECIAL)))
    core = Tokenizer(models.WordLevel({word: number for number, word in words.items()}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([word for word in words.values() if not word.startswith("w")])
    core.post_processor = processors.TemplateProcessing("[BOS] $A", special_tokens=[("[BOS]", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=named, **_SPECIAL)


_SPECIAL = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
