"""Small cases of what clients ask a server of texts: a file a topic, a function a case."""

from __future__ import annotations

from importlib import import_module

for _topic in ("texts", "scores", "calls", "routes", "further", "service"):
    import_module(f"{__name__}.{_topic}")
