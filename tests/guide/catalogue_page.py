"""What can be chosen by name besides methods and rules: ``python tests/guide/catalogue_page.py >
docs/catalogue.md``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence

from adapterpack.base.codecs.registry import CODECS
from adapterpack.converting.format import formats
from adapterpack.converting.refused import REFUSED
from adapterpack.exporting.frontends.base import FRONTENDS
from adapterpack.exporting.targets.base import TARGETS
from adapterpack.quantizing.graphs.algorithm import ALGORITHMS
from adapterpack.quantizing.graphs.scheme import GRAPH_SCHEMES
from adapterpack.quantizing.pack_scheme import PACK_SCHEMES
from adapterpack.runtime.providers.provider import PROVIDERS
from adapterpack.runtime.tools.family import FAMILIES
from adapterpack.serving.api import APIS
from adapterpack.tasks.task import TASKS

INTRO = """# Tasks, formats, schemes

What can be chosen by name, generated from the registries by `make guide`. [Methods](methods.md) and [rules](rules.md) have pages of their
own. Other packages add values by entry points ([the groups](contributing.md#adding-things)).
"""


def page() -> str:
    """A table for each registry, in Markdown."""
    return "\n".join([INTRO, *(_section(*section) for section in _sections())])


def _sections() -> Iterator[tuple[str, str, Sequence[str], Iterable[Sequence[str]]]]:
    """Of each table the title, what it is for, its head, and its rows."""
    yield (
        "Tasks",
        "`--task`; by default the class of the model tells. [How each is trained](train.md#tasks).",
        ("task", "other names", "graphs", "class of transformers"),
        (
            [f"`{t.name}`", _code(t.aliases), _code(part.name for part in t.parts), f"`{t.auto_class}`"]
            for t in TASKS.values()
        ),
    )
    yield (
        "Formats of adapters",
        "`convert --to`; a file or folder is recognized by its names and first bytes. [What each can "
        "hold](formats.md).",
        ("format", "what it is", "folder or file", "read", "written"),
        (
            [f"`{f.name}`", f.summary, "folder" if f.folder else "file", "yes", "yes" if f.write else "-"]
            for f in formats().values()
        ),
    )
    yield (
        "Formats that are refused",
        "Known, and never read.",
        ("format", "why", "what to do"),
        ([f"`{r.name}`", r.why, r.remedy] for r in REFUSED),
    )
    yield (
        "Schemes for packs",
        "`quantize PACK --scheme`.",
        ("scheme", "what it does"),
        ([f"`{s.name}`", s.summary] for s in PACK_SCHEMES.values()),
    )
    yield (
        "Schemes for graphs",
        "`quantize BUNDLE --scheme`, `export --quantize`.",
        ("scheme", "what it does", "options"),
        (
            [f"`{s.name}`", f"refused: {s.refused}" if s.refused else s.summary, _code(sorted(s.takes))]
            for s in GRAPH_SCHEMES.values()
        ),
    )
    yield (
        "Algorithms of rounding",
        "`quantize BUNDLE --algorithm`.",
        ("algorithm", "what it does", "bits", "needs `--calibration`"),
        (
            [f"`{a.name}`", a.summary, ", ".join(map(str, sorted(a.bits))), "yes" if a.calibrated else "-"]
            for a in ALGORITHMS.values()
        ),
    )
    yield (
        "Quantized bases",
        "Checkpoints that `merge`, `validate --base` and `export` read; the name is `quant_method` in "
        "`config.json`.",
        ("format", "what it is"),
        ([f"`{c.name}`", c.summary] for c in CODECS.values()),
    )
    yield (
        "Frontends",
        "`export --frontend`; what makes the graph of a base. Tried in this order until one agrees with "
        "the model.",
        ("frontend",),
        ([f"`{f.name}`"] for f in sorted(FRONTENDS.values(), key=lambda each: each.rank)),
    )
    yield (
        "Targets",
        "`export --target`; who serves the bundle.",
        ("target", "what it writes", "modes"),
        ([f"`{t.name}`", t.summary, _code(sorted(t.modes))] for t in TARGETS.values()),
    )
    yield (
        "Execution providers",
        "`--provider`.",
        ("provider", "in ONNX Runtime", "comes with"),
        ([f"`{p.name}`", f"`{p.runtime_name}`", p.source] for p in PROVIDERS.values()),
    )
    yield (
        "APIs of a server",
        "A server has those that its bundle can answer.",
        ("API",),
        ([f"`{a.name}`"] for a in APIS.values()),
    )
    yield (
        "Families of tool calls",
        "Recognized by the chat template.",
        ("family", "a call begins with"),
        ([f"`{f.name}`", f"`{f.marker}`" if f.marker else "`{`"] for f in FAMILIES.values()),
    )


def _section(title: str, about: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return f"## {title}\n\n{about}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "-"


if __name__ == "__main__":
    sys.stdout.write(page())
