"""What a comparison of quantized forms found, and how it is written as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...io.strict_json import finite
from .figures import Figures


@dataclass(frozen=True)
class QuantizedForm:
    """One form: the ``scheme`` of its weights (``float``: as they were) and the ``way`` to it. It has
    ``figures``, and how often its likeliest choices are those of the float bundle (``agreement``), or the
    reason for which it could not be made.
    """

    scheme: str
    way: str
    figures: Figures | None
    agreement: float | None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The form as ``quantize --compare --json`` prints it; what a task does not have is null."""
        found = self.figures
        numbers = (
            dict.fromkeys(("bytes", "perplexity", "right", "decode", "prefill"))
            if found is None
            else {
                "bytes": found.nbytes,
                "perplexity": found.perplexity,
                "right": found.right,
                "decode": found.decode,
                "prefill": found.prefill,
            }
        )
        return {
            "scheme": self.scheme,
            "way": self.way,
            **numbers,
            "agreement": self.agreement,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Comparison:
    """All forms of one bundle, the float one first, with what they speak for in sentences. ``positions`` is
    how many choices were compared with the float bundle's, ``rank`` that of compensations.
    """

    base: str
    adapter: str | None
    task: str
    rows: int
    positions: int
    rank: int
    forms: tuple[QuantizedForm, ...]
    advice: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The comparison as ``quantize --compare --json`` prints it."""
        written: dict[str, Any] = finite(
            {
                "base": self.base,
                "adapter": self.adapter,
                "task": self.task,
                "rows": self.rows,
                "positions": self.positions,
                "rank": self.rank,
                "forms": [form.to_json() for form in self.forms],
                "advice": list(self.advice),
            }
        )
        return written
