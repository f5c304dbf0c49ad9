"""What servers answered in tests, held to their own OpenAPI documents."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import httpx
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from servers import Served
from shipped_schemas import structure


class Answers:
    """Keeps one answer in JSON of each structure, by what was asked and whether it was a refusal."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str, bool, object], Any] = {}

    def keep(self, response: httpx.Response) -> None:
        """Keeps an answer, if it is another."""
        if response.headers.get("content-type") == "application/json":
            value, asked = response.json(), response.request
            self._kept.setdefault(
                (asked.method.lower(), asked.url.path, response.is_success, structure(value)), value
            )

    def require(self, server: Served) -> None:
        """Checks all that were kept, if the server still says what it answers."""
        with suppress(httpx.HTTPError):
            answer = server.get("/openapi.json")
            for (method, path, good, _), value in self._kept.items() if answer.is_success else ():
                if (schema := _schema(answer.json(), method, path, good)) is not None:
                    error = best_match(Draft202012Validator(schema).iter_errors(value))
                    assert error is None, (
                        f"{method} {path} is answered at {error.json_path} other than documented: "
                        f"{error.message:.500}"
                    )


def _schema(document: dict[str, Any], method: str, path: str, good: bool) -> dict[str, Any] | None:
    """The schema of an answer, None where the document has no such route, or says nothing of such an
    answer.
    """
    for template, methods in document["paths"].items():
        if method in methods and re.fullmatch(re.sub(r"\{[^}]*\}", "[^/]+", template), path):
            answer = methods[method]["responses"].get("200" if good else "default", {"content": {}})
            described = answer["content"].get("application/json")
            return (
                None if described is None else {**described["schema"], "components": document["components"]}
            )
    return None
