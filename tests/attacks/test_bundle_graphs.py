"""Attacks by the graphs of a bundle and by its other files: altered alone, or with a manifest that was
written anew over them.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from attack import Attacks, Outcome
from onnx import TensorProto, helper, numpy_helper  # noqa: TID251 - onnx_ir does not write what is wrong

from adapterpack.bundle.manifest import FILE_NAME, read_bundle

Make = Callable[[str, str], Path]
Change = Callable[[Any], None]
ESCAPE = "\x1b]2;owned\x07"


def copied(attacks: Attacks, bundle: Path) -> Path:
    return Path(shutil.copytree(bundle, attacks.work / "bundle"))


def answered(attacks: Attacks, folder: Path, adapter: str = "alpha") -> Outcome:
    return attacks.command("run", folder, "--adapter", adapter, "--prompt", "w1 w2", "--max-new-tokens", "2")


def rewritten(folder: Path, change: Change) -> None:
    """Alters the graph, and writes the manifest anew so that all digests are right."""
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    read_bundle(folder).write(folder)


def node(op: str, inputs: list[str], **fields: Any) -> Change:
    """Adds a node whose output the graph gives as well, so that nobody leaves it out."""

    def change(model: Any) -> None:
        made = helper.make_node(op, inputs, ["extra"], **fields)
        model.graph.node.append(made)
        model.graph.node.append(helper.make_node("Cast", ["extra"], ["more"], to=TensorProto.FLOAT))
        logits = next(value.name for value in model.graph.output if value.name == "logits")
        last = next(one for one in model.graph.node if logits in one.output)
        last.output[list(last.output).index(logits)] = "before"
        model.graph.node.append(helper.make_node("ReduceSum", ["more"], ["sum"], keepdims=0))
        model.graph.node.append(helper.make_node("Add", ["before", "sum"], [logits]))

    return change


def constant(name: str, value: Any) -> Any:
    return numpy_helper.from_array(np.array(value), name)


def loop(model: Any) -> None:
    """A loop whose condition stays true."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["x"], ["y"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, []),
        ],
    )
    model.graph.initializer.extend(
        [
            constant("most", np.int64(2**62)),
            constant("start", np.bool_(True)),
            constant("zero", np.float32(0)),
        ]
    )
    node("Loop", ["most", "start", "zero"], body=body)(model)


def hidden_loop(model: Any) -> None:
    """The same inside of the branch of a condition."""
    inner = onnx.ModelProto(graph=onnx.GraphProto())
    inner.graph.output.add(name="logits")
    inner.graph.node.add(op_type="Identity", input=["zero"], output=["logits"])
    loop(inner)
    branch = helper.make_graph(
        list(inner.graph.node),
        "branch",
        [],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        list(inner.graph.initializer),
    )
    model.graph.initializer.append(constant("yes", np.bool_(True)))
    node("If", ["yes"], then_branch=branch, else_branch=branch)(model)


def scan(model: Any) -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "body",
        [helper.make_tensor_value_info("x", 1, [])],
        [helper.make_tensor_value_info("y", 1, [])],
    )
    model.graph.initializer.append(constant("many", np.zeros(4, np.float32)))
    node("Scan", ["many"], body=body, num_scan_inputs=1)(model)


def large(op: str, extents: list[int]) -> Change:
    def change(model: Any) -> None:
        model.graph.initializer.extend(
            [constant("extents", np.array(extents, np.int64)), constant("one", np.ones(1, np.float32))]
        )
        node(op, ["extents"] if op == "ConstantOfShape" else ["one", "extents"])(model)

    return change


def large_product(model: Any) -> None:
    """Half a minute of work that ONNX Runtime does when it opens the graph."""
    large("ConstantOfShape", [1 << 13, 1 << 13])(model)
    model.graph.initializer.append(constant("twice", np.array([1 << 13, 1 << 13], np.int64)))
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["extents"], ["left"]))
    model.graph.node.insert(1, helper.make_node("ConstantOfShape", ["twice"], ["right"]))
    model.graph.node.insert(2, helper.make_node("MatMul", ["left", "right"], ["product"]))
    next(
        one for one in model.graph.node if "extra" in one.output and one.op_type == "ConstantOfShape"
    ).CopyFrom(helper.make_node("Identity", ["product"], ["extra"]))


def functions(depth: int, circle: bool = False) -> Change:
    """Functions each of which calls the next one twice."""

    def change(model: Any) -> None:
        model.opset_import.add(domain="evil", version=1)
        for level in range(depth):
            after = f"f{level + 1}" if level + 1 < depth else "f0" if circle else "Identity"
            domain = "evil" if after != "Identity" else ""
            nodes = [
                helper.make_node(after, ["x"], ["m"], domain=domain),
                helper.make_node(after, ["m"], ["y"], domain=domain),
            ]
            model.functions.append(
                helper.make_function(
                    "evil",
                    f"f{level}",
                    ["x"],
                    ["y"],
                    nodes,
                    [helper.make_opsetid("", 17), helper.make_opsetid("evil", 1)],
                )
            )
        model.graph.initializer.append(constant("one", np.ones(1, np.float32)))
        node("f0", ["one"], domain="evil")(model)

    return change


def size(count: int) -> bytes:
    out = bytearray()
    while count > 0x7F:
        out.append(count & 0x7F | 0x80)
        count >>= 7
    return bytes(out + bytes([count]))


def first_external(model: Any) -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL)


def external(**entries: str) -> Change:
    def change(model: Any) -> None:
        tensor = first_external(model)
        kept = {entry.key: entry.value for entry in tensor.external_data} | entries
        del tensor.external_data[:]
        for key, value in kept.items():
            tensor.external_data.add(key=key, value=value)

    return change


def without_input(name: str) -> Change:
    def change(model: Any) -> None:
        (value,) = [value for value in model.graph.input if value.name == name]
        model.graph.input.remove(value)

    return change


def retyped(name: str, kind: int) -> Change:
    def change(model: Any) -> None:
        next(value for value in model.graph.input if value.name == name).type.tensor_type.elem_type = kind

    return change


def first_slot(model: Any) -> Any:
    return next(value for value in model.graph.input if value.name.endswith(".down"))


def set_opset(version: int) -> Change:
    def change(model: Any) -> None:
        next(one for one in model.opset_import if one.domain in ("", "ai.onnx")).version = version

    return change


GRAPHS: dict[str, Change] = {
    "an endless loop": loop,
    "an endless loop in a branch": hidden_loop,
    "a scan": scan,
    "a tensor of 2^40 numbers": large("ConstantOfShape", [1 << 20, 1 << 20]),
    "a tensor of one extent of 2^62": large("ConstantOfShape", [1 << 62]),
    "a number repeated 2^45 times": large("Expand", [1 << 15, 1 << 15, 1 << 15]),
    "a number tiled 2^40 times": large("Tile", [1 << 40]),
    "a constant of 4 GB": large("ConstantOfShape", [1 << 15, 1 << 15]),
    "a product of large constants": large_product,
    "functions that make 2^40 nodes": functions(40),
    "functions that call each other in a circle": functions(3, circle=True),
    "an unknown operator": node("Divine", ["input_ids"]),
    "an unknown operator with an escape in its name": node(f"Divine{ESCAPE}", ["input_ids"], name=ESCAPE),
    "a custom domain": node("Run", ["input_ids"], domain="evil.example"),
    "an operator that reads a library": node("PyOp", ["input_ids"], domain="ai.onnx.contrib"),
    "an opset of the future": set_opset(999),
    "an opset of -1": set_opset(-1),
    "an IR version of the future": lambda model: setattr(model, "ir_version", 10_000),
    "no token ids": without_input("input_ids"),
    "no mask": without_input("attention_mask"),
    "no adapter ids": without_input("adapter_ids"),
    "token ids that are numbers": retyped("input_ids", TensorProto.FLOAT),
    "token ids that are texts": retyped("input_ids", TensorProto.STRING),
    "adapter ids that are numbers": retyped("adapter_ids", TensorProto.FLOAT),
    "no logits": lambda model: model.graph.output.pop(0),
    "another name for the logits": lambda model: setattr(model.graph.output[0], "name", ESCAPE),
    "a node without its input": lambda model: model.graph.node[-1].input.insert(0, f"nothing{ESCAPE}"),
    "a node twice": lambda model: model.graph.node.append(model.graph.node[-1]),
    "no node": lambda model: model.graph.ClearField("node"),
    "no graph": lambda model: model.ClearField("graph"),
    "a slot that is no input": lambda model: model.graph.input.remove(first_slot(model)),
    "data outside": external(location="../outside/secret.txt"),
    "data of an absolute path": external(location="/etc/passwd"),
    "data in the manifest": external(location=FILE_NAME),
    "data in the tokenizer": external(location="tokenizer.json", offset="0"),
    "data beyond its file": external(offset=str(1 << 40)),
    "data at a negative place": external(offset="-4096"),
    "data of no place": external(offset="here"),
    "data of another length": external(length="4"),
    "data at two places": lambda model: first_external(model).external_data.add(
        key="location", value="../outside/secret.txt"
    ),
    "data with an escape in its place": external(location=f"a{ESCAPE}"),
    "a tensor of negative extents": lambda model: first_external(model).dims.__setitem__(0, -1),
    "a tensor of 2^62 rows": lambda model: first_external(model).dims.__setitem__(0, 1 << 62),
    "a tensor of a type that is none": lambda model: setattr(first_external(model), "data_type", 99),
}


@pytest.mark.parametrize("change", GRAPHS.values(), ids=GRAPHS.keys())
def test_a_graph_with_right_digests(attacks: Attacks, bundle_of: Make, change: Change) -> None:
    folder = copied(attacks, bundle_of("llama", "bank"))
    rewritten(folder, change)
    answered(attacks, folder).refused()


@pytest.mark.parametrize(
    "name",
    [
        "an endless loop",
        "functions that make 2^40 nodes",
        "data outside",
        "data at two places",
        "data in the manifest",
        "an unknown operator with an escape in its name",
        "no token ids",
    ],
)
def test_validate_refuses_it(attacks: Attacks, bundle_of: Make, name: str) -> None:
    folder = copied(attacks, bundle_of("llama", "bank"))
    rewritten(folder, GRAPHS[name])
    attacks.command("validate", folder, "--full").refused()


def test_graphs_that_are_nested(attacks: Attacks, bundle_of: Make) -> None:
    folder = copied(attacks, bundle_of("llama", "bank"))
    path = folder / "model.onnx"
    data = b""
    for _ in range(3000):
        inner = b"\x32" + size(len(data)) + data if data else b""  # AttributeProto.g
        made = b"\x2a" + size(len(inner)) + inner  # NodeProto.attribute
        data = b"\x0a" + size(len(made)) + made  # GraphProto.node
    path.write_bytes(path.read_bytes() + b"\x3a" + size(len(data)) + data)
    read_bundle(folder).write(folder)
    answered(attacks, folder).refused("not an ONNX model")


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "no model": lambda data: b"PK\x03\x04" + data,
    "a length beyond the file": lambda data: b"\x3a\xff\xff\xff\xff\x0f" + data,
    "a million empty fields": lambda data: data + b"\x3a" + size(4_000_000) + b"\x0a\x00" * 2_000_000,
    "a pickle": lambda data: b"\x80\x04\x95",
}


@pytest.mark.parametrize("change", BYTES.values(), ids=BYTES.keys())
def test_bytes_that_are_no_graph(attacks: Attacks, bundle_of: Make, change: Callable[[bytes], bytes]) -> None:
    folder = copied(attacks, bundle_of("llama", "bank"))
    path = folder / "model.onnx"
    path.write_bytes(change(path.read_bytes()))
    read_bundle(folder).write(folder)
    answered(attacks, folder).refused()


FILES = (
    "model.onnx",
    "model.onnx.data",
    "tokenizer.json",
    "config.json",
    "adapters/alpha/adapterpack.json",
    "adapters/alpha/adapter_model.safetensors",
)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_altered(attacks: Attacks, bundle_of: Make, name: str) -> None:
    folder = copied(attacks, bundle_of("llama", "bank"))
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    answered(attacks, folder).refused(Path(name).name)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_a_pipe(attacks: Attacks, bundle_of: Make, name: str) -> None:
    folder = copied(attacks, bundle_of("llama", "bank"))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    answered(attacks, folder).refused()


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.onnx.data", "tokenizer.json", "adapters", "adapters/alpha"]
)
def test_a_link_to_the_same_bytes_outside(attacks: Attacks, bundle_of: Make, name: str) -> None:
    folder = copied(attacks, bundle_of("llama", "bank"))
    (folder / name).rename(attacks.outside / "same")
    (folder / name).symlink_to(attacks.outside / "same")
    answered(attacks, folder).refused()


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "generation_config.json", "preprocessor_config.json"]
)
@pytest.mark.parametrize("kind", ["file", "pipe", "dangling link"])
def test_a_file_that_a_session_would_read(attacks: Attacks, bundle_of: Make, name: str, kind: str) -> None:
    """One that the manifest does not list."""
    folder = copied(attacks, bundle_of("llama", "bank"))
    (folder / name).unlink(missing_ok=True)
    listed = [entry.path for entry in read_bundle(folder).files]
    if kind == "file":
        (folder / name).write_text("{}")
    elif kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    outcome = answered(attacks, folder)
    outcome.refused() if name not in listed or kind != "file" else outcome.refused(name)


def exchanged_weights(folder: Path) -> None:
    """Other numbers in the place of every weight of the base, and the manifest written anew."""
    model = onnx.load(folder / "model.onnx")
    random = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim == 2 and array.dtype == np.float32 and array.size > 256:
            tensor.CopyFrom(
                numpy_helper.from_array(random.normal(size=array.shape).astype(np.float32), tensor.name)
            )
    (folder / "model.onnx.data").unlink()
    onnx.save(
        model,
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=1024,
    )
    read_bundle(folder).write(folder)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_weights_of_another_base(
    attacks: Attacks, bundle_of: Make, base_of: Callable[[str], Path], kind: str
) -> None:
    """They are told from the base's own, though nothing in the bundle contradicts them; and those of the real
    bundle are the base's.
    """
    folder = copied(attacks, bundle_of(kind, "bank"))
    attacks.command("validate", folder, "--base", base_of(kind), "--full").harmless(
        "who made the graphs", "it is not signed"
    )
    exchanged_weights(folder)
    attacks.command("validate", folder, "--base", base_of(kind), "--full").refused(
        "AB302", "other numbers in the place of weights"
    )


@pytest.mark.parametrize("mode", ["inputs", "bank"])
def test_the_numbers_of_another_adapter(attacks: Attacks, bundle_of: Make, mode: str) -> None:
    """In the slots of one tenant, with right digests everywhere: the pack that its manifest names is
    another.
    """
    folder = copied(attacks, bundle_of("llama", mode))
    if mode == "inputs":
        one, two = (folder / f"adapters/{name}.onnx_adapter" for name in ("alpha", "beta"))
        data = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(data)
        read_bundle(folder).write(folder)
    else:
        model = onnx.load(folder / "model.onnx")
        for tensor in model.graph.initializer:
            if tensor.name.endswith((".down", ".up")):
                array = numpy_helper.to_array(tensor).copy()
                array[[1, 2]] = array[[2, 1]]
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        (folder / "model.onnx.data").unlink()
        onnx.save(
            model,
            folder / "model.onnx",
            save_as_external_data=True,
            location="model.onnx.data",
            size_threshold=1024,
        )
        read_bundle(folder).write(folder)
    answered(attacks, folder).refused("adapter that the manifest names")


def test_a_base_that_is_an_adapter(attacks: Attacks, bundle_of: Make) -> None:
    """The slot of the base is filled: rows without an adapter would have one."""
    folder = copied(attacks, bundle_of("llama", "bank"))
    model = onnx.load(folder / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.name.endswith((".down", ".up")):
            array = numpy_helper.to_array(tensor).copy()
            array[0] = array[1]
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    (folder / "model.onnx.data").unlink()
    onnx.save(
        model,
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=1024,
    )
    read_bundle(folder).write(folder)
    attacks.command("run", folder, "--prompt", "w1 w2").refused("change the base")


@pytest.mark.parametrize(
    "data", [b"", b"\x00" * 64, b"TORT" * 1000, b"\xff" * 4096], ids=["empty", "zeros", "text", "ones"]
)
def test_an_adapter_file_that_is_none(attacks: Attacks, bundle_of: Make, data: bytes) -> None:
    folder = copied(attacks, bundle_of("llama", "inputs"))
    (folder / "adapters/alpha.onnx_adapter").write_bytes(data)
    read_bundle(folder).write(folder)
    answered(attacks, folder).refused()


def opened_while_exchanged(folder: str, name: str) -> None:
    """Opens a bundle again and again while another thread exchanges one of its files and puts it back; every
    answer is the right one.
    """
    from adapterpack import Session
    from adapterpack.errors import FormatError, StorageError

    right = Session(folder, "cpu").generate(["w1 w2"], adapters=["alpha"], max_new_tokens=2)[0].ids
    path = Path(folder, name)
    data = bytearray(path.read_bytes())
    data[len(data) // 3 :] = b"\0" * len(data[len(data) // 3 :])
    other, kept = path.with_name(f"{path.name}.other"), path.with_name(f"{path.name}.kept")
    other.write_bytes(data)
    stop, outcomes = threading.Event(), {"right": 0, "refused": 0}

    def exchange() -> None:
        while not stop.is_set():
            path.rename(kept)
            other.rename(path)
            time.sleep(0.002)
            path.rename(other)
            kept.rename(path)
            time.sleep(0.002)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        end = time.monotonic() + 1.5
        while time.monotonic() < end or sum(outcomes.values()) < 2:
            try:
                ids = Session(folder, "cpu").generate(["w1 w2"], adapters=["alpha"], max_new_tokens=2)[0].ids
            except (FormatError, StorageError):
                outcomes["refused"] += 1
                continue
            assert ids == right, f"an answer of the exchanged file: {ids}, not {right}"
            outcomes["right"] += 1
    finally:
        stop.set()
        thread.join()
    assert sum(outcomes.values()) > 1


@pytest.mark.parametrize(
    "name", ["model.onnx.data", "tokenizer.json", "adapters/alpha/adapter_model.safetensors"]
)
def test_a_file_exchanged_while_a_bundle_is_opened(attacks: Attacks, bundle_of: Make, name: str) -> None:
    attacks.call(opened_while_exchanged, str(copied(attacks, bundle_of("llama", "bank"))), name).harmless()
