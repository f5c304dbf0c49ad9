"""The architectures whose graphs are proved: each a tiny random model from a config, with the layers that
adapters are put on.

A row says which task the model has and which kinds of methods it does not take, with the reason; crossed with
the modes of export and the kinds of methods these rows are the second table of promises.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from adapterpack.adapter_methods.bottleneck import Bottleneck
from adapterpack.adapter_methods.ia3 import IA3
from adapterpack.adapter_methods.llama_adapter import LLaMAAdapter
from adapterpack.adapter_methods.lora import LoRA
from adapterpack.adapter_methods.oft import OFT
from adapterpack.adapter_methods.prefix_tuning import PrefixTuning
from adapterpack.tasks.task import get_task

WORDS = 96
_SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 1}
_TOKENS = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = {**_SIZES, **_TOKENS, "max_position_embeddings": 64}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2}
_VISION = {**_SIZES, "image_size": 12, "patch_size": 4}
_PAIR = {
    "vocab_size": WORDS,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
_HEARING = {
    **_SIZES,
    "vocab_size": WORDS,
    "conv_dim": (12,),
    "conv_stride": (8,),
    "conv_kernel": (10,),
    "num_feat_extract_layers": 1,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
}
_NOTHING: Mapping[str, str] = MappingProxyType({})


class Architecture(NamedTuple):
    """One family. ``config(transformers)`` makes the tiny config, ``targets`` are the layers of weight
    methods.

    ``lacks`` names kinds of methods that it does not take, and why.
    """

    name: str
    task: str
    config: Callable[[Any], Any]
    targets: tuple[str, ...]
    lacks: Mapping[str, str] = _NOTHING

    @property
    def heads(self) -> tuple[str, ...]:
        """The modules that are trained whole beside the adapter."""
        return get_task(self.task).heads


def _decoder(name: str, config: Callable[[Any], Any], *targets: str, **lacks: str) -> Architecture:
    return Architecture(name, "text-generation", config, targets or ("q_proj", "v_proj", "down_proj"), lacks)


def _encoder(name: str, task: str, config: Callable[[Any], Any], *targets: str, **lacks: str) -> Architecture:
    usual = {"prompt": "no cache", "attention": "other projections"}
    return Architecture(
        name,
        task,
        config,
        targets or ("query", "value"),
        {kind: why for kind, why in {**usual, **lacks}.items() if why},
    )


ARCHITECTURES: tuple[Architecture, ...] = (
    _decoder("llama", lambda hf: hf.LlamaConfig(**_DECODER)),
    _decoder(
        "mistral",
        lambda hf: hf.MistralConfig(**{**_DECODER, "num_hidden_layers": 1}, sliding_window=8),
        prompt="window",
    ),
    _decoder("qwen2", lambda hf: hf.Qwen2Config(**_DECODER)),
    _decoder("qwen3", lambda hf: hf.Qwen3Config(**_DECODER)),
    _decoder(
        "gemma2",
        lambda hf: hf.Gemma2Config(**_DECODER, query_pre_attn_scalar=8, sliding_window=8),
        prompt="window",
    ),
    _decoder(
        "gemma3",
        lambda hf: hf.Gemma3TextConfig(**_DECODER, query_pre_attn_scalar=8, sliding_window=8),
        prompt="window",
    ),
    _decoder(
        "phi3",
        lambda hf: hf.Phi3Config(**_ENCODER, num_key_value_heads=2),
        "qkv_proj",
        "down_proj",
        attention="other projections",
    ),
    _decoder(
        "gpt2",
        lambda hf: hf.GPT2Config(
            vocab_size=WORDS, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        ),
        "c_attn",
        "c_fc",
        diagonal="transposed layers",
        rotation="transposed layers",
        attention="other projections",
    ),
    _decoder(
        "opt",
        lambda hf: hf.OPTConfig(**_ENCODER, ffn_dim=48, word_embed_proj_dim=32),
        "q_proj",
        "fc1",
        attention="other projections",
    ),
    _decoder(
        "bloom",
        lambda hf: hf.BloomConfig(**_TOKENS, hidden_size=32, n_layer=1, n_head=4),
        "query_key_value",
        "dense_h_to_4h",
        attention="other projections",
    ),
    _decoder(
        "falcon",
        lambda hf: hf.FalconConfig(**_ENCODER, alibi=False),
        "query_key_value",
        "dense_4h_to_h",
        prompt="multi-query",
        attention="other projections",
    ),
    _decoder(
        "mixtral",
        lambda hf: hf.MixtralConfig(
            **_DECODER, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
        ),
        "q_proj",
        "v_proj",
    ),
    _encoder(
        "bert",
        "text-classification",
        lambda hf: hf.BertConfig(**_ENCODER, num_labels=3),
        "query",
        "value",
        "pooler.dense",
    ),
    _encoder("roberta", "token-classification", lambda hf: hf.RobertaConfig(**_ENCODER, num_labels=3)),
    _encoder(
        "distilbert",
        "feature-extraction",
        lambda hf: hf.DistilBertConfig(
            **_TOKENS, dim=32, n_layers=1, n_heads=4, hidden_dim=48, max_position_embeddings=64
        ),
        "q_lin",
        "lin1",
    ),
    _encoder(
        "electra",
        "question-answering",
        lambda hf: hf.ElectraConfig(**_ENCODER, embedding_size=24),
        "query",
        "value",
        "embeddings_project",
    ),
    _encoder(
        "deberta-v2",
        "text-classification",
        lambda hf: hf.DebertaV2Config(
            **_ENCODER,
            num_labels=3,
            relative_attention=True,
            position_biased_input=False,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
        ),
        "value_proj",
        "intermediate.dense",
    ),
    _encoder(
        "modernbert", "fill-mask", lambda hf: hf.ModernBertConfig(**_ENCODER, local_attention=8), "Wqkv", "Wo"
    ),
    _encoder(
        "t5",
        "text2text-generation",
        lambda hf: hf.T5Config(
            vocab_size=WORDS, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
        ),
        "q",
        "v",
        "wo",
    ),
    _encoder(
        "bart",
        "text2text-generation",
        lambda hf: hf.BartConfig(**_PAIR, max_position_embeddings=64),
        "q_proj",
        "v_proj",
        "fc1",
    ),
    _encoder(
        "whisper",
        "automatic-speech-recognition",
        lambda hf: hf.WhisperConfig(
            **_PAIR,
            max_source_positions=20,
            max_target_positions=64,
            num_mel_bins=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        "q_proj",
        "v_proj",
        "fc1",
    ),
    _encoder(
        "vit-mbart",
        "image-to-text",
        lambda hf: hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            hf.ViTConfig(**_VISION),
            hf.MBartConfig(**_PAIR, max_position_embeddings=64),
            decoder_start_token_id=3,
            pad_token_id=0,
            eos_token_id=2,
        ),
        "q_proj",
        "v_proj",
        "fc1",
    ),
    _encoder(
        "vit",
        "image-classification",
        lambda hf: hf.ViTConfig(**_VISION, num_labels=3),
        "q_proj",
        "v_proj",
        attention="",
    ),
    _encoder(
        "wav2vec2",
        "audio-classification",
        lambda hf: hf.Wav2Vec2Config(**_HEARING, num_labels=3),
        "q_proj",
        "intermediate_dense",
    ),
    _encoder(
        "yolos",
        "object-detection",
        lambda hf: hf.YolosConfig(
            **{**_VISION, "image_size": [16, 24], "patch_size": 8}, num_detection_tokens=5, num_labels=3
        ),
        "query",
        "value",
    ),
    _encoder(
        "swin",
        "image-classification",
        lambda hf: hf.SwinConfig(
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=3,  # images of 8 and of 4 patches are padded to it
            num_labels=3,
        ),
        "q_proj",
        "fc1",
        activation="blocks of several widths",
    ),
    _encoder(
        "segformer",
        "semantic-segmentation",
        lambda hf: hf.SegformerConfig(
            num_encoder_blocks=2,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            sr_ratios=[2, 1],
            patch_sizes=[3, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=8,
            num_labels=3,
        ),
        "q_proj",
        "v_proj",
        activation="blocks of several widths",
    ),
    _encoder(
        "glpn",
        "depth-estimation",
        lambda hf: hf.GLPNConfig(
            num_encoder_blocks=2,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            sr_ratios=[2, 1],
            patch_sizes=[3, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=8,
        ),
        "query",
        "value",
        activation="blocks of several widths",
    ),
    _encoder(
        "clip",
        "zero-shot-image-classification",
        lambda hf: hf.CLIPConfig(
            text_config={**_ENCODER, "projection_dim": 16},
            vision_config={**_VISION, "projection_dim": 16},
            projection_dim=16,
        ),
        "q_proj",
        "fc1",
        "visual_projection",
        "text_projection",
    ),
    _encoder(
        "llava",
        "image-text-to-text",
        lambda hf: hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**_VISION),
            text_config=hf.LlamaConfig(**{**_DECODER, "num_hidden_layers": 1}),
            image_token_id=7,
            vision_feature_layer=-1,
        ),
        "q_proj",
        "fc1",
        "linear_1",
    ),
)
"""The rows, in the order of the table."""

MODES = ("folded", "inputs", "bank")


class Kind(NamedTuple):
    """One column for each mode: a method that stands for a place where adapters act. ``config(targets,
    heads)`` makes its config.
    """

    name: str
    config: Callable[[tuple[str, ...], tuple[str, ...]], Any]
    folds: bool = True


def _low_rank(targets: tuple[str, ...], heads: tuple[str, ...]) -> Any:
    return LoRA(r=3, alpha=5, targets=targets, modules_to_save=heads)


def _diagonal(targets: tuple[str, ...], heads: tuple[str, ...]) -> Any:
    return IA3(targets=targets, feedforward=targets[-1:])


def _rotation(targets: tuple[str, ...], heads: tuple[str, ...]) -> Any:
    return OFT(targets=targets, block_size=4)


def _activation(targets: tuple[str, ...], heads: tuple[str, ...]) -> Any:
    return Bottleneck(targets="all-blocks", reduction=8)


def _prompt(targets: tuple[str, ...], heads: tuple[str, ...]) -> Any:
    return PrefixTuning(num_virtual_tokens=3)


def _attention(targets: tuple[str, ...], heads: tuple[str, ...]) -> Any:
    return LLaMAAdapter(adapter_len=3)


KINDS: tuple[Kind, ...] = (
    Kind("low-rank", _low_rank),
    Kind("diagonal", _diagonal),
    Kind("rotation", _rotation),
    Kind("activation", _activation, folds=False),
    Kind("prompt", _prompt, folds=False),
    Kind("attention", _attention, folds=False),
)


def left_out(architecture: Architecture, mode: str, kind: Kind) -> str | None:
    """Why a cell is not promised, or None."""
    if mode == "folded" and not kind.folds:
        return "not in weights"
    return architecture.lacks.get(kind.name)


def render() -> str:
    """The table of promises as a page of Markdown."""
    head = ["architecture", "task", *(f"{mode}: {kind.name}" for mode in MODES for kind in KINDS)]
    rows = [
        [
            one.name,
            one.task,
            *(
                "promised" if (why := left_out(one, mode, kind)) is None else f"n/a ({why})"
                for mode in MODES
                for kind in KINDS
            ),
        ]
        for one in ARCHITECTURES
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
    intro = (
        "Each promised cell: a graph of a tiny random model, exported, attached and run by ONNX Runtime on "
        "the CPU, agrees with plain transformers in float64, each row alone, within 1e-4 of the largest "
        "output. Rows are ragged, padded on both sides where a decoder can tell, and as short as one token; "
        "decoders go on from their caches by one token and by several; rows of one batch use different "
        "adapters. The suite proves banks of every architecture and the other modes of some; `python "
        "tests/architecture_proofs.py` proves every cell."
    )
    return (
        f"# Architectures and what their graphs promise\n\n{intro}\nMade by `python "
        f"tests/architectures.py`.\n\n{table}\n"
    )


if __name__ == "__main__":
    sys.stdout.write(render())
