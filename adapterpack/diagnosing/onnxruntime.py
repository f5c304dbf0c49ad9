"""Checks ONNX Runtime: its build, and which of its providers start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..runtime.providers import PROVIDERS
from ..runtime.providers.provider import CPU, Provider
from .finding import CheckProblem, CheckResult
from .packages import list_requirements, providers_of
from .start_provider import ask_onnxruntime

_PACKAGE = "onnxruntime"


def check_onnxruntime() -> CheckResult:
    """Reports the build of ONNX Runtime, the providers that it lists, and whether each starts."""
    packages = providers_of(_PACKAGE)
    facts: dict[str, Any] = {"packages": [f"{name} {version}" for name, version in packages.items()]}
    problems = [_explain_overlap(packages)] if len(packages) > 1 else []
    build, failure = ask_onnxruntime()
    if build is None:
        remedy = f"pip install --force-reinstall {_choose(packages)}"
        return CheckResult(
            facts,
            (*problems, CheckProblem(f"ONNX Runtime cannot be imported: {failure}", remedy, broken=True)),
        )
    facts |= {"version": build["version"], "build": build["package"], "cuda": build["cuda"]}
    ours = {provider.runtime_name: provider for provider in PROVIDERS.values()}
    rows = []
    for name in build["providers"]:
        provider = ours.get(name)
        state, problem = ("not one that adapterpack uses", None) if provider is None else _start(provider)
        rows.append({"provider": name, "name": provider and provider.name, "state": state})
        problems += [problem] if problem else []
    return CheckResult({**facts, "providers": rows}, tuple(problems))


def _explain_overlap(packages: Mapping[str, str]) -> CheckProblem:
    """Explains that several builds of ONNX Runtime share file names, so that the last installed has
    overwritten parts of the others.
    """
    keep = _choose(packages)
    return CheckProblem(
        f"{' and '.join(packages)} are installed over each other: both have the module {_PACKAGE}, and what "
        "came last has overwritten files of the other",
        f"pip uninstall -y {' '.join(packages)} && pip install {keep}",
        broken=True,
    )


def _choose(packages: Mapping[str, str]) -> str:
    """Returns the package to keep: the one that adapterpack requires here, or its installed replacement."""
    asked_for = next((one.name for one in list_requirements() if one.name.startswith(_PACKAGE)), _PACKAGE)
    return asked_for if asked_for in packages or not packages else next(iter(packages))


def _start(provider: Provider) -> tuple[str, CheckProblem | None]:
    absent = provider.absent()
    if absent is not None:
        return f"not here: {absent}", None
    answer, failure = ask_onnxruntime(provider.name)
    if answer is not None:
        return "starts", None
    needed = provider.runtime_name == CPU
    remedy = (
        "install ONNX Runtime again"
        if needed
        else f"it comes with {provider.source}; --provider cpu does without it"
    )
    # A GPU build lists TensorRT even without its libraries: only a provider that this machine would choose is
    # broken.
    return f"does not start: {failure}", CheckProblem(
        f"{provider.runtime_name} does not start: {failure}", remedy, broken=needed or provider.name == "cuda"
    )
