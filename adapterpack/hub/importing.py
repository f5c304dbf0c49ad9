"""Imports a PEFT adapter as a pack, and identifies the base that it names from the listing and headers of the
base's repository.
"""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from ..errors import AdapterpackError
from ..io.atomic import scratch_folder
from ..pack.pack import Pack, seal
from ..pack.validate.validation import load
from .base import RemoteBase, remote_base
from .transport import names


def import_peft(folder: Path, token: str | None = None) -> tuple[Pack, tuple[str, ...]]:
    """Imports a PEFT folder and returns the pack, with its base identified if the hub has it, and notes about
    that.

    Raises:
        FormatError, Unsupported: the folder cannot be imported.
    """
    pack = load(folder)
    hint = pack.manifest.base
    if hint.name is None or not names.is_repo(hint.name):
        return pack, (f"its base is known by name only: {hint.name or 'none is named'}",)
    try:
        with scratch_folder() as scratch:
            base = remote_base(names.HubReference(hint.name, hint.commit or names.MAIN), scratch, token)
            pack.require_base(base, allow_structural=True)
            return _with_base(pack, base), (
                f"its base was identified by the listing and the headers of {base.remote}",
            )
    except AdapterpackError as error:
        return pack, (f"its base {hint.name} is known by name only: {error.what}",)


def _with_base(pack: Pack, base: RemoteBase) -> Pack:
    fingerprint, model_type = base.fingerprint(), base.config.get("model_type")
    identified = replace(
        pack.manifest.base,
        commit=base.commit,
        structure=fingerprint.structure,
        files=fingerprint.files,
        model_type=model_type if isinstance(model_type, str) else None,
    )
    return seal(replace(pack.manifest, base=identified), pack.tensors, pack.extra)
