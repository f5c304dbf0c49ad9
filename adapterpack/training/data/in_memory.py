"""Hands rows that are in memory to a training, whose configuration names files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

from datasets import Dataset

from ...errors import ConfigError
from ...io import cache_folder, own_folder
from ...library_errors import library_errors
from ...tasks.data import Row

Rows = Sequence[Row] | Any
"""A list of rows, or a table of ``datasets``."""


@contextmanager
def rows_as_files(config: object, **rows: Rows | None) -> Iterator[list[str]]:
    """Yields overrides that name a file for each of the ``rows``, by setting; the files are in the cache
    while the block runs.

    Their paths are always the same for a configuration, so that an interrupted run can resume.

    Raises:
        ConfigError: they are no table.
    """
    folder = cache_folder() / "rows" / sha256(repr(config).encode()).hexdigest()
    given = {setting: some for setting, some in rows.items() if some is not None}
    try:
        yield [f"{name}={json.dumps(_write(some, name, folder))}" for name, some in given.items()]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(rows: Rows, setting: str, folder: os.PathLike[str]) -> str:
    """Writes rows as a file, and returns its path."""
    path = own_folder(own_folder(cache_folder() / "rows").joinpath(folder)) / f"{setting}.parquet"
    with library_errors("datasets", "these rows are no table", where=setting, kind=ConfigError):
        table = rows if isinstance(rows, Dataset) else Dataset.from_list(list(rows))
        table.to_parquet(path)
    return str(path)
