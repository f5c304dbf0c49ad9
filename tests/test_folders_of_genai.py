"""Folders whose graph has the operators of onnxruntime-genai's builder: attention is fused, and counts the tokens of
a row by the mask. ``interop/olive_folder.py`` runs folders that the builder and Olive made.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from shipped_schemas import fits

import adapterpack
from adapterpack import Engine, LoRA, Session
from adapterpack.adapter_methods import Site, method_of
from adapterpack.cli.commands.inspect import command as inspect
from adapterpack.engine_graph.genai_engine import served_folder
from adapterpack.errors import AdapterpackError, Unsupported
from adapterpack.manifest import structs as m
from adapterpack.pack.pack import Pack, build

WORDS, HEADS, WIDTH, HIDDEN = 40, 2, 16, 32
PAST = "past_key_values.0."
SITE = "model.layers.0.attn.q_proj"
CONFIG = {
    "model": {
        "type": "llama",
        "vocab_size": WORDS,
        "context_length": 64,
        "decoder": {"filename": "model.onnx", "head_size": WIDTH, "num_key_value_heads": HEADS},
    }
}


def write_folder(folder: Path, *, turned: bool = False, masks_logits: bool = False) -> Path:
    """A decoder of one layer, as the builder writes it, with a slot at the queries, which is listed twice, as
    Olive does. A ``turned`` slot is transposed by the graph; with ``masks_logits`` the length of the mask
    moves the logits.
    """
    rng, nodes = np.random.default_rng(5), list[ir.Node]()
    weights = {
        "embed": (WORDS, HIDDEN),
        **dict.fromkeys("qkvo", (HIDDEN, HIDDEN)),
        "head": (HIDDEN, WORDS),
    }
    values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in weights.items()}
    angles = np.arange(64)[:, None] / 50 ** (np.arange(WIDTH // 2) / WIDTH * 2)
    values |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    values |= {"one": np.array([1]), "place": np.array(1)}
    slots: dict[str, list[int | str]] = {
        f"{SITE}.lora_A.MatMul.weight": [HIDDEN, "r"],
        f"{SITE}.lora_B.MatMul.weight": ["r", HIDDEN],
    }
    slots = {name: shape[::-1] if turned else shape for name, shape in slots.items()}
    for name, shape in slots.items():
        values[name] = np.zeros([0 if extent == "r" else HIDDEN for extent in shape], np.float32)
    known = {name: ir.val(name, const_value=ir.tensor(value, name=name)) for name, value in values.items()}
    for name, shape in slots.items():
        known[name].shape, known[name].type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
    cache = ["batch", HEADS, "past", "width"]
    inputs = {
        "input_ids": ir.val("input_ids", ir.DataType.INT64, ["batch", "sequence"]),
        "attention_mask": ir.val("attention_mask", ir.DataType.INT64, ["batch", "total"]),
        **{f"{PAST}{side}": ir.val(f"{PAST}{side}", ir.DataType.FLOAT, cache) for side in ("key", "value")},
    }
    known |= inputs

    def node(op: str, given: str, made: str, domain: str = "", **attributes: object) -> str:
        names = made.split()
        one = ir.node(
            op, [known[name] for name in given.split()], attributes, domain=domain, num_outputs=len(names)
        )
        for name, value in zip(names, one.outputs, strict=True):
            value.name = name
            known[name] = value
        nodes.append(one)
        return made

    node("ReduceSum", "attention_mask one", "sum")
    node("Sub", "sum one", "last")
    node("Cast", "last", "lengths", to=ir.DataType.INT32)
    node("Shape", "attention_mask", "extents")
    node("Gather", "extents place", "longest")
    node("Cast", "longest", "total", to=ir.DataType.INT32)
    node("Gather", "embed input_ids", "x")
    factors = [node("Transpose", name, f"{name}_t", perm=[1, 0]) if turned else name for name in slots]
    node("MatMul", f"x {factors[0]}", "reduced")
    node("MatMul", f"reduced {factors[1]}", "change")
    for side in "qkv":
        node("MatMul", f"x {side}", f"{side}_out")
    node("Add", "q_out change", "queries")
    node(
        "GroupQueryAttention",
        f"queries k_out v_out {PAST}key {PAST}value lengths total cos sin",
        "attended present.0.key present.0.value",
        "com.microsoft",
        num_heads=HEADS,
        kv_num_heads=HEADS,
        do_rotary=1,
    )
    node("MatMul", "attended o", "o_out")
    node("Add", "x o_out", "y")
    node("MatMul", "y head", "all" if masks_logits else "logits")
    if masks_logits:
        node("Cast", "longest", "many", to=ir.DataType.FLOAT)
        node("Mul", "all many", "logits")
    outputs = {
        "logits": ["batch", "sequence", WORDS],
        **dict.fromkeys(("present.0.key", "present.0.value"), cache),
    }
    for name, extents in outputs.items():
        known[name].shape, known[name].type = ir.Shape(extents), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [*inputs.values(), *(known[name] for name in slots)],
        [known[name] for name in outputs],
        nodes=nodes,
        initializers=[known[name] for name in values],
        opset_imports={"": 21, "com.microsoft": 1},
        name="decoder",
    )
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    proto.graph.input.extend([value for value in proto.graph.input if value.name in slots])
    folder.mkdir()
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    (folder / "genai_config.json").write_text(json.dumps(CONFIG))
    return folder


def adapter(name: str, rank: int) -> Pack:
    """A LoRA under the name that transformers gives the module."""
    rng, cfg = np.random.default_rng(rank), LoRA(r=rank, alpha=2 * rank)
    shapes = {"lora_A": (rank, HIDDEN), "lora_B": (HIDDEN, rank)}
    factors = {leaf: rng.normal(size=shape).astype(np.float32) for leaf, shape in shapes.items()}
    site = Site("model.layers.0.self_attn.q_proj", HIDDEN, HIDDEN)
    return build(
        name, method_of(cfg), {site: (cfg, factors)}, task=m.PackTask("text-generation"), base=m.Base()
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundles of folders are written there."""
    monkeypatch.setenv("ADAPTERPACK_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("turned", [False, True])
def test_a_fused_graph_is_served(tmp_path: Path, turned: bool) -> None:
    """The engine's batch of the base and two adapters of different ranks gives the tokens that the folder's own
    graph gives row by row; the engine's bundle is made once.
    """
    folder, packs = write_folder(tmp_path / "made", turned=turned), [adapter("one", 2), adapter("two", 5)]
    session, engine = Session(folder, "cpu"), Engine(served_folder(folder), "cpu")
    prompts = [[1, 5, 6, 7, 8, 9], [1, 10, 11]]
    expected, found = dict[int, tuple[int, ...]](), dict[int, tuple[int, ...]]()
    for pack in packs:
        session.load(pack)
        engine.adapters.load(pack)
    for prompt in prompts:
        for name in (None, "one", "two"):
            (answer,) = session.generate([prompt], name, max_new_tokens=8)
            expected[engine.add(prompt, name, max_new_tokens=8)] = tuple(answer.ids)
    while engine.busy:
        for event in engine.step():
            assert event.token is not None
            found[event.request] = (*found.get(event.request, ()), event.token)
    assert found == expected and len({*expected.values()}) == len(expected)
    assert served_folder(folder) == engine.bundle.folder != session.folder


def test_a_graph_that_counts_more_by_its_mask_is_not_served(tmp_path: Path) -> None:
    """The refusal names the folder that the user knows and what to do, and nothing of the cache; the folder is still
    run.
    """
    folder = write_folder(tmp_path / "made", masks_logits=True)
    with pytest.raises(Unsupported, match="reads the mask") as refused:
        served_folder(folder)
    assert str(folder) in str(refused.value) and "cache" not in str(refused.value)
    assert "adapterpack export BASE" in (refused.value.remedy or "")
    assert Session(folder, "cpu").generate([[1, 5, 6]], max_new_tokens=2)[0].ids


def test_an_adapter_of_other_modules_is_refused_by_their_names(tmp_path: Path) -> None:
    """The graph's modules are named beside the adapter's."""
    folder = write_folder(tmp_path / "made")
    cfg, site = LoRA(r=1), Site("model.layers.0.mlp.up_proj", HIDDEN, HIDDEN)
    factors = {"lora_A": np.ones((1, HIDDEN), np.float32), "lora_B": np.ones((HIDDEN, 1), np.float32)}
    pack = build(
        "other", method_of(cfg), {site: (cfg, factors)}, task=m.PackTask("text-generation"), base=m.Base()
    )
    engine = Engine(served_folder(folder), "cpu")
    with pytest.raises(Unsupported, match=r"model.layers.0.attn.q_proj, found .*up_proj") as refused:
        engine.adapters.load(pack)
    assert str(folder) in str(refused.value)


def test_inspect_and_validate_know_such_a_folder(tmp_path: Path) -> None:
    """What it is and which modules take an adapter, without a bundle in the cache; a graph with another input, or
    whose adapter is quantized with it, is a finding, and a folder with a checkpoint is a base.
    """
    folder = write_folder(tmp_path / "made")
    told = CliRunner().invoke(inspect, [str(folder), "--json"])
    assert told.exit_code == 0, told.output
    assert fits(summary := json.loads(told.output), "report.v1") and summary["kind"] == "genai_folder"
    assert (found := adapterpack.inspect(folder))["sites_by_module"] == {"q_proj": 1}
    assert (found["model_type"], found["context_length"], found["refused"]) == ("llama", 64, None)
    assert adapterpack.validate(folder).valid and not (tmp_path / "cache").exists()
    assert adapterpack.validate(folder, full=True).state == "not fully checked"
    graph = onnx.load(folder / "model.onnx")
    for name in ("speaker", f"{SITE}.lora_A.MatMul.weight_Q4"):
        other = onnx.ModelProto.FromString(graph.SerializeToString())
        other.graph.input.add(name=name)
        (folder / "model.onnx").write_bytes(other.SerializeToString())
        report = adapterpack.validate(folder)
        assert not report.valid and name in report.findings[0].message
        assert name in adapterpack.inspect(folder)["refused"]
    (folder / "model.onnx").write_bytes(b"no graph")
    assert not adapterpack.validate(folder).valid
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterpackError, match=r"config.json|safetensors"):
        adapterpack.inspect(folder)
