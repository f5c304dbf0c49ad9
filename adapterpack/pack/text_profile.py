"""What a pack tells of the texts that it was trained on, and which of several packs a text fits.

A profile is a naive Bayes model of tokens: ``log(1 + p / q)`` for the tokens that tell most, where ``p`` is
the token's share of the texts and ``q`` its share of any text, by Zipf's law of its id, since vocabularies
are sorted by frequency. A text scores the mean over its tokens, each by the logarithm of its count.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from ..errors import FormatError
from ..io import FrozenStruct
from .pack import Pack

AUTO = "auto"
"""The name that stands for the adapter that a text fits best."""
KEY = "x_text_profile"
"""The profile's name in a manifest's extensions."""
LARGEST_ID = (1 << 20) - 1
"""The largest token id of a profile, beyond all vocabularies."""
_MOST = 1024
_STEP = 16.0
"""Logarithms of ratios are stored in bytes, so many to 1."""
_FOLDS = 5
_BELONGS = 0.1
"""The share of a pack's own texts that its threshold leaves to the base."""
_SHARPNESS = 1.5
"""By how much a score counts, times the root of the text's tokens, which are not independent."""
_LEAST = 0.5
"""How sure a choice must be; otherwise the base answers."""
_MASS = 1.1
"""The most that shares add up to, by rounding."""


class TextProfile(FrozenStruct, forbid_unknown_fields=True):
    """Tokens, ascending, each as ``256 * id + log_ratio`` (uint32, little-endian), and the score from which a
    text belongs.
    """

    tokens: Annotated[bytes, Meta(min_length=4, max_length=4 * _MOST)]
    fits: Annotated[float, Meta(ge=0, le=16)]

    def __post_init__(self) -> None:
        """Checks the tokens; with shares of more than a whole, a pack would claim texts of every kind.

        Raises:
            ValueError: they are none.
        """
        ids, logs = self.parts
        ascending = ids[-1] <= LARGEST_ID and (np.diff(ids) > 0).all()
        if not ascending or np.expm1(logs / _STEP) @ _prior(ids) > _MASS:
            raise ValueError("its token ids do not ascend, or have shares of more than a whole")

    @property
    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids, int32, and the logarithms of the ratios, uint8."""
        both = np.frombuffer(self.tokens[: len(self.tokens) // 4 * 4], "<u4")
        return (both >> 8).astype(np.int32), both.astype(np.uint8)

    @classmethod
    def of_texts(cls, texts: Sequence[Sequence[int]]) -> TextProfile:
        """Makes the profile of texts, given as token ids. Each fifth of them in turn is kept aside, and tells
        at which score a text still belongs.
        """
        index = TextIndex()
        scores = []
        for fold in range(_FOLDS):
            rest = [text for place, text in enumerate(texts) if place % _FOLDS != fold]
            index.put("", _made(rest, 0.0))
            scores += [float(index.scores(text, [0])[0]) for text in texts[fold::_FOLDS]]
        return _made(texts, float(np.quantile(scores, _BELONGS)))

    @classmethod
    def of(cls, pack: Pack) -> TextProfile | None:
        """Returns the profile in a pack's manifest, or None.

        Raises:
            FormatError: it is not valid.
        """
        stored = pack.outline.extensions.get(KEY)
        try:
            return None if stored is None else msgspec.convert(stored, cls)
        except msgspec.ValidationError as error:
            raise FormatError(
                f"the profile of the pack's texts is not valid: {error}",
                where=f"{pack.where}, /extensions/{KEY}",
                remedy="measure the pack again with adapterpack measure --kind texts",
            ) from error


class TextIndex:
    """Profiles by name, as a table with a row for each token and a column for each name, so that a text costs
    a few rows. Any thread may call it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._table = np.zeros((0, 0), np.uint8)
        self._rows, self._used = np.full(LARGEST_ID + 1, -1, np.int32), 0  # of each token; -1: none
        self._columns: dict[str, int] = {}
        self._fits: dict[str, float] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def put(self, name: str, profile: TextProfile | None) -> None:
        """Sets the profile of a name; None removes it."""
        with self._lock:
            if self._fits.pop(name, None) is not None:
                self._table = np.delete(self._table, self._columns[name], 1)
                self._columns = {other: column for column, other in enumerate(self._fits)}
            if profile is None:
                return
            (ids, logs), column = profile.parts, len(self._fits)
            new = ids[self._rows[ids] < 0]
            self._rows[new] = self._used + np.arange(len(new))
            self._used += len(new)
            size = np.array([self._used, column + 1])
            lacks = size > self._table.shape
            if lacks.any():
                more = np.where(lacks, size * 5 // 4 - self._table.shape, 0)
                self._table = np.pad(self._table, [(0, some) for some in more.tolist()])
            self._table[self._rows[ids], column] = logs
            self._columns[name], self._fits[name] = column, profile.fits

    def scores(self, text: Sequence[int], columns: slice | Sequence[int]) -> np.ndarray:
        """Returns the score of a text for the profiles of these columns."""
        tokens, weights = _weighed(text)
        rows = self._rows[tokens]
        shares = weights[rows >= 0] / (_STEP * weights.sum())
        table = self._table[rows[rows >= 0]][:, columns].astype(np.float32)
        return np.dot(shares.astype(np.float32), table)  # type: ignore[no-any-return]

    def choose(self, text: Sequence[int], among: Iterable[str] | None = None) -> tuple[str | None, float]:
        """Returns the name that a text fits best, of those ``among`` which it may choose, or None if the base
        is likelier; and how sure that is, from 0 to 1.

        Example:
            >>> index = TextIndex()
            >>> for name, first in (("a", 500), ("b", 900)):
            ...     texts = [range(start, start + 9) for start in range(first, first + 9)]
            ...     index.put(name, TextProfile.of_texts(texts))
            >>> index.choose([506, 507, 508])[0], index.choose([6, 7, 8])[0]
            ('a', None)
        """
        with self._lock:
            names = [*(self._columns if among is None else filter(self.__contains__, among))]
            if not names or not len(text):
                return None, 1.0
            # a slice is much faster than a list of all columns
            some = slice(len(names)) if among is None else [self._columns[name] for name in names]
            scores = self.scores(text, some)
            name = names[int(scores.argmax())]
            rivals = np.append(scores, self._fits[name]) - scores.max()
        sure = float(1 / np.exp(np.minimum(_SHARPNESS * np.sqrt(len(text)) * rivals, 700)).sum())
        return (name, sure) if sure >= _LEAST else (None, 1 - sure)


def _weighed(text: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    tokens, counts = np.unique(np.asarray(text), return_counts=True)
    return tokens, np.log1p(counts)


def _prior(ids: np.ndarray) -> np.ndarray:
    return 1 / (6.0 * (ids + 200.0))


def _made(texts: Sequence[Sequence[int]], fits: float) -> TextProfile:
    sums = np.zeros(LARGEST_ID + 1)
    for text in texts:
        tokens, weights = _weighed(text)
        sums[tokens] += weights
    ids = np.flatnonzero(sums)
    shares = sums[ids] / sums.sum()
    logs = np.minimum(np.rint(_STEP * np.log1p(shares / _prior(ids))), 255).astype(int)
    kept = np.sort(np.argsort(-shares * logs, kind="stable")[:_MOST])
    return TextProfile((256 * ids + logs)[kept].astype("<u4").tobytes(), fits)
