"""The page that ``adapterpack demo`` writes: the story of one run, in order, for a reader who has never seen the tool."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from itertools import chain

from ..io.readable import MISSING, count, number, percent, seconds, size, small
from . import result as r
from .html import Code, Figure, Heading, KeyFigures, Paragraph, Record, Section, Table, page
from .key_figures import key_figures
from .result import Result
from .svg import Bar, Group, Reference, grouped_bars, size_bars, time_bars

_SHARES = ((0.0, "0 %"), (0.25, "25 %"), (0.5, "50 %"), (0.75, "75 %"), (1.0, "100 %"))


def demo_report(result: Result) -> str:
    """The result of a demo run, of either variant, as one self-contained HTML page; parts that the result lacks are left out.

    Example:
        >>> "88.0 %" in demo_report({"accuracy": {"tickets": {"chance": 0.167, "torch": 0.88}}})
        True
    """
    name = r.part(result, "model").get("name")
    version = result.get("version")
    return page(
        f"adapterpack demo: adapters for {name}" if name else "adapterpack demo",
        list(chain.from_iterable(build(result) for build in STORY)),
        (f"adapterpack {version}. " if version else "") + "Every number on this page was measured in this run.",
    )


def _opening(result: Result) -> list[Section]:
    names = r.adapters(result)
    what = f"{len(names)} adapters ({', '.join(names)})" if len(names) > 1 else f"an adapter ({names[0]})" if names else "adapters"
    *steps, last = [f"trained {what} for {_model(result)}", *(done for key, done in _DONE.items() if result.get(key) not in (None, {}, []))]
    return [
        Paragraph(f"This run {', '.join(steps)}{',' if len(steps) > 1 else ''} and {last}." if steps else f"This run {last}."),
        Paragraph("An adapter is a small set of extra weights that changes what a model does and leaves the model itself as it was. "
                  "A pack is one adapter on disk; a bundle is one ONNX graph that holds the model and its adapters."),
    ]  # fmt: skip


def _model(result: Result) -> str:
    model = r.part(result, "model")
    parameters, taken = number(model.get("parameters")), number(model.get("bytes"))
    facts = [f"{count(parameters)} parameters" if parameters else "", size(taken) if taken else "",
             f"from {model['source']}" if model.get("source") else ""]
    known = ", ".join(filter(None, facts))
    return str(model.get("name") or "a pretrained model") + (f" ({known})" if known else "")


_DONE = {
    "compose": "composed two packs into one",
    "parity": "exported model and adapters to ONNX and compared every form with PyTorch",
    "mixed_batch_equal": "ran one batch whose rows use different adapters",
    "speed": "measured the speed",
}
"""Key of the result -> what the run then did, in the order of the sentence."""


def _key_figures(result: Result) -> list[Section]:
    cards = key_figures(result)
    return [KeyFigures(cards)] if cards else []


def _training(result: Result) -> list[Section]:
    columns, rows = r.training(result)
    return [Heading("Training"), Paragraph("Only the weights of the adapters are trained; the model is frozen."),
            Table(columns, rows, range(1, len(columns)))] if rows else []


def _accuracy(result: Result) -> list[Section]:
    tasks = r.accuracy(result)
    if not tasks:
        return []
    groups = [Group(name, [Bar(r.spoken(form), value, percent(value), r.tone(form)) for form, value in values.items() if form != "chance"],
                    Reference(f"chance {percent(values['chance'])}", values["chance"]) if "chance" in values else None)
              for name, values in tasks.items()]
    drops = [(values["torch"] - value, form, name) for name, values in tasks.items() if "torch" in values
             for form, value in values.items() if form.startswith(("onnx", "merged"))]
    lost = ""
    if drops:
        drop, form, name = max(drops)
        lost = (f" The largest loss on the way was {100 * drop:.1f} points ({r.spoken(form)}, {name})." if drop > 0.0005
                else " Nothing was lost on the way from PyTorch to any other form.")
    return [
        Heading("Accuracy"),
        Paragraph(f"The share of test rows, none of them seen in training, that get the right label.{lost}"),
        Figure(grouped_bars("Accuracy of every form of every adapter", groups, maximum=1.0, ticks=_SHARES),
               "The dashed line is what guessing would reach. Merged: the adapter folded into the weights. "
               "int8 and int4: the weights of the graph in 8 and 4 bits."),
    ]  # fmt: skip


def _quality(result: Result) -> list[Section]:
    groups = []
    for key, label in r.ANSWERS.items():
        values = r.part(result, key)
        bars = [Bar(name, number(values.get(when)), percent(values.get(when)), shade)
                for when, name, shade in (("before", "without adapter", "c0"), ("after", "with adapter", "c1")) if when in values]
        groups += [Group(label, bars)] if bars else []
    if not groups:
        return []
    tested = number(r.part(result, "exact_match").get("n"))
    prompts = f"{tested:.0f} prompts" if tested else "prompts"
    return [
        Heading("Before and after"),
        Paragraph(f"Measured on {prompts} that were not seen in training. Exact match: the answer is the expected one. "
                  "Valid JSON: it can be parsed."),
        Figure(grouped_bars("Answers without and with the adapter", groups, maximum=1.0, ticks=_SHARES)),
    ]


def _examples(result: Result) -> list[Section]:
    names = {"prompt": "prompt", "expected": "expected", "base": "without adapter", "adapter": "with adapter"}
    records: list[Section] = [Record([(label, str(example[key])) for key, label in names.items() if example.get(key) is not None])
                              for example in r.listed(result, "examples")]
    if not records:
        return []
    return [Heading("Examples"), Paragraph("The same prompts, answered by the model without and with the adapter."), *records]


def _composition(result: Result) -> list[Section]:
    values = r.part(result, "compose")
    bars = [Bar(r.spoken(key), value, percent(value), r.tone(key)) for key, value in r.measured(values).items() if key in r.FORMS]
    if not bars:
        return []
    rank = number(values.get("rank"))
    average = f" The average, of rank {rank:.0f}," if rank is not None else " The average"
    how = {True: f"{average} is exact: nothing of it was cut off.", False: f"{average} is an approximation: a part of it was cut off."}
    exact = values.get("exact")
    return [
        Heading("Composition"),
        Paragraph("Two adapters were trained, each on one half of the rows, and averaged into one pack without any more training."
                  + (how[exact] if isinstance(exact, bool) else "")),
        Figure(grouped_bars("Accuracy of composed adapters", [Group("", bars)], maximum=1.0, ticks=_SHARES)),
    ]  # fmt: skip


def _parity(result: Result) -> list[Section]:
    columns, rows = r.parity(result)
    if not rows:
        return []
    meaning = {"max abs": "max abs: the largest difference between any two raw scores (logits)",
               "label agreement": "label agreement: the share of test rows that get the same label from both",
               "token agreement": "token agreement: the share of generated tokens that are the same in both"}
    same, compared = number(result.get("token_agreement")), number(result.get("tokens_compared"))
    tokens = f" Of {f'{compared:,.0f}' if compared else 'all'} generated tokens, {percent(same)} are the same." if same is not None else ""
    return [
        Heading("The same answers everywhere"),
        Paragraph(f"Every form of an adapter is compared with the trained model in PyTorch on the same inputs.{tokens}"),
        Table(columns, rows, range(1, len(columns)), "; ".join(meaning[column] for column in columns[1:]).capitalize() + "."),
    ]  # fmt: skip


def _mixed(result: Result) -> list[Section]:
    columns, rows = r.mixed(result)
    equal = result.get("mixed_batch_equal")
    if not rows and not isinstance(equal, bool):
        return []
    difference = number(r.part(result, "mixed_batch").get("max_abs"))
    by = f" (largest difference {small(difference)})" if difference is not None else ""
    verdict = {True: f"Each row gets the answer that it gets when its adapter runs alone{by}.",
               False: f"The rows differ from what they get when their adapter runs alone{by}."}
    text = "One batch, one model in memory, a different adapter for every row. " + (verdict[equal] if isinstance(equal, bool) else "")
    numbers = [index for index, column in enumerate(columns) if column == "score"]
    unlabelled = "label" in columns and any(MISSING in row for row in rows)
    note = f"{MISSING}: the model alone has no trained head for this task." if unlabelled else ""
    return [Heading("A mixed batch"), Paragraph(text.strip()), *([Table(columns, rows, numbers, note)] if rows else [])]


def _speed(result: Result) -> list[Section]:
    speeds = {key: number(r.part(result, "speed", key).get("tokens_per_second")) for key in ("onnx", "torch")}
    entries = {key: speed for key, speed in speeds.items() if speed is not None}
    if not entries:
        return []
    batch = number(r.part(result, "speed", "onnx").get("batch"))
    ratio = number(r.part(result, "speed").get("ratio"))
    text = "Tokens generated per second" + (f", {batch:.0f} prompts at a time" if batch else "")
    text += f". ONNX Runtime generates {ratio:.2f} times as many as PyTorch." if ratio else "."
    bars = [Bar(r.spoken(key), value, f"{value:.1f}", r.tone(key)) for key, value in entries.items()]
    return [Heading("Speed"), Paragraph(text), Figure(grouped_bars("Tokens per second", [Group("", bars)], maximum=max(entries.values())))]


def _sizes(result: Result) -> list[Section]:
    sizes = r.measured(r.part(result, "sizes"))
    if not sizes:
        return []
    kinds = {"pack": "c1", "bundle": "c2", "merged": "c3"}
    tones = [kinds.get(name.partition(" ")[0], "c0") for name in sizes]
    chart = size_bars("Size on disk", list(sizes.items()), tones=tones)
    scale = "Logarithmic scale: each grid line is ten times the one before." if "(logarithmic scale)" in chart else ""
    return [
        Heading("Sizes"),
        Paragraph("What each artifact takes on disk. The model is stored once; every further adapter costs one pack."),
        Figure(chart, scale),
    ]


def _times(result: Result) -> list[Section]:
    times = r.measured(r.part(result, "timings"))
    total = seconds(sum(times.values()))
    return [Heading("Time"), Paragraph(f"The whole run took {total}. Each bar starts where the one above it ends."),
            Figure(time_bars("Time of each stage", [(name.replace("_", " "), value) for name, value in times.items()]))] if times else []


def _next(result: Result) -> list[Section]:
    """The commands that come next; ``paths`` of the result says where things lie, else the usual places under ``output``."""
    output, names = result.get("output"), r.adapters(result)
    if not output or not names:
        return []
    paths = r.part(result, "paths")
    pack, bundle = paths.get("pack", f"{output}/packs/{names[0]}"), paths.get("bundle", f"{output}/bundle")
    rows = [*r.listed(r.part(result, "mixed_batch"), "rows"), *r.listed(result, "examples")]
    prompts = [text for row in rows for key in ("text", "prompt") if isinstance(text := row.get(key), str) and text.isprintable()]
    prompt = next((text for text in prompts if len(text) <= 100), "Where is my parcel?")
    line: Callable[..., str] = lambda *words: "adapterpack " + " ".join(shlex.quote(str(word)) for word in words)  # noqa: E731
    return [
        Heading("How to go on"),
        Paragraph("Check a pack, see what is in the bundle, and run it on a text of your own:"),
        Code("\n".join([line("validate", pack), line("inspect", bundle), line("run", bundle, "--adapter", names[0], "--prompt", prompt)])),
    ]


STORY: tuple[Callable[[Result], list[Section]], ...] = (
    _opening, _key_figures, _training, _quality, _accuracy, _examples, _composition, _parity, _mixed, _speed, _sizes, _times, _next,
)  # fmt: skip
"""The parts of the page, in reading order; a part whose figures are missing is empty."""
