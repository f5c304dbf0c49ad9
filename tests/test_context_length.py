"""Rows longer than a model has positions for: refused before anything runs, or ended at the last position,
each row for itself.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architecture_proofs import make_base
from architectures import ARCHITECTURES
from families import FAMILIES, WORDS

from adapterpack import Session, export
from adapterpack.errors import ConfigError
from adapterpack.runtime.padding import pad
from adapterpack.runtime.text.model_files import context_length
from adapterpack.tasks.data.rows import RowError

Make = Callable[..., Any]
CONTEXT = 64
"""Of the tiny models."""


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2", "opt", "bart", "whisper", "clip"])
def test_the_limit_is_that_of_the_table(name: str) -> None:
    """By the configuration alone: torch takes a row of as many tokens, and none with one more."""
    family = FAMILIES[name]
    model = family.build()
    most = context_length(model.config.to_dict())
    assert most is not None
    ids, given = "decoder_input_ids" if name in ("bart", "whisper") else "input_ids", family.inputs()
    for length in (most, most + 1):
        row = torch.arange(length)[None] % (WORDS - 5) + 3
        inputs = {**{key: value[:1] for key, value in given.items()}, ids: row}
        if length == most:
            model(**inputs)
        else:
            with pytest.raises((IndexError, RuntimeError, ValueError)):
                model(**inputs)


@pytest.mark.parametrize(
    ("config", "most"),
    [
        ({"max_position_embeddings": 32}, 32),
        ({"n_positions": 1024}, 1024),
        ({"max_seq_len": 2048}, 2048),
        ({}, None),
        ({"n_positions": 512, "relative_attention_num_buckets": 32}, None),  # T5
        # DeBERTa v3
        ({"max_position_embeddings": 512, "relative_attention": True, "position_biased_input": False}, None),
        ({"max_position_embeddings": 514, "model_type": "xlm-roberta", "pad_token_id": 1}, 512),
        ({"text_config": {"max_position_embeddings": 77}, "vision_config": {}}, 77),
        ({"max_position_embeddings": None}, None),
    ],
)
def test_what_configurations_say(config: dict[str, Any], most: int | None) -> None:
    assert context_length(config) == most


@pytest.mark.parametrize("mode", ["bank", "inputs"])
def test_each_row_ends_at_its_last_position(mode: str, bundle_of: Make) -> None:
    """Rows that reach the end of the context end there; their neighbours go on, and say what they say
    alone.
    """
    session, rng = Session(bundle_of("llama", mode), "cpu"), np.random.default_rng(3)
    prompts = [rng.integers(3, 96, length).tolist() for length in (60, 5, 64, 62, 9)]
    names = ["alpha", None, "beta", None, "beta"]
    for options in ({}, {"temperature": 1.0, "seed": 4}):
        found = session.generate(prompts, names, max_new_tokens=20, **options)
        for prompt, answer in zip(prompts, found, strict=True):
            room = min(20, CONTEXT - len(prompt) + 1)
            assert len(answer.ids) == room or answer.finish_reason == "stop"
            assert answer.finish_reason == ("length" if len(answer.ids) == room else "stop")
        assert {len(found[row].ids) for row in (0, 2, 3)} <= {5, 1, 3}
    assert session.generate(prompts, names, max_new_tokens=20) == [
        session.generate([prompt], [name], max_new_tokens=20)[0]
        for prompt, name in zip(prompts, names, strict=True)
    ]


@pytest.mark.long
def test_learned_positions_on_both_graphs(tiny_llama: Path, tmp_path: Path) -> None:
    """A table of positions, in the ordinary graph and in that for steps in place: a row at its end does not
    end the others.
    """
    (gpt2,) = (one for one in ARCHITECTURES if one.name == "gpt2")
    base = make_base(gpt2, tmp_path / "base")
    shutil.copy(tiny_llama / "tokenizer.json", base)
    export(
        base, [], tmp_path / "bundle", mode="bank", task="text-generation", in_place=True, slots=2, max_rank=2
    )
    session, prompts = Session(tmp_path / "bundle", "cpu"), [[5] * 62, [7, 8, 9], [6] * 64]
    in_place = session.generate(prompts, max_new_tokens=30)
    session.bundle = dataclasses.replace(session.bundle, decoder=False)
    assert session.generate(prompts, max_new_tokens=30) == in_place
    assert [len(answer.ids) for answer in in_place if answer.finish_reason == "length"] == [
        room for room, answer in zip((3, 30, 1), in_place, strict=True) if answer.finish_reason == "length"
    ]
    assert session.generate(prompts[1:2], max_new_tokens=30) == in_place[1:2]


def test_a_prompt_that_is_too_long_is_refused_first(bundle_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its row, with its length and the limit, before a graph runs; the text of a prompt and ids alike."""
    session = Session(bundle_of("llama", "bank"), "cpu")
    for graph in map(session.graph, session.bundle.parts):
        monkeypatch.setattr(graph, "call", lambda *_: pytest.fail("a graph ran"))
    for prompts, row, length in (([[5], [5] * 65], 2, 65), (["w1 " * 100, "w1"], 1, 100)):
        with pytest.raises(
            ConfigError,
            match=rf"longer than the model's context.*row {row}; expected at most 64 tokens, found {length}.*"
            "shorten it",
        ):
            session.generate(prompts)


def test_a_pass_that_is_too_long_is_refused(bundle_of: Make) -> None:
    """Of an encoder and of a decoder, padded on either side, and on positions that the caller counts."""
    bert, llama = (Session(bundle_of(kind, "bank"), "cpu") for kind in ("bert", "llama"))
    long, short = [5] * 65, [5] * 64
    for session, left in ((bert, False), (llama, True), (llama, False)):
        assert session.run(pad([short, [6]], 0, left=left))
        with pytest.raises(RowError, match=r"row 2.*at most 64 tokens, found 65"):
            session.run(pad([[6], long], 0, left=left))
    with pytest.raises(RowError, match=r"row 1.*found 101"):
        llama.run({"input_ids": np.array([[5]]), "position_ids": np.array([[100]])})
    with pytest.raises(RowError, match="row 2"):
        bert.run(bert.encode(["w1", "w1 " * 65]))
