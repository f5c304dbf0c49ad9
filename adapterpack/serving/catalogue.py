"""What a request's ``model`` may be: the base, and the engine's adapters, as far as a key may have them."""

from __future__ import annotations

import hashlib
import time
from typing import NamedTuple

from ..bundle.manifest import manifest_bytes
from ..errors import ConfigError, UnknownAdapter, Unsupported
from ..http.refused import Refused
from ..pack.pack import Pack
from ..runtime.engine.base import Engine
from .keys import Key
from .openai.answers import Provenance


class Model(NamedTuple):
    """A name that requests may name, and what answers them: a pack on the base, or the base alone (None)."""

    name: str
    pack: Pack | None
    digest: str

    @property
    def adapter(self) -> str | None:
        """The adapter's name."""
        return None if self.pack is None else self.pack.name


class Catalogue:
    """The names of an engine's models; the base's is ``base``, by default what its bundle calls it, or ``base``."""

    def __init__(self, engine: Engine, base: str | None = None) -> None:
        if engine.bundle.bundle.mode == "folded" and engine.adapters.names:
            raise Unsupported("the adapter is a part of this bundle's weights, and no name for requests", where=engine.bundle.folder,
                              remedy="export the bundle with --mode bank")
        self._engine, self.created = engine, int(time.time())
        self.base: str = base or engine.bundle.bundle.base.name or "base"
        self.digest = f"sha256:{hashlib.sha256(manifest_bytes(engine.bundle.folder)).hexdigest()}"
        if self.base in engine.adapters.names:
            raise ConfigError("base and adapter have one name", found=self.base, remedy="give the base another one with --name")

    def visible(self, key: Key) -> list[Model]:
        """All that a key may name, the base first."""
        names: list[str | None] = [None, *self._engine.adapters.names]
        return [model for name in names if key.may(name) and (model := self._model(name)) is not None]

    def named(self, name: str, key: Key) -> Model:
        """The model that a request names: an adapter, the base, or ``base:adapter``.

        Raises:
            Refused: there is none, or the key may not have it, which looks the same.
        """
        adapter = None if name == self.base else name.removeprefix(f"{self.base}:")
        model = self._model(adapter) if key.may(adapter) else None
        if model is None:
            raise Refused(404, "model_not_found", f"there is no model {name[:200]!r}", param="model")
        return model

    def provenance(self, model: Model) -> Provenance:
        """What answers, as answers say it."""
        return Provenance(model.adapter, model.digest, self.base)

    def _model(self, adapter: str | None) -> Model | None:
        if adapter is None:
            return Model(self.base, None, self.digest)
        try:
            pack = self._engine.adapters.pack(adapter)
        except UnknownAdapter:  # or it was unloaded just now
            return None
        return Model(adapter, pack, pack.id)
