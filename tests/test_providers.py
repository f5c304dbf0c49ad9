"""Execution providers: names and settings, the table of CUDA's kernels, where nodes run, and what a session
and an engine do on a device.

Where there is no card, ONNX Runtime's own CUDA provider runs on the hollow CUDA of ``tests/hollow``, in a
process of its own: everything of it is real but what kernels compute.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from architecture_proofs import make_base, make_pack
from architectures import ARCHITECTURES, KINDS
from hollow import cuda

from adapterpack import Session, export, validate
from adapterpack.errors import ConfigError, ProviderError
from adapterpack.runtime import canary
from adapterpack.runtime.engine import kv_pool
from adapterpack.runtime.engine.engine import Engine
from adapterpack.runtime.engine.kv_pool import DeviceBuffer, HostBuffer
from adapterpack.runtime.generation.sampling import Sampling
from adapterpack.runtime.ort.values import BFLOAT16
from adapterpack.runtime.providers import builtin
from adapterpack.runtime.providers.device import Device
from adapterpack.runtime.providers.kernels import kernels_of, nodes_without_kernel
from adapterpack.runtime.providers.provider import CPU, PROVIDERS
from adapterpack.runtime.providers.resolved_device import ResolvedDevice, resolve
from adapterpack.slots.precision import PRECISIONS

Make = Callable[..., Any]
BY_NAME = {one.name: one for one in ARCHITECTURES}
on_hollow = pytest.mark.skipif(
    not cuda.provider_libraries() or not all(map(shutil.which, cuda.TOOLS)),
    reason="this build of ONNX Runtime has no CUDA provider, or there is no compiler",
)


@pytest.fixture(scope="session")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Runs a script with a JSON argument on the hollow CUDA; the JSON of the last line that it prints."""
    folder = cuda.build(tmp_path_factory.mktemp("hollow"))

    def run(script: str, *given: Any) -> Any:
        command = [sys.executable, "-c", script, json.dumps(given)]
        done = subprocess.run(
            command, env=cuda.environment(folder), capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    run.folder = folder  # type: ignore[attr-defined]
    return run


# Names and settings.


@pytest.mark.fast
def test_a_provider_that_is_not_here_is_named_with_its_wheel() -> None:
    with pytest.raises(ProviderError, match=r"'tpu'.*coreml, cpu, cuda, dml"):
        resolve(Device(provider="tpu"))
    for name in set(PROVIDERS) - {"cpu"}:
        if PROVIDERS[name].runtime_name not in ort.get_available_providers():
            with pytest.raises(
                ProviderError, match="no CUDA device" if name in ("cuda", "tensorrt") else "it comes with"
            ):
                resolve(Device(provider=name))


@pytest.mark.fast
@pytest.mark.parametrize(
    "settings",
    [{"memory_limit": 1 << 30}, {"tf32": True}, {"capture": True}, {"arena": "exact"}, {"device_id": 1}],
)
def test_a_setting_that_the_provider_does_not_have_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="the provider cpu has no setting"):
        resolve(Device(provider="cpu", **settings))
    for name in ("memory_limit", "threads"):
        with pytest.raises(ConfigError, match=f"{name} is a number from 1 on"):
            Device(**{name: 0})


@pytest.mark.fast
def test_threads_and_spinning_reach_the_session_options() -> None:
    options = resolve(Device(provider="cpu", threads=3, spinning=False)).session_options()
    assert (
        options.intra_op_num_threads,
        options.get_session_config_entry("session.intra_op.allow_spinning"),
    ) == (3, "0")
    assert Device.of("cpu", 2) == Device(provider="cpu", threads=2)
    assert Device.of(Device(provider="cpu", threads=4)).threads == 4


# Plugins.


@pytest.mark.fast
def test_a_session_opens_on_the_hardware_of_a_plugin() -> None:
    """ONNX Runtime offers its own CPU as hardware, too, so that this way of opening runs everywhere."""
    [cpu, *_] = [one for one in ort.get_ep_devices() if one.ep_name == CPU]
    device = ResolvedDevice(Device(provider="cpu"), PROVIDERS["cpu"], ((CPU, {}),), cpu)
    graph = '<ir_version: 10, opset_import: ["" : 21]> g (float[3] x) => (float[3] y) { y = Add(x, x) }'
    session = device.open(onnx.parser.parse_model(graph).SerializeToString(), device.session_options())
    assert device.require(session) == CPU
    x = np.arange(3, dtype=np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x + x)


OPEN = """
import sys
from adapterpack import Session
from adapterpack.runtime.providers.device import Device

bundle, name = sys.argv[1:]
Session(bundle, Device(provider=name, allow_cpu_nodes=True))
"""


@pytest.mark.parametrize("name", ["openvino", "webgpu"])
def test_a_plugin_runs_a_bundle_where_it_finds_hardware(name: str, half: Path, tmp_path: Path) -> None:
    plugin, wheels = str(PROVIDERS[name].plugin), tmp_path / "wheels"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", str(wheels), plugin.replace("_", "-")], check=True)
    environment = {**os.environ, "PYTHONPATH": str(wheels)}

    def said(*command: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, *command]
        return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300, check=False)

    checks = json.loads(said("-m", "adapterpack", "doctor", "--json").stdout)["checks"]
    [providers] = [one["facts"]["providers"] for one in checks if "providers" in one["facts"]]
    [state] = [row["state"] for row in providers if row["name"] == name]
    ran = said("-c", OPEN, str(half), name)
    if state == "starts":
        assert ran.returncode == 0, ran.stderr
    else:
        assert "finds no such device here" in state
        assert "ProviderError: the provider's plugin finds no such device here" in ran.stderr


# The table of kernels.


@on_hollow
def test_the_table_is_what_the_installed_build_implements(hollow: Make, tmp_path: Path) -> None:
    """Where the installed ONNX Runtime is the table's, the script writes the same file from its registry;
    else it still writes one.
    """
    table = kernels_of("cuda")
    assert table is not None
    script = Path(__file__).parent.parent / "benchmarks" / "cuda_kernels.py"
    run = (
        "import json, runpy, sys; script, *sys.argv[1:] = json.loads(sys.argv[1]); runpy.run_path(script, "
        "run_name='__main__'); print(0)"
    )
    hollow(run, str(script), str(tmp_path / "table.json"))
    again = json.loads((tmp_path / "table.json").read_text("utf-8"))
    assert again["onnxruntime"] == ort.__version__
    assert len(again["kernels"]) > 200
    if table.onnxruntime == ort.__version__:
        shipped = Path(builtin.__file__).parent / "cuda_kernels.json"
        assert (tmp_path / "table.json").read_bytes() == shipped.read_bytes()


def graph_with(operator: str, kind: Any, version: int = 21) -> Any:
    """A model of a product and, on it, one node of that operator and type."""
    values = [ir.Value(name=name, shape=ir.Shape([4, 4]), type=ir.TensorType(kind)) for name in ("x", "y")]
    nodes = [ir.node("MatMul", values, name="product")]
    nodes.append(ir.node(operator, nodes[0].outputs, name="planted"))
    for node in nodes:
        node.outputs[0].name, node.outputs[0].type = f"{node.name}:0", ir.TensorType(kind)
    graph = ir.Graph(values, nodes[1].outputs, nodes=nodes, opset_imports={"": version}, name="planted")
    return ir.to_proto(ir.Model(graph, ir_version=10))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("operator", "kind", "reason"),
    [
        ("Erf", ir.DataType.FLOAT, None),
        ("Erf", ir.DataType.FLOAT16, None),
        ("Det", ir.DataType.FLOAT, "Det has no kernel"),
        ("Acos", ir.DataType.FLOAT, "Acos has no kernel"),
        ("Erf", ir.DataType.INT8, "Erf has no kernel for int8 as T, only for bfloat16, "),
    ],
)
def test_a_planted_node_without_a_kernel_is_named(operator: str, kind: Any, reason: str | None) -> None:
    """Types are followed through the graph, also where nothing says them."""
    model, table = graph_with(operator, kind), kernels_of("cuda")
    del model.graph.value_info[:]
    found = {node.name: why for node, why in nodes_without_kernel(model, table)}
    found.pop("product", None)  # of int8 there is none, either
    assert (found.get("planted") or "").startswith(reason or "") and bool(found) == (reason is not None)


PLACED = """
import json, sys
from pathlib import Path
import onnxruntime as ort
from adapterpack.runtime.providers.device import Device
from adapterpack.runtime.providers.placement import nodes_by_provider, nodes_on_cpu
from adapterpack.runtime.providers.resolved_device import resolve
from adapterpack.slots.precision import PRECISIONS
started, found = resolve(Device(provider="cuda")), {}
for name in json.loads(sys.argv[1]):
    session = ort.InferenceSession(name, started.session_options(), providers=list(started.providers), enable_fallback=0)
    placed = nodes_by_provider(session)
    found[name] = {"unfit": sorted(node.name for node, _ in nodes_on_cpu(session, started, Path(name))),
                   **{key: len(nodes) for key, nodes in placed.items()}}
print(json.dumps(found))
"""
FAMILIES = ("llama", "vit", "bert", "gpt2", "whisper")
FORMS = ("float32", "float16", "bfloat16", "int8", "int4")
PLACED_GRAPHS = [
    (family, form)
    for number, family in enumerate(FAMILIES)
    for place, form in enumerate(FORMS)
    if family == "llama" or form == "float32" or (number + place) % 2
]
"""Of one family every form, of every family float32 and each second of the others, so that every form is
there of three families.
"""


def exported(family: str, form: str, folder: Path) -> Path:
    """A bundle of a tiny model with a LoRA, for the engine where the family has its graph."""
    architecture = BY_NAME[family]
    base = make_base(architecture, folder / "base")
    pack = make_pack(architecture, base, next(kind for kind in KINDS if kind.name == "low-rank"))
    scheme = {"quantize": form} if form.startswith("int") else {"dtype": form}
    export(
        base,
        [pack],
        folder / "bundle",
        task=architecture.task,
        in_place=family in ("llama", "gpt2"),
        **scheme,
    )
    return folder / "bundle"


@on_hollow
@pytest.mark.sampled(13)
@pytest.mark.parametrize(("family", "form"), PLACED_GRAPHS)
def test_the_table_says_where_onnx_runtime_puts_every_node(
    family: str, form: str, hollow: Make, tmp_path: Path
) -> None:
    """Of every graph of a bundle: what the table names is what ONNX Runtime itself leaves to the CPU, beside
    shapes.
    """
    bundle, table = exported(family, form, tmp_path), kernels_of("cuda")
    graphs = sorted(bundle.glob("*.onnx"))
    expected = {
        str(path): sorted(
            node.name for node, _ in nodes_without_kernel(onnx.load(path, load_external_data=False), table)
        )
        for path in graphs
    }
    placed = hollow(PLACED, *map(str, graphs))
    assert {path: found["unfit"] for path, found in placed.items()} == expected
    assert all(found["CUDAExecutionProvider"] > 10 for found in placed.values())
    unfit = [name for names in expected.values() for name in names]
    report = validate(bundle, provider="cuda")
    assert [finding.rule for finding in report.findings] == ["AB501"] * sum(map(bool, expected.values()))
    if family in ("llama", "gpt2") and not form.endswith("float16"):
        assert unfit and all("attention" in name for name in unfit)
        assert (
            "only for bfloat16, float16" in report.findings[0].message
            and "--dtype float16" in report.findings[0].fix
        )
    elif form in ("float32", "float16"):
        assert not unfit


# The engine on a device.


def bundle_in(dtype: str, base_of: Make, pack_of: Make, place: Path) -> Path:
    """A bundle of that float type with the engine's graph."""
    export(
        base_of("llama"),
        [pack_of("llama", name) for name in ("alpha", "beta")],
        place / "bundle",
        dtype=dtype,
        in_place=True,
    )
    return place / "bundle"


@pytest.fixture(scope="session")
def half(base_of: Make, pack_of: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_in("float16", base_of, pack_of, tmp_path_factory.mktemp("float16"))


@pytest.fixture(scope="session")
def brain(base_of: Make, pack_of: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_in("bfloat16", base_of, pack_of, tmp_path_factory.mktemp("bfloat16"))


def scripted(engine: Engine) -> list[np.ndarray]:
    """The logits of rows that come and go, with adapters of other ranks, on given tokens; the last row begins
    as one before.
    """
    logits: list[np.ndarray] = []
    rows = engine.rows

    def admitted(seed: int, name: str | None) -> Any:
        prompt = np.random.default_rng(seed).integers(3, 60, 37).tolist()
        pack = None if name is None else engine.bundle.pack(name)
        row = engine.row(prompt, pack, Sampling()).sequences[0]
        rows.admit(row)
        rows.next_to_read()
        logits.append(rows.prefill(len(prompt) - row.num_computed_tokens))
        return row

    def stepped(count: int) -> None:
        for step in range(count):
            for place, row in enumerate(rows.running):
                row.next_token = 5 + 7 * step + place
            logits.extend(rows.decode())

    running = [admitted(seed, name) for seed, name in enumerate((None, "alpha", "beta"))]
    stepped(3)
    rows.remove(running[0])
    stepped(2)
    again = admitted(1, "alpha")
    assert again.num_computed_tokens == len(again.prompt) and rows.reused == 32
    stepped(2)
    rows.remove(running[2])
    stepped(2)
    return logits


def test_a_buffer_on_a_device_is_read_and_written_as_one_of_the_host() -> None:
    """With the host as the device: the graphs that copy rows are those that run on a card."""
    rng, shape = np.random.default_rng(3), (3, 2, 11, 4)
    for dtype in (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16):
        one, two = HostBuffer(shape, dtype), DeviceBuffer(shape, dtype, resolve(Device(provider="cpu")))
        for step in range(30):
            first, last = sorted(rng.choice(12, 2, replace=False).tolist())
            source, target = rng.choice(3, 2, replace=False).tolist()
            block = rng.standard_normal((2, last - first, 4)).astype(np.float32)
            for buffer in (one, two):
                buffer.write(source, block, first)
                if step % 5 == 4:
                    buffer.move(source, target, 11)
            assert np.array_equal(one.read(target, 0, 11), two.read(target, 0, 11))
            assert np.array_equal(one.read(source, first, last), two.read(source, first, last))


def test_fixed_memory_and_a_device_change_no_logits(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a captured step needs, with the host as the device: passes of one shape on one memory, told the
    pool's length as the longest.
    """
    expected = scripted(Engine(half, "cpu", max_length=64))
    monkeypatch.setattr(kv_pool, "buffer", DeviceBuffer)
    engine = Engine(half, "cpu", max_length=64)
    engine.rows.fixed = True
    found = scripted(engine)
    assert 3 <= len(engine.rows._captured) <= 5
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            one.astype(np.float32), two.astype(np.float32), rtol=0, atol=2e-3 * np.abs(expected).max()
        )


def test_a_graph_in_bfloat16_computes_on_the_cpu_what_a_card_computes(half: Path, brain: Path) -> None:
    """Its operators compute in float32, and results, caches and slots are rounded; the provider of CUDA has a
    kernel for each.
    """
    engine = Engine(brain, "cpu", max_length=64)
    assert {one.dtype for one in engine.rows._pool._buffers.values()} == {BFLOAT16}
    exact, found = (scripted(one) for one in (Engine(half, "cpu", max_length=64), engine))
    errors = [
        np.abs(one.astype(np.float32) - two.astype(np.float32)).max()
        for one, two in zip(found, exact, strict=True)
    ]
    assert (
        1e-3 * np.abs(exact).max() < max(errors) < 2 * PRECISIONS["bfloat16"].tolerance * np.abs(exact).max()
    )
    assert validate(brain, provider="cuda").findings == ()
    if not builtin.has_device():
        report = validate(brain, full=True, provider="cuda")
        assert report.state == "not fully checked" and report.not_checked[0].startswith(
            "canaries on cuda: there is no CUDA device"
        )
    session = Session(brain, "cpu")
    ids = np.array([[5, 6, 7, 8]])
    assert session.run({"input_ids": ids}, ["alpha"])["logits"].dtype == np.float32
    assert session.generate([[5, 6, 7]], ["beta"], max_new_tokens=3)[0].ids


ENGINE = """
import ctypes, json, sys
from adapterpack.runtime.engine.engine import Engine
from adapterpack.runtime.providers.device import Device
folder, settings, library = json.loads(sys.argv[1])
engine = Engine(folder, Device(provider="cuda", **settings), max_rows=3, max_length=64)
for name in (None, "alpha", "beta", None):
    engine.add(list(range(3, 40)), name, max_new_tokens=6)
events = []
while engine.busy:
    events += engine.step()
graph, hollow = engine.rows.graph, ctypes.CDLL(library)
print(json.dumps({"reasons": [event.finish_reason for event in events if event.finish_reason],
                  "errors": [str(event.error) for event in events if event.error],
                  "options": graph._ort.get_provider_options()["CUDAExecutionProvider"], "provider": engine.bundle.provider,
                  "memory": engine.bundle.memory, "captures": hollow.hollow_captures(), "replays": hollow.hollow_replays(),
                  "pool": {type(one).__name__ for one in engine.rows._pool._buffers.values()}.pop(), "reused": engine.rows.reused}))
"""


@on_hollow
def test_an_engine_runs_on_the_hollow_card(half: Path, brain: Path, hollow: Make) -> None:
    """Settings reach ONNX Runtime, every node is the provider's, the pool lies on the device, prefixes are
    reused, and steps are captured once a shape and replayed; of numbers the hollow card has none.
    """
    library = str(hollow.folder / "hollow.so")
    plain = hollow(ENGINE, str(half), {"memory_limit": 1 << 30, "arena": "exact"}, library)
    assert (plain["errors"], plain["reasons"]) == ([], ["length"] * 4), plain
    assert (plain["provider"], plain["memory"], plain["pool"]) == (
        "CUDAExecutionProvider",
        ["cuda", 0],
        "DeviceBuffer",
    )
    expected = {
        "use_tf32": "0",
        "gpu_mem_limit": str(1 << 30),
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": "0",
    }
    assert {name: plain["options"][name] for name in expected} == expected
    assert (plain["captures"], plain["replays"], plain["reused"] > 0) == (0, 0, True)
    captured = hollow(ENGINE, str(brain), {"capture": True, "tf32": True}, library)
    assert (
        captured["errors"],
        captured["options"]["use_tf32"],
        captured["options"]["enable_cuda_graph"],
    ) == ([], "1", "1")
    assert 1 <= captured["captures"] <= 4
    assert captured["replays"] > captured["captures"]


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"capture": True}], ids=["plain", "captured"])
def test_an_engine_on_cuda_equals_the_cpus(settings: dict[str, Any], half: Path, pack_of: Make) -> None:
    """Logits within a hundredth of the largest, with prefixes reused on the device and steps captured; a pack
    that is loaded there is proved by its canary there.
    """
    expected, engine = (
        scripted(Engine(half, "cpu", max_length=64)),
        Engine(half, Device(provider="cuda", **settings), max_length=64),
    )
    found = scripted(engine)
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            one.astype(np.float32), two.astype(np.float32), rtol=0, atol=1e-2 * np.abs(expected).max()
        )
    engine.adapters.load(pack_of("llama", "gamma"))


@pytest.mark.gpu
def test_canaries_are_replayed_on_cuda(half: Path, bundle_of: Make) -> None:
    for folder in (half, bundle_of("bert", "bank")):
        assert canary.verify(Session(folder, "cuda"))["replayed"]
        assert validate(folder, full=True, provider="cuda").findings == ()
