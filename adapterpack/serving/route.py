"""Routes: what a route is, the state that the routes of a server share, and the context of a request, which
parses its body; errors name the field at fault.
"""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_type_hints

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ..errors import FormatError, nearest
from ..http import HTTPError, body_of, fields_of, invalid_request
from ..io import Json, StrictStruct, strict_json, typed_json, without_none
from ..pack import AUTO
from ..runtime import first_ids
from .adapters.adapter_control import AdapterControl
from .adapters.on_request import OnRequest
from .catalogue import Catalogue, ServedModel
from .observability import Metrics, Record, Traffic
from .openai import OPENAI, ClientRequest, ErrorForm, NamedWeight
from .scheduling import Admission, EngineThread
from .tenants import Key, Keys, Quotas, ServerLimits

T = TypeVar("T", bound=StrictStruct)
_CODES = {400: "invalid_request", 408: "request_too_slow", 413: "request_too_large"}
_LARGEST = 1 << 64
"""The bound of integers: seeds have 64 bits."""


@dataclass(frozen=True)
class State:
    """The state of one server: its engine and models, its keys and limits, and its metrics and logs.

    ``ended`` are called for each request that has ended: metrics, audit log, traces. Without keys, ``hosts``
    are the names in the Host header that requests may use, against DNS rebinding; None permits any.
    """

    engine: EngineThread
    catalogue: Catalogue
    adapters: AdapterControl
    admission: Admission
    keys: Keys
    quotas: Quotas
    limits: ServerLimits
    metrics: Metrics
    ended: list[Callable[[Record], None]]
    traffic: Traffic
    fetched: OnRequest
    hosts: frozenset[str] | None = None


class RequestContext(NamedTuple):
    """A request with the server's state, its key, and its record."""

    state: State
    request: Request
    key: Key
    record: Record

    async def request_model(
        self,
        name: str,
        adapters: Sequence[NamedWeight] | None = None,
        texts: Iterable[object] = (),
        *,
        counts: bool = True,
    ) -> ServedModel:
        """Returns the model that the request names and records it; the arguments are those of
        :meth:`.Catalogue.request_model`. Adapters that sources on request have are loaded first. Unless a
        model is called so, ``auto`` is the adapter that the ``texts`` fit, which are texts, token ids, or
        rows of them. The request ``counts`` in the key's quotas.

        Raises:
            HTTPError: there is no such model, or the key has no request left.
        """
        if counts:
            self.state.quotas.ask(self.key)
        state = self.state
        for one in (name, *(adapter.name for adapter in adapters or ())):
            await state.fetched.ensure(one, self.key)
        if name == AUTO and adapters is None and not (state.adapters.has(AUTO) and self.key.may(AUTO)):
            model = await asyncio.to_thread(self._choose, texts)
            await state.fetched.ensure(model.name, self.key)
        else:
            model = state.catalogue.request_model(name, adapters, self.key)
        self.record.adapter, self.record.digest = model.adapter, model.digest
        self.record.mixed = model.mixed
        return model

    def _choose(self, texts: Iterable[object]) -> ServedModel:
        """Returns the adapter that the beginning of the texts fits best, of those that the key may use, or
        the base.
        """
        chosen, sure = self.state.adapters.texts.choose(
            first_ids(self.state.engine.engine.bundle, texts),
            None if self.key.adapters == "*" else self.key.adapters,
        )
        catalogue = self.state.catalogue
        name = chosen or (catalogue.base if self.key.base else AUTO)  # which is no model, then
        return catalogue.find_model(name, self.key)._replace(sure=round(sure, 3))

    async def read_body(self, kind: type[T]) -> T:
        """Reads the body and parses it into a struct.

        Raises:
            HTTPError: the body is no JSON object or does not fit the struct (400), too slow (408), too large
                (413), or of another media type (415).
        """
        media_type = self.request.headers.get("content-type", "")
        if media_type.partition(";")[0].strip().lower() != "application/json":
            what = "the body must be sent as application/json"
            raise HTTPError(415, "unsupported_media_type", what, param="Content-Type")
        return parse(await self._body(), kind, self.state.limits, self.record.ignored)

    async def read_form(self, kind: type[T]) -> T:
        """Reads the body, a form, into a struct, whose numbers are texts in the form.

        Raises:
            HTTPError: as :meth:`read_body`.
        """
        try:
            fields = fields_of(await self._body(), self.request.headers.get("content-type", ""))
        except HTTPError as refused:
            raise HTTPError(
                refused.status, _CODES.get(refused.status, refused.name), refused.what, close=True
            ) from refused
        hints = get_type_hints(kind, include_extras=True)
        given = Json(fields)
        for name in fields.keys() & hints.keys():
            with suppress(msgspec.ValidationError, UnicodeDecodeError):
                if hints[name] is not bytes:
                    given[name] = fields[name].decode()
                    given[name] = msgspec.convert(given[name], hints[name], strict=False)
        return _as_struct(given, kind)

    async def _body(self) -> bytes:
        limits = self.state.limits
        try:
            return await body_of(self.request, limits.body_bytes, limits.body_seconds)
        except HTTPError as refused:
            raise HTTPError(refused.status, _CODES[refused.status], refused.what, close=True) from refused


def parse(data: bytes, kind: type[T], limits: ServerLimits, ignored: list[str] | None = None) -> T:
    """Parses JSON bytes into a struct. Fields that a client sends for other servers are left out; their notes
    are added to ``ignored``.

    Raises:
        HTTPError: the bytes are no JSON object, or do not fit the struct.
    """
    try:
        value = strict_json.loads(data, None, limits.body_bytes, _LARGEST, limits.depth)
    except FormatError as error:
        raise HTTPError(400, "invalid_json", error.sentence) from error
    if not isinstance(value, dict):
        raise HTTPError(400, "invalid_json", "the body must be a JSON object")
    given = without_none(value)
    if ignored is not None and issubclass(kind, ClientRequest):
        for name in (given.keys() & _client_fields().keys()) - {*kind.__struct_encode_fields__}:
            ignored.append(f"left out: {name}, a field of {_client_fields()[name]}")
            del given[name]
    return _as_struct(given, kind)


def _as_struct(given: Json, kind: type[T]) -> T:
    _require_known(given, kind)
    try:
        struct = msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        pointer, message = typed_json.misfit(given, kind) or ("", str(error))
        raise _misfit(pointer, message) from error
    for pointer, message in struct.breaches():
        raise _misfit(pointer, message)
    return struct


@cache
def _client_fields() -> dict[str, str]:
    """Field -> the server or client of which it is known."""
    table = tomllib.loads((Path(__file__).parent / "openai" / "client_fields.toml").read_text("utf-8"))
    return {name: client for client, names in table.items() for name in names}


def _require_known(given: Json, kind: type[StrictStruct]) -> None:
    known = kind.__struct_encode_fields__
    for name in given:
        if name not in known:
            raise HTTPError(
                400,
                "unknown_parameter",
                f"this server has no such field: {name[:100]!r}; {nearest(name[:100], known)}",
                param=name[:100],
            )


def _misfit(pointer: str, message: str) -> HTTPError:
    place = pointer.removeprefix("/").replace("/", ".")
    return invalid_request(f"{place}: {message}" if place else message, place or None)


Handler = Callable[[RequestContext], Awaitable[Response]]


class RouteSpec(NamedTuple):
    """A method at a path, who may use it (anyone, holders of a key, or admins), and the structs of its body
    and response.

    ``event`` is the struct of stream events; ``errors`` is the form of errors; ``example`` are fields of a
    body, besides ``model``, with which to try the route. Successful requests to a ``quiet`` route are not
    logged; the body of a ``form`` is ``multipart/form-data`` and not JSON.
    """

    method: str
    path: str
    handler: Handler
    access: Literal["open", "key", "admin"]
    summary: str
    body: type | None = None
    answer: type | None = None
    event: type | None = None
    errors: ErrorForm = OPENAI
    example: Mapping[str, Any] | None = None
    quiet: bool = False
    form: bool = False


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Makes a JSON response of a value, such as a struct."""
    return Response(msgspec.json.encode(value), status, headers, "application/json")
