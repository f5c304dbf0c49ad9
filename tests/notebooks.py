"""What a notebook shows of a result, by the protocol that Jupyter and its kin have."""

from __future__ import annotations

import html
import re
from typing import Any


def page_in_notebook(result: Any) -> str:
    """The page of a result: it stands alone, and so in a frame that runs no script; as text the result is a
    line, or a dictionary's.
    """
    text = repr(result)
    assert isinstance(result, dict) or (text.startswith("<") and "\n" not in text and len(text) < 400)
    framed = re.fullmatch(
        r'<iframe srcdoc="([^"]*)" title="\w+" sandbox="allow-same-origin" [^<>]*></iframe>',
        result._repr_html_(),
    )
    assert framed is not None
    page = html.unescape(framed[1])
    assert page.startswith("<!DOCTYPE html>") and "default-src 'none'" in page
    return page
