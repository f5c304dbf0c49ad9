"""Builds the one compiled part of the package where there is a compiler; without one the package is all Python, and as right."""

from __future__ import annotations

import os
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("adapterpack/merge/lowrank")
# Contraction makes every multiply-add a fused one, which is what the kernel promises.
FLAGS = ["-O3", "-ffp-contract=fast", "-Wno-psabi"]


class CustomBuildHook(BuildHookInterface):
    """Compiles the kernel against the stable ABI, so that one wheel serves every Python from 3.11 on."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the kernel to the wheel, or says why it is not there."""
        if os.environ.get("ADAPTERPACK_PURE"):
            return
        try:
            compile_in_place(Path(self.root))
        except Exception as error:  # no compiler, no headers, another kind of compiler: whatever it is, numpy does the same
            self.app.display_warning(f"adapterpack's kernel for merges was not compiled, numpy will do its work: {error}")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"cp311-abi3-{platform}"
        build_data["artifacts"].append(f"/{FOLDER}/_kernel*.so")


def compile_in_place(root: Path) -> None:
    """Compiles the kernel and puts it beside its source, in one step: a running process may have the one before mapped."""
    from setuptools import Distribution, Extension  # noqa: PLC0415 - only where something is compiled
    from setuptools.command.build_ext import build_ext  # noqa: PLC0415

    source = str(root / FOLDER / "_kernel.c")
    with tempfile.TemporaryDirectory(dir=root / FOLDER) as folder:
        extension = Extension("_kernel", [source], extra_compile_args=FLAGS, py_limited_api=True)
        command = build_ext(Distribution({"name": "adapterpack", "ext_modules": [extension]}))
        command.build_temp, command.build_lib = folder, folder
        command.ensure_finalized()
        command.run()
        built = Path(command.get_ext_fullpath("_kernel"))
        built.replace(root / FOLDER / built.name)


if __name__ == "__main__":
    compile_in_place(Path(__file__).parent.resolve())
