"""Puts the compiled kernels of ``adapterpack/_native`` into a wheel, or, for an editable install, beside
their sources.

Where nothing can be compiled the package is all Python, and as right. Where a compiler is there and fails, so
does the build, with what the compiler said; ``ADAPTERPACK_PURE=1`` leaves the kernels out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("adapterpack", "_native")


class CustomBuildHook(BuildHookInterface):
    """Compiles the kernels for the wheel at hand; nothing is written into the source tree but by an editable
    install.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the kernels, or says why they are left out."""
        if os.environ.get("ADAPTERPACK_PURE"):
            return
        script = Path(self.root, FOLDER, "build.py")
        if lacking := _loaded(script).missing():
            self.app.display_warning(
                f"no kernels are compiled, so merges and rows with adapters are slower: {lacking}"
            )
            return
        if version == "editable":
            self._compile(script, script.parent)
            return
        self._scratch = tempfile.TemporaryDirectory()  # as long as the wheel is written
        out = Path(self._scratch.name)
        self._compile(script, out)
        build_data["pure_python"] = False
        build_data["tag"] = f"cp311-abi3-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["force_include"].update({str(file): str(FOLDER / file.name) for file in out.iterdir()})

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Removes what was compiled for a wheel."""
        if hasattr(self, "_scratch"):
            self._scratch.cleanup()

    def _compile(self, script: Path, out: Path) -> None:
        """In a process of its own, so that all that the compiler says can be shown."""
        run = subprocess.run(
            [sys.executable, "-P", str(script), str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if run.returncode:
            self.app.abort(
                f"{run.stdout}\nadapterpack's kernels could not be compiled; above is what the compiler "
                "said. To fix it: install a working gcc or clang, or set ADAPTERPACK_PURE=1 to do without "
                "them, more slowly."
            )


def _loaded(script: Path) -> ModuleType:
    """A module by its file: the package cannot be imported where it is built."""
    spec = spec_from_file_location("adapterpack_native_build", script)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
