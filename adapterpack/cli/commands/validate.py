"""``adapterpack validate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import adapterpack

from ...errors import EXIT_FAILED, EXIT_INCOMPLETE
from ...io import output_file, strict_json, without_none
from ...pack import Budget
from ...pack.validate.sarif import sarif
from ...version import VERSION
from .. import common_options, flag, option, print_line, print_report, structural_option, suggest

_EXIT = {"valid": 0, "invalid": EXIT_FAILED, "not fully checked": EXIT_INCOMPLETE}


@click.command("validate")
@click.argument("path", metavar="PACK|BUNDLE|FILE")
@option("--base", "BASE", "The base that the pack or bundle must have been made for.")
@flag("--full", "Make the costly checks, too; anything that cannot be checked then means exit code 3.")
@option("--sarif sarif_file", "F", "Also write the findings as SARIF 2.1.0 to F; it must not exist.")
@option(
    "--max-seconds",
    "S",
    "Stop checking after S seconds, with exit code 3 [600].",
    type=click.FloatRange(min=0),
)
@option(
    "--max-bytes",
    "B",
    "Hold at most B bytes of a pack, else exit code 3 [8 GiB].",
    type=click.IntRange(min=0),
)
@option(
    "--provider",
    "cuda",
    "Find nodes of a bundle for which this provider has no kernel; no GPU is needed.",
    shell_complete=suggest("adapterpack.runtime.providers.provider:PROVIDERS"),
)
@option(
    "--against",
    "TARGET",
    "Ask what runs the pack whether it acts there: the address of a server (adapterpack, vLLM, llama.cpp), "
    "a checkpoint that it was merged into, a folder of onnxruntime-genai, or an adapter of MLX. With --base, "
    "also tell the usual faults.",
)
@option("--model", "NAME", "The pack's name there [that of the pack].")
@structural_option
@common_options
@click.pass_context
def command(
    ctx: click.Context,
    /,
    *,
    path: str,
    base: str | None,
    full: bool,
    sarif_file: str | None,
    max_seconds: float | None,
    max_bytes: int | None,
    provider: str | None,
    against: str | None,
    model: str | None,
    allow_structural: bool,
    as_json: bool,
) -> None:
    """Makes every check that applies to a pack, a bundle, an adapter of PEFT or another tool, or a folder of
    onnxruntime-genai's; with a base, also that it fits the base.

    Exit code 0: valid; 1: invalid; 3: not fully checked.

    \b
    Example:
      adapterpack validate packs/tickets --base models/base
      adapterpack validate packs/tickets --against http://localhost:8000
    """
    limits: dict[str, Any] = {"seconds": max_seconds, "memory": max_bytes}
    budget = Budget(**without_none(limits))
    report = adapterpack.validate(
        path,
        base,
        full=full,
        budget=budget,
        allow_structural=allow_structural,
        provider=provider,
        against=against,
        model=model,
    )
    if sarif_file is not None:
        with output_file(Path(sarif_file), renews=b"sarif") as file:
            file.write_bytes(strict_json.canonical(sarif(report, VERSION)))
    if as_json:
        print_report(report.to_json())
    else:
        for finding in report.findings:
            message, *more = finding.message.split("\n")
            fix = f" To fix it: {finding.fix.rstrip('.')}." if finding.fix else ""
            print_line(f"{finding.severity} {finding.rule} at {finding.where}: {message.rstrip('.:')}.{fix}")
            for text in more:
                print_line(f"  {text}")
        if report.evidence is not None:
            print_line(report.evidence)
        if report.base is not None:
            print_line(f"base: {report.base}")
        if report.not_checked:
            print_line(f"not checked: {'; '.join(report.not_checked)}")
        print_line(f"{report.path} is {'not valid' if report.state == 'invalid' else report.state}")
    if code := _EXIT[report.state]:
        ctx.exit(code)
