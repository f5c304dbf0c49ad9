"""What a check of the installation says: the facts, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CheckProblem:
    """Something that is not as it could be, and what to do. ``broken`` says that a part of adapterpack does
    not work with it.
    """

    what: str
    remedy: str
    broken: bool = False


@dataclass(frozen=True)
class CheckResult:
    """What a check tells: ``facts`` are JSON values by name, which people read as they are."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[CheckProblem, ...] = ()

    @property
    def state(self) -> str:
        """``good``, ``note`` where something could be better, or ``broken``.

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
