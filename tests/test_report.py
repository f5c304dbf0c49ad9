"""The page that people look at: escaped, self-contained, well-formed, complete, and with no text cut off."""

from __future__ import annotations

import copy
import doctest
import html.parser
import importlib
import io
import re
import shlex
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from jinja2 import UndefinedError
from rich.console import Console

from adapterpack.errors import printable
from adapterpack.palette import DARK, LIGHT
from adapterpack.report import svg
from adapterpack.report.comparison import comparison_report
from adapterpack.report.demo import demo_report
from adapterpack.report.heat import heat_map
from adapterpack.report.inspected import inspect_report
from adapterpack.report.key_figures import Card
from adapterpack.report.lines import Line, loss_lines, spectrum_lines
from adapterpack.report.rendering import environment, render
from adapterpack.report.tables import demo_tables
from adapterpack.report.text import text_width
from adapterpack.report.trained import train_report

pytestmark = pytest.mark.fast

HOSTILE = ('</title></style></code><script src="https://evil.example/x.js">alert(1)</script><img src=x onerror=a> '
           '\u202eright to left\u2066 \x1b[31m " \' & \ufffe')  # fmt: skip
"""Closes every element that text stands in, loads from elsewhere, and turns the direction of what follows."""
ELEMENTS = {
    "html", "head", "meta", "link", "title", "style", "body", "main", "h1", "h2", "p", "ul", "li", "span",
    "strong", "div", "table", "caption", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "dl",
    "dt", "dd", "pre", "code", "footer", "svg", "desc", "text", "h3", "rect", "line", "polyline", "polygon",
    "circle",
}  # fmt: skip
"""All that a page is made of: no script, no img, no iframe, no form."""
VOID = {"meta", "link"}


def forms(chance: float) -> dict[str, float]:
    return {"chance": chance, "base_untrained_head": 0.141, "torch": 0.883, "merged": 0.883, "onnx_fp32": 0.883, "onnx_int8": 0.879,
            "onnx_int4": 0.866}  # fmt: skip


def differences() -> dict[str, dict[str, float]]:
    return {"merged": {"max_abs": 1.2e-6, "label_agreement": 1.0}, "onnx_fp32": {"max_abs": 3.4e-6, "label_agreement": 1.0},
            "onnx_int8": {"max_abs": 0.031, "label_agreement": 0.992},
            "onnx_int4": {"max_abs": 0.21, "label_agreement": 0.979}}  # fmt: skip


ENCODER: dict[str, Any] = {
    "command": "demo", "variant": "encoder", "version": "0.1.0",
    "model": {"name": "all-MiniLM-L6-v2", "parameters": 22713216, "bytes": 90868376, "source": "a wheel"},
    "accuracy": {"tickets": forms(0.167), "reviews": forms(0.5)},
    "compose": {"first_half": 0.811, "second_half": 0.832, "average": 0.864, "both_halves": 0.885, "rank": 16, "exact": True},
    "parity": {"tickets": differences(), "reviews": differences()},
    "mixed_batch_equal": True,
    "mixed_batch": {"max_abs": 0.0, "rows": [{"text": "Where is my parcel?", "adapter": "tickets", "label": "delivery", "score": 0.934},
                                             {"text": "Cold soup.", "adapter": None, "label": None, "score": None}]},
    "sizes": {"base checkpoint": 90868376, "pack tickets": 1310000, "pack tickets int8": 401000, "merged checkpoint": 90900000,
              "bundle fp32": 94300000, "bundle int8": 36300000, "bundle int4": 31400000},
    "timings": {"fetch": 1.2, "train tickets": 30.1, "train reviews": 28.4, "pack_and_validate": 0.9, "mixed batch": 0.01},
    "training": {"tickets": {"rows": 480, "steps": 120, "trainable": 300123}, "reviews": {"rows": 401, "steps": 101, "trainable": 299000}},
    "output": "adapterpack-demo",
}  # fmt: skip
CAUSAL: dict[str, Any] = {
    "command": "demo", "variant": "causal-lm", "version": "0.1.0",
    "model": {"name": "SmolLM2-135M-Instruct", "parameters": 134515008, "bytes": 538090408, "source": "a wheel"},
    "exact_match": {"before": 0.0, "after": 0.9, "n": 40}, "valid_json": {"before": 0.025, "after": 1.0},
    "token_agreement": 0.998, "tokens_compared": 4120,
    "speed": {"onnx": {"tokens_per_second": 55.1, "batch": 4}, "torch": {"tokens_per_second": 40.2, "batch": 4}, "ratio": 1.37},
    "examples": [{"prompt": "two pizzas", "expected": '{"n": 2}', "base": "Sure!\n1. pizza", "adapter": '{"n": 2}'}],
    "parity": {"orders": {"onnx_fp32": {"max_abs": 4.2e-5}}}, "sizes": {"base checkpoint": 538090408, "pack orders": 9810000},
    "timings": {"fetch": 3.0, "train orders": 190.0}, "training": {"orders": {"rows": 301, "steps": 75, "trainable": 2440000}},
    "output": "adapterpack-demo",
}  # fmt: skip
BOTH = pytest.mark.parametrize("result", [ENCODER, CAUSAL], ids=["encoder", "causal"])


class Document(html.parser.HTMLParser):
    """Elements with their attributes, and the text that is shown; fails where a tag is not closed in
    order.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open, self.shown = list[str](), list[str]()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.shown.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.shown).split())


def charts(text: str) -> list[ET.Element]:
    return [
        ET.fromstring(chart)
        for chart in re.findall(r"<svg.*?</svg>(?=<figcaption|</figure>|\Z)", text, re.DOTALL)
    ]


def hostile(value: Any) -> Any:
    """The same result with every text in it, names of adapters and stages too, replaced by a hostile one."""
    if isinstance(value, dict):
        kept = {*ENCODER, *CAUSAL, "torch", "chance", "onnx_fp32", "max_abs", "rows", "text", "adapter", "label", "score", "prompt",
                "trainable", "name", "after"}  # fmt: skip
        return {key if key in kept else f"{key} {HOSTILE}": hostile(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [hostile(entry) for entry in value]
    return HOSTILE if isinstance(value, str) else value


def assert_harmless(text: str) -> None:
    document = Document(text)
    assert {name for name, _ in document.elements} <= ELEMENTS
    for _, attributes in document.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert {attributes.get(name) for name in ("src", "href", "srcset", "data", "action")} <= {
            None,
            "data:,",
        }
    assert not re.search(r"url\(|@import", render("style.css.jinja"))
    assert text == printable(text)
    assert charts(text)


@BOTH
def test_the_page_is_self_contained_and_well_formed(result: dict[str, Any]) -> None:
    """No script, nothing loaded from elsewhere, every element closed in order, every chart well-formed
    XML.
    """
    assert_harmless(demo_report(result))


@BOTH
def test_hostile_text_is_shown_and_does_nothing(result: dict[str, Any]) -> None:
    """Names, labels and generated text with markup and bidirectional characters stand in the page as what
    they are.
    """
    text = demo_report(hostile(result))
    assert_harmless(text)
    assert "\\u202eright to left\\u2066 \\u001b[31m" in Document(text).text
    assert '<script src="https://evil.example/x.js">alert(1)</script>' in Document(text).text


def test_a_comparison_of_quantized_forms() -> None:
    """Of a language model and of a classifier: harmless whatever names say, and every name is shown, of
    points in one place, too.
    """
    ways = [
        ("float", "float"),
        ("int4", "merged"),
        ("int4", "attached"),
        ("int4", "compensated"),
        ("int8", HOSTILE),
    ]
    for generates in (True, False):
        forms = [
            {
                "scheme": scheme,
                "way": way,
                "bytes": 560_000_000 // (number + 1),
                "perplexity": 1.2 + number / 100,
                "right": 0.75,
                "decode": 20.0 if generates else None,
                "prefill": 300.0,
                "agreement": 0.9,
                "reason": None,
            }
            for number, (scheme, way) in enumerate([*ways, ways[1]])
        ]
        failed = {**dict.fromkeys(forms[0]), "scheme": "fp8", "way": "merged", "reason": HOSTILE}
        result = {
            "base": HOSTILE,
            "adapter": HOSTILE,
            "task": "text-generation",
            "rows": 40,
            "positions": 820,
            "rank": 32,
            "forms": [*forms, failed],
            "advice": [HOSTILE],
        }
        text = comparison_report(result)
        assert_harmless(text)
        assert text.count("<circle") == len(forms) and ("20.0" in text) == generates
        shown = re.findall(r">int4 (merged|attached|compensated)</text>", text)
        assert sorted(shown) == ["attached", "compensated", "merged", "merged"]


def test_every_kind_of_section_escapes() -> None:
    """Heading, paragraph, card, table, caption, record, code, title, footer."""
    chart = svg.grouped_bars(HOSTILE, [svg.Group(HOSTILE, [svg.Bar(HOSTILE, 0.5, HOSTILE, '"><script>')], svg.Reference(HOSTILE, 0.2))],
                             maximum=1, ticks=[(0.5, HOSTILE)])  # fmt: skip
    template = environment().from_string("""{% extends "page.html.jinja" %}{% import "parts.html.jinja" as parts %}
        {% block title %}{{ text }}{% endblock %}
        {% block body %}<h2>{{ text }}</h2><p>{{ text }}</p>{{ parts.cards([card]) }}{{ parts.code([text]) }}
        {{ parts.table([text], [[text]], [0], text) }}{{ parts.figure(chart, text) }}{{ parts.record([(text, text)]) }}{% endblock %}
        {% block footer %}{{ text }}{% endblock %}""")
    text = template.render(text=HOSTILE, card=Card(HOSTILE, HOSTILE, HOSTILE), chart=chart)
    assert_harmless(text)
    # Title twice, and one for every text above; what a chart elides stands whole in its title and
    # description.
    assert Document(text).text.count("<script src=") >= 16


def test_no_template_lets_a_value_pass_unescaped() -> None:
    """No filter and no block in the shipped templates switches escaping off, and a value that is missing is
    an error, not a gap.
    """
    loader = environment().loader
    assert loader is not None
    names = loader.list_templates()
    assert {
        "audit.html.jinja",
        "demo.html.jinja",
        "page.html.jinja",
        "parts.html.jinja",
        "style.css.jinja",
    } <= set(names)
    for name in names:
        source = loader.get_source(environment(), name)[0]
        assert not re.search(r"\|\s*safe\b|autoescape|Markup", source), name
    with pytest.raises(UndefinedError, match="steps"):
        render("demo.html.jinja", name="a", version="1")
    assert (
        environment().from_string("{{ '<b>' }}{{ x }}").render(x="\x1b<i>\u202e")
        == "&lt;b&gt;\\u001b&lt;i&gt;\\u202e"
    )


@BOTH
def test_the_page_tells_the_story_in_order(result: dict[str, Any]) -> None:
    """Headings come in the order of the run, and only for what the run did."""
    text = demo_report(result)
    wanted = {
        "encoder": [
            "Training",
            "Accuracy",
            "Composition",
            "The same answers everywhere",
            "A mixed batch",
            "Sizes",
            "Time",
            "How to go on",
        ],
        "causal-lm": [
            "Training",
            "Before and after",
            "Examples",
            "The same answers everywhere",
            "Speed",
            "Sizes",
            "Time",
            "How to go on",
        ],
    }
    assert re.findall("<h2>(.*?)</h2>", text) == wanted[result["variant"]]


ENCODER_SHOWN = (
    "22.7 million parameters", "90.9 MB", "16.7 %", "50.0 %", "14.1 %", "88.3 %", "87.9 %", "86.6 %", "81.1 %", "83.2 %", "86.4 %",
    "88.5 %", "rank 16", "1.2e-06", "3.4e-06", "3.1e-02", "2.1e-01", "99.2 %", "97.9 %", "93.4 %", "none (base)", "1.31 MB", "401 kB",
    "31.4 MB", "30.1 s", "&lt; 0.1 s", "60.6 s", "300,123", "480", "1.7 points (ONNX int4, tickets)", "pack and validate",
    "adapterpack validate adapterpack-demo/packs/tickets", "adapterpack inspect adapterpack-demo/bundle",
    "adapterpack run adapterpack-demo/bundle --adapter tickets --prompt &#39;Where is my parcel?&#39;",
)  # fmt: skip
CAUSAL_SHOWN = (
    "135 million parameters", "0.0 %", "90.0 %", "2.5 %", "100.0 %", "40 prompts", "99.8 %", "4,120", "55.1", "40.2", "1.37 times",
    "4.2e-05", "9.81 MB", "538 MB", "3 min 10 s", "3 min 13 s", "2.44 million", "Sure!\n1. pizza", "{&#34;n&#34;: 2}",
    "adapterpack run adapterpack-demo/bundle --adapter orders --prompt &#39;two pizzas&#39;",
)  # fmt: skip


@pytest.mark.parametrize(
    ("result", "shown"), [(ENCODER, ENCODER_SHOWN), (CAUSAL, CAUSAL_SHOWN)], ids=["encoder", "causal"]
)
def test_the_numbers_of_the_result_are_shown(result: dict[str, Any], shown: tuple[str, ...]) -> None:
    """What was measured stands on the page as people read it."""
    text = demo_report(result)
    assert [number for number in shown if number not in text] == []


@BOTH
def test_bad_news_is_told(result: dict[str, Any]) -> None:
    """Words follow the figures: unequal rows, a truncated average, a lost point and a slower runtime are
    said.
    """
    bad = {**result, "mixed_batch_equal": False, "mixed_batch": {"max_abs": 0.25, "rows": []}, "compose": {"average": 0.5, "exact": False},
           "speed": {"onnx": {"tokens_per_second": 20.0}, "torch": {"tokens_per_second": 40.0}, "ratio": 0.5}}  # fmt: skip
    text = Document(demo_report(bad)).text
    told = (
        "differs",
        "The rows differ",
        "largest difference 2.5e-01",
        "is an approximation",
        "0.50 times as many as PyTorch",
    )
    assert [words for words in told if words not in text] == []
    assert [words for words in ("gets the answer", "exact: nothing") if words in text] == []


@BOTH
def test_a_missing_part_is_left_out(result: dict[str, Any]) -> None:
    """Any one key, nested or not, may be missing, empty, or of another type: the rest of the page stands."""
    for path in paths(result):
        for replaced in REPLACED:
            partial = copy.deepcopy(result)
            place: Any = partial
            for key in path[:-1]:
                place = place[key]
            measured = isinstance(place[path[-1]], float)
            place[path[-1]] = replaced
            assert not measured or "nan" not in demo_report(partial)
            demo_tables(partial)
        del place[path[-1]]
        demo_tables(partial)
        assert "None" not in Document(demo_report(partial)).text
    assert "<h1>adapterpack demo</h1>" in demo_report({})
    assert "<h2>" not in demo_report({})
    assert demo_tables({}) == []


REPLACED: tuple[Any, ...] = (None, {}, [], "text", float("nan"))


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from paths(value[key], (*path, key))


def test_commands_survive_a_shell() -> None:
    """A folder with a blank and a prompt with a quote reach the program as one argument each; ``paths`` says
    where things lie.
    """
    prompt = "What's $HOME; `id`?"
    result = {
        **ENCODER,
        "output": "my demo",
        "mixed_batch": {"rows": [{"text": prompt, "adapter": "tickets"}]},
    }
    code = "".join(re.findall("<pre><code>(.*?)</code>", demo_report(result), re.DOTALL))
    *_, run = html.unescape(code).splitlines()
    assert shlex.split(run) == [
        "adapterpack",
        "run",
        "my demo/bundle",
        "--adapter",
        "tickets",
        "--prompt",
        prompt,
    ]
    text = demo_report({**ENCODER, "paths": {"pack": "here/pack", "bundle": "there/bundle"}})
    assert "adapterpack validate here/pack\nadapterpack inspect there/bundle\n" in text


def extent(element: ET.Element, plot: float) -> tuple[float, float]:
    """Where a text begins and ends for a plot of that width, in px from its left edge."""
    width = text_width(element.text or "")
    at = float(element.attrib["x"].rstrip("%")) / 100 * plot + float(element.get("dx", 0))
    start = at - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[element.attrib["text-anchor"]]
    return start, start + width


LONG = "a stage of the work with a name that never seems to come to its end"
NAMES = ("WWWWWWWWWWWWWWWWWWWWWWWW", LONG, "日本語の名前はとても長いことがあります", "i", "")
MADE = {
    "names": svg.grouped_bars("t", [svg.Group(name, [svg.Bar(name, 0.7, name)], svg.Reference(name, at)) for name in NAMES
                                    for at in (0.0, 0.49, 0.51, 0.7, 1.0)], maximum=1, ticks=[(i / 10, f"{10 * i} %") for i in range(11)]),
    "references": svg.grouped_bars("t", [svg.Group("", [svg.Bar("b", i / 9, "1 %") for i in range(9)], svg.Reference(LONG, at))
                                         for at in (0.0, 0.3, 0.5, 0.6, 0.9, 1.0)], maximum=1),
    "range": svg.grouped_bars("t", [svg.Group("g", [svg.Bar("b", value, str(value)) for value in (-1.0, 0.0, 2.0, None)])], maximum=1),
    "times": svg.time_bars("t", [(f"{LONG} {i}", 10.0**i) for i in range(-3, 5)]),
    "one time": svg.time_bars("t", [("a", 0.0)]),
    "log": svg.size_bars("t", [(f"artifact {i}", 10.0**i) for i in range(13)] + [("empty", 0)]),
    "linear": svg.size_bars("t", [("a", 90e6), ("b", 30e6)]),
    "none": svg.size_bars("t", []),
    "map": heat_map("t", NAMES, [str(i) for i in range(130)], [[i / 130 - 0.4 for i in range(130)]] * 4 + [[None] * 130]),
    "pairs": heat_map("t", NAMES, ["1", "2", "3", "4", "5"], [[-0.99, 0.5, None, 1.0, 0.0]] * 5, written=True),
    "no map": heat_map("t", [], [], []),
    "spectra": spectrum_lines("t", [Line(name, [0.7**i for i in range(70)], None, "c1") for name in NAMES]),
    "one value": spectrum_lines("t", [Line("a", [1.0], ([1.0], [1.0]), "c2")]),
    "losses": loss_lines("t", [("a", range(1, 4000), [3 / (1 + i / 300) for i in range(3999)]), (LONG, range(50, 60), [1e-3] * 10)]),
    "one step": loss_lines("t", [("a", [7], [0.0])]),
    "no step": loss_lines("t", []),
    "no spectrum": spectrum_lines("t", []),
}  # fmt: skip


def drawn() -> list[tuple[str, ET.Element]]:
    reports = {
        "encoder": demo_report(ENCODER),
        "causal": demo_report(CAUSAL),
        "hostile": demo_report(hostile(ENCODER)),
        "artifact": inspect_report(SUMMARY),
    }
    return [(name, chart) for name, text in {**MADE, **reports}.items() for chart in charts(text)]


@pytest.mark.parametrize("width", [svg.MIN_WIDTH, 368, svg.WIDE, 848])
def test_no_text_of_a_figure_is_clipped_and_none_overlaps(width: int) -> None:
    """x + dx + width of each text lies between the edges of the chart, texts on one line keep apart, and no
    reference line crosses one; 368 and 848 px are the width of the column in a window of 400 and of 1200 px.
    """
    for name, chart in drawn():
        right, left = (
            int(px) for px in re.fullmatch(r"padding:0 (\d+)px 0 (\d+)px", chart.attrib["style"]).groups()
        )  # type: ignore[union-attr]
        plot = width - left - right
        assert plot > 40
        lines: dict[str, list[tuple[float, float]]] = {}
        for text in chart.iter("{http://www.w3.org/2000/svg}text"):
            if text.get("class") == "wide" and width < svg.WIDE:
                continue
            start, stop = extent(text, plot)
            # Half a px: lengths are written with six digits.
            assert -left - 0.5 <= start <= stop <= plot + right + 0.5, (name, text.text)
            assert 12 <= float(text.attrib["y"]) <= float(chart.attrib["height"]), (name, text.text)
            lines.setdefault(text.attrib["y"], []).append((start, stop))
        for line in chart.iter("{http://www.w3.org/2000/svg}line"):
            if line.get("class") == "reference":
                at, top, bottom = (float(line.attrib[key].rstrip("%")) for key in ("x1", "y1", "y2"))
                beside = [
                    extent for y, extents in lines.items() if top < float(y) < bottom for extent in extents
                ]
                assert not any(
                    start < at / 100 * plot - 0.5 and at / 100 * plot + 0.5 < stop for start, stop in beside
                ), name
        for extents in lines.values():
            ordered = sorted(extents)
            assert all(a[1] <= b[0] + 0.5 for a, b in pairwise(ordered)), name


def test_text_is_never_wider_than_thought() -> None:
    """Widths in px that a browser measured in DejaVu Sans Bold at 13 px, a wide font, are upper bounds of
    what other fonts need.
    """
    browser = {"88.0 %": 49.6, "untrained head": 112.4, "merged checkpoint": 141.0, "pack tickets int8": 121.9, "WWW MMM": 86.4,
               "chance 16.7 %": 105.7, "ONNX Runtime": 108.9, "wwmm@@%%": 103.2, "GOQDNHU": 75.9,
               "0123456789": 90.5, "bdpqghnuo": 83.2,
               "ljit.,:;' |!": 59.0, "frI()[]-/<>&=+~#_^": 144.9, "—…": 26.0, "ЖШЩЮ": 64.5, "½¾‰": 45.6}  # fmt: skip
    assert {
        text: text_width(text)
        for text, width in browser.items()
        if not width <= text_width(text) <= 1.5 * width
    } == {}


def test_bars_are_as_long_as_their_values() -> None:
    """Width / plot = value / maximum; a stage starts at the sum of those before it; log sizes a factor 10
    apart are equally far apart.
    """
    # Of -1, 0, 2 and nothing, on a scale from 0 to 1, one bar is drawn, and it is a full one.
    assert ends(MADE["range"]) == [(0.0, 100.0)]
    bars = svg.grouped_bars(
        "t", [svg.Group("g", [svg.Bar("b", 3.0, "3")], svg.Reference("r", 1.0))], maximum=4
    )
    assert 'x="0%" y="29" width="75%"' in bars
    assert 'class="reference" x1="25%" x2="25%"' in bars
    assert ends(svg.time_bars("t", [("a", 1), ("b", 3), ("c", 4)])) == [
        (0.0, 12.5),
        (12.5, 50.0),
        (50.0, 100.0),
    ]
    (_, small), (_, middle), (_, large) = ends(svg.size_bars("t", [("a", 1e5), ("b", 1e6), ("c", 1e7)]))
    # Six digits are written.
    assert middle - small == pytest.approx(large - middle, abs=1e-3)
    assert ends(svg.size_bars("t", [("a", 1e5), ("b", 1e6)])) == [(0.0, 10.0), (0.0, 100.0)]


def ends(chart: str) -> list[tuple[float, float]]:
    """Where each bar starts and ends, in percent of the plot."""
    rects = [
        [float(e.attrib[key].rstrip("%")) for key in ("x", "width")]
        for e in charts(chart)[0]
        if e.tag.endswith("rect")
    ]
    return [(start, start + width) for start, width in rects]


def test_charts_speak_to_screen_readers() -> None:
    """role="img", a title and a description that holds every value, tied to the chart by ids that are unique
    on the page.
    """
    for result in (ENCODER, CAUSAL):
        found = charts(demo_report(result))
        ids = [child.attrib["id"] for chart in found for child in chart if "id" in child.attrib]
        assert len(ids) == len(set(ids)) == 2 * len(found)
        for chart in found:
            title, desc = chart[:2]
            assert chart.attrib["role"] == "img"
            assert chart.attrib["aria-labelledby"] == f"{title.attrib['id']} {desc.attrib['id']}"
            values = [
                text.text
                for text in chart.iter("{http://www.w3.org/2000/svg}text")
                if text.get("class") == "value"
            ]
            assert values and title.text
            assert all(value in (desc.text or "") for value in values if value)


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_the_palette_can_be_read(palette: dict[str, str]) -> None:
    """Contrast (L1 + 0.05) / (L2 + 0.05): at least 4.5 for text and 3 for bars (WCAG 2.2, 1.4.3 and
    1.4.11).
    """
    bars = [(tone, 3.0, ("page",)) for tone in palette if tone[0] == "c"]
    for name, least, grounds in [("ink", 4.5, ("page", "panel")), ("quiet", 4.5, ("page", "panel")), *bars]:
        for ground in grounds:
            low, high = sorted((luminance(palette[name]), luminance(palette[ground])))
            assert (high + 0.05) / (low + 0.05) >= least, (name, ground)


def test_the_style_sheet_keeps_its_promises() -> None:
    """No text below 12 px; light and dark have the same names; print, narrow screens and dark have their
    rules.
    """
    sheet = render("style.css.jinja")
    sizes = [int(px) for px in re.findall(r"font(?:-size)?:(?:[\w ]*? )?(\d+)px", sheet)]
    assert len(sizes) > 10
    assert min(sizes) >= 12
    assert set(LIGHT) == set(DARK)
    assert set(re.findall(r"var\(--(\w+)\)", sheet)) <= {*LIGHT, "columns"}
    assert {"svg ." + tone for tone in LIGHT if tone[0] == "c"} <= set(re.findall(r"svg \.\w+", sheet))
    assert all(
        rule in sheet for rule in ("@media print", "@media (max-width:640px)", "prefers-color-scheme:dark")
    )


@BOTH
def test_the_terminal_tables_show_the_numbers(result: dict[str, Any]) -> None:
    """The same figures as the page, within 80 columns."""
    stream = io.StringIO()
    Console(file=stream, width=80).print(*demo_tables(result))
    shown = stream.getvalue()
    wanted = {
        "encoder": (
            "88.3 %",
            "16.7 %",
            "3.4e-06",
            "97.9 %",
            "401 kB",
            "30.1 s",
            "60.6 s",
            "Accuracy",
            "Parity",
            "Sizes",
            "Time",
        ),
        "causal-lm": (
            "90.0 %",
            "2.5 %",
            "4.2e-05",
            "99.8 %",
            "55.1",
            "9.81 MB",
            "3 min 13 s",
            "Speed",
            "Parity",
            "Sizes",
        ),
    }
    assert [number for number in wanted[result["variant"]] if number not in shown] == []
    assert max(map(len, shown.splitlines())) <= 80


def test_the_terminal_is_not_repainted() -> None:
    """Names with terminal escapes, bidirectional characters and rich markup are printed as what they are."""
    stream = io.StringIO()
    for table in demo_tables(
        {"sizes": {"[red]x[/red]\x1b[31m\u202e": 5}, "accuracy": {"[bold]\x1b[1m": {"torch": 0.5}}}
    ):
        Console(file=stream, width=120, force_terminal=True, color_system=None, no_color=True).print(table)
    assert "[red]x[/red]\\u001b[31m\\u202e" in stream.getvalue()
    assert "[bold]\\u001b[1m" in stream.getvalue()
    assert not re.search("\u202e|\x1b\\[31m", stream.getvalue())


@pytest.mark.parametrize(
    "name",
    [
        "audit_map",
        "comparison",
        "demo",
        "heat",
        "inspected",
        "key_figures",
        "lines",
        "rendering",
        "result",
        "scatter",
        "served",
        "svg",
        "tables",
        "text",
        "trained",
    ],
)
def test_the_examples_in_docstrings_run(name: str) -> None:
    """What the functions of the report show in their docstrings is what they give."""
    ran = doctest.testmod(importlib.import_module(f"adapterpack.report.{name}"))
    assert ran.attempted and not ran.failed


SUMMARY: dict[str, Any] = {
    "kind": "bundle", "path": "bundles/bank", "name": HOSTILE, "mode": "bank", "sites": 24,
    "parameters": 1_200_000, "bytes": 94_300_000,
    "base": {"name": HOSTILE, "content": "content:" + "ab" * 32, "variants": []},
    "sites_by_module": {"q": 12, "value_projection": 12},
    "adapters": [{"name": HOSTILE, "slot": 1, "labels": ["a", "b"]}, {"name": "b", "slot": 2}],
    "parity": {"max_abs": {"logits": 3e-6}}, "quantization": None, "canary": True,
}  # fmt: skip


def test_the_page_of_an_artifact_shows_all_of_it() -> None:
    """Each value of a summary stands on the page, whatever its form; names from strangers are text."""
    page = inspect_report(SUMMARY)
    assert_harmless(page)
    text = Document(page).text
    told = (
        "24",
        "1.20 million",
        "94.3 MB",
        "bank",
        "content:" + "ab" * 32,
        "max abs, logits 3e-06",
        "canary yes",
        "quantization none",
        "a b",
    )
    assert [words for words in told if words not in text] == []
    assert re.findall("<h2>(.*?)</h2>", page) == ["Sites by module", "Base", "Parity", "Adapters"]


def test_the_page_of_a_training_shows_its_losses() -> None:
    """A curve for each adapter, three in a figure; the mean of neighbours where there are more steps than
    points; scores and settings.
    """
    packs = [
        {
            "name": name,
            "path": f"out/{name}",
            "sites": 4,
            "parameters": 1000,
            "bytes": 4000,
            "metrics": [{"name": "accuracy", "value": 0.875, "n": 80, "dataset": HOSTILE}],
            "training": {"steps": 1000, "final_loss": 0.125, "config": {"r": 8}},
        }
        for name in ("a", "b", "c", HOSTILE)
    ]
    losses = {pack["name"]: [(step, 2.0 / step) for step in range(1, 1001)] for pack in packs}
    packs[0]["training"]["evaluations"] = [{"step": 10, "loss": 1.0}, {"step": 20, HOSTILE: 0.5, "loss": 0.5}]
    packs[1]["training"]["evaluations"] = [{"step": 20, "loss": 0.7}]
    page = train_report(packs, losses)
    assert_harmless(page)
    drawn = [len(chart.findall(".//{http://www.w3.org/2000/svg}polyline")) for chart in charts(page)]
    assert drawn == [3, 1, 1, 1], (
        "three losses, one, and two metrics of the one that was evaluated more than once"
    )
    line = charts(page)[0].find(".//{http://www.w3.org/2000/svg}polyline")
    assert line is not None
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    assert len(points) == 200
    # The first stretch is steps 1 to 5, whose mean is (2 + 1 + 2/3 + 1/2 + 2/5) / 5, of a scale from 0 to 2;
    # four digits are written.
    assert points[0] == pytest.approx((0, 100 * (1 - 4.5666667 / 5 / 2)), abs=0.01)
    assert points[-1] == pytest.approx(
        (100, 100 * (1 - sum(2 / step for step in range(996, 1001)) / 5 / 2)), abs=0.01
    )
    assert all(words in Document(page).text for words in ("0.875", "after 1,000 steps", "config, r 8"))
    assert "<svg" not in train_report(packs[2:3], {})
