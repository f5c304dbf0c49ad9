"""What is left undone until it is needed, and what is done by a shorter way: the results are those of the
long way.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterpack.adapter_methods import Site, methods
from adapterpack.errors import FormatError
from adapterpack.io import strict_json

pytestmark = pytest.mark.fast

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["\u2028", "\ud800", '"\\/\b\x7f', "\x00"])
)
KEYS = st.text() | st.integers() | st.booleans() | st.none() | st.floats()
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text(), inner)
        | st.dictionaries(KEYS, inner)
    ),
    max_leaves=12,
)


def standard(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


# a machine that others keep busy draws slowly
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(VALUES)
def test_the_canonical_text_is_that_of_the_standard_encoder(value: Any) -> None:
    """The same bytes, or an error where that has one: for NaN, halves of characters, keys without an
    order.
    """
    try:
        expected = standard(value)
    except (TypeError, ValueError):
        with pytest.raises(FormatError, match="JSON does not have"):
            strict_json.canonical(value)
    else:
        assert strict_json.canonical(value) == expected


def test_values_beyond_json_are_told_as_before() -> None:
    """What holds itself, what is no JSON, and subclasses of what is."""

    class Text(str):
        pass

    endless: list[Any] = []
    endless.append(endless)
    for bad in (endless, object(), {"a": {1, 2}}, float("inf"), {(1,): 2}, b"x"):
        with pytest.raises(FormatError, match="JSON does not have"):
            strict_json.canonical(bad)
    assert strict_json.canonical({Text("a"): Text("b")}) == standard({"a": "b"})


def test_reading_a_pack_imports_the_method_that_made_it_and_no_other() -> None:
    """The registry imports a built-in method by its name; the catalogue imports all of them."""
    program = (
        "import sys, adapterpack.pack.validate.validation\n"
        "from adapterpack.adapter_methods import get\n"
        "from adapterpack.adapter_methods import METHODS\n"
        "def loaded(): return [method.name for method in METHODS.known()]\n"
        "assert loaded() == [], loaded()\n"
        "assert get('boft').name == 'boft' and loaded() == ['boft']\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


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
                known = [
                    other.name
                    for other in methods().values()
                    if other.peft and other.peft.reads({"peft_type": method.peft.peft_type, **config})
                ]
                assert known == [method.name]
                written += 1
    assert written > 20
