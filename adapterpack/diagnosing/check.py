"""What a check of the installation is: a value that looks at one thing, and says what it found and what to do
about it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..registry import Registry


@dataclass(frozen=True)
class Problem:
    """Something that is not as it could be, and what to do. ``broken`` says that a part of adapterpack does
    not work with it.
    """

    what: str
    remedy: str
    broken: bool = False


@dataclass(frozen=True)
class Looked:
    """What a check found: ``facts`` are JSON values by name, which people read as they are."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    @property
    def state(self) -> str:
        """``good``, ``note`` where something could be better, or ``broken``.

        Example:
            >>> Looked(problems=(Problem("the disk is nearly full", "free some space"),)).state
            'note'
        """
        return (
            "broken"
            if any(problem.broken for problem in self.problems)
            else "note"
            if self.problems
            else "good"
        )


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check: ``title`` is what it looks at, in words, and ``rank`` its place among the others. One with
    ``network`` runs on request.
    """

    name: str
    title: str
    rank: int
    look: Callable[[], Looked]
    network: bool = False


CHECKS: Registry[Check] = Registry(
    "check of the installation", Check, "adapterpack.checks", "adapterpack.diagnosing.checks"
)
"""Name -> check. A module of the folder ``checks`` registers the one that it defines."""
