"""Execution providers: chosen explicitly, checked after the session opens, reported."""

from __future__ import annotations

import ctypes
import sys

import onnxruntime as ort

from ..errors import ProviderError, nearest

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}


def choose(name: str | None) -> list[str]:
    """The provider list for a session: CUDA then CPU for ``cuda``, CPU alone for ``cpu``; None takes CUDA where there is one.

    Raises:
        ProviderError: an unknown name, no device, or a provider that this build of ONNX Runtime does not have.

    Example:
        >>> choose("cpu")
        ['CPUExecutionProvider']
    """
    available = ort.get_available_providers()
    if name is None:
        name = "cuda" if PROVIDERS["cuda"] in available and has_device() else "cpu"
    if name not in PROVIDERS:
        raise ProviderError("unknown provider", found=repr(name), remedy=nearest(name, PROVIDERS))
    if name == "cuda" and not has_device():
        raise ProviderError("there is no CUDA device here, or its driver does not answer", expected=PROVIDERS["cuda"],
                            remedy="check nvidia-smi, or choose --provider cpu")
    if PROVIDERS[name] not in available:
        raise ProviderError("this build of ONNX Runtime does not have the provider", expected=PROVIDERS[name], found=", ".join(available),
                            remedy="install adapterpack[cuda], and see that onnxruntime is not installed together with onnxruntime-gpu")
    if name == "cuda":
        ort.preload_dlls()
    return [PROVIDERS[name]] if name == "cpu" else [PROVIDERS["cuda"], PROVIDERS["cpu"]]


def require(session: ort.InferenceSession, wanted: list[str]) -> str:
    """The provider that runs; ONNX Runtime falls back to the CPU without an error, so this looks.

    Raises:
        ProviderError: the first provider of ``wanted`` did not start.
    """
    running = session.get_providers()
    if running[0] != wanted[0]:
        raise ProviderError("the provider did not start", expected=wanted[0], found=running[0],
                            remedy="check the driver and the CUDA and cuDNN libraries, or choose --provider cpu")
    return str(running[0])


def has_device() -> bool:
    """Whether the CUDA driver is here and has a device: ONNX Runtime itself lists what it was built with."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
