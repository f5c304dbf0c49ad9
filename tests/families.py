"""Tiny random models of many families: a class, a config, and inputs. Everything in them is random, biases
and norms too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import transformers

WORDS, WIDTH, LAYERS = 41, 24, 2
Inputs = dict[str, torch.Tensor]


class Family(NamedTuple):
    """``model`` is the class of transformers, ``config`` its configuration's; ``fields`` are what is set in
    it. ``kinds`` are the kinds of layers that hold its weights. ``more`` are targets of other kinds that LoRA
    can change there, by kind.
    """

    model: str
    config: str
    fields: dict[str, Any]
    inputs: Callable[[], Inputs]
    kinds: tuple[str, ...] = ("linear", "norm", "table")
    more: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    def build(self) -> torch.nn.Module:
        """The model, every parameter moved away from where it is born: a bias of zero would hide one that was
        lost.
        """
        torch.manual_seed(3)
        config = getattr(transformers, self.config)(**self.fields)
        model: torch.nn.Module = getattr(transformers, self.model)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    def load(self, folder: Any) -> torch.nn.Module:
        """The model in a folder."""
        model: torch.nn.Module = getattr(transformers, self.model).from_pretrained(folder).eval()
        return model

    def __call__(self, model: torch.nn.Module) -> torch.Tensor:
        """What the model says of the inputs, as one tensor."""
        with torch.no_grad():
            said = model(**self.inputs())
        names = ("logits", "logits_per_image", "last_hidden_state", "pooler_output")
        return torch.cat([said[name].flatten() for name in names if said.get(name) is not None])


def _ids() -> torch.Tensor:
    return torch.arange(2 * 7).reshape(2, 7) * 3 % WORDS


def words() -> Inputs:
    return {"input_ids": _ids()}


def two_sides() -> Inputs:
    return {"input_ids": _ids(), "decoder_input_ids": _ids().flip(1)}


def image(size: int = 8) -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * 3 * size * size).reshape(2, 3, size, size).sin()


def _decoder(**rest: Any) -> dict[str, Any]:
    return {
        "vocab_size": WORDS,
        "hidden_size": WIDTH,
        "intermediate_size": 40,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "head_dim": 6,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **rest,
    }


def _encoder(**rest: Any) -> dict[str, Any]:
    return {
        "vocab_size": WORDS,
        "hidden_size": WIDTH,
        "intermediate_size": 40,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 3,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "num_labels": 3,
        **rest,
    }


_TABLE = {"embedding": ("embed_tokens",)}
FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM", "LlamaConfig", _decoder(attention_bias=True, mlp_bias=True), words, more=_TABLE
    ),
    "mistral": Family("MistralForCausalLM", "MistralConfig", _decoder(sliding_window=4), words, more=_TABLE),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", _decoder(tie_word_embeddings=True), words),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", _decoder(), words, more=_TABLE),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _decoder(tie_word_embeddings=True, query_pre_attn_scalar=6),
        words,
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _decoder(tie_word_embeddings=True, query_pre_attn_scalar=6),
        words,
    ),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", _decoder(), words),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": WORDS,
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": 3,
            "n_inner": 40,
            "n_positions": 16,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        words,
        ("transposed", "norm", "table"),
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", _encoder(is_decoder=True, rotary_pct=0.5), words
    ),
    "opt": Family(
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": WORDS,
            "hidden_size": WIDTH,
            "ffn_dim": 40,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 3,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": 12,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        words,
    ),
    "falcon": Family(
        "FalconForCausalLM",
        "FalconConfig",
        {
            "vocab_size": WORDS,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "bias": True,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        words,
    ),
    "bloom": Family(
        "BloomForCausalLM",
        "BloomConfig",
        {
            "vocab_size": WORDS,
            "hidden_size": WIDTH,
            "n_layer": LAYERS,
            "n_head": 3,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        words,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        "MixtralConfig",
        _decoder(num_local_experts=3, num_experts_per_tok=2),
        words,
        more={"experts": ("experts.gate_up_proj", "experts.down_proj")},
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        _decoder(
            num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=20
        ),
        words,
        more={"experts": ("experts.gate_up_proj", "experts.down_proj")},
    ),
    "bert": Family(
        "BertForSequenceClassification",
        "BertConfig",
        _encoder(),
        words,
        more={"embedding": ("word_embeddings", "position_embeddings")},
    ),
    "roberta": Family("RobertaForTokenClassification", "RobertaConfig", _encoder(pad_token_id=1), words),
    "distilbert": Family(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {
            "vocab_size": WORDS,
            "dim": WIDTH,
            "hidden_dim": 40,
            "n_layers": LAYERS,
            "n_heads": 3,
            "max_position_embeddings": 32,
            "num_labels": 3,
        },
        words,
    ),
    "deberta_v2": Family(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        _encoder(
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=4,
            type_vocab_size=0,
            norm_rel_ebd="layer_norm",
            share_att_key=False,
        ),
        words,
    ),
    "modernbert": Family(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        _encoder(
            global_attn_every_n_layers=2,
            local_attention=4,
            cls_token_id=1,
            sep_token_id=2,
            bos_token_id=1,
            eos_token_id=2,
            attn_implementation="eager",
        ),
        words,
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": WORDS,
            "d_model": WIDTH,
            "d_kv": 8,
            "d_ff": 40,
            "num_layers": LAYERS,
            "num_heads": 3,
            "pad_token_id": 0,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
            "eos_token_id": 1,
        },
        two_sides,
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": WORDS,
            "d_model": WIDTH,
            "encoder_layers": LAYERS,
            "decoder_layers": LAYERS,
            "encoder_attention_heads": 3,
            "decoder_attention_heads": 3,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 40,
            "max_position_embeddings": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": 2,
        },
        two_sides,
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": WORDS,
            "num_mel_bins": 8,
            "d_model": WIDTH,
            "encoder_layers": LAYERS,
            "decoder_layers": LAYERS,
            "encoder_attention_heads": 3,
            "decoder_attention_heads": 3,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 40,
            "max_source_positions": 8,
            "max_target_positions": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        lambda: {
            "input_features": torch.linspace(-1, 1, 2 * 8 * 16).reshape(2, 8, 16).sin(),
            "decoder_input_ids": _ids(),
        },
        more={"conv": ("conv1", "conv2")},
    ),
    "vit": Family(
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 3,
            "intermediate_size": 40,
            "image_size": 8,
            "patch_size": 4,
            "num_labels": 3,
        },
        lambda: {"pixel_values": image()},
        ("linear", "norm"),
        {"conv": ("patch_embeddings.projection",)},
    ),
    "clip": Family(
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {
                "vocab_size": WORDS,
                "hidden_size": WIDTH,
                "intermediate_size": 40,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 3,
                "max_position_embeddings": 16,
                "eos_token_id": 2,
                "bos_token_id": 1,
                "pad_token_id": 0,
            },
            "vision_config": {
                "hidden_size": WIDTH,
                "intermediate_size": 40,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 3,
                "image_size": 8,
                "patch_size": 4,
            },
            "projection_dim": 12,
        },
        lambda: {"input_ids": _ids(), "pixel_values": image()},
        more={"conv": ("patch_embedding",)},
    ),
    "convnext": Family(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {
            "hidden_sizes": [8, 12],
            "depths": [1, 1],
            "num_stages": 2,
            "patch_size": 2,
            "image_size": 8,
            "num_labels": 3,
        },
        lambda: {"pixel_values": image()},
        ("linear", "norm"),
        {"conv": ("patch_embeddings", "downsampling_layer.1"), "grouped_conv": ("dwconv",)},
    ),
}
"""By name. Hidden sizes are no powers of two, and the heads' rows are no multiples of eight."""
