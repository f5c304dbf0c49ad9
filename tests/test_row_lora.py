"""The operator that adds the LoRAs of a batch's rows: against float64, among its instruction sets, among rows
that come and go, and beside the graph that does without it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from adapterpack import export
from adapterpack._native import row_lora
from adapterpack._native.row_lora import AdapterNumbers, HeldAdapter, LoraPart
from adapterpack.bundle.decoder_graph import DECODER
from adapterpack.onnx_graph import replace_lora
from adapterpack.runtime.engine.engine import DecoderEngine

pytestmark = pytest.mark.fast
Make = Callable[..., Any]
FLOAT, INT64 = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.INT64)
SHAPES = [
    (576, 960, 8, 1, (16,)),
    (577, 963, 5, 1, (7, 16, 9)),
    (13, 5, 3, 4, (1,)),
    (64, 96, 2, 33, (130,)),
    (31, 30, 9, 3, (3, 0)),
    (1, 1, 1, 1, (1,)),
    (40, 48, 17, 5, (24, 8)),
]
"""Widths of the product's input and output, rows, tokens, and the ranks of siblings."""


@pytest.fixture
def kernel() -> ModuleType:
    return row_lora._kernel or pytest.skip("no compiler here: ONNX Runtime's own products add LoRAs")


@pytest.fixture
def operator(kernel: ModuleType) -> ort.InferenceSession:
    return session()


def session(site: int = 0) -> ort.InferenceSession:
    """The operator alone."""
    x, product, numbers = (
        ir.Value(name=name, type=kind, shape=ir.Shape(axes))
        for name, kind, axes in (
            ("x", FLOAT, ["rows", "tokens", "in"]),
            ("product", FLOAT, ["rows", "tokens", "out"]),
            ("adapters", INT64, ["rows"]),
        )
    )
    node = ir.node(row_lora.OPERATOR, [x, product, numbers], {"site": site}, domain=row_lora.DOMAIN)
    total = node.outputs[0]
    total.name, total.type, total.shape = "sum", FLOAT, product.shape
    graph = ir.Graph(
        [x, product, numbers], [total], nodes=[node], opset_imports={"": 21, row_lora.DOMAIN: 1}, name="one"
    )
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(row_lora.LIBRARY)
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def drawn(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def parts_of(rng: np.random.Generator, width: int, out: int, ranks: tuple[int, ...]) -> list[LoraPart]:
    each = out // len(ranks)
    return [
        LoraPart(drawn(rng, width, rank) * 0.1, drawn(rng, rank, each) * 0.1, number * each)
        for number, rank in enumerate(ranks)
    ]


def run(
    operator: ort.InferenceSession, x: np.ndarray, product: np.ndarray, numbers: np.ndarray
) -> np.ndarray:
    found: np.ndarray = operator.run(None, {"x": x, "product": product, "adapters": numbers})[0]
    return found


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_those_of_float64_and_of_each_row_alone(
    operator: ort.InferenceSession, kernel: ModuleType, shape: tuple[int, int, int, int, Any], half: bool
) -> None:
    """Rows of four adapters and of none; in every instruction set. Of a row alone every bit is the same."""
    width, out, rows, tokens, ranks = shape
    rng = np.random.default_rng(7)
    adapters = [parts_of(rng, width, out, ranks) for _ in range(4)]
    chosen = rng.integers(-1, 4, rows)
    x, product = drawn(rng, rows, tokens, width), drawn(rng, rows, tokens, out)
    expected = product.astype(np.float64)
    dtype = np.float16 if half else np.float32
    for row, one in enumerate(chosen):
        for down, up, at in adapters[one] if one >= 0 else ():
            factors = [factor.astype(dtype).astype(np.float64) for factor in (down, up)]
            expected[row, :, at : at + up.shape[1]] += x[row].astype(np.float64) @ factors[0] @ factors[1]
    for name in kernel.sets():
        held = [
            kernel.hold(
                [[(np.ascontiguousarray(d.T.astype(dtype)), u.astype(dtype), at) for d, u, at in parts]],
                half,
                name,
            )
            for parts in adapters
        ]
        numbers = np.array([-1 if one < 0 else held[one][0] for one in chosen], np.int64)
        found = run(operator, x, product, numbers)
        # the rounding of float32 sums of so many numbers
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
        for row in range(rows):
            alone = run(operator, *(array[row : row + 1] for array in (x, product, numbers)))
            assert np.array_equal(alone[0], found[row])


def test_numbers_that_nobody_holds_are_refused(operator: ort.InferenceSession) -> None:
    """Also one that was held, a layer that the adapter lacks, and other widths; the adapters live as long as
    an array of their numbers.
    """
    rng = np.random.default_rng(3)
    held = HeldAdapter([parts_of(rng, 8, 6, (2,))], half=False)
    x, product = drawn(rng, 1, 1, 8), drawn(rng, 1, 1, 6)
    numbers = np.asarray(AdapterNumbers([held]))
    number = held.number
    del held
    assert not np.array_equal(run(operator, x, product, numbers), product)
    assert np.array_equal(run(operator, x, product, numbers * 0 - 1), product)
    for other in (number + 1, 1 << 16, 1 << 40):
        with pytest.raises(Exception, match="names an adapter that is not held"):
            run(operator, x, product, np.array([other], np.int64))
    with pytest.raises(Exception, match="has no such layer"):
        run(session(site=1), x, product, numbers)
    for width, out in ((7, 6), (8, 5)):
        with pytest.raises(Exception, match="layer of other widths"):
            run(operator, drawn(rng, 1, 1, width), drawn(rng, 1, 1, out), numbers)
    for other_rows in ((2, 1), (1, 2)):
        with pytest.raises(Exception, match="have other rows"):
            run(operator, drawn(rng, *other_rows, 8), product, numbers)
    kept = numbers.copy()
    del numbers
    with pytest.raises(Exception, match="names an adapter that is not held"):
        run(operator, x, product, kept)


def test_float16_only_where_it_is_exact_enough(kernel: ModuleType) -> None:
    """Factors whose largest number is at the ends of float16 stay float32."""
    ones = np.ones((3, 2), np.float32)
    for factor, bytes_each in ((1.0, 2), (2.0**-15, 4), (2.0**16, 4), (0.0, 2)):
        part = LoraPart(ones * factor, ones.T, 0)
        assert HeldAdapter([[part]], half=True).nbytes == 12 * bytes_each
        assert HeldAdapter([[part]], half=False).nbytes == 48


@pytest.mark.parametrize(
    "sites",
    [
        5,
        [5],
        [[5]],
        [[(np.ones((2, 3), np.float32), np.ones((3, 3), np.float32), 0)]],
        [[(np.ones((2, 3), np.float32), np.ones((2, 3), np.float32), -1)]],
        [[(np.ones((2, 3)), np.ones((2, 3), np.float32), 0)]],
        [[(np.ones((3, 2), np.float32).T, np.ones((2, 3), np.float32), 0)]],
        [[(np.ones(3, np.float32), np.ones((2, 3), np.float32), 0)]],
    ],
)
def test_other_factors_are_refused(kernel: ModuleType, sites: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        kernel.hold(sites, False)


@pytest.mark.parametrize("scheme", [None, "int4"])
def test_an_engine_answers_as_without_the_operator(
    kernel: ModuleType, base_of: Make, pack_of: Make, tmp_path: Path, monkeypatch: Any, scheme: str | None
) -> None:
    """Rows with three adapters and with none, as they come and go; in float32 as near as sums in another order
    are, in four bits, whose factors are float16, as near as rounded activations are.
    """
    packs = [pack_of("llama", name) for name in ("alpha", "beta", "gamma")]
    export(base_of("llama"), packs, tmp_path / "bundle", mode="bank", in_place=True, quantize=scheme)
    model = ir.load(tmp_path / "bundle" / f"{DECODER}.onnx")
    layers = replace_lora(model)
    assert len(layers) == 4 * 2  # q, k and v, o, gate and up, down
    assert sum(node.op_type == row_lora.OPERATOR for node in model.graph) == len(layers)
    answers = []
    for library in (row_lora.LIBRARY, None):
        monkeypatch.setattr(row_lora, "LIBRARY", library)
        engine = DecoderEngine(tmp_path / "bundle", "cpu", max_rows=3, prefill_budget=4, lookup_tokens=0)
        graph = engine.rows.graph
        assert graph.lora == (layers if library else []) and graph.halves == bool(library and scheme)
        for number, name in enumerate([None, "alpha", "beta", "gamma", "alpha", None, "beta"]):
            prompt = [3 + (5 * number + place) % 50 for place in range(2 + 3 * number)]
            engine.add(prompt, name, max_new_tokens=1, ignore_eos=True, prompt_logprobs=0)
        ends: dict[int, Any] = {}
        while engine.busy:
            ends |= {event.request: event for event in engine.step() if event.finish_reason}
        answers.append([[score[1] for score in end.scored[1:]] for _, end in sorted(ends.items())])
    one, other = (np.concatenate([np.array(row) for row in rows]) for rows in answers)
    assert np.abs(one - other).max() < (2e-5 if scheme is None else 0.05)


def test_a_file_with_such_a_name_is_left_alone(
    kernel: ModuleType, base_of: Make, pack_of: Make, tmp_path: Path
) -> None:
    """A stranger's graph cannot call the operator: it is not there for graphs that name its domain."""
    export(base_of("llama"), [pack_of("llama", "alpha")], tmp_path / "bundle", mode="bank", in_place=True)
    model = ir.load(tmp_path / "bundle" / f"{DECODER}.onnx")
    model.opset_imports[row_lora.DOMAIN] = 1
    assert replace_lora(model) == []
