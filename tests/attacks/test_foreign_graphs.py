"""Attacks by ONNX files of other tools: what it costs to open one ends in a process of its own, whatever is
done with it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from attack import Attacks, Outcome
from onnx import TensorProto, helper  # noqa: TID251 - onnx_ir does not write what is wrong
from safetensors.numpy import load_file
from test_bundle_graphs import Change, constant, external, functions, loop, node, set_opset

WEIGHT = "model.layers.0.self_attn.q_proj.weight"


def work(model: Any) -> None:
    """Constants that are multiplied for an hour when they are folded."""
    model.graph.initializer.extend(
        [constant("extents", np.array([64, 50_000])), constant("c0", np.ones((1, 1), np.float32))]
    )
    model.graph.node.append(helper.make_node("Expand", ["c0", "extents"], ["wide"]))
    for number in range(10_000):
        inputs, outputs = ["wide", "wide", f"c{number}"], [f"c{number + 1}"]
        model.graph.node.append(helper.make_node("Gemm", inputs, outputs, transB=1, beta=1 / (number + 2)))
    node("Identity", [f"c{number + 1}"])(model)


def doubled(model: Any) -> None:
    """A constant that is doubled forty times when it is folded."""
    model.graph.initializer.append(constant("c0", np.ones(1024, np.float32)))
    for number in range(40):
        model.graph.node.append(helper.make_node("Concat", [f"c{number}"] * 2, [f"c{number + 1}"], axis=0))
    node("Identity", ["c40"])(model)


def outer(model: Any) -> None:
    """Two constants whose product is very much larger."""
    model.graph.initializer.extend(
        [
            constant("tall", np.ones((40_000, 1), np.float32)),
            constant("wide", np.ones((1, 40_000), np.float32)),
        ]
    )
    node("MatMul", ["tall", "wide"])(model)


def nothing(model: Any) -> None:
    """The file as it is."""


def graph_at(folder: Path, base: Path, change: Change) -> Path:
    """A graph that multiplies by a weight of the base, altered."""
    weight = constant(WEIGHT, load_file(base / "model.safetensors")[WEIGHT])
    nodes = [
        helper.make_node("Transpose", [WEIGHT], ["turned"]),
        helper.make_node("MatMul", ["x", "turned"], ["logits"]),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 8]) for name in ("x", "logits")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ports[:1], ports[1:], [weight]),
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 20)],
    )
    folder.mkdir()
    onnx.save(
        model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0
    )
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


EXPORTED: dict[str, tuple[Change, str]] = {
    "work": (work, "processor time"),
    "memory": (doubled, "MiB of memory"),
    "functions": (functions(40), "nodes"),
    "a product of 6 GB": (outer, "input_ids"),  # which is not computed before the graph is run
    "a loop": (loop, "repeats"),
    "an unknown operator": (node("Divine", ["x"]), "cannot be opened"),
    "a custom domain": (node("Run", ["x"], domain="evil.example"), "cannot be opened"),
    "an opset of the future": (set_opset(999), ""),
    "data outside": (external(location="../outside/secret.txt"), "own folder"),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_a_graph_is_exported(attacks: Attacks, base: Path, name: str) -> None:
    change, words = EXPORTED[name]
    graph = graph_at(attacks.work / "graph", base, change)
    attacks.command("export", graph, "pack", "--base", base, "-o", "out").refused(
        words, absent=attacks.work / "out"
    )


MERGED: dict[str, tuple[Change, Callable[[Outcome], Outcome]]] = {
    "as it is": (nothing, Outcome.harmless),
    "work": (work, Outcome.harmless),
    "memory": (doubled, Outcome.harmless),
    "functions": (functions(40), Outcome.refused),
    "functions in a circle": (functions(3, circle=True), Outcome.held),
    "an unknown operator": (node("Divine", ["x"]), Outcome.harmless),
    "an opset of the future": (set_opset(999), Outcome.held),
    "data outside": (external(location="../outside/secret.txt"), Outcome.refused),
}


@pytest.mark.parametrize("name", MERGED)
def test_a_graph_is_merged(attacks: Attacks, base: Path, name: str) -> None:
    """What is merged is not run, so nothing of it is computed."""
    change, expected = MERGED[name]
    graph = graph_at(attacks.work / "graph", base, change)
    expected(attacks.command("merge", graph, "pack", "--base", base, "-o", "out"))
