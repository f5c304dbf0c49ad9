"""A bundle of which the engine's graph alone is open, so that its weights are in memory once."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ...bundle.decoder_graph import DECODER
from ..open_bundle import OpenBundle


class DecoderBundle(OpenBundle):
    """See :class:`~adapterpack.runtime.session.Session` for the arguments and errors."""

    def __init__(self, bundle: str | os.PathLike[str], provider: str | None = None, threads: int | None = None, *,
                 verify: str = "cached") -> None:
        super().__init__(bundle, provider, threads, verify=verify)

    def _first_opened(self) -> Sequence[str]:
        return (DECODER,) if self.bundle.decoder else self.bundle.parts
