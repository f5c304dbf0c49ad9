"""The result of a check of the installation: facts and problems."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CheckProblem:
    """A problem and its remedy. ``broken`` says that a part of adapterpack does not work because of it."""

    what: str
    remedy: str
    broken: bool = False


@dataclass(frozen=True)
class CheckResult:
    """The result of a check: ``facts`` are readable JSON values by name."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[CheckProblem, ...] = ()

    @property
    def state(self) -> str:
        """``good``, ``note`` if something could be better, or ``broken``.

        Example:
            >>> CheckResult(problems=(CheckProblem("the disk is nearly full", "free some space"),)).state
            'note'
        """
        return (
            "broken"
            if any(problem.broken for problem in self.problems)
            else "note"
            if self.problems
            else "good"
        )
