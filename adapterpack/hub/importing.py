"""A PEFT adapter of a hub as a pack that knows its base: the one that it names, by the listing and the headers of that one's repository."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from ..errors import AdapterpackError
from ..pack.pack import Pack, sealed
from ..pack.validate.validation import load
from . import names
from .base import RemoteBase, remote_base


def imported(folder: Path, token: str | None = None) -> tuple[Pack, tuple[str, ...]]:
    """The pack made of a PEFT folder, its base identified if it can be read on the hub, and what there is to know about that.

    Raises:
        FormatError, Unsupported: the folder cannot be imported.
    """
    pack = load(folder)
    hint = pack.manifest.base
    if hint.name is None or not names.is_repo(hint.name):
        return pack, (f"its base is known by name only: {hint.name or 'none is named'}",)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            base = remote_base(names.Reference(hint.name, hint.commit or names.MAIN), Path(scratch), token)
            pack.require_base(base, allow_structural=True)
            return _bound(pack, base), (f"its base was identified by the listing and the headers of {base.remote}",)
    except AdapterpackError as error:
        return pack, (f"its base {hint.name} is known by name only: {error.what}",)


def _bound(pack: Pack, base: RemoteBase) -> Pack:
    known, model_type = base.fingerprint(), base.config.get("model_type")
    told = dataclasses.replace(pack.manifest.base, commit=base.commit, structure=known.structure, files=known.files,
                               model_type=model_type if isinstance(model_type, str) else None)
    return sealed(dataclasses.replace(pack.manifest, base=told), pack.tensors, pack.extra)
