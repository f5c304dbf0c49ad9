"""Recognizes, by their first bytes, kinds of files that a pack must not contain."""

from __future__ import annotations

import re

_PREFIXES: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive"), (b"PK\x05\x06", "a zip archive"), (b"PK\x07\x08", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"), (b"Rar!\x1a\x07", "a rar archive"),
    (b"\x1f\x8b", "a gzip stream"), (b"BZh", "a bzip2 stream"), (b"\xfd7zXZ\x00", "an xz stream"),
    (b"\x28\xb5\x2f\xfd", "a zstd stream"), (b"\x7fELF", "an ELF program"), (b"MZ", "a Windows program"),
    (b"\xcf\xfa\xed\xfe", "a Mach-O program"), (b"\xfe\xed\xfa\xcf", "a Mach-O program"),
    (b"\xca\xfe\xba\xbe", "a Java class"), (b"\x00asm", "a WebAssembly module"), (b"GGUF", "a GGUF model"),
    (b"\x93NUMPY", "a numpy file, which can hold a pickle"), (b"\x89HDF\r\n", "an HDF5 file"),
    (b"#!", "a script"), (b"%PDF-", "a PDF"),
    *((bytes((0x80, protocol)), "a pickle") for protocol in range(2, 6)),
)  # fmt: skip
_PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|script|svg|iframe|\?php)", re.IGNORECASE)
_TEXT_PICKLE = re.compile(rb"\(?c[A-Za-z_][A-Za-z0-9_.]*\n[A-Za-z_][A-Za-z0-9_.]*\n")


def magic_of(head: bytes) -> str | None:
    """Returns what kind of forbidden file begins with ``head``, or None.

    Example:
        >>> magic_of(b"PK\\x03\\x04rest"), magic_of(b"  <HTML>"), magic_of(b"# tickets")
        ('a zip archive', 'a web page', None)
    """
    if head[4:9] == b"\0\0\0\0{":
        return None  # safetensors: its first bytes are the length of the header and may look like anything
    for prefix, kind in _PREFIXES:
        if head.startswith(prefix):
            return kind
    if head[257:262] == b"ustar":
        return "a tar archive"
    if _PAGE.match(head):
        return "a web page"
    return "a pickle" if _TEXT_PICKLE.match(head) else None
