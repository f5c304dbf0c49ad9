"""``adapterpack.doctor``: every check, one after the other; one that fails itself is a finding and not the
end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import printable
from .check import CHECKS, Check, Looked, Problem


@dataclass(frozen=True)
class Diagnosis:
    """What the checks found, by their names and in their order; ``titles`` are the names in words."""

    found: Mapping[str, Looked]
    titles: Mapping[str, str]

    @property
    def usable(self) -> bool:
        """Whether nothing is broken."""
        return all(looked.state != "broken" for looked in self.found.values())

    def to_json(self) -> dict[str, Any]:
        """The diagnosis as ``adapterpack doctor --json`` prints it.

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
                    "state": looked.state,
                    "facts": dict(looked.facts),
                    "problems": [
                        {"what": one.what, "remedy": one.remedy, "broken": one.broken}
                        for one in looked.problems
                    ],
                }
                for name, looked in self.found.items()
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
    chosen = sorted(
        (check for check in CHECKS.values() if hub or not check.network),
        key=lambda check: (check.rank, check.name),
    )
    found = {}
    for check in chosen:
        if progress is not None:
            progress(check.title)
        found[check.name] = _looked(check)
    return Diagnosis(found, {check.name: check.title for check in chosen})


def _looked(check: Check) -> Looked:
    try:
        return check.look()
    # an installation may be broken in ways that nobody thought of, and this is the command that must not be
    except Exception as error:
        reason = printable(f"{type(error).__name__}: {error}").replace("\n", " ")
        return Looked(
            problems=(
                Problem(
                    f"this could not be looked at ({reason})",
                    "mend what the message names, and ask again",
                    True,
                ),
            )
        )
