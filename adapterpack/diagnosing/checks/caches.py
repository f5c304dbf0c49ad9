"""What adapterpack keeps in the user's cache folder, and how large it is."""

from __future__ import annotations

from ...io.cache import cache_folder
from ...io.readable import size
from ..caches import found
from ..check import CHECKS, Check, Looked


def _look() -> Looked:
    kept, strange = found()
    rows = [
        {
            "cache": one.path.name,
            "holds": one.kind.holds,
            "size": size(one.bytes),
            "bytes": one.bytes,
            "files": one.files,
        }
        for one in kept
    ]
    return Looked(
        {
            "folder": str(cache_folder()),
            "size": size(sum(one.bytes for one in kept)),
            "caches": rows,
            "not_ours": [path.name for path in strange],
        }
    )


CHECKS.register(Check(name="caches", title="Caches", rank=80, look=_look))
