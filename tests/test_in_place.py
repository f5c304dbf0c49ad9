"""Steps on caches that stay where they are: the tokens of the ordinary graph, in every mode, and memory that is written and not copied."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from architecture_proofs import make_base, make_pack
from architectures import ARCHITECTURES, KINDS

from adapterpack import Session, export, merge, quantize, validate
from adapterpack.bundle.manifest import GRAPH, STEP, graph_file, read_bundle
from adapterpack.errors import ParityError, Unsupported
from adapterpack.exporting.graph import static_cache
from adapterpack.exporting.proof import cache_parity
from adapterpack.runtime.generation.decoder import DecoderOnly
from adapterpack.runtime.generation.kv_cache import StaticCache
from adapterpack.runtime.ort_model import OrtModel
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
            export(base_of("llama"), [pack_of("llama", name) for name in names], made[mode], mode=mode, in_place=True, **room)
        return made[mode]

    return get


@pytest.mark.parametrize(("mode", "names"), [
    ("bank", ["alpha", None, "beta", "alpha"]), ("inputs", ["beta"] * 4), ("inputs", ["alpha", None, "beta", "alpha"]), ("folded", None),
])
def test_tokens_are_those_of_the_ordinary_graph(mode: str, names: Any, placed: Make, bundle_of: Make) -> None:
    """Ragged rows, long enough for a buffer to be made anew; rows that need graphs of their own go the ordinary way."""
    ordinary, session = Session(bundle_of("llama", mode), "cpu"), Session(placed(mode), "cpu")
    found = session.generate(PROMPTS, names, max_new_tokens=40)
    assert [one.ids for one in found] == [one.ids for one in ordinary.generate(PROMPTS, names, max_new_tokens=40)]
    assert (STEP in session._opened) == (mode != "inputs" or len(set(names)) == 1)


def test_a_pack_is_loaded_and_rows_go_on_in_place(placed: Make, bundle_of: Make, pack_of: Make) -> None:
    ordinary, session = Session(bundle_of("llama", "bank"), "cpu"), Session(placed("bank"), "cpu")
    for each in (ordinary, session):
        each.load(pack_of("llama", "gamma"))
    names: list[str | None] = ["gamma", "alpha", None, "gamma"]
    assert [one.ids for one in session.generate(PROMPTS, names, max_new_tokens=12)] == \
        [one.ids for one in ordinary.generate(PROMPTS, names, max_new_tokens=12)]


def test_the_memory_of_a_cache_stays_where_it_is(placed: Make) -> None:
    """A step writes one position of each row into the buffer, and touches no other byte."""
    session = Session(placed("bank"), "cpu")
    going = DecoderOnly(session, PROMPTS, ["alpha", None, "beta", "alpha"], {})
    outputs = going.step(np.full(4, 3), going.prefill())
    assert going.cache is not None
    name, value = next(iter(going.cache.caches.items()))
    before, where = value.numpy().copy(), value.data_ptr()
    lengths = going.cache.lengths.copy()
    outputs = going.step(np.full(4, 4), outputs)
    after = going.cache.caches[name]
    assert after.data_ptr() == where
    changed = (after.numpy() != before).any(axis=(1, 3))
    for row, length in enumerate(lengths):
        assert np.flatnonzero(changed[row]).tolist() == [length]


def unpacked(graph: OrtModel) -> bool:
    """Whether a graph was opened without laying its weights out for its kernels."""
    try:
        return graph._ort.get_session_options().get_session_config_entry("session.disable_prepacking") == "1"
    except RuntimeError:  # no such entry: ONNX Runtime's default holds
        return False


def test_the_graph_for_steps_is_opened_as_the_ordinary_one_is(placed: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are laid out for the kernels of both (an int4 step is ten times slower without), and of neither in a mapped session; the
    speeds that the proof tells are those of a session as users open it."""
    for mapped in (False, True):
        session = Session(placed("bank"), "cpu", mapped=mapped)
        assert [unpacked(session.graph(part)) for part in (MAIN, STEP)] == [mapped, mapped]
    opened: list[Session] = []

    class Recorded(Session):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            opened.append(self)

    monkeypatch.setattr(cache_parity, "Session", Recorded)
    cache_parity.with_steps(Path(shutil.copytree(placed("bank"), tmp_path / "copy")), lambda text: None)
    assert [unpacked(session.graph(part)) for session in opened for part in (MAIN, STEP)] == [False, False]


def test_both_graphs_have_one_file_of_weights(placed: Make) -> None:
    folder = placed("bank")
    whole, step = ir.load(folder / GRAPH).graph, ir.load(folder / graph_file(STEP)).graph
    assert not (folder / f"{graph_file(STEP)}.data").exists()
    weights, all_weights = ([value.const_value for value in graph.initializers.values() if isinstance(value.const_value, ir.ExternalTensor)]
                            for graph in (step, whole))
    assert sum(tensor.nbytes for tensor in weights) > 0.9 * sum(tensor.nbytes for tensor in all_weights)
    for tensor in weights:
        assert Path(tensor.location).name == f"{GRAPH}.data"
    assert [value.name for value in step.inputs if value.name in step.initializers] == \
        [value.name for value in whole.inputs if value.name in whole.initializers]
    assert {node.op_type for node in step} & {"Attention", "Softmax"} == set()


def test_the_report_and_the_schema_know_of_it(placed: Make) -> None:
    bundle = read_bundle(placed("bank"))
    assert bundle.in_place
    assert 0 < bundle.parity["in_place"]["max_relative"] < 1e-5
    assert not validate(placed("bank"), full=True).findings


@pytest.mark.parametrize("name", ["gpt2", "opt", "mistral", "gemma2", "falcon", "mixtral"])
def test_traced_decoders_and_sliding_windows(name: str, tmp_path: Path) -> None:
    """Graphs by tracing, where a softmax stands for the attention: learned positions, windows that rows outgrow, caps, shared heads."""
    base = make_base(BY_NAME[name], tmp_path / "base")
    pack = make_pack(BY_NAME[name], base, KINDS[0])
    bundle = export(base, [pack], tmp_path / "bundle", mode="bank", task="text-generation", in_place=True)
    assert bundle.parity["in_place"]["max_relative"] < 2e-5
    assert bundle.parity["in_place"]["steps"] > 8  # the windows of these models


def test_prompts_and_adapters_at_positions_go_on_in_place(tmp_path: Path) -> None:
    """What stands in the cache before a row, beside rows that have nothing there."""
    base = make_base(BY_NAME["llama"], tmp_path / "base")
    packs = [make_pack(BY_NAME["llama"], base, kind) for kind in KINDS if kind.name in {"prompt", "attention", "low-rank"}]
    bundle = export(base, packs, tmp_path / "bundle", mode="bank", task="text-generation", in_place=True, dtype="float16")
    assert bundle.parity["in_place"]["max_relative"] < 5e-3


def test_a_quantized_bundle_goes_on_in_place(placed: Make, tmp_path: Path) -> None:
    quantize(placed("bank"), tmp_path / "int8", scheme="int8")
    session = Session(tmp_path / "int8", "cpu")
    names: list[str | None] = ["alpha", None, "beta", "alpha"]
    ordinary = DecoderOnly(session, PROMPTS, names, {}, in_place=False)
    going = DecoderOnly(session, PROMPTS, names, {})
    one, two = ordinary.prefill(), going.prefill()
    for token in range(3, 9):
        one, two = ordinary.step(np.full(4, token), one), going.step(np.full(4, token), two)
        assert np.abs(one["logits"].numpy() - two["logits"].numpy()).max() < 1e-4
    assert {"MatMulNBits", "GroupQueryAttention"} <= {node.op_type for node in ir.load(tmp_path / "int8" / graph_file(STEP)).graph}
    assert not validate(tmp_path / "int8", full=True).findings


def test_a_fold_leaves_the_second_graph_out(placed: Make, pack_of: Make, tmp_path: Path) -> None:
    merge(placed("bank"), [pack_of("llama", "alpha")], tmp_path / "folded")
    assert not read_bundle(tmp_path / "folded").in_place
    assert not (tmp_path / "folded" / graph_file(STEP)).exists()
    assert not validate(tmp_path / "folded", full=True).findings


def test_a_wrong_second_graph_is_not_published(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shorter(model: Any) -> tuple[Any, Any]:
        lengths, total = lengths_of(model)
        sub = lengths.producer().inputs[0].producer()
        sub.replace_input_with(1, static_cache._constant(model, "two", np.array(2, np.int64)))
        return lengths, total

    lengths_of = static_cache._lengths
    monkeypatch.setattr(static_cache, "_lengths", shorter)
    with pytest.raises(ParityError, match="steps in place disagrees"):
        export(tiny_llama, [], tmp_path / "bundle", mode="folded", in_place=True, frontend="mobius")
    assert not (tmp_path / "bundle").exists()


def test_what_is_refused(tiny_llama: Path, tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="only a decoder's cache"):
        export(tiny_bert, [], tmp_path / "bundle", in_place=True)
    base = make_base(BY_NAME["bloom"], tmp_path / "bloom")  # the distance to a token is added to its score
    with pytest.raises((Unsupported, ParityError)):
        export(base, [], tmp_path / "bundle", mode="folded", task="text-generation", in_place=True)


@pytest.mark.fast
def test_rows_lie_at_the_beginning_of_their_buffers() -> None:
    """Padding of either side is left out, order is kept, and a buffer that is full is made anew with everything in it."""
    cache = np.arange(2 * 1 * 5 * 1, dtype=np.float32).reshape(2, 1, 5, 1)
    mask = np.array([[0, 0, 1, 1, 1], [1, 0, 0, 1, 0]])
    found = StaticCache({"present.0.key": ort.OrtValue.ortvalue_from_numpy(cache), "logits": None}, mask, "cpu")
    ((name, value),) = found.caches.items()
    assert name == "past_key_values.0.key"
    assert value.numpy()[0, 0, :3, 0].tolist() == [2, 3, 4]
    assert value.numpy()[1, 0, :2, 0].tolist() == [5, 8]
    rooms = set()
    for count in range(1, 60):
        told, caches = found.step()
        assert told.sum(1).tolist() == [3 + count, 2 + count]
        rooms.add(caches[name].shape()[2])
        assert caches[name].shape()[2] >= told.shape[1]
        assert caches[name].numpy()[0, 0, :3, 0].tolist() == [2, 3, 4]
    assert len(rooms) == 3


@pytest.mark.fast
def test_the_proof_takes_more_steps_than_a_first_buffer_holds() -> None:
    assert cache_parity._STEPS > 16
