"""Text generation with images: the continuation of a prompt that may include an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..errors import ConfigError
from .conversations.encoding import by_row
from .conversations.form import Conversation
from .data import IGNORED, OWN_COLUMNS, Encoded, Labels, Picture, Result, Row, file_of, map_rows, prompt_of
from .session import TaskSession
from .task import DECODER, GRID, MAIN, TASKS, Part, Task, TaskTraining
from .text_generation import completions


def answer(
    session: TaskSession, rows: Sequence[Row], adapters: Sequence[str | None], sampling: Mapping[str, Any]
) -> list[Result]:
    """Returns ``completion`` for each row, as for text generation. A row has one ``image`` or a list of them,
    or images in the content of its messages.
    """
    read = map_rows(rows, lambda row: session.see(prompt_of(row), _pictures(row)))
    images = session.images([picture for _, pictures in read for picture in pictures])
    return completions(session, [ids for ids, _ in read], adapters, sampling, images)


def _pictures(row: Row) -> list[Any]:
    given = row.get("image", [])
    return [file_of({"image": one}, "image") for one in (given if isinstance(given, list) else [given])]


PLACE = "<image>"
"""What stands for a picture in texts of training data, whatever the model has there."""
_COLUMNS = ("images", "image")


def encode(
    rows: Any, media: Any, max_length: int, where: object, labels: Labels | None = None
) -> list[Encoded]:
    """Returns token ids and labels as for text generation, and the pictures of each row, read again when a
    batch needs them. The rows have the column ``image`` or ``images`` in addition to the columns of a format
    for language models; a text has ``<image>`` or the model's own mark for each, or none: then it begins with
    them.

    Raises:
        ConfigError: the column of images is missing, or a row has another number of marks than images;
            otherwise as for text generation.
    """
    column = images_column(rows, where)
    given = [listed(value) for value in rows[column]]
    places = [f"{where}, row {number}" for number in range(1, len(rows) + 1)]
    seen = [
        [(one.text, one.length) for one in media.pictures(some, place).pictures]
        for some, place in zip(given, places, strict=True)
    ]
    texts = without_parts(rows.remove_columns(column))
    encoded = []
    for number, parts in by_row(
        texts, media.tokenizer, max_length, where, partial(_fill, media, seen)
    ).items():
        for part in parts[:1]:  # the other parts of a long text have no image
            whole = _with_images(part, media, seen[number], places[number])
            encoded.append({**whole, "images": partial(media.pictures, given[number], places[number])})
    return encoded


def images_column(rows: Any, where: object) -> str:
    """Returns the column of images.

    Raises:
        ConfigError: there is none.
    """
    for name in _COLUMNS:
        if name in rows.column_names:
            return name
    raise ConfigError(
        "images with texts need the column image or images",
        where=where,
        found=", ".join(rows.column_names),
        remedy=OWN_COLUMNS,
    )


def listed(value: Any) -> list[Any]:
    """Returns the images of a row as a list."""
    return [] if value is None else value if isinstance(value, list) else [value]


def without_parts(rows: Any) -> Any:
    """Returns rows whose messages have texts in the place of lists of parts."""

    def plain(turn: Any) -> Any:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), list):
            return turn
        return {**turn, "content": "".join(part.get("text") or PLACE for part in turn["content"])}

    texts = [name for name in rows.column_names if name not in _COLUMNS]
    names = [name for name in texts if any(isinstance(value, list) for value in rows[:1][name])]
    return (
        rows.map(lambda row: {name: [plain(turn) for turn in row[name]] for name in names}) if names else rows
    )


def _fill(
    media: Any, seen: Sequence[Sequence[tuple[str, int]]], number: int, conversation: Conversation
) -> Conversation:
    """Returns a conversation with the model's own texts in the places of its pictures."""
    reader = media.reader
    rest = iter(text for text, _ in seen[number])

    def fill(text: str) -> str:
        if reader.mark not in text:
            text = text.replace(PLACE, media.frame)
        if reader.plain:
            return text
        first, *others = text.split(reader.mark)
        return first + "".join(next(rest, reader.mark) + other for other in others)

    *before, answer = conversation.messages
    messages = [{**turn, "content": fill(turn["content"])} for turn in before]
    if messages and reader.end:
        messages[-1]["content"] += reader.end
    return conversation._replace(messages=[*messages, answer])


def _with_images(
    part: Mapping[str, Any], media: Any, seen: Sequence[tuple[str, int]], where: object
) -> Encoded:
    """Returns a row with as many image tokens as its pictures have features: those of each in the place of
    its mark, or all at the beginning.
    """
    token = media.image_token
    ids = part["input_ids"]
    labels = part["labels"]
    wanted = sum(length for _, length in seen)
    rest = iter(length for _, length in seen)
    if token not in ids:
        first = [token] * wanted
        if seen and not media.reader.plain:
            text = "".join(text for text, _ in seen)
            first = media.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [*first, *ids]
        labels = [*[IGNORED] * len(first), *labels]
    elif media.reader.plain and ids.count(token) == len(seen):
        counts = [next(rest) if one == token else 1 for one in ids]
        ids, labels = (
            [one for one, count in zip(values, counts, strict=True) for _ in range(count)]
            for values in (ids, labels)
        )
    if ids.count(token) != wanted:
        raise ConfigError(
            "a row has a mark for each of its images, or none, and room for them in max_length",
            where=where,
            expected=f"{len(seen)} images, {wanted} positions",
            found=f"{ids.count(token)} image tokens",
        )
    tokenizer = media.tokenizer
    start = media.reader.start
    known = tokenizer.convert_tokens_to_ids(start) if start in tokenizer.all_special_tokens else None
    begun = media.reader.with_start(ids, token, known)
    return {"input_ids": begun, "labels": [*[IGNORED] * (len(begun) - len(ids)), *labels]}


_PARTS = "adapterpack.exporting.tracing.vision_parts"
TASKS.register(
    Task(
        "image-text-to-text",
        "AutoModelForImageTextToText",
        answer,
        ("ForConditionalGeneration",),
        lambda config: bool(config.get("vision_config")) and not config.get("is_encoder_decoder"),
        columns={"image": Picture | list},
        parts=(
            Part("vision", f"{_PARTS}:Vision", ("pixel_values", *GRID)),
            Part(
                MAIN,
                f"{_PARTS}:SeeingDecoder",
                (*DECODER, "image_features", "position_offsets", "token_type_ids"),
            ),
        ),
        training=TaskTraining(encode, reads="media", adapted="all-language"),
    )
)
