"""The operator that multiplies by weights in 4 and 8 bits: against float64, among its instruction sets, among
rows that come and go, and beside the graph that does without it.
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
from adapterpack._native import quantized_matmul
from adapterpack._native.quantized_matmul import HeldWeight
from adapterpack.bundle.decoder_graph import DECODER
from adapterpack.onnx_graph import replace_products
from adapterpack.runtime.engine.engine import DecoderEngine

pytestmark = pytest.mark.fast
Make = Callable[..., Any]
FLOAT = ir.TensorType(ir.DataType.FLOAT)
SHAPES = [
    (576, 960, 32, 4),
    (577, 963, 32, 4),
    (1000, 65, 128, 4),
    (31, 1, 16, 4),
    (100, 37, 16, 8),
    (1536, 33, 256, 8),
    (576, 96, 32, 8),
    (5, 40, 8, 8),
    (3000, 8, 3000, 8),
]
"""Numbers of a weight's row, rows, numbers of a block, bits."""
Weight = tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]


@pytest.fixture
def kernel() -> ModuleType:
    found = quantized_matmul._kernel
    return found or pytest.skip("no compiler here: ONNX Runtime's own products multiply")


def session(
    operator: str, domain: str, width: int, initializers: list[ir.Value], **attributes: Any
) -> ort.InferenceSession:
    """One operator alone, on activations of any rows."""
    x = ir.Value(name="x", type=FLOAT, shape=ir.Shape([None, None, width]))
    node = ir.node(operator, [x, *initializers], attributes, domain=domain)
    y = node.outputs[0]
    y.name, y.type = "y", FLOAT
    graph = ir.Graph(
        [x], [y], nodes=[node], initializers=initializers, opset_imports={"": 21, domain: 1}, name="one"
    )
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(quantized_matmul.LIBRARY)
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def ours(number: int, width: int) -> ort.InferenceSession:
    return session(quantized_matmul.OPERATOR, quantized_matmul.DOMAIN, width, [], weight=number)


def drawn(
    rng: np.random.Generator, shape: tuple[int, int, int, int], zeros: bool, bias: bool = False
) -> Weight:
    width, out, block, bits = shape
    blocks = -(-width // block)
    return (
        rng.integers(0, 256, (out, blocks, block * bits // 8), np.uint8),
        rng.uniform(-0.02, 0.02, (out, blocks)).astype(np.float32),
        rng.integers(0, 256, (out, -(-blocks * bits // 8)), np.uint8) if zeros else None,
        rng.standard_normal(out, np.float32) if bias else None,
    )


def dense(weight: Weight, shape: tuple[int, int, int, int]) -> np.ndarray:
    """The weight ``[out, in]`` in float64."""
    codes, scales, zeros, _ = weight
    width, out, _, bits = shape

    def unpacked(array: np.ndarray) -> np.ndarray:
        rows = array.reshape(out, -1)
        return rows if bits == 8 else np.stack([rows & 15, rows >> 4], -1).reshape(out, -1)

    middle = 2 ** (bits - 1) if zeros is None else unpacked(zeros)[:, : scales.shape[1], None].astype(float)
    blocks = unpacked(codes).reshape(*scales.shape, -1).astype(float)
    return ((blocks - middle) * scales.astype(float)[..., None]).reshape(out, -1)[:, :width]


def rounded(x: np.ndarray, block: int) -> np.ndarray:
    """Activations ``[rows, in]`` as the operator rounds them, in float64."""
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % block))).reshape(len(x), -1, block)
    largest = np.abs(padded).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    steps = largest.astype(np.float64) / 127
    return (np.rint(padded * inverse) * steps).reshape(len(x), -1)[:, : x.shape[1]]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_float64_and_of_each_row_alone(
    kernel: ModuleType, shape: tuple[int, int, int, int], zeros: bool
) -> None:
    """Of activations as they are rounded; all bits are the same in every instruction set, and of a row alone."""
    rng = np.random.default_rng(11)
    width, out, block, bits = shape
    weight = drawn(rng, shape, zeros, bias=zeros)
    held = HeldWeight(*weight, width, block, bits)
    operator = ours(held.number, width)
    x = rng.standard_normal((100, width), np.float32)
    x[3] = 0
    x[4, :block] = 0
    x[5] *= 1e-20
    expected = rounded(x, block) @ dense(weight, shape).T
    sizes = np.abs(rounded(x, block)) @ np.abs(dense(weight, shape)).T
    if weight[3] is not None:
        expected += weight[3]
        sizes += np.abs(weight[3])
    answers = set()
    try:
        for name in kernel.sets():
            kernel.use(name)
            (found,) = operator.run(None, {"x": x[None]})
            answers.add(found.tobytes())
            # the rounding of float32 sums, one for each block
            assert (np.abs(found[0] - expected) <= 1e-6 * sizes).all()
            for first, count in ((0, 1), (3, 2), (7, 6), (20, 7), (64, 11), (96, 4)):
                part = operator.run(None, {"x": x[None, first : first + count]})[0]
                assert np.array_equal(part[0], found[0, first : first + count])
    finally:
        kernel.use()
    assert len(answers) == 1
    assert operator.run(None, {"x": x[None, :0]})[0].shape == (1, 0, out)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("shape", [(576, 960, 32, 4), (300, 65, 64, 8)], ids=str)
def test_products_are_those_of_onnx_runtime(
    kernel: ModuleType, shape: tuple[int, int, int, int], zeros: bool
) -> None:
    """Those of ``MatMulNBits`` with accuracy_level 4, as near as sums in another order are."""
    rng = np.random.default_rng(5)
    width, out, block, bits = shape
    weight = drawn(rng, shape, zeros)
    initializers = [
        ir.Value(name=f"w{place}", const_value=ir.tensor(array, name=f"w{place}"))
        for place, array in enumerate(weight[: 2 + zeros])
        if array is not None
    ]
    other = session(
        "MatMulNBits",
        "com.microsoft",
        width,
        initializers,
        K=width,
        N=out,
        bits=bits,
        block_size=block,
        accuracy_level=4,
    )
    held = HeldWeight(*weight, width, block, bits)
    x = rng.standard_normal((2, 9, width), np.float32)
    one, two = (each.run(None, {"x": x})[0] for each in (ours(held.number, width), other))
    assert np.abs(one - two).max() <= 2e-3 * np.abs(two).max()


def test_a_row_with_an_infinity_is_nan_and_no_other(kernel: ModuleType) -> None:
    rng = np.random.default_rng(2)
    weight = drawn(rng, (64, 40, 32, 4), False)
    held = HeldWeight(*weight, 64, 32, 4)
    x = rng.standard_normal((1, 4, 64), np.float32)
    clean = ours(held.number, 64).run(None, {"x": x})[0]
    x[0, 1, 3], x[0, 3, 60] = np.inf, np.nan
    (found,) = ours(held.number, 64).run(None, {"x": x})
    assert np.isnan(found[0, [1, 3]]).all() and np.array_equal(found[0, [0, 2]], clean[0, [0, 2]])


def test_weights_that_nobody_holds_are_refused(kernel: ModuleType) -> None:
    """Also one that was held, and activations of another width."""
    weight = drawn(np.random.default_rng(2), (64, 40, 32, 4), False)
    held = HeldWeight(*weight, 64, 32, 4)
    operator, number = ours(held.number, 64), held.number
    operator.run(None, {"x": np.ones((1, 1, 64), np.float32)})
    with pytest.raises(Exception, match="another width"):
        ours(number, 63).run(None, {"x": np.ones((1, 1, 63), np.float32)})
    del held
    for other in (number, -1, 1 << 16, 1 << 40):
        with pytest.raises(Exception, match="a weight that is not held"):
            ours(other, 64).run(None, {"x": np.ones((1, 1, 64), np.float32)})


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 2},
        {"block": 12},
        {"block": 0},
        {"block": 1 << 17},
        {"width": 0},
        {"width": 65},
        {"width": 2**63 - 1},
        {"codes": np.zeros((40, 2, 15), np.uint8)},
        {"codes": np.zeros((40, 2, 16), np.int8)},
        {"scales": np.zeros((40, 3), np.float32)},
        {"scales": np.zeros((0, 2), np.float32)},
        {"scales": np.zeros((40, 2))},
        {"zeros": np.zeros((40, 2), np.uint8)},
        {"bias": np.zeros(41, np.float32)},
    ],
    ids=str,
)
def test_other_weights_are_refused(kernel: ModuleType, changes: dict[str, Any]) -> None:
    right: dict[str, Any] = {
        "codes": np.zeros((40, 2, 16), np.uint8),
        "scales": np.zeros((40, 2), np.float32),
        "zeros": None,
        "bias": None,
    }
    with pytest.raises((TypeError, ValueError)):
        HeldWeight(**right | {"width": 64, "block": 32, "bits": 4} | changes)


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_an_engine_answers_as_without_the_operator(
    kernel: ModuleType, base_of: Make, pack_of: Make, tmp_path: Path, monkeypatch: Any, scheme: str
) -> None:
    """As near as rounded activations are; each layer is one node, and no code is left to ONNX Runtime."""
    export(
        base_of("llama"),
        [pack_of("llama", "alpha")],
        tmp_path / "bundle",
        mode="bank",
        in_place=True,
        quantize=scheme,
    )
    model = ir.load(tmp_path / "bundle" / f"{DECODER}.onnx")
    before = sum(node.op_type == "MatMulNBits" for node in model.graph)
    held = replace_products(model)
    assert before and sum(node.op_type == quantized_matmul.OPERATOR for node in model.graph) == before
    assert len(held) == before and not any(node.op_type == "MatMulNBits" for node in model.graph)
    answers = []
    for library in (quantized_matmul.LIBRARY, None):
        monkeypatch.setattr(quantized_matmul, "LIBRARY", library)
        engine = DecoderEngine(tmp_path / "bundle", "cpu", max_rows=3, prefill_budget=8, lookup_tokens=0)
        for number, name in enumerate([None, "alpha", None, "alpha"]):
            prompt = [3 + (5 * number + place) % 50 for place in range(4 + 3 * number)]
            engine.add(prompt, name, max_new_tokens=1, ignore_eos=True, prompt_logprobs=0)
        ends: dict[int, Any] = {}
        while engine.busy:
            ends |= {event.request: event for event in engine.step() if event.finish_reason}
        answers.append([[score[1] for score in end.scored[1:]] for _, end in sorted(ends.items())])
    one, other = (np.concatenate([np.array(row) for row in rows]) for rows in answers)
    assert np.abs(one - other).max() < 0.02


def test_a_file_with_such_a_name_is_left_alone(kernel: ModuleType, base_of: Make, tmp_path: Path) -> None:
    """A stranger's graph cannot call the operator, and exact products stay exact."""
    export(base_of("llama"), [], tmp_path / "bundle", quantize="int4")
    model = ir.load(tmp_path / "bundle" / f"{DECODER}.onnx")
    model.opset_imports[quantized_matmul.DOMAIN] = 1
    assert replace_products(model) == []
    del model.opset_imports[quantized_matmul.DOMAIN]
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    assert replace_products(model) == []
