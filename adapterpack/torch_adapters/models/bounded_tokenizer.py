"""Keeps a base's tokenizer from taking any time for a text: what its rules cost is bounded when it is loaded,
or each time it is called.
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
    """A tokenizer of transformers; if the expressions of its rules may take any time, one that tries each
    text in the sandbox first.

    Raises:
        FormatError: its rules could make a text very much longer.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:  # written in Python, with expressions of transformers' own
        return tokenizer
    with library_errors("tokenizers", "this is not a tokenizer", where=folder):
        require_bounded_growth(core, folder)
        return tokenizer if is_quick(core) else _SlowTokenizer(tokenizer, core, folder)


class _SlowTokenizer:
    """A tokenizer whose expressions are not known to be quick; everything but the call is the wrapped
    one's.
    """

    def __init__(self, tokenizer: Any, core: Any, folder: Path) -> None:
        self._tokenizer, self._folder = tokenizer, folder
        data = core.to_str().encode()
        with storage_errors("TMPDIR"):
            # as long as this object
            self._file = tempfile.NamedTemporaryFile(prefix="adapterpack-tokenizer-")  # noqa: SIM115
            self._file.write(data)
            self._file.flush()
        self._digest = hashlib.sha256(data).hexdigest()

    def __call__(self, *texts: str, add_special_tokens: bool = True, **options: Any) -> Any:
        """What the wrapped tokenizer gives.

        Raises:
            OutOfLimits: it takes too long for these texts.
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
