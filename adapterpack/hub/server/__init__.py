"""A small self-hosted hub that the official client speaks to: content-addressed, atomic, with tokens. Needs
the extra ``serve``.
"""

from __future__ import annotations
