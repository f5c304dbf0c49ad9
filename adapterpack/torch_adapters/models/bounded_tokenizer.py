"""Bounds the time that a base's tokenizer takes for a text: checks its rules when it is loaded, or each call.

A tokenizer comes from a stranger, and its regular expressions may take exponential time.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from ...errors import storage_errors
from ...library_errors import library_errors
from ...runtime.text.tokenizer import encoded_apart
from ...runtime.text.tokenizer_limits import is_quick, require_bounded_growth


def bound_tokenizer(tokenizer: Any, folder: Path) -> Any:
    """Returns the tokenizer; if its regular expressions may be slow, wrapped so that each text is first tried
    in the sandbox.

    Raises:
        FormatError: its rules could lengthen a text beyond the limit.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    # A tokenizer in Python uses transformers' own regular expressions, which are trusted.
    if core is None:
        return tokenizer
    with library_errors("tokenizers", "this is not a tokenizer", where=folder):
        require_bounded_growth(core, folder)
        return tokenizer if is_quick(core) else _SlowTokenizer(tokenizer, core, folder)


class _SlowTokenizer:
    """A tokenizer whose expressions may be slow: tries each call in the sandbox first, and passes everything
    else to the wrapped tokenizer.
    """

    def __init__(self, tokenizer: Any, core: Any, folder: Path) -> None:
        self._tokenizer, self._folder = tokenizer, folder
        data = core.to_str().encode()
        with storage_errors("TMPDIR"):
            # The file exists as long as this object does.
            self._file = tempfile.NamedTemporaryFile(prefix="adapterpack-tokenizer-")  # noqa: SIM115
            self._file.write(data)
            self._file.flush()
        self._digest = hashlib.sha256(data).hexdigest()

    def __call__(self, *texts: str, add_special_tokens: bool = True, **options: Any) -> Any:
        """Returns what the wrapped tokenizer returns.

        Raises:
            OutOfLimits: the tokenizer takes too long for these texts.
        """
        encoded_apart(
            Path(self._file.name),
            self._digest,
            texts,
            {"add_special_tokens": add_special_tokens},
            self._folder,
        )
        return self._tokenizer(*texts, add_special_tokens=add_special_tokens, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
