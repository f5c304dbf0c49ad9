"""Every method and variant that people know by a name, how it is reached, and the test that shows it: none can be dropped silently."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import adapterpack.methods
from adapterpack.methods import INITS, LoRA, method_of, methods
from adapterpack.methods.catalogue import CONFIGS
from adapterpack.methods.nodes.registry import NODES
from adapterpack.testing import Case, algebra, packing
from adapterpack.testing.case import DIVISIBLE
from adapterpack.testing.matrix import cases

pytestmark = pytest.mark.fast

HERE = Path(__file__).parent
MATRIX = "matrix/test_methods.py::test_invariant"


def _config(method: str, **options: Any) -> Any:
    return getattr(adapterpack.methods, CONFIGS[method])(**options)


class Row(NamedTuple):
    """The name that people use; the method and its options; the test that shows what is special about it."""

    name: str
    method: str
    options: dict[str, Any]
    shown: str = MATRIX


IDS, RELATIVES, ROTATIONS, SEEDED = (4, 7), "peft/test_relatives.py", "peft/test_rotations.py", "peft/test_seeded.py"
ROWS = (
    Row("LoRA", "lora", {"r": 3}),
    Row("rsLoRA", "lora", {"r": 4, "use_rslora": True}),
    Row("LoRA+", "lora", {"r": 2, "lr_ratio": 16.0}, "test_hooks.py::test_b_learns_at_its_own_rate"),
    Row("DoRA", "dora", {"r": 2}, f"{RELATIVES}::test_doras_gradient_is_pefts"),
    Row("AdaLoRA, its budget", "adalora", {"init_r": 4, "target_r": 2}, "test_hooks.py::test_the_budget_is_pefts"),
    Row("aLoRA", "alora", {"r": 2, "alora_invocation_tokens": (2, 3)}, "test_positions.py::test_activated_lora_equals_peft"),
    Row("GraLoRA", "gralora", {"r": 4, "k": 2}, f"{RELATIVES}::test_peft_loads_our_pack"),
    Row("GraLoRA, hybrid", "gralora", {"r": 4, "k": 2, "hybrid_r": 2}, f"{RELATIVES}::test_peft_loads_our_pack"),
    Row("HiRA", "hira", {"r": 3}, f"{RELATIVES}::test_peft_loads_our_pack"),
    Row("LoHa", "loha", {"r": 2}, f"{RELATIVES}::test_peft_loads_our_pack"),
    Row("LoKr", "lokr", {"r": 2}, f"{RELATIVES}::test_peft_loads_our_pack"),
    Row("VeRA", "vera", {"r": 3}, f"{SEEDED}::test_peft_loads_our_pack"),
    Row("RandLoRA", "randlora", {"r": 3}, f"{SEEDED}::test_randloras_bases_are_the_seeds"),
    Row("VB-LoRA", "vblora", {"r": 2, "vector_length": 4}, f"{SEEDED}::test_vbloras_best_weights_alone"),
    Row("Uni-LoRA", "unilora", {"r": 2}, f"{SEEDED}::test_uniloras_order_must_be_known"),
    Row("TinyLoRA", "tinylora", {"r": 2}, f"{SEEDED}::test_tinyloras_vectors_alone"),
    Row("DeLoRA", "delora", {"r": 2}, f"{RELATIVES}::test_peft_loads_our_pack"),
    Row("MiSS", "miss", {"r": 3}, f"{RELATIVES}::test_peft_loads_our_pack"),
    Row("Bone, MiSS's old name", "miss", {"r": 4}, f"{RELATIVES}::test_bone_is_read_as_miss"),
    Row("KaSA", "kasa", {"r": 3}, "test_hooks.py::test_penalties_are_the_papers"),
    Row("MoRA", "mora", {"r": 2}, f"{RELATIVES}::test_mora_is_its_formula"),
    Row("SHiRA", "shira", {"r": 2}, f"{SEEDED}::test_peft_loads_our_pack"),
    Row("IA3", "ia3", {}, f"{ROTATIONS}::test_our_folder_in_peft_and_the_formula"),
    Row("BOFT", "boft", {"block_size": 2, "n_butterfly_factor": 2}, f"{ROTATIONS}::test_a_butterfly_of_several_factors"),
    Row("OFT, exact", "oft", {"block_size": 3}, f"{ROTATIONS}::test_rotations_are_orthogonal"),
    Row("OFT, Neumann", "oft", {"block_size": 3, "use_cayley_neumann": True}, f"{ROTATIONS}::test_our_folder_in_peft_and_the_formula"),
    Row("HRA", "hra", {"r": 2}, f"{ROTATIONS}::test_a_fresh_hra_adapter_of_even_rank_is_exactly_the_base"),
    Row("RoAd", "road", {}, f"{ROTATIONS}::test_our_folder_in_peft_and_the_formula"),
    Row("C3A", "c3a", {}, f"{SEEDED}::test_peft_loads_our_pack"),
    Row("FourierFT", "fourierft", {"n_frequency": 5}, f"{SEEDED}::test_peft_loads_our_pack"),
    Row("WaveFT", "waveft", {"n_frequency": 5}, f"{SEEDED}::test_peft_loads_our_pack"),
    Row("PSOFT", "psoft", {"r": 3}, f"{ROTATIONS}::test_psoft_is_the_formula_and_peft_with_the_same_signs"),
    Row("BitFit, BEFT", "beft", {}, f"{ROTATIONS}::test_beft_gives_a_bias_to_a_layer_without_one"),
    Row("LN tuning", "ln_tuning", {}, f"{ROTATIONS}::test_ln_tuning_here_in_peft_merged_and_exported"),
    Row("trainable tokens", "trainable_tokens", {"token_indices": (3,)},
        f"{ROTATIONS}::test_trainable_tokens_here_in_peft_merged_and_exported"),
    Row("trained heads", "lora", {"modules_to_save": ("classifier",)}, "test_train.py::test_new_modules_are_trained_whole"),
    Row("LoReFT", "loreft", {"r": 3}, "test_blocks.py::test_the_adapted_model_is_the_formula"),
    Row("DiReFT", "loreft", {"r": 2, "orthogonal": False}, "test_blocks.py::test_the_adapted_model_is_the_formula"),
    Row("Compacter", "compacter", {"phm_dim": 1}, "test_blocks.py::test_rules_are_stored_once"),
    Row("prompt tuning, random", "prompt_tuning", {"num_virtual_tokens": 2, "init": "random"},
        "test_prompts.py::test_off_and_out_are_exactly_the_base"),
    Row("prompt tuning, vocabulary", "prompt_tuning", {"num_virtual_tokens": 2, "init": "vocabulary"},
        "test_prompts.py::test_a_prompt_made_from_tokens_is_those_tokens"),
    Row("prompt tuning, text", "prompt_tuning", {"num_virtual_tokens": 2, "init": "text", "token_ids": IDS},
        "test_prompts.py::test_a_text_is_read_by_the_models_tokenizer"),
    Row("P-tuning, MLP", "p_tuning", {"num_virtual_tokens": 2, "encoder": "mlp"}, "test_prompts.py::test_networks_are_torchs_own"),
    Row("P-tuning, LSTM", "p_tuning", {"num_virtual_tokens": 2, "encoder": "lstm", "encoder_hidden": 5},
        "test_prompts.py::test_networks_are_torchs_own"),
    Row("prefix tuning", "prefix_tuning", {"num_virtual_tokens": 2}, "test_prompts.py::test_a_decoder_sees_the_prompt_before_each_row"),
    Row("prefix tuning, projected", "prefix_tuning", {"num_virtual_tokens": 2, "projection": True, "encoder_hidden": 5},
        "test_prompts.py::test_networks_are_torchs_own"),
    Row("prefix tuning, of a cache", "prefix_tuning", {"num_virtual_tokens": 2, "init": "text", "token_ids": IDS},
        "test_prompts.py::test_a_prompt_made_from_tokens_is_those_tokens"),
    Row("multitask prompt tuning", "multitask_prompt_tuning", {"num_virtual_tokens": 2, "num_tasks": 3},
        "test_prompts.py::test_tasks_are_chosen_by_row"),
    Row("CPT", "cpt", {"token_ids": IDS, "token_types": (1, 1)}, "test_prompts.py::test_cpt_moves_within_its_balls"),
    Row("Cartridge", "cartridge", {"num_virtual_tokens": 2, "token_ids": IDS},
        "test_prompts.py::test_a_prompt_made_from_tokens_is_those_tokens"),
    Row("LLaMA-Adapter", "llama_adapter", {}, "test_llama_adapter.py::test_it_equals_peft_both_ways"),
)
BOTTLENECKS = {  # AdapterHub's defaults of DoubleSeqBn, SeqBn and ParBn
    "houlsby": ("all-blocks", "output", "silu", 16, 1.0),
    "pfeiffer": ("all-layers", "output", "relu", 16, 1.0),
    "parallel": ("all-ffn", "input", "relu", 2, 4.0),
}
STARTS = {
    "default": "test_plain_inits", "gaussian": "test_plain_inits", "zeros": "test_plain_inits", "orthogonal": "test_plain_inits",
    "pissa": "test_pissa_is_the_principal_part", "olora": "test_olora_is_the_qr_decomposition", "eva": "test_eva_shares_ranks_out",
    "corda": "test_corda_is_the_weight_seen_through_the_inputs", "loftq": "test_loftq_is_what_quantization_loses",
    "lora_ga": "test_lora_ga_follows_the_gradient", "mica": "test_mica_is_the_smallest_directions",
}
ROUTERS = {"arrow": "test_composition.py::test_arrow_is_pefts_arrow", "xlora": "test_composition.py::test_xlora_is_pefts_xlora"}


def _require_test(shown: str) -> None:
    """A test of that name, or with a name that begins so, is in that file."""
    file, _, name = shown.partition("::")
    assert re.search(rf"^def {re.escape(name)}", (HERE / file).read_text("utf-8"), re.M), f"{shown} is no test any more"


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_a_name_is_reached_and_shown(row: Row) -> None:
    """The options are taken; the method makes its parameters from them, and its pack of them comes back; the test of it exists."""
    config = _config(row.method, **row.options)
    assert method_of(config) is methods()[row.method]
    assert all(getattr(config, key) == value for key, value in row.options.items())
    subject = next(case.layer for case in cases(methods()[row.method]))
    case = Case(methods()[row.method], config, DIVISIBLE[0] if methods()[row.method].traits.layers[0] == "linear" else subject)
    algebra.shapes_declared(case)
    packing.pack_round_trip(case)
    _require_test(row.shown)


def test_the_defaults_are_the_papers() -> None:
    """OFT is exact unless told otherwise; bottlenecks are AdapterHub's three; LoRA+ is of whoever has a B, and may choose a rate for it."""
    assert _config("oft").use_cayley_neumann is False
    for name, expected in BOTTLENECKS.items():
        made = getattr(adapterpack.methods.Bottleneck, name)()
        assert (made.targets, made.source, made.act, made.reduction, made.scaling) == expected, name
    assert {"lora", "dora", "alora", "kasa"} <= {name for name, one in methods().items() if hasattr(one.config, "lr_ratio")}


def test_every_method_has_a_name_here() -> None:
    """No method of the catalogue is without a row, but the variants and the methods that nobody asked for by name."""
    beside = {"bat", "bottleneck", "deft", "glora", "miss_mini"}
    assert {row.method for row in ROWS} | beside == set(CONFIGS)


@pytest.mark.parametrize("name", STARTS)
def test_an_init_is_reached_and_shown(name: str) -> None:
    """LoRA takes each init by its name; PiSSA by random projection, too, and EVA with more ranks to share out."""
    assert LoRA(init=name).init == name and set(STARTS) == set(INITS)
    _require_test(f"test_inits.py::{STARTS[name]}")
    assert LoRA(init="pissa", init_options={"iterations": 4}) != LoRA(init="eva", init_options={"rho": 1.5})


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_is_reached_and_shown(name: str) -> None:
    """X-LoRA and Arrow are nodes of a composition."""
    assert NODES[name].name == name
    _require_test(ROUTERS[name])
