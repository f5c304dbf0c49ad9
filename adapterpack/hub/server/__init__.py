"""A small self-hosted hub for the official client: content-addressed, atomic, with access tokens. Needs the
extra ``serve``.
"""

from __future__ import annotations
