"""Limits of requests. Each is checked before the work that it bounds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerLimits:
    """The limits of a server.

    Attributes:
        body_bytes: the most bytes of a request's body.
        body_seconds: the time for a body to arrive, plus a second for each 16 KiB.
        headers: the most header lines of a request.
        header_bytes: the most bytes of these lines.
        depth: the most levels of a request's JSON.
        messages: the most messages of a conversation.
        rows: the most answers of one request, prompts times ``n``.
        inputs: the most inputs of a request for embeddings or labels.
        answer_tokens: the most tokens of all answers of a request together.
        tools: the most functions in a request.
        stop: the most stop texts of a request.
        stop_characters: the most characters of each stop text.
        form_characters: the most characters of a schema, an expression, a grammar or a list of choices.
        open_rows: the most rows of all keys that wait or run.
        open_rows_a_key: the same for one key, unless the key has its own limit.
        request_seconds: the time from a request's arrival to the end of its answer.
        first_seconds: the time after which a stream begins without output, and sends comments to stay alive.
        stuck_seconds: the time after which an engine step counts as stuck.
        drain_seconds: the time for answers to end when the server shuts down.
        masks_beside: whether token masks of slow grammars are computed beside the engine's steps, so that
            they slow only their own rows; which rows run together then depends on timing.
        unread_keys_seconds: how long keys stay valid if their file becomes unreadable.
    """

    body_bytes: int = 4 << 20
    body_seconds: float = 10.0
    headers: int = 100
    header_bytes: int = 32 << 10
    depth: int = 64
    messages: int = 1024
    rows: int = 64
    inputs: int = 1024
    answer_tokens: int = 1 << 17
    tools: int = 128
    stop: int = 16
    stop_characters: int = 256
    form_characters: int = 1 << 16
    open_rows: int = 512
    open_rows_a_key: int = 128
    request_seconds: float = 600.0
    first_seconds: float = 10.0
    stuck_seconds: float = 60.0
    drain_seconds: float = 60.0
    masks_beside: bool = True
    unread_keys_seconds: float = 60.0
