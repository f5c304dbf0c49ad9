"""One hierarchy of errors: each says what went wrong, where, what was expected, what was found, and what to
do.
"""

from __future__ import annotations

import errno
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

EXIT_FAILED = 1
EXIT_INCOMPLETE = 3
EXIT_TRUST = 4
_LONGEST = 2000
"""The most characters in one part of an error's text."""


class AdapterpackError(Exception):
    """The base of every error that adapterpack raises on purpose.

    ``code`` is a stable name for scripts; ``exit_code`` is what the command line returns.

    Example:
        >>> str(AdapterpackError("the rank is too large", where="sites[0]", expected="at most 8", found=9,
        ...     remedy="lower r"))
        'the rank is too large (at sites[0]; expected at most 8, found 9). To fix it: lower r.'
    """

    code = "error"
    exit_code = EXIT_FAILED

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what = _short(what)
        self.where, self.expected, self.found = (
            None if text is None else _short(str(text)) for text in (where, expected, found)
        )
        self.remedy = remedy
        super().__init__(self._sentence(remedy))

    @property
    def sentence(self) -> str:
        """The sentence without the remedy, for what shows the remedy in a place of its own.

        Example:
            >>> AdapterpackError("the rank is too large", found=9, remedy="lower r").sentence
            'the rank is too large (found 9).'
        """
        return self._sentence(None)

    @property
    def placeless_sentence(self) -> str:
        """The sentence without its place, for what shows the place on its own too.

        Example:
            >>> AdapterpackError("the rank is too large", where="sites[0]", found=9).placeless_sentence
            'the rank is too large (found 9).'
        """
        return self._sentence(None, placed=False)

    def _sentence(self, remedy: str | None, placed: bool = True) -> str:
        sides = []
        if self.expected is not None:
            sides.append(f"expected {self.expected}")
        if self.found is not None:
            sides.append(f"found {self.found}")
        details = "; ".join(
            filter(None, [f"at {self.where}" if self.where and placed else None, ", ".join(sides) or None])
        )
        text = self.what + (f" ({details})" if details else "") + "."
        if remedy:
            text += f" To fix it: {remedy.rstrip('.')}."
        # Keep to one line, so that a name from a stranger cannot forge a line of its own.
        return printable(text).replace("\n", "\\n")

    def to_json(self) -> dict[str, str | None]:
        """The error as the object that ``--json`` prints under ``error``."""
        fields = {
            "what": self.what,
            "where": self.where,
            "expected": self.expected,
            "found": self.found,
            "remedy": self.remedy,
        }
        return {"code": self.code, "message": str(self), **fields}


class FormatError(AdapterpackError):
    """A file is not what its format says: truncated, altered, out of limits, or malformed."""

    code = "format"


class BaseMismatch(AdapterpackError):
    """A pack was made for another base model."""

    code = "base-mismatch"


class UnknownName(AdapterpackError):
    """A name that no registry, bundle or model has."""

    code = "unknown-name"


class UnknownMethod(UnknownName):
    """An adapter method that is not registered."""

    code = "unknown-method"


class UnknownAdapter(UnknownName):
    """An adapter name that the bundle or model does not hold."""

    code = "unknown-adapter"


class SiteNotFound(UnknownName):
    """A target that the model lacks."""

    code = "site-not-found"


class Unsupported(AdapterpackError):
    """A combination that cannot be done exactly, and is therefore refused."""

    code = "unsupported"


class MissingExtra(Unsupported):
    """A library that an optional part of the package needs is not installed."""

    code = "missing-extra"


class ConfigError(AdapterpackError):
    """A configuration that cannot be used as it stands."""

    code = "config"


class OutputExists(AdapterpackError):
    """The output path is taken; nothing is ever overwritten."""

    code = "output-exists"


class StorageError(AdapterpackError):
    """The file system refused: disk full, no permission, missing file."""

    code = "storage"


class ProviderError(AdapterpackError):
    """An ONNX Runtime execution provider that is unknown, did not start, or does not run every node of a
    graph.
    """

    code = "provider"


class NonFinite(AdapterpackError):
    """NaN or infinity where finite numbers are due, or a training whose loss has run away."""

    code = "non-finite"


class ParityError(AdapterpackError):
    """A graph disagrees with the model that it was made from."""

    code = "parity"


class TrustError(AdapterpackError):
    """It cannot be shown that a pack comes from whom it should come; the pack itself may be whole."""

    code = "trust"
    exit_code = EXIT_TRUST


class Unsigned(TrustError):
    """There is no signature."""

    code = "unsigned"


class WronglySigned(TrustError):
    """There is a signature, and it is not one of this key over these files."""

    code = "wrongly-signed"


class SignatureExpired(TrustError):
    """The signature is right, and was made for a time that is over."""

    code = "signature-expired"


class Revoked(TrustError):
    """It is on the list of what was revoked, or was signed with a key that is."""

    code = "revoked"


class UnsupportedSignature(TrustError):
    """A signature of another kind than the one asked for: a key where an identity is trusted, an identity
    where a key is, or neither.
    """

    code = "unsupported-signature"


class CorruptBlob(FormatError):
    """Stored bytes changed after they were stored; they were put into quarantine."""

    code = "corrupt-blob"


class HubError(AdapterpackError):
    """A hub refused, cannot be reached, or does not answer as a hub does."""

    code = "hub"


class RepoNotFound(HubError):
    """There is no such repository, or it may not be seen with this token."""

    code = "repo-not-found"


class GatedRepo(HubError):
    """The repository's owner asks for an agreement first."""

    code = "gated-repo"


class RevisionNotFound(HubError):
    """The repository has no such branch, tag or commit."""

    code = "revision-not-found"


class HubConflict(HubError):
    """Somebody else changed the repository meanwhile."""

    code = "hub-conflict"


class HubOffline(HubError):
    """The network may not be used, and what is needed is not on this machine."""

    code = "hub-offline"


class NothingToDo(AdapterpackError):
    """The stage would have changed nothing, which is never what was asked for."""

    code = "nothing-to-do"


def closest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that ``name`` most likely means, or None.

    Example:
        >>> closest("lroa", ["lora", "ia3"])
        'lora'
    """
    return next(iter(get_close_matches(name, list(known), n=1)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a remedy that suggests the closest known name and lists the known names.

    Example:
        >>> nearest("lroa", ["lora", "ia3"])
        "did you mean 'lora'? Known: ia3, lora"
    """
    names = sorted(known)
    close = closest(name, names)
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    if not names:
        return "leave it out: no name is known here"
    return f"use a known name: {shown}" if close is None else f"did you mean '{close}'? Known: {shown}"


def require_among(
    message: str,
    name: str | None,
    known: Collection[str],
    error: type[AdapterpackError] = UnknownName,
    where: object = None,
    **hints: Any,
) -> None:
    """Raises ``error`` with this message if a name, where there is one, is not among those known. It tells
    the name and suggests the nearest one; ``hints`` add to that, or replace it.
    """
    if name is not None and name not in known:
        hints = {"found": repr(name), "remedy": nearest(name, known), **hints}
        raise error(message, where=where, **hints)


def excerpt(value: object) -> str:
    """Returns the beginning of a value as Python writes it, for what an error found.

    Example:
        >>> excerpt("x" * 1000) == "'" + "x" * 79
        True
    """
    return repr(value)[:80]


def _short(text: str) -> str:
    """Cuts the middle out of long text, such as a stranger may have written."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} [...] {text[-_LONGEST // 2 :]}"


def printable(text: str) -> str:
    """Escapes control and bidirectional characters, so that names from strangers cannot manipulate a
    terminal.
    """
    hidden = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
    return "".join(
        c if c == "\n" or unicodedata.category(c) not in hidden else f"\\u{ord(c):04x}" for c in text
    )


@contextmanager
def storage_errors(where: object) -> Iterator[None]:
    """Turns errors of the operating system about ``where`` into a :class:`StorageError`."""
    try:
        yield
    except OSError as error:
        remedies = {
            errno.ENOSPC: "free some space, or choose another place",
            errno.EDQUOT: "your quota is used up: free some space, or choose another place",
            errno.EFBIG: "raise the limit (ulimit -f), or choose a file system that takes larger files",
            errno.EROFS: "choose a place that can be written to",
            errno.EACCES: "check the permissions of that path",
            errno.ENOENT: "check that the path exists",
            errno.EISDIR: "name a file: this is a folder",
        }
        what = (
            "the disk is full"
            if error.errno == errno.ENOSPC
            else f"the file system refused: {error.strerror or error}"
        )
        raise StorageError(what, where=where, remedy=remedies.get(error.errno or 0)) from error
