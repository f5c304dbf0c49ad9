"""What ``adapterpack quantize --compare`` does: figures of every form as a table, as JSON or as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import adapterpack

from ..io.readable import things
from ..report.comparison import comparison_report, comparison_table, list_left_out
from .options import page_at
from .output import emit, line, table
from .progress import steps


def compare(
    bundle: Path,
    rows: str,
    schemes: Sequence[str],
    adapter: str | None,
    html: str | None,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Compares the quantized forms of a bundle on the rows of a file, and prints what was found."""
    if schemes:
        options["schemes"] = schemes
    with page_at(html) as page:
        with steps() as say:
            found = adapterpack.compare_quantized(bundle, rows, adapter=adapter, progress=say, **options)
        result = found.to_json()
        if page is not None:
            page.write_text(comparison_report(result), "utf-8")
    if as_json:
        emit({"command": "quantize", **result, **({} if html is None else {"html": str(Path(html))})})
        return
    table(*comparison_table(result), f"{things(found.rows, 'row')}, {things(found.positions, 'choice')}")
    for form, reason in list_left_out(result):
        line(f"not measured: {form}: {reason}")
    for sentence in found.advice:
        line(sentence)
    if html is not None:
        line(f"the page is {html}")
