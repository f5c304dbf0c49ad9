"""Writes the table of the kernels of ONNX Runtime's CUDA provider, read off the registry of the installed
build.

Where there is a card: ``python benchmarks/cuda_kernels.py``. Elsewhere on the hollow CUDA, whose registry is the
same: ``python tests/hollow/cuda.py FOLDER python benchmarks/cuda_kernels.py``. ONNX Runtime's list needs every
provider of the build to load.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

import adapterpack.runtime.providers as package

ENDLESS = 2**31 - 1


def table(provider: str) -> dict[str, object]:
    """The kernels of a provider, by operator: first and last version (null: open), and the types of each
    parameter.
    """
    kernels: dict[str, list[tuple[int, int | None, dict[str, list[str]]]]] = {}
    for kernel in runtime.get_all_opkernel_def():
        if kernel.provider != provider:
            continue
        first, last = kernel.version_range
        domain = "" if kernel.domain in ("", "ai.onnx") else f"{kernel.domain}."
        kinds = {
            name: sorted(kind.removeprefix("tensor(").removesuffix(")") for kind in kinds)
            for name, kinds in sorted(kernel.type_constraints.items())
        }
        kernels.setdefault(domain + kernel.op_name, []).append(
            (first, None if last == ENDLESS else last, kinds)
        )
    return {
        "provider": provider,
        "onnxruntime": ort.__version__,
        "kernels": {name: sorted(kernels[name], key=repr) for name in sorted(kernels)},
    }


def written(provider: str) -> str:
    """The table as the text of its file: an operator a line."""
    found = table(provider)
    lines = ",\n".join(
        f"{json.dumps(name)}:{json.dumps(kernels, separators=(',', ':'))}"
        for name, kernels in found["kernels"].items()
    )  # type: ignore[attr-defined]
    return f'{{"provider":"{provider}","onnxruntime":"{found["onnxruntime"]}","kernels":{{\n{lines}\n}}}}\n'


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(package.__path__[0]) / "cuda_kernels.json"
    out.write_text(written("CUDAExecutionProvider"), "utf-8")
    print(f"wrote {out}")
