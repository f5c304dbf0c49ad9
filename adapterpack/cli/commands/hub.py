"""``adapterpack hub``: a hub of your own, and audits of adapters on a hub."""

from __future__ import annotations

from pathlib import Path

import click

import adapterpack

from ...errors import EXIT_FAILED, EXIT_INCOMPLETE
from ...hub.auditing import Audited, audit_sarif
from ...io import output_file, strict_json
from ...version import VERSION
from .. import address_options, common_options, flag, option, print_line, print_report, print_table

_EXIT = {"valid": 0, "not fully checked": EXIT_INCOMPLETE}


@click.group("hub")
def command() -> None:
    """Runs a hub of your own, and audits adapters on any hub.

    \b
    Example:
      adapterpack hub serve ./hub --tokens tokens.txt
      adapterpack hub audit org/tickets org/emails
    """


@command.command("serve", short_help="serve a small hub from a folder")
@click.argument("folder", metavar="DIR")
@address_options(8765)
@option(
    "--tokens",
    "FILE",
    "A file of lines NAME read|write TOKEN; without it everybody may read and nobody may write.",
)
@common_options
def serve(*, folder: str, host: str, port: int, tokens: str | None, as_json: bool) -> None:
    """Serves a hub from a folder, until it is interrupted.

    For a team, a closed site or tests, where packs must not leave. Clients reach it by HF_ENDPOINT. It has no
    TLS: on a network that others can read, put a proxy in front of it.

    It is built for networks with strangers: requests without permission are refused before their bodies are
    read; requests, repositories (100,000 files) and listings (1,000 entries a page) have limits; slow clients
    are disconnected, and with too many connections the one that has been idle longest is closed; a private
    repository looks like one that does not exist. Whoever has a token that may write can fill the disk.
    Requests are not rate-limited: let a proxy do that if the hub faces the internet.

    \b
    Example:
      adapterpack hub serve ./hub --tokens tokens.txt --port 8765
    """

    def ready(address: str) -> None:
        if as_json:
            print_report({"address": address}, compact=True)
        else:
            print_line(f"{address} serves {folder}; clients find it with HF_ENDPOINT={address}")

    adapterpack.hub.serve(folder, host=host, port=port, tokens=tokens, ready=ready)


@command.command("audit", short_help="check adapters on a hub")
@click.argument("repos", nargs=-1, metavar="[ORG/NAME[/FOLDER][@REV]...]")
@option("--lock", "FILE", "Also audit what this lock file pins, at the pinned commits.")
@flag("--full", "Download and check everything; without it only headers are read.")
@flag("--accept-incomplete", "Exit with 0 even if not everything was checked, as with headers alone.")
@option("--sarif sarif_file", "F", "Also write the findings as SARIF 2.1.0 to F.")
@common_options
@click.pass_context
def audit(
    ctx: click.Context,
    /,
    *,
    repos: tuple[str, ...],
    lock: str | None,
    full: bool,
    accept_incomplete: bool,
    sarif_file: str | None,
    as_json: bool,
) -> None:
    """Checks adapters on a hub, one repository after the other: by their headers, or in full by downloading
    them.

    Exit code 0: all valid; 1: one is invalid, or could not be read; 3: not fully checked.

    \b
    Example:
      adapterpack hub audit org/tickets org/emails@v1 --sarif findings.sarif
      adapterpack hub audit --lock adapterpack.lock --accept-incomplete
    """
    if not repos and lock is None:
        raise click.UsageError("Name a repository, or a lock file with --lock.", ctx)
    if lock is not None and not Path(lock).is_file():
        raise click.BadParameter(f"there is no file {lock!r}.", ctx, param_hint="--lock")
    audits = adapterpack.hub.audit(repos, lock=lock, full=full)
    if sarif_file is not None:
        with output_file(Path(sarif_file), renews=b"sarif") as path:
            path.write_bytes(strict_json.canonical(audit_sarif(audits, VERSION)))
    if as_json:
        print_report({"repos": [audited.to_json() for audited in audits]})
    else:
        print_table(["repository", "kind", "state", "errors", "warnings", "first"], map(_row, audits))
    codes = [_EXIT.get(audited.state, EXIT_FAILED) for audited in audits]
    code = EXIT_FAILED if EXIT_FAILED in codes else max(codes, default=0)
    if code and not (accept_incomplete and code == EXIT_INCOMPLETE):
        ctx.exit(code)


def _row(audited: Audited) -> list[object]:
    report = audited.report
    if report is None:
        return [audited.repo, None, audited.state, None, None, audited.error and audited.error.what]
    severities = [finding.severity for finding in report.findings]
    first = f"{report.findings[0].rule}: {report.findings[0].message}" if report.findings else ""
    return [
        audited.repo,
        report.kind,
        report.state,
        severities.count("error"),
        severities.count("warning"),
        first,
    ]
