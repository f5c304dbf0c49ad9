"""The tests of the installed PEFT, from its source package: fetched through pip and kept in the user's cache
folder.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from adapterpack.errors import OutputExists
from adapterpack.io import cache_folder
from adapterpack.io.atomic import output_folder

_MEMBER = re.compile(r"peft-[0-9A-Za-z.]+/tests/([A-Za-z0-9_]+\.py)")
_LARGEST = 4 << 20
"""Bytes of one file of tests; the largest of 0.21 has 0.3 MB."""


def version() -> str:
    """The version of the installed PEFT."""
    return importlib.metadata.version("peft")


def tests_folder() -> Path:
    """The folder with the Python files of PEFT's tests, fetched on first use.

    pip compares the archive with the sha256 that the package index states, and goes through the user's own
    settings of it.

    Raises:
        SystemExit: the package index cannot be reached, or has no source package of that version.
    """
    target = cache_folder() / f"peft-{version()}-tests"
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(prefix="peft-source-") as scratch:
        archive = _download(Path(scratch))
        # a second process may have been faster
        with contextlib.suppress(OutputExists), output_folder(target) as folder:
            _unpack(archive, folder)
    return target


def _download(scratch: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-binary",
        "peft",
        "--dest",
        str(scratch),
        f"peft=={version()}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(scratch.glob("peft-*.tar.gz"))
    if done.returncode or len(archives) != 1:
        raise SystemExit(
            f"the source package of peft {version()} could not be fetched: this needs a package index that "
            "pip reaches.\n"
            f"{done.stderr.strip()}"
        )
    return archives[0]


def _unpack(archive: Path, folder: Path) -> None:
    """The files of tests by their own plain names; nothing else of the archive is written."""
    with tarfile.open(archive) as source:
        for member in source:
            named = _MEMBER.fullmatch(member.name)
            if named is None or not member.isfile() or member.size > _LARGEST:
                continue
            content = source.extractfile(member)
            assert content is not None
            (folder / named[1]).write_bytes(content.read())
