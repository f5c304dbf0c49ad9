"""Defines a rule of the validator, a finding (a breach of a rule at a place), and the report of a
validation.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import NamedTuple

from ....base import Verdict
from ....errors import AdapterpackError, FormatError
from ....io import Json
from ....notebook import show


class Finding(NamedTuple):
    """One breach of a rule: a stable rule id, its severity, the place, and what to do.

    ``where`` names the place for people; ``file`` with ``pointer`` (a JSON pointer) or ``offset`` (in bytes)
    names it for programs.
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
        """Returns the error to raise if this finding makes the pack or bundle at ``path`` unusable."""
        where = self.where if self.where.startswith(str(path)) else f"{path}, {self.where}"
        return self.error(
            f"the {kind} is not valid, {self.rule}: {self.message}".rstrip("."),
            where=where,
            remedy=self.fix or None,
        )

    def to_json(self) -> Json:
        """Returns the finding as JSON values."""
        return {
            key: getattr(self, key)
            for key in ("rule", "severity", "where", "message", "fix", "file", "pointer", "offset")
        }


class CheckRule(NamedTuple):
    """A rule: a stable id, what must hold, what to do about a breach, how severe one is, and the error
    that loading raises.
    """

    id: str
    holds: str
    fix: str
    severity: str = "error"
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
        """Returns a breach of this rule at a place."""
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


def read_table(name: str) -> Json:
    """Returns a table of this folder."""
    return tomllib.loads((Path(__file__).parent / f"{name}.toml").read_text("utf-8"))


_RULES = read_table("rules")


def check_rule(name: str, error: type[AdapterpackError] = FormatError) -> CheckRule:
    """Returns the rule with this id, as ``rules.toml`` has it."""
    return CheckRule(name, error=error, **_RULES[name])


CHECK = check_rule("AP000")
UNREADABLE = check_rule("AP001")


def unreadable(error: AdapterpackError, folder: Path, rule: CheckRule = UNREADABLE) -> Finding:
    """Converts a reader's error to a finding, with the place that the error names."""
    path, _, pointer = (error.where or str(folder)).partition("#")
    name = Path(path.partition(",")[0]).name
    return rule._replace(error=type(error)).at(
        error.where or folder,
        error.placeless_sentence,
        fix=error.remedy or "",
        file=name if name != folder.name else None,
        pointer=pointer if pointer.startswith("/") else None,
    )


class Report(NamedTuple):
    """The result of validating one artifact: its state, the findings, and the questions left open.

    ``incomplete``: a requested check could not run, for lack of time, memory or a base. ``base``: the verdict
    on whether the given base is the artifact's own. ``evidence``: what was measured, in a sentence.
    """

    kind: str
    path: str
    id: str | None
    findings: tuple[Finding, ...]
    not_checked: tuple[str, ...] = ()
    incomplete: bool = False
    base: Verdict | None = None
    evidence: str | None = None

    def _repr_html_(self) -> str:
        return show(self)

    def __repr__(self) -> str:
        rules = ", ".join(dict.fromkeys(finding.rule for finding in self.findings)) or "nothing found"
        return f"<Report of {self.path}: {self.state}; {rules}>"

    @property
    def valid(self) -> bool:
        """Whether no finding is an error."""
        return not any(finding.severity == "error" for finding in self.findings)

    def require_valid(self) -> None:
        """Raises the first finding that is an error, if any."""
        for finding in self.findings:
            if finding.severity == "error":
                raise finding.as_error(self.kind, self.path)

    @property
    def state(self) -> str:
        """``valid``, ``invalid`` or ``not fully checked``; an error takes precedence over a missing check."""
        return "invalid" if not self.valid else "not fully checked" if self.incomplete else "valid"

    def to_json(self) -> Json:
        """Returns the report as ``validate --json`` prints it."""
        return {
            "kind": self.kind,
            "path": self.path,
            "id": self.id,
            "state": self.state,
            "base": None if self.base is None else self.base.to_json(),
            "findings": [finding.to_json() for finding in self.findings],
            "not_checked": list(self.not_checked),
            "evidence": self.evidence,
        }
