"""A hollow CUDA: libraries with the names that ONNX Runtime's CUDA provider loads, for machines without a
card.

The provider itself, its options, its registry of kernels, the placement of nodes, its memory and copies are
real and ONNX Runtime's own; nothing is computed. ``python tests/hollow/cuda.py FOLDER CMD...`` runs a command
on it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
PROVIDERS = ("cuda", "tensorrt")
TOOLS = ("cc", "readelf")
"""What it takes to build it."""
LIBRARIES = (
    "libcuda.so.1",
    "libcudart.so.13",
    "libcublas.so.13",
    "libcublasLt.so.13",
    "libcurand.so.10",
    "libcudnn.so.9",
    "libnvinfer.so.10",
    "libnvonnxparser.so.10",
)


def provider_libraries() -> list[Path]:
    """ONNX Runtime's libraries of the providers, where the installed build has them."""
    spec = find_spec("onnxruntime")
    assert spec is not None and spec.origin is not None
    paths = [Path(spec.origin).parent / "capi" / f"libonnxruntime_providers_{name}.so" for name in PROVIDERS]
    return [path for path in paths if path.is_file()]


def build(folder: Path) -> Path:
    """Compiles the libraries into a folder, for ``LD_LIBRARY_PATH``."""
    names: set[str] = set()
    for library in provider_libraries():
        table = subprocess.run(
            ["readelf", "-W", "--dyn-syms", library], check=True, capture_output=True, text=True, timeout=60
        ).stdout
        names |= set(re.findall(r" UND (\w+)@lib(?:cu\w+)\.so", table)) | set(
            re.findall(r" UND (cu[A-Z]\w+|\w+_INTERNAL)$", table, re.M)
        )
    written = (HERE / "cuda.c").read_text("utf-8")
    empty = sorted(name for name in names if not re.search(rf"\b{name}\b", written))
    (folder / "empty.c").write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in empty))
    (folder / "none.c").touch()
    _compile(folder / "hollow.so", HERE / "cuda.c", folder / "empty.c")
    for name in LIBRARIES:
        (folder / "versions").write_text(f"{name} {{ global: *; }};\n")
        _compile(
            folder / name,
            folder / "none.c",
            f"-Wl,-soname,{name}",
            f"-Wl,--version-script={folder / 'versions'}",
            "-Wl,--no-as-needed",
            f"-Wl,-rpath,{folder}",
            folder / "hollow.so",
        )
    return folder


def environment(folder: Path) -> dict[str, str]:
    """The variables of a process that takes the libraries of that folder for CUDA's."""
    return {**os.environ, "LD_LIBRARY_PATH": str(folder)}


def _compile(out: Path, *what: object) -> None:
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-w", "-o", str(out), *map(str, what)], check=True, timeout=60
    )


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    sys.exit(subprocess.run(sys.argv[2:], env=environment(build(place)), check=False).returncode)
