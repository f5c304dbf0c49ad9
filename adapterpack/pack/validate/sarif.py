"""Writes a report as SARIF 2.1.0 (OASIS Static Analysis Results Interchange Format)."""

from __future__ import annotations

import re
from urllib.parse import quote

from ...errors import printable
from ...io import Json
from .checks import Finding, Report
from .registry import RULES

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif(report: Report, version: str) -> Json:
    """Returns the report as one SARIF run; ``version`` is the tool's version."""
    rules = sorted({*RULES, *(finding.rule for finding in report.findings)})
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "adapterpack",
                        "version": version,
                        "rules": [_rule(rule) for rule in rules],
                    }
                },
                "invocations": [
                    {
                        "executionSuccessful": not report.incomplete,
                        "toolExecutionNotifications": [
                            {
                                "level": "warning" if report.incomplete else "note",
                                "message": {"text": _text(f"not checked: {what}")},
                            }
                            for what in report.not_checked
                        ],
                    }
                ],
                "properties": {"state": report.state, "id": report.id, "kind": report.kind},
                "results": [_result(finding, rules.index(finding.rule)) for finding in report.findings],
            }
        ],
    }


def _rule(name: str) -> Json:
    rule = RULES.get(name)
    if rule is None:
        return {"id": name}
    return {
        "id": name,
        "shortDescription": {"text": rule.holds},
        "help": {"text": rule.fix},
        "defaultConfiguration": {"level": rule.severity},
    }


def _text(sentence: str) -> str:
    """Returns a sentence as a SARIF message: escapes control characters, and brackets, which viewers would
    turn into links.
    """
    return re.sub(r"([\\\[\]])", r"\\\1", printable(sentence))


def _result(finding: Finding, index: int) -> Json:
    physical: Json = {"artifactLocation": {"uri": quote(finding.file or "adapterpack.json")}}
    if finding.offset is not None:
        physical["region"] = {"byteOffset": finding.offset}
    logical = finding.pointer if finding.pointer is not None else finding.where
    return {
        "ruleId": finding.rule,
        "ruleIndex": index,
        "level": finding.severity,
        "message": {
            "text": _text(
                f"{finding.message.rstrip('.')}."
                + (f" To fix it: {finding.fix.rstrip('.')}." if finding.fix else "")
            )
        },
        "locations": [{"physicalLocation": physical, "logicalLocations": [{"fullyQualifiedName": logical}]}],
    }
