"""Measures the inputs of an adapter's layers and the gradients of the loss on data, for composition rules
that need these statistics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from msgspec import to_builtins
from msgspec.structs import replace

from ..composing.statistics import KINDS, Statistics, read
from ..errors import ConfigError, Unsupported
from ..hub import folder_of
from ..pack import Pack, TextProfile, as_pack
from ..pack.text_profile import KEY
from ..paths import StrPath
from ..tasks import Task
from ..tasks.conversations.form import read_form
from ..tasks.data import ONE, PROBLEMS, Labels, report_of
from ..torch_adapters import load_tokenizer
from ..torch_adapters.attached.load_for import load_for, task_for
from ..torch_adapters.calibration import measure as measure_sites
from .data import load as data

_BATCH = 8


def measure(
    base: StrPath,
    pack: Pack | StrPath,
    source: str,
    *,
    kind: str = "moment",
    out: StrPath,
    rows: int = 256,
    max_length: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Runs the base with one adapter over data, and writes statistics of every site of the adapter.

    Args:
        base: the pack's base.
        pack: a pack or its folder.
        source: a data file (json, jsonl, csv, parquet) in the form in which adapters are trained; ``moment``
            needs no labels.
        kind: ``moment`` is ``X^T X / rows`` of the inputs, for RegMean; ``fisher`` is the mean over rows of
            the squared gradient of the loss by the weight, with the labels of the data (the empirical Fisher
            information), for Fisher averaging. ``texts`` runs nothing: it writes the pack anew, with a
            profile of the tokens in the rows' texts, by which a server chooses an adapter for the model
            ``auto``. Whoever has the pack can read off it which words were frequent.
        out: the file, with a float32 matrix ``[in, in]`` or ``[out, in]`` for each site, or for ``texts`` the
            folder of the new pack; what is there already is replaced.
        rows: how many rows to use, from the first.
        max_length: the tokens to which each row is cut.
        progress: called with (rows done, rows in all).

    Returns:
        The statistics, as :func:`adapterpack.compose` takes them; of ``texts`` without matrices, and with the
        new pack's id as digest.

    Raises:
        ConfigError: the data has another form, or the kind is unknown.
        Unsupported: data of the pack's task cannot be measured.
        BaseMismatch: the pack was made for another base.

    Example:
        >>> measure("MiniLM", "packs/tickets", "tickets.jsonl", out="tickets.moments").kind  # doctest: +SKIP
        'moment'
    """
    if kind not in KINDS and kind != "texts":
        raise ConfigError(
            "unknown kind of statistics",
            where="kind",
            expected=" or ".join((*KINDS, "texts")),
            found=repr(kind),
            remedy="give one of them",
        )
    if rows < 1:
        raise ConfigError(
            "there is nothing to measure",
            where="rows",
            expected="at least 1",
            found=rows,
            remedy="give more rows",
        )
    chosen = as_pack(pack)
    folder = folder_of(base)
    task = task_for(chosen, folder)
    tokenizer = load_tokenizer(folder)
    if kind == "texts":
        found = islice(_texts(data.load_rows(source), source, task), rows)
        texts = [text for text in found if text.strip()]
        if len(texts) < 10:
            raise ConfigError(
                "there are too few texts for a profile",
                where=source,
                expected="at least 10",
                found=len(texts),
            )
        ids = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=max_length)["input_ids"]
        profile = to_builtins(TextProfile.of_texts(ids))
        manifest = replace(chosen.manifest, extensions={**chosen.manifest.extensions, KEY: profile})
        written = dataclasses.replace(chosen, manifest=manifest).write(out, replace=True)
        return Statistics(kind, chosen.id, len(texts), {}, written.id)
    labels = (
        None
        if chosen.manifest.task.labels is None
        else Labels(chosen.manifest.task.labels, PROBLEMS[chosen.manifest.problem])
    )
    encoded = _encode(source, task, tokenizer, labels, kind, rows, max_length)
    model = load_for(chosen, folder, dtype="float32", check_canary=False)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if getattr(model.config, "pad_token_id", padding) is None:
        model.config.pad_token_id = padding
    # The empirical Fisher information needs the gradient of each row, so its batches have a single row.
    collator = data.Collator(padding or 0)
    size = 1 if kind == "fisher" else _BATCH

    def batches() -> Any:
        for start in range(0, len(encoded), size):
            batch = collator(encoded[start : start + size])
            yield (
                batch if kind == "fisher" else {key: value for key, value in batch.items() if key != "labels"}
            )
            if progress is not None:
                progress(min(start + size, len(encoded)), len(encoded))

    sites = [adapter.site for adapter in chosen.adapters()]
    by_site = measure_sites(model, sites, frozenset({kind}), batches())
    Statistics(
        kind, chosen.id, len(encoded), {path: getattr(measured, kind) for path, measured in by_site.items()}
    ).write(out)
    # Read the file back, so that the caller gets exactly what later readers will get.
    return read(out)


def _encode(
    source: str, task: Task, tokenizer: Any, labels: Labels | None, kind: str, rows: int, max_length: int
) -> list[dict[str, Any]]:
    """Returns the first ``rows`` rows of the source as token ids."""
    reads = task.training
    if (
        reads is None
        or reads.targets != ("labels",)
        or reads.reads != "tokenizer"
        or (task.labelled and not labels)
    ):
        raise Unsupported(
            "packs of this task are not measured",
            where=f"task {task.name}",
            expected="text-generation, or text-classification with labels",
            remedy="use a rule that needs no data",
        )
    table = data.load_rows(source)
    table = table.select(range(min(rows, len(table))))
    if (
        labels
        and labels.problem is ONE
        and kind == "moment"
        and not set(reads.label_columns) & set(table.column_names)
    ):
        # The encoder needs labels, but the moment does not depend on them.
        table = table.add_column("label", [labels.names[0]] * len(table))
    return reads.encode(table, tokenizer, max_length, source, labels)


def _texts(table: Any, source: str, task: Task) -> Iterator[str]:
    """Yields what a request would hold of each row: what the user says, or all texts but the label."""
    if task.prompt is not None:
        form = read_form(table, report_of(source))
        for row in table:
            with form.errors(source):
                messages = form.read(row).messages
            said = [one for one in messages if one["role"] == "user"] or messages
            yield "\n".join(one["content"] for one in said if isinstance(one["content"], str))
        return
    labels = () if task.training is None else task.training.label_columns
    for row in table:
        yield "\n".join(text for name, text in row.items() if isinstance(text, str) and name not in labels)
