"""Compiles the kernels of this folder.

The package's build does it (``hatch_build.py``); after a change of the C sources ``python
adapterpack/_native/build.py`` does it again. This file imports the standard library alone: a build runs
before the package and its dependencies are installed.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODULES = {"_lowrank": "fast", "_row_lora": "off", "_ragged_attention": "off", "_quantized_matmul": "off"}
"""The modules, and whether multiplications and additions are fused in them: each source says how it
rounds.
"""
FLAGS = ["-O3", "-Wno-psabi"]


def source_hash() -> str:
    """Returns the hash of the C sources and of the compiler's options, which each compiled module stores.

    Example:
        >>> len(source_hash())
        16
    """
    hasher = hashlib.sha256(repr((MODULES, FLAGS)).encode())
    for path in sorted(HERE.glob("*.[ch]")):
        data = path.read_bytes()
        hasher.update(f"\0{path.name}\0{len(data)}\0".encode() + data)
    return hasher.hexdigest()[:16]


def missing() -> str | None:
    """What this machine lacks to compile the kernels, None if nothing: then a failure is an error and no
    reason to do without them.
    """
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "")
    if not compiler:
        return "this Python was built by a compiler other than gcc and clang"
    if shutil.which(compiler[0]) is None:
        return f"there is no C compiler {compiler[0]}"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers (Python.h) are not installed"
    if find_spec("setuptools") is None:
        return "setuptools is not installed"
    return None


def compile_into(folder: Path) -> None:
    """Compiles every module against Python's stable ABI, so that one file serves each version from 3.11 on.

    Each file appears in one step, because a running process may have the one before mapped.
    """
    # setuptools is only needed to compile.
    from setuptools import Distribution, Extension  # type: ignore[import-untyped]  # noqa: PLC0415
    from setuptools.command.build_ext import build_ext  # type: ignore[import-untyped]  # noqa: PLC0415

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        extensions = [
            Extension(
                name,
                [str(HERE / f"{name}.c")],
                define_macros=[("SOURCE_HASH", source_hash())],
                extra_compile_args=[*FLAGS, f"-ffp-contract={contraction}"],
                py_limited_api=True,
            )
            for name, contraction in MODULES.items()
        ]
        command = build_ext(Distribution({"name": "adapterpack", "ext_modules": extensions}))
        command.build_temp = command.build_lib = scratch
        command.ensure_finalized()
        command.run()
        for extension in extensions:
            built = Path(command.get_ext_fullpath(extension.name))
            built.replace(folder / built.name)


def main() -> None:
    """Compiles into the folder that is named, by default into this one, or ends with what is wrong."""
    if lacking := missing():
        sys.exit(f"the kernels cannot be compiled: {lacking}")
    from setuptools.errors import CompileError, LinkError  # type: ignore[import-untyped]  # noqa: PLC0415

    try:
        compile_into(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
    # the compiler has said what, and where setuptools called it says nothing more
    except (CompileError, LinkError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
