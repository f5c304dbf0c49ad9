"""Which NVIDIA cards and CUDA libraries are here."""

from __future__ import annotations

import ctypes
import sys
from importlib.metadata import distributions
from typing import Any

from ...io.readable import size
from ..check import CHECKS, Check, Looked, Problem
from ..requirements import providers_of

_LISTED = 64
"""Cards that are looked at."""


def _look() -> Looked:
    wheels = sorted(
        {
            f"{one.name} {one.version}"
            for one in distributions()
            if str(one.name).startswith(("nvidia-", "tensorrt"))
        }
    )
    facts: dict[str, Any] = {"libraries": wheels}
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return Looked({"driver": None, "cards": [], **facts})
    if (code := driver.cuInit(0)) != 0:
        found = Problem(
            f"the CUDA driver is installed and does not start (error {code})",
            "look whether nvidia-smi works, and update the driver",
        )
        return Looked({"driver": "does not start", "cards": [], **facts}, (found,))
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGetCount(ctypes.byref(count))
    cards = [_card(driver, number) for number in range(min(count.value, _LISTED))]
    problems = []
    if cards and sys.platform != "darwin" and not {"onnxruntime-gpu"} & providers_of("onnxruntime").keys():
        problems.append(
            Problem(
                "there is a card, and the installed build of ONNX Runtime is not the one for CUDA",
                "pip uninstall -y onnxruntime && pip install 'adapterpack[cuda]'",
            )
        )
    return Looked(
        {"driver": f"for CUDA {version.value // 1000}.{version.value % 1000 // 10}", "cards": cards, **facts},
        tuple(problems),
    )


def _card(driver: Any, number: int) -> dict[str, Any]:
    device, name, memory = ctypes.c_int(0), ctypes.create_string_buffer(256), ctypes.c_size_t(0)
    driver.cuDeviceGet(ctypes.byref(device), number)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    return {"device_id": number, "card": name.value.decode("utf-8", "replace"), "memory": size(memory.value)}


CHECKS.register(Check(name="cuda", title="CUDA", rank=40, look=_look))
