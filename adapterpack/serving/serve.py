"""Runs a server as a process at an address: opens the bundle, loads adapters, and ends when it is told to, after the last answer."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import ConfigError, NothingToDo, storage_errors
from ..extras import needed_by
from ..hub.resolve import folder_of
from ..manifest.manifest import FILE_NAME
from ..pack.pack import Pack
from ..pack.validate.validation import load
from ..peft.layout import CONFIG
from ..runtime.engine.engine import DecoderEngine
from ..runtime.providers.device import Device
from .audit import Audit
from .catalogue import Catalogue
from .keys import Keys
from .limits import Limits

LOOPBACK = "127.0.0.1"
BACKLOG = 256
"""Connections that wait to be taken."""


class Serving(NamedTuple):
    """A server that takes requests: its address, the base's name, and the digests of adapters by name."""

    address: str
    base: str
    adapters: Mapping[str, str]


def serve(bundle: str | os.PathLike[str], *, adapters: Sequence[Pack | str | os.PathLike[str]] = (), host: str = LOOPBACK, port: int = 8000,
          name: str | None = None, keys: str | os.PathLike[str] | None = None, api_key: str | None = None, insecure: bool = False,
          audit: str | None = "-", sampling: str = "model", provider: str | Device | None = None, threads: int | None = None,
          max_rows: int = 8, max_length: int | None = None, limits: Limits | None = None,
          ready: Callable[[Serving], None] | None = None) -> None:
    """Serves a bundle and its adapters over HTTP by OpenAI's routes until it is interrupted.

    The bundle was exported with ``static_cache``. ``adapters`` are packs, or folders of packs, that are loaded besides its own. ``keys`` is
    a file of keys, ``api_key`` one for all; without either only this machine may ask, unless ``insecure``. ``audit`` is a file for one
    line a request, ``"-"`` standard error. ``sampling`` says what counts where a request says nothing: ``model`` or ``greedy``. ``ready``
    is called once requests are taken; ``port`` 0 takes a free one. SIGTERM and Ctrl-C let answers end first.

    Raises:
        Unsupported: the bundle has no graph for the engine.
        ConfigError: others could ask without a key; a file of keys that is none; two adapters of one name.
        BaseMismatch: an adapter belongs to another base.
        StorageError: a file or the address cannot be used.
        MissingExtra: the extra ``serve`` is not installed.
    """
    with needed_by("serving"):
        from .process import run  # noqa: PLC0415 - needs an extra
    known = Keys.one(api_key) if api_key is not None else Keys(path=None if keys is None else Path(keys))
    _require_keys(host, known.needed, insecure)
    engine = DecoderEngine(folder_of(bundle), provider, threads=threads, max_rows=max_rows, max_length=max_length)
    for pack in _packs(adapters):
        engine.adapters.load(pack)
    catalogue = Catalogue(engine, name)
    hosts = None if known.needed or insecure else frozenset({"localhost", "127.0.0.1", "[::1]", host.lower()})
    with storage_errors(f"{host}:{port}"), socket.create_server((host, port), backlog=BACKLOG, family=_family(host)) as listening:
        shown = f"[{host}]" if ":" in host else host
        serving = Serving(f"http://{shown}:{listening.getsockname()[1]}", catalogue.base,
                          {adapter: engine.adapters.pack(adapter).id for adapter in engine.adapters.names})
        run(listening, engine, catalogue, known, Audit(audit), limits or Limits(), sampling, hosts,
            lambda: None if ready is None else ready(serving))


def _packs(adapters: Sequence[Pack | str | os.PathLike[str]]) -> Iterator[Pack]:
    """The packs of all these; a folder of packs is all that are in it.

    Raises:
        NothingToDo: there is no pack in a folder.
    """
    for adapter in adapters:
        if isinstance(adapter, Pack):
            yield adapter
            continue
        folder = folder_of(adapter)
        with storage_errors(folder):
            inside = [folder] if _is_pack(folder) else sorted(filter(_is_pack, folder.iterdir()))
        if not inside:
            raise NothingToDo("there is no adapter in this folder", where=folder, expected="a pack, or a folder of packs")
        yield from map(load, inside)


def _is_pack(folder: Path) -> bool:
    return (folder / FILE_NAME).is_file() or (folder / CONFIG).is_file()


def _require_keys(host: str, known: bool, insecure: bool) -> None:
    """Checks that others cannot ask without a key.

    Raises:
        ConfigError: they could.
    """
    with suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    if host != "localhost" and not known and not insecure:
        raise ConfigError("others could use this server without a key", where=host,
                          remedy="give --keys FILE or --api-key, or listen at 127.0.0.1; --insecure serves everybody")


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
