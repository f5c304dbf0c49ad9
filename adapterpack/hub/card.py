"""Renders the model card of a pack or a bundle from its manifest and its validation report only.

Names from untrusted manifests stay text: the template environment escapes every value for Markdown.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from markupsafe import Markup

from ..errors import printable
from ..io import Json
from ..manifest import manifest as m
from ..manifest import settings_of
from ..pack import Pack
from ..pack.validate.checks import Report
from ..peft.readers import MAX_RANKS, largest_rank, readers
from ..resources import templates
from ..tasks import NO_TASK, TASKS, Task
from .transport import names

if TYPE_CHECKING:
    from jinja2 import Environment

_ROWS = 8
_EIGHTHS = " ▁▂▃▄▅▆▇█"
MARK = "<!-- written by adapterpack push from the manifest; remove this line to keep a text of your own -->"
"""A push replaces a card with this line; any other card is the owner's and stays."""
_SIGNS = re.compile(r"([\\`*_\[\]<>|#~&$])")
"""Characters that can be Markdown anywhere in a line."""
_START = re.compile(r"^(\d+(?=[.)])|(?=[-+=]))")
"""The place for a backslash at the start of a line that Markdown could read as a list item, a rule or an
underlined heading.
"""


def pack_card(pack: Pack, at: names.HubReference, report: Report) -> str:
    """Renders the README of a pack that is pushed to ``at``, with the results of its ``report``."""
    manifest = pack.manifest
    base = str(pack.manifest.base.name)
    loads = readers(pack)
    task = TASKS.find(manifest.task.type) if manifest.task.type != NO_TASK else None
    header = {
        **_license(manifest),
        "base_model": base,
        "base_model_relation": "adapter",
        "tags": ["adapterpack", manifest.method.type],
        "library_name": "adapterpack" if loads["PEFT"] else "peft",
        "pipeline_tag": None if manifest.task.type == NO_TASK else manifest.task.type,
        "model-index": _model_index(manifest),
    }
    facts = {
        "pack": pack.id,
        "task": manifest.task.type,
        "labels": ", ".join(manifest.task.labels or ()),
        "sites": len(manifest.adapter_groups),
        "parameters": f"{sum(value.size for value in pack.tensors.values()):,}",
        "base content": manifest.base.content or "not known",
        "canary": "carried" if manifest.canary else "none",
    }
    return _render(
        "pack.md.jinja",
        header,
        at,
        report,
        name=manifest.pack.name,
        description=manifest.pack.description,
        base=base,
        revision=manifest.base.commit,
        auto_class=task.auto_class if task else "AutoModel",
        labels=_labels(pack, task),
        method=manifest.method.type,
        loads=loads,
        facts=facts,
        metrics=manifest.metrics,
        given=_given(task),
        max_rank=next((rank for rank in MAX_RANKS if rank >= largest_rank(pack)), 0),
        training={**manifest.config, **settings_of(manifest.training)},
        losses=draw_losses(points) if (points := manifest.training.get("losses")) else "",
    )


def bundle_card(bundle: Any, at: names.HubReference, base: str, license_name: str, report: Report) -> str:
    """Renders the README of a bundle that is pushed to ``at``."""
    header = {
        "base_model": base,
        "base_model_relation": "quantized" if bundle.quantization else "adapter",
        "library_name": "adapterpack",
        "license": license_name,
        "pipeline_tag": bundle.task,
        "tags": ["adapterpack", "onnx", "onnxruntime"],
    }
    adapters = [
        {"adapter": one.name, "slot": one.slot, "labels": ", ".join(one.labels or ()), "pack": one.pack}
        for one in bundle.adapters
    ]
    return _render(
        "bundle.md.jinja",
        header,
        at,
        report,
        name=at.name,
        base=base,
        mode=bundle.mode,
        adapters=adapters,
        given=_given(TASKS.find(bundle.task)),
    )


def _given(task: Task | None) -> str:
    """Returns what ``adapterpack run`` is given to try a model of the task."""
    if task is None or "input_ids" in task.inputs:
        return '--prompt "..."'
    return "--image picture.png" if "pixel_values" in task.inputs else "--audio recording.wav"


def _license(manifest: m.Manifest) -> Json:
    if manifest.license_link:
        return {
            "license": "other",
            "license_name": _one_line(manifest.license),
            "license_link": _one_line(manifest.license_link),
        }
    return {"license": _one_line(manifest.license).lower()}


def _labels(pack: Pack, task: Task | None) -> int:
    """Returns how many labels the pack's own head has; 0 without a head."""
    if task is None or not task.labelled:
        return 0
    heads = [
        params["weight"] for params in pack.full().values() if params.get("weight", np.empty(0)).ndim == 2
    ]
    return len(pack.manifest.task.labels or ()) or (len(heads[-1]) if heads else 0)


def _model_index(manifest: m.Manifest) -> list[Json] | None:
    if not manifest.metrics:
        return None
    results = [
        {
            "task": {"type": manifest.task.type},
            "dataset": {
                "name": _one_line(metric.get("dataset") or "not named"),
                "type": _one_line(metric.get("dataset") or "unknown"),
            },
            "metrics": [{"type": _one_line(metric.get("name")), "value": metric.get("value")}],
        }
        for metric in manifest.metrics
    ]
    return [{"name": manifest.pack.name, "results": results}]


def _render(
    template: str, header: Mapping[str, Any], at: names.HubReference, report: Report, **values: Any
) -> str:
    fields = {key: value for key, value in header.items() if value not in (None, [], "")}
    # Only the topic of what was not checked: its words may name a place on a disk.
    topics = dict.fromkeys(text.partition(":")[0] for text in report.not_checked)
    return (
        _environment()
        .get_template(template)
        .render(
            header=Markup(yaml.safe_dump(_header(fields), sort_keys=True, allow_unicode=True, width=120)),
            mark=Markup(MARK),
            at=at,
            state=report.state if report.valid else "not valid",
            open=", ".join(topics),
            warnings="; ".join(f"{finding.rule}: {finding.message}" for finding in report.findings),
            **values,
        )
    )


@cache
def _environment() -> Environment:
    made = templates(__package__, _text)
    made.filters.update(line=_line, word=_word, quoted=_quote, sentence=_sentence, columns=_columns)
    return made


def _text(value: object) -> Markup:
    """Escapes a value for Markdown, so that it appears literally: no markup, no HTML, no line breaks.

    A hub may still turn an address in plain text into a link; such a link shows where it leads.

    Example:
        >>> print(_text("# a\\n[link](x)"), _text({"lr": 0.001}), _text(-0.5))
        \\# a \\[link\\](x) lr: 0.001 -0.5
    """
    if isinstance(value, Markup):
        return value
    if isinstance(value, int | float):
        return Markup(f"{value:.6g}" if isinstance(value, float) else str(value))
    if isinstance(value, Mapping):
        value = ", ".join(f"{key}: {item}" for key, item in value.items())
    elif isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return Markup(_START.sub(r"\1\\", _SIGNS.sub(r"\\\1", _one_line(value))))


def _line(value: object) -> Markup:
    """Returns a value for a line in a code block, where only a line break could do harm."""
    return Markup(_one_line(value))


def _word(value: object) -> Markup:
    """Quotes a value for the shell, so that a command copied from the card runs nothing else."""
    return Markup(shlex.quote(_one_line(value)))


def _quote(value: object) -> Markup:
    """Quotes a value as a Python string, so that code copied from the card does what it shows."""
    return Markup(json.dumps(_one_line(value)))


def _sentence(value: str) -> str:
    """Capitalizes the first letter of a value."""
    return value[:1].upper() + value[1:]


def _header(value: Any) -> Any:
    """Puts every text in a value of the YAML header on one line."""
    if isinstance(value, Mapping):
        return {_header(key): _header(item) for key, item in value.items()}
    return (
        [_header(item) for item in value]
        if isinstance(value, list | tuple)
        else _one_line(value)
        if isinstance(value, str)
        else value
    )


def _one_line(value: object) -> str:
    return printable(" ".join(str(value).split()))


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the distinct keys of all rows, in order."""
    return list(dict.fromkeys(name for row in rows for name in row))


def draw_losses(points: Sequence[Mapping[str, float]]) -> str:
    """Draws a loss curve as text: columns of block characters over the steps, scaled from the least loss or 0
    to the largest.

    Example:
        >>> print(draw_losses([{"step": 10, "loss": 2.0}, {"step": 20, "loss": 0.5}]).splitlines()[-2])
        0        ██
    """
    losses = [point["loss"] for point in points]
    low = min([0.0, *losses])
    high = max([0.0, *losses])
    heights = [round(8 * _ROWS * (loss - low) / ((high - low) or 1.0)) for loss in losses]
    labels = {0: f"{high:.3g}", _ROWS - 1: f"{low:.3g}"}
    rows = [
        f"{labels.get(row, ''):8} "
        + "".join(_EIGHTHS[min(max(height - 8 * (_ROWS - 1 - row), 0), 8)] for height in heights)
        for row in range(_ROWS)
    ]
    ends = ", ".join(f"step {point['step']:.0f}: {point['loss']:.3g}" for point in (points[0], points[-1]))
    return "\n".join([*(row.rstrip() for row in rows), f"{'':8} {ends}"])
