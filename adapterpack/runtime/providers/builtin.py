"""The providers that have a wheel of ONNX Runtime, and where to get it.

Their options: https://onnxruntime.ai/docs/execution-providers/, and ``InferenceSession.get_provider_options``
for those of the installed build.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping
from typing import Any

from .device import ARENAS
from .provider import CPU, PROVIDERS, Provider


def has_device() -> bool:
    """Returns whether the CUDA driver is installed and finds a device. ONNX Runtime only lists the providers
    with which it was built.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _no_cuda() -> str | None:
    return None if has_device() else "there is no CUDA device here, or its driver does not answer"


def _option(name: str) -> Callable[[Any], Mapping[str, str]]:
    """Returns a converter of a setting to the provider option of that name; booleans become 0 or 1."""
    return lambda value: {name: str(int(value))}


_CUDA_WHEEL = "adapterpack[cuda] (onnxruntime-gpu with the CUDA libraries)"
_DEVICE_ID = {"device_id": _option("device_id")}

PROVIDERS.register(Provider(name="cpu", runtime_name=CPU, source="every build of ONNX Runtime"))
PROVIDERS.register(
    Provider(
        name="cuda",
        runtime_name="CUDAExecutionProvider",
        source=_CUDA_WHEEL,
        memory="cuda",
        settings={
            **_DEVICE_ID,
            "memory_limit": _option("gpu_mem_limit"),
            "tf32": _option("use_tf32"),
            "arena": lambda how: {"arena_extend_strategy": ARENAS[how]},
            "capture": _option("enable_cuda_graph"),
        },
        options={"use_tf32": "0"},  # TF32 would silently reduce float32 products to ten bits
        absent=_no_cuda,
    )
)
PROVIDERS.register(
    Provider(
        name="tensorrt",
        runtime_name="TensorrtExecutionProvider",
        source=f"{_CUDA_WHEEL}, and TensorRT's own libraries",
        memory="cuda",
        settings={**_DEVICE_ID, "memory_limit": _option("trt_max_workspace_size")},
        behind=("cuda",),
        absent=_no_cuda,
    )
)
PROVIDERS.register(
    Provider(
        name="openvino",
        runtime_name="OpenVINOExecutionProvider",
        source="onnxruntime-ep-openvino, a plugin of any build, or onnxruntime-openvino",
        plugin="onnxruntime_ep_openvino",
        settings={"threads": _option("num_of_threads")},
    )
)
PROVIDERS.register(
    Provider(
        name="dml",
        runtime_name="DmlExecutionProvider",
        source="onnxruntime-directml, on Windows",
        settings=_DEVICE_ID,
        session={"enable_mem_pattern": False},
    )
)
PROVIDERS.register(
    Provider(name="coreml", runtime_name="CoreMLExecutionProvider", source="onnxruntime, on macOS")
)
PROVIDERS.register(
    Provider(
        name="migraphx",
        runtime_name="MIGraphXExecutionProvider",
        source="AMD's own build of onnxruntime for ROCm",
        settings={**_DEVICE_ID, "memory_limit": _option("migraphx_mem_limit")},
    )
)
PROVIDERS.register(Provider(name="qnn", runtime_name="QNNExecutionProvider", source="onnxruntime-qnn"))
PROVIDERS.register(
    Provider(
        name="webgpu",
        runtime_name="WebGpuExecutionProvider",
        source="onnxruntime-ep-webgpu, a plugin of any build, or onnxruntime-webgpu",
        plugin="onnxruntime_ep_webgpu",
    )
)
PROVIDERS.register(
    Provider(
        name="xnnpack", runtime_name="XnnpackExecutionProvider", source="a build of ONNX Runtime of one's own"
    )
)
