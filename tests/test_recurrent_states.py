"""Models whose layers keep states of fixed size: exported, and run with another adapter in each row."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import transformers
from architecture_proofs import make_base, make_pack, prove
from architectures import KINDS, Architecture, Kind
from every_family.tiny import make_base as tiny_base

from adapterpack.adapter_methods.prompt_tuning import PromptTuning
from adapterpack.bundle.decoder_graph import DECODER
from adapterpack.bundle.manifest import PAST, graph_file
from adapterpack.engine_graph.int8_cache import quantize_cache
from adapterpack.errors import AdapterpackError, Unsupported
from adapterpack.exporting.frontends import FRONTENDS, ExportSource
from adapterpack.exporting.pipeline import export
from adapterpack.exporting.tracing.layer_state import state_of
from adapterpack.exporting.tracing.torch_parts import CausalDecoder
from adapterpack.runtime.engine.engine import Engine
from adapterpack.runtime.engine.requests import SequenceState
from adapterpack.runtime.padding import positions
from adapterpack.runtime.sessions.session import Session
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.adapt import attach
from adapterpack.torch_adapters.models.load import load_model

Make = Callable[[str], Any]
WORDS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 32}
DENSE = {
    **WORDS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
}
MAMBA1 = {**WORDS, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4}
HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2, "mamba_chunk_size": 16}
DELTA = {
    **DENSE,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: Mapping[str, Callable[[Any], Any]] = {
    "lfm2": lambda hf: hf.Lfm2Config(
        **DENSE, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, conv_bias=True
    ),
    "falcon_h1": lambda hf: hf.FalconH1Config(**DENSE, **HEADS, mamba_n_groups=2, mamba_d_ssm=64),
    "qwen3_5": lambda hf: hf.Qwen3_5TextConfig(**DELTA),
    "mamba": lambda hf: hf.MambaConfig(**MAMBA1),
    "lfm2_moe": lambda hf: hf.Lfm2MoeConfig(
        **DENSE, **EXPERTS, layer_types=["conv", "full_attention"], num_dense_layers=1
    ),
    "falcon_mamba": lambda hf: hf.FalconMambaConfig(**MAMBA1),
    "mamba2": lambda hf: hf.Mamba2Config(
        **WORDS, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=2, chunk_size=16
    ),
    "bamba": lambda hf: hf.BambaConfig(**DENSE, **HEADS, mamba_n_groups=2, attn_layer_indices=[1]),
    "granitemoehybrid": lambda hf: hf.GraniteMoeHybridConfig(
        **DENSE,
        **HEADS,
        layer_types=["mamba", "attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=24,
    ),
    "nemotron_h": lambda hf: hf.NemotronHConfig(
        **{**DENSE, "num_hidden_layers": 3},
        layers_block_type=["mamba", "attention", "mlp"],
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=2,
        ssm_state_size=8,
        chunk_size=16,
    ),
    "jamba": lambda hf: hf.JambaConfig(
        **DENSE, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4, num_experts=4
    ),
    "qwen3_next": lambda hf: hf.Qwen3NextConfig(**DELTA, **EXPERTS, shared_expert_intermediate_size=24),
    "qwen3_5_moe": lambda hf: hf.Qwen3_5MoeTextConfig(**DELTA, **EXPERTS, shared_expert_intermediate_size=24),
    "olmo_hybrid": lambda hf: hf.OlmoHybridConfig(**{**DELTA, "linear_num_key_heads": 4}),
    "minimax": lambda hf: hf.MiniMaxConfig(
        **DENSE,
        layer_types=["linear_attention", "full_attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
        block_size=16,
    ),
    "zamba": lambda hf: hf.ZambaConfig(
        **{**DENSE, "num_hidden_layers": 4},
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        mamba_d_state=8,
        mamba_dt_rank=4,
        n_mamba_heads=2,
        attention_hidden_size=64,
        attention_head_dim=16,
    ),
    "zamba2": lambda hf: hf.Zamba2Config(
        **{**DENSE, "num_hidden_layers": 3},
        layers_block_type=["mamba", "hybrid", "mamba"],
        mamba_d_state=8,
        n_mamba_heads=8,
        mamba_headdim=8,
        mamba_ngroups=2,
        chunk_size=16,
        num_mem_blocks=1,
        adapter_rank=4,
        attention_hidden_size=64,
        attention_head_dim=16,
    ),
}
USUAL = ("in_proj", "out_proj")
TARGETS = {
    "qwen3_5": ("in_proj_qkv", "in_proj_a", "out_proj"),
    "qwen3_5_moe": ("in_proj_qkv", "out_proj"),
    "qwen3_next": ("in_proj_qkvz", "in_proj_ba", "out_proj"),
    "olmo_hybrid": ("q_proj", "a_proj", "o_proj"),
    "mamba": (*USUAL, "x_proj"),
    "minimax": ("qkv_proj", "out_proj"),
}
QUICK = {"lfm2"}
LOW_RANK, PROMPT = KINDS[0], next(kind for kind in KINDS if kind.name == "prompt")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name not in QUICK)) for name in FAMILIES]
)
def test_rows_alone_pieces_and_steps(name: str, tmp_path: Path) -> None:
    """Ragged batches, with and without an adapter in each row, whole and in pieces, equal transformers."""
    torch.set_num_threads(1)
    family = Architecture(name, "text-generation", FAMILIES[name], TARGETS.get(name, USUAL))
    assert prove(family, "bank", tmp_path, only=["low-rank"]) == ["low-rank"]
    states = {port.name.rpartition(".")[2] for port in Session(tmp_path / "bank", "cpu").bundle.io.inputs}
    assert ("conv_state" in states) == (name != "minimax")
    assert ("recurrent_state" in states) == (not name.startswith("lfm2"))


@pytest.mark.long
def test_recurrent_states_stay_float32_in_half_precision(tmp_path: Path) -> None:
    """As in transformers: what a token adds to a state that hardly decays would be rounded away."""
    base = make_base(Architecture("mamba2", "text-generation", FAMILIES["mamba2"], USUAL), tmp_path / "base")
    export(base, [], tmp_path / "bundle", mode="folded", dtype="float16", in_place=False)
    ports = Session(tmp_path / "bundle", "cpu").bundle.io.inputs
    types = {port.name.rpartition(".")[2]: port.dtype for port in ports}
    assert (types["conv_state"], types["recurrent_state"]) == ("float16", "float32")


class Made:
    """A base, a pack of it, and a bundle of both with the engine's graph."""

    def __init__(self, name: str, folder: Path) -> None:
        family = Architecture(name, "text-generation", FAMILIES[name], TARGETS.get(name, USUAL))
        self.base, self.bundle = make_base(family, folder / "base"), folder / "bundle"
        self.pack = make_pack(family, self.base, LOW_RANK)
        export(self.base, [self.pack], self.bundle, in_place=True)
        task = Session(self.bundle, "cpu").task
        self.models = {None: load_model(task, self.base).eval(), self.pack.name: load_model(task, self.base)}
        attach(self.models[self.pack.name].eval(), self.pack, check_base=False)

    def answer(self, row: list[int], name: str | None, tokens: int = 9, beams: int = 1) -> list[int]:
        """The tokens that transformers gives to a row alone."""
        said = self.models[name].generate(
            input_ids=torch.tensor([row]),
            max_new_tokens=tokens,
            num_beams=beams,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return said[0, len(row) :].tolist()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Each family once: keys beside a convolution, a state in the same layer as keys, and no keys at all."""
    return lru_cache(lambda name: Made(name, tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("in_place", [True, False])
def test_answers_and_beams_are_those_of_transformers(made: Make, in_place: bool, tmp_path: Path) -> None:
    """Rows of other lengths and adapters decode greedily and by beams, whose states follow their parents."""
    lfm2 = made("lfm2")
    if not in_place:
        export(lfm2.base, [lfm2.pack], tmp_path / "bundle", in_place=False)
    session = Session(lfm2.bundle if in_place else tmp_path / "bundle", "cpu")
    rows, names = [[5, 6, 7, 8, 9], [11]], [lfm2.pack.name, None]
    for beams in (1, 3):
        found = session.generate(rows, names, num_beams=beams, max_new_tokens=9, ignore_eos=True)
        for row, name, answer in zip(rows, names, found, strict=True):
            assert list(answer.ids) == lfm2.answer(row, name, beams=beams)


@pytest.mark.parametrize(
    "name", ["falcon_h1", *(pytest.param(name, marks=pytest.mark.long) for name in ("lfm2", "mamba"))]
)
def test_the_engine_runs_rows_that_come_and_go(name: str, made: Make) -> None:
    """Prompts in pieces between steps, some with a common beginning, another adapter in each row, rows that
    are cancelled while their prompts are read and while they run, and one at which ONNX Runtime fails in the
    middle of a batch.
    """
    family, dice = made(name), random.Random(4)
    engine = Engine(family.bundle, "cpu", max_rows=3, prefill_budget=5)
    asked: dict[int, tuple[list[int], str | None]] = {}
    tokens, ended = dict[int, list[int]](), dict[int, str]()
    faulty: int | None = None
    while len(asked) < 14 or engine.busy:
        if len(asked) < 14 and dice.random() < 0.5:
            row = [dice.randrange(3, 90) for _ in range(dice.choice((1, 2, 7, 12)))]
            row = dice.choice(([], list(range(20, 39)))) + row
            adapter = dice.choice((None, family.pack.name))
            asked[engine.add(row, adapter, max_new_tokens=9, ignore_eos=True)] = row, adapter
        if dice.random() < 0.06 and asked:
            engine.cancel(dice.choice(list(asked)))
        if faulty is None and len(engine.rows.running) == 3:
            faulty = engine.rows.running[1].request.number
            engine.rows.running[1].next_token = 10**6
        for event in engine.step():
            if event.token is not None:
                tokens.setdefault(event.request, []).append(event.token)
            if event.finish_reason is not None:
                ended[event.request] = event.finish_reason
    assert ended[faulty] == "error" and engine.rows.reused
    assert {"length", "cancelled"} < set(ended.values())
    for number, (row, adapter) in asked.items():
        answer = tokens.get(number, [])
        assert answer == family.answer(row, adapter)[: len(answer)]
        assert len(answer) == 9 or ended[number] != "length"


@pytest.mark.long
def test_a_step_that_is_taken_back_changes_no_state(made: Make) -> None:
    """As of a row whose grammar is not ready, beside one whose step counts; and of a pass that fails."""
    engine = Engine(made("mamba").bundle, "cpu", max_rows=2)
    rows = [SequenceState(prompt=prompt) for prompt in ([5, 6, 7], [8])]
    for row in rows:
        engine.rows.admit(row)
        engine.rows.prefill(len(row.prompt))
        row.next_token = 9
    first = engine.rows.decode()
    engine.rows.retract(rows[0])
    states = engine.rows._states
    with pytest.raises(AdapterpackError), states.passing(0, 2):
        states.clear(0)
        raise AdapterpackError("after a part of it has run")
    again = engine.rows.decode()
    np.testing.assert_allclose(again[0], first[0], rtol=1e-6)
    assert np.abs(again[1] - first[1]).max() > 1e-3


def test_eight_bits_are_for_keys_and_values_alone(made: Make, tmp_path: Path) -> None:
    """Beside states, which stay floats; a model without keys has nothing for them."""
    for name in ("lfm2", "mamba"):
        shutil.copytree(made(name).bundle, tmp_path / name)
    assert 0 < quantize_cache(tmp_path / "lfm2")["max_relative"] < 0.1
    inputs = ir.load(tmp_path / "lfm2" / graph_file(DECODER)).graph.inputs
    types = {one.name.rpartition(".")[2]: one.dtype.name for one in inputs if one.name.startswith(PAST)}
    assert types == {"conv_state": "FLOAT", "key": "INT8", "value": "INT8"}
    with pytest.raises(Unsupported, match="keys and values"):
        quantize_cache(tmp_path / "mamba")


def test_what_a_recurrent_state_does_not_allow_is_said(made: Make, tmp_path: Path) -> None:
    """A prompt sets keys and values alone."""
    base = made("lfm2").base
    family = Architecture("lfm2", "text-generation", FAMILIES["lfm2"], ())
    with pytest.raises(Unsupported, match="recurrent state"):
        make_pack(family, base, PROMPT)
    soft = make_pack(family, base, Kind("soft", lambda targets, heads: PromptTuning(num_virtual_tokens=3)))
    with pytest.raises(Unsupported, match="layers of this model keep more"):
        export(base, [soft], tmp_path / "prompt", in_place=False)


def test_caches_that_no_graph_has_are_said() -> None:
    """A class of the model's own, which has no layers, and an indexer's positions beside its keys."""
    sizes = {
        "hidden_size": 128,
        "embedding_dim": 128,
        "num_heads": 4,
        "num_hidden_layers": 1,
        "vocab_size": 96,
    }
    config = transformers.AutoConfig.for_model("xlstm", **sizes)
    part = CausalDecoder(transformers.AutoModelForCausalLM.from_config(config))
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(Unsupported, match=r"in no cache of transformers.*xLSTMCache"):
        part(ids, ids, ids, [])
    layer = transformers.cache_utils.DynamicIndexedLayer()
    layer.indexer_position_ids = ids
    cache = transformers.DynamicCache()
    cache.layers = [layer]
    with pytest.raises(Unsupported, match="token by token"):
        state_of(cache)


@pytest.mark.long
def test_a_decoder_that_keeps_nothing_reads_all_tokens_at_each_step(tmp_path: Path) -> None:
    """Rows of different lengths, in two passes, give what each gives alone, whole."""
    task = get_task("text-generation")
    base = tiny_base(task, "openai-gpt", tmp_path / "base")
    frontend = FRONTENDS["rereading"]
    graph = frontend.build(frontend.takes(ExportSource(base, task))).model
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    ids, mask = np.array([[5, 6, 7, 8, 9, 3], [0, 0, 0, 4, 8, 6]]), np.ones((2, 6), np.int64)
    mask[1, :3] = 0
    cache, found = np.zeros((2, 1, 0, 1), np.float32), list[np.ndarray]()
    for part in (slice(0, 4), slice(4, 6)):
        feeds = {"input_ids": ids[:, part], "attention_mask": mask[:, : part.stop], f"{PAST}0.key": cache}
        feeds["position_ids"] = positions(mask)[:, part]
        logits, cache = session.run(["logits", "present.0.key"], feeds)
        found.append(logits)
    model = load_model(task, base).eval()
    for row, shown in enumerate(mask > 0):
        with torch.no_grad():
            expected = model(input_ids=torch.from_numpy(ids[row, shown][None])).logits[0].numpy()
        np.testing.assert_allclose(np.concatenate(found, 1)[row, shown], expected, rtol=0, atol=2e-5)


def test_a_layer_that_keeps_nothing_stands_among_pairs(tmp_path: Path) -> None:
    """As a layer that reads images, where a text has none."""
    task = get_task("text-generation")
    model = load_model(task, tiny_base(task, "mllama", tmp_path / "base")).eval()
    decoder, ids = CausalDecoder(model), torch.arange(3, 9)[None]
    mask, places = torch.ones_like(ids), torch.arange(6)[None]
    with torch.no_grad():
        first = decoder(ids[:, :4], mask[:, :4], places[:, :4], [])
        kept = [{}, {}, {}]
        for name, value in first.items():
            if name != "logits":
                kept[int(name.split(".")[1])][name.split(".")[2]] = value
        second = decoder(ids[:, 4:], mask, places[:, 4:], kept)
        whole = model(input_ids=ids).logits
    assert [sorted(one) for one in kept] == [["key", "value"], [], ["key", "value"]]
    found = torch.cat([first["logits"], second["logits"]], 1)
    torch.testing.assert_close(found, whole, rtol=0, atol=2e-5)
