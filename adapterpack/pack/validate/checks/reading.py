"""Reports a pack that cannot be read at all. AP000-AP001."""

from __future__ import annotations

from pathlib import Path

from ....errors import AdapterpackError
from .finding import CheckRule, Finding, check_rule

CHECK = check_rule("AP000")
UNREADABLE = check_rule("AP001")


def unreadable(error: AdapterpackError, folder: Path, rule: CheckRule = UNREADABLE) -> Finding:
    """Converts a reader's error to a finding, with the place that the error names."""
    path, _, pointer = (error.where or str(folder)).partition("#")
    name = Path(path.partition(",")[0]).name
    return Finding(
        rule.id,
        rule.severity,
        error.where or str(folder),
        error.placeless_sentence,
        error.remedy or "",
        type(error),
        name if name != folder.name else None,
        pointer if pointer.startswith("/") else None,
    )
