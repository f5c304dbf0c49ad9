"""The lengths at which a configuration changes the computation are read by the names of transformers."""

from __future__ import annotations

import pytest

from adapterpack.base.thresholds import thresholds_of

pytestmark = pytest.mark.fast

ROPE = "original_max_position_embeddings"


def _known(config: dict) -> dict[str, int]:
    return {threshold.field: threshold.length for threshold in thresholds_of(config).known}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"sliding_window": 40}, {"sliding_window": 40}),
        ({"sliding_window": None}, {}),
        ({"sliding_window": 40, "use_sliding_window": False}, {}),
        ({"sliding_window": 40, "layer_types": ["full_attention"] * 2}, {}),
        (
            {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]},
            {"sliding_window": 40},
        ),
        ({"attention_chunk_size": 64, "layer_types": ["chunked_attention"]}, {"attention_chunk_size": 64}),
        ({"attention_chunk_size": 64, "layer_types": ["full_attention"]}, {}),
        ({"floor_scale": 64, "attn_temperature_tuning": True}, {"floor_scale": 63}),
        ({"floor_scale": 64, "attn_temperature_tuning": False}, {}),
        ({"window_size": 256, "attention_layers": ["global", "local"]}, {"window_size": 256}),
        ({"window_size": 7}, {}),
        ({"local_attention": 128}, {"local_attention": 65}),
        ({"attention_window": [512, 256]}, {"attention_window": 129}),
        ({"attention_type": "block_sparse", "block_size": 64, "num_random_blocks": 3}, {"block_size": 704}),
        (
            {"rope_scaling": {"type": "su", "short_factor": [1.0]}, ROPE: 32, "max_position_embeddings": 96},
            {f"rope_scaling.{ROPE}": 32, "max_position_embeddings": 96},
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "longrope", ROPE: 32}, "x": {}}},
            {f"rope_parameters.full_attention.{ROPE}": 32},
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic"}, "max_position_embeddings": 96},
            {f"rope_parameters.{ROPE}": 96, "max_position_embeddings": 96},
        ),
        ({"rope_parameters": {"rope_type": "yarn", ROPE: 32}}, {}),
        (
            {"rope_parameters": {"rope_type": "yarn", ROPE: 32, "llama_4_scaling_beta": 0.1}},
            {f"rope_parameters.{ROPE}": 32},
        ),
        ({"text_config": {"sliding_window": 40}}, {"text_config.sliding_window": 40}),
        (
            {"encoder": {"sliding_window": 40}, "decoder": {"n_positions": 30}},
            {"encoder.sliding_window": 40, "decoder.n_positions": 30},
        ),
        ({"num_experts": 16}, {"num_experts": 16}),
        ({"relative_attention_max_distance": 128}, {"relative_attention_max_distance": 128}),
    ],
)
def test_a_threshold_is_read_by_the_name_that_transformers_gives_it(config: dict, expected: dict) -> None:
    assert _known(config) == expected


def test_the_shortest_comes_first_and_the_context_is_marked_as_an_end() -> None:
    known = thresholds_of({"max_position_embeddings": 512, "sliding_window": 40}).known
    assert [threshold.length for threshold in known] == [40, 512]
    assert [threshold.ends for threshold in known] == [False, True]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"hash_window": 3}, "hash_window"),
        ({"layer_types": ["full_attention", "new_attention"]}, "layer_types: new_attention"),
        ({"rope_parameters": {"rope_type": "new"}}, "rope_parameters: new"),
    ],
)
def test_what_cannot_be_judged_is_named(config: dict, named: str) -> None:
    assert thresholds_of(config).unjudged == (named,)


def test_values_of_a_stranger_are_no_thresholds() -> None:
    odd = {
        "sliding_window": "40",
        "attention_chunk_size": -1,
        "layer_types": 3,
        "rope_parameters": [1],
        "attention_window": ["x"],
        "text_config": 7,
        "num_experts": True,
        "max_position_embeddings": 1.5,
    }
    assert thresholds_of(odd) == ((), ())


def test_configurations_of_transformers_say_where_their_families_change() -> None:
    from transformers import CONFIG_MAPPING

    families = ("mistral", "gemma2", "olmo3", "qwen2", "llama4_text", "llama")
    known = {name: _known(CONFIG_MAPPING[name]().to_dict()) for name in families}
    assert [known[name].get("sliding_window") for name in families] == [4096, 4096, 4096, None, None, None]
    assert known["llama4_text"]["attention_chunk_size"] == 8192
    assert known["llama"] == {"max_position_embeddings": 2048}
