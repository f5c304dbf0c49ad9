"""Gives a finished bundle to another product: its graphs stay as they are, quantized or not, and the
product's own files are added.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from ..bundle.files import require_files, unlisted
from ..bundle.manifest import Bundle, bundle_in, read_bundle
from ..errors import ConfigError, FormatError, Unsupported
from ..io.atomic import output_folder
from ..io.safe_open import copy_folder
from ..pack.pack import SIGNATURE
from ..tasks.task import task_named
from .targets import Target, default_slot_name

ORDINARY = "ort"


def publish(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    target: Target,
    split: int | None,
    given: Mapping[str, Any],
) -> Bundle:
    """Writes the bundle at ``source`` for ``target`` into ``out``; ``given`` are arguments of an export that
    no finished bundle takes.

    Raises:
        ConfigError: something else than the target was asked for.
        FormatError: a file of the bundle was altered, is missing, or is not in its manifest.
        Unsupported: the target cannot run it.
    """
    if target.name == ORDINARY:
        raise ConfigError(
            "a bundle is exported already",
            where=source,
            remedy="name the checkpoint, or the .onnx file with --base CHECKPOINT",
        )
    if given:
        raise ConfigError(
            "a finished bundle is given to a target as it is",
            where=source,
            found=", ".join(given),
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
    target.require(bundle.mode, task_named(bundle.task))
    require_files(place, bundle, "cached")
    if extra := unlisted(place, bundle):
        raise FormatError(
            "a file in the bundle is not in its manifest",
            where=place / extra[0],
            remedy="remove it, or export again",
        )
    with output_folder(out) as root:
        folder = root / target.place(bundle)
        copy_folder(place, folder)
        (folder / SIGNATURE).unlink(missing_ok=True)  # it is one of other bytes
        target.write(folder, bundle)
        dataclasses.replace(bundle, target=target.name).write(folder)
        if target.finish is not None:
            target.finish(folder, split)
    return read_bundle(bundle_in(out))
