"""Builds the compiled parts of the package where there is a compiler; without one the package is all Python, and as right."""

from __future__ import annotations

import os
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# The sources, and whether multiply-adds are fused: each says of itself how it rounds.
SOURCES = {Path("adapterpack/merging/lowrank/_kernel.c"): "fast", Path("adapterpack/composing/passes/_passes.c"): "off",
           Path("adapterpack/composing/passes/_sweep.c"): "fast",
           Path("adapterpack/composing/grams/_grams.c"): "fast"}
FLAGS = ["-O3", "-Wno-psabi"]


class CustomBuildHook(BuildHookInterface):
    """Compiles the kernels against the stable ABI, so that one wheel serves every Python from 3.11 on."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the kernels to the wheel, or says why they are not there."""
        if os.environ.get("ADAPTERPACK_PURE"):
            return
        try:
            compile_in_place(Path(self.root))
        except Exception as error:  # no compiler, no headers, another kind of compiler: whatever it is, numpy does the same
            self.app.display_warning(f"adapterpack's kernels were not compiled, numpy will do their work: {error}")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"cp311-abi3-{platform}"
        build_data["artifacts"] += [f"/{source.with_suffix('')}*.so" for source in SOURCES]


def compile_in_place(root: Path) -> None:
    """Compiles the kernels and puts each beside its source, in one step: a running process may have the one before mapped."""
    from setuptools import Distribution, Extension  # noqa: PLC0415 - only where something is compiled
    from setuptools.command.build_ext import build_ext  # noqa: PLC0415

    for source, contraction in SOURCES.items():
        name, place = source.stem, root / source.parent
        with tempfile.TemporaryDirectory(dir=place) as folder:
            flags = [*FLAGS, f"-ffp-contract={contraction}"]
            extension = Extension(name, [str(root / source)], extra_compile_args=flags, py_limited_api=True)
            command = build_ext(Distribution({"name": "adapterpack", "ext_modules": [extension]}))
            command.build_temp, command.build_lib = folder, folder
            command.ensure_finalized()
            command.run()
            built = Path(command.get_ext_fullpath(name))
            built.replace(place / built.name)


if __name__ == "__main__":
    compile_in_place(Path(__file__).parent.resolve())
