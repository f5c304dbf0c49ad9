"""``adapterpack.doctor``: runs every check; a check that raises becomes a finding instead of ending the
run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import printable
from .caches import check_caches
from .finding import CheckProblem, CheckResult
from .hub import check_hub
from .machine import check_cuda, check_disk, check_kernels, check_threads
from .onnxruntime import check_onnxruntime
from .packages import check_dependencies, check_extras, check_plugins, check_python

CHECKS: Mapping[str, tuple[str, Callable[[], CheckResult]]] = {
    "python": ("Python and system", check_python),
    "dependencies": ("Libraries", check_dependencies),
    "onnxruntime": ("ONNX Runtime", check_onnxruntime),
    "cuda": ("CUDA", check_cuda),
    "threads": ("Processors and threads", check_threads),
    "kernels": ("Compiled kernels", check_kernels),
    "extras": ("Extras", check_extras),
    "plugins": ("Plugins", check_plugins),
    "caches": ("Caches", check_caches),
    "disk": ("Disk", check_disk),
    "hub": ("Hub", check_hub),
}
"""Name -> the title and the check, in running order; the hub check runs only on request."""


@dataclass(frozen=True)
class Diagnosis:
    """The results of the checks by name, in their order; ``titles`` maps the names to titles."""

    found: Mapping[str, CheckResult]
    titles: Mapping[str, str]

    @property
    def usable(self) -> bool:
        """Whether no check found a broken part."""
        return all(finding.state != "broken" for finding in self.found.values())

    def to_json(self) -> dict[str, Any]:
        """Returns the diagnosis as ``adapterpack doctor --json`` prints it.

        Example:
            >>> Diagnosis({}, {}).to_json()
            {'usable': True, 'checks': []}
        """
        return {
            "usable": self.usable,
            "checks": [
                {
                    "name": name,
                    "title": self.titles[name],
                    "state": finding.state,
                    "facts": dict(finding.facts),
                    "problems": [
                        {"what": one.what, "remedy": one.remedy, "broken": one.broken}
                        for one in finding.problems
                    ],
                }
                for name, finding in self.found.items()
            ],
        }


def doctor(*, hub: bool = False, progress: Callable[[str], None] | None = None) -> Diagnosis:
    """Checks this installation of adapterpack: versions, providers, libraries, kernels, extras, caches, disk.

    ``hub`` asks also whether the hub can be reached; nothing else touches the network. ``progress`` is called
    with each title. No check raises: what is wrong stands in the diagnosis, with what to do.

    Example:
        >>> diagnosis = doctor()
        >>> diagnosis.found["kernels"].state in ("good", "note")
        True
    """
    chosen = {name: check for name, check in CHECKS.items() if hub or name != "hub"}
    found = {}
    for name, (title, check) in chosen.items():
        if progress is not None:
            progress(title)
        found[name] = _run(check)
    return Diagnosis(found, {name: title for name, (title, _) in chosen.items()})


def _run(check: Callable[[], CheckResult]) -> CheckResult:
    try:
        return check()
    # doctor has to work in installations that are broken in unforeseen ways
    except Exception as error:
        reason = printable(f"{type(error).__name__}: {error}").replace("\n", " ")
        problem = CheckProblem(
            f"the check itself failed ({reason})", "fix what the message names, and run doctor again", True
        )
        return CheckResult(problems=(problem,))
