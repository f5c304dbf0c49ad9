"""The look of a page: a palette that colour-blind readers can tell apart, in light and dark, and the style sheet."""

from __future__ import annotations

from collections.abc import Mapping

LIGHT: Mapping[str, str] = {
    "page": "#ffffff", "ink": "#1b1f24", "quiet": "#565d66", "line": "#d8dce1", "panel": "#f5f6f8",
    "c1": "#0072b2", "c2": "#c65700", "c3": "#007d5e", "c0": "#7b828c",
}  # fmt: skip
"""Wong's colour-blind safe hues (Nature Methods 8, 441, 2011), darkened to a contrast of 3 with the page; c0 is for what is not ours."""
DARK: Mapping[str, str] = {
    "page": "#14171b", "ink": "#e8eaed", "quiet": "#a9b0b9", "line": "#3a4048", "panel": "#1e2228",
    "c1": "#56b4e9", "c2": "#e69f00", "c3": "#2fbf94", "c0": "#8b939d",
}  # fmt: skip

_SHEET = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}
main{max-width:880px;margin:0 auto;padding:32px 16px 64px}
h1{font-size:30px;line-height:1.2;margin:0 0 12px;overflow-wrap:anywhere}
h2{font-size:21px;line-height:1.3;margin:44px 0 8px;overflow-wrap:anywhere}
p{margin:0 0 14px;max-width:72ch;overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(var(--columns),1fr);gap:12px;margin:20px 0;padding:0;list-style:none}
.cards li{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:12px 14px;overflow-wrap:anywhere}
.cards span{display:block;font-size:14px;color:var(--quiet);line-height:1.4}
.cards strong{display:block;font-size:21px;line-height:1.35;font-weight:650;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto;margin:14px 0}
table{border-collapse:collapse;width:100%;font-size:15px}
th,td{text-align:left;vertical-align:top;padding:7px 14px 7px 0;border-bottom:1px solid var(--line)}
th{font-size:14px;font-weight:600;color:var(--quiet);vertical-align:bottom}
th:last-child,td:last-child{padding-right:0}
td{overflow-wrap:break-word}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
th.number{white-space:normal}
caption,figcaption{font-size:14px;color:var(--quiet);text-align:left;max-width:80ch;overflow-wrap:anywhere}
caption{caption-side:bottom;padding-top:8px}
figure{margin:16px 0}
figcaption{margin-top:8px}
svg{display:block;overflow:visible;max-width:100%}
svg text{font-size:13px;fill:currentColor;font-variant-numeric:tabular-nums}
svg .head{font-weight:600}
svg .value{paint-order:stroke;stroke:var(--page);stroke-width:4px;stroke-linejoin:round}
svg .grid{stroke:var(--line)}
svg .reference{stroke:var(--ink);stroke-width:1.5;stroke-dasharray:4 3}
svg rect{stroke-width:1}
svg rect.cell{stroke:var(--page)}
svg .on{fill:var(--page)}
svg .off{fill:var(--ink)}
svg polyline.curve{fill:none;stroke-width:2;vector-effect:non-scaling-stroke}
svg polygon.band{fill-opacity:.16;stroke:none}
pre{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:12px 14px;margin:14px 0;
font:14px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:pre-wrap;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:minmax(76px,max-content) 1fr;gap:4px 14px;margin:14px 0;padding:12px 14px;background:var(--panel);
border:1px solid var(--line);border-radius:8px;font-size:15px}
dt{color:var(--quiet);font-size:14px}
dd{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
footer{margin-top:48px;padding-top:12px;border-top:1px solid var(--line);font-size:14px;color:var(--quiet)}
@media (max-width:520px){h1{font-size:25px}h2{margin-top:34px}main{padding-top:22px}dl{grid-template-columns:1fr}dd{margin-bottom:6px}}
@media (max-width:640px){svg .wide{display:none}.cards{grid-template-columns:1fr 1fr;gap:8px}}
@media print{main{max-width:none;padding:0}figure,pre,tr,dl,.cards li{break-inside:avoid}h1,h2{break-after:avoid}.scroll{overflow:visible}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def style_sheet() -> str:
    """The whole style sheet; printed pages are always light."""
    tones = "".join(f"svg .{tone}{{fill:var(--{tone});stroke:var(--{tone})}}\n" for tone in LIGHT if tone[0] == "c")
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}\n"
    return f":root{{color-scheme:light dark;{_variables(LIGHT)}}}\n{dark}{_SHEET.strip()}\n{tones}"


def _variables(palette: Mapping[str, str]) -> str:
    return ";".join(f"--{name}:{colour}" for name, colour in palette.items())
