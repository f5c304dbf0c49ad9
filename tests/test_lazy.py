"""What is left undone until it is needed, and what is done by a shorter way: the results are those of the long way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import adapterpack.adapter_methods
from adapterpack import LoRA
from adapterpack.adapter_methods import Site, get, methods
from adapterpack.adapter_methods.catalogue import CONFIGS
from adapterpack.errors import FormatError
from adapterpack.io import canonical_json, strict_json
from adapterpack.manifest.manifest import Base, Task
from adapterpack.pack.pack import build

pytestmark = pytest.mark.fast

LEAVES = (st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["\u2028", "\ud800", '"\\/\b\x7f', "\x00"]))
KEYS = st.text() | st.integers() | st.booleans() | st.none() | st.floats()
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner) | st.dictionaries(KEYS, inner),
    max_leaves=12)


def standard(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)


@given(VALUES)
def test_the_canonical_text_is_that_of_the_standard_encoder(value: Any) -> None:
    """The same characters, or the same class of error: for NaN, keys without an order, and all that JSON does not have."""
    try:
        expected = standard(value)
    except (TypeError, ValueError) as error:
        with pytest.raises(type(error)):
            canonical_json.text(value)
    else:
        assert canonical_json.text(value) == expected


def test_values_beyond_json_are_told_as_before() -> None:
    """What holds itself, what is no JSON, and subclasses of what is."""
    class Text(str):
        pass

    endless: list[Any] = []
    endless.append(endless)
    for bad in (endless, object(), {"a": {1, 2}}, float("inf"), {(1,): 2}, b"x"):
        with pytest.raises(FormatError, match="JSON does not have"):
            strict_json.canonical(bad)
    assert canonical_json.text({Text("a"): Text("b")}) == standard({"a": "b"})


def test_no_method_is_imported_before_it_is_asked_for() -> None:
    """Reading a pack imports the method that made it, and no other; every name of the package is there all the same."""
    program = (
        "import sys, adapterpack.pack.validate.validation, adapterpack.methods as methods\n"
        "from adapterpack.adapter_methods.catalogue import CONFIGS\n"
        "def loaded(): return sorted(name for name in CONFIGS if f'adapterpack.methods.{name}' in sys.modules)\n"
        "assert loaded() == [], loaded()\n"
        "assert methods.get('lora').name == 'lora' and loaded() == ['lora']\n"
        "import adapterpack.adapter_methods.boft\n"
        "assert methods.boft is methods.get('boft') and methods.boft.config is methods.BOFT\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert list(CONFIGS) == sorted(set(methods()) & set(CONFIGS))
    for name in adapterpack.adapter_methods.__all__:
        assert getattr(adapterpack.methods, name) is not None
    for name, config in CONFIGS.items():
        method = methods()[name]
        assert (getattr(adapterpack.methods, name), getattr(adapterpack.methods, config)) == (method, method.config)
    with pytest.raises(AttributeError, match="no attribute 'lara'"):
        _ = adapterpack.adapter_methods.lara  # type: ignore[attr-defined]


def test_composing_imports_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    """Two packs of float32, composed by the command in a process of its own: each of these takes 1 to 5 ms."""
    params = {"lora_A": np.ones((2, 4), np.float32), "lora_B": np.ones((6, 2), np.float32)}
    for name in "ab":
        made = build(name, get("lora"), {Site("layers.0.fc", 4, 6): (LoRA(r=2), params)}, task=Task("text-generation"), base=Base())
        made.write(tmp_path / name)
    program = ("import sys; from adapterpack.cli.main import main\n"
               f"try: main(['compose', {str(tmp_path / 'a')!r}, {str(tmp_path / 'b')!r}, '--output', {str(tmp_path / 'out')!r}])\n"
               "except SystemExit as done: print(done.code, *sys.modules)")
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    code, *modules = done.stdout.splitlines()[-1].split()
    assert code == "0" and "adapterpack.composing.work" in modules
    unwanted = {"ml_dtypes", "array_api_compat", "tempfile", "shutil", "random", "difflib", "yaml", "subprocess", "importlib.metadata",
                "jsonschema", "adapterpack.cli.score", "adapterpack.adapter_methods.forms.routes"}
    unwanted |= {f"adapterpack.methods.{file}" for file in adapterpack.adapter_methods._KINDS}
    assert not unwanted & set(modules)


def test_no_config_of_peft_is_read_by_two_methods() -> None:
    """So the method that has PEFT's name may be asked first, whatever stands before it in the catalogue."""
    written = 0
    for method in methods().values():
        if method.peft is None:
            continue
        site = Site("layers.0.fc", 12, 12)
        for example in method.examples:
            config = method.peft.to_config({site.path: example})
            if config is not None:
                known = [other.name for other in methods().values() if other.peft and other.peft.reads(
                    {"peft_type": method.peft.peft_type, **config})]
                assert known == [method.name]
                written += 1
    assert written > 20
