"""Which types are tried: read from transformers' own mappings at run time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import transformers

from adapterpack.tasks.task import TASKS, Task

from .sizes import KINDS
from .tiny import tiny_config

CAUSAL = "text-generation"
MAIN: Mapping[str, str] = MappingProxyType(
    {
        "text-classification": "bert roberta distilbert deberta-v2 electra modernbert xlm-roberta albert mpnet "
        "llama qwen2 qwen3 gemma2 mistral gpt2 t5 bart",
        "token-classification": "bert roberta distilbert deberta-v2 electra modernbert xlm-roberta qwen3",
        "question-answering": "bert roberta distilbert deberta-v2 electra modernbert xlm-roberta",
        "feature-extraction": "bert roberta distilbert mpnet modernbert xlm-roberta nomic_bert llama qwen2 qwen3 "
        "gemma3_text mistral t5",
        "embeddings": "bert roberta distilbert mpnet modernbert xlm-roberta qwen2 qwen3 gemma3_text mistral",
        "image-feature-extraction": "vit dinov2 dinov2_with_registers dinov3_vit clip_vision_model "
        "siglip_vision_model convnext",
        "image-classification": "vit deit beit convnext convnextv2 swin swinv2 resnet mobilevit mobilevitv2 segformer "
        "dinov2 dinov2_with_registers dinov3_vit siglip siglip2 clip efficientnet poolformer regnet pvt",
        "image-text-to-text": "llava llava_next llava_onevision vipllava qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe "
        "qwen3_5 smolvlm idefics3 paligemma gemma3 gemma3n gemma4 internvl mistral3 aya_vision glm4v ovis2 "
        "lfm2_vl kosmos-2 blip-2 instructblip florence2 mllama llama4 deepseek_vl fast_vlm perception_lm",
        "image-to-text": "vision-encoder-decoder blip git kosmos-2 pix2struct",
    }
)
"""Tasks of which only the main types are tried, since there are many or they are those of other tasks with
another head; of every other task all.
"""


def kinds_of(task: Task) -> tuple[str, ...]:
    """The types that transformers has for a task, in its order."""
    mapping = getattr(transformers, task.auto_class)._model_mapping._model_mapping
    return tuple(kind for kind in mapping if kind in transformers.CONFIG_MAPPING)


def every_type() -> Iterator[tuple[str, str]]:
    """Every pair of a task and a type, decoders first."""
    first = sorted(TASKS.values(), key=lambda task: (task.name != CAUSAL, task.name))
    for task in first:
        chosen = MAIN.get(task.name, "").split()
        yield from ((task.name, kind) for kind in kinds_of(task) if not chosen or kind in chosen)


DENSE, EXPERTS, HYBRID = "Decoders, dense", "Decoders with experts", "Decoders with a state"


def group_of(task: Task, kind: str) -> str:
    """Where the page shows a type: by what its task reads and what its layers are."""
    if (
        task.generates
        and not task.has_encoder
        and task.inputs[0] == "input_ids"
        and "pixel_values" not in task.inputs
    ):
        return _group_of_decoder(kind)
    reads = {name for name in task.inputs if name not in ("attention_mask", "decoder_input_ids")}
    if "pixel_values" in reads:
        return "Images and text" if len(reads) > 1 or task.generates else "Images"
    if not any("ids" in name for name in reads):
        return "Speech and sound"
    return "Encoders and decoders" if task.has_encoder else "Encoders and heads"


def _group_of_decoder(kind: str) -> str:
    try:
        config = tiny_config(kind, decodes=True)
    except Exception:  # what cannot be built is not told apart
        return DENSE
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    model: Any = mapping.get(type(config), None)
    text = config.get_text_config(decoder=True)
    kinds = {str(one) for name in KINDS for one in getattr(text, name, None) or ()}
    if getattr(model, "_is_stateful", False) or kinds & STATES:
        return HYBRID
    counts = (getattr(text, name, None) for name in EXPERT_COUNTS)
    return EXPERTS if any(type(count) is int and count > 1 for count in counts) else DENSE


STATES = frozenset({"linear_attention", "conv", "recurrent", "mamba", "hybrid", "hybrid_sliding"})
"""Kinds of layers that keep a state other than keys and values."""
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
