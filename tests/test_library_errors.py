"""Exceptions of libraries on a stranger's input become errors by name; what is not the library's stays what
it is.
"""

from __future__ import annotations

import io
import json

import pytest

from adapterpack.errors import ConfigError, FormatError, NothingToDo
from adapterpack.library_errors import BORDERS, library_errors

pytestmark = pytest.mark.fast


def _of_json() -> None:
    json.loads("[" * 100_000)


def _of_yaml() -> None:
    import yaml

    yaml.safe_load("a: !!timestamp never")


def _of_tokenizers() -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a|a)+$"), "isolated")
    tokenizer.encode("a" * 60 + "b")


def _of_protobuf() -> None:
    import onnx

    onnx.ModelProto.FromString(b"\xff" * 40)


def _of_onnx() -> None:
    import onnx

    onnx.checker.check_model(onnx.ModelProto())


def _of_onnxruntime() -> None:
    import onnxruntime as ort

    ort.InferenceSession(b"\x08\x01", providers=["CPUExecutionProvider"])


def _of_safetensors() -> None:
    import safetensors

    safetensors.deserialize(b"\xff" * 20)


def _of_pillow() -> None:
    from PIL import Image

    Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)).load()


def _of_jinja2() -> None:
    from jinja2 import Template

    Template("{{ 1 // 0 }}").render()


def _of_numpy() -> None:
    import numpy as np

    np.load(io.BytesIO(b"\x93NUMPY\x01\x00\x10\x00{'descr': (1,,)   "))


RAISING = {
    "json": _of_json,
    "yaml": _of_yaml,
    "tokenizers": _of_tokenizers,
    "protobuf": _of_protobuf,
    "onnx": _of_onnx,
    "onnxruntime": _of_onnxruntime,
    "safetensors": _of_safetensors,
    "PIL": _of_pillow,
    "jinja2": _of_jinja2,
    "numpy": _of_numpy,
}


@pytest.mark.parametrize("library", RAISING)
def test_what_a_library_raises_on_bytes_of_strangers_has_a_name_and_a_place(library: str) -> None:
    with (
        pytest.raises(FormatError, match=r"^it cannot be read: .*\(at line 3\)") as caught,
        library_errors(library, "it cannot be read", where="line 3"),
    ):
        RAISING[library]()
    assert caught.value.__cause__ is not None  # which --traceback shows
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("library", BORDERS)
def test_an_exhausted_stack_or_memory_says_so(library: str) -> None:
    for error, words in (
        (RecursionError("maximum"), "nested too deeply"),
        (MemoryError(), "more memory than there is"),
    ):
        with (
            pytest.raises(ConfigError, match=words),
            library_errors(library, "it cannot be read", kind=ConfigError),
        ):
            raise error


def test_errors_of_our_own_and_interrupts_stay_what_they_are() -> None:
    for error in (NothingToDo("there is nothing"), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)), library_errors("jinja2", "it cannot be read"):
            raise error


def test_a_bug_is_no_error_of_a_library() -> None:
    for library in ("json", "yaml", "protobuf", "onnxruntime", "safetensors"):
        with pytest.raises(AssertionError), library_errors(library, "it cannot be read"):
            raise AssertionError


@pytest.mark.parametrize("library", BORDERS)
def test_a_bug_of_this_package_is_not_the_fault_of_a_library(library: str) -> None:
    """What is raised in a line of a module of ours stays what it is; what a called library raises has a
    name.
    """
    namespace = {"__name__": "adapterpack.some.module"}
    exec("def broken():\n    return 1 / 0\n", namespace)
    if library != "yaml":  # which divides by what a document says
        with pytest.raises(ZeroDivisionError), library_errors(library, "this cannot be read"):
            namespace["broken"]()
