"""The table of families: a few types again, and that table, page and the installed transformers agree."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import numpy as np
import pytest
import transformers
from every_family import page, run, stages, table
from every_family.types import CAUSAL, every_type

GOLDEN = table.read()
SAME_VERSION = {one.version for one in GOLDEN.values()} <= {"-", transformers.__version__}
SAMPLE = (
    ("text-generation", "llama"),
    pytest.param("text-generation", "olmo3", marks=pytest.mark.long),
    ("text-generation", "qwen3_moe"),
    pytest.param("fill-mask", "bert", marks=pytest.mark.long),
    pytest.param("image-text-to-text", "aya_vision", marks=pytest.mark.long),
)


@pytest.mark.parametrize(("task", "kind"), SAMPLE)
def test_a_type_goes_as_far_as_the_table_says(
    task: str, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    found, recorded = run.measured(task, kind), GOLDEN[task, kind]
    assert found._replace(version="", group="") == recorded._replace(version="", group="")


def test_the_page_is_the_table_s() -> None:
    """`.ci/families --write` renews both."""
    assert page.PAGE.read_text("utf-8") == page.render(GOLDEN)


def test_every_causal_type_of_the_installed_transformers_has_a_line(
    record_property: Callable[..., None],
) -> None:
    """Another release than the recorded one may have others, which are told."""
    listed = {key for key in every_type() if key[0] == CAUSAL}
    known = {key for key in GOLDEN if key[0] == CAUSAL}
    more, gone = sorted(kind for _, kind in listed - known), sorted(kind for _, kind in known - listed)
    if SAME_VERSION:
        assert (more, gone) == ([], [])
    elif more or gone:
        told = f"transformers {transformers.__version__} has the new types {more}, and no longer {gone}"
        record_property("figure", told)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "the process ends with -9"),
        (lambda: np.ones(1 << 40), "MemoryError"),
        (lambda: time.sleep(600), "stands still for"),
        (lambda: sum(iter(int, 1)), "not at an end after"),
    ],
    ids=["crash", "memory", "wait", "time"],
)
def test_a_process_that_breaks_is_an_outcome(
    what: Callable[[], object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And keeps no other type from its turn."""
    monkeypatch.setattr(stages, "STAGES", (stages.Stage("build", lambda case: what(), level=1),))
    monkeypatch.setattr(run, "SECONDS", 1)
    child, found = run._Running("fill-mask", "bert", ()), None
    while found is None:
        time.sleep(0.01)
        found = child.outcome()
        if child.reached[0] == "build" and "still" in said:
            monkeypatch.setattr(run, "PATIENCE", 0)
    assert found.level == 0
    assert found.reason.startswith(f"build: {said}")


def test_reasons_are_the_same_in_every_run() -> None:
    """Places and sizes of errors are left out."""
    said = table.shortened("a row in /tmp/x9/base: off by 0.0123, of 4.5e-3", table.Path("/tmp/x9"))
    assert said == "a row in base: another number"
