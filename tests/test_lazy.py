"""What is left undone until it is needed, and what is done by a shorter way: the results are those of the long way."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import adapterpack.methods
from adapterpack import _dataclass
from adapterpack.errors import FormatError
from adapterpack.methods import LoRA, Site, get, methods
from adapterpack.methods.catalogue import CONFIGS
from adapterpack.pack import canonical_json, strict_json
from adapterpack.pack.manifest import Base, Task
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
        "import sys, adapterpack.pack.validate, adapterpack.methods as methods\n"
        "from adapterpack.methods.catalogue import CONFIGS\n"
        "def loaded(): return sorted(name for name in CONFIGS if f'adapterpack.methods.{name}' in sys.modules)\n"
        "assert loaded() == [], loaded()\n"
        "assert methods.get('lora').name == 'lora' and loaded() == ['lora']\n"
        "import adapterpack.methods.boft\n"
        "assert methods.boft is methods.get('boft') and methods.boft.config is methods.BOFT\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert list(CONFIGS) == sorted(set(methods()) & set(CONFIGS))
    for name in adapterpack.methods.__all__:
        assert getattr(adapterpack.methods, name) is not None
    for name, config in CONFIGS.items():
        method = methods()[name]
        assert (getattr(adapterpack.methods, name), getattr(adapterpack.methods, config)) == (method, method.config)
    with pytest.raises(AttributeError, match="no attribute 'lara'"):
        _ = adapterpack.methods.lara  # type: ignore[attr-defined]


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
    assert code == "0" and "adapterpack.compose.work" in modules
    unwanted = {"ml_dtypes", "array_api_compat", "tempfile", "shutil", "random", "difflib", "yaml", "subprocess", "importlib.metadata",
                "jsonschema", "adapterpack.cli.score", "adapterpack.methods.routes"}
    unwanted |= {f"adapterpack.methods.{file}" for file in adapterpack.methods._KINDS}
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


def declared(decorated: Callable[..., Any]) -> list[Any]:
    """Classes with all that a dataclass of the package has."""
    @decorated(frozen=True)
    class Plain:
        """Fields with and without a default."""

        path: str
        width: int = 3
        parts: tuple[float, ...] = field(default=(), compare=False)
        secret: str = field(default="", repr=False, metadata={"packed": False})
        found: dict[str, int] = field(default_factory=dict)
        kept: ClassVar[int] = 7

        @cached_property
        def twice(self) -> int:
            return 2 * self.width

    @decorated(frozen=True, kw_only=True)
    class Named:
        """Fields by name alone."""

        name: str
        rate: float = 0.5

        def __post_init__(self) -> None:
            if not self.name:
                raise ValueError("no name")
            object.__setattr__(self, "rate", float(self.rate))

    @decorated(frozen=True)
    class Further(Named):
        """Fields by place after those of a base, of which one has another default now."""

        label: str = "l"
        rate: float = 0.25

    @decorated(frozen=True)
    class Nothing:
        """No fields."""

    @decorated(frozen=True)
    class Alike:
        """Fields that are called as something in the decorator."""

        values: int
        cls: int
        name: dict[str, int] = field(default_factory=dict)
        fields: int = 4
        other: int = 5
        function: int = 6

    return [Plain, Named, Further, Nothing, Alike]


STANDARD, QUICK = declared(dataclasses.dataclass), declared(_dataclass.dataclass)
CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (args, kwargs) for args in ((), ("a",), ("a", 2), ("a", 2, (float("nan"),), "s", {"x": 1}), (1, 2, 3, 4, 5, 6))
    for kwargs in ({}, {"name": "n"}, {"name": "n", "rate": 3}, {"name": ""}, {"width": 9}, {"unknown": 1}, {"path": "b"})]


def outcome(function: Callable[[], Any]) -> Any:
    """What it gives, or the error that it raises."""
    try:
        return function()
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("place", range(len(QUICK)), ids=[each.__name__ for each in QUICK])
def test_a_dataclass_is_that_of_the_standard_library(place: int) -> None:
    """What it declares, what it can be made of, and what its instances do."""
    standard, quick = STANDARD[place], QUICK[place]
    assert [str(each) for each in dataclasses.fields(quick)] == [str(each) for each in dataclasses.fields(standard)]
    assert quick.__match_args__ == standard.__match_args__
    assert dataclasses.is_dataclass(quick) and quick.__dataclass_params__.frozen
    parameters = [[(each.name, each.kind) for each in inspect.signature(kind).parameters.values()] for kind in (quick, standard)]
    assert parameters[0] == parameters[1]
    assert {name: getattr(quick, name, None) for name in ("width", "parts", "found", "rate", "path", "kept")} == {
        name: getattr(standard, name, None) for name in ("width", "parts", "found", "rate", "path", "kept")}
    made = [[outcome(lambda args=args, kwargs=kwargs, kind=kind: kind(*args, **kwargs)) for args, kwargs in CALLS]  # type: ignore[misc]
            for kind in (quick, standard)]
    assert [repr(each) for each in made[0]] == [repr(each) for each in made[1]]
    instances = [[each for each in some if dataclasses.is_dataclass(each)] for some in made]
    assert instances[0]
    for one, like in zip(*instances, strict=True):
        assert [one == other for other in instances[0]] == [like == other for other in instances[1]]
        assert one != like and one.__eq__(like) is NotImplemented
        assert dataclasses.asdict(one).keys() == dataclasses.asdict(like).keys() and vars(one).keys() == vars(like).keys()
        assert repr(dataclasses.replace(one)) == repr(copy.copy(one)) == repr(one)
        for act in (lambda it: setattr(it, "width", 1), lambda it: setattr(it, "other", 1), lambda it: delattr(it, "rate"),
                    lambda it: it.twice, lambda it: dataclasses.replace(it, width=4), lambda it: dataclasses.replace(it, rate="x")):
            assert repr(outcome(lambda it=one, act=act: act(it))) == repr(outcome(lambda it=like, act=act: act(it)))  # type: ignore[misc]
        hashes = [outcome(lambda it=it: hash(it) == hash(copy.copy(it))) for it in (one, like)]  # type: ignore[misc]
        assert hashes[0] == hashes[1]


def test_a_standard_dataclass_may_stand_on_a_quick_one_and_a_quick_one_on_it() -> None:
    """As a method of another package does with the configs of this one."""
    @dataclasses.dataclass(frozen=True)
    class Standard(QUICK[0]):  # type: ignore[misc]
        more: int = 1

    @_dataclass.dataclass(frozen=True)
    class Quick(Standard):
        most: int = 2

    assert [each.name for each in dataclasses.fields(Quick)] == ["path", "width", "parts", "secret", "found", "more", "most"]
    assert repr(Quick("a", most=5)).endswith("Quick(path='a', width=3, parts=(), found={}, more=1, most=5)")
    assert Quick("a") == Quick("a") != Quick("a", more=2) and Standard("a") != QUICK[0]("a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Quick("a").more = 3  # type: ignore[misc]
    with pytest.raises(TypeError, match="is frozen"):
        _dataclass.dataclass(frozen=False)


def test_a_value_that_holds_itself_is_told_with_an_end() -> None:
    """And copies of values are their equals."""
    held: list[Any] = []
    held.append(QUICK[0]("a", parts=held))
    assert repr(held[0]).count("Plain(") == 1 and "..." in repr(held[0])
    site = Site("layers.0.fc", 12, 12, kernel=(1,))
    assert copy.deepcopy(site) == site and hash(copy.deepcopy(site)) == hash(site)
