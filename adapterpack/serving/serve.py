"""Runs a server as a process: opens the bundle, loads adapters, listens, and shuts down on SIGTERM after the
last answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..engine_graph.genai_engine import served_folder
from ..errors import ConfigError
from ..extras import needed_by
from ..http import IN_THE_CLEAR, Certificate, is_loopback
from ..hub import folder_of
from ..io import allow_more_files, without_none
from ..pack import Pack, Signers
from ..pack.trust import SigstoreIdentity
from ..paths import StrPath
from ..runtime import Device, Engine
from .adapters.folder_watcher import FolderWatcher
from .listen import UNIX, address_socket, open_to_others, port_socket
from .tenants import Keys, ServerLimits

LOOPBACK = "127.0.0.1"
_LOG = logging.getLogger("adapterpack.serving")


class Serving(NamedTuple):
    """A server that takes requests: its address, the base's name, the digests of adapters by name, the
    operator's address, and example bodies by path.
    """

    address: str
    base: str
    adapters: Mapping[str, str]
    admin: str | None
    examples: Mapping[str, Any]


def serve(
    bundle: StrPath,
    *,
    adapters: Sequence[Pack | StrPath] = (),
    fetch: Sequence[StrPath] = (),
    host: str = LOOPBACK,
    port: int = 8000,
    name: str | None = None,
    keys: StrPath | None = None,
    api_key: str | None = None,
    insecure: bool = False,
    audit: str | None = "-",
    sampling: str | None = None,
    share_prefixes: bool = False,
    provider: str | Device | None = None,
    threads: int | None = None,
    max_rows: int | None = None,
    max_length: int | None = None,
    draft: StrPath | None = None,
    deterministic: bool = False,
    limits: ServerLimits | None = None,
    watch: float | None = None,
    require_signature: Sequence[StrPath | SigstoreIdentity] = (),
    admin: str | None = None,
    admin_key_file: StrPath | None = None,
    tls_cert: StrPath | None = None,
    tls_key: StrPath | None = None,
    traces: bool = False,
    page: bool = True,
    ready: Callable[[Serving], None] | None = None,
) -> None:
    """Serves a bundle and its adapters over HTTP until it is interrupted.

    A decoder's bundle with the engine's graph gets OpenAI's routes for text; an encoder's bundle gets those
    for embeddings or labels, and the Open Inference Protocol.

    ``adapters`` are packs, folders of packs, or lock files of ``adapterpack pull`` to load besides the
    bundle's own. A request for a name that no adapter has loads the pack of that name, with the same checks,
    from the first of ``fetch`` that has it: folders of packs, lock files, or owners on a hub (``hf://org``).
    ``keys`` is a file of API keys, ``api_key`` a single one for all; without either only this
    machine may use the server, unless ``insecure``. ``audit`` is a file with a line for each request, ``"-"``
    standard error. ``sampling`` is the source of parameters that a request for text leaves out: ``model``
    (the default) or ``greedy``. Requests of one key share cached prompt prefixes; with ``share_prefixes``
    those of all keys do, which can then find out from response times what others have asked. ``max_rows``,
    ``max_length``, ``draft`` and ``deterministic`` are the engine's. ``ready`` is called once the server
    takes requests; ``port`` 0 picks a free one. On SIGTERM and Ctrl-C the server first finishes its answers.

    With ``watch`` it checks the folders and lock files every so many seconds, and loads, replaces or unloads
    what has changed there. With ``require_signature``, a list of key files and of
    :class:`SigstoreIdentity`, a pack needs a signature of one of them. ``admin`` is an address
    (``HOST:PORT``, ``unix:PATH``) at which the holder of the key in ``admin_key_file`` loads and unloads
    adapters. ``page`` says whether browsers get a page at ``/``. ``tls_cert`` and ``tls_key`` are PEM files,
    which are read again when they change: both addresses then speak TLS, but a Unix socket does not. With
    ``traces`` every request becomes a span, which goes where the variables ``OTEL_*`` say.

    Raises:
        Unsupported: no engine runs the bundle, or no route answers its task.
        ConfigError: others could use the server without a key; a file of keys or a certificate is invalid;
            two adapters have one name; there is no folder to watch; or an option does not apply.
        BaseMismatch: an adapter belongs to another base.
        TrustError: an adapter lacks a required signature.
        StorageError: a file or the address cannot be used.
        MissingExtra: the extra ``serve`` is not installed, or with ``traces`` the extra ``otel``.
    """
    with needed_by("serving"):
        from .admin import ADMIN_ROUTES  # noqa: PLC0415 - needs an extra
        from .app import build  # noqa: PLC0415 - needs an extra
        from .assembly import assemble  # noqa: PLC0415 - needs an extra
        from .page import PAGES  # noqa: PLC0415 - needs an extra
        from .process import Address, run  # noqa: PLC0415 - needs an extra
    bounds = limits or ServerLimits()
    path = None if keys is None else Path(keys)
    known = (
        Keys(path=path, unread_seconds=bounds.unread_keys_seconds) if api_key is None else Keys.one(api_key)
    )
    _require_keys(host, known.needed, insecure)
    admin_keys = _admin_keys(admin, admin_key_file)
    tls = Certificate.of(tls_cert, tls_key)
    scheme, context = ("http", None) if tls is None else ("https", tls.context)
    if tls is None and (not is_loopback(host) or (admin is not None and open_to_others(admin))):
        _LOG.warning(IN_THE_CLEAR)
    allow_more_files()  # of loaded packs, and of connections
    size = {"max_rows": max_rows, "max_length": max_length, "draft": draft and folder_of(draft)}
    server = assemble(
        Engine(
            served_folder(folder_of(bundle)),
            provider,
            threads=threads,
            deterministic=deterministic,
            **without_none(size),
        ),
        adapters,
        known,
        bounds,
        {"sampling": sampling, "share_prefixes": share_prefixes or None},
        name=name,
        audit=audit,
        signers=Signers(require_signature),
        fetch=fetch,
        changing=watch is not None or admin is not None,
        watched=watch is not None,
        hosts=None
        if known.needed or insecure
        else frozenset({"localhost", "127.0.0.1", "[::1]", host.lower()}),
        pages=PAGES if page else (),
    )
    state = server.state
    with ExitStack() as stack:
        stack.callback(server.close)
        watcher = None if watch is None else FolderWatcher(state.adapters)
        if watcher is not None:
            watcher.look(at_once=True)
        for missing in () if fetch else known.missing({one.name for one in state.adapters.adapters}):
            _LOG.warning("%s", missing)
        if traces:
            with needed_by("tracing"):
                from .observability.tracing import Traces  # noqa: PLC0415 - needs an extra
            tracing = Traces()
            stack.callback(tracing.close)
            state.ended.append(tracing.record)
        listening, address = stack.enter_context(port_socket(host, port, scheme))
        operator = None
        if admin is not None and admin_keys is not None:
            second, admin = stack.enter_context(address_socket(admin, scheme))
            routes = build(replace(state, hosts=None), ADMIN_ROUTES, admin_keys)
            operator = Address(second, routes, None if admin.startswith(UNIX) else context)
        serving = Serving(
            address,
            state.catalogue.base,
            {one.name: one.digest for one in state.adapters.adapters},
            admin,
            {
                route.path: route.example
                for api in server.apis
                for route in api.routes
                if route.example is not None
            },
        )
        run(
            state,
            Address(listening, server.app, context),
            operator,
            lambda: None if ready is None else ready(serving),
            watcher,
            watch or 0.0,
        )


def _admin_keys(admin: str | None, key_file: StrPath | None) -> Keys | None:
    """Reads the operator's key.

    Raises:
        ConfigError: there is an address without a key, or a key without an address.
    """
    if (admin is None) != (key_file is None):
        raise ConfigError(
            "an operator needs an address and a key", remedy="give both --admin and --admin-key-file"
        )
    return None if key_file is None else Keys.one_in(Path(key_file), "admin")


def _require_keys(host: str, known: bool, insecure: bool) -> None:
    """Checks that other machines cannot use the server without a key.

    Raises:
        ConfigError: other machines could use it.
    """
    if not is_loopback(host) and not known and not insecure:
        raise ConfigError(
            "others could use this server without a key",
            where=host,
            remedy="give --keys FILE or --api-key, or listen at 127.0.0.1; --insecure serves everybody",
        )
