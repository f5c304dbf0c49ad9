"""Adapts a finished bundle to another product: keeps its graphs as they are, quantized or not, and adds the
product's own files.
"""

from __future__ import annotations

import dataclasses

from ..bundle.files import find_unlisted, require_files
from ..bundle.manifest import Bundle, bundle_in, read_bundle
from ..errors import ConfigError, FormatError, Unsupported
from ..graph_passes.attach import default_slot_name
from ..io.atomic import output_folder
from ..io.safe_open import copy_folder
from ..pack.pack import SIGNATURE
from ..tasks.task import get_task
from .arguments import require_split
from .request import ExportRequest
from .targets import TARGETS

ORDINARY = "ort"


_TAKEN = frozenset({"base", "out", "target", "split", "progress"})
"""The fields of a request that apply to a finished bundle."""
_OPTIONS = {"in_place": "static_cache", "checkpoint": "base"}
"""Fields whose command-line option has another name."""


def retarget(request: ExportRequest) -> Bundle:
    """Writes the finished bundle that a request names as ``base`` for another target.

    Raises:
        ConfigError: the request sets fields other than the target's.
        FormatError: a file of the bundle was altered, is missing, or is not in its manifest.
        Unsupported: the target cannot run the bundle.
    """
    source, target = request.base, TARGETS[request.target]
    require_split(target, request.split)
    if target.name == ORDINARY:
        raise ConfigError(
            "a bundle is exported already",
            where=source,
            remedy="name the checkpoint, or the .onnx file with --base CHECKPOINT",
        )
    chosen = [
        _OPTIONS.get(field.name, field.name)
        for field in dataclasses.fields(request)
        if field.name not in _TAKEN and getattr(request, field.name) not in (field.default, [])
    ]
    if chosen:
        raise ConfigError(
            "a finished bundle is given to a target as it is",
            where=source,
            found=", ".join(chosen),
            remedy=(
                "leave these out, or export from the checkpoint; adapterpack quantize makes bundles smaller"
            ),
        )
    place = bundle_in(source)
    bundle = read_bundle(place)
    if bundle.target != ORDINARY or target.slot_name is not default_slot_name:
        raise Unsupported(
            "this bundle was made for another product",
            where=source,
            found=bundle.target,
            expected=target.name,
            remedy=f"export the checkpoint with --target {target.name}",
        )
    target.require(bundle.mode, get_task(bundle.task))
    require_files(place, bundle, "cached")
    if extra := find_unlisted(place, bundle):
        raise FormatError(
            "a file in the bundle is not in its manifest",
            where=place / extra[0],
            remedy="remove it, or export again",
        )
    with output_folder(request.out) as root:
        folder = root / target.place(bundle)
        copy_folder(place, folder)
        (folder / SIGNATURE).unlink(missing_ok=True)  # the signature covers the old bytes
        target.write(folder, bundle)
        dataclasses.replace(bundle, target=target.name).write(folder)
        if target.finish is not None:
            target.finish(folder, request.split)
    return read_bundle(bundle_in(request.out))
