"""Byte ranges are copied whole where the kernel cannot copy, a piece at a time."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from adapterpack.errors import FormatError
from adapterpack.io import byte_ranges
from adapterpack.io.byte_ranges import Span, copy_span, open_descriptor

pytestmark = pytest.mark.fast


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of 1,000 bytes on a system whose kernel copies nothing between files, and pieces of 64 bytes."""

    def refuse(*arguments: object) -> int:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    monkeypatch.setattr(byte_ranges, "_PIECE", 64)
    path = tmp_path / "source"
    path.write_bytes(np.random.default_rng(1).bytes(1000))
    return path


def test_a_span_is_copied_in_pieces(source: Path, tmp_path: Path) -> None:
    """No array is larger than a piece, the last one is what is left, and every byte arrives."""
    sizes: list[int] = []

    def buffer(count: int) -> np.ndarray:
        sizes.append(count)
        return np.empty(count, np.uint8)

    with (
        open_descriptor(source, os.O_RDONLY) as read,
        open_descriptor(tmp_path / "sink", os.O_RDWR | os.O_CREAT) as write,
    ):
        copy_span(read, write, Span(3, 10, 901), buffer)
    assert max(sizes) == 64 and sizes[-1] == 901 % 64
    assert (tmp_path / "sink").read_bytes() == bytes(10) + source.read_bytes()[3:904]


def test_a_source_that_ends_first_is_an_error(source: Path, tmp_path: Path) -> None:
    """A file that was cut short meanwhile is named by what is missing."""
    with (
        open_descriptor(source, os.O_RDONLY) as read,
        open_descriptor(tmp_path / "sink", os.O_RDWR | os.O_CREAT) as write,
        pytest.raises(FormatError, match="became shorter"),
    ):
        copy_span(read, write, Span(0, 0, 1001), lambda count: np.empty(count, np.uint8))
