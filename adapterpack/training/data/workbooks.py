"""Reads workbooks of Excel, in the sandbox: a small file may expand to any size."""

from __future__ import annotations

import json
from pathlib import Path

from python_calamine import CalamineWorkbook

from ...errors import ConfigError, FormatError
from ...sandbox.limits import SandboxLimits
from ...sandbox.sandbox import Sandbox

_LIMITS = SandboxLimits(1 << 30, 30.0)


def write_lines(workbook: Path, copy: Path) -> Path:
    """Writes the rows of a workbook's first sheet to ``copy``, as JSON lines with the names in its first row;
    returns ``copy``.

    Raises:
        ConfigError: it is no workbook, or exceeds a limit.
    """
    path = str(workbook.resolve()).encode()
    try:
        copy.write_bytes(
            Sandbox(f"{__name__}:lines_of", _LIMITS, kept=0).run(path, "the workbook cannot be read")
        )
    except FormatError as error:
        raise ConfigError(error.what, where=workbook, remedy="save the sheet as CSV, in UTF-8") from error
    return copy


def lines_of(request: bytes) -> bytes:
    """Returns the rows as JSON lines, in the sandbox's process: takes the workbook's path. A column with any
    text is text, and empty cells are null.
    """
    sheet = CalamineWorkbook.from_path(request.decode()).get_sheet_by_index(0).to_python()
    names = sheet[0] if sheet else []
    rows = sheet[1:]
    columns = {}
    for name, cells in zip(names, zip(*rows, strict=True), strict=False):
        texts = any(not isinstance(cell, int | float) and cell != "" for cell in cells)
        columns[str(name)] = [_value(cell, texts) for cell in cells]
    columns.pop("", None)
    return "".join(
        json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in zip(*columns.values(), strict=True)
    ).encode()


def _value(cell: object, text: bool) -> object:
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return None if cell == "" else str(cell) if text else cell
