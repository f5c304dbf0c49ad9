"""Export targets: Triton's repository against Triton's own schema, onnxruntime-genai's folder and the names
of its slots.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from google.protobuf import text_format
from test_export import BATCHES, assert_close, batch_of, logits_of

from adapterpack import Engine, Session, convert, export, load, merge, validate
from adapterpack.bundle.manifest import bundle_in, read_bundle
from adapterpack.cli.commands.run import command as run
from adapterpack.cli.options import load_adapter
from adapterpack.engine_graph.genai_engine import served_folder
from adapterpack.errors import AdapterpackError, BaseMismatch, ConfigError, UnknownName, Unsupported
from adapterpack.exporting.targets import TARGETS
from adapterpack.exporting.targets.triton import config, model_name

Make = Callable[..., Any]
TYPES = {"tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32", "tensor(bool)": "TYPE_BOOL"}


@pytest.fixture(scope="module")
def triton_schema() -> Any:
    """Triton's ``model_config.proto`` as its client ships it; loaded alone, since the package around it asks
    for gRPC.
    """
    (folder,) = importlib.util.find_spec("tritonclient").submodule_search_locations  # type: ignore[union-attr, misc]
    spec = importlib.util.spec_from_file_location(
        "model_config_pb2", Path(folder) / "grpc" / "model_config_pb2.py"
    )
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


@pytest.mark.parametrize(("kind", "mode"), [("bert", "bank"), ("bert", "folded"), ("llama", "bank")])
def test_triton_config_is_the_graphs_signature(
    kind: str, mode: str, bundle_of: Make, triton_schema: Any
) -> None:
    """Every input and output of the graph with its type and its axes after the batch, read by Triton's
    schema; nothing else.
    """
    bundle = read_bundle(bundle_of(kind, mode))
    found = text_format.Parse(config(bundle), triton_schema.ModelConfig())
    assert (found.name, found.backend) == (model_name(bundle), "onnxruntime")
    assert found.max_batch_size > 1
    assert found.HasField("dynamic_batching")
    session = ort.InferenceSession(bundle_of(kind, mode) / "model.onnx", providers=["CPUExecutionProvider"])
    for ports, values in ((found.input, session.get_inputs()), (found.output, session.get_outputs())):
        assert [port.name for port in ports] == [value.name for value in values]
        for port, value in zip(ports, values, strict=True):
            assert triton_schema.DataType.Name(port.data_type) == TYPES[value.type]
            served = list(port.reshape.shape) if port.HasField("reshape") else list(port.dims)
            assert served == [extent if isinstance(extent, int) else -1 for extent in value.shape[1:]]
            assert list(port.dims)  # a request without axes beside the batch is not allowed
    ids = {
        key.removeprefix("adapterpack.adapter_id."): value.string_value
        for key, value in found.parameters.items()
        if key.startswith("adapterpack.adapter_id.")
    }
    assert ids == ({"alpha": "1", "beta": "2"} if mode == "bank" else {})
    if kind == "bert" and mode == "bank":
        assert json.loads(found.parameters["adapterpack.labels.beta"].string_value) == list("pqrst")
        # rows with different labels have no list in common
        assert not any(port.label_filename for port in found.output)


def test_requests_to_triton_are_one_batch(bundle_of: Make, triton_schema: Any) -> None:
    """What docs/scale.md sends, put together as the server's batcher does: each request names an adapter by
    the id in the config, as an array of the declared form; in one pass they give what a session gives with
    names.
    """
    folder = bundle_of("bert", "bank")
    found = text_format.Parse(config(read_bundle(folder)), triton_schema.ModelConfig())
    ids = {"": 0} | {
        key.removeprefix("adapterpack.adapter_id."): int(value.string_value)
        for key, value in found.parameters.items()
        if key.startswith("adapterpack.adapter_id.")
    }
    assert set(ids) == {"", "alpha", "beta"}
    tokens = np.array([[5, 6, 7, 8]], np.int64)
    arrays = {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "token_type_ids": np.zeros_like(tokens),
    }
    declared, feeds = {port.name: port for port in found.input}, {}
    for name, port in declared.items():
        sent = [arrays.get(name, np.array([[number]], np.int64)) for number in ids.values()]
        assert all(
            array.shape[1:] == tuple(tokens.shape[1] if extent == -1 else extent for extent in port.dims)
            for array in sent
        )
        batch = np.concatenate(sent)
        feeds[name] = batch.reshape(len(ids), *port.reshape.shape) if port.HasField("reshape") else batch
    graph, session = (
        ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"]),
        Session(folder, "cpu"),
    )
    together = graph.run(["logits"], feeds)[0]
    for row, name in zip(together, ids, strict=True):
        own = session.run({key: array for key, array in arrays.items() if key in declared}, name or None)[
            "logits"
        ][0]
        np.testing.assert_allclose(row[own > -1e8], own[own > -1e8], rtol=0, atol=1e-5)


def test_a_triton_repository_holds_the_bundle(
    base_of: Make, pack_of: Make, dense_of: Make, tmp_path: Path, triton_schema: Any
) -> None:
    """``OUT/NAME/config.pbtxt`` and ``OUT/NAME/1``, a bundle that validates and runs."""
    out = tmp_path / "repository"
    bundle = export(base_of("llama"), [pack_of("llama", "alpha")], out, mode="bank", target="triton")
    name = model_name(bundle)
    assert sorted(
        path.relative_to(out).as_posix() for path in out.rglob("*") if len(path.relative_to(out).parts) <= 2
    ) == [name, f"{name}/1", f"{name}/config.pbtxt"]
    assert (
        text_format.Parse((out / name / "config.pbtxt").read_text(), triton_schema.ModelConfig()).name == name
    )
    assert bundle_in(out) == out / name / "1"
    assert not validate(bundle_in(out), base_of("llama"), full=True).findings
    batch = batch_of("llama", BATCHES["ragged"])
    assert_close(
        Session(bundle_in(out), "cpu").run(batch, "alpha")["logits"],
        logits_of(dense_of("llama", "alpha"), batch),
        batch["attention_mask"],
    )


def test_labels_for_triton(
    base_of: Make, pack_of: Make, bundle_of: Make, triton_schema: Any, tmp_path: Path
) -> None:
    """A folded classifier has one list of labels: it is written, and named at the logits."""
    bundle, target = read_bundle(bundle_of("bert", "folded")), TARGETS["triton"]
    version = tmp_path / target.place(bundle)
    version.mkdir(parents=True)
    target.write(version, bundle)
    found = text_format.Parse((version.parent / "config.pbtxt").read_text(), triton_schema.ModelConfig())
    assert [port.label_filename for port in found.output if port.name == "logits"] == ["labels.txt"]
    assert (version.parent / "labels.txt").read_text() == "x\ny\nz\n"


def test_a_folder_for_onnxruntime_genai(base_of: Make, pack_of: Make, dense_of: Make, tmp_path: Path) -> None:
    """Slots have the names of olive's adapter files, the config names what the graph has, and a merge takes
    the slots out again.

    That onnxruntime-genai loads such a folder is shown in ``tests/interop/genai_runs.py``, in an environment
    of its own.
    """
    out = tmp_path / "genai"
    bundle = export(
        base_of("llama"),
        [pack_of("llama", name) for name in ("alpha", "beta")],
        out,
        mode="inputs",
        target="ort-genai",
    )
    names = {port.name for port in bundle.io.slots}
    assert names == {f"{path}.lora_{factor}.weight" for path in bundle.sites for factor in "AB"}
    told = json.loads((out / "genai_config.json").read_text())["model"]
    assert (told["type"], told["eos_token_id"], told["vocab_size"]) == ("llama", 2, 96)
    decoder = told["decoder"]
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (2, 2, 8)
    plain = ort.InferenceSession(out / decoder["filename"], providers=["CPUExecutionProvider"])
    taken = {
        template.replace("%d", str(layer)) for template in decoder["inputs"].values() for layer in range(2)
    }
    assert taken == {value.name for value in plain.get_inputs()}
    given = {
        template.replace("%d", str(layer)) for template in decoder["outputs"].values() for layer in range(2)
    }
    assert given == {value.name for value in plain.get_outputs()}
    batch, session = batch_of("llama", BATCHES["ragged"]), Session(out, "cpu")
    for name in (None, "alpha", "beta"):
        assert_close(
            session.run(batch, name)["logits"],
            logits_of(dense_of("llama", name), batch),
            batch["attention_mask"],
        )
    convert(out / "adapters" / "alpha.onnx_adapter", tmp_path / "back", to="pack")
    back, alpha = load(tmp_path / "back"), load(pack_of("llama", "alpha"))
    assert {adapter.site.path for adapter in back.adapters()} == {
        adapter.site.path for adapter in alpha.adapters()
    }
    merge(out, [pack_of("llama", "alpha")], tmp_path / "folded")
    assert read_bundle(tmp_path / "folded").io.slots == ()
    assert_close(
        Session(tmp_path / "folded", "cpu").run(batch)["logits"],
        logits_of(dense_of("llama", "alpha"), batch),
        batch["attention_mask"],
    )


def test_a_folder_of_another_tool_is_run(
    base_of: Make, pack_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that has nothing of ours but the graph: rows without an adapter, with an adapter file, and with a
    pack that is loaded into the graph's inputs, generate what the bundle does, each by itself and in one batch of
    the engine; a graph that does not tell what it takes, or that the engine cannot run, is refused by its name.

    Folders that Olive made are run by ``interop/olive_folder.py``.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made, folder = tmp_path / "made", tmp_path / "folder"
    export(base_of("llama"), [pack_of("llama", "alpha")], made, mode="inputs", target="ort-genai")
    folder.mkdir()
    for name in ("model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"):
        if (made / name).exists():
            shutil.copyfile(made / name, folder / name)
    prompts, own = [[5, 6, 7, 8], [9, 10]], Session(made, "cpu")
    wanted = {
        name: [a.ids for a in own.generate(prompts, name or None, max_new_tokens=6)] for name in ("", "alpha")
    }
    beta = load(pack_of("llama", "beta"))
    own.load(beta)
    wanted["beta"] = [a.ids for a in own.generate(prompts, "beta", max_new_tokens=6)]
    assert len({str(ids) for ids in wanted.values()}) == 3
    session = Session(folder, "cpu")
    with pytest.raises(BaseMismatch, match="nothing shows"):  # a graph of another tool does not name its base
        session.load(beta, allow_structural=True)
    convert(beta, tmp_path / "beta.onnx_adapter", graph=folder / "model.onnx")
    beta = load_adapter(str(tmp_path / "beta.onnx_adapter"))
    for pack in (load_adapter(f"alpha={made / 'adapters' / 'alpha.onnx_adapter'}"), beta):
        session.load(pack, allow_structural=True)
    for name, ids in wanted.items():
        assert [a.ids for a in session.generate(prompts, name or None, max_new_tokens=6)] == ids
    assert Session(folder, "cpu").folder == session.folder  # it is written once
    told = CliRunner().invoke(
        run, [str(folder), "--prompt", "w7", "--adapter", str(made / "adapters" / "alpha.onnx_adapter")]
    )
    assert told.exit_code == 0 and told.output.startswith("alpha | w7 | "), told.output
    with pytest.raises(Unsupported, match="one adapter a run"):
        Engine(folder, "cpu")
    served = Engine(served_folder(folder), "cpu")
    for pack in (load_adapter(f"alpha={made / 'adapters' / 'alpha.onnx_adapter'}"), beta):
        served.adapters.load(pack)
    rows = {
        served.add(prompt, name or None, max_new_tokens=6): ids[at]
        for name, ids in wanted.items()
        for at, prompt in enumerate(prompts)
    }
    answers: dict[int, tuple[int, ...]] = {}
    while served.busy:
        for event in served.step():
            assert event.token is not None
            answers[event.request] = (*answers.get(event.request, ()), event.token)
    assert answers == {number: tuple(ids) for number, ids in rows.items()}
    with pytest.raises(AdapterpackError, match="already has"):
        session.load(beta, allow_structural=True)
    graph, config = onnx.load(folder / "model.onnx", load_external_data=False), folder / "genai_config.json"
    graph.graph.input.add(name="speaker")
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(Unsupported, match="does not tell an input"):
        Session(folder, "cpu")
    del graph.graph.input[-1], graph.graph.output[-1]
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(Unsupported, match="what it takes and gives"):
        Session(folder, "cpu")
    config.write_text(config.read_text().replace("model.onnx", "../model.onnx"))
    with pytest.raises(Unsupported, match="names no graph in the folder"):
        Session(folder, "cpu")


@pytest.mark.fast
def test_the_signature_in_the_manifest(bundle_of: Make) -> None:
    """What must be fed, what may be, and what comes out, as ONNX Runtime tells it."""
    folder = bundle_of("llama", "bank")
    io, session = (
        read_bundle(folder).io,
        ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"]),
    )
    for ports, values in (
        (io.inputs, session.get_inputs()),
        (io.outputs, session.get_outputs()),
        (io.slots, session.get_overridable_initializers()),
    ):
        assert {port.name: tuple(port.shape) for port in ports} == {
            value.name: tuple(value.shape) for value in values
        }
    assert {np.dtype(port.dtype) for port in io.slots} == {np.dtype(np.float32)}


def test_what_targets_refuse(base_of: Make, pack_of: Make, tmp_path: Path) -> None:
    """A mode or a task that the product cannot run, and an unknown product: before anything is built."""
    for kind, options, error, text in (
        ("llama", {"mode": "bank", "target": "ort-genai"}, Unsupported, "--mode inputs"),
        ("bert", {"mode": "inputs", "target": "ort-genai"}, Unsupported, "text-classification"),
        ("llama", {"mode": "inputs", "target": "triton"}, Unsupported, "--mode bank"),
        ("llama", {"target": "trition"}, UnknownName, "triton"),
    ):
        with pytest.raises(error, match=text):
            export(base_of(kind), [pack_of(kind, "alpha")], tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option", [{"in_place": False}, {"slots": 0}, {"size_budget": 0}, {"compensate": 0}, {"max_rank": 0}]
)
def test_what_a_finished_bundle_does_not_take_is_refused_whatever_its_value(
    option: dict[str, Any], bundle_of: Make, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="static_cache" if "in_place" in option else next(iter(option))):
        export(bundle_of("llama", "bank"), [], tmp_path / "out", target="triton", **option)
    assert not list(tmp_path.iterdir())
