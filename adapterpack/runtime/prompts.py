"""Tokenizes prompts (a text, chat messages or token ids), and finds the tokens with which a decoder
starts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice, takewhile
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FormatError, excerpt
from ..pack import LARGEST_ID
from ..tasks.data import Picture
from .media import DATA, PIXELS, PictureReader, SeenPicture, fill_marks
from .open_bundle import OpenBundle
from .text import MAX_ID, text_part, token_ids

MOST_PICTURES = 64
"""The most pictures of one prompt."""
Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]
"""A text (for a decoder: one user message), a list of messages, or a list of token ids."""


_READ = 1024
"""The most tokens of a text by which an adapter is chosen."""


def first_ids(session: OpenBundle, texts: Iterable[object]) -> list[int]:
    """Returns the first token ids of texts, by which an adapter is chosen; a text may be a row of texts, the
    messages of a chat (only those of users count), or token ids.
    """

    def ids(text: Any) -> Iterator[int]:
        if isinstance(text, str):
            yield from session.tokenizer.encode(text[: 8 * _READ], special=False) if text else ()
        elif isinstance(text, int):
            yield from [text] if 0 <= text <= LARGEST_ID else ()
        elif isinstance(text, Mapping):
            named = "content" if "role" in text else "text" if "type" in text else None
            said = [*text.values()] if named is None else text.get(named)
            yield from ids(said if text.get("role", "user") == "user" else ())
        else:
            for one in text or ():
                yield from ids(one)

    return list(islice(ids(texts), _READ))


def prompt_ids(
    session: OpenBundle,
    prompt: Prompt,
    tools: Sequence[Mapping[str, Any]] = (),
    raw: bool = False,
    filled: Callable[[str], str] = str,
    values: Mapping[str, Any] | None = None,
) -> list[int]:
    """Returns the token ids of a prompt. ``tools`` and further ``values`` are passed to the chat template;
    with ``raw`` a text is tokenized without the template. ``filled`` changes the text of a chat before it
    becomes ids.

    Raises:
        ConfigError: the prompt is of no known form, has no tokens or a token that the model lacks, or is
            ``raw`` and consists of messages.
    """
    items = [prompt] if isinstance(prompt, str) else list(prompt)
    if items and all(type(item) is int for item in items):
        return _checked_ids(session, items)  # type: ignore[arg-type]
    if not isinstance(prompt, str) and not all(
        isinstance(item, Mapping) and "content" in item for item in items
    ):
        raise ConfigError(
            "a prompt is a text, a list of messages with role and content, or a list of token ids",
            found=excerpt(prompt),
        )
    if raw and not isinstance(prompt, str):
        raise ConfigError(
            "messages cannot be read without the chat template",
            found=excerpt(prompt),
            remedy="give a text as prompt, or leave --raw (raw=True) out",
        )
    # encoder-decoders take no chat template
    if isinstance(prompt, str) and (raw or not session.task.pads_left):
        ids = session.tokenizer.encode(prompt)
    else:
        given: Any = prompt
        ids = session.tokenizer.prompt(given, tools, filled, values) if items else []
    if not ids:
        raise ConfigError("a prompt has no tokens", found=excerpt(prompt))
    return ids


def see(
    session: OpenBundle,
    prompt: Prompt,
    pictures: Sequence[Picture] = (),
    tools: Sequence[Mapping[str, Any]] = (),
    values: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[SeenPicture]]:
    """Returns the token ids of a prompt of a model that takes images, with those of its ``pictures`` in the
    place of each mark, and what was read of the pictures. Messages may also hold pictures in parts of their
    content, as ``image_url`` with a data URL or as ``image``.

    Raises:
        ConfigError: the prompt has another number of marks than pictures, or too many pictures; otherwise see
            :func:`prompt_ids`.
    """
    reader = session.once(
        "pictures",
        lambda: PictureReader(
            session.folder,
            session.image_layout,
            session.shape(PIXELS),
            session.tokenizer.text_of(session.image_token),
        ),
    )
    given = list(pictures)
    if not isinstance(prompt, str) and any(isinstance(item, Mapping) for item in prompt):
        parts = _PARTS.search(session.tokenizer.template or "") is not None
        prompt = [
            _seen_message(message, reader.mark, parts, given)
            for message in prompt
            if isinstance(message, Mapping)
        ]
        if is_prompt(session, prompt):
            prompt = str(prompt[0]["content"])
    if len(given) > MOST_PICTURES:
        raise ConfigError(
            "a prompt has too many images", expected=f"at most {MOST_PICTURES}", found=len(given)
        )
    seen = [reader.read(picture, len(given) == 1) for picture in given]
    as_ids = not isinstance(prompt, str) and all(type(item) is int for item in prompt)
    filled = str if reader.plain else partial(fill_marks, mark=reader.mark, pictures=seen)
    start = session.tokenizer.special_id(reader.start) if isinstance(prompt, str) else None
    if isinstance(prompt, str):
        prompt += reader.end
    ids = prompt_ids(session, prompt, tools, filled=filled, values=values)
    if as_ids or reader.plain:
        ids = _fill_ids(session, ids, reader, seen)
    ids = reader.with_start(ids, session.image_token, start)
    if not seen:
        require_no_image(session, ids)
    return ids, seen


def is_prompt(session: OpenBundle, messages: Sequence[Any]) -> bool:
    """Whether a conversation is one message whose text is a prompt with its images in their places: the model
    has no chat template for it, and reads images.
    """
    sees = "image_features" in session.task.main.inputs
    return sees and session.tokenizer.template is None and [one.get("role") for one in messages] == ["user"]


def require_no_image(session: OpenBundle, ids: Sequence[int]) -> None:
    """Checks that a prompt without images has no image tokens.

    Raises:
        ConfigError: it has some.
    """
    if count := list(ids).count(session.image_token):
        raise ConfigError(
            "a prompt has image tokens, but its row has no image",
            found=f"{count} image tokens",
            remedy="give the row an image",
        )


_PARTS = re.compile(r"""['"]image(_url)?['"]""")
"""A chat template with this text writes the mark of a picture itself."""


def _seen_message(
    message: Mapping[str, Any], mark: str, parts: bool, pictures: list[Picture]
) -> Mapping[str, Any]:
    """Returns a message for the chat template, and adds the pictures in its content to ``pictures``."""
    if not isinstance(message.get("content"), list):
        return message
    content: list[Mapping[str, Any]] = []
    for part in message["content"]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            content.append({"type": "text", "text": part["text"]})
            continue
        found = part.get(kind) if kind in {"image", "image_url"} else None
        url = found.get("url") if isinstance(found, Mapping) else found
        if kind == "image_url" and not (isinstance(url, str) and url.startswith(DATA)):
            url = None
        if kind != "image" and url is None:
            raise ConfigError(
                "a part of a message is a text, or an image in a data URL: no address is fetched",
                expected=f"image_url with {DATA}png;base64,...",
                found=excerpt(part),
            )
        if url is not None:
            pictures.append(url)
        content.append({"type": "image"})
    if parts:
        return {**message, "content": content}
    return {**message, "content": "".join(str(part.get("text", mark)) for part in content)}


def _fill_ids(
    session: OpenBundle, ids: list[int], reader: PictureReader, pictures: Sequence[SeenPicture]
) -> list[int]:
    """Returns token ids with those of the pictures in place of their marks, or before them without marks."""
    mark = session.image_token
    found = [[mark] * picture.length for picture in pictures]
    if not reader.plain:
        (mark,) = session.tokenizer.encode(reader.mark, special=False)
        found = [session.tokenizer.encode(picture.text, special=False) for picture in pictures]
    if not pictures or not (count := ids.count(mark)):
        return [*(token for own in found for token in own), *ids]
    fill_marks(reader.mark * count, reader.mark, pictures)  # checks their number
    rest = iter(found)
    return [token for own in ids for token in (next(rest) if own == mark else [own])]


def _checked_ids(session: OpenBundle, ids: list[int]) -> list[int]:
    """Checks that the model has the ids of a caller, and returns them."""
    vocabulary = text_part(session.config, "vocab_size").get("vocab_size")
    most = vocabulary - 1 if type(vocabulary) is int else MAX_ID
    wrong = next((token for token in ids if not 0 <= token <= most), None)
    if wrong is not None:
        raise ConfigError(
            "a prompt has a token that the model does not have",
            expected=f"0 to {most}",
            found=str(wrong)[:40],
        )
    return ids


def start_ids(session: OpenBundle) -> list[int]:
    """Returns the tokens with which a decoder's rows begin: the start token, and those that the generation
    config forces after it.

    Raises:
        ConfigError: no file of the bundle names a start token.
        FormatError: a file has something else in that place.
    """
    for name, config in (
        ("generation_config.json", session.generation_config),
        ("config.json", session.config),
    ):
        path = session.folder / name
        start = token_ids(config, "decoder_start_token_id", path)
        if start:
            return [start[0], *_forced_ids(config.get("forced_decoder_ids"), path)]
    raise ConfigError(
        "the bundle names no token that its decoder starts with",
        where=session.folder,
        expected="decoder_start_token_id",
        remedy="add it to the base's generation_config.json and export again",
    )


def _forced_ids(pairs: Any, where: Path) -> list[int]:
    """Returns the forced tokens after the start token, from pairs ``[place, token]``, up to the first place
    at which the model chooses.
    """
    forced = pairs or []
    if not isinstance(forced, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int for pair in forced
    ):
        raise FormatError(
            "these are no forced tokens",
            where=f"{where}#forced_decoder_ids",
            expected="a list of [place, token]",
            found=excerpt(pairs),
        )
    tokens = {place: token_ids({"token": token}, "token", where) for place, token in forced}
    known = takewhile(tokens.get, count(1))
    return [token for place in known for token in tokens[place]]
