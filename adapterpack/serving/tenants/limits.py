"""What a request may be and take. All of it is checked before the work that it bounds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerLimits:
    """The bounds of a server.

    Attributes:
        body_bytes: of a request.
        body_seconds: in which a body arrives, and a second more for each 16 KiB.
        headers: lines of a request's head.
        header_bytes: of these lines.
        depth: levels of a request's JSON.
        messages: of a conversation.
        rows: answers that one request asks for, prompts times ``n``.
        inputs: of a request for embeddings or labels, each of which takes one pass.
        answer_tokens: of all answers of a request together.
        tools: functions that a request offers.
        stop: stop texts of a request.
        stop_characters: of each of them.
        form_characters: of a schema, an expression, a grammar or a list of choices.
        open_rows: rows that wait or run, of all keys.
        open_rows_a_key: the same of one key, unless the key says otherwise.
        request_seconds: from a request's arrival to the end of its answer.
        first_seconds: after which a stream begins although it has nothing to say yet, and then says that it
            is alive.
        stuck_seconds: after which a step of the engine is stuck.
        drain_seconds: that answers have to end when the server is to end.
        masks_beside: whether the masks of slow forms are computed beside the engine's steps, so that they
        slow only their own rows; what runs together then depends on time.
        unread_keys_seconds: for which keys count whose file cannot be read any more.
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
