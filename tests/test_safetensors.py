"""The strict safetensors reader and the deterministic writer, beside the reference package."""

from __future__ import annotations

import io
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adapterpack.errors import FormatError
from adapterpack.io.safetensors import (
    DTYPES,
    MAX_HEADER,
    MAX_NAME,
    MAX_TENSORS,
    SafetensorsFile,
    all_finite,
    parse_header,
    plan,
    write,
)

pytestmark = pytest.mark.fast

F32 = '"dtype":"F32","shape":[2],"data_offsets":[0,8]'
EIGHT = bytes(8)


def craft(header: str | bytes, data: bytes = EIGHT, length: int | None = None) -> bytes:
    """A file whose header is exactly these characters, right or wrong."""
    raw = header.encode("utf-8") if isinstance(header, str) else header
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(
    dtype: str = "F32", shape: str = "[2]", offsets: str = "[0,8]", name: str = "w", data: bytes = EIGHT
) -> bytes:
    return craft(f'{{"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}', data)


def parse(data: bytes) -> dict[str, Any]:
    return parse_header(io.BytesIO(data), len(data), "crafted.safetensors")[0]


TWO = '{{"a":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}},"b":{{"dtype":"F32","shape":[1],"data_offsets":[{},{}]}}}}'

NOTHING = '"{}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'

REFUSED: dict[str, tuple[bytes, str]] = {
    # what the reference reader refuses as well
    "hole": (craft(TWO.format(5, 9), bytes(9)), "tensor b"),
    "hole before the first": (entry(offsets="[4,12]", data=bytes(12)), "tensor w"),
    "overlap": (craft(TWO.format(2, 6), bytes(6)), "tensor b"),
    "same bytes twice": (craft(TWO.format(0, 4), bytes(4)), "tensor b"),
    "trailing bytes": (entry(data=bytes(9)), "after the last tensor"),
    "a second file appended": (entry() + b"PK\3\4", "after the last tensor"),
    "missing bytes": (entry(data=bytes(7)), "truncated"),
    "truncated in the header": (entry()[:30], "truncated"),
    "truncated in the length": (entry()[:5], "too short"),
    "empty file": (b"", "too short"),
    "descending offsets": (entry(offsets="[8,0]"), "tensor w"),
    "negative offset": (entry(offsets="[-8,0]"), "tensor w"),
    "float offset": (entry(offsets="[0,8.0]"), "tensor w"),
    "offset with an exponent": (entry(offsets="[0,8e0]"), "tensor w"),
    "offset -0": (entry(offsets="[-0,8]"), "-0"),
    "bool offset": (entry(shape="[1]", dtype="U8", offsets="[false,true]", data=bytes(1)), "tensor w"),
    "offset as text": (entry(offsets='["0","8"]'), "tensor w"),
    "one offset": (entry(offsets="[8]"), "tensor w"),
    "three offsets": (entry(offsets="[0,4,8]"), "tensor w"),
    "no offsets": (craft('{"w":{"dtype":"F32","shape":[2]}}'), "tensor w"),
    "offsets not a list": (entry(offsets="8"), "tensor w"),
    "offset past 2^64": (entry(offsets=f"[0,{2**64 + 8}]"), "2^53"),
    "shape that overflows 64 bits": (entry(shape=f"[{2**33},{2**33}]"), "tensor w"),
    "empty and too large": (
        entry(shape=f"[0,{2**53},{2**53}]", offsets="[0,0]", data=b""),
        "no array can have",
    ),
    "shape times size overflows": (entry(shape=f"[{2**53},{2**53},{2**53}]"), "tensor w"),
    "shape that does not fit": (entry(shape="[3]"), "tensor w"),
    "negative shape": (entry(shape="[-2,-1]"), "tensor w"),
    "bool shape": (entry(shape="[true,2]"), "tensor w"),
    "float shape": (entry(shape="[2.0]"), "tensor w"),
    "unknown dtype": (entry(dtype="F99"), "tensor w"),
    "odd count of 4-bit floats": (entry(dtype="F4", shape="[3]", offsets="[0,1]", data=bytes(1)), "tensor w"),
    "dtype in lower case": (entry(dtype="f32"), "tensor w"),
    "dtype not text": (craft('{"w":{"dtype":["F32"],"shape":[2],"data_offsets":[0,8]}}'), "tensor w"),
    "entry not an object": (craft('{"w":[]}'), "tensor w"),
    "bad UTF-8": (craft(b'{"w\xff":{' + F32.encode() + b"}}"), "crafted"),
    "lone surrogate": (craft('{"w\\ud800":{' + F32 + "}}"), "surrogate"),
    "byte order mark": (craft("\ufeff{" + f'"w":{{{F32}}}' + "}"), "begin with '{'"),
    "NUL padding": (craft(f'{{"w":{{{F32}}}}}\0\0'), "padded with spaces"),
    "nesting bomb": (craft('{"w":' + "[" * 200_000 + "]" * 200_000 + "}"), "JSON"),
    "nested too deeply": (craft('{"w":' + "[" * 40 + "]" * 40 + "}"), "nested too deeply"),
    "header is a list": (craft("[1,2]"), "begin with '{'"),
    "header is not JSON": (craft("{w:1}"), "JSON"),
    "NaN in the header": (entry(offsets="[NaN,8]"), "NaN"),
    "1e999 in the header": (entry(offsets="[0,1e999]"), "double"),
    "control character in a JSON string": (craft(f'{{"w\n":{{{F32}}}}}'), "JSON"),
    "header length 0": (craft("", length=0), "header length"),
    "header length of 1": (craft("{", length=1), "header length"),
    "header longer than the file": (craft(f'{{"w":{{{F32}}}}}', length=1 << 20), "header length"),
    "header length 2^63": (craft("{}", length=1 << 63), "header length"),
    "header length 2^64-1": (craft("{}", length=(1 << 64) - 1), "header length"),
    "metadata is not text": (craft(f'{{"__metadata__":{{"k":1}},"w":{{{F32}}}}}'), "metadata"),
    "metadata is a list": (craft(f'{{"__metadata__":[],"w":{{{F32}}}}}'), "metadata"),
    "metadata twice": (craft(f'{{"__metadata__":{{}},"__metadata__":{{}},"w":{{{F32}}}}}'), "__metadata__"),
    "dtype twice": (craft(f'{{"w":{{"dtype":"F32",{F32}}}}}'), "dtype"),
    # what the reference reader lets pass
    "same tensor twice": (craft(f'{{"w":{{{F32}}},"w":{{{F32}}}}}'), "'w'"),
    "same metadata key twice": (craft(f'{{"__metadata__":{{"k":"1","k":"2"}},"w":{{{F32}}}}}'), "'k'"),
    "header starts with a space": (craft(f' {{"w":{{{F32}}}}}'), "begin with '{'"),
    "newline padding": (craft(f'{{"w":{{{F32}}}}}\n\n'), "padded with spaces"),
    "tab padding": (craft(f'{{"w":{{{F32}}}}}\t '), "padded with spaces"),
    "newline under spaces": (craft(f'{{"w":{{{F32}}}}}\n  '), "padded with spaces"),
    "extra field": (craft(f'{{"w":{{{F32},"note":"x"}}}}'), "tensor w"),
    "empty tensor with an endless side": (entry(shape=f"[0,{2**63 - 1}]", offsets="[0,0]", data=b""), "2^53"),
    "nine dimensions": (entry(shape="[1,1,1,1,1,1,1,1,2]"), "tensor w"),
    "ten thousand dimensions": (entry(shape=str([1] * 9_999 + [2])), "tensor w"),
    "empty name": (entry(name=""), "tensor"),
    "NUL in a name": (entry(name="a\\u0000b"), "tensor a"),
    "newline in a name": (entry(name="a\\nb"), "tensor a"),
    "escape in a name": (entry(name="\\u001b[2Ja"), "\\u001b[2Ja"),
    "DEL in a name": (entry(name="a\\u007f"), "tensor a"),
    "C1 control in a name": (entry(name="a\\u009b31m"), "tensor a"),
    "a very long name": (entry(name="n" * (MAX_NAME + 1)), "tensor nnn"),
    "too many tensors": (
        craft(f"{{{','.join(NOTHING.format(i) for i in range(MAX_TENSORS + 1))}}}", b""),
        "too many tensors",
    ),
    "a header past the limit": (craft('{"w":' + " " * MAX_HEADER + f"{{{F32}}}" + "}"), "header length"),
    "not safetensors: zip": (b"PK\3\4" + bytes(40), "header length"),
    "not safetensors: pickle": (b"\x80\4\x95" + bytes(40), "header length"),
    "not safetensors: text": (b"#!/bin/sh\necho hello to everybody here\n", "header length"),
}


@pytest.mark.parametrize("label", REFUSED)
def test_a_crafted_file_is_refused_by_name(label: str, tmp_path: Path) -> None:
    """FormatError, never another exception and never a result; the message names the file, and the tensor or
    what is wrong.
    """
    data, words = REFUSED[label]
    path = tmp_path / "crafted.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 2000, "a hostile header does not flood the terminal"


def test_what_the_table_starts_from_is_a_valid_file() -> None:
    """The crafted files differ from these by their one fault."""
    assert parse(entry())["w"].shape == (2,)
    assert list(parse(craft(TWO.format(4, 8)))) == ["a", "b"]
    assert parse(craft(f'{{"w":{{{F32}}}}}      '))["w"].nbytes == 8
    assert parse(entry(shape="[1,1,1,1,1,1,1,2]"))["w"].shape == (1,) * 7 + (2,)
    assert parse(craft("{}", b"")) == {}


def test_a_double_key_among_very_many_is_found_at_once() -> None:
    """Linear in the number of keys: 60,000 keys with the last one twice take no more than seconds."""
    keys = ",".join(f'"{i}":0' for i in range(60_000))
    start = time.process_time()
    with pytest.raises(FormatError, match="59999"):
        parse(craft(f'{{{keys},"59999":0}}'))
    assert time.process_time() - start < 30


def test_a_pipe_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    """Opening a named pipe would wait for a writer for ever."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="regular file"):
        SafetensorsFile(tmp_path / "pipe")


names = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=20).filter(
    lambda name: name != "__metadata__"
)


@st.composite
def arrays(draw: Any, dtypes: tuple[str, ...]) -> np.ndarray:
    """An array of any of these dtypes with random bytes: scalars, empty ones, up to four dimensions."""
    dtype = DTYPES[draw(st.sampled_from(dtypes))]
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    return np.frombuffer(bytes(b & 1 for b in raw) if dtype == np.bool_ else raw, dtype).reshape(shape)


words = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=8)
metadata = st.dictionaries(words, words, max_size=3)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(names, arrays(tuple(DTYPES)), max_size=6), metadata)
def test_what_we_write_the_reference_reads_equal(
    tensors: dict[str, np.ndarray], extra: dict[str, str]
) -> None:
    """Names, dtypes, shapes and bytes; so do we; insertion order does not matter; data begins on 8 bytes."""
    buffer, again = io.BytesIO(), io.BytesIO()
    write(buffer, tensors, extra)
    write(again, dict(reversed(tensors.items())), extra)
    data = buffer.getvalue()
    assert data == again.getvalue()
    assert int.from_bytes(data[:8], "little") % 8 == 0
    ours = parse(data)
    theirs = dict(safetensors.deserialize(data))
    assert set(ours) == set(theirs) == set(tensors)
    for name, value in tensors.items():
        info, found = ours[name], theirs[name]
        assert (found["dtype"], tuple(found["shape"]), bytes(found["data"])) == (
            info.dtype,
            value.shape,
            value.tobytes(),
        )
        assert data[info.offset : info.offset + info.nbytes] == value.tobytes()
        assert (info.dtype, info.shape) == (
            next(key for key, dtype in DTYPES.items() if dtype == value.dtype),
            value.shape,
        )


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(names, arrays(tuple(DTYPES)), max_size=6), metadata)
def test_what_the_reference_writes_we_read_equal(
    tensors: dict[str, np.ndarray], extra: dict[str, str]
) -> None:
    """Everything of `safetensors.numpy.save`, bfloat16 and float8 included, and the metadata."""
    # with neither tensors nor metadata, {} makes it write what it cannot read
    data = safetensors.numpy.save(tensors, extra or None)
    infos, found = parse_header(io.BytesIO(data), len(data), "theirs")
    assert found == extra
    assert set(infos) == set(tensors)
    for name, value in tensors.items():
        info = infos[name]
        assert (DTYPES[info.dtype], info.shape) == (value.dtype, value.shape)
        assert data[info.offset : info.offset + info.nbytes] == value.tobytes()


def test_files_on_disk_read_equal_in_both_ways(tmp_path: Path) -> None:
    """Mapped or read at once: the same read-only arrays as `safetensors.numpy.load_file`; also of an array
    that is not contiguous.
    """
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": rng.normal(size=(3, 5)).T,
        "b": rng.normal(size=7).astype(np.float16),
        "c": np.array(3, np.int64),
        "d": np.ones((0, 4), bool),
    }
    path = tmp_path / "x.safetensors"
    write(path, tensors, {"format": "pt"})
    reference = safetensors.numpy.load_file(path)
    for private in (False, True):
        file = SafetensorsFile(path, private=private)
        assert file.metadata == {"format": "pt"}
        assert set(file.tensors) == set(tensors) == set(reference)
        for name, value in tensors.items():
            found = file.read(name)
            assert (found.dtype, found.shape, found.tobytes()) == (
                value.dtype,
                value.shape,
                np.ascontiguousarray(value).tobytes(),
            )
            assert np.array_equal(reference[name], found)
            assert not found.flags.writeable


def test_what_was_read_privately_does_not_change_with_the_file(tmp_path: Path) -> None:
    """Checked bytes are the bytes that are used, whoever writes to the file in between."""
    path = tmp_path / "x.safetensors"
    write(path, {"w": np.arange(4.0)})
    private = SafetensorsFile(path, private=True)
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(np.float64(99).tobytes())
    assert private.read("w").tolist() == [0, 1, 2, 3]


SAMPLE = {
    "layer.0.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "scale": np.array(2.5, np.float16),
    "mask": np.array([True, False]),
}


def agrees_with_the_reference(data: bytes) -> bool:
    """Reads ``data``: True if we accept it, in which case the reference must accept it and see the same."""
    try:
        ours = parse(data)
    except FormatError:
        return False
    theirs = dict(safetensors.deserialize(data))
    assert set(ours) == set(theirs)
    for name, info in ours.items():
        found = theirs[name]
        assert (info.dtype, list(info.shape)) == (found["dtype"], list(found["shape"]))
        assert data[info.offset : info.offset + info.nbytes] == bytes(found["data"])
    return True


def test_every_flipped_bit_is_refused_or_read_as_the_reference_reads_it() -> None:
    """All single-bit changes of a valid file, length, header and data: FormatError or agreement, and nothing
    else is ever raised.
    """
    buffer = io.BytesIO()
    write(buffer, SAMPLE, {"format": "pt"})
    data = buffer.getvalue()
    accepted = 0
    for position, bit in itertools.product(range(len(data)), range(8)):
        changed = bytearray(data)
        changed[position] ^= 1 << bit
        accepted += agrees_with_the_reference(bytes(changed))
    assert 8 * 28 <= accepted < 8 * len(data) // 2, (
        "flips in data are no business of the reader, most in the header are refused"
    )


SIGNS = [bytes([character]) for character in b'{}[]",:\\-0123456789eE.tfn \n']


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_random_edits_of_a_file_raise_nothing_but_format_error(data: st.DataObject) -> None:
    """One to three bytes replaced, cut out or put in, mostly by characters that mean something in JSON."""
    buffer = io.BytesIO()
    write(buffer, SAMPLE)
    changed = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(changed) - 1))
        replacement = data.draw(st.one_of(st.binary(max_size=3), st.sampled_from(SIGNS)))
        changed[position : position + data.draw(st.integers(0, 2))] = replacement
    agrees_with_the_reference(bytes(changed))


def json_values() -> st.SearchStrategy[Any]:
    leaves = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(max_size=4)
        | st.sampled_from(["F32", "U8"])
    )
    branches: Any = lambda inner: (  # noqa: E731
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    )
    return st.recursive(leaves, branches, max_leaves=6)


FIELDS = st.fixed_dictionaries(
    {}, optional={key: json_values() for key in ("dtype", "shape", "data_offsets")}
)
HEADERS = st.fixed_dictionaries({}, optional={"w": FIELDS, "v": json_values(), "__metadata__": json_values()})


@settings(max_examples=300, deadline=None)
@given(HEADERS, st.integers(0, 12))
def test_headers_of_any_json_raise_nothing_but_format_error(header: Any, size: int) -> None:
    """Well-formed JSON of every type in every place of the header."""
    agrees_with_the_reference(craft(json.dumps(header), bytes(size)))


@pytest.mark.parametrize(
    "tensors",
    [
        {"": np.ones(1)},
        {"a\nb": np.ones(1)},
        {"n" * (MAX_NAME + 1): np.ones(1)},
        {"\ud800": np.ones(1)},
        {"__metadata__": np.ones(1)},
        {"w": np.ones((1,) * 9)},
        {"w": np.ones(1, complex)},
        {"w": np.ones(1, ">f4")},
        {"w": np.array(["text"])},
        {"w": np.array([object()])},
    ],
    ids=[
        "empty name",
        "control",
        "long",
        "surrogate",
        "reserved",
        "rank",
        "complex",
        "big endian",
        "text",
        "object",
    ],
)
def test_what_could_not_be_read_back_is_not_written(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    """The writer refuses what the reader would refuse, before it makes a file."""
    with pytest.raises(FormatError):
        write(tmp_path / "x.safetensors", tensors)
    assert not (tmp_path / "x.safetensors").exists()


def test_the_plan_of_a_file_is_the_file() -> None:
    """Header and offsets known beforehand are those of the written file; a repeated name and too many tensors
    are refused.
    """
    header, places = plan([("b", "F32", (2, 3)), ("a", "BF16", (5,))], {"format": "pt"})
    assert parse(header + bytes(34)) == places
    assert places["a"].offset == len(header) + 24
    with pytest.raises(FormatError, match="repeated"):
        plan([("a", "U8", (1,)), ("a", "U8", (1,))])
    with pytest.raises(FormatError, match="too many"):
        plan((str(i), "U8", (0,)) for i in range(MAX_TENSORS + 1))


@pytest.mark.parametrize("dtype", [name for name in DTYPES if "F" in name])
def test_not_a_number_is_seen_in_every_float_dtype(dtype: str) -> None:
    """NaN in each, infinity in those that have one; the largest float64 is finite, though no float32 holds
    it.
    """
    bad = np.array([1.0, np.nan], np.float32).astype(DTYPES[dtype])
    assert not all_finite(bad)
    assert all_finite(bad[:1])
    assert all_finite(np.array([np.finfo(np.float64).max]))
    assert not all_finite(np.array([-np.inf], np.float16))


def test_unaligned_numbers_are_copied(tmp_path: Path) -> None:
    """Other writers need not fill up the header: compiled code gets numbers where it wants them, and everyone
    else the same ones.
    """
    for spaces in range(9):
        (tmp_path / "x").write_bytes(
            craft(f'{{"w":{{{F32}}}}}' + " " * spaces, np.array([1.5, -2], np.float32).tobytes())
        )
        for private in (False, True):
            found = SafetensorsFile(tmp_path / "x", private=private).read("w")
            assert found.tolist() == [1.5, -2]
            assert found.flags.aligned
            assert memoryview(found).format == "f"
