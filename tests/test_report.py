"""The page that people look at: escaped, self-contained, well-formed, complete, and with no text cut off."""

from __future__ import annotations

import copy
import doctest
import html.parser
import importlib
import re
import shlex
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from jinja2 import UndefinedError

from adapterpack.cli.output import print_table
from adapterpack.demos import load_stages
from adapterpack.errors import printable
from adapterpack.palette import DARK, LIGHT
from adapterpack.report.chart import line_charts, round_steps
from adapterpack.report.comparison import comparison_report
from adapterpack.report.inspection import inspect_report
from adapterpack.report.page import Card, find_figures, page_environment, render
from adapterpack.report.training import train_report

pytestmark = pytest.mark.fast

HOSTILE = ('</title></style></code><script src="https://evil.example/x.js">alert(1)</script><img src=x onerror=a> '
           '\u202eright to left\u2066 \x1b[31m " \' & \ufffe')  # fmt: skip
"""Closes every element that text stands in, loads from elsewhere, and turns the direction of what follows."""
demo_report, demo_tables = load_stages("report").demo_report, load_stages("report").demo_tables
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
    assert "<table" in text or "<svg" in text or "<dl" in text


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
    """Of a language model and of a classifier: harmless whatever names say, and every form has its row."""
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
        assert text.count(">1.2") == len(forms) and ("20.0" in text) == generates
        shown = re.findall(r"<td>int4</td>\s*<td>(merged|attached|compensated)</td>", text)
        assert sorted(shown) == ["attached", "compensated", "merged", "merged"]


def test_every_kind_of_section_escapes() -> None:
    """Heading, paragraph, card, table, caption, record, code, title, footer."""
    [chart] = line_charts(HOSTILE, {HOSTILE: [(1, 2.0), (2, 1.0)]})
    template = page_environment().from_string("""{% extends "page.html.jinja" %}{% import "parts.html.jinja" as parts %}
        {% block title %}{{ text }}{% endblock %}
        {% block body %}<h2>{{ text }}</h2><p>{{ text }}</p>{{ parts.cards([card]) }}{{ parts.code([text]) }}
        {{ parts.table([text], [[text]], text) }}{{ parts.lines(chart, text) }}{{ parts.record([(text, text)]) }}{% endblock %}
        {% block footer %}{{ text }}{% endblock %}""")
    text = template.render(text=HOSTILE, card=Card(HOSTILE, HOSTILE, HOSTILE), chart=chart)
    assert_harmless(text)
    # The title twice, and one for every text above.
    assert Document(text).text.count("<script src=") >= 14


def test_no_template_lets_a_value_pass_unescaped() -> None:
    """No filter and no block in the shipped templates switches escaping off, and a value that is missing is
    an error, not a gap.
    """
    loader = page_environment().loader
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
        source = loader.get_source(page_environment(), name)[0]
        assert not re.search(r"\|\s*safe\b|autoescape|Markup", source), name
    with pytest.raises(UndefinedError, match="steps"):
        render("demo.html.jinja", name="a", version="1")
    assert (
        page_environment().from_string("{{ '<b>' }}{{ x }}").render(x="\x1b<i>\u202e")
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
            "Next steps",
        ],
        "causal-lm": [
            "Training",
            "Before and after",
            "Examples",
            "The same answers everywhere",
            "Speed",
            "Sizes",
            "Time",
            "Next steps",
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
    assert demo_tables({}) == {}


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


LONG = {"a": [(step, 3 / (1 + step / 300)) for step in range(1, 4000)], HOSTILE: [(50, 1e-3), (60, 2e-3)]}


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 2.3), (0.0, 1e-7), (0.0, 12345.0), (-1.0, 0.0), (-3e-4, 7e-4), (0.0, 0.0)]
)
def test_the_labels_of_an_axis_fit(low: float, high: float) -> None:
    """At most eight narrow characters, 9 px each in the widest font that a page is likely to be shown in;
    the template leaves 64 px, and a dot and a sign are half as wide. Labels are at least 14 px apart.
    """
    ticks = round_steps(low, high)
    assert 1 <= len(ticks) <= 11 and low <= ticks[0] <= ticks[-1] <= high
    labels = [f"{value:.3g}" for value in ticks]
    assert max(9 * len(label) - 4 * sum(map(label.count, ".-+")) for label in labels) <= 64
    [chart] = line_charts("Loss", {"a": [(1, low), (2, high)]})
    tops = [1.6 * y for _, y in chart.ticks]
    assert all(a - b >= 14 for a, b in pairwise(tops))


def test_lines_lie_where_their_values_are() -> None:
    """x by the number of the step, y from 0 to the largest value, or by decades; a line of many steps is one
    of 200 means; what is not finite is left out; three lines share a chart.
    """
    [chart] = line_charts(
        "Loss", {"a": [(10, 4.0), (20, 1.0), (50, float("nan")), (30, 0.0)], "b": [(20, 2.0)]}
    )
    assert [line for *_, line in chart.lines] == ["0,0 50,75 100,100", "50,50"]
    assert chart.ends == (10, 30) and chart.title == "Loss of a, b"
    [chart] = line_charts("Spectra", {"a": [(1, 1.0), (2, 0.01), (3, 0.0)]}, log=True)
    assert [line for *_, line in chart.lines] == ["0,0 50,50 100,100"]
    assert [label for label, _ in chart.ticks] == ["1", "0.1", "0.01", "0.001", "0.0001"]
    [chart] = line_charts("Loss", LONG)
    assert [len(points.split()) for *_, points in chart.lines] == [200, 2]
    many = line_charts("Loss", {str(number): [(1, 1.0)] for number in range(7)} | {"none": []})
    assert [len(chart.lines) for chart in many] == [3, 3, 1]
    assert line_charts("Loss", {}) == line_charts("Loss", {"a": []}) == []


def test_columns_of_figures_are_found() -> None:
    """What people write as a figure is set flush right; names, also those that begin like one, are not."""
    figures = [
        "n/a",
        "–",
        "-0.37",
        "1,234",
        "88.3 %",
        "1.31 MB",
        "12 B",
        "< 0.1 s",
        "2 min 5 s",
        "1.2e-06",
        "1.37 times",
    ]
    assert find_figures([[figure] for figure in figures]) == {0}
    assert find_figures([["1 one"]]) == find_figures([["int8"]]) == find_figures([["50 %; x"]]) == set()


def test_shares_have_bars_and_figures_speak_to_screen_readers() -> None:
    """A bar is as long as its share, whose text stands on it; a chart says its title and its values."""
    page = demo_report(ENCODER)
    assert 'style="--share:88.3%">88.3 %</td>' in page
    packs = [{"name": "a", "training": {}, "metrics": []}]
    page = train_report(packs, LONG)
    assert_harmless(page)
    [chart] = charts(page)
    assert chart.attrib["role"] == "img"
    assert "Loss of a" in chart.attrib["aria-label"] and "a: from 2.99 to 0.209" in chart.attrib["aria-label"]


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
    assert set(re.findall(r"var\(--(\w+)\)", sheet)) <= {*LIGHT, "columns", "share", "tone"}
    assert {"svg ." + tone for tone in LIGHT if tone[0] == "c"} <= set(re.findall(r"svg \.\w+", sheet))
    assert all(
        rule in sheet for rule in ("@media print", "@media (max-width:640px)", "prefers-color-scheme:dark")
    )


@BOTH
def test_the_terminal_tables_show_the_numbers(
    result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same figures as the page, within 80 columns."""
    for title, (columns, rows) in demo_tables(result).items():
        print_table(columns, rows, title)
    shown = capsys.readouterr().out
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
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80


def test_the_terminal_is_not_repainted(capsys: pytest.CaptureFixture[str]) -> None:
    """Names with terminal escapes, bidirectional characters and rich markup are printed as what they are."""
    hostile = {"sizes": {"[red]x[/red]\x1b[31m\u202e": 5}, "accuracy": {"[bold]\x1b[1m": {"torch": 0.5}}}
    for title, (columns, rows) in demo_tables(hostile).items():
        print_table(columns, rows, title)
    shown = capsys.readouterr().out
    assert "[red]x[/red]\\u001b[31m\\u202e" in shown
    assert "[bold]\\u001b[1m" in shown
    assert not re.search("\u202e|\x1b\\[31m", shown)


PAGES = ["chart", "comparison", "inspection", "page", "training"]


@pytest.mark.parametrize(
    "name", [*(f"adapterpack.report.{page}" for page in PAGES), "adapterpack_demo.report"]
)
def test_the_examples_in_docstrings_run(name: str) -> None:
    """What the functions of the report show in their docstrings is what they give."""
    ran = doctest.testmod(importlib.import_module(name))
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
    # A point is the mean of five steps, of a scale from 0 to the largest, the first; four digits are written.
    assert points[0] == (0, 0)
    assert points[-1] == pytest.approx(
        (100, 100 * (1 - sum(1 / step for step in range(996, 1001)) / sum(1 / step for step in range(1, 6)))),
        abs=0.01,
    )
    assert all(words in Document(page).text for words in ("0.875", "after 1,000 steps", "config, r 8"))
    assert "<svg" not in train_report(packs[2:3], {})
