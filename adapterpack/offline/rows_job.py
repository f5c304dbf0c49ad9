"""Answers rows in adapterpack's own format: the mappings that ``adapterpack.run`` takes, one JSON object a
line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors import AdapterpackError
from ..runtime import RowRunner
from ..runtime.sessions.run import RowOutcome
from ..tasks.data import Row, RowError
from .job import Answered
from .lines import Line


class RowsJob:
    """A :class:`~.job.OfflineJob` that runs rows through a bundle. ``where`` is the name of the file in
    errors, if there is one.
    """

    def __init__(self, runner: RowRunner, where: str | None, identity: Mapping[str, Any]) -> None:
        self._runner = runner
        self._where = where
        self.block = runner.block
        self.identity = identity

    def close(self) -> None:
        """Does nothing, since a runner holds nothing open."""

    def answer_block(self, first: int, lines: Iterable[Line], began: int) -> Iterator[Answered]:
        """Runs the rows of a block and yields their results in order."""
        begun = {}

        def rows() -> Iterator[tuple[int, Row | AdapterpackError]]:
            for number, line in enumerate(lines, first):
                begun[number] = line
                yield number, line.row

        for outcome in self._runner.outcomes(rows()):
            line = begun[outcome.number]
            error = self._place(outcome, line)
            row = (
                _without_error(outcome.result or {})
                if error is None
                else {**(outcome.row or {"line": line.number}), "error": error.to_json()}
            )
            yield Answered(line, row, error, outcome.tokens)

    def _place(self, outcome: RowOutcome, line: Line) -> AdapterpackError | None:
        """Returns the error of a row, with the line that it names."""
        error = outcome.error
        if self._where is None or not isinstance(error, RowError):
            return error
        return error.moved(error.row, f"{self._where}, line {line.number}")


def _without_error(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a result without the ``error`` of an earlier run, for rows that were taken from an output and
    run again.
    """
    error = result.get("error")
    was_error = isinstance(error, Mapping) and error.keys() == AdapterpackError("").to_json().keys()
    return {key: value for key, value in result.items() if key != "error"} if was_error else result
