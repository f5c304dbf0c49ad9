"""``adapterpack run``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import IO, Any

import click

from ...errors import ConfigError, NothingToDo, storage_errors
from ...io import Json, refuse_existing
from ...offline.growing_file import OutputProgress, now
from ...offline.job import Answered, OpenJob, answers, begin, first_of, require_all, write_file, write_stream
from ...offline.lines import Line, lines_of
from ...readable import percent, things
from .. import (
    batch_option,
    common_options,
    device_of,
    device_options,
    divert_stdout,
    flag,
    load_adapter,
    load_pack,
    open_target,
    option,
    packs_argument,
    print_json,
    print_line,
    print_report,
    sampling_options,
    sampling_parameters,
)
from ..progress import show_rows


@click.command("run")
@click.argument("bundle", metavar="BUNDLE|BASE")
@packs_argument
@option(
    "--adapter adapters",
    "NAME",
    "An adapter for rows that name none, by its name, or by the path of a pack or an .onnx_adapter file, "
    "which is loaded; auto leaves the choice to the text of each row. If repeated, each such row is run "
    "with every one of them. Default: the base.",
    multiple=True,
)
@option(
    "--prompt prompts",
    "P",
    "A text to run; may be repeated. A language model with a chat template reads it as a user's message.",
    multiple=True,
)
@option("--context contexts", "C", "A text that a prompt asks about; one for each prompt.", multiple=True)
@option(
    "--image images",
    "F.png|F.jpg|F.npy",
    "A picture, or the output of the model's processor; may be repeated. With --prompt, one for each prompt.",
    multiple=True,
)
@option("--audio sounds", "F.wav|F.npy", "A recording, or its features; may be repeated.", multiple=True)
@option(
    "--input source",
    "F.jsonl",
    "Rows with text, prompt, messages, question and context, image or audio, and optionally adapter; or "
    "requests in "
    'OpenAI\'s batch format; "-" reads stdin.',
)
@flag("--raw", "Let a language model read texts as they are, not as user messages in its chat template.")
@option(
    "--output out",
    "F.jsonl",
    "A new file for the results, instead of stdout. After a stop, the same command "
    "resumes where the answers of --input end.",
)
@flag(
    "--keep-going",
    "Where a row cannot be run, write its error instead of a result, and continue; the exit code is then 1.",
)
@device_options
@sampling_options
@batch_option
@common_options
def command(
    *,
    bundle: str,
    packs: tuple[str, ...],
    adapters: tuple[str, ...],
    prompts: tuple[str, ...],
    contexts: tuple[str, ...],
    images: tuple[str, ...],
    sounds: tuple[str, ...],
    source: str | None,
    raw: bool,
    out: str | None,
    keep_going: bool,
    batch_size: int,
    as_json: bool,
    **parameters: Any,
) -> None:
    """Runs rows through a bundle, and gives a result for each, in order.

    A BASE is exported into the cache first, with its PACKs, and the next call finds it there. Rows that name
    no adapter run with each PACK, as with --adapter.

    \b
    Example:
      adapterpack run models/base packs/tickets --prompt "Where is my parcel?"
      adapterpack run bundle --adapter tickets --prompt "Where is my parcel?"
      adapterpack run bundle --input rows.jsonl --output answers.jsonl --keep-going
      adapterpack run bundle --input batch.jsonl --output batch_output.jsonl
      adapterpack run bundle --adapter auto --prompt "Where is my parcel?"
      adapterpack run bundle --adapter accents --audio call.wav
      adapterpack run bundle --prompt "Two mugs for Lisbon" --json-schema order.json --temperature 0.7
      adapterpack run bundle --prompt "How long does it last?" --context "The battery lasts nine hours."
    """
    typed = _typed_rows(prompts, contexts, images, sounds)
    if bool(typed) == (source is not None):
        raise click.UsageError("Give either --input, or --prompt, --image or --audio.")
    if out is not None:
        refuse_existing(Path(out), "--output")
    # the help of the command must not pay for it
    from ...offline.formats import Setting, job_for  # noqa: PLC0415

    folder, named = open_target(bundle, [*map(load_pack, packs), *map(load_adapter, adapters)])
    setting = Setting(
        folder,
        device_of(parameters),
        named[len(packs) :],
        batch_size,
        sampling_parameters(parameters),
        None if source is None else _name(source),
        raw,
        named[: len(packs)],
    )
    open_job = partial(job_for, setting=setting)
    if source is None:
        lines = iter([Line(number, 0, row) for number, row in enumerate(typed, 1)])
        done = _answer_all(open_job, lines, None, out, as_json, keep_going)
    else:
        with ExitStack() as stack:
            with storage_errors(_name(source)):
                file: IO[bytes] = (
                    sys.stdin.buffer if source == "-" else stack.enter_context(Path(source).open("rb"))
                )
            lines = lines_of(file, _name(source))
            done = _answer_all(
                open_job,
                _refuse_reserved(lines, source) if as_json and out is None else lines,
                source,
                out,
                as_json,
                keep_going,
            )
    if out is not None and not done.failed:
        if as_json:
            print_report({"output": out, "rows": done.rows}, compact=True)
        else:
            print_line(f"wrote {things(done.rows, 'row')} to {out}")
    require_all(done, None if out is None else Path(out))


def _typed_rows(
    prompts: tuple[str, ...], contexts: tuple[str, ...], images: tuple[str, ...], sounds: tuple[str, ...]
) -> list[Json]:
    """Builds the rows from the options: each prompt with its context, image and sound is one row."""
    every = (("prompt", prompts), ("context", contexts), ("image", images), ("audio", sounds))
    columns = {key: values for key, values in every if values}
    if len({len(values) for values in columns.values()}) > 1:
        counts = ", ".join(f"{len(values)} --{key}" for key, values in columns.items())
        raise click.UsageError(
            f"Options that go together must be given equally often, and there are {counts}."
        )
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _name(source: str) -> str:
    return "stdin" if source == "-" else source


def _refuse_reserved(lines: Iterator[Line], source: str) -> Iterator[Line]:
    """Yields the lines; a row with the key that every object on stdout begins with becomes an error."""
    for one in lines:
        if isinstance(one.row, dict) and "command" in one.row:
            yield one._replace(
                row=ConfigError(
                    "--json needs the key 'command' for itself",
                    where=f"{_name(source)}, line {one.number}",
                    remedy="rename the key, or write to a file with --output",
                )
            )
        else:
            yield one


def _answer_all(
    open_job: OpenJob,
    lines: Iterator[Line],
    source: str | None,
    out: str | None,
    as_json: bool,
    keep_going: bool,
) -> OutputProgress:
    """Answers all lines, on stdout or in a file."""
    where = None if source is None else _name(source)
    if out is None:
        return _print_answers(open_job, lines, where, as_json, keep_going)
    path = None if source is None or not Path(source).is_file() else Path(source)
    with show_rows(where or "rows", None if path is None else path.stat().st_size) as progress:
        if path is not None:
            return write_file(open_job, path, Path(out), progress, keep_going)
        return write_stream(open_job, lines, Path(out), where, progress, keep_going)


def _print_answers(
    open_job: OpenJob, lines: Iterator[Line], where: str | None, as_json: bool, keep_going: bool
) -> OutputProgress:
    rows = 0
    failed = 0
    first = ""
    for number, row, error, _ in _answer_rows(open_job, lines):
        if error is not None and not keep_going:
            raise error
        rows += 1
        if error is not None:
            failed += 1
            first = first or first_of(number, error)
        # the answer to a batch request is already an object in OpenAI's form
        if as_json or row.keys() >= {"custom_id", "response"}:
            (print_report if as_json else print_json)(row, compact=True)
        else:
            sure = f" ({percent(row['sure'])} sure)" if "sure" in row else ""
            print_line(f"{row.get('adapter') or 'base'}{sure} | {_question(row)} | {_answer(row)}")
    if rows == 0:
        raise NothingToDo("there are no rows to run", where=where)
    return OutputProgress(now(), rows=rows, failed=failed, first=first)


def _answer_rows(open_job: OpenJob, lines: Iterator[Line]) -> Iterator[Answered]:
    """Yields the answers, and keeps ONNX Runtime's own output out of stdout."""
    with divert_stdout():
        job, every = begin(open_job, lines)
    results = (answered for block in answers(job, every, OutputProgress(now())) for answered in block)
    with closing(job):
        while True:
            with divert_stdout():
                answered = next(results, None)
            if answered is None:
                return
            yield answered


def _question(row: Mapping[str, Any]) -> str:
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else messages
    content = last.get("content") if isinstance(last, Mapping) else last
    candidates = [
        row.get("prompt"),
        row.get("text"),
        row.get("question"),
        content,
        row.get("image"),
        row.get("audio"),
    ]
    text = str(next(filter(None, candidates), None))
    return text if len(text) <= 60 else f"{text[:59]}…"


def _answer(row: Mapping[str, Any]) -> str:
    if row.get("label") is not None and isinstance(row.get("scores"), Mapping):
        return f"{row['label']} {row['scores'][row['label']]:.3f}"
    if isinstance(row.get("error"), Mapping) or "completion" in row:
        return f"error: {row['error'].get('message')}" if "completion" not in row else str(row["completion"])
    if "answer" in row:
        return str(row["answer"] if row["answer"] is not None else row["note"])
    if "embedding" in row:
        first = ", ".join(f"{value:.4g}" for value in row["embedding"][:3])
        return f"{things(len(row['embedding']), 'number')}: {first}, …"
    if "entities" in row or "words" in row:
        found = [f"{one['text']} ({one['type']})" for one in row.get("entities", ())]
        found += [f"{word['text']} {word['score']:.3f}" for word in row.get("words", ())]
        return ", ".join(found) or "no entities"
    return str(row.get("note", "no label"))
