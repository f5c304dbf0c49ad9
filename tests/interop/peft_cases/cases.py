"""PEFT's test cases: the rows of its tables, and the configurations that stand inside its tests."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import peft
from torch import nn

from .models import Model, Plain, fallbacks, pretrained
from .reading import Call, NotData, Source, shown
from .release import tests_folder

HALF = "bfloat16"
"""Says of a case that the tensors of its file are of that type."""


@dataclass(frozen=True)
class Case:
    """One case: where it stands, the configuration, and the models to try it on, of which the first counts
    that PEFT can put it on; ``second`` is another adapter's, which is active beside it.
    """

    name: str
    config: Call
    models: Callable[[], list[Model]]
    dtype: str | None = None
    second: Call | None = None


class Table(NamedTuple):
    """A table of PEFT's tests: its file and name, the list of models that each row is tried on (None: the row
    names its own), and the task of the models.
    """

    file: str
    rows: str
    models: str | None = None
    task: str | None = None


TABLES = (
    Table("custom_models", "TEST_CASES"),
    Table("decoder_models", "ALL_CONFIGS", "PEFT_DECODER_MODELS_TO_TEST", "CAUSAL_LM"),
    Table("encoder_decoder_models", "ALL_CONFIGS", "PEFT_ENCODER_DECODER_MODELS_TO_TEST", "SEQ_2_SEQ_LM"),
    Table(
        "feature_extraction_models",
        "ALL_CONFIGS",
        "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST",
        "FEATURE_EXTRACTION",
    ),
    Table("seq_classifier", "ALL_CONFIGS", "PEFT_SEQ_CLS_MODELS_TO_TEST", "SEQ_CLS"),
    Table("token_classification_qa", "TOKEN_CLS_CONFIGS", "PEFT_TOKEN_CLS_MODELS_TO_TEST", "TOKEN_CLS"),
    Table("token_classification_qa", "QA_CONFIGS", "PEFT_QA_MODELS_TO_TEST", "QUESTION_ANS"),
    Table("target_parameters", "ALL_CONFIGS", None, "CAUSAL_LM"),
    Table("vision_models", "CONFIGS", "model_id"),
    Table("stablediffusion", "DIFFUSERS_CONFIGS"),
    Table("lora_variants", "TEST_CASES"),
    Table("quantization", "TEST_CASES", "model_id", "CAUSAL_LM"),
)
PAIRS = (
    Table("custom_models", "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES"),
    Table("custom_models", "MIXED_ADAPTER_TEST_CASES"),
)
"""Tables of two adapters that are active together."""
_RESNET, _SMALL = "tiny-random-ResNet", "opt-125m"
_FIXED = {"vision_models": [_RESNET], "quantization": [_SMALL]}
"""Models of tables whose tests name them otherwise than by a list."""


@cache
def all_cases() -> tuple[Case, ...]:
    """Every case of the installed PEFT's tests, in the order of the tables; the same in every process."""
    folder = tests_folder()
    sources = {path.stem.removeprefix("test_"): Source(path) for path in sorted(folder.glob("test_*.py"))}
    tabled = [
        case for table in TABLES if table.file in sources for case in _of_table(sources[table.file], table)
    ]
    pairs = [case for table in PAIRS if table.file in sources for case in _pairs(sources[table.file], table)]
    decoders = [
        case
        for case in tabled
        if case.name.startswith("decoder_models:") and case.name.endswith("on llama CAUSAL_LM")
    ]
    halves = [replace(case, name=f"{case.name} in {HALF}", dtype=HALF) for case in decoders]
    inside = [case for source in sources.values() for case in _inside(source)]
    return tuple(_unique([*tabled, *pairs, *_once(inside, tabled), *halves]))


def _of_table(source: Source, table: Table) -> Iterator[Case]:
    rows = source.constant(table.rows)
    hub = _FIXED.get(table.file) or (source.constant(table.models) if table.models else [])
    for row in rows.items() if isinstance(rows, dict) else rows:
        label, named, config = _row(row)
        for model in [named] if named is not None else hub or [label]:
            candidates = _chosen(source, model, table.task)
            where = f" on {candidates[0].name}" if len(candidates) == 1 else ""
            yield Case(f"{source.name}: {label or config}{where}", config, partial(list, candidates))


def _pairs(source: Source, table: Table) -> Iterator[Case]:
    models = _chosen(source, "MLP", None) + _chosen(source, "EmbConv1D", None)
    for row in source.constant(table.rows):
        configs = [part for part in row if isinstance(part, Call)]
        if not configs:
            kind = next(part for part in row if isinstance(part, type))
            configs = [Call(kind, (), part) for part in row if isinstance(part, dict)]
        first, second = configs
        yield Case(f"{source.name}: {row[0]}, both active", first, partial(list, models), second=second)


def _row(row: Any) -> tuple[str | None, str | None, Call]:
    """A row's label, its model if it names one, and its configuration."""
    texts = [part for part in row if isinstance(part, str)]
    config = next((part for part in row if isinstance(part, Call)), None)
    kind = next((part for part in row if isinstance(part, type) and issubclass(part, peft.PeftConfig)), None)
    if config is None:
        assert kind is not None, f"a row without a configuration: {row}"
        keywords = next(part for part in row if isinstance(part, dict))
        keywords = keywords.get("text_encoder", keywords)
        config = Call(kind, (), keywords)
    if len(texts) == 1 and "/" in texts[0]:
        return None, texts[0], config
    return (texts[0] if texts else None), (texts[1] if len(texts) > 1 else None), config


def _chosen(source: Source, name: str | None, task: str | None) -> list[Model]:
    classes = {kind.__name__: kind for place, kind in reversed(source.modules) if not place}
    wanted = source.aliases.get(name or "", name or "")
    if wanted in classes:
        return [Plain(source.name, classes[wanted])]
    if source.name == "stablediffusion":
        return [found for found in [pretrained("tiny-sd-pipe", None)] if found]
    if name and (found := pretrained(name, task)):
        return [found]
    return [Plain(source.name, kind) for kind in classes.values()]


def _inside(source: Source) -> Iterator[Case]:
    """Put on a model of the test's own function, else on one of its file, else on a tiny one."""
    named = list(dict.fromkeys(text for text in _texts(source) if "/" in text))
    for place, config in source.calls():
        yield Case(
            f"{source.name}: {place.split('.')[-1]} {config}",
            config,
            partial(_candidates, source, place, named, _task(config)),
        )


def _task(config: Call) -> str | None:
    task = config.keywords.get("task_type")
    return None if task is None else shown(task)


def _candidates(source: Source, place: str, named: list[str], task: str | None) -> list[Model]:
    near = sorted(source.modules, key=lambda found: -_common(found[0], place))
    kinds: list[type[nn.Module]] = [
        kind for where, kind in near if not where or place.startswith(where.split(".")[0])
    ]
    plain: list[Model] = [Plain(source.name, kind) for kind in kinds[:12]]
    hub = {model.name: model for name in named if (model := pretrained(name, task or "CAUSAL_LM"))}
    tiny = [*hub.values(), *fallbacks(task)]
    return [*tiny, *plain] if task else [*plain, *tiny]


def _common(one: str, other: str) -> int:
    count = 0
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        count += 1
    return count


def _texts(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and len(node.value) < 80
            and " " not in node.value
        ):
            yield node.value


def _once(inside: list[Case], tabled: list[Case]) -> Iterator[Case]:
    """Those that differ from all before them: the same configuration stands in many tests of a file."""
    seen = {(case.name.split(":")[0], str(case.config)) for case in tabled}
    for case in inside:
        file, said = case.name.split(":")[0], str(case.config)
        if (file, said) not in seen and (file, key := f"{said} {_task(case.config)}") not in seen:
            seen.add((file, key))
            yield case


def _unique(cases: list[Case]) -> Iterator[Case]:
    counts: Counter[str] = Counter()
    for case in cases:
        counts[case.name] += 1
        yield case if counts[case.name] == 1 else replace(case, name=f"{case.name} ({counts[case.name]})")


def unread_tables(folder: Path | None = None) -> list[str]:
    """The tables with configurations, in PEFT's tests, that are not in ``TABLES``: a new release may have
    brought them.
    """
    known = {(table.file, table.rows) for table in TABLES + PAIRS}
    found = []
    for path in sorted((folder or tests_folder()).glob("test_*.py")):
        source = Source(path)
        for name in source.assigned:
            try:
                value = source.constant(name)
            except NotData:
                continue
            if (source.name, name) not in known and isinstance(value, list) and _holds_configs(value):
                found.append(f"{source.name}.{name}")
    return found


def _holds_configs(rows: list[Any]) -> bool:
    return any(
        isinstance(part, Call) or (isinstance(part, type) and issubclass(part, peft.PeftConfig))
        for row in rows
        if isinstance(row, tuple)
        for part in row
    )
