"""Every method, init, layer and law that people know by a name, how it is reached, and the test that shows
it: none is dropped silently.

``python tests/test_catalogue.py`` prints ``docs/methods-proofs.md``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import adapterpack.adapter_methods
from adapterpack import LoRA
from adapterpack.adapter_methods import INITS, method_of, methods
from adapterpack.adapter_methods.nodes.registry import NODES
from adapterpack.testing import DIVISIBLE, Case, cases, pack_round_trip, shapes_declared

HERE = Path(__file__).parent
PROOFS = HERE.parent / "docs" / "methods-proofs.md"


def _config(method: str, **options: Any) -> Any:
    return adapterpack.methods()[method].config(**options)


class Row(NamedTuple):
    """The name that people use; the method and its options; the test that shows what is special about it."""

    name: str
    method: str
    options: dict[str, Any]
    shown: str


IDS = (4, 7)
OURS, BOTH = "test_peft_loads_our_pack", "test_our_folder_in_peft_and_the_formula"
RELATIVES, SEEDED, ROTATIONS = (f"peft/test_{name}.py::" for name in ("relatives", "seeded", "rotations"))
FORMS, SHARED = "peft/test_lora_forms.py::", "peft/test_shared_bases.py::"
PROMPTS, HUB = "test_prompts.py::", "test_adapterhub.py::test_it_gives_what_adapterhub_gives"
ROWS = (
    Row("LoRA", "lora", {"r": 3}, "test_inject.py::test_loss_and_gradients_are_pefts[False]"),
    Row(
        "rsLoRA",
        "lora",
        {"r": 4, "use_rslora": True},
        "test_inject.py::test_loss_and_gradients_are_pefts[True]",
    ),
    Row("LoRA+", "lora", {"r": 2, "lr_ratio": 16.0}, "test_hooks.py::test_b_learns_at_its_own_rate"),
    Row("DoRA", "dora", {"r": 2}, f"{RELATIVES}test_doras_gradient_is_pefts"),
    Row(
        "DoRA, rsLoRA",
        "dora",
        {"r": 2, "use_rslora": True},
        f"{RELATIVES}{OURS}[DoRA, rsLoRA, a rank of its own]",
    ),
    Row("AdaLoRA", "adalora", {"init_r": 4, "target_r": 2}, f"{RELATIVES}{OURS}[AdaLoRA]"),
    Row(
        "AdaLoRA, its budget",
        "adalora",
        {"init_r": 5, "target_r": 2, "deltaT": 2},
        "test_hooks.py::test_the_budget_is_pefts",
    ),
    Row(
        "AdaLoRA, by the trainer's callback",
        "adalora",
        {"init_r": 4, "target_r": 2, "tfinal": 2, "deltaT": 2},
        "test_relatives_line.py::test_the_budget_is_spent_and_the_pack_is_smaller_for_it",
    ),
    Row(
        "aLoRA",
        "alora",
        {"r": 2, "alora_invocation_tokens": (2, 3)},
        "test_positions.py::test_activated_lora_equals_peft[True]",
    ),
    Row("GraLoRA", "gralora", {"r": 4, "k": 2}, f"{RELATIVES}{OURS}[GraLoRA]"),
    Row("GraLoRA, hybrid", "gralora", {"r": 4, "k": 2, "hybrid_r": 2}, f"{RELATIVES}{OURS}[GraLoRA hybrid]"),
    Row("HiRA", "hira", {"r": 3}, f"{RELATIVES}{OURS}[HiRA]"),
    Row("LoHa", "loha", {"r": 2}, f"{RELATIVES}{OURS}[LoHa by factors]"),
    Row("LoKr", "lokr", {"r": 2}, f"{RELATIVES}{OURS}[LoKr with w2 in two]"),
    Row("VeRA", "vera", {"r": 3}, f"{SEEDED}{OURS}[vera]"),
    Row("PVeRA", "pvera", {"r": 3}, f"{SEEDED}{OURS}[pvera]"),
    Row("RandLoRA", "randlora", {"r": 3}, f"{SEEDED}{OURS}[randlora]"),
    Row("VB-LoRA", "vblora", {"r": 2, "vector_length": 4}, f"{SEEDED}{OURS}[vblora]"),
    Row("Uni-LoRA", "unilora", {"r": 2}, f"{SEEDED}{OURS}[unilora]"),
    Row("TinyLoRA", "tinylora", {"r": 2}, f"{SEEDED}{OURS}[tinylora]"),
    Row("DeLoRA", "delora", {"r": 2}, f"{RELATIVES}{OURS}[DeLoRA]"),
    Row("MiSS", "miss", {"r": 3}, f"{RELATIVES}{OURS}[MiSS]"),
    Row("Bone, MiSS's old name", "miss", {"r": 4}, f"{RELATIVES}test_bone_is_read_as_miss"),
    Row("KaSA", "kasa", {"r": 3}, f"{RELATIVES}{OURS}[KaSA]"),
    Row("LoRA with a bias, lora_bias", "lora_bias", {"r": 3}, f"{FORMS}test_lora_with_a_bias_of_ours"),
    Row(
        "LoRA with bias=lora_only",
        "biased_lora",
        {"r": 3},
        f"{FORMS}test_a_form_of_peft_here_and_there_again[biased_lora]",
    ),
    Row("PEANuT", "peanut", {"r": 4, "depth": 2}, f"{RELATIVES}{OURS}[PEANuT, deep]"),
    Row("OSF", "osf", {"effective_rank": 3}, f"{RELATIVES}{OURS}[OSF]"),
    Row("Super-Tuning", "supertuning", {"sparsity": 0.7}, f"{RELATIVES}{OURS}[Super-Tuning]"),
    Row(
        "Supra, Super-Tuning with LoRA", "supertuning", {"sparsity": 0.8, "r": 3}, f"{RELATIVES}{OURS}[Supra]"
    ),
    Row("PaRa", "para", {"r": 3}, f"{RELATIVES}{OURS}[PaRa]"),
    Row("FRoD", "frod", {"sparse_rate": 0.2}, f"{SHARED}test_frod_of_peft_here_and_there_again"),
    Row("Lily", "lily", {"r": 3, "stride": 2}, f"{SHARED}test_lily_of_peft_and_its_batches"),
    Row(
        "AdaMSS",
        "adamss",
        {"r": 4, "num_subspaces": 2},
        "peft/test_adamss.py::test_adamss_of_peft_here_and_there_again[plain]",
    ),
    Row(
        "Poly, Polytropon",
        "poly",
        {"r": 2, "n_tasks": 2},
        "peft/test_poly.py::test_poly_of_peft_task_by_task[1]",
    ),
    Row(
        "Poly, multi-head routing",
        "poly",
        {"r": 2, "n_splits": 3},
        "peft/test_poly.py::test_poly_of_peft_task_by_task[3]",
    ),
    Row("MoRA", "mora", {"r": 2}, f"{RELATIVES}test_mora_is_its_formula[rope-(7, 12)]"),
    Row("SHiRA", "shira", {"r": 2}, f"{SEEDED}{OURS}[shira]"),
    Row("IA3", "ia3", {}, f"{ROTATIONS}{BOTH}[ia3]"),
    Row("IA3, feed-forward", "ia3", {"feedforward": ("proj",)}, f"{ROTATIONS}{BOTH}[ia3-feedforward]"),
    Row("BOFT", "boft", {"block_size": 2, "n_butterfly_factor": 2}, f"{ROTATIONS}{BOTH}[boft]"),
    Row("OFT, exact", "oft", {"block_size": 3}, f"{ROTATIONS}{BOTH}[oft]"),
    Row(
        "OFT, Neumann",
        "oft",
        {"block_size": 3, "use_cayley_neumann": True},
        f"{ROTATIONS}{BOTH}[oft-neumann]",
    ),
    Row("HRA", "hra", {"r": 2}, f"{ROTATIONS}{BOTH}[hra]"),
    Row("RoAd", "road", {}, f"{ROTATIONS}{BOTH}[road_1]"),
    Row("RoAd 4", "road", {"variant": "road_4"}, f"{ROTATIONS}{BOTH}[road_4]"),
    Row("C3A", "c3a", {}, f"{SEEDED}{OURS}[c3a]"),
    Row("FourierFT", "fourierft", {"n_frequency": 5}, f"{SEEDED}{OURS}[fourierft]"),
    Row("WaveFT", "waveft", {"n_frequency": 5}, f"{SEEDED}{OURS}[waveft]"),
    Row(
        "PSOFT",
        "psoft",
        {"r": 3},
        f"{ROTATIONS}test_psoft_is_the_formula_and_peft_with_the_same_signs[cayley]",
    ),
    Row("BitFit, BEFT", "beft", {}, f"{ROTATIONS}{BOTH}[beft]"),
    Row(
        "LN tuning", "ln_tuning", {}, f"{ROTATIONS}test_ln_tuning_here_in_peft_merged_and_exported[tiny_bert]"
    ),
    Row(
        "trainable tokens",
        "trainable_tokens",
        {"token_indices": (3,)},
        f"{ROTATIONS}test_trainable_tokens_here_in_peft_merged_and_exported[True]",
    ),
    Row(
        "trained heads, modules_to_save",
        "lora",
        {"modules_to_save": ("classifier",)},
        "test_train.py::test_new_modules_are_trained_whole",
    ),
    Row(
        "bottleneck, Houlsby", "bottleneck", {"targets": "all-blocks", "act": "silu"}, f"{HUB}[bert-houlsby]"
    ),
    Row(
        "bottleneck, Pfeiffer",
        "bottleneck",
        {"targets": "all-layers", "act": "relu"},
        f"{HUB}[llama-pfeiffer]",
    ),
    Row(
        "bottleneck, parallel",
        "bottleneck",
        {"source": "input", "scaling": 4.0, "reduction": 2},
        f"{HUB}[bert-parallel]",
    ),
    Row("Compacter", "compacter", {"phm_dim": 1}, f"{HUB}[bert-compacter]"),
    Row("LoReFT", "loreft", {"r": 3}, "test_blocks.py::test_the_adapted_model_is_the_formula[bert-loreft]"),
    Row("DiReFT", "loreft", {"r": 2, "orthogonal": False}, "test_blocks.py::test_direft_is_its_formula"),
    Row(
        "prompt tuning, random",
        "prompt_tuning",
        {"num_virtual_tokens": 2, "init": "random"},
        "matrix/test_methods.py::test_invariant[prompt_tuning[1]-prompted_rows_never_mix]",
    ),
    Row(
        "prompt tuning, vocabulary",
        "prompt_tuning",
        {"num_virtual_tokens": 2, "init": "vocabulary"},
        f"{PROMPTS}test_our_folder_gives_our_outputs_in_peft[vocabulary]",
    ),
    Row(
        "prompt tuning, text",
        "prompt_tuning",
        {"num_virtual_tokens": 2, "init": "text", "token_ids": IDS},
        f"{PROMPTS}test_our_folder_gives_our_outputs_in_peft[text]",
    ),
    Row(
        "P-tuning, MLP",
        "p_tuning",
        {"num_virtual_tokens": 2, "encoder": "mlp"},
        f"{PROMPTS}test_our_folder_gives_our_outputs_in_peft[p-tuning]",
    ),
    Row(
        "P-tuning, LSTM",
        "p_tuning",
        {"num_virtual_tokens": 2, "encoder": "lstm", "encoder_hidden": 5},
        f"{PROMPTS}test_our_folder_gives_our_outputs_in_peft[p-tuning lstm]",
    ),
    Row(
        "prefix tuning",
        "prefix_tuning",
        {"num_virtual_tokens": 2},
        f"{PROMPTS}test_our_folder_gives_our_outputs_in_peft[prefix]",
    ),
    Row(
        "prefix tuning, projected",
        "prefix_tuning",
        {"num_virtual_tokens": 2, "projection": True, "encoder_hidden": 5},
        f"{PROMPTS}test_our_folder_gives_our_outputs_in_peft[projected prefix]",
    ),
    Row(
        "prefix tuning, of a prompt's cache",
        "prefix_tuning",
        {"num_virtual_tokens": 2, "init": "text", "token_ids": IDS},
        f"{PROMPTS}test_a_prompt_made_from_tokens_is_those_tokens[PrefixTuning]",
    ),
    Row(
        "multitask prompt tuning",
        "multitask_prompt_tuning",
        {"num_virtual_tokens": 2, "num_tasks": 3},
        f"{PROMPTS}test_our_folder_gives_our_outputs_in_peft[multitask]",
    ),
    Row(
        "CPT",
        "cpt",
        {"token_ids": IDS, "token_types": (1, 1)},
        f"{PROMPTS}test_our_folder_gives_our_outputs_in_peft[cpt]",
    ),
    Row(
        "Cartridge",
        "cartridge",
        {"num_virtual_tokens": 2, "token_ids": IDS},
        f"{PROMPTS}test_our_folder_gives_our_outputs_in_peft[cartridge]",
    ),
    Row("LLaMA-Adapter", "llama_adapter", {}, "test_llama_adapter.py::test_it_equals_peft_both_ways[True]"),
    Row(
        "LLaMA-Adapter, in graphs",
        "llama_adapter",
        {"adapter_len": 3},
        "matrix/test_architectures.py::test_bank[llama]",
    ),
)
BOTTLENECKS = {  # AdapterHub's defaults of DoubleSeqBn, SeqBn and ParBn
    "houlsby": ("all-blocks", "output", "silu", 16, 1.0),
    "pfeiffer": ("all-layers", "output", "relu", 16, 1.0),
    "parallel": ("all-ffn", "input", "relu", 2, 4.0),
}
STARTS = {
    "default": "test_inits.py::test_plain_inits",
    "gaussian": "test_inits.py::test_plain_inits",
    "zeros": "test_inits.py::test_plain_inits",
    "orthogonal": "test_inits.py::test_plain_inits",
    "pissa": "test_inits.py::test_pissa_is_the_principal_part[0-1.5]",
    "olora": "test_inits.py::test_olora_is_the_qr_decomposition",
    "eva": "test_inits.py::test_eva_is_the_principal_directions_of_the_inputs",
    "corda": "test_inits.py::test_corda_is_the_weight_seen_through_the_inputs[ipm]",
    "loftq": "test_inits.py::test_loftq_is_what_quantization_loses",
    "lora_ga": "test_inits.py::test_lora_ga_follows_the_gradient",
    "mica": "test_inits.py::test_mica_is_the_smallest_directions",
}
KINDS_TEST = "test_layer_kinds.py::test_the_model_computes_the_dense_formula"
BESIDE = {
    "PiSSA by randomized SVD": "test_inits.py::test_pissa_is_the_principal_part[6-1.5]",
    "EVA's ranks shared out": "test_inits.py::test_eva_shares_ranks_out",
    (
        "inits leave the base's bits, and PEFT reads what comes of them"
    ): "test_inits.py::test_in_a_model_the_base_is_untouched_and_the_pack_is_plain[pissa]",
    "inits start where PEFT's do": "test_inits.py::test_the_start_is_the_one_that_peft_takes[pissa-pissa]",
    "BD-LoRA": "peft/test_lora_forms.py::test_a_form_of_peft_here_and_there_again[BD-LoRA]",
    "MonteCLoRA": "peft/test_lora_forms.py::test_a_form_of_peft_here_and_there_again[MonteCLoRA]",
    "VeLoRA": "peft/test_lora_forms.py::test_a_form_of_peft_here_and_there_again[VeLoRA]",
    "QALoRA": "peft/test_lora_forms.py::test_qalora_is_what_pefts_layer_computes",
    "X-LoRA": "test_composition.py::test_xlora_is_pefts_xlora[deep, by layer]",
    "Arrow": "test_composition.py::test_arrow_is_pefts_arrow[2-0.3]",
    "Linear": "matrix/test_methods.py::test_invariant[lora[0]-layer_agrees]",
    "GPT-2's Conv1D": f"{KINDS_TEST}[GPT-2]",
    "Embedding": f"{KINDS_TEST}[embedding]",
    "Embedding, tied": f"{KINDS_TEST}[tied embedding]",
    "Conv1d": f"{KINDS_TEST}[conv 1d]",
    "Conv2d": f"{KINDS_TEST}[conv 2d]",
    "Conv3d": f"{KINDS_TEST}[conv 3d]",
    "convolutions of groups": f"{KINDS_TEST}[conv of groups]",
    "MultiheadAttention": f"{KINDS_TEST}[attention]",
    "bare parameters, fused experts": f"{KINDS_TEST}[experts]",
    (
        "every weight method at every kind that it takes"
    ): "matrix/test_methods.py::test_invariant[oft[0]-every_kind_agrees]",
    (
        "an unsupported layer is an error that names it"
    ): "test_layer_kinds.py::test_a_method_says_which_kinds_it_takes",
}
"""What else has a name: ways of inits, routers, layers."""


@pytest.mark.fast
@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_a_name_is_reached(row: Row) -> None:
    """The options are taken; the method makes its parameters from them, and its pack of them comes back."""
    config = _config(row.method, **row.options)
    assert method_of(config) is methods()[row.method]
    assert all(getattr(config, key) == value for key, value in row.options.items())
    subject = next(case.layer for case in cases(methods()[row.method]))
    case = Case(
        methods()[row.method],
        config,
        DIVISIBLE[0] if methods()[row.method].traits.layers[0] == "linear" else subject,
    )
    shapes_declared(case)
    pack_round_trip(case)


def test_every_test_that_is_named_is_one(collected: list[str]) -> None:
    """Each is collected under that very name, parameters and all: a test that is dropped or renamed is missed
    here.
    """
    named = {row.shown for row in ROWS} | set(STARTS.values()) | set(BESIDE.values())
    files = sorted({shown.partition("::")[0] for shown in named})
    tests = {name.partition("tests/")[2] for name in collected}
    if not set(files) <= {name.partition("::")[0] for name in tests}:  # this file is run alone
        command = [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-q",
            "-o",
            "addopts=",
            "-p",
            "no:cacheprovider",
            *files,
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, check=False)
        assert done.returncode == 0, done.stdout[-2000:]
        tests = {line.partition("tests/")[2] or line for line in done.stdout.splitlines()}
    assert named <= tests, f"no tests any more: {sorted(named - tests)}"


@pytest.mark.fast
def test_the_page_is_made_from_these_tables() -> None:
    """The page in the documentation says what stands here; `make golden` writes it."""
    assert page() == PROOFS.read_text("utf-8")


def page() -> str:
    """Name -> how it is reached -> the test, as a page of Markdown."""
    rows = [
        (row.name, f"`{row.method}`" + (f", `{row.options}`" if row.options else ""), row.shown)
        for row in ROWS
    ]
    rows += [(f"init {name}", f"`LoRA(init={name!r})`", shown) for name, shown in STARTS.items()]
    rows += [(name, "", shown) for name, shown in BESIDE.items()]
    table = "\n".join(f"| {name} | {reached} | `tests/{shown}` |" for name, reached, shown in rows)
    intro = (
        "Each line names one test among others: that against the peer (PEFT, AdapterHub) from the same "
        "tensors where there is a peer, else that against a formula in float64. What every method promises "
        "beside that is in `tests/golden/matrix.md`, and clause by clause in "
        "`docs/decisions/0027-the-matrix-clause-by-clause.md`."
    )
    head = "| name | reached by | test |\n| --- | --- | --- |"
    return (
        f"# Names, and the tests that show them\n\n{intro}\nMade by `python "
        f"tests/test_catalogue.py`.\n\n{head}\n{table}\n"
    )


@pytest.mark.fast
def test_the_defaults_are_the_papers() -> None:
    """OFT is exact unless told otherwise; bottlenecks are AdapterHub's three; LoRA+ is of whoever has a B,
    and may choose a rate for it.
    """
    assert _config("oft").use_cayley_neumann is False
    for name, expected in BOTTLENECKS.items():
        made = getattr(adapterpack.Bottleneck, name)()
        assert (made.targets, made.source, made.act, made.reduction, made.scaling) == expected, name
    assert {"lora", "dora", "alora", "kasa"} <= {
        name for name, one in methods().items() if hasattr(one.config, "lr_ratio")
    }


@pytest.mark.fast
def test_every_method_has_a_name_here() -> None:
    """No method of the catalogue is without a row, but the variants and the methods that nobody asked for by
    name.
    """
    beside = {"bat", "deft", "glora", "miss_mini"}
    assert {row.method for row in ROWS} | beside == set(adapterpack.methods())


@pytest.mark.fast
@pytest.mark.parametrize("name", STARTS)
def test_an_init_is_reached(name: str) -> None:
    """LoRA takes each init by its name; PiSSA by random projection, too, and EVA with more ranks to share
    out.
    """
    assert LoRA(init=name).init == name and set(STARTS) == set(INITS)
    assert LoRA(init="pissa", init_options={"iterations": 4}) != LoRA(init="eva", init_options={"rho": 1.5})


@pytest.mark.fast
def test_routers_are_nodes() -> None:
    """X-LoRA and Arrow are nodes of a composition."""
    assert all(NODES[name].name == name for name in ("arrow", "xlora"))


if __name__ == "__main__":
    sys.stdout.write(page())
