"""Reads the list of what was revoked, by its sha256: packs, bundles, tensors, files, and the keys and
certificates of signers. Whoever opens an artifact asks it.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from ..errors import Revoked, storage_errors
from ..io import ClosedStruct, Identity, identity, read_at_most, read_file, strict_json, typed_json
from ..manifest import Sha256
from ..manifest import manifest as m
from .pack import SIGNATURE

VARIABLE = "ADAPTERPACK_REVOKED"
_MAX_BYTES, _MAX_SIGNATURE = 64 << 20, 1 << 20


class Revocations(ClosedStruct):
    """The content of the file: sha256 -> why it is revoked."""

    format: Literal["adapterpack.revoked"]
    version: Literal[1]
    entries: dict[Sha256, Annotated[str, Meta(min_length=1, max_length=1000)]]


def revocations() -> Mapping[str, str]:
    """Returns the list in the file that ``ADAPTERPACK_REVOKED`` names, read again when it changes; nothing
    without the variable.

    Raises:
        FormatError, StorageError: the file is no such list, so that nothing can be trusted.
    """
    path = os.environ.get(VARIABLE)
    return _read(Path(path), identity(Path(path))) if path else {}


@lru_cache(maxsize=1)
def _read(path: Path, _: Identity) -> Mapping[str, str]:
    with storage_errors(path), path.open("rb") as file:
        value = strict_json.loads(read_at_most(file, _MAX_BYTES + 1), path, _MAX_BYTES)
    return typed_json.require(
        value,
        Revocations,
        "this is no list of revocations",
        path,
        remedy=f"mend the file that {VARIABLE} names; until then nothing is opened",
    ).entries


def require_unrevoked(digests: Mapping[str, str], where: object) -> None:
    """Checks that nothing of an artifact is revoked: ``digests`` says of each sha256 what has it.

    Raises:
        Revoked: one of them is on the list.
    """
    known = revocations()
    for digest in known.keys() & digests.keys():
        raise Revoked(
            f"{digests[digest]} is revoked: {known[digest]}",
            where=where,
            found=digest,
            remedy="do not use it; ask whoever keeps the list of revocations",
        )


def require_unrevoked_pack(manifest: m.Manifest, where: object) -> None:
    """Checks that neither a pack nor one of its files or tensors is revoked.

    Raises:
        Revoked: one of them is on the list.
    """
    named = {f"sha256:{one.sha256}": f"the file {one.path}" for one in manifest.files}
    named |= {f"sha256:{one.sha256}": f"the tensor {name}" for name, one in manifest.tensors.items()}
    require_unrevoked({**named, manifest.id: "the pack"}, where)


def require_unrevoked_signer(folder: Path) -> None:
    """Checks that the signature in a folder, if there is one, is of no revoked key, by what it says itself:
    whether that is true, only verifying tells.

    Raises:
        Revoked: the key is on the list.
    """
    file = folder / SIGNATURE
    if not revocations() or not file.is_file():
        return
    with suppress(LookupError, TypeError, ValueError):
        signature = strict_json.loads(read_file(file, _MAX_SIGNATURE + 1), file, _MAX_SIGNATURE)
        material = signature["verificationMaterial"]
        if "certificate" in material:
            key = hashlib.sha256(base64.b64decode(material["certificate"]["rawBytes"])).hexdigest()
        else:
            key = material["publicKey"]["hint"]
        require_unrevoked({f"sha256:{key}": "the key of the signature"}, file)
