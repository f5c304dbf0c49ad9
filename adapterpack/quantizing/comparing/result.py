"""The result of a comparison of quantized forms, and its JSON."""

from __future__ import annotations

from dataclasses import dataclass

from ...io import Json, finite
from ...notebook import Shown
from .figures import Figures


@dataclass(frozen=True)
class QuantizedForm:
    """One form: the ``scheme`` of its weights (``float``: unquantized) and the ``way`` to it. It has either
    ``figures`` and the share of likeliest choices that equal those of the float bundle (``agreement``), or
    the reason why it could not be created.
    """

    scheme: str
    way: str
    figures: Figures | None
    agreement: float | None
    reason: str | None = None

    def to_json(self) -> Json:
        """Returns the form as ``quantize --compare --json`` prints it, with null for figures that the task
        does not have.
        """
        return {
            "scheme": self.scheme,
            "way": self.way,
            "bytes": getattr(self.figures, "nbytes", None),
            **{
                name: getattr(self.figures, name, None)
                for name in ("perplexity", "right", "decode", "prefill")
            },
            "agreement": self.agreement,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Comparison(Shown):
    """All forms of one bundle, the float one first, with advice in sentences. ``positions`` is the number of
    choices that were compared with the float bundle's, ``rank`` the rank of corrections.
    """

    base: str
    adapter: str | None
    task: str
    rows: int
    positions: int
    rank: int
    forms: tuple[QuantizedForm, ...]
    advice: tuple[str, ...]

    def __repr__(self) -> str:
        return f"<Comparison of {self.base}: {' '.join(self.advice)}>"

    def to_json(self) -> Json:
        """Returns the comparison as ``quantize --compare --json`` prints it."""
        written: Json = finite({**vars(self), "forms": [form.to_json() for form in self.forms]})
        return written
