"""The web page at ``/``: static files without a build step, which load nothing from other hosts.

The files are read once and looked up by name, so no request can form a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from starlette.responses import Response

from ..http import HTTPError
from ..palette import style_sheet
from ..resources import resource
from .route import RequestContext, RouteSpec

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",
}
"""Headers of every file: the page may load from and call this server only, cannot turn text into markup or
script, and cannot be framed.
"""
INDEX = "index.html"
COLOURS = "colours.css"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}


class PageFile(NamedTuple):
    """The bytes and media type of a file."""

    data: bytes
    type: str


@cache
def page_files() -> Mapping[str, PageFile]:
    """Returns the files by name."""
    data = {path.name: path.read_bytes() for path in resource("web/page").iterdir()}
    data[COLOURS] = style_sheet().encode()
    return {name: PageFile(content, _TYPES[Path(name).suffix]) for name, content in data.items()}


async def index(context: RequestContext) -> Response:
    """``GET /``: returns the page."""
    return _response(INDEX)


async def file(context: RequestContext) -> Response:
    """``GET /page/NAME``: returns a file of the page.

    Raises:
        HTTPError: there is no such file.
    """
    return _response(context.request.path_params["name"])


PAGES: tuple[RouteSpec, ...] = (
    RouteSpec("GET", "/", index, "open", "the page"),
    RouteSpec("GET", "/page/{name}", file, "open", "a file of the page"),
)
"""The page's routes. They are for browsers, so the OpenAPI document does not list them."""


def _response(name: str) -> Response:
    found = page_files().get(name)
    if found is None:
        raise HTTPError(404, "not_found", "the page has no such file")
    return Response(found.data, 200, HEADERS, found.type)
