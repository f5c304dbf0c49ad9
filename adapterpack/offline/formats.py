"""Opens the job for a file, whose first line decides whether it has rows or requests in OpenAI's format."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..bundle import manifest_bytes
from ..errors import ConfigError
from ..extras import needed_by
from ..pack import Pack
from ..runtime import Device, bundle_folder
from ..runtime.sessions.run import BLOCK, row_runner
from .job import OfflineJob
from .lines import Line, is_request
from .rows_job import RowsJob


class Setting(NamedTuple):
    """The options of a job, as in :func:`adapterpack.run`. ``where`` is the name of the input file, if there
    is one. With ``raw`` texts are read without the chat template. ``packs`` are adapters besides, or names of
    those in the bundle: requests may name them, and rows that name none run with them, too.
    """

    bundle: str | os.PathLike[str]
    device: Device
    adapters: Sequence[str | Pack]
    batch_size: int
    sampling: Mapping[str, Any]
    where: str | None
    raw: bool = False
    packs: Sequence[str | Pack] = ()

    def identity(self, provider: str) -> Mapping[str, Any]:
        """Returns everything on which the answers depend, on a provider."""
        return {
            "bundle": hashlib.sha256(manifest_bytes(bundle_folder(self.bundle))).hexdigest(),
            "provider": provider,
            "adapters": [one if isinstance(one, str) else one.id for one in (*self.packs, *self.adapters)],
            "device": repr(dataclasses.astuple(self.device)),
            "batch_size": self.batch_size,
            "sampling": self.sampling,
            **({"raw": True} if self.raw else {}),
        }


def _rows(setting: Setting) -> OfflineJob:
    runner = row_runner(
        setting.bundle,
        adapters=[*setting.packs, *setting.adapters],
        provider=setting.device,
        batch_size=setting.batch_size,
        raw=setting.raw,
        **setting.sampling,
    )
    if setting.where is None:  # rows from command-line options, which cannot name an adapter
        runner.require_answers()
    return RowsJob(runner, setting.where, setting.identity(runner.provider))


def _requests(setting: Setting) -> OfflineJob:
    others = [name for name in setting.sampling if name not in ("seed", "sampling")]
    given = [*(["--adapter"] if setting.adapters else []), *(["--raw"] if setting.raw else []), *others]
    if given:
        raise ConfigError(
            "each request of this file has parameters of its own",
            where=setting.where,
            found=given[0],
            remedy="leave out what is not --seed or --sampling",
        )
    with needed_by("answering requests"):
        from ..serving import InProcess  # noqa: PLC0415 - needs an extra
        from .requests_job import RequestsJob  # noqa: PLC0415 - needs an extra
    server = InProcess(
        setting.bundle,
        setting.device,
        setting.batch_size,
        setting.sampling.get("sampling"),
        [pack for pack in setting.packs if isinstance(pack, Pack)],
    )
    return RequestsJob(
        server,
        BLOCK * setting.batch_size,
        setting.where or "",
        setting.sampling.get("seed", 0),
        setting.identity(server.provider),
    )


def job_for(first: Line | None, setting: Setting) -> OfflineJob:
    """Opens the job for a file that begins with this line.

    Raises:
        AdapterpackError: the bundle cannot be opened with these options.
    """
    return _requests(setting) if first is not None and is_request(first.row) else _rows(setting)
