"""Exports a base and packs once, into the user's cache, for commands that take them in place of a bundle."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..artifacts import kind_of
from ..bundle import read_bundle, require_files
from ..errors import AdapterpackError, ConfigError, OutputExists, storage_errors
from ..hub import folder_of
from ..io import Say, cache_folder, digest
from ..io.file_hashes import file_hashes
from ..pack import Pack, load
from ..paths import StrPath
from ..quantizing.graphs import require_no_options
from ..tasks import Task
from ..version import VERSION
from .arguments import ExportRequest, prepare
from .pipeline import export

_READY = ("bundle", "genai_folder")
"""The kinds of folders that are run as they are."""


def bundle_for(
    target: StrPath,
    packs: Sequence[Pack | StrPath] = (),
    *,
    progress: Say | None = None,
    accept: Callable[[Task], None] | None = None,
    **options: Any,
) -> Path:
    """Returns the folder of a bundle that ``target`` is, or that a base and ``packs`` are exported to in the
    user's cache, which ``adapterpack doctor --clean`` empties. The next call with the same files, names,
    options and version of adapterpack finds that bundle.

    A bundle is returned as it is, without the packs, which :meth:`adapterpack.Session.load` loads. Export a
    bundle of your own for production. ``accept`` gets the task before the export, and raises if it is not the
    caller's. ``options`` are those of :func:`adapterpack.export`.

    Raises:
        ConfigError: the target is an adapter, or options are given for a bundle.
        BaseMismatch, ParityError, Unsupported: see :func:`adapterpack.export`.

    Example:
        >>> adapterpack.serve(bundle_for("models/base", ["packs/tickets"]))  # doctest: +SKIP
    """
    folder = folder_of(target)
    kind = kind_of(folder)
    if kind in _READY:
        require_no_options("a bundle is exported already", **options)
        return folder
    if kind != "base":
        raise ConfigError(
            "an adapter comes after its base",
            where=target,
            expected="a base checkpoint, or a bundle",
            remedy="name the base first, and then its adapters: BASE PACK",
        )
    loaded = [pack if isinstance(pack, Pack) else load(folder_of(pack)) for pack in packs]
    with storage_errors(folder):
        files = {path.name: path for path in folder.iterdir() if path.is_file() and path.name[0] != "."}
    key = {
        "version": VERSION,
        "base": [folder.resolve().name, file_hashes(files)],
        "packs": [[pack.name, pack.id] for pack in loaded],
        "options": options,
    }
    out = cache_folder() / "exports" / digest(key)
    if out.is_dir():
        with suppress(AdapterpackError):
            require_files(out, read_bundle(out), "cached")
            return out
        with storage_errors(out):  # altered: made again
            shutil.rmtree(out)
    if accept is not None:
        accept(prepare(ExportRequest(folder, loaded, out, **options)).task)
    with suppress(OutputExists):  # another process was faster, with the same bytes
        export(folder, loaded, out, progress=progress, **options)
    return out
