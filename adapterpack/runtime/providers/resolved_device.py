"""Resolves a device to ONNX Runtime's providers and session options, and checks that the provider is
available.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path

import onnxruntime as ort

from ...errors import ConfigError, ProviderError
from ...library_errors import library_errors
from ...readable import things
from .builtin import has_device
from .device import Device
from .provider import CPU, PROVIDERS, Provider, get_provider

_OURS = {"provider", "allow_cpu_nodes", "options", "threads", "spinning"}
"""Fields of a device that every provider supports."""
_SETTINGS = tuple(one.name for one in fields(Device) if one.name not in _OURS)


@dataclass(frozen=True, eq=False)
class ResolvedDevice:
    """A device whose provider is available. ``providers`` are ONNX Runtime's names with their options, in the
    order in which they take nodes; ``hardware`` is where the first one runs if it is a plugin.
    """

    device: Device
    provider: Provider
    providers: tuple[tuple[str, Mapping[str, str]], ...]
    hardware: ort.OrtEpDevice | None = None

    @property
    def memory(self) -> tuple[str, int]:
        """Where arrays stay between runs: device name and number, as ``OrtValue`` takes them."""
        return self.provider.memory, (self.device.device_id or 0) if self.provider.memory != "cpu" else 0

    @property
    def captures(self) -> bool:
        """Whether the engine's steps are captured as CUDA graphs."""
        return bool(self.device.capture)

    def without_capture(self) -> ResolvedDevice:
        """Returns the device without capture, for graphs whose runs vary in shape."""
        return resolve(replace(self.device, capture=None)) if self.captures else self

    def session_options(self) -> ort.SessionOptions:
        """Makes the options of a session on this device."""
        options = ort.SessionOptions()
        # Its errors are raised anyway, and its log would print untrusted names unescaped.
        options.log_severity_level = 4
        options.intra_op_num_threads = self.device.threads or 0
        for name, value in self.provider.session.items():
            setattr(options, name, value)
        if self.device.spinning is not None:
            options.add_session_config_entry(
                "session.intra_op.allow_spinning", str(int(self.device.spinning))
            )
        if self.provider.runtime_name != CPU:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        return options

    def open(self, graph: Path | bytes, options: ort.SessionOptions) -> ort.InferenceSession:
        """Opens a session of a graph on the device."""
        if self.hardware is None:
            return ort.InferenceSession(graph, options, providers=list(self.providers), enable_fallback=0)
        options.add_provider_for_devices([self.hardware], dict(self.providers[0][1]))
        return ort.InferenceSession(graph, options, enable_fallback=0)

    def require(self, session: ort.InferenceSession) -> str:
        """Returns the provider that runs a session, after checking that it is the requested one: ONNX Runtime
        falls back to the CPU without an error.

        Raises:
            ProviderError: another provider runs the session.
        """
        running = str(session.get_providers()[0])
        wanted = self.provider.runtime_name
        if running != wanted:
            raise ProviderError(
                "the provider did not start",
                expected=wanted,
                found=running,
                remedy="check its driver and its libraries, or choose --provider cpu",
            )
        return running


def resolve(device: Device) -> ResolvedDevice:
    """Resolves a device; without a provider name that is CUDA if there is a GPU, and otherwise the CPU.

    Raises:
        ProviderError: the name is unknown, there is no GPU, or this build of ONNX Runtime lacks the provider.
        ConfigError: the provider has no such setting.

    Example:
        >>> resolve(Device(provider="cpu")).providers
        (('CPUExecutionProvider', {}),)
    """
    available = ort.get_available_providers()
    name = device.provider or (
        "cuda" if PROVIDERS["cuda"].runtime_name in available and has_device() else "cpu"
    )
    provider = get_provider(name)
    if (absent := provider.absent()) is not None:
        raise ProviderError(
            absent, expected=provider.runtime_name, remedy="check its driver, or choose --provider cpu"
        )
    hardware = None if provider.runtime_name in available else _plugin_device(provider, device)
    if provider.runtime_name not in available and hardware is None:
        raise ProviderError(
            "this build of ONNX Runtime does not have the provider",
            expected=provider.runtime_name,
            found=", ".join(available),
            remedy=(
                f"it comes with {provider.source}; install one build alone, since builds of ONNX Runtime "
                "overwrite each other"
            ),
        )
    if provider.memory == "cuda":
        ort.preload_dlls()
    # Of a plugin's devices, one was chosen by its number.
    first = (
        provider.runtime_name,
        _options(device if hardware is None else replace(device, device_id=None), provider),
    )
    others = [
        (PROVIDERS[other].runtime_name, _options(Device(device_id=device.device_id), PROVIDERS[other]))
        for other in provider.behind
    ]
    return ResolvedDevice(
        device, provider, (first, *others, *([] if provider.runtime_name == CPU else [(CPU, {})])), hardware
    )


def _plugin_device(provider: Provider, device: Device) -> ort.OrtEpDevice | None:
    """Returns the hardware that a provider's plugin finds, the first or that of the device's number; None if
    the plugin is not installed. ONNX Runtime loads the plugin once in a process.
    """
    if not provider.has_plugin:
        return None
    found = _hardware(provider)
    if not found:
        library = import_module(provider.plugin).get_library_path()
        with library_errors(
            "onnxruntime", "the provider's plugin cannot be loaded", where=library, kind=ProviderError
        ):
            ort.register_execution_provider_library(provider.plugin, library)
        found = _hardware(provider)
    number = device.device_id or 0
    if number >= len(found):
        raise ProviderError(
            "the provider's plugin finds no such device here",
            expected=f"device {number}",
            found=things(len(found), "device"),
            remedy="check its driver, or choose --provider cpu",
        )
    return found[number]


def _hardware(provider: Provider) -> list[ort.OrtEpDevice]:
    return [one for one in ort.get_ep_devices() if one.ep_name == provider.runtime_name]


def _options(device: Device, provider: Provider) -> dict[str, str]:
    options = dict(provider.options)
    for name in (*_SETTINGS, "threads"):
        value = getattr(device, name)
        if value is None or (name == "threads" and name not in provider.settings):
            continue
        if name not in provider.settings:
            raise ConfigError(
                f"the provider {provider.name} has no setting {name}",
                found=repr(value),
                expected=", ".join(sorted(provider.settings)) or "none",
                remedy="leave it out",
            )
        options |= provider.settings[name](value)
    return options | dict(device.options)
