"""Describes a pack or a base as JSON values: its size, its method and what it changes; without torch."""

from __future__ import annotations

import math
from collections import Counter

from ..adapter_methods.nodes import as_text, decode
from ..base import Checkpoint, compatibility
from ..io import Json, strict_json
from ..paths import StrPath
from .pack import Pack


def describe(pack: Pack, path: StrPath) -> Json:
    """Returns the summary of a pack already loaded from, or written to, ``path``; reads nothing again."""
    manifest = pack.manifest
    return {
        "kind": "pack",
        "path": str(path),
        "id": pack.id,
        **summary(pack),
        "task": {"type": manifest.task.type, "labels": list(manifest.task.labels or ())},
        "quantization": None
        if (stored := manifest.quantization) is None
        else {key: value for key, value in stored.items() if key not in {"packed", "sites"}},
        "lineage": strict_json.plain(manifest.lineage),
        "canary": manifest.canary is not None,
        "metrics": [dict(metric) for metric in manifest.metrics],
    }


def summary(pack: Pack) -> Json:
    """Returns what a pack's tensors are, what they change, and for which base."""
    manifest = pack.manifest
    adapters = manifest.adapter_groups
    parameters = sum(math.prod(manifest.shape_of(name)) for name in pack.tensors)
    return {
        "name": pack.name,
        "method": manifest.method.type,
        **({"beside": [method.name for method in pack.methods[1:]]} if len(pack.methods) > 1 else {}),
        "config": dict(manifest.config),
        "composition": None if manifest.composition is None else as_text(decode(manifest.composition.tree)),
        "base": {
            "name": manifest.base.name,
            "model_type": manifest.base.model_type,
            **compatibility.recorded_fingerprint(manifest.base)._asdict(),
            "variants": strict_json.plain(manifest.base.variants),
        },
        "sites": len(adapters),
        "sites_by_module": dict(Counter(group.path.rpartition(".")[2] for group in adapters)),
        "ranks": dict(Counter(str(group.rank) for group in adapters)),
        "scales": dict(Counter(f"{group.scale:g}" for group in adapters)),
        "modules_to_save": [group.path for group in manifest.full_groups],
        "parameters": parameters,
        "bytes": sum(value.nbytes for value in pack.tensors.values()),
    }


def inspect_base(path: StrPath) -> Json:
    """Returns a summary of a base checkpoint as JSON values."""
    base = Checkpoint(path)
    return {
        "kind": "base",
        "path": str(path),
        "name": base.name,
        "model_type": base.config.get("model_type"),
        "architectures": base.config.get("architectures", []),
        "shards": list(base.files),
        "tensors": len(base.tensors),
        "parameters": sum(math.prod(info.shape) for info in base.tensors.values()),
        "bytes": sum(info.nbytes for info in base.tensors.values()),
        "dtypes": dict(Counter(info.dtype for info in base.tensors.values())),
        **base.fingerprint(files=True)._asdict(),
    }
