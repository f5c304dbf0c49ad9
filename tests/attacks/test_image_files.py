"""Attacks by pictures: of billions of pixels, cut, of text that unpacks to 200 times its size, of other kinds
than they say.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import pytest
from attack import Attacks

from adapterpack.runtime.media.image_processing import bytes_in, picture
from adapterpack.runtime.media.processor_config import Preparation

HOW = Preparation(None, (8, 8), 2, None, 1 / 255, None, None)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int = 2, height: int = 2, *more: bytes, rows: bytes | None = None, depth: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(height * (1 + 3 * width)) if rows is None else rows, 9)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(more)
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


PICTURES: dict[str, Callable[[], bytes]] = {
    "billions of pixels": lambda: png(100_000, 100_000, rows=b""),
    "as many as are allowed, in one row": lambda: png(1 << 24, 1, rows=b"") + bytes(100),
    "no pixels": lambda: png(0, 0),
    "cut": lambda: png()[:45],
    "a header alone": lambda: png()[:8],
    "16 bits": lambda: png(2, 2, rows=bytes(2 * 13), depth=16),
    "a text of 100 MB": lambda: png(2, 2, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100 << 20), 1))),
    "a profile of 100 MB": lambda: png(2, 2, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100 << 20), 1))),
    "a chunk of four gigabytes": lambda: png(2, 2, struct.pack(">I", 0xFFFFFFFF) + b"tEXtabc"),
    "a JPEG that is none": lambda: b"\xff\xd8\xff" + bytes(1000),
    "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) run\n",
    "SVG": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "40 MB": lambda: png() + bytes(40 << 20),
}
HARMLESS = {"16 bits"}
"""What may also be read, as Pillow leaves it alone; within the same limits."""


def shown(data: bytes) -> None:
    picture(data, HOW, "the picture")


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_decoded(name: str, attacks: Attacks) -> None:
    outcome = attacks.call(shown, PICTURES[name]())
    outcome.held() if name in HARMLESS else outcome.refused("the picture")


@pytest.mark.parametrize(
    "text",
    ["data:image/png;base64,%%%", "data:image/png,abc", "data:image/svg+xml;base64,AAAA" * 2_000_000],
    ids=["no base 64", "not encoded", "56 MB"],
)
def test_a_picture_in_a_text(text: str, attacks: Attacks) -> None:
    attacks.call(bytes_in, text).refused("picture")
