"""Reports on the rows of one source of training data: their format, which rows were cut or left out, and
which could not be read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from ...errors import ConfigError
from ...readable import align_columns
from .problems import LABEL_COLUMNS, Labels
from .rows import Encoded, Row

log = logging.getLogger(__name__)
_Encoded = TypeVar("_Encoded")

OWN_COLUMNS = (
    "map your columns, our names first: train_file: [{path: tickets.csv, columns: {text: message, label: "
    "team}}], or --column text=message --column label=team"
)
"""The remedy for columns with other names."""
_LEAVE_OUT = "mend the row, or leave such rows out with --on-bad-row skip"


@dataclass(frozen=True)
class RowReading:
    """How the rows of a source are read, where a configuration says more than their columns.

    Args:
        form: the name of their form, or a prompt that is written out; None if the columns determine it.
        messages: the names that the data has for ``role``, ``content`` and further parts of a message.
        roles: our role -> the names that the data has for it.
        without_system: whether system turns are left out.
        system_prompt: the system turn of conversations that have none.
        whole: whether prompts are learned, too.
    """

    form: str | Mapping[str, str] | None = None
    messages: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, Sequence[str]] = field(default_factory=dict)
    without_system: bool = False
    system_prompt: str | None = None
    whole: bool = False

    def rename(self, row: Row) -> Row:
        """Returns a row whose messages have our names for their parts and roles; raises a ValueError for a
        role that is none of those that the configuration names.
        """
        if not (self.messages or self.roles or self.without_system):
            return row
        columns = {name: value for name, value in row.items() if isinstance(value, list | Mapping)}
        renamed = {name: self._rename(value) for name, value in columns.items() if name in _MESSAGES}
        return {**row, **renamed}

    def _rename(self, value: Any) -> Any:
        if isinstance(value, list):
            turns = map(self._rename, value)
            return [turn for turn in turns if not (self.without_system and turn["role"] == "system")]
        names = {"role": "role", "content": "content", **self.messages}
        roles = {theirs: ours for ours, several in self.roles.items() for theirs in several} or ROLES
        found = {ours: value[theirs] for ours, theirs in names.items() if theirs in value}
        if found.get("role") not in roles:
            raise ValueError(f"{found.get('role')!r} is none of the roles {', '.join(roles)}")
        kept = {key: part for key, part in value.items() if key not in names.values()}
        return {**kept, **found, "role": roles[found["role"]]}


_MESSAGES = frozenset({"messages", "conversations", "prompt", "chosen", "rejected", "completion"})
"""Columns that may hold messages."""
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}
"""ShareGPT's role -> role of a chat message."""


@dataclass
class DataReport:
    """Collects facts while rows are read and tokenized; as text it is the source's name, for messages.

    Args:
        source: the name of the data.
        skips: leave out rows that cannot be read instead of ending the run.
        reading: what the configuration says about how its rows are read.
        line_of: row number -> its line in the file, both from 1, or None if rows are not lines.
        numbers: the rows' numbers in the source, from 0; None if all rows are present, in order.
        form: the format of the rows.
        unread: columns that are not read.
        rows, tokens: how many there are to learn from; no tokens if the trainer tokenizes, or if rows have
            none.
        cut, left_out: how many rows are cut, or have nothing to learn within the model's limit.
        bad: row number -> what is wrong with a row that cannot be read.
    """

    source: str
    skips: bool = False
    reading: RowReading = field(default_factory=RowReading)
    line_of: Callable[[int], int | None] = lambda row: None
    numbers: Sequence[int] | None = None
    form: str = ""
    unread: tuple[str, ...] = ()
    rows: int = 0
    tokens: int | None = None
    cut: int = 0
    left_out: int = 0
    bad: dict[int, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.source

    @contextmanager
    def row(self, number: int) -> Iterator[object]:
        """Yields the place of a row, for errors. An error raised inside excludes the row from training if bad
        rows are skipped.
        """
        own = number if self.numbers is None else self.numbers[number]
        try:
            yield _Place(self, own + 1)
        except ConfigError as error:
            if not self.skips:
                if error.remedy is not None or type(error) is not ConfigError:
                    raise
                raise ConfigError(
                    error.what,
                    where=error.where,
                    expected=error.expected,
                    found=error.found,
                    remedy=_LEAVE_OUT,
                ) from error
            self.bad[own] = str(error)

    def encode(self, rows: Iterable[Row], encode: Callable[[Row, object], _Encoded]) -> list[_Encoded]:
        """Returns ``encode(row, its place)`` for each row, without the bad rows that are skipped."""
        encoded = []
        for number, row in enumerate(rows):
            with self.row(number) as place:
                encoded.append(encode(row, place))
        return encoded

    def warn_of_cuts(self, rows: Sequence[Row], max_length: int) -> None:
        """Logs how many of the rows were cut, if any."""
        if self.cut:
            count = len(rows)
            log.warning("%s: %d of %d rows are cut at max_length (%d)", self, self.cut, count, max_length)

    def choose(self) -> str | Mapping[str, str] | None:
        """Returns the requested format, and marks the request as used."""
        wanted = self.reading.form
        self.reading = replace(self.reading, form=None)
        return wanted

    def read_as(self, form: str, columns: Iterable[str], read: Iterable[str]) -> None:
        """Records the format of the rows, and logs which of their columns are not read."""
        self.form = form
        self.unread = tuple(sorted({*columns} - {*read}))
        if self.unread:
            log.warning("%s: read as %s; these columns are not read: %s", self, form, ", ".join(self.unread))

    def read_pair(self, columns: Sequence[str], first: str, others: Sequence[str], reader: str) -> str:
        """Returns the first column of ``others`` that is present, next to the column ``first``, and records
        both as the format of the rows.

        Raises:
            ConfigError: a column is missing; ``reader`` begins the message and says who needs it.
        """
        second = next((name for name in others if name in columns), None)
        if second is None or first not in columns:
            raise ConfigError(
                f"{reader} the columns {first} and {others[0]}",
                where=self,
                found=", ".join(columns),
                remedy=OWN_COLUMNS,
            )
        self.read_as(f"{first} + {second}", columns, {first, second})
        return second

    def encode_labelled(
        self,
        rows: Any,
        labels: Labels,
        first: str,
        reader: str,
        inputs: Callable[[Row, object], Encoded],
    ) -> list[Encoded]:
        """Returns the ``inputs`` of each row, made of its column ``first``, and the training target of its
        label.

        Raises:
            ConfigError: see :meth:`read_pair`; or a label is not among ``labels``.
        """
        column = self.read_pair(rows.column_names, first, LABEL_COLUMNS, reader)
        return self.encode(
            rows, lambda row, place: {**inputs(row, place), "labels": labels.target(row[column], place)}
        )

    def tokenize(self, tokenizer: Any, max_length: int, *texts: str) -> Any:
        """Tokenizes a text or a pair of texts to at most ``max_length`` ids, and counts the row as cut if it
        is longer.
        """
        tokens = tokenizer(*texts, truncation=True, max_length=max_length)
        self.cut += (
            len(tokens["input_ids"]) == max_length and len(tokenizer(*texts)["input_ids"]) > max_length
        )
        return tokens

    def of(self, numbers: Sequence[int]) -> DataReport:
        """Returns a report on some of the rows; both reports share the list of bad rows."""
        return replace(
            self, numbers=numbers if self.numbers is None else [self.numbers[number] for number in numbers]
        )


class _Place(NamedTuple):
    """A row; as text, its place in the data. Lines are only counted when an error needs them."""

    report: DataReport
    row: int

    def __str__(self) -> str:
        line = self.report.line_of(self.row)
        return f"{self.report}, row {self.row}" + (
            "" if line is None or line == self.row else f" (line {line})"
        )


def report_of(where: object) -> DataReport:
    """Returns ``where`` if it is a report, or else a new report with ``where`` as the name of its source."""
    return where if isinstance(where, DataReport) else DataReport(str(where))


def table(reports: Iterable[DataReport]) -> str:
    """Returns the reports as a table in plain text.

    Example:
        >>> print(table([DataReport("rows.jsonl", form="messages", rows=1200, tokens=34567, cut=3,
        ...     unread=("id",))]))
        data        form      rows   tokens  cut  left out  cannot be read  columns not read
        rows.jsonl  messages  1,200  34,567  3    0         0               id
    """
    lines: list[tuple[str, ...]] = [
        ("data", "form", "rows", "tokens", "cut", "left out", "cannot be read", "columns not read")
    ]
    for one in reports:
        counts = (one.rows, one.tokens, one.cut, one.left_out, len(one.bad))
        lines.append(
            (
                one.source,
                one.form,
                *("-" if count is None else f"{count:,}" for count in counts),
                ", ".join(one.unread),
            )
        )
    return align_columns(lines)
