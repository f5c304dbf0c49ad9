"""Checks the machine: GPUs, processors, compiled kernels, disks."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
import warnings
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from .._native import build
from .._native.loading import load
from ..io import cache_folder
from ..io.threads import cores
from ..readable import size
from .finding import CheckProblem, CheckResult
from .packages import providers_of

_LISTED = 64
"""The most GPUs to list."""


def check_cuda() -> CheckResult:
    """Reports the NVIDIA GPUs and CUDA libraries of this machine."""
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
        return CheckResult({"driver": None, "cards": [], **facts})
    if (code := driver.cuInit(0)) != 0:
        found = CheckProblem(
            f"the CUDA driver is installed and does not start (error {code})",
            "look whether nvidia-smi works, and update the driver",
        )
        return CheckResult({"driver": "does not start", "cards": [], **facts}, (found,))
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGetCount(ctypes.byref(count))
    cards = [_card(driver, number) for number in range(min(count.value, _LISTED))]
    problems = []
    if cards and sys.platform != "darwin" and not {"onnxruntime-gpu"} & providers_of("onnxruntime").keys():
        problems.append(
            CheckProblem(
                "there is a card, and the installed build of ONNX Runtime is not the one for CUDA",
                "pip uninstall -y onnxruntime && pip install 'adapterpack[cuda]'",
            )
        )
    return CheckResult(
        {"driver": f"for CUDA {version.value // 1000}.{version.value % 1000 // 10}", "cards": cards, **facts},
        tuple(problems),
    )


def _card(driver: Any, number: int) -> dict[str, Any]:
    device = ctypes.c_int(0)
    name = ctypes.create_string_buffer(256)
    memory = ctypes.c_size_t(0)
    driver.cuDeviceGet(ctypes.byref(device), number)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    return {"device_id": number, "card": name.value.decode("utf-8", "replace"), "memory": size(memory.value)}


_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def check_threads() -> CheckResult:
    """Reports the threads of a computation, and the share of the processors that this process may use."""
    usable = cores()
    quota = _quota()
    facts = {
        "processors": os.cpu_count(),
        "usable": usable,
        "quota": quota,
        "variables": [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ],
    }
    if quota is None or quota >= usable:
        return CheckResult(facts)
    least = max(1, round(quota))
    return CheckResult(
        facts,
        (
            CheckProblem(
                f"this container may use {quota:g} processors and sees {usable}: libraries start a thread "
                "for each of these, which then wait for each other",
                f"give --threads {least}, and set OMP_NUM_THREADS={least}",
            ),
        ),
    )


def _quota() -> float | None:
    """Returns the processor seconds per second that the container may use; None without a limit, or if it
    cannot be read.
    """
    with suppress(OSError, ValueError):
        allowed, period = _QUOTA.read_text("ascii").split()
        return None if allowed == "max" else int(allowed) / int(period)
    return None


_AGAIN = "install adapterpack again where there is a C compiler; merges and rows with adapters are slower now"


def check_kernels() -> CheckResult:
    """Reports whether the compiled kernels are in use."""
    facts = {}
    problems = []
    for module in build.MODULES:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            used = load(module) is not None
        facts[module.removeprefix("_")] = "compiled" if used else "not compiled"
        if said:  # a kernel file exists, but was built from other sources or for another machine
            what, _, remedy = str(said[0].message).partition(" To fix it: ")
            problems.append(CheckProblem(what.rstrip("."), remedy or _AGAIN))
        elif not used:
            problems.append(
                CheckProblem(
                    f"the kernel {module.removeprefix('_')} is not compiled, or not for a processor "
                    "like this one",
                    _AGAIN,
                )
            )
    return CheckResult({**facts, "sources": build.source_hash()}, tuple(problems))


_LITTLE = 1 << 30
"""Bytes of free space below which not even a small model fits."""


def check_disk() -> CheckResult:
    """Reports the free space where adapterpack writes, and whether it may write there."""
    rows, problems = [], []
    for use, wanted in (
        ("caches", cache_folder()),
        ("temporary files", Path(tempfile.gettempdir())),
        ("this folder", Path.cwd()),
    ):
        # the folder is created when it is needed: check its nearest existing parent
        there = next(path for path in (wanted, *wanted.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        writable = os.access(there, os.W_OK | os.X_OK)
        rows.append(
            {"for": use, "folder": str(wanted), "free": size(free), "bytes": free, "writable": writable}
        )
        if not writable and use != "this folder":
            problems.append(
                CheckProblem(
                    f"{wanted}, for {use}, cannot be written",
                    "set ADAPTERPACK_CACHE to a folder of yours"
                    if use == "caches"
                    else "set TMPDIR to a folder of yours",
                )
            )
        elif free < _LITTLE:
            problems.append(
                CheckProblem(
                    f"{wanted}, for {use}, has {size(free)} left",
                    "free some space, or: adapterpack doctor --clean",
                )
            )
    return CheckResult({"folders": rows}, tuple(problems))
