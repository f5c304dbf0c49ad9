"""Chat templates: the form in which a model wants messages, as training and the runtime render it."""

from __future__ import annotations

from .template import ChatTemplate, Message

__all__ = ["ChatTemplate", "Message"]
