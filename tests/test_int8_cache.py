"""Keys and values of the engine's graph in eight bits: a quarter of the memory, logits within what the export
has measured.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from architecture_proofs import make_pack
from architectures import ARCHITECTURES, KINDS

from adapterpack import Engine, Session, export, merge, quantize, validate
from adapterpack._native import ragged_attention
from adapterpack.bundle.decoder_graph import DECODER
from adapterpack.bundle.manifest import PAST, graph_file, read_bundle
from adapterpack.engine_graph import int8_cache
from adapterpack.errors import ConfigError, ParityError, UnknownName, Unsupported
from adapterpack.runtime.engine.adapter_reader import AdapterReader
from adapterpack.runtime.engine.model_runner import ModelRunner
from adapterpack.runtime.engine.requests import SequenceState

Make = Callable[..., Any]
LLAMA = next(one for one in ARCHITECTURES if one.name == "llama")
PROMPT = [5, 6, 7, 30, 31, 8, 9, 10, 11, 12, 13, 14, 15, 16, 60, 61, 62, 63, 40, 41]


@pytest.fixture(scope="module")
def bundles(base_of: Make, pack_of: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bank with floats in the caches, and one with whole numbers; an adapter of each begins with a prompt
    in them.
    """
    folder, packs = tmp_path_factory.mktemp("caches"), [pack_of("llama", "alpha"), pack_of("llama", "beta")]
    prompt = make_pack(LLAMA, base_of("llama"), next(kind for kind in KINDS if kind.name == "prompt"))
    for name in ("float", "int8"):
        export(base_of("llama"), [*packs, prompt], folder / name, cache=name)
    return {name: folder / name for name in ("float", "int8")}


def passes(bundle: Path, names: list[str | None], tokens: np.ndarray) -> tuple[np.ndarray, ModelRunner]:
    """The logits of rows with these adapters: after their prompts, read in pieces, and after each token."""
    session = Session(bundle, "cpu")
    reader = AdapterReader(session)
    batch = ModelRunner(session, reader, len(names), 64)
    rows = [
        SequenceState(
            prompt=PROMPT[: 9 + 3 * number],
            adapter=None if name is None else reader.read(session.packs[name]),
        )
        for number, name in enumerate(names)
    ]
    for row in rows:
        batch.admit(row)
    logits = []
    for row in rows:
        while row.num_computed_tokens < len(row.prompt):
            last = batch.prefill(min(4, len(row.prompt) - row.num_computed_tokens)).copy()
        logits.append(last)
    steps = [np.stack(logits)]
    for step in tokens:
        for row, token in zip(rows, step, strict=True):
            row.next_token = int(token)
        steps.append(batch.decode())
    return np.stack(steps), batch


def test_logits_move_as_little_as_the_report_says(bundles: dict[str, Path]) -> None:
    """Rows with several adapters, one with a prompt in its cache, prompts in pieces, steps: within twice the
    error that was measured on other rows; a quarter of the memory; a row alone gives what it gives beside
    others.
    """
    report = read_bundle(bundles["int8"]).parity["decoder"]["cache"]
    assert 0 < report["relative"] <= report["max_relative"] < 0.1
    assert report["label_agreement"] > 0.9
    names: list[str | None] = [None, "alpha", "prompt", "beta"]
    tokens = np.random.default_rng(4).integers(3, 90, (8, len(names)))
    (exact, floats), (coarse, numbers) = (passes(bundles[name], names, tokens) for name in ("float", "int8"))
    assert np.abs(exact - coarse).max() < 2 * report["max_relative"] * np.abs(exact).max()
    assert np.abs(exact - coarse).max() > 1e-5
    wide, narrow = (
        [one.dtype.itemsize for one in batch._pool._buffers.values()] for batch in (floats, numbers)
    )
    assert wide == [4 * size for size in narrow]
    for number, name in enumerate(names):
        if number == 0:
            alone, _ = passes(bundles["int8"], [name], tokens[:, :1])
            np.testing.assert_allclose(alone[:, 0], coarse[:, 0], rtol=0, atol=1e-4)
    graph = ir.load(bundles["int8"] / graph_file(DECODER)).graph
    assert {value.dtype for value in graph.inputs if value.name.startswith(PAST)} == {ir.DataType.INT8}
    assert not validate(bundles["int8"], full=True).findings


def test_the_operator_for_ragged_passes_keeps_the_same_numbers(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside ONNX Runtime's own attention: keys and values in the same steps, but for those whose rounding
    hangs on the last bit, and logits that follow them.
    """
    if ragged_attention.LIBRARY is None:
        pytest.skip("no compiler here: ONNX Runtime's own operator attends")
    names: list[str | None] = [None, "alpha", "prompt", "beta"]
    tokens = np.random.default_rng(4).integers(3, 90, (8, len(names)))
    mine, with_it = passes(bundles["int8"], names, tokens)
    monkeypatch.setattr(ragged_attention, "LIBRARY", None)
    theirs, without = passes(bundles["int8"], names, tokens)
    assert (with_it.graph.ragged, without.graph.ragged) == (True, False)
    assert np.abs(mine - theirs).max() < 0.01 * np.abs(theirs).max()
    for place, row in enumerate(with_it.running):
        found, expected = (one.read_cache(place, row.kv_len) for one in (with_it, without))
        for name, numbers in expected.items():
            apart = np.abs(found[name].astype(int) - numbers)
            assert apart.max() <= 1
            assert np.count_nonzero(apart) < 0.002 * apart.size


def test_engines_run_it(bundles: dict[str, Path], pack_of: Make) -> None:
    """Prompts that begin as one before give the same answer; a pack that is loaded meanwhile passes its
    canary.
    """
    engine = Engine(bundles["int8"], "cpu", max_rows=2, max_length=64)
    engine.adapters.load(pack_of("llama", "alpha"), "again")
    texts: dict[int, str] = {}
    asked = [engine.add(PROMPT, name, max_new_tokens=8) for name in ("alpha", "again", "alpha")]
    while engine.busy:
        texts |= {event.request: event.text for event in engine.step()}
    assert engine.rows.reused > 0
    assert len({texts[number] for number in asked}) == 1


def test_weights_and_caches_in_eight_bits(bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = quantize(bundles["int8"], tmp_path / "both", scheme="int8")
    assert 0 < bundle.parity["decoder"]["cache"]["max_relative"] < 0.1
    assert len(Session(tmp_path / "both", "cpu").generate([PROMPT], ["alpha"], max_new_tokens=4)) == 1


def test_a_fold_measures_the_caches_anew(
    bundles: dict[str, Path], pack_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the folded random model moves by 0.13 of the largest, which would be refused
    monkeypatch.setattr(int8_cache, "_TOLERANCE", 0.5)
    merge(bundles["int8"], [pack_of("llama", "alpha")], tmp_path / "merged")
    before, after = (
        read_bundle(folder).parity["decoder"]["cache"] for folder in (bundles["int8"], tmp_path / "merged")
    )
    assert 0 < after["max_relative"] < 0.5
    assert after != before
    graph = ir.load(tmp_path / "merged" / graph_file(DECODER)).graph
    assert {value.dtype for value in graph.inputs if value.name.startswith(PAST)} == {ir.DataType.INT8}


def test_what_cannot_be(
    tiny_llama: Path, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for base, options, error, match in (
        (tiny_llama, {"cache": "int9"}, UnknownName, "did you mean"),
        (tiny_llama, {"cache": "int8", "in_place": False}, ConfigError, "left out"),
        (tiny_llama, {"cache": "int8", "mode": "inputs"}, Unsupported, "one at a time"),
        (tiny_llama, {"cache": "int8", "dtype": "float16"}, Unsupported, "float16"),
        (tiny_bert, {"cache": "int8"}, Unsupported, "only for text generation"),
    ):
        with pytest.raises(error, match=match):
            export(base, [], tmp_path / "out", **options)
    monkeypatch.setattr(int8_cache, "_MARGIN", 0.01)  # nearly everything is cut off
    with pytest.raises(ParityError, match="caches in eight bits"):
        export(tiny_llama, [], tmp_path / "out", mode="folded", cache="int8", frontend="mobius")
    assert not (tmp_path / "out").exists()
