"""Validates many repositories of a hub one after another, so that an error in one does not hide the
others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import AdapterpackError, FormatError
from ..io import Json
from ..pack import Budget
from ..pack.validate.checks import Report
from ..pack.validate.sarif import sarif
from ..paths import StrPath
from .lockfile import Lockfile, PinnedArtifact
from .remote import validate_remote
from .transport import names, parse_address


@dataclass(frozen=True)
class Audited:
    """The result for one repository, or a folder in one: the report, or the error that prevented it."""

    repo: str
    report: Report | None
    error: AdapterpackError | None = None

    @property
    def state(self) -> str:
        """The report's state, or the error's code."""
        return self.report.state if self.report else self.error.code if self.error else "unknown"

    def to_json(self) -> Json:
        """Returns the result as JSON values."""
        return {
            "repo": self.repo,
            "state": self.state,
            "report": self.report and self.report.to_json(),
            "error": self.error and self.error.to_json(),
        }


def audit(
    repos: Iterable[str],
    *,
    lock: StrPath | None = None,
    full: bool = False,
    budget: Budget | None = None,
    token: str | None = None,
) -> tuple[Audited, ...]:
    """Checks adapters on a hub, one repository after the other: by their headers, or in full by downloading
    them.

    With a ``lock`` file it also checks everything that the file pins, at the pinned commit: the artifact must
    still be there and be the pinned one.

    Raises:
        ConfigError: a name is invalid.
        FormatError: the file is no lock file.

    Example:
        >>> audit([])
        ()
    """
    wanted: list[tuple[names.HubReference, PinnedArtifact | None]] = [
        (names.parse(repo), None) for repo in repos
    ]
    if lock is not None:
        pins = sorted(Lockfile(lock).all().items())
        wanted += [(parse_address(text).at(pinned.commit), pinned) for text, pinned in pins]
    return tuple(_one(reference, pinned, full, budget, token) for reference, pinned in wanted)


def _one(
    reference: names.HubReference,
    pinned: PinnedArtifact | None,
    full: bool,
    budget: Budget | None,
    token: str | None,
) -> Audited:
    try:
        report = validate_remote(str(reference), full=full, budget=budget, token=token)
        # a pin of a PEFT adapter has the id of the imported pack
        if pinned is not None and pinned.kind != "peft" and report.id not in {None, pinned.id}:
            raise FormatError(
                "the commit holds another artifact than the lock file pins",
                where=reference,
                expected=pinned.id,
                found=report.id,
                remedy="ask who owns the repository",
            )
    except AdapterpackError as error:
        return Audited(reference.address, None, error)
    return Audited(reference.address, report)


def audit_sarif(results: Iterable[Audited], version: str) -> Json:
    """Writes all reports as one SARIF log with a run for each; a repository without a report is a
    failed run.
    """
    runs = []
    for result in results:
        failed = Report("pack", result.repo, None, (), (f"{result.repo}: {result.error}",), incomplete=True)
        log = sarif(result.report or failed, version)
        [run] = log["runs"]
        runs.append({**run, "automationDetails": {"id": f"{result.repo}/"}})
    empty = sarif(Report("pack", "", None, ()), version)
    return {**empty, "runs": runs}
