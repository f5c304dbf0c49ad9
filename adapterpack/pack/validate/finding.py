"""Defines a rule of the validator, and a finding of that rule at a place."""

from __future__ import annotations

from typing import Any, NamedTuple

from ...base.compatibility import Verdict
from ...errors import AdapterpackError, FormatError


class Finding(NamedTuple):
    """One thing that a check found: a stable rule id, how bad it is, where, and what to do.

    ``where`` is for people; ``file`` with ``pointer`` (a JSON pointer) or ``offset`` (in bytes) is the same
    place for programs.
    """

    rule: str
    severity: str
    where: str
    message: str
    fix: str = ""
    error: type[AdapterpackError] = FormatError
    file: str | None = None
    pointer: str | None = None
    offset: int | None = None

    def as_error(self, kind: str, path: object) -> AdapterpackError:
        """The error to raise where this finding makes the artifact at ``path``, a pack or a bundle,
        unusable.
        """
        where = self.where if self.where.startswith(str(path)) else f"{path}, {self.where}"
        return self.error(
            f"the {kind} is not valid, {self.rule}: {self.message}".rstrip("."),
            where=where,
            remedy=self.fix or None,
        )

    def to_json(self) -> dict[str, Any]:
        """The finding as JSON prints it."""
        return {
            key: getattr(self, key)
            for key in ("rule", "severity", "where", "message", "fix", "file", "pointer", "offset")
        }


class CheckRule(NamedTuple):
    """A stable id, how bad a breach is, what must hold, what to do about a breach, and the error that loading
    raises.
    """

    id: str
    severity: str
    holds: str
    fix: str
    error: type[AdapterpackError] = FormatError

    def at(
        self,
        where: object,
        message: str,
        *,
        fix: str | None = None,
        file: str | None = None,
        pointer: str | None = None,
        offset: int | None = None,
    ) -> Finding:
        """A breach of this rule."""
        return Finding(
            self.id,
            self.severity,
            str(where),
            message,
            self.fix if fix is None else fix,
            self.error,
            file,
            pointer,
            offset,
        )


class Report(NamedTuple):
    """What validation says of one artifact: its state, why, and which questions it left open.

    ``incomplete``: a check that was asked for could not be made, for want of time, memory or a base.
    ``base``: what is known about the base that was named being the artifact's own.
    """

    kind: str
    path: str
    id: str | None
    findings: tuple[Finding, ...]
    not_checked: tuple[str, ...] = ()
    incomplete: bool = False
    base: Verdict | None = None

    @property
    def valid(self) -> bool:
        """No finding is an error."""
        return not any(finding.severity == "error" for finding in self.findings)

    def require_valid(self) -> None:
        """Raises the first finding that is an error, if there is one."""
        for finding in self.findings:
            if finding.severity == "error":
                raise finding.as_error(self.kind, self.path)

    @property
    def state(self) -> str:
        """``valid``, ``invalid`` or ``not fully checked``; an error outweighs a check that is missing."""
        return "invalid" if not self.valid else "not fully checked" if self.incomplete else "valid"

    def to_json(self) -> dict[str, Any]:
        """The report as ``validate --json`` prints it."""
        return {
            "kind": self.kind,
            "path": self.path,
            "id": self.id,
            "state": self.state,
            "base": None if self.base is None else self.base.to_json(),
            "findings": [finding.to_json() for finding in self.findings],
            "not_checked": list(self.not_checked),
        }
