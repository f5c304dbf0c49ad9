"""Lists packs without reading them, so that a server of a thousand adapters starts at once, and reads each
when a request first names it.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from ...errors import FormatError, StorageError
from ...manifest import FILE_NAME, Outline, outline_of
from ...manifest.manifest import parse
from ...paths import StrPath
from .. import Pack, require_unrevoked_pack, require_unrevoked_signer, revocations
from .checks import folder as files
from .validation import load, load_proved


class ListedPack(Pack):
    """A pack of which only the outline of the manifest was read, and the names and sizes of the files.

    Its manifest is read on access, and each tensor with its digest; whoever runs it calls :meth:`read`
    first, which makes all checks.
    """

    def __init__(self, path: Path, digest: str, outline: Outline) -> None:
        known = {"path": path, "_id": digest, "_outline": outline}
        self.__dict__.update(known, alias=None, kinds={}, factored={}, vouched=None)

    @property
    def id(self) -> str:
        """The digest of the manifest."""
        return self.__dict__["_id"]  # type: ignore[no-any-return]

    @property
    def outline(self) -> Outline:
        """What was read of the manifest."""
        return self.__dict__["_outline"]  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        """Reads the manifest when somebody asks for it, for the tensors, or for the other files."""
        if name not in {"manifest", "tensors", "extra"}:
            raise AttributeError(name)
        return getattr(self._proved, name)

    @cached_property
    def _proved(self) -> Pack:
        return self._same(load_proved(self.__dict__["path"], self.name))

    def read(self) -> Pack:
        """Returns the pack after all checks of :func:`~.validation.load`.

        Raises:
            FormatError: another pack is in the folder now.
            AdapterpackError: see :func:`~.validation.load`.
        """
        return self._same(load(self.__dict__["path"])).called(self.name)

    def _same(self, pack: Pack) -> Pack:
        if pack.id != self.id:
            raise FormatError(
                "the pack changed after it was listed",
                where=self.path,
                expected=self.id,
                found=pack.id,
                remedy="load it again",
            )
        return pack


def list_pack(path: StrPath) -> Pack:
    """Returns the pack in a folder as a :class:`ListedPack`, about a hundred times as fast as
    :func:`~.validation.load`; what cannot be listed, such as a folder of PEFT or a pack of an older version
    of the format, is loaded.

    Raises:
        AdapterpackError: see :func:`~.validation.load`.

    Example:
        >>> list_pack("packs/tickets").name  # doctest: +SKIP
        'tickets'
    """
    folder = Path(path)
    try:
        data = files.read_manifest(folder / FILE_NAME)
        outline = outline_of(data)
        if outline is not None and not any(
            chain(files.regular_files(folder), files.closed_file_list(folder, outline))
        ):
            if revocations():
                require_unrevoked_pack(parse(data, folder / FILE_NAME), folder)
                require_unrevoked_signer(folder)
            return ListedPack(folder, f"sha256:{hashlib.sha256(data).hexdigest()}", outline)
    except (FormatError, StorageError):
        pass  # loading says what is wrong
    return load(folder)
