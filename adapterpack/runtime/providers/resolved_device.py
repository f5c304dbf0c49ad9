"""Resolves a device to ONNX Runtime's providers and session options, and checks that the provider is
available.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import onnxruntime as ort

from ...errors import ConfigError, ProviderError
from .builtin import has_device
from .device import Device
from .provider import CPU, PROVIDERS, Provider, get_provider

_OURS = {"provider", "allow_cpu_nodes", "options", "threads", "spinning"}
"""Fields of a device that every provider supports."""
_SETTINGS = tuple(one.name for one in fields(Device) if one.name not in _OURS)


@dataclass(frozen=True, eq=False)
class ResolvedDevice:
    """A device whose provider is available. ``providers`` are ONNX Runtime's names with their options, in the
    order in which they take nodes.
    """

    device: Device
    provider: Provider
    providers: tuple[tuple[str, Mapping[str, str]], ...]

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
    if provider.runtime_name not in available:
        raise ProviderError(
            "this build of ONNX Runtime does not have the provider",
            expected=provider.runtime_name,
            found=", ".join(available),
            remedy=(
                f"it comes with {provider.source}; install it alone, since builds of ONNX Runtime overwrite "
                "each other"
            ),
        )
    if provider.memory == "cuda":
        ort.preload_dlls()
    first = provider.runtime_name, _options(device, provider)
    others = [
        (PROVIDERS[other].runtime_name, _options(Device(device_id=device.device_id), PROVIDERS[other]))
        for other in provider.behind
    ]
    return ResolvedDevice(
        device, provider, (first, *others, *([] if provider.runtime_name == CPU else [(CPU, {})]))
    )


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
