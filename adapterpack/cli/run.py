"""``adapterpack run``."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import click

import adapterpack

from ..errors import ConfigError, NothingToDo, storage_errors
from ..hub.resolve import folder_of
from ..io.atomic import output_file, refuse_existing
from ..io.strict_json import require_few_parts
from ..library_errors import library_errors
from ..tasks.rows import RowError
from .device_options import device_of, device_options
from .options import shared
from .output import emit, finite, line
from .progress import apart
from .sampling_options import sampling_options, sampling_parameters

MAX_LINE = 64 << 20
MAX_DEPTH = 100


@click.command("run")
@click.argument("bundle", metavar="BUNDLE")
@click.option("--adapter", "adapters", multiple=True, metavar="NAME",
              help="An adapter for rows that name none; may be repeated, then each such row is run with each. Without it: the base.")
@click.option("--prompt", "prompts", multiple=True, metavar="P", help="A text to run; may be repeated.")
@click.option("--context", "contexts", multiple=True, metavar="C", help="A text that a prompt is a question about; one for each prompt.")
@click.option("--image", "images", multiple=True, metavar="F.png|F.jpg|F.npy",
              help="A picture, or what the model's processor makes of one; may be repeated. With --prompt, one for each prompt.")
@click.option("--audio", "sounds", multiple=True, metavar="F.wav|F.npy", help="Speech to run, or its features; may be repeated.")
@click.option("--input", "source", metavar="F.jsonl",
              help='Rows with text, prompt, messages, question and context, image or audio, and adapter if they like; "-" reads stdin.')
@click.option("--output", "out", metavar="F.jsonl", help="A new file for the rows, in place of stdout.")
@device_options
@sampling_options
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, metavar="N", help="Rows that run together.")
@shared
def command(
    *, bundle: str, adapters: tuple[str, ...], prompts: tuple[str, ...], contexts: tuple[str, ...], images: tuple[str, ...],
    sounds: tuple[str, ...], source: str | None, out: str | None, batch_size: int, as_json: bool, **parameters: Any,
) -> None:
    """Runs rows through a bundle and yields one result for each, in order.

    \b
    Example:
      adapterpack run bundle --adapter tickets --prompt "Where is my parcel?"
      adapterpack run bundle --input rows.jsonl --output answers.jsonl
      adapterpack run bundle --adapter accents --audio call.wav
      adapterpack run bundle --prompt "Two mugs for Lisbon" --json-schema order.json --temperature 0.7 --top-p 0.9
      adapterpack run bundle --adapter manuals --prompt "How long does it last?" --context "The battery lasts nine hours."
    """
    typed = _typed_rows(prompts, contexts, images, sounds)
    if bool(typed) == (source is not None):
        raise click.UsageError("Give either --input, or --prompt, --image or --audio.")
    if out is not None:
        refuse_existing(Path(out))
    lines: list[int] = []
    rows = _rows(source, lines, reserved=as_json and out is None) if source is not None else iter(typed)
    running = adapterpack.run(folder_of(bundle), rows, adapters=adapters, provider=device_of(parameters), batch_size=batch_size,
                              **sampling_parameters(parameters))
    results = _apart(running if source is None else _placed(running, _name(source), lines))
    if out is None:
        _print(results, source, as_json)
        return
    count = _write(results, source, Path(out))
    if as_json:
        emit({"command": "run", "output": out, "rows": count})
    else:
        line(f"wrote {count} rows to {out}")


def _typed_rows(
    prompts: tuple[str, ...], contexts: tuple[str, ...], images: tuple[str, ...], sounds: tuple[str, ...]
) -> list[dict[str, str]]:
    """The rows of the options: a prompt and what goes with it are one row."""
    every = (("prompt", prompts), ("context", contexts), ("image", images), ("audio", sounds))
    columns = {key: values for key, values in every if values}
    if len({len(values) for values in columns.values()}) > 1:
        counts = ", ".join(f"{len(values)} --{key}" for key, values in columns.items())
        raise click.UsageError(f"Options that go together must be as many: {counts}.")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _name(source: str) -> str:
    return "stdin" if source == "-" else source


def _rows(source: str, lines: list[int], reserved: bool) -> Iterator[Mapping[str, Any]]:
    """The rows of a JSONL file, read as they are needed; empty lines are passed over. ``lines`` gets the number of the line of each."""
    where = _name(source)
    with contextlib.ExitStack() as stack:
        with storage_errors(where):
            file: IO[bytes] = sys.stdin.buffer if source == "-" else stack.enter_context(Path(source).open("rb"))
        for number in itertools.count(1):
            with storage_errors(where):
                text = file.readline(MAX_LINE + 1)
            if not text:
                return
            if len(text) > MAX_LINE or text.strip():
                row = _row(text, f"{where}, line {number}")
                if reserved and "command" in row:
                    raise ConfigError("--json needs the key 'command' for itself", where=f"{where}, line {number}",
                                      remedy="rename the key, or write to a file with --output")
                lines.append(number)
                yield row


def _row(text: bytes, where: str) -> dict[str, Any]:
    if len(text) > MAX_LINE:
        raise ConfigError("this line is too long", where=where, expected=f"at most {MAX_LINE} bytes", remedy="write one object a line")
    require_few_parts(text, where, 1 << 24)
    with library_errors("json", "this line is not JSON", where=where, remedy="write one object a line", kind=ConfigError):
        row = json.loads(text.decode("utf-8-sig"))
    if not isinstance(row, dict):
        raise ConfigError("a row must be an object", where=where, found=type(row).__name__, remedy="write one object a line")
    level: list[Any] = [row]
    for _ in range(MAX_DEPTH):
        level = [item for value in level for item in _inside(value)]
    if level:
        raise ConfigError("the row is nested too deeply", where=where, expected=f"at most {MAX_DEPTH} levels")
    return row


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _placed(results: Iterator[dict[str, Any]], source: str, lines: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The results; what is wrong with a row names its line."""
    try:
        yield from results
    except RowError as error:
        raise error.moved(error.row, f"{source}, line {lines[error.row - 1]}") from error


def _apart(results: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The results, with what ONNX Runtime prints on the way kept out of stdout."""
    while True:
        with apart():
            row = next(results, None)
        if row is None:
            return
        yield row


def _write(results: Iterable[Mapping[str, Any]], source: str | None, out: Path) -> int:
    """The rows as JSONL, the whole file or none of it."""
    count = 0
    # Half of a surrogate pair has no UTF-8; "backslashreplace" writes exactly JSON's own escape for it.
    with output_file(out) as path, path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for row in results:
            file.write(json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
        _require_rows(count, source)
    return count


def _print(results: Iterable[Mapping[str, Any]], source: str | None, as_json: bool) -> None:
    count = 0
    for row in results:
        count += 1
        if as_json:
            emit({"command": "run", **row}, compact=True)
        else:
            line(f"{row['adapter'] or 'base'} | {_question(row)} | {_answer(row)}")
    _require_rows(count, source)


def _require_rows(count: int, source: str | None) -> None:
    if count == 0:
        raise NothingToDo("there are no rows to run", where=source)


def _question(row: Mapping[str, Any]) -> str:
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else messages
    content = last.get("content") if isinstance(last, Mapping) else last
    candidates = [row.get("prompt"), row.get("text"), row.get("question"), content, row.get("image"), row.get("audio")]
    text = str(next(filter(None, candidates), None))
    return text if len(text) <= 60 else f"{text[:59]}…"


def _answer(row: Mapping[str, Any]) -> str:
    if "completion" in row:
        return str(row["completion"])
    if "answer" in row:
        return str(row["answer"] if row["answer"] is not None else row["note"])
    if "embedding" in row:
        first = ", ".join(f"{value:.4g}" for value in row["embedding"][:3])
        return f"{len(row['embedding'])} numbers: {first}, …"
    if "tokens" in row:
        return " ".join(f"{token['text']}/{token['label']}" for token in row["tokens"])
    if "words" in row:
        return ", ".join(f"{word['text']} {word['score']:.3f}" for word in row["words"])
    return f"{row['label']} {row['scores'][row['label']]:.3f}" if row.get("label") is not None else str(row.get("note", "no label"))
