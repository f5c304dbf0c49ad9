"""The operators that attend in passes whose tokens belong to several rows: against float64, among their
instruction sets and the tokens beside them, and in an engine, beside the graph that does without them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from adapterpack import export
from adapterpack._native import ragged_attention
from adapterpack.bundle.decoder_graph import DECODER
from adapterpack.onnx_graph import replace_attention
from adapterpack.runtime.engine.engine import DecoderEngine
from adapterpack.runtime.engine.model_runner import ModelRunner

pytestmark = pytest.mark.fast
Make = Callable[..., Any]
FLOAT, INT8, INT64 = (ir.TensorType(one) for one in (ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT64))


class Heads(NamedTuple):
    """The attributes of an attention, and whether it rotates, has sinks, takes its inputs packed, and keeps
    int8 caches.
    """

    heads: int = 6
    kv_heads: int = 2
    width: int = 32
    window: int = -1
    softcap: float = 0.0
    turned: int = 16
    sinks: bool = False
    packed: bool = True
    int8: bool = False


CASES = {
    "plain": Heads(),
    "window": Heads(window=70),
    "softcap": Heads(softcap=5.0, packed=False),
    "sinks": Heads(sinks=True, window=9),
    "one head of keys": Heads(heads=71, kv_heads=1, width=64, turned=0),
    "as many": Heads(heads=3, kv_heads=3, width=80, turned=20, packed=False),
    "narrow": Heads(heads=4, kv_heads=2, width=6, turned=3),
    "wide": Heads(heads=4, kv_heads=1, width=256, turned=128),
    "int8": Heads(int8=True),
    "int8, narrow, with a window": Heads(heads=9, kv_heads=3, width=22, turned=5, window=70, int8=True),
    "int8, wide, with sinks": Heads(heads=12, kv_heads=1, width=256, sinks=True, packed=False, int8=True),
}
ROWS, LENGTH = 5, 300
PIECES = [(3, 0, 40), (0, 64, 1), (4, 290, 9), (1, 127, 3), (1, 200, 1), (0, 65, 1)]
"""The row, the first position and the number of tokens, of pieces of one pass, in this order."""


@pytest.fixture
def kernel() -> Iterator[ModuleType]:
    found = ragged_attention._kernel or pytest.skip("no compiler here: ONNX Runtime's own operator attends")
    yield found
    found.use()


def session(form: Heads) -> ort.InferenceSession:
    """The operator alone."""

    def value(name: str, kind: ir.TensorType, *axes: str | int) -> ir.Value:
        return ir.Value(name=name, type=kind, shape=ir.Shape(axes))

    query, key, cosines, sinks = (
        value("query", FLOAT, "batch", "tokens", "wide"),
        value("key", FLOAT, "batch", "tokens", "narrow"),
        value("cosines", FLOAT, "places", "half"),
        value("sinks", FLOAT, "heads"),
    )
    values, sines = (value(name, FLOAT, *like.shape) for name, like in (("value", key), ("sines", cosines)))
    kind = INT8 if form.int8 else FLOAT
    caches = [value(name, kind, "rows", form.kv_heads, "length", form.width) for name in ("keys", "values")]
    scales = [
        value(f"{name.name}_scales", FLOAT, form.kv_heads, 1, form.width) for name in caches if form.int8
    ]
    told = [value(name, INT64, "all") for name in ("rows", "positions")]
    inputs = [
        query,
        *([None, None] if form.packed else [key, values]),
        *caches,
        *told,
        *([cosines, sines] if form.turned else [None, None]),
        sinks if form.sinks else None,
        *scales,
    ]
    node = ir.node(
        ragged_attention.OPERATORS[form.int8],
        inputs,
        {
            "num_heads": form.heads,
            "kv_num_heads": form.kv_heads,
            "scale": form.width**-0.5,
            "softcap": form.softcap,
            "local_window_size": form.window,
        },
        domain=ragged_attention.DOMAIN,
        num_outputs=3,
    )
    for output, like, name in zip(
        node.outputs, (query, *caches), ("attention", "new_keys", "new_values"), strict=True
    ):
        output.name, output.type, output.shape = (
            name,
            like.type,
            ir.Shape([*like.shape[:-1], f"{name}_width"]),
        )
    opsets = {"": 21, ragged_attention.DOMAIN: 1}
    graph = ir.Graph(
        [one for one in inputs if one], node.outputs, nodes=[node], opset_imports=opsets, name="one"
    )
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(ragged_attention.LIBRARY)
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(operator: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """Runs it on caches that are written in place, and returns its first output."""
    binding = operator.io_binding()
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    for name in (one.name for one in operator.get_inputs()):
        binding.bind_ortvalue_input(name, values[name])
    binding.bind_output("attention")
    for name in ("keys", "values"):
        binding.bind_ortvalue_output(f"new_{name}", values[name])
    operator.run_with_iobinding(binding)
    for name in ("keys", "values"):
        feeds[name] = values[name].numpy().copy()
    found: np.ndarray = binding.get_outputs()[0].numpy().copy()
    return found


def drawn_scales(rng: np.random.Generator, form: Heads) -> np.ndarray:
    return rng.uniform(0.01, 0.03, (form.kv_heads, 1, form.width)).astype(np.float32)


def drawn(form: Heads, pieces: list[tuple[int, int, int]]) -> dict[str, np.ndarray]:
    """Random feeds of a pass over these pieces."""
    rng = np.random.default_rng(5)
    tokens = sum(count for _, _, count in pieces)
    wide, narrow = form.heads * form.width, form.kv_heads * form.width
    packed = rng.standard_normal((1, tokens, wide + 2 * narrow), np.float32)
    angles = rng.standard_normal((LENGTH, form.turned), np.float32)
    cache = ROWS, form.kv_heads, LENGTH, form.width

    def numbers() -> np.ndarray:
        if form.int8:
            return rng.integers(-128, 128, cache, np.int8)
        return rng.standard_normal(cache, np.float32)

    return {
        "query": packed if form.packed else packed[..., :wide],
        "key": packed[..., wide : wide + narrow],
        "value": packed[..., wide + narrow :],
        "keys": numbers(),
        "values": numbers(),
        # the largest numbers are beyond the range of most
        **{f"{name}_scales": drawn_scales(rng, form) for name in ("keys", "values")},
        "rows": np.repeat([row for row, _, _ in pieces], [count for _, _, count in pieces]),
        "positions": np.concatenate([np.arange(first, first + count) for _, first, count in pieces]),
        "cosines": np.cos(angles),
        "sines": np.sin(angles),
        "sinks": rng.standard_normal(form.heads, np.float32),
    }


def turned(form: Heads, feeds: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The rotated queries or keys ``[tokens, heads, width]`` of a pass, in float64."""
    heads = form.heads if name == "query" else form.kv_heads
    numbers = feeds[name][0, :, : heads * form.width].astype(np.float64).reshape(-1, heads, form.width)
    cosine, sine = (
        feeds[each][feeds["positions"]][:, None].astype(np.float64) for each in ("cosines", "sines")
    )
    low, high, rest = np.split(numbers, [form.turned, 2 * form.turned], axis=2)
    return np.concatenate([low * cosine - high * sine, high * cosine + low * sine, rest], axis=2)


def written(form: Heads, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The caches after a pass, in float64: in steps of their scales if they are int8."""
    value = feeds["value"].astype(np.float64).reshape(-1, form.kv_heads, form.width)
    caches = {}
    for name, new in (("keys", turned(form, feeds, "key")), ("values", value)):
        steps = np.clip(new / feeds[f"{name}_scales"][:, 0], -128, 127) if form.int8 else new
        caches[name] = feeds[name].astype(np.float64)
        caches[name][feeds["rows"], :, feeds["positions"]] = steps
    return caches


def in_float64(form: Heads, feeds: dict[str, np.ndarray], caches: dict[str, np.ndarray]) -> np.ndarray:
    """The formula, densely, by token, over caches that have been written."""
    query, each = turned(form, feeds, "query"), form.heads // form.kv_heads
    if form.int8:
        caches = {name: cache * feeds[f"{name}_scales"].astype(np.float64) for name, cache in caches.items()}
    found = np.empty_like(query)
    for token, (row, place) in enumerate(zip(feeds["rows"], feeds["positions"], strict=True)):
        first = 0 if form.window < 0 else max(0, place + 1 - form.window)
        for head in range(form.heads):
            keys, values = (caches[name][row, head // each, first : place + 1] for name in ("keys", "values"))
            scores = keys @ query[token, head] * form.width**-0.5
            if form.softcap:
                scores = form.softcap * np.tanh(scores / form.softcap)
            weights = np.exp(scores)
            total = weights.sum() + (np.exp(float(feeds["sinks"][head])) if form.sinks else 0)
            found[token, head] = weights @ values / total
    return found.reshape(1, len(query), form.heads * form.width)


@pytest.mark.parametrize("case", CASES)
def test_attention_is_that_of_float64_and_of_each_token_alone(kernel: ModuleType, case: str) -> None:
    """Pieces of several rows in one pass, in every instruction set; what is written into the caches; and of a
    token that is read by itself after the others every bit is the same.
    """
    form, operator = CASES[case], session(CASES[case])
    expected = written(form, drawn(form, PIECES))
    for name in kernel.sets():
        kernel.use(name)
        feeds = drawn(form, PIECES)
        found = run(operator, feeds)
        for cache, numbers in expected.items():
            # a step is rounded to the nearest one, or where that hangs on the last bit to the other
            least = 0.5001 if form.int8 else 1e-6 * np.abs(numbers).max()
            assert np.abs(feeds[cache] - numbers).max() <= least
        caches = {cache: feeds[cache].astype(np.float64) for cache in expected} if form.int8 else expected
        right = in_float64(form, feeds, caches)
        # the rounding of float32 sums over a head's width and 300 positions
        assert np.abs(found - right).max() <= 3e-6 * np.abs(right).max()
        start = 0
        for row, first, count in PIECES:
            end = start + count
            # positions after it are in the cache by now, and it does not see them
            alone = {name: feeds[name][:, end - 1 : end] for name in ("query", "key", "value")}
            told = {"rows": np.array([row]), "positions": np.array([first + count - 1])}
            last = run(operator, {**feeds, **alone, **told})
            assert np.array_equal(last[0, 0], found[0, end - 1])
            start = end


def test_numbers_that_are_not_finite_stay_in_their_row(kernel: ModuleType) -> None:
    form, operator = Heads(), session(Heads())
    feeds = drawn(form, PIECES)
    feeds["query"][0, :40] = np.nan
    found = run(operator, feeds)[0]
    assert np.isnan(found[:40]).all() and np.isfinite(found[40:]).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": np.array([0, 5])}, "a row that the cache lacks"),
        ({"rows": np.array([-1, 0])}, "a row that the cache lacks"),
        ({"positions": np.array([0, LENGTH])}, "outside of its row's cache"),
        ({"positions": np.array([-1, 0])}, "outside of its row's cache"),
        ({"cosines": np.ones((9, 16), np.float32)}, "do not belong together"),
        ({name: np.ones((9, 16), np.float32) for name in ("cosines", "sines")}, "tables of rotation lack"),
        ({name: np.ones((LENGTH, 17), np.float32) for name in ("cosines", "sines")}, "heads are wider"),
        ({"positions": np.array([0, 1, 2])}, "do not belong together"),
        ({"query": np.ones((1, 2, 8), np.float32)}, "do not belong together"),
        ({"values": np.ones((ROWS, 2, 7, 32), np.float32)}, "do not belong together"),
    ],
)
def test_other_inputs_are_refused(kernel: ModuleType, wrong: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(Exception, match=message):
        run(session(Heads()), {**drawn(Heads(), [(0, 10, 2)]), **wrong})


@pytest.mark.parametrize("heads", [(0, 1), (1, 0), (5, 2), (1 << 17, 1), ((1 << 59) + 6, 2)])
def test_other_heads_are_refused(kernel: ModuleType, heads: tuple[int, int]) -> None:
    """Also as many that their product with a width is the width of six in 64 bits."""
    with pytest.raises(Exception, match="heads are a multiple"):
        session(Heads(*heads))


def test_caches_elsewhere_are_refused(kernel: ModuleType) -> None:
    """The operator writes in place; a run that lets it make other caches would lose what they hold."""
    operator = session(Heads())
    names = {one.name for one in operator.get_inputs()}
    feeds = {name: array for name, array in drawn(Heads(), [(0, 10, 2)]).items() if name in names}
    with pytest.raises(Exception, match="written where they are read"):
        operator.run(None, feeds)


def watch(runner: ModelRunner, passes: Counter[int], monkeypatch: Any) -> None:
    """Counts the joint passes of a runner by their rows."""
    read = runner._read_joint

    def counted(pieces: Any) -> Any:
        passes[len(pieces)] += 1
        return read(pieces)

    monkeypatch.setattr(runner, "_read_joint", counted)


@pytest.mark.parametrize("scheme", [None, "int4"])
def test_an_engine_answers_as_without_the_operator(
    kernel: ModuleType, base_of: Make, pack_of: Make, tmp_path: Path, monkeypatch: Any, scheme: str | None
) -> None:
    """Rows with three adapters and with none, which come and go: running rows ride along with prompts, and
    read ahead together.
    """
    packs = [pack_of("llama", name) for name in ("alpha", "beta", "gamma")]
    export(base_of("llama"), packs, tmp_path / "bundle", mode="bank", in_place=True, quantize=scheme)
    answers = []
    for library in (ragged_attention.LIBRARY, None):
        monkeypatch.setattr(ragged_attention, "LIBRARY", library)
        engine = DecoderEngine(tmp_path / "bundle", "cpu", max_rows=3, prefill_budget=8, lookup_tokens=4)
        assert engine.rows.graph.ragged == bool(library)
        passes = Counter[int]()
        watch(engine.rows, passes, monkeypatch)
        requests = {}
        for number, name in enumerate([None, "alpha", "beta", "gamma", "alpha", None, "beta"]):
            prompt = [3 + (5 * number + place) % 4 for place in range(2 + 3 * number)]
            requests[engine.add(prompt, name, max_new_tokens=12, ignore_eos=True, logprobs=0)] = number
        chosen: dict[int, list[tuple[int, float]]] = {number: [] for number in requests.values()}
        while engine.busy:
            for event in engine.step():
                assert event.error is None
                if event.choice is not None:
                    chosen[requests[event.request]].append((event.choice.token, event.choice.logprob))
        assert bool(passes) == bool(library)  # how many: by what passes take
        answers.append(chosen)
    for mine, plain in zip(*(one.values() for one in answers), strict=True):
        assert len(mine) == len(plain) == 12
        if scheme is None:
            assert [token for token, _ in mine] == [token for token, _ in plain]
            assert np.abs(np.array(mine) - np.array(plain)).max() < 2e-5


def test_a_file_with_such_a_name_is_left_alone(
    kernel: ModuleType, base_of: Make, pack_of: Make, tmp_path: Path
) -> None:
    """A stranger's graph cannot call the operator: it is not there for graphs that name its domain."""
    export(base_of("llama"), [pack_of("llama", "alpha")], tmp_path / "bundle", mode="bank", in_place=True)
    model = ir.load(tmp_path / "bundle" / f"{DECODER}.onnx")
    model.opset_imports[ragged_attention.DOMAIN] = 1
    assert not replace_attention(model)
