"""Rows of adapterpack's own form: what ``adapterpack.run`` takes, one object a line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors import AdapterpackError
from ..runtime.sessions.row_runner import RowOutcome, RowRunner
from ..tasks.data.rows import Row, RowError
from .job import Answered
from .lines import Line


class RowsJob:
    """Runs rows through a bundle; ``where`` is what their file is called in errors, if they are from one. See
    :class:`~.job.Job`.
    """

    def __init__(self, runner: RowRunner, where: str | None, identity: Mapping[str, Any]) -> None:
        self._runner, self._where, self.block, self.identity = runner, where, runner.block, identity

    def close(self) -> None:
        """There is nothing to end."""

    def answer_block(self, first: int, lines: Iterable[Line], began: int) -> Iterator[Answered]:
        """See :class:`~.job.Job`."""
        begun: dict[int, Line] = {}

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
        """The error of a row, which names its line."""
        error = outcome.error
        if self._where is None or not isinstance(error, RowError):
            return error
        return error.moved(error.row, f"{self._where}, line {line.number}")


def _without_error(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """A result of a row that an earlier run could not run, and that was given again as it was written
    there.
    """
    error = result.get("error")
    was_error = isinstance(error, Mapping) and error.keys() == AdapterpackError("").to_json().keys()
    return {key: value for key, value in result.items() if key != "error"} if was_error else result
