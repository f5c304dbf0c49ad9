"""Resolves the ``model`` of a request to the base or one of the engine's adapters, within the rights of its
key.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from msgspec import UNSET, UnsetType

from ..bundle import manifest_bytes
from ..errors import AdapterpackError, ConfigError, UnknownAdapter, Unsupported, closest
from ..http import HTTPError, invalid_request
from ..pack import Pack
from ..runtime import Engine
from ..runtime.adapters import Mix, combine
from .openai import NamedWeight, Provenance, Share, as_http_error
from .tenants import Key

OWN_IDS = (
    "token ids were taken as this model's own: those of another tokenizer, as LangChain's OpenAIEmbeddings "
    "sends them unless check_embedding_ctx_length=False, mean other texts"
)
"""The warning in a response to token ids, which might come from another model's tokenizer."""
NOTHING_FITS = "no adapter that says what it was trained on fits this text: the base answers"
"""The warning in a response of the base to the model ``auto``."""

_MOST_COMPARED = 1000
"""The most names of adapters that are compared with a mistyped one."""


class ServedModel(NamedTuple):
    """A model name for requests, and what answers it: a pack on the base, a weighted mix, or the base alone
    (None). ``sure`` says how sure the choice is, from 0 to 1, if the server chose it by the request's text.
    """

    name: str
    pack: Pack | Mix | None
    digest: str
    sure: float | None = None

    @property
    def adapter(self) -> str | None:
        """The adapter's name; for a mix the names and weights of its parts."""
        return None if self.pack is None else self.pack.name

    @property
    def mixed(self) -> bool:
        """Whether it is a mix that a request made up."""
        return isinstance(self.pack, Mix)


class Catalogue:
    """The model names of an engine. The base's name is ``base``, by default the name in its bundle, or
    ``base``. A bundle with a folded adapter has only that model, and ``base`` renames it.
    """

    def __init__(self, engine: Engine, base: str | None = None) -> None:
        if engine.bundle.bundle.mode == "folded" and len(engine.adapters.names) > 1:
            raise Unsupported(
                "several adapters are parts of this bundle's weights, and no name for requests",
                where=engine.bundle.folder,
                remedy="export the bundle with --mode bank",
            )
        folded = engine.bundle.default
        self._bare = folded is None  # otherwise an adapter is folded in, and no row can run without it
        if folded is not None and base is not None:
            engine.adapters.rename(folded, base)
            base = None
        self._engine = engine
        self.created = int(time.time())
        self.base = base or engine.bundle.bundle.base.name or "base"
        self.digest = f"sha256:{hashlib.sha256(manifest_bytes(engine.bundle.folder)).hexdigest()}"
        if self._bare and self.base in engine.adapters.names:
            raise ConfigError(
                "base and adapter have one name",
                found=self.base,
                remedy="give the base another one with --name",
            )

    def visible(self, key: Key) -> list[ServedModel]:
        """Returns all models that a key may name, the base first."""
        names = [None, *self._engine.adapters.names]
        return [model for name in names if key.may(name) and (model := self._model(name)) is not None]

    def find_model(self, name: str, key: Key) -> ServedModel:
        """Returns the model that a request names: an adapter, the base, or ``base:adapter``.

        Raises:
            HTTPError: there is no such model, or the key may not use it. Both look the same, so that keys
                cannot probe for names.
        """
        adapter = None if self._bare and name == self.base else name.removeprefix(f"{self.base}:")
        model = self._model(adapter) if key.may(adapter) else None
        if model is None:
            known = [one for one in islice(self._engine.adapters.names, _MOST_COMPARED) if key.may(one)]
            close = closest(name[:200], known)
            near = ":" if close is None else f"; did you mean {close!r}?"
            raise HTTPError(
                404,
                "model_not_found",
                f"there is no model {name[:200]!r}{near} GET /v1/models lists what may be asked for",
                param="model",
            )
        return model

    def request_model(self, name: str, adapters: Sequence[NamedWeight] | None, key: Key) -> ServedModel:
        """Returns the model that a request names; with ``adapters`` the base with the weighted sum of their
        changes.

        Raises:
            HTTPError: the model or an adapter does not exist, the key may not use it, or the adapters have no
                sum.
        """
        model = self.find_model(name, key)
        if adapters is None:
            return model
        if model.pack is not None:
            raise invalid_request(
                f"adapters are added to the base: the model is {self.base!r}",
                "model",
            )
        packs = [self._part(one.name, key) for one in adapters]
        try:
            both = combine((pack, one.weight) for pack, one in zip(packs, adapters, strict=True))
        except AdapterpackError as error:
            raise as_http_error(error) from error
        return ServedModel(name, both, both.id)

    def _part(self, name: str, key: Key) -> Pack:
        pack = self.find_model(name, key).pack
        if not isinstance(pack, Pack):
            raise HTTPError(
                404,
                "model_not_found",
                f"{name[:200]!r} is not an adapter: GET /v1/models lists what may be asked for",
                param="adapters",
            )
        return pack

    def provenance(
        self, model: ServedModel, given: Sequence[object] = (), notes: Sequence[str] = ()
    ) -> Provenance:
        """Returns what answered, in the form of responses. ``given`` are the prompts or inputs of the
        request, and ``notes`` go to the client.
        """
        shares: list[Share] | UnsetType = UNSET
        if isinstance(model.pack, Mix):
            shares = [Share(pack.name, pack.id, weight) for pack, weight in model.pack.parts]
        warnings = [OWN_IDS, *notes] if any(isinstance(one, list) for one in given) else list(notes)
        if model.sure is not None and model.pack is None:
            warnings.append(NOTHING_FITS)
        sure = UNSET if model.sure is None else model.sure
        return Provenance(model.adapter, model.digest, self.base, shares, warnings or UNSET, sure)

    def _model(self, adapter: str | None) -> ServedModel | None:
        if adapter is None:
            return ServedModel(self.base, None, self.digest) if self._bare else None
        try:
            pack = self._engine.adapters.pack(adapter)
        except UnknownAdapter:  # unknown, or unloaded a moment ago
            return None
        return ServedModel(adapter, pack, pack.id)
