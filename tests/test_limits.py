"""What is checked before a graph is written: versions against the installed ONNX Runtime, slots and sites
after every pass.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from test_export import one_layer

from adapterpack.bundle.manifest import read_bundle
from adapterpack.errors import ParityError, Unsupported
from adapterpack.exporting.bundle_writer import require_readable
from adapterpack.graph_passes.checks import require_sites, slot_names
from adapterpack.graph_passes.packing import pack_siblings
from adapterpack.graph_passes.sites import find_sites


@pytest.mark.fast
@pytest.mark.parametrize(("version", "opset"), [(10, 99), (99, 20)])
def test_versions_that_the_runtime_does_not_know(version: int, opset: int) -> None:
    """An operator set or an IR version of the future is named, with the largest that the installed ONNX
    Runtime takes.
    """
    model = one_layer("MatMul", 3, np.ones((5, 7), np.float32), None)
    require_readable(model)
    model.ir_version, model.graph.opset_imports[""] = version, opset
    with pytest.raises(
        Unsupported, match=rf"{max(version, opset)}.*at most [0-9]+|at most [0-9]+.*{max(version, opset)}"
    ):
        require_readable(model)


@pytest.mark.fast
def test_a_pass_that_loses_something_is_named() -> None:
    """A slot that became a constant, and a site whose node, value or weight is gone."""
    model = one_layer("MatMul", 3, np.ones((5, 7), np.float32), None)
    sites = find_sites(model, lambda node: "layer")
    require_sites("nothing", model, sites, ())
    with pytest.raises(ParityError, match=r"fusion removed slots.*layer\.down"):
        require_sites("fusion", model, sites, {"layer.down"})
    model.graph[0].name = "another"
    with pytest.raises(ParityError, match=r"fusion lost sites.*layer"):
        require_sites("fusion", model, sites, ())


@pytest.mark.parametrize(
    ("mode", "before", "after"), [("folded", 7, 4), ("bank", 21, 15), ("inputs", 21, 18)]
)
def test_packing_saves_products(mode: str, before: int, after: int, bundle_of: Callable[..., Path]) -> None:
    """Of one Llama layer: q, k, v, o, gate, up, down are 7 MatMuls and 14 of the branches; packed they are 4,
    and in a bank 11.
    """
    folder = bundle_of("llama", mode)
    graph = ir.load(folder / "model.onnx").graph
    found = [
        node
        for node in graph
        if node.op_type == "MatMul" and any("layers.1." in one for one in (node.name, node.inputs[1].name))
    ]
    assert len(found) == after < before
    sites = read_bundle(folder).sites
    assert {len(site.members) for site in sites.values()} == ({0, 2, 3} if mode == "bank" else {0})
    weights = {
        site.weight
        for path, site in sites.items()
        if site.weight and path.endswith(("q_proj", "k_proj", "v_proj")) and "layers.0" in path
    }
    assert len(weights) == 1
    shared = {site.fields for site in sites.values() if site.members}
    assert shared == ({("down",)} if mode == "bank" else set())
    assert slot_names(ir.load(folder / "model.onnx")) == {
        f"{path}.{field}" for path, site in sites.items() for field in site.fields
    }


def test_siblings_that_differ_stay_apart(tiny_llama: Path) -> None:
    """Nothing is packed across modules, or where one sibling's input is changed by an adapter."""
    from adapterpack.exporting.frontends import FRONTENDS, ExportSource
    from adapterpack.graph_passes.attach import AttachPlan
    from adapterpack.tasks.task import get_task

    graph = FRONTENDS["mobius"].build(ExportSource(tiny_llama, get_task("text-generation")))
    every = find_sites(graph.model, graph.scope)
    import dataclasses

    changed = {
        "model.layers.0.self_attn.q_proj": dataclasses.replace(
            every["model.layers.0.self_attn.q_proj"], fields=("pre",)
        )
    }
    plan = pack_siblings(graph.model, every, AttachPlan([], [], changed, {}, 2, 4), share=True)
    names = [
        node.name
        for node in graph.model.graph
        if node.op_type == "MatMul" and "layers.0.self_attn" in node.name
    ]
    assert not any("q_proj+" in name for name in names)
    assert any("k_proj+v_proj" in name for name in names)
    assert plan.sites["model.layers.0.self_attn.q_proj"].at == 0
