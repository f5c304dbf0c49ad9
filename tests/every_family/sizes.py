"""What makes a model of any type tiny: small values for the fields of configurations, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

WORDS, WIDTH, CONTEXT, WINDOW = 96, 32, 64, 8
_HEADS, _HEAD, _INNER, _LAYERS, _EXPERTS, _IMAGE, _PATCH = 4, 8, 48, 2, 4, 16, 4

_COUNTS = """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth
        num_encoder_layers num_decoder_layers n_recurrent_layers n_input_layers n_output_layers
        encoder_depth local_transformer_layers n_layers_per_attn_res_block
        num_hidden_groups num_blocks depth_layers vision_num_layers text_num_layers"""
_BY_VALUE: tuple[tuple[int, str], ...] = (
    (
        WORDS,
        """vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size text_vocab_size
        encoder_hash_byte_group_vocab pronunciation_vocab_size shape_vocab_size ngram_vocab_size_base""",
    ),
    (
        WIDTH,
        """hidden_size d_model n_embd dim embed_dim emb_dim lru_width encoder_hidden_size
        decoder_hidden_size backbone_hidden_size output_hidden_size proj_dim projection_dim mm_hidden_size
        word_embed_proj_dim embedding_dim dim_model embed_proj_dim text_hidden_size hidden_dim vision_dim
        output_size attention_hidden_size hidden_size_per_layer_input out_hidden_size ple_embed_dim
        output_dim num_hidden_channels vocab_size_or_dim projector_hidden_size projection_size d_inner_dim
        pooler_output_size decoder_output_dim text_embed_dim vision_hidden_size adapter_output_dim
        tdnn_out_dim xvector_output_dim classifier_proj_size conv_dim_size predictor_hidden_size
        vision_output_dim input_embedding_size output_embedding_size pronunciation_embed_dim
        shape_embed_dim embedding_size hidden_size_in decoder_dim encoder_dim adapter_in_dim
        adapter_out_dim adapter_input_size downsample_hidden_size cross_hidden_size encoder_hidden_dim
        reassemble_hidden_size""",
    ),
    (
        _HEADS,
        """num_attention_heads n_head n_heads num_heads encoder_attention_heads attention_heads
        decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads
        num_query_groups linear_num_value_heads linear_num_heads heads num_attn_heads
        num_global_attention_heads""",
    ),
    (
        _HEAD,
        """head_dim d_head dim_head attention_head_dim kv_channels d_kv qk_nope_head_dim qk_rope_head_dim
        v_head_dim swa_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head
        mamba_head_dim rotary_dim attention_head_size query_pre_attn_scalar index_head_dim
        mamba_d_state ssm_state_size state_size d_rel global_head_dim swa_v_head_dim cross_head_dim""",
    ),
    (
        _INNER,
        """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner ffn_hidden_size
        dense_intermediate_size intermediate_size_mlp dff dim_ff feed_forward_size expert_ffn_hidden_size
        moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size hidden_dim_ff
        moe_shared_expert_intermediate_size shared_experts_intermediate_size mlp_dim d_inner
        num_channels_ff prompt_mid_dim ffn_intermediate_size mlp_hidden_size intermediate_dim
        router_hidden_size_ff centroid_intermediate_size""",
    ),
    (_LAYERS, _COUNTS),
    (
        _EXPERTS,
        """num_experts num_local_experts n_routed_experts moe_num_experts num_experts_total
        num_routed_experts zero_expert_num""",
    ),
    (
        2,
        """num_experts_per_tok num_experts_per_token moe_topk moe_k moe_num_active_experts
        mamba_n_groups n_groups mamba_ngroups n_group num_expert_group linear_num_key_heads
        hc_mult hc_count swa_num_key_value_heads type_vocab_size num_codebooks n_recurrent_loops n_mamba_heads
        attn_layer_period expert_layer_period no_rope_layer_interval layer_group_size
        global_attn_every_n_layers sliding_window_pattern _sliding_window_pattern o_groups heads_per_ngram
        decoder_sparse_step_period altup_num_inputs full_attention_interval num_global_key_value_heads
        temporal_patch_size fullatt_block_stride num_query_tokens""",
    ),
    (
        1,
        """first_k_dense_replace topk_group n_shared_experts moe_num_shared_experts num_shared_experts
        attn_layer_offset expert_layer_offset num_dense_layers moe_layer_start_index num_kv_shared_layers
        prefix_dense_sliding_window_pattern max_window_layers num_nextn_predict_layers loop_layer_index_start
        num_key_value_heads_per_layer""",
    ),
    (
        16,
        """relative_attention_max_distance relative_max_distance position_bias_max_distance q_lora_rank kv_lora_rank o_lora_rank router_hidden_size gated_norm_rank laurel_rank
        adapter_rank mamba_dt_rank time_step_rank qk_head_dim hc_lowrank loop_gate_rank
        num_conv_pos_embeddings num_mel_bins
        qkv_proj_rank feature_size num_centroids feat_extract_channels
        max_source_positions mm_tokens_per_image vision_soft_tokens_per_image num_image_tokens
        audio_soft_tokens_per_image n_mels fusion_hidden_size head_hidden_size number_output_channels
        bottleneck_features bin_embedding_dim num_depth_bins auxiliary_channels input_feat_per_channel
        attractor_hidden_size decoder_channels aspp_out_channels""",
    ),
    (15, "conv_depthwise_kernel_size"),
    (4, "num_queries num_denoising"),
    (8, "mamba_n_heads mamba_num_heads"),
    # an indexer of few heads scores several tokens exactly zero, and runtimes choose among these as they like
    (16, "index_n_heads"),
    (2 * WIDTH, "mamba_d_ssm"),
    (
        WINDOW,
        """sliding_window sliding_window_size attention_window_size window_size attention_chunk_size
        local_attention chunk_size mamba_chunk_size index_topk floor_scale log_scaling_n_floor
        position_buckets
        index_block_size block_size relative_attention_num_buckets position_bias_num_buckets num_buckets index_topk_blocks_size
        centroid_intermediate_top_k local_attention_window_len ffn_round_up_to_multiple_of
        block_multiple_of max_relative_position""",
    ),
    (
        CONTEXT,
        """max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions
        model_max_length max_sequence_length max_inference_chunksize max_text_length max_length
        num_positions rel_extent keep_window_size""",
    ),
    (CONTEXT // 2, "original_max_position_embeddings"),
    (_IMAGE, "image_size input_image_size pretrain_image_size"),
    (_PATCH, "patch_size encoder_patch_size"),
    (6, "rescale_every"),
)
SMALL: Mapping[str, int] = MappingProxyType(
    {field: value for value, fields in _BY_VALUE for field in fields.split()}
)
"""Field -> the most that it may be; one that is smaller by default, zero or None stays as it is."""

LAYERS = tuple(_COUNTS.split())
"""Fields that count layers."""

INDEXES = (
    "mlp_only_layers",
    "full_attn_idxs",
    "moe_layers",
    "attn_layer_indices",
    "hybrid_layer_ids",
    "ple_layer_ids",
)
"""Fields that list some layers by their numbers."""

KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types")
"""Fields and properties that say of each layer what kind it is; other lists as long are fields of layers, too."""

MOST_LAYERS = 5

LISTS: Mapping[str, int] = MappingProxyType(
    {
        "hidden_sizes": 16,
        "encoder_hidden_sizes": 16,
        "decoder_hidden_sizes": 16,
        "neck_hidden_sizes": 16,
        "depths": 1,
        "embed_dims": 16,
        "conv_dim": 16,
        "layer_depths": 1,
        "image_size": _IMAGE,
        "patch_size": _PATCH,
        "intermediate_size": _INNER,
        "out_indices": 1,
        "num_attention_heads": 2,
        "num_heads": 2,
        "decoder_in_channels": WIDTH,
    }
)
"""Fields that are lists -> the most that an element may be."""

IDS: Mapping[str, int] = MappingProxyType(
    {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
)
"""Tokens that have the same number in all models; every other special token takes one from the end of the
vocabulary.
"""


class Correction(dict[str, Any]):
    """Fields of one type that no general rule gets right; a nested configuration is a nested mapping.
    ``why`` is the reason.
    """

    def __init__(self, why: str, **fields: Any) -> None:
        super().__init__(fields)
        self.why = why


_TURNS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
    "eos_token_id": 2,
}
_SLIDING = {
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}


def _three(**more: Any) -> Correction:
    kinds = ["conv", "full_attention", "conv"]
    return Correction("by default no layer is a convolution", layer_types=kinds, num_hidden_layers=3, **more)


_LARGER = Correction("it halves images five times", image_size=64)
_WINDOWS = Correction(
    "windows that do not fill an image, and are no larger",
    image_size=32,
    window_size=3,
    depths=[1, 1],
    num_heads=[2, 2],
)
_RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 16, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}


def _on_resnet(*features: str) -> Correction:
    backbone = {**_RESNET, "out_features": [*features]}
    return Correction(
        "its backbone is another library's",
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
    )


_FOUR_DEPTHS = Correction(
    "it reads four layers",
    backbone_config={"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    fusion_hidden_size=16,
)

_GEMMA4 = {
    "model_type": "gemma4_vision",
    "hidden_size": WIDTH,
    "intermediate_size": _INNER,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "head_dim": _HEAD,
    "patch_size": _PATCH,
    "position_embedding_size": CONTEXT,
}
_TILES = Correction(
    "tiles of its small images", image_grid_pinpoints=[[_IMAGE, 2 * _IMAGE], [2 * _IMAGE, _IMAGE]]
)
CORRECTIONS: Mapping[str, Correction] = MappingProxyType(
    {
        "conditional_detr": _on_resnet("stage4"),
        "convnext": _LARGER,
        "dab-detr": _on_resnet("stage4"),
        "deformable_detr": _on_resnet("stage2", "stage3", "stage4"),
        "detr": _on_resnet("stage4"),
        "table-transformer": _on_resnet("stage4"),
        "convnextv2": _LARGER,
        "mobilevit": _LARGER,
        "mobilevitv2": _LARGER,
        "swin": _WINDOWS,
        "swinv2": _WINDOWS,
        "depth_anything": _FOUR_DEPTHS,
        "dpt": Correction("it reads four layers", num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3]),
        "pvt": _LARGER,
        "zoedepth": _FOUR_DEPTHS,
        "prompt_depth_anything": _FOUR_DEPTHS,
        "granite_speech5_ctc": Correction("shorter than its positions", encoder_config={"context_size": 32}),
        "bamba": Correction("by default no layer has attention", attn_layer_indices=[1], num_hidden_layers=3),
        "cohere_compass_text": Correction(
            "no default",
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters=dict.fromkeys(("sliding_attention", "full_attention"), _TURNS),
        ),
        "dbrx": Correction("no default", attn_config={"rope_theta": 10000.0, "clip_qkv": 8.0}),
        "deepseek_v2": Correction(
            "no default", num_experts_per_tok=2, n_routed_experts=4, n_shared_experts=1
        ),
        "dory": Correction(
            "its three parts are all of its layers",
            num_hidden_layers=3,
            n_input_layers=1,
            n_recurrent_layers=1,
            n_output_layers=1,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        "dots1": Correction("no default", num_experts_per_tok=2, n_routed_experts=4, n_shared_experts=1),
        "dots3_note": Correction("widths of its own where it slides", text_config=_SLIDING),
        "dots3_note_text": Correction("widths of its own where it slides", **_SLIDING),
        "florence2": Correction(
            "its vision tower has four stages",
            vision_config={
                "embed_dim": [16] * 4,
                "num_heads": [2] * 4,
                "num_groups": [2] * 4,
                "depths": [1] * 4,
                "max_temporal_embeddings": 4,
            },
        ),
        "gemma4": Correction("by default it sees nothing", vision_config=_GEMMA4),
        "emu3": Correction(
            "its image tokens are words",
            vocabulary_map={"<image>": 95, "<|extra_200|>": 94},
            vq_config={
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "hidden_size": 32,
                "codebook_size": 16,
            },
        ),
        "gemma4_assistant": Correction(
            "the default is refused, and all of its layers share",
            text_config={
                "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": 0,
                "num_kv_shared_layers": 2,
                "num_hidden_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"],
            },
        ),
        "gemma4_unified_assistant": Correction(
            "all of its layers share", text_config={"num_kv_shared_layers": 2}
        ),
        **dict.fromkeys(
            ("glm4v", "qwen2_vl", "qwen2_5_vl"),
            Correction("no default", text_config={"rope_parameters": _TURNS}),
        ),
        "gpt_neo": Correction("one entry a pattern", attention_types=[[["global", "local"], 1]]),
        "granitemoehybrid": Correction(
            "by default no layer has attention",
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            num_hidden_layers=3,
        ),
        "inkling2_loop_text": Correction(
            "a loop begins at a block and has a cache for each pass",
            n_layers_per_attn_res_block=1,
            num_hidden_layers=3,
            layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding"],
            loop_layer_index_end=2,
            loop_num_passes=2,
        ),
        "jamba": Correction("experts in a layer of each kind", num_hidden_layers=4, expert_layer_period=3),
        "lfm2": _three(full_attn_idxs=[1]),
        "lfm2_moe": _three(),
        "llama4": Correction(
            "pixels are shuffled into four times the width",
            vision_config={
                "intermediate_size": 4 * WIDTH,
                "projector_input_dim": WIDTH,
                "projector_output_dim": WIDTH,
            },
        ),
        "llava_next": _TILES,
        "llava_onevision": _TILES,
        "mamba2": Correction("width times expansion are its heads", num_heads=8),
        "mllama": Correction(
            "a layer reads images, of which the tower gives the width of each layer asked for and of the last",
            text_config={"num_hidden_layers": 3, "cross_attention_layers": [1]},
            vision_config={
                "num_global_layers": 1,
                "intermediate_layers_indices": [0, 1],
                "vision_output_dim": 96,
            },
        ),
        "nemotron": Correction("no default", num_key_value_heads=2),
        "qwen4_exp": Correction("no default", text_config=_INDEXER),
        "qwen4_exp_text": Correction("no default", **_INDEXER),
        "recurrent_gemma": Correction("the third of its pattern has attention", num_hidden_layers=3),
        "reformer": Correction(
            "its axes multiply to the positions, and add up to the width",
            axial_pos_shape=[8, 8],
            axial_pos_embds_dim=[16, 16],
            attn_layers=["local", "lsh"],
        ),
        "vipllava": Correction("layers that a small tower has", vision_feature_layers=[-1, -2]),
        "xlstm": Correction("widths are rounded up to 64", hidden_size=128, embedding_dim=128),
        "xmod": Correction("no default", languages=["en_XX"], default_language="en_XX"),
        "zamba": Correction(
            "its shared block is shared by two",
            layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
            num_hidden_layers=4,
            attention_hidden_size=64,
            attention_head_dim=16,
        ),
    }
)
"""By type."""
