"""Encodes conversations as token ids and labels: training learns what the assistant says, including the end
of each turn.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ...chat_templates.template import ChatTemplate
from ...errors import ConfigError
from ...readable import things
from ..data import IGNORED, Encoded, Labels, report_of
from .form import Conversation, Message, read_form, text_of

log = logging.getLogger(__name__)

Piece = tuple[list[int], bool]
"""Token ids, and whether training learns them."""


def encode(
    rows: Any, tokenizer: Any, max_length: int, where: object, labels: Labels | None = None
) -> list[Encoded]:
    """Returns the encoded parts of :func:`by_row` for all rows, one after another."""
    return [part for parts in by_row(rows, tokenizer, max_length, where).values() for part in parts]


def by_row(
    rows: Any,
    tokenizer: Any,
    max_length: int,
    where: object,
    change: Callable[[int, Conversation], Conversation] = lambda number, conversation: conversation,
) -> dict[int, list[Encoded]]:
    """Returns row number -> token ids and labels for causal language modelling. The loss covers only the
    assistant's turns and the end of each.

    If the tokenizer has a chat template, it renders the turns, and its own end of a turn is learned;
    otherwise the tokenizer's end token is. Rows longer than ``max_length`` tokens are cut at the end; plain
    text is divided into rows of that length. Rows with nothing left to learn are dropped. The log says how
    many, and which columns are not read. ``change`` makes another conversation of that of a row.

    Raises:
        ConfigError: a row does not have the format that its columns indicate; no row is left; or the
            tokenizer has no end token.
    """
    report = report_of(where)
    form = read_form(rows, report)
    if form.remark:
        log.info("%s: %s", where, form.remark)
    require_end(tokenizer, where)
    encoded = {}
    cut = skipped = 0
    for number, row in enumerate(rows):
        with report.row(number) as place:
            with form.errors(place):
                conversation = change(number, form.read(row))
                pieces = list(pieces_of(conversation, tokenizer))
            wanted_turns = conversation.messages[conversation.learned_from :]
            answers = sum(message["role"] == "assistant" for message in wanted_turns)
            skipped += sum(learned for _, learned in pieces) < answers
            ids, wanted = join(pieces, report.reading.whole)
            kept = cut_up(ids, wanted, max_length, form.continuous)
            cut += bool(kept) and not form.continuous and len(ids) > max_length
            encoded[number] = kept
    left_out = sum(not kept for kept in encoded.values())
    report.cut, report.left_out = cut, left_out
    if left_out and left_out == len(encoded):
        if form.continuous:
            raise ConfigError("the data holds no text", where=where)
        raise ConfigError(
            "every prompt is longer than max_length, so there is nothing to learn",
            where=where,
            found=f"max_length {max_length}",
            remedy="raise max_length",
        )
    why = "no text in them" if form.continuous else f"the prompt fills max_length ({max_length})"
    for count, what, reason in (
        (left_out, "left out", f": {why}"),
        (cut, "cut", f" at max_length ({max_length})"),
        (skipped, "learned in part", ": the chat template, or none, does not show where each answer is"),
    ):
        if count:
            log.warning("%s: %s %d of %s%s", where, what, count, things(len(rows), "row"), reason)
    tokens = sum(len(part["input_ids"]) for kept in encoded.values() for part in kept)
    log.info("%s: %s of the form %s, %s", where, things(len(rows), "row"), form.name, things(tokens, "token"))
    return encoded


def require_end(tokenizer: Any, where: object) -> None:
    """Raises unless a tokenizer has an end token.

    Raises:
        ConfigError: it has none.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no end token, so the model could not learn where to stop",
            where=where,
            remedy="use the tokenizer of a generating model, name one of its tokens (special_tokens: "
            "{eos_token: ...}), or name another task (task: text-classification ...)",
        )


def join(pieces: Sequence[Piece], whole: bool = False) -> tuple[list[int], list[int]]:
    """Returns the token ids of pieces, and their labels; with ``whole`` all are learned.

    Example:
        >>> join([([5, 6], False), ([7], True)])
        ([5, 6, 7], [-100, -100, 7])
    """
    ids = [token for piece, _ in pieces for token in piece]
    return ids, [token if learned or whole else IGNORED for piece, learned in pieces for token in piece]


def cut_up(ids: list[int], labels: list[int], most: int, continuous: bool) -> list[Encoded]:
    """Returns the first ``most`` tokens with their labels, or as many parts as a ``continuous`` text fills,
    without those that have nothing to learn.
    """
    starts = range(0, len(ids), most) if continuous else [0]
    parts = ({"input_ids": ids[at : at + most], "labels": labels[at : at + most]} for at in starts)
    # nothing comes before the first token
    return [part for part in parts if any(label != IGNORED for label in part["labels"][1:])]


def pieces_of(conversation: Conversation, tokenizer: Any) -> Iterator[Piece]:
    """Yields the parts of a row in order, each tokenized separately, because at inference the model also gets
    its prompt tokenized separately.
    """
    if conversation.segments:
        for message in conversation.messages:
            ids = tokenizer(message["content"], add_special_tokens=False)["input_ids"]
            yield ids, message["role"] == "assistant"
        return
    *before, last = conversation.messages
    if not before and not last["content"]:
        return
    if before and tokenizer.chat_template and not conversation.verbatim:
        source = tokenizer.chat_template  # several by name, or one
        template = ChatTemplate(source if isinstance(source, str) else source.get("default", ""))
        turns = _render_turns(conversation, template, {**tokenizer.special_tokens_map, **conversation.values})
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}  # one ends a turn
        for position, (text, learned) in enumerate(turns):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            ends = not learned or position < len(turns) - 1 or (bool(ids) and ids[-1] in special)
            yield (ids if ends else [*ids, tokenizer.eos_token_id]), learned
        return
    yield _plain_prompt(before, tokenizer), False
    yield (
        [*tokenizer(text_of(last["content"]), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id],
        True,
    )


def _render_turns(
    conversation: Conversation, template: ChatTemplate, values: dict[str, Any]
) -> list[tuple[str, bool]]:
    """Returns the text of a conversation in parts, and whether each is learned. A turn is what follows the
    prompt that the template renders for it.

    White space after a turn's end belongs to the template. A template may render a turn differently when
    others follow, for instance without its reasoning; such a turn is not learned.
    """
    messages = conversation.messages
    finished = {**values, "add_generation_prompt": False}
    whole = template.render(messages, finished)
    done = 0
    parts = []
    prompt = whole
    for place, message in enumerate(messages):
        if message["role"] == "assistant" and place >= max(conversation.learned_from, 1):
            prompt = template.render(messages[:place], values)
            through = template.render(messages[: place + 1], finished) if place < len(messages) - 1 else whole
            # Learn a turn only if the template renders it the same way with and without the turns after it.
            if whole.startswith(through) and through.startswith(prompt) and done <= len(prompt):
                turn = through[len(prompt) :].rstrip()
                parts += [(whole[done : len(prompt)], False), (turn, True)]
                done = len(prompt) + len(turn)
    # the rendered conversation does not end in a recognised answer: keep its prompt and append the last
    # answer verbatim
    if whole[done:].strip():
        return [(prompt, False), (text_of(messages[-1]["content"]), True)]
    return parts


def _plain_prompt(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """Returns the ids of a prompt without a chat template; for no messages, the ids that begin every text.

    Some tokenizers append the end token to every text; it is removed, because an answer follows.
    """
    ids: list[int] = tokenizer("\n".join(text_of(message["content"]) for message in messages))["input_ids"]
    # some models use the same token for the beginning and the end
    begins = len(ids) == 1 and tokenizer.bos_token_id == tokenizer.eos_token_id
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and not begins else ids
