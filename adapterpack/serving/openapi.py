"""Generates the OpenAPI document of the routes, from the structs that parse requests and write responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ..io import Json, portable
from ..version import VERSION
from .openai import STREAM_TYPE
from .route import RouteSpec

_PLACE = "#/components/schemas/{name}"


def document(routes: Sequence[RouteSpec]) -> Json:
    """Returns the OpenAPI 3.1 document of these routes."""
    structs = [
        kind
        for route in routes
        for kind in (route.body, route.answer, route.event, route.errors.struct)
        if kind is not None
    ]
    references, components = msgspec.json.schema_components(structs, ref_template=_PLACE)
    by_struct = dict(zip(structs, references, strict=True))
    paths: dict[str, Json] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, by_struct)
    return {
        "openapi": "3.1.0",
        "info": {"title": "adapterpack serve", "version": VERSION},
        "paths": paths,
        "components": {
            "schemas": portable(components),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: RouteSpec, by_struct: dict[Any, Any]) -> Json:
    content: Json = {"application/json": {"schema": {} if route.answer is None else by_struct[route.answer]}}
    if route.path == "/metrics":
        content = {"text/plain": {"schema": {"type": "string"}}}
    if route.event is not None:
        content[STREAM_TYPE] = {"schema": _event([by_struct[route.event], by_struct[route.errors.struct]])}
    answers: Json = {"200": {"description": route.summary, "content": content}}
    if route.access != "open":
        answers["default"] = {
            "description": "an error",
            "content": {"application/json": {"schema": by_struct[route.errors.struct]}},
        }
    operation: Json = {
        "summary": route.summary,
        "responses": answers,
        "security": [] if route.access == "open" else [{"key": []}],
    }
    if "{" in route.path:
        name = route.path.partition("{")[2].partition("}")[0].partition(":")[0]
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    if route.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {
                "multipart/form-data" if route.form else "application/json": {"schema": by_struct[route.body]}
            },
        }
    return operation


def _event(data: list[Any]) -> Json:
    """Returns the schema of a stream's events: JSON of one of these schemas, or the mark of the end."""
    written = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": data}}
    return {
        "type": "object",
        "properties": {"event": {"type": "string"}, "data": {"anyOf": [{"const": "[DONE]"}, written]}},
        "required": ["data"],
    }
