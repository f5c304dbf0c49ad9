"""Folds into ONNX graphs: the same bytes as in the merged checkpoint, whoever made the graph; every refusal
by its name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from families import FAMILIES
from notebooks import page_in_notebook
from onnx import TensorProto, helper, numpy_helper  # noqa: TID251 - graphs as other tools write them

import adapterpack
from adapterpack import LoRA
from adapterpack.adapter_methods import Site, get, methods
from adapterpack.base.checkpoint import Checkpoint
from adapterpack.bundle.manifest import read_bundle
from adapterpack.errors import (
    BaseMismatch,
    ConfigError,
    FormatError,
    NonFinite,
    OutputExists,
    SiteNotFound,
    Unsupported,
)
from adapterpack.exporting.frontends import FRONTENDS, ExportSource
from adapterpack.io import safetensors as st
from adapterpack.manifest import manifest as m
from adapterpack.onnx_graph.graph_file import GraphFile
from adapterpack.onnx_graph.match import match
from adapterpack.onnx_graph.nbits import dequantize, grid_of, quantized_nodes
from adapterpack.pack.pack import Pack, build
from adapterpack.tasks.task import get_task
from adapterpack.testing import cases
from adapterpack.torch_adapters.models.load import load_model

Make = Callable[..., Any]
RNG = np.random.default_rng(5)


def held(path: Path) -> dict[str, np.ndarray]:
    model = onnx.load(path)
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def require_bit_equal(report: Any, out: Path, merged: Path) -> None:
    """Every changed tensor of the merged checkpoint lies in the graph, as it is or transposed, bit by bit."""
    found, base = held(out / report.graph), Checkpoint(merged)
    for tensor in report.tensors:
        wanted, name = base.read(tensor.loss.tensor), tensor.initializers[0]
        assert any(np.array_equal(wanted, one) for one in (found[name], found[name].T)), tensor


# --- graphs of exporters ------------------------------------------------------------------------------------


def torch_export(base: Path, out: Path) -> None:
    model = load_model(get_task("feature-extraction"), base).eval()
    ids = torch.ones((2, 7), dtype=torch.int64)
    shapes = {
        name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        for name in ("input_ids", "attention_mask")
    }
    program = torch.onnx.export(
        model,
        (),
        kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        dynamo=True,
        dynamic_shapes=shapes,
        verbose=False,
    )
    program.save(out)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("exporter", ["torch", "transformers", "mobius"])
def test_exported_graphs(exporter: str, base_of: Make, pack_of: Make, tmp_path: Path) -> None:
    """Bytes as in the merged checkpoint; ONNX Runtime within 1e-5 of the largest output from torch on that
    checkpoint.
    """
    kind = "llama" if exporter == "mobius" else "bert"
    base, pack, graph = base_of(kind), pack_of(kind, "gamma"), tmp_path / "g" / "model.onnx"
    (graph.parent / "weights").mkdir(parents=True)
    if exporter == "torch":
        torch_export(base, graph)
    else:
        frontend, task = (
            ("mobius", "text-generation") if exporter == "mobius" else ("transformers", "feature-extraction")
        )
        model = FRONTENDS[frontend].build(ExportSource(base, get_task(task))).model
        ir.save(model, graph, external_data="weights/model.data" if exporter == "mobius" else None)
    report = adapterpack.merge(graph, [pack], tmp_path / "out", checkpoint=base)
    adapterpack.merge(base, [pack], tmp_path / "merged")
    assert set(report.checks.values()) == {"passed"}
    assert report.losses[0].tensor in page_in_notebook(report)
    require_bit_equal(report, tmp_path / "out", tmp_path / "merged")
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(1).integers(4, 90, (3, 6))
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.tile(np.arange(6), (3, 1)),
    }
    feeds |= {
        value.name: np.zeros((3, 2, 0, 8), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    ours = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})[0]
    model = load_model(
        get_task("text-generation" if kind == "llama" else "feature-extraction"), tmp_path / "merged"
    ).eval()
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(ids), attention_mask=torch.ones((3, 6), dtype=torch.int64))[
            0
        ].numpy()
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "targets", "kinds"),
    [
        ("vit", ("patch_embeddings.projection",), {"conv"}),
        ("convnext", ("patch_embeddings", "dwconv"), {"conv", "grouped_conv"}),
        ("llama", ("embed_tokens", "q_proj"), {"embedding", "linear"}),
    ],
)
def test_convolutions_and_tables_of_exported_graphs(
    name: str, targets: tuple[str, ...], kinds: set[str], tmp_path: Path
) -> None:
    """Conv and Gather as torch.onnx writes them: bytes as in the merged checkpoint, outputs as torch's
    adapted model (1e-5).
    """
    family, base = FAMILIES[name], tmp_path / "base"
    model = family.build()
    model.save_pretrained(base)
    adapted = adapterpack.adapt(copy.deepcopy(model), LoRA(r=2, alpha=3, targets=targets), "one").eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    pack = adapterpack.save(adapted, tmp_path / "pack", base=base)
    assert {group.kind for group in pack.manifest.groups} == kinds
    model.config.use_cache = False
    (tmp_path / "g").mkdir()
    torch.onnx.export(model, (), kwargs=family.inputs(), dynamo=True, verbose=False).save(
        tmp_path / "g" / "model.onnx"
    )
    report = adapterpack.merge(tmp_path / "g" / "model.onnx", [pack], tmp_path / "out", checkpoint=base)
    adapterpack.merge(base, [pack], tmp_path / "merged", durable=False)
    require_bit_equal(report, tmp_path / "out", tmp_path / "merged")
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {
        value.name: tensor.numpy()
        for value, tensor in zip(session.get_inputs(), family.inputs().values(), strict=True)
    }
    with torch.no_grad():
        theirs = adapted(**family.inputs())[0].numpy()
    assert np.abs(session.run(None, feeds)[0] - theirs).max() <= 1e-5 * np.abs(theirs).max()


# --- bundles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("llama", "bank"),
        ("bert", "bank"),
        *(pytest.param("llama", mode, marks=pytest.mark.long) for mode in ("inputs", "folded")),
    ],
)
def test_bundles(kind: str, mode: str, base_of: Make, pack_of: Make, bundle_of: Make, tmp_path: Path) -> None:
    """A bundle with slots becomes the folded one of its base and the pack: every weight as in the merged
    checkpoint.
    """
    report = adapterpack.merge(bundle_of(kind, mode), [pack_of(kind, "gamma")], tmp_path / "out")
    bundle = read_bundle(tmp_path / "out")
    assert bundle.mode == "folded"
    assert [one.name for one in bundle.adapters] == (["alpha", "gamma"] if mode == "folded" else ["gamma"])
    assert set(report.left_out) == (set() if mode == "folded" else {"alpha", "beta"})
    assert not [one for one in adapterpack.validate(tmp_path / "out").findings if one.severity == "error"]
    names = ("alpha", "gamma") if mode == "folded" else ("gamma",)
    adapterpack.merge(base_of(kind), [pack_of(kind, name) for name in names], tmp_path / "merged")
    found, merged = held(tmp_path / "out" / "model.onnx"), Checkpoint(tmp_path / "merged")
    groups = {group.path: group for group in adapterpack.load(pack_of(kind, "gamma")).manifest.groups}
    for path, group in groups.items():
        wanted, site = merged.read(merged.require_weight(path, group.weight)), bundle.sites[path]
        one = (found[site.weight] if site.layout == "out_in" else found[site.weight].T)[
            site.at : site.at + site.out_features
        ]
        # Two adapters in one sum are rounded once, one after the other twice.
        np.testing.assert_allclose(one, wanted, rtol=0, atol=2e-6 if mode == "folded" else 0)
    session = adapterpack.Session(tmp_path / "out")
    assert not any(
        "adapterpack/" in node.name for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node
    )
    session.run({"input_ids": np.ones((2, 3), np.int64), "attention_mask": np.ones((2, 3), np.int64)})


# --- hand-made graphs: every layout -------------------------------------------------------------------------


def base_at(folder: Path, values: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    st.write(folder / "model.safetensors", values, {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "none", "tie_word_embeddings": false}')
    return folder


def lora(base: Path, shapes: dict[str, tuple[int, int]], kind: str = "linear", size: float = 0.3) -> Pack:
    checkpoint = Checkpoint(base)
    adapters = {
        Site(path, columns, rows, kind): (
            LoRA(r=2, alpha=3),
            {
                "lora_A": RNG.normal(0, size, (2, columns)).astype(np.float32),
                "lora_B": RNG.normal(0, size, (rows, 2)).astype(np.float32),
            },
        )
        for path, (rows, columns) in shapes.items()
    }
    return build(
        "p",
        get("lora"),
        adapters,
        task=m.PackTask("feature-extraction"),
        base=m.Base("base", structure=checkpoint.structure, content=checkpoint.content),
    )


def graph_of(path: Path, initializers: dict[str, np.ndarray], external: str | None = None) -> Path:
    """A graph whose outputs are its initializers' sums: what reads them does not matter to a fold."""
    tensors = [numpy_helper.from_array(value, name) for name, value in initializers.items()]
    nodes = [
        helper.make_node("Identity", [name], [f"{name}:0"], name=f"read_{name}") for name in initializers
    ]
    outputs = [
        helper.make_tensor_value_info(f"{name}:0", tensor.data_type, tensor.dims)
        for name, tensor in zip(initializers, tensors, strict=True)
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [], outputs, tensors),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    path.parent.mkdir(exist_ok=True)
    onnx.save(model, path, save_as_external_data=external is not None, location=external, size_threshold=0)
    return path


def linear_values() -> dict[str, np.ndarray]:
    return {
        name: RNG.normal(size=shape).astype(np.float32)
        for name, shape in {
            "q.weight": (9, 14),
            "k.weight": (5, 14),
            "qkv.weight": (12, 14),
            "wide.weight": (6, 14),
        }.items()
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("external", [None, "model.data"])
def test_layouts(dtype: Any, external: str | None, tmp_path: Path) -> None:
    """Packed along either axis, cut along either axis, transposed, cast: each number is the merged one,
    rounded once.
    """
    values = linear_values()
    base = base_at(tmp_path / "base", values)

    def lay(v: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        q, k, qkv, wide = (v[f"{name}.weight"] for name in ("q", "k", "qkv", "wide"))
        every = {
            "packed": np.concatenate([other, q, k]),
            "across": np.concatenate([k.T, q.T], axis=1),
            "a": qkv[:5],
            "b": qkv[5:].T,
            "left": wide[:, :6],
            "right": wide[:, 6:].T,
        }
        return {name: np.ascontiguousarray(value.astype(dtype)) for name, value in every.items()}

    other = RNG.normal(size=(4, 14)).astype(np.float32)
    graph = graph_of(tmp_path / "g" / "model.onnx", lay(values), external)
    pack = lora(base, {name.removesuffix(".weight"): value.shape for name, value in values.items()})
    adapterpack.merge(graph, [pack], tmp_path / "out", checkpoint=base)
    adapterpack.merge(base, [pack], tmp_path / "merged")
    merged = {name: np.array(Checkpoint(tmp_path / "merged").read(name)) for name in values}
    for name, value in lay(merged).items():
        assert np.array_equal(held(tmp_path / "out" / "model.onnx")[name], value), name


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("conv", (6, 3, 2, 2)),
        ("embedding", (11, 8)),
        ("transposed", (7, 9)),
        ("norm", (13,)),
        ("experts", (3, 6, 8)),
        ("turned_experts", (3, 6, 8)),
        ("table", (11, 8)),
    ],
)
def test_kinds(kind: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Every kind of layer whose weight lies in the graph as it is stored, for a method of each kind."""
    path = "m" if kind not in {"experts", "turned_experts"} else "m.weight"
    values = {
        "m.weight": RNG.normal(size=shape).astype(np.float32),
        "other.weight": RNG.normal(size=(4, 4)).astype(np.float32),
    }
    base = base_at(tmp_path / "base", values)
    report = match(
        GraphFile(graph_of(tmp_path / "g" / "model.onnx", values)), Checkpoint(base), {"m.weight": kind}
    )
    assert report["m.weight"].initializers == ["m.weight"], path
    assert sum(len(pieces) >= 1 for pieces in report["m.weight"].pieces) == (3 if "experts" in kind else 1)


FOLDABLE = [
    method
    for method in methods().values()
    if method.kind == "weight" and not method.is_positional and not method.reason_against("fold")
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("method", FOLDABLE, ids=lambda method: method.name)
def test_every_method(method: Any, tmp_path: Path) -> None:
    """Each foldable method, weight and bias, into a transposed initializer: the bytes of the merged
    checkpoint.
    """
    from adapterpack.testing import build_pack

    case = max(cases(method), key=lambda case: (case.bias is not None, min(case.weight.shape)))
    pack = build_pack(case)
    group = next(group for group in pack.manifest.groups if group.role == "adapter")
    name = group.path if group.kind in {"parameter", "experts", "turned_experts"} else f"{group.path}.weight"
    stored = (
        case.weight.astype(np.float32).reshape(-1) if group.kind == "norm" else case.weight.astype(np.float32)
    )
    values = {name: stored.T.copy() if group.kind in {"embedding", "transposed"} else stored}
    if case.bias is not None and group.kind in {"linear", "norm"}:
        values[f"{group.path}.bias"] = case.bias.astype(np.float32)
    base = base_at(tmp_path / "base", values)
    laid = {"w": values[name].T.copy()}
    if len(values) > 1:
        laid["b"] = values[f"{group.path}.bias"]
    graph = graph_of(tmp_path / "g" / "model.onnx", laid)
    adapterpack.merge(graph, [pack], tmp_path / "out", checkpoint=base, allow_structural=True)
    adapterpack.merge(base, [pack], tmp_path / "merged", allow_structural=True)
    merged, found = Checkpoint(tmp_path / "merged"), held(tmp_path / "out" / "model.onnx")
    assert np.array_equal(found["w"].T, merged.read(name))
    if "b" in found:
        assert np.array_equal(found["b"], merged.read(f"{group.path}.bias"))


# --- quantized ----------------------------------------------------------------------------------------------


def test_scales_for_another_number_of_blocks_are_refused(tmp_path: Path) -> None:
    """A graph whose scales are one a row where there are two blocks would spread each over both."""
    weight, scales = np.zeros((4, 2, 8), np.uint8), np.ones(4, np.float32)
    tensors = [numpy_helper.from_array(value, name) for name, value in (("w", weight), ("s", scales))]
    fields = {"K": 32, "N": 4, "bits": 4, "block_size": 16}
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], "product", domain="com.microsoft", **fields
    )
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])
        for name, width in (("x", 32), ("y", 4))
    )
    graph = helper.make_graph([node], "graph", [x], [y], tensors)
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    opened = GraphFile(tmp_path / "model.onnx")
    [quantized] = quantized_nodes(opened)
    with pytest.raises(ValueError, match="reshape"):
        grid_of(opened, quantized, slice(0, 4))


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (8, False)])
def test_matmul_nbits(bits: int, symmetric: bool, tmp_path: Path) -> None:
    """Found by nearest, folded from the float weight and rounded again: as near to it as the base was."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    values = {
        "q.weight": RNG.normal(size=(20, 70)).astype(np.float32),
        "k.weight": RNG.normal(size=(12, 70)).astype(np.float32),
    }
    base = base_at(tmp_path / "base", values)
    packed = np.concatenate([values["q.weight"], values["k.weight"]]).T.copy()
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="qk")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 70])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
        [numpy_helper.from_array(packed, "w")],
    )
    quantizer = MatMulNBitsQuantizer(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        bits=bits,
        block_size=32,
        is_symmetric=symmetric,
        accuracy_level=0,
    )
    quantizer.process()
    source = tmp_path / "model.onnx"
    onnx.save(quantizer.model.model, source)
    pack = lora(base, {"q": (20, 70), "k": (12, 70)})
    report = adapterpack.merge(source, [pack], tmp_path / "out", checkpoint=base)
    adapterpack.merge(base, [pack], tmp_path / "merged")
    after = GraphFile(tmp_path / "out" / "model.onnx")
    (one,) = quantized_nodes(after)
    wanted = np.concatenate([Checkpoint(tmp_path / "merged").read(name) for name in ("q.weight", "k.weight")])
    error = np.linalg.norm(dequantize(after, one, slice(0, 32)) - wanted) / np.linalg.norm(wanted)
    (before, now), x = report.quantized, RNG.normal(size=(3, 70)).astype(np.float32)
    assert error <= 1.1 * max(before, now)
    assert now <= 1.3 * before
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(
        session.run(None, {"x": x})[0], x @ dequantize(after, one, slice(0, 32)).T, atol=1e-4
    )


# --- refusals -----------------------------------------------------------------------------------------------


def test_refusals(tmp_path: Path) -> None:
    """Each by its name, and nothing is left behind."""
    values = linear_values()
    base = base_at(tmp_path / "base", values)
    graph = graph_of(tmp_path / "g" / "model.onnx", values)
    pack, big = lora(base, {"q": (9, 14)}), lora(base, {"q": (9, 14)}, size=1e30)
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="--base"):
        adapterpack.merge(graph, [pack], out)
    with pytest.raises(ConfigError, match="dtype"):
        adapterpack.merge(graph, [pack], out, checkpoint=base, dtype="float16")
    with pytest.raises(OutputExists):
        adapterpack.merge(graph, [pack], base, checkpoint=base)
    with pytest.raises(BaseMismatch):
        adapterpack.merge(graph, [pack], out, checkpoint=base_at(tmp_path / "x", linear_values()))
    with pytest.raises(SiteNotFound, match=r"q\.weight"):
        adapterpack.merge(
            graph_of(tmp_path / "h" / "model.onnx", linear_values()), [pack], out, checkpoint=base
        )
    partial = {**values, "q.weight": values["q.weight"][:7]}
    with pytest.raises(SiteNotFound, match="not whole"):
        adapterpack.merge(graph_of(tmp_path / "i" / "model.onnx", partial), [pack], out, checkpoint=base)
    with pytest.raises(NonFinite):
        adapterpack.merge(graph, [big], out, checkpoint=base, safe=True)
    twins = base_at(tmp_path / "twins", {"a.weight": values["q.weight"], "b.weight": values["q.weight"]})
    one = graph_of(tmp_path / "j" / "model.onnx", {"w": values["q.weight"]})
    with pytest.raises(Unsupported, match="does not tell"):
        adapterpack.merge(one, [lora(twins, {"a": (9, 14)})], out, checkpoint=twins)
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a\\..\\b", "model.onnx", "link", ""])
def test_external_data_stays_in_the_folder(location: str, tmp_path: Path) -> None:
    """A place outside the model's folder, by whatever way, is refused before a byte of it is read."""
    (tmp_path / "secret").write_bytes(bytes(4096))
    path = graph_of(tmp_path / "g" / "model.onnx", {"w": np.zeros((4, 4), np.float32)}, "model.data")
    (path.parent / "link").symlink_to(tmp_path / "secret")
    model = onnx.load(path, load_external_data=False)
    next(
        entry for entry in model.graph.initializer[0].external_data if entry.key == "location"
    ).value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(FormatError, match="own folder"):
        GraphFile(path)


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_cut_graph_is_refused(cut: int, tmp_path: Path) -> None:
    """A truncated file, or truncated data, is a named error."""
    path = graph_of(tmp_path / "g" / "model.onnx", {"w": np.zeros((20, 20), np.float32)})
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(FormatError):
        GraphFile(path)
