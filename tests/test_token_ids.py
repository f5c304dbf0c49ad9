"""Bundles without a tokenizer: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from adapterpack import Session, export, run
from adapterpack.errors import StorageError
from adapterpack.runtime.engine.engine import Engine

PROMPTS = [[5, 6, 7, 30, 31], [8, 9]]


@pytest.fixture(scope="module")
def base(base_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wordless") / "base"
    LlamaForCausalLM.from_pretrained(base_of("llama")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundles(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One with the engine's graph, and one without."""
    made = {
        "engine": tmp_path_factory.mktemp("wordless") / "engine",
        "ordinary graph": tmp_path_factory.mktemp("wordless") / "ordinary",
    }
    for name, folder in made.items():
        export(base, [], folder, mode="folded", in_place=name == "engine")
        assert not (folder / "tokenizer.json").exists()
    return made


GRAPHS = pytest.mark.parametrize("graph", ["engine", "ordinary graph"])


def _transformers(base: Path, prompt: list[int]) -> list[int]:
    model: Any = LlamaForCausalLM.from_pretrained(base)
    made = model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False)
    ids: list[int] = made[0, len(prompt) :].tolist()
    end = model.generation_config.eos_token_id
    return ids[: ids.index(end)] if end in ids else ids


@GRAPHS
def test_token_ids_are_answered_with_those_of_transformers(
    graph: str, base: Path, bundles: dict[str, Path]
) -> None:
    answers = Session(bundles[graph], "cpu").generate(PROMPTS, max_new_tokens=9)
    assert [list(answer.ids) for answer in answers] == [_transformers(base, prompt) for prompt in PROMPTS]
    assert {answer.text for answer in answers} == {""}


def test_an_engine_answers_them_in_turn_and_searches_with_beams(base: Path, bundles: dict[str, Path]) -> None:
    engine = Engine(bundles["engine"], "cpu")
    numbers = [engine.add(prompt, max_new_tokens=9) for prompt in PROMPTS]
    events = []
    while engine.busy:
        events += engine.step()
    for number, prompt in zip(numbers, PROMPTS, strict=True):
        expected = _transformers(base, prompt)
        tokens = [event.token for event in events if event.request == number and event.token is not None]
        assert tokens[: len(expected)] == expected
    (beams,) = Session(bundles["engine"], "cpu").generate(
        PROMPTS[:1], max_new_tokens=5, num_beams=2, ignore_eos=True
    )
    made: Any = LlamaForCausalLM.from_pretrained(base).generate(
        torch.tensor(PROMPTS[:1]), max_new_tokens=5, num_beams=2, do_sample=False, eos_token_id=None
    )
    assert list(beams.ids) == made[0, len(PROMPTS[0]) :].tolist()


@GRAPHS
@pytest.mark.parametrize(
    ("prompts", "options"), [(["a text"], {}), (PROMPTS, {"stop": ["x"]}), (PROMPTS, {"regex": "a+"})]
)
def test_what_needs_a_text_is_refused_by_name(
    graph: str, prompts: Any, options: dict[str, Any], bundles: dict[str, Path]
) -> None:
    with pytest.raises(StorageError, match="the bundle has no tokenizer"):
        Session(bundles[graph], "cpu").generate(prompts, **options)


def test_an_answer_that_is_shown_as_text_needs_a_tokenizer(bundles: dict[str, Path]) -> None:
    """Rows of a file, whose answers would be empty."""
    with pytest.raises(StorageError, match="the bundle has no tokenizer"):
        list(run(bundles["ordinary graph"], [{"prompt": PROMPTS[0]}]))
