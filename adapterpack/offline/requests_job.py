"""Answers requests in OpenAI's batch format, one a line, with the routes of ``adapterpack serve``.

https://platform.openai.com/docs/guides/batch: a line has ``custom_id``, ``method``, ``url`` and ``body``; its
answer has ``id``, ``custom_id``, ``response`` (``status_code``, ``request_id``, ``body``) and ``error``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from ..errors import AdapterpackError, ConfigError
from ..serving import InProcess
from ..serving.embedded import Posted
from .job import Answered
from .lines import REQUEST, Line, is_request


class RequestsJob:
    """A :class:`~.job.OfflineJob` that answers requests. A request that samples without a seed gets one
    derived from the request, its line and ``seed``. ``where`` is the name of the file in errors.
    """

    def __init__(
        self, server: InProcess, block: int, where: str, seed: int, identity: Mapping[str, Any]
    ) -> None:
        self._server = server
        self.block = block
        self._where = where
        self._seed = seed
        self.identity = identity

    def close(self) -> None:
        """Closes the server."""
        self._server.close()

    def answer_block(self, first: int, lines: Iterable[Line], began: int) -> Iterator[Answered]:
        """Posts the requests of a block together and yields their responses in order."""
        requests = [(line, self._post(number, line)) for number, line in enumerate(lines, first)]
        replies = iter(self._server.block([posted for _, posted in requests if isinstance(posted, Posted)]))
        for line, posted in requests:
            custom = line.row.get("custom_id") if isinstance(line.row, dict) else None
            if not isinstance(posted, Posted):
                error = {"code": posted.code, "message": str(posted)}
                yield Answered(
                    line,
                    {"id": f"batch_req_{line.number}", "custom_id": custom, "response": None, "error": error},
                    posted,
                    0,
                )
                continue
            reply = next(replies)()
            body = msgspec.json.decode(reply.body)
            row = {
                "id": f"batch_{posted.id}",
                "custom_id": custom,
                "error": None,
                "response": {
                    "status_code": reply.status,
                    "request_id": posted.id,
                    "body": _add_date(body, posted.id, began),
                },
            }
            yield Answered(line, row, self._error(line, reply.status, body), _tokens(body))

    def _post(self, number: int, line: Line) -> Posted | AdapterpackError:
        """Returns the request of a line, or what is wrong with it."""
        row = line.row
        where = f"{self._where}, line {line.number}"
        if not isinstance(row, dict):
            return row
        if not is_request(row):
            return ConfigError(
                "this line is no request",
                where=where,
                expected=", ".join(sorted(REQUEST)),
                found=", ".join(row) or "no key",
            )
        body = row["body"]
        route = self._server.routes.get(row["url"]) if isinstance(row["url"], str) else None
        if row["method"] != "POST" or route is None:
            return ConfigError(
                "this bundle has no such route",
                where=where,
                found=f"{row['method']} {row['url']}"[:200],
                expected=", ".join(f"POST {path}" for path in self._server.routes),
            )
        if not isinstance(body, dict) or not isinstance(row["custom_id"], str):
            return ConfigError(
                "a request has an object as its body, and a text as its custom_id", where=where
            )
        if body.get("stream"):
            return ConfigError(
                "answers to a file of requests cannot be streamed",
                where=where,
                found="stream",
                remedy="leave it out",
            )
        seal = hashlib.sha256(json.dumps([self._seed, number, row], sort_keys=True).encode()).hexdigest()
        if "seed" in getattr(route.body, "__struct_fields__", ()) and body.get("seed") is None:
            body = {**body, "seed": int(seal[:15], 16)}
        return Posted(row["url"], json.dumps(body).encode(), f"req_{seal[:24]}")

    def _error(self, line: Line, status: int, body: Any) -> AdapterpackError | None:
        if status == 200:
            return None
        said = f"the answer to this request is {status}: {body['error']['message']}"
        return ConfigError(said, where=f"{self._where}, line {line.number}")


def _add_date(body: Any, request: str, began: int) -> Any:
    """Replaces the id and time of a response by values that follow from the input file and the job's begin,
    so that runs are reproducible.
    """
    if "id" in body and "created" in body:
        return {
            **body,
            "id": f"{body['id'].partition('-')[0]}-{request.removeprefix('req_')}",
            "created": began,
        }
    return body


def _tokens(body: Any) -> int:
    usage = body.get("usage") or {}
    return int(usage.get("completion_tokens", usage.get("prompt_tokens", 0)))
