"""What a decoder's graph counts by the length of its cache: known for what it is, or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from adapterpack.errors import Unsupported
from adapterpack.graph_passes.position_inputs import PositionInputs

pytestmark = pytest.mark.fast
_BASE = """<ir_version: 10, opset_import: ["" : 21]>
counted (int64[batch,sequence] input_ids, float[batch,2,past,4] cache)
=> (float[batch,heads,sequence,total] bias, float[batch,sequence,3] placed)
<int64 zero = {0}, int64 one = {1}, int64[1] first = {0}, int64[1] second = {1}, float least = {-1e9}, int64 near = {3}, int64 two = {2}>
{
    tokens = Shape <start=1, end=2> (input_ids)
    before = Shape <start=2, end=3> (cache)
    both = Add (tokens, before)
    n = Squeeze (tokens)
    t = Squeeze (both)
    steps = Range (zero, n, one)
    places = Add (steps, before)
    keys = Range (zero, t, one)
    queries = Unsqueeze (places, second)
    far = Sub (queries, keys)
    later = Less (far, zero)
    SCORE
    numbers = Cast <to=1> (score)
    hidden = Where (later, least, numbers)
    one_head = Unsqueeze (hidden, first)
    bias = Unsqueeze (one_head, first)
    INDEX
    PLACED
}"""


def graph(
    score: str = "score = Min (far, near)",
    index: str = "index = Add (places, two)",
    context: int | None = None,
    placed: str = "placed = Gather (table, index)",
) -> tuple[Any, PositionInputs]:
    """The graph with these scores, this index and what it makes of a table, and what rewires it."""
    text = _BASE.replace("SCORE", score).replace("INDEX", index).replace("PLACED", placed)
    model = ir.from_onnx_text(text)
    ids, cache = model.graph.inputs
    total = ir.Value(name="total", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT32))
    model.graph.inputs.append(total)
    tensor = ir.tensor(np.arange(60, dtype=np.float32).reshape(20, 3), name="table")
    table = ir.Value(name="table", shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    node = next(node for node in model.graph if node.op_type == "Gather")
    model.graph.register_initializer(table)
    node.replace_input_with(0, table)
    return model, PositionInputs(model, ids, [cache], total, context)


def test_rows_of_different_lengths_have_what_each_had_alone() -> None:
    model, places = graph()
    bias, placed = model.graph.outputs
    (rows,) = places.bias([bias], placed.producer())
    places.index_tables()
    rows.name, bias.name = "rows", "old"
    rows.type, rows.shape = bias.type, None
    model.graph.outputs[0] = rows
    RemoveUnusedNodesPass()(model)
    model.graph.sort()
    assert "cache" not in {use.name for node in model.graph for use in node.inputs if use is not None}
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    lengths, tokens = np.array([0, 7, 3]), 2
    positions = lengths[:, None] + np.arange(tokens)
    feeds = {
        "input_ids": np.full((3, tokens), 5),
        "position_ids": positions,
        "total": np.array(9, np.int32),
        "cache": np.zeros((3, 2, 0, 4), np.float32),
    }
    found, looked_up = session.run(["rows", "placed"], feeds)
    for row, length in enumerate(lengths):
        for token in range(tokens):
            distances = length + token - np.arange(length + token + 1)
            assert found[row, 0, token, : length + token + 1].tolist() == np.minimum(distances, 3).tolist()
            assert (looked_up[row, token] == np.arange(60).reshape(20, 3)[length + token + 2]).all()


def test_what_is_made_of_a_table_is_read_at_the_positions_of_rows() -> None:
    """As RoFormer's sines, which it rearranges for all rows at once and multiplies with each one's queries."""
    model, places = graph(
        placed="""
    looked_up = Gather (table, index)
    axes = Constant <value_ints = [0, 1]> ()
    wide = Unsqueeze (looked_up, axes)
    a, b, c = Split <axis = -1, num_outputs = 3> (wide)
    mixed = Concat <axis = -1> (c, a)
    words = Cast <to = 1> (input_ids)
    apart = Unsqueeze (words, axes)
    query = Transpose <perm = [2, 0, 3, 1]> (apart)
    placed = Mul (query, mixed)"""
    )
    placed = model.graph.outputs[1]
    placed.producer().inputs[1].shape, placed.shape = ir.Shape([1, 1, "sequence", 2]), None
    places.index_tables()
    model.graph.outputs[:] = [placed]
    RemoveUnusedNodesPass()(model)
    model.graph.sort()
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    positions = np.array([[0, 1], [7, 8], [3, 4]])
    feeds = {"input_ids": np.array([[5, 5], [7, 7], [9, 9]]), "position_ids": positions}
    feeds |= {"cache": np.zeros((3, 2, 0, 4), np.float32), "total": np.array(0, np.int32)}
    (found,) = session.run(None, feeds)
    table = np.arange(60, dtype=np.float32).reshape(20, 3)[:, [2, 0]]
    assert np.array_equal(found[:, 0], table[positions + 2] * feeds["input_ids"][..., None])


@pytest.mark.parametrize(("context", "last"), [(20, 0), (40, 1)])
def test_a_table_may_be_read_at_one_place_of_the_whole_context(context: int, last: int) -> None:
    """As the types of a decoder's tokens; one that is read elsewhere at the end is refused."""
    model, places = graph(index="index = Div (places, twenty)", context=context)
    twenty = ir.tensor(np.array(20), name="twenty")
    value = ir.Value(name="twenty", shape=twenty.shape, type=ir.TensorType(twenty.dtype), const_value=twenty)
    model.graph.register_initializer(value)
    next(node for node in model.graph if node.op_type == "Div").replace_input_with(1, value)
    if last:
        with pytest.raises(Unsupported, match="by more than the positions"):
            places.index_tables()
        return
    places.index_tables()
    model.graph.outputs[:] = [model.graph.outputs[1]]
    RemoveUnusedNodesPass()(model)
    del model.graph.inputs[:]
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {})[0].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("score = Mul (far, two)", lambda far, keys: 2 * far),
        # ALiBi: the farther a key from the last, the less; a softmax sees the distance to the query
        ("score = Sub (keys, t)", lambda far, keys: -far),
        ("score = Mod (keys, near)", lambda far, keys: keys % 3),
    ],
)
def test_a_line_goes_on_and_a_context_ends(score: str, expected: Any) -> None:
    """What grows by distance or by the end of the row is followed beyond what was tried; what repeats by
    position is known as far as the context goes.
    """
    context = 40
    model, places = graph(score, context=context)
    bias, placed = model.graph.outputs
    (rows,) = places.bias([bias], placed.producer())
    rows.name, bias.name = "rows", "old"
    rows.type, rows.shape = bias.type, None
    model.graph.outputs[:] = [rows]
    del model.graph.inputs[:2]
    RemoveUnusedNodesPass()(model)
    model.graph.sort()
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    length = context - 1
    feeds = {"position_ids": np.array([[length]]), "total": np.array(context, np.int32)}
    (found,) = session.run(None, feeds)
    keys = np.arange(context)
    assert found[0, 0, 0].tolist() == expected(length - keys, keys).tolist()


def test_a_mask_alone_adds_nothing() -> None:
    model, places = graph("score = Mul (far, zero)")
    assert places.bias([model.graph.outputs[0]], model.graph.outputs[1].producer()) == []


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"score": "score = Mul (far, keys)"}, "depends on more than the distances"),
        ({"score": "score = Mul (far, far)"}, "does not become constant"),
        ({"index": "index = Mul (places, two)"}, "by more than the positions"),
    ],
)
def test_anything_else_is_refused(changed: dict[str, str], reason: str) -> None:
    model, places = graph(**changed)
    with pytest.raises(Unsupported, match=reason):
        places.bias([model.graph.outputs[0]], model.graph.outputs[1].producer())
        places.index_tables()
