"""The colours of adapterpack's pages, in light and dark, which colour-blind readers can distinguish."""

from __future__ import annotations

from collections.abc import Mapping

LIGHT: Mapping[str, str] = {
    "page": "#ffffff", "ink": "#1b1f24", "quiet": "#565d66", "line": "#d8dce1", "panel": "#f5f6f8",
    "c1": "#0072b2", "c2": "#c65700", "c3": "#007d5e", "c0": "#7b828c",
}  # fmt: skip
"""Wong's colour-blind safe hues (Nature Methods 8, 441, 2011), darkened to a contrast of 3 with the page; c0
is for results of other tools.
"""
DARK: Mapping[str, str] = {
    "page": "#14171b", "ink": "#e8eaed", "quiet": "#a9b0b9", "line": "#3a4048", "panel": "#1e2228",
    "c1": "#56b4e9", "c2": "#e69f00", "c3": "#2fbf94", "c0": "#8b939d",
}  # fmt: skip


def variables(palette: Mapping[str, str]) -> str:
    """Returns the CSS declarations of a palette.

    Example:
        >>> variables({"page": "#fff", "ink": "#000"})
        '--page:#fff;--ink:#000'
    """
    return ";".join(f"--{name}:{colour}" for name, colour in palette.items())


def style_sheet() -> str:
    """Returns both palettes as a style sheet; the browser's preference decides, unless ``data-theme`` of the
    root element does.
    """
    light = f"{{color-scheme:light;{variables(LIGHT)}}}"
    dark = f"{{color-scheme:dark;{variables(DARK)}}}"
    chosen = f":root{light}\n:root[data-theme=dark]{dark}\n"
    return f"{chosen}@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){dark}}}\n"
