"""``adapterpack validate``."""

from __future__ import annotations

import click

import adapterpack

from ..errors import EXIT_FAILED
from .options import shared
from .output import emit, line


@click.command("validate", short_help="every check that applies; names what was not checked")
@click.argument("path", metavar="PACK|BUNDLE")
@click.option("--base", metavar="BASE", help="The base that the pack or bundle must belong to.")
@shared
@click.pass_context
def command(ctx: click.Context, path: str, base: str | None, as_json: bool) -> None:
    """Every check that applies to a pack, a PEFT adapter or a bundle; with BASE, also that it belongs to that base.

    Exit code 0: valid; 1: invalid.

    \b
    Example:
      adapterpack validate packs/tickets --base models/base
    """
    report = adapterpack.validate(path, base)
    if as_json:
        emit({"command": "validate", **report.to_json()})
    else:
        for finding in report.findings:
            fix = f" To fix it: {finding.fix.rstrip('.')}." if finding.fix else ""
            line(f"{finding.severity} {finding.rule} at {finding.where}: {finding.message.rstrip('.')}.{fix}")
        if report.not_checked:
            line(f"not checked: {'; '.join(report.not_checked)}")
        line(f"{report.path} is {'valid' if report.valid else 'not valid'}")
    if not report.valid:
        ctx.exit(EXIT_FAILED)
