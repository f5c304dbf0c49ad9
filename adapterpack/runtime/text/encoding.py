"""Encodes texts with a tokenizer that may take any time. A sandbox process runs this module and bounds it."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer as Core


class EncodedText(NamedTuple):
    """An encoded row in the terms of ``tokenizers``: token ids, type ids, character offsets, and for each
    token the index of its text.
    """

    ids: list[int]
    type_ids: list[int]
    offsets: list[tuple[int, int]]
    sequence_ids: list[int | None]

    @classmethod
    def parse(cls, answer: bytes) -> EncodedText:
        """Parses the result of :func:`encode`."""
        ids, types, offsets, sequences = json.loads(answer)
        return cls(ids, types, [(start, end) for start, end in offsets], sequences)


def encode(request: bytes) -> bytes:
    """Encodes the texts of ``[path, digest, texts, options]``, from JSON to JSON."""
    path, digest, texts, options = json.loads(request)
    row = _load(path, digest).encode(*texts, **options)
    return json.dumps(EncodedText(row.ids, row.type_ids, row.offsets, row.sequence_ids)).encode()


@lru_cache(maxsize=1)
def _load(path: str, digest: str) -> Any:
    data = Path(path).read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError("the file has changed since it was opened")
    core: Any = Core.from_buffer(data)
    core.no_padding()
    core.no_truncation()
    return core
