"""What a pack tells of the texts that it was trained on, and which of several packs a text fits.

A profile is a naive Bayes model of tokens: ``log(1 + p / q)`` for the tokens that tell most, where ``p`` is
the token's share of the texts and ``q`` its share of any text, by Zipf's law of its id, since vocabularies
are sorted by frequency. A text scores the mean over its tokens, each by the logarithm of its count.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from ..errors import FormatError
from ..io import Misfit, StrictStruct, typed_json
from .pack import Pack

KEY = "x_text_profile"
"""The profile's name in a manifest's extensions."""
LARGEST_ID = (1 << 20) - 1
"""The largest token id of a profile, beyond all vocabularies."""
_MOST = 1024
_STEP = 16.0
"""Ratios are stored in bytes, so many to 1."""
_FOLDS = 5
_BELONGS = 0.1
"""The share of a pack's own texts that its threshold leaves to the base."""
_SHARPNESS = 1.5
"""By how much a score counts, times the root of the text's tokens, which are not independent."""
_LEAST = 0.5
"""How sure a choice must be; otherwise the base answers."""
_MASS = 1.1
"""The most that shares add up to, by rounding."""


class TextProfile(StrictStruct, frozen=True):
    """Token ids (int32, little-endian, ascending), their ratios in bytes, and the score from which a text
    belongs.
    """

    tokens: Annotated[bytes, Meta(max_length=4 * _MOST)]
    ratios: Annotated[bytes, Meta(min_length=1, max_length=_MOST)]
    fits: Annotated[float, Meta(ge=0, le=16)]

    @property
    def ids(self) -> np.ndarray:
        """The token ids, int32."""
        return np.frombuffer(self.tokens[: len(self.tokens) // 4 * 4], "<i4")

    @property
    def logs(self) -> np.ndarray:
        """The logarithms of the ratios, float32."""
        return np.frombuffer(self.ratios, np.uint8).astype(np.float32) / np.float32(_STEP)

    def breaches(self) -> Iterator[Misfit]:
        """Yields a misfit for ids without order or ratio, and for shares of more than a whole, with which a
        pack would claim texts of every kind.
        """
        ids = self.ids
        if (
            len(self.tokens) != 4 * len(self.ratios)
            or not 0 <= ids[0] <= ids[-1] <= LARGEST_ID
            or (np.diff(ids) < 1).any()
        ):
            yield Misfit("/tokens", "these are not ascending token ids, one for each ratio")
        elif np.expm1(self.logs.astype(float)) @ _prior(self.ids) > _MASS:
            yield Misfit("/ratios", "the shares of the tokens are more than a whole")

    @classmethod
    def of_texts(cls, texts: Sequence[Sequence[int]]) -> TextProfile:
        """Makes the profile of texts, given as token ids. Each fifth of them in turn is kept aside, and tells
        at which score a text still belongs.
        """
        folds = [
            [text for place, text in enumerate(texts) if place % _FOLDS != fold] for fold in range(_FOLDS)
        ]
        index = TextIndex()
        for fold, rest in enumerate(folds):
            index.put(str(fold), _made(rest))
        scores = [index.scores(text, [place % _FOLDS])[0] for place, text in enumerate(texts)]
        return msgspec.structs.replace(_made(texts), fits=float(np.quantile(scores, _BELONGS)))

    @classmethod
    def of(cls, pack: Pack) -> TextProfile | None:
        """Returns the profile in a pack's manifest, or None.

        Raises:
            FormatError: it is not valid.
        """
        stored = pack.manifest.extensions.get(KEY)
        if stored is None:
            return None
        read = typed_json.read(stored, cls)
        fault = read if isinstance(read, Misfit) else next(read.breaches(), None)
        if fault is not None:
            raise FormatError(
                f"the profile of the pack's texts is not valid: {fault.message}",
                where=f"{pack.where}, /extensions/{KEY}{fault.pointer}",
                remedy="measure the pack again with adapterpack measure --kind texts",
            )
        assert isinstance(read, TextProfile)
        return read


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
        """Gives a name this profile; None takes the one that it had."""
        with self._lock:
            if self._fits.pop(name, None) is not None:
                self._table = np.delete(self._table, self._columns[name], 1)
                self._columns = {other: column for column, other in enumerate(self._fits)}
            if profile is None:
                return
            ids, column = profile.ids, len(self._fits)
            new = ids[self._rows[ids] < 0]
            self._rows[new] = self._used + np.arange(len(new))
            self._used += len(new)
            room = [
                (have, need) for have, need in zip(self._table.shape, (self._used, column + 1), strict=True)
            ]
            if any(have < need for have, need in room):
                self._table = np.pad(self._table, [(0, max(0, need * 5 // 4 - have)) for have, need in room])
            self._table[self._rows[ids], column] = np.frombuffer(profile.ratios, np.uint8)
            self._columns[name], self._fits[name] = column, profile.fits

    def scores(self, text: Sequence[int], columns: slice | Sequence[int]) -> np.ndarray:
        """Returns the score of a text for the profiles of these columns."""
        tokens, weights = _weighed(text)
        rows = self._rows[tokens]
        table = self._table[rows[rows >= 0]][:, columns].astype(np.float32)
        shares = weights[rows >= 0].astype(np.float32) / np.float32(_STEP * weights.sum())
        return np.dot(shares, table)  # type: ignore[no-any-return]

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
    tokens, counts = np.unique(np.asarray(text, np.int32), return_counts=True)
    return tokens, np.log1p(counts)


def _prior(ids: np.ndarray) -> np.ndarray:
    return 1 / (6.0 * (ids + 200.0))


def _made(texts: Sequence[Sequence[int]]) -> TextProfile:
    pairs = [_weighed(text) for text in texts]
    ids, inverse = np.unique(np.concatenate([tokens for tokens, _ in pairs]), return_inverse=True)
    sums = np.bincount(inverse, np.concatenate([weights for _, weights in pairs]))
    shares = sums / sums.sum()
    ratios = np.minimum(np.rint(_STEP * np.log1p(shares / _prior(ids))), 255)
    kept = np.sort(np.argsort(-shares * ratios, kind="stable")[:_MOST])
    return TextProfile(ids[kept].astype("<i4").tobytes(), ratios[kept].astype(np.uint8).tobytes(), 0.0)
