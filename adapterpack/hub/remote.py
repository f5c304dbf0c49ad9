"""Validates an artifact on a hub from its listing, manifest and headers, or with ``full`` from all of its
bytes.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import AdapterpackError, HubError
from ..pack.validate.checks import reading
from ..pack.validate.checks.context import Budget, Spent
from ..pack.validate.checks.finding import Report
from ..pack.validate.validation import NO_BASE, examine
from ..runtime.sessions.validation import validate_bundle
from .artifact import differences, open_remote
from .header_checks import HEADER_REPORTS, RemoteContext
from .pull import download, scratch_folder
from .transport import names
from .transport.client import connect, tree


def validate_remote(
    reference: str,
    base: Path | str | None = None,
    *,
    full: bool = False,
    budget: Budget | None = None,
    allow_structural: bool = False,
    token: str | None = None,
) -> Report:
    """Returns the report on an artifact of a hub. ``full`` downloads everything, but not into the store;
    without it the report is incomplete.

    ``base`` is a folder or an ``hf://`` reference; by default it is the base that the artifact names, on the
    same hub. Reads the listing and headers of a base on a hub, never its weights.

    Raises:
        HubError: the hub refuses; the subclass says why.
    """
    remote = connect(names.parse(reference), token)
    listed, budget = tree(remote), budget or Budget()
    with scratch_folder() as scratch:
        folder = Path(scratch) / remote.reference.name  # an imported adapter gets the name of its folder
        folder.mkdir()
        try:
            artifact = open_remote(remote, listed, folder)
        except HubError:
            raise
        except AdapterpackError as error:
            return Report("pack", str(remote), None, (reading.unreadable(error, Path(str(remote))),))
        if findings := tuple(differences(artifact, listed)):
            return Report(artifact.kind, str(remote), artifact.id, findings)
        context = RemoteContext(
            remote, artifact, listed, folder, Path(scratch) / "base", base, budget, allow_structural, token
        )
        try:
            report = _whole(context) if full else HEADER_REPORTS[artifact.kind](context)
        except Spent as spent:
            return Report(artifact.kind, str(remote), artifact.id, (), (str(spent),), incomplete=True)
        except HubError:
            raise
        except AdapterpackError as error:
            return Report(
                artifact.kind,
                str(remote),
                artifact.id,
                (reading.unreadable(error, Path(remote.reference.address)),),
            )
    return report._replace(path=str(remote))


def _whole(context: RemoteContext) -> Report:
    """Downloads and checks everything; of a base on a hub only the headers."""
    download(context.remote, context.artifact, context.listed, context.folder)
    base, why = context.readable_base()
    if context.artifact.kind == "bundle":
        report = validate_bundle(
            context.folder, base, full=True, budget=context.budget, allow_structural=context.allow_structural
        )
    else:
        report = examine(context.folder, base, True, context.budget, context.allow_structural)[0]
    left = context.open_questions(base, report.base)
    not_checked = (*(text for text in report.not_checked if text != NO_BASE), *why, *left)
    return report._replace(not_checked=not_checked, incomplete=report.incomplete or bool(left))
