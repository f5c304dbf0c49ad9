"""The engine's graph: the tokens and logits of the ordinary one, on caches that stay where they are, which
are written and not copied.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from architecture_proofs import make_base, make_pack
from architectures import ARCHITECTURES, KINDS
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    set_seed,
)

from adapterpack import DoRA, LoRA, Session, adapt, export, merge, quantize, save, validate
from adapterpack.base.thresholds import Reach
from adapterpack.bundle.decoder_graph import DECODER
from adapterpack.bundle.manifest import GRAPH, PAST, graph_file, read_bundle
from adapterpack.engine_graph import parity
from adapterpack.errors import ParityError, Unsupported
from adapterpack.graph_passes import static_cache_decoder
from adapterpack.graph_passes.position_inputs import PositionInputs
from adapterpack.onnx_graph.products import is_fast
from adapterpack.runtime.engine.engine import Engine
from adapterpack.runtime.generation.sampling import Sampling
from adapterpack.runtime.ort.model import OrtModel
from adapterpack.serving.api import APIS
from adapterpack.tasks.task import MAIN

Make = Callable[..., Any]
BY_NAME = {one.name: one for one in ARCHITECTURES}
PROMPTS: list[list[int]] = [[5, 6, 7, 30, 31], [8, 9], [10, 11, 12, 13, 14, 15, 16], [60]]


@pytest.fixture(scope="module")
def placed(base_of: Make, pack_of: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(mode: str) -> Path:
        if mode not in made:
            made[mode] = tmp_path_factory.mktemp("in-place") / mode
            names = ("alpha",) if mode == "folded" else ("alpha", "beta")
            room = {"slots": 4, "max_rank": 6} if mode == "bank" else {}
            export(
                base_of("llama"),
                [pack_of("llama", name) for name in names],
                made[mode],
                mode=mode,
                in_place=True,
                **room,
            )
        return made[mode]

    return get


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        ("bank", ["alpha", None, "beta", "alpha"]),
        ("bank", ["beta"] * 4),
        ("bank", None),
        ("folded", None),
    ],
)
def test_tokens_are_those_of_the_ordinary_graph(mode: str, names: Any, placed: Make, bundle_of: Make) -> None:
    """Ragged rows; of several adapters, of one for all, and of none."""
    ordinary, session = Session(bundle_of("llama", mode), "cpu"), Session(placed(mode), "cpu")
    answers = session.generate(PROMPTS, names, max_new_tokens=40)
    assert answers == ordinary.generate(PROMPTS, names, max_new_tokens=40)
    assert {MAIN, DECODER} & session._opened.keys() == {DECODER}  # the weights are in memory once


def test_a_server_has_the_weights_in_memory_once(placed: Make) -> None:
    """No API asks the ordinary graph what the engine's says, too."""
    engine = Engine(placed("bank"), "cpu", max_rows=2)
    assert {"texts", "speech"} & {name for name, kind in APIS.items() if kind.serves(engine)} == {"texts"}
    assert {MAIN, DECODER} & engine.bundle._opened.keys() == {DECODER}


def test_a_batch_that_is_broken_off_leaves_nothing(placed: Make) -> None:
    """An error of the caller's in the middle ends the rows; a call out of the middle of another answers as it
    would alone.
    """
    session = Session(placed("bank"), "cpu")
    alone, inner = session.generate(PROMPTS, "alpha", max_new_tokens=6), list[Any]()
    with pytest.raises(ZeroDivisionError):
        session.generate(PROMPTS, "beta", max_new_tokens=6, emit=lambda row, token, text: 1 // 0)
    outer = session.generate(
        PROMPTS,
        "beta",
        max_new_tokens=3,
        emit=lambda row, token, text: inner.append(session.generate(PROMPTS, "alpha", max_new_tokens=6)),
    )
    assert inner and all(answers == alone for answers in inner)
    assert outer == session.generate(PROMPTS, "beta", max_new_tokens=3)


def test_a_pack_is_loaded_and_rows_run_with_it(placed: Make, bundle_of: Make, pack_of: Make) -> None:
    ordinary, session = Session(bundle_of("llama", "bank"), "cpu"), Session(placed("bank"), "cpu")
    for each in (ordinary, session):
        each.load(pack_of("llama", "gamma"))
    names: list[str | None] = ["gamma", "alpha", None, "gamma"]
    assert session.generate(PROMPTS, names, max_new_tokens=12) == ordinary.generate(
        PROMPTS, names, max_new_tokens=12
    )


def test_a_step_writes_one_position_of_each_row_and_touches_no_other_byte(placed: Make) -> None:
    engine = Engine(placed("bank"), "cpu", max_rows=6)
    rows = [
        engine.row(ids, None if name is None else engine.bundle.pack(name), Sampling()).sequences[0]
        for ids, name in zip(PROMPTS, ["alpha", None, "beta", "alpha"], strict=True)
    ]
    for row in rows:
        engine.rows.admit(row)
    for row in rows:
        engine.rows.prefill(len(row.prompt))
    pool = engine.rows._pool
    before = {name: buffer._array.copy() for name, buffer in pool._buffers.items()}
    where, lengths = (
        {name: buffer.address for name, buffer in pool._buffers.items()},
        [row.kv_len for row in rows],
    )
    engine.rows.decode()
    assert len(before) == 2 * sum(name.startswith(PAST) and name.endswith(".key") for name in before)
    for name, buffer in pool._buffers.items():
        assert buffer.address == where[name]
        changed = (buffer._array != before[name]).any(axis=(1, 3))
        assert [np.flatnonzero(row).tolist() for row in changed] == [
            *([length] for length in lengths),
            [],
            [],
        ]


def unpacked(graph: OrtModel) -> bool:
    """Whether a graph was opened without laying its weights out for its kernels."""
    try:
        return graph._ort.get_session_options().get_session_config_entry("session.disable_prepacking") == "1"
    except RuntimeError:  # no such entry: ONNX Runtime's default holds
        return False


def test_the_engine_s_graph_is_opened_as_the_ordinary_one_is(placed: Make) -> None:
    """Weights are laid out for the kernels of both (an int4 step is ten times slower without), and of neither
    in a mapped session of a graph that is not quantized, as its proof opens it.
    """
    for mapped in (False, True):
        session = Session(placed("bank"), "cpu", mapped=mapped)
        assert [unpacked(session.graph(part)) for part in (MAIN, DECODER)] == [mapped, mapped]


def test_both_graphs_have_one_file_of_weights(placed: Make) -> None:
    folder = placed("bank")
    whole, engine = ir.load(folder / GRAPH).graph, ir.load(folder / graph_file(DECODER)).graph
    assert not (folder / f"{graph_file(DECODER)}.data").exists()
    stored = {
        value.name: value.const_value
        for value in engine.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    slots = {value.name for value in whole.inputs if value.name in whole.initializers}
    base = {
        value.name: value.const_value.nbytes
        for value in whole.initializers.values()
        if value.name not in slots
    }
    assert sum(tensor.nbytes for tensor in stored.values()) > 0.9 * sum(base.values())
    assert {Path(tensor.location).name for tensor in stored.values()} == {f"{GRAPH}.data"}
    fed = {value.name for value in engine.inputs}
    joined = {
        f"{member}.up"
        for path, site in read_bundle(folder).sites.items()
        if f"{path}.up" in fed
        for member in site.members
    }
    assert joined  # queries, keys and values have one matrix
    assert slots - joined <= fed
    assert not slots & set(engine.initializers)  # the bank itself is not in it
    assert {node.op_type for node in engine} & {"Attention", "Softmax"} == set()


def test_the_report_and_the_schema_know_of_it(placed: Make) -> None:
    bundle = read_bundle(placed("bank"))
    assert bundle.decoder
    assert 0 < bundle.parity["decoder"]["max_relative"] < 1e-5
    assert not validate(placed("bank"), full=True).findings


@pytest.mark.long
@pytest.mark.parametrize("name", ["gpt2", "opt", "mistral", "gemma2", "falcon", "mixtral"])
def test_traced_decoders_and_sliding_windows(name: str, tmp_path: Path) -> None:
    """Graphs by tracing, where a softmax stands for the attention: learned positions, windows that rows
    outgrow, caps, shared heads.
    """
    base = make_base(BY_NAME[name], tmp_path / "base")
    pack = make_pack(BY_NAME[name], base, KINDS[0])
    bundle = export(base, [pack], tmp_path / "bundle", mode="bank", task="text-generation", in_place=True)
    assert bundle.parity["decoder"]["max_relative"] < 2e-5
    assert bundle.parity["decoder"]["steps"] > 8  # the windows of these models


ROTATED = {
    "llama": ({}, True, True),
    "qwen3": ({"head_dim": 16}, True, False),  # norms lie between the product and the rotation
    # its tables are narrower than the operator takes them
    "phi": ({"partial_rotary_factor": 0.5, "num_key_value_heads": 4}, False, False),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name != "llama")) for name in ROTATED]
)
def test_the_attention_rotates_and_takes_its_product_packed(name: str, tmp_path: Path) -> None:
    """Where the operator can: fewer nodes, equal numbers, as the export proves."""
    fields, rotated, packed = ROTATED[name]
    config = AutoConfig.for_model(
        name,
        **{
            "vocab_size": 96,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            **fields,
        },
    )
    set_seed(5)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    adapted = adapt(model, LoRA(r=3, targets=("q_proj", "k_proj", "v_proj")), "one")
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    pack = save(adapted, tmp_path / "pack", base=tmp_path / "base")
    bundle = export(tmp_path / "base", [pack], tmp_path / "bundle", task="text-generation", in_place=True)
    assert bundle.parity["decoder"]["max_relative"] < 1e-5
    graph = ir.load(tmp_path / "bundle" / graph_file(DECODER)).graph
    attentions = [node for node in graph if node.op_type == "GroupQueryAttention"]
    assert {(bool(node.attributes.get_int("do_rotary")), node.inputs[1] is None) for node in attentions} == {
        (rotated, packed)
    }
    assert rotated != any(node.op_type == "RotaryEmbedding" for node in graph)
    assert rotated != any(value.name == "position_ids" for value in graph.inputs)


def test_prompts_and_adapters_at_positions_go_on_in_place(tmp_path: Path) -> None:
    """What stands in the cache before a row, beside rows that have nothing there; heads of a width that the
    operator takes with zeros after them.
    """
    odd = BY_NAME["llama"]
    odd = odd._replace(
        config=lambda hf: type(made := BY_NAME["llama"].config(hf))(**{**made.to_dict(), "head_dim": 12})
    )
    base = make_base(odd, tmp_path / "base")
    packs = [make_pack(odd, base, kind) for kind in KINDS if kind.name in {"prompt", "attention", "low-rank"}]
    bundle = export(
        base, packs, tmp_path / "bundle", mode="bank", task="text-generation", in_place=True, dtype="float16"
    )
    assert bundle.parity["decoder"]["max_relative"] < 5e-3


def test_a_quantized_bundle_has_the_graph_too(placed: Make, tmp_path: Path) -> None:
    bundle = quantize(placed("bank"), tmp_path / "int8", scheme="int8")
    assert bundle.parity["decoder"]["max_relative"] < 1e-5
    assert {"MatMulNBits", "GroupQueryAttention"} <= {
        node.op_type for node in ir.load(tmp_path / "int8" / graph_file(DECODER)).graph
    }
    names: list[str | None] = ["alpha", None, "beta", "alpha"]
    assert len(Session(tmp_path / "int8", "cpu").generate(PROMPTS, names, max_new_tokens=4)) == 4
    assert not validate(tmp_path / "int8", full=True).findings


@pytest.mark.long
def test_quantized_with_an_adapter_that_reads_the_bases_weights(
    tiny_llama: Path, pack_of: Make, tmp_path: Path
) -> None:
    """DoRA's values need the float weights, which are gone: rows have those of the bank, in the engine's
    graph as in the ordinary one.
    """
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    adapt(model, DoRA(r=3), "dora")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 * parameter.requires_grad)
    packs = [save(model, None, base=tiny_llama), pack_of("llama", "alpha")]
    answers = []
    for in_place in (True, False):
        out = tmp_path / str(in_place)
        assert (
            export(tiny_llama, packs, out, in_place=in_place, quantize="int8", accuracy="exact").decoder
            == in_place
        )
        answers.append(
            Session(out, "cpu").generate(PROMPTS, ["dora", None, "alpha", "dora"], max_new_tokens=12)
        )
    assert answers[0] == answers[1]


@pytest.mark.parametrize("scheme", [pytest.param(None, marks=pytest.mark.long), "int8"])
def test_a_fold_has_the_second_graph_too(
    scheme: str | None, placed: Make, pack_of: Make, tmp_path: Path
) -> None:
    """Its answers are those of the adapter in the bank; products of codes round their activations as they did
    before.
    """
    source, merged = placed("bank"), tmp_path / "merged"
    if scheme is not None:
        quantize(source, source := tmp_path / "codes", scheme=scheme, accuracy="fast")
    merge(source, [pack_of("llama", "alpha")], merged)
    bundle = read_bundle(merged)
    assert bundle.decoder
    assert 0 < bundle.parity["decoder"]["max_relative"] < 1e-5
    assert not validate(merged, full=True).findings
    assert [is_fast(merged / graph_file(part)) for part in (MAIN, DECODER)] == [
        None if scheme is None else True
    ] * 2
    session = Session(merged, "cpu")
    answers = [answer.ids for answer in session.generate(PROMPTS, max_new_tokens=12)]
    assert {MAIN, DECODER} & session._opened.keys() == {DECODER}
    if scheme is None:
        assert answers == [
            answer.ids for answer in Session(source, "cpu").generate(PROMPTS, "alpha", max_new_tokens=12)
        ]


def test_a_wrong_second_graph_is_not_published(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static_cache_decoder, "reaches_of", lambda config, layers: [Reach(window=2)] * layers)
    monkeypatch.setattr(PositionInputs, "hides", lambda *given: True)  # rows look back two tokens, not all
    with pytest.raises(ParityError, match="the graph for the engine disagrees"):
        export(tiny_llama, [], tmp_path / "bundle", mode="folded", frontend="mobius")
    monkeypatch.setattr(
        static_cache_decoder, "read_sources", len
    )  # a bug, which is no family without a graph
    with pytest.raises(TypeError) as caught:
        export(tiny_llama, [], tmp_path / "bundle", mode="folded", frontend="mobius")
    assert "--no-static-cache" in caught.value.__notes__[0]
    assert not (tmp_path / "bundle").exists()


def test_what_is_refused(tiny_llama: Path, tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="only decoders have a static cache"):
        export(tiny_bert, [], tmp_path / "bundle", in_place=True)
    with pytest.raises(Unsupported, match="one at a time"):
        export(tiny_llama, [], tmp_path / "bundle", mode="inputs", in_place=True)


@pytest.mark.long
def test_every_decoder_has_the_graph_where_its_family_does(
    tiny_llama: Path, pack_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asks for it, no weight lies in the bundle twice, and what has no graph says why, with the
    command that helps.
    """
    bundle = export(tiny_llama, [pack_of("llama", "alpha")], tmp_path / "bank")
    assert bundle.decoder
    graphs = [ir.load(tmp_path / "bank" / graph_file(part)).graph for part in (MAIN, DECODER)]
    stored = [
        {
            (value.const_value.location, value.const_value.offset)
            for value in graph.initializers.values()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        for graph in graphs
    ]
    assert stored[1] <= stored[0]
    assert stored[1]
    assert (tmp_path / "bank" / graph_file(DECODER)).stat().st_size < 1 << 18
    assert not validate(tmp_path / "bank", full=True).findings

    for name, options in {"inputs": {"mode": "inputs"}, "off": {"in_place": False}}.items():
        assert not export(tiny_llama, [pack_of("llama", "alpha")], tmp_path / name, **options).decoder
        with pytest.raises(Unsupported, match="no graph for the engine") as caught:
            Engine(tmp_path / name)
        assert (
            f"adapterpack export {tiny_llama.name} {tmp_path / name}/adapters/* --static-cache -o NEW"
            in str(caught.value)
        )

    def refuse(*given: object) -> None:
        raise Unsupported("more than its attention reads a cache of this graph")

    monkeypatch.setattr(parity, "write_decoder", refuse)
    told: list[str] = []
    bundle = export(tiny_llama, [], tmp_path / "bundle", mode="folded", progress=told.append)
    reason = bundle.parity["decoder"]["left_out"]
    assert not bundle.decoder
    assert any(text.startswith(f"the engine's graph is left out: {reason}") for text in told)
    with pytest.raises(Unsupported) as caught:
        Engine(tmp_path / "bundle")
    assert caught.value.found == reason
    assert not (tmp_path / "bundle" / graph_file(DECODER)).exists()
    with pytest.raises((Unsupported, ParityError)):
        export(tiny_llama, [], tmp_path / "insisted", mode="folded", in_place=True)


ALIBI = {
    # a bias from the mask, and one from a table as long as the context, under the mask
    "bloom": {"hidden_size": 48, "n_layer": 1, "n_head": 6},
    "mpt": {"d_model": 32, "n_layers": 1, "n_heads": 4, "max_seq_len": 64},
}
SINKS = {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": None}
LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "head_dim": 4,
    "v_head_dim": 18,
    "first_k_dense_replace": 2,
    "num_key_value_heads": 4,
}
INDEXED = {
    **LATENT,
    "q_lora_rank": 12,
    "index_topk": 4,
    "index_n_heads": 16,
    "index_head_dim": 8,
    "mlp_layer_types": ["dense", "dense"],
}
"""Queries of rows longer than four tokens see four of them."""
GATED = {
    **INDEXED,
    "indexer_types": ["full", "shared"],
    "hc_mult": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""And the operator has no such sinks: the attention is the ordinary graph's, on the engine's caches."""


COUNTED = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
"""Positions are counted by the cache, padding too."""
CLAMPED = {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}
PADDED = {"is_decoder": True, "pad_token_id": 1, "type_vocab_size": 1}
"""The tables of positions begin after that of padding."""


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        pytest.param("roberta", PADDED, marks=pytest.mark.long),
        pytest.param("bart", COUNTED, marks=pytest.mark.long),
        ("bloom", ALIBI["bloom"]),
        pytest.param("mpt", ALIBI["mpt"], marks=pytest.mark.long),
        pytest.param("gpt_oss", SINKS, marks=pytest.mark.long),
        pytest.param("deepseek_v3", LATENT, marks=pytest.mark.long),
        pytest.param("deepseek_v32", INDEXED, marks=pytest.mark.long),
        pytest.param("hy_v4", GATED, marks=pytest.mark.long),
        pytest.param(
            "granite_swa",
            {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
            marks=pytest.mark.long,
        ),
        pytest.param("xglm", CLAMPED, marks=pytest.mark.long),
        ("smollm3", {"no_rope_layers": [1, 0], "pad_token_id": 0}),
        pytest.param("megatron-bert", {"is_decoder": True}, marks=pytest.mark.long),
        pytest.param("diffllama", {}, marks=pytest.mark.long),
        pytest.param("moshi", {"sliding_window": 8, "ffn_dim": 48}, marks=pytest.mark.long),
    ],
)
def test_attentions_of_every_build(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """ALiBi, sinks beside the scores or as a gate after them, scores with a lower bound, layers without
    rotation, keys and values that the ordinary graph computes from its caches, which are wider in the
    engine, a window that no mask has, and a softmax for two halves of the values; adapters of the rows at
    every layer, that of the latents too.
    """
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    more = {**sizes, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
    config = AutoConfig.for_model(kind, **{**(more if kind not in ALIBI else {}), "vocab_size": 96, **fields})
    set_seed(5)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "base")
    adapted = adapt(model, LoRA(r=3), "one")
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    pack = save(adapted, None, base=tmp_path / "base", name="one")
    options = {"mode": "bank", "task": "text-generation", "in_place": True}
    frontend = "mobius" if kind == "smollm3" else "transformers"
    bundle = export(tmp_path / "base", [pack], tmp_path / "bundle", frontend=frontend, **options)
    assert bundle.parity["decoder"]["max_relative"] < 1e-5
    names: list[str | None] = ["one", None, "one", None]
    answers = Session(tmp_path / "bundle", "cpu").generate(PROMPTS, names, max_new_tokens=12, ignore_eos=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    for row, model in enumerate([adapted.eval(), plain, adapted, plain]):
        ids = list(PROMPTS[row])
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert list(answers[row].ids) == ids[len(PROMPTS[row]) :]
