"""LongRoPE: a row has the frequencies of its own length, whatever is beside it, and however it is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Phi3Config,
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
    set_seed,
)

from adapterpack import LoRA, Pack, Session, adapt, attach, detach, export, merge, save
from adapterpack.base.thresholds import longrope_length
from adapterpack.runtime.engine.engine import Engine
from adapterpack.runtime.padding import pad
from adapterpack.tasks.data.rows import RowError
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.models.load import load_model
from adapterpack.training.data.pack_sequences import _join

SHORT = 40
"""The most tokens of a short row."""
LENGTHS = (1, 39, 41, 90, 200)
ROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": SHORT,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.5, 5.0, 6.5],
}
CLOSE = 1e-4
"""The share of the largest logit that two ways of computing it may differ by."""


def _config(**settings: Any) -> Phi3Config:
    return Phi3Config(
        **{"pad_token_id": 0, **settings},
        vocab_size=96,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        num_hidden_layers=1,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=256,
        original_max_position_embeddings=SHORT,
        rope_parameters=ROPE,
    )


def _noisy(model: Any) -> Any:
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


@pytest.fixture(scope="module")
def base(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer is another model's of as many words."""
    set_seed(3)
    folder = tmp_path_factory.mktemp("long-rope") / "base"
    _noisy(Phi3ForCausalLM(_config())).save_pretrained(folder)
    for path in tiny_bert.glob("*token*"):
        shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def pack(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    model = adapt(
        load_model(get_task("text-generation"), base), LoRA(r=4, targets=("o_proj", "down_proj")), "far"
    )
    return save(_noisy(model), tmp_path_factory.mktemp("packs") / "far", base=base, name="far")


@pytest.fixture(scope="module")
def merged(base: Path, pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "model"
    merge(base, [pack], folder)
    return folder


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(3, 96, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def alone(base: Path, merged: Path, rows: list[list[int]]) -> dict[str | None, list[np.ndarray]]:
    """Logits of each row by itself, by transformers, without an adapter and with it."""
    models = {None: Phi3ForCausalLM.from_pretrained(base), "far": Phi3ForCausalLM.from_pretrained(merged)}
    with torch.no_grad():
        return {
            name: [model(torch.tensor([row])).logits[0].numpy() for row in rows]
            for name, model in models.items()
        }


@pytest.fixture(scope="module")
def bundle(base: Path, pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "far"
    export(base, [pack], folder, frontend="mobius")
    return folder


def _require_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= CLOSE * np.abs(expected).max()


@pytest.mark.parametrize("frontend", ["mobius", pytest.param("transformers", marks=pytest.mark.long)])
def test_the_rows_of_a_mixed_batch_have_the_logits_that_each_has_alone(
    frontend: str,
    base: Path,
    pack: Pack,
    bundle: Path,
    rows: list[list[int]],
    alone: dict[str | None, list[np.ndarray]],
    tmp_path: Path,
) -> None:
    """Rows on both sides of the limit, each with the adapter or without."""
    if frontend != "mobius":
        bundle = tmp_path / "bundle"
        export(base, [pack], bundle, frontend=frontend)
    session = Session(bundle, "cpu")
    names = [None, "far", None, "far", None]
    for chosen in (names, [None if name else "far" for name in names]):
        together = session.run(pad(rows, 0, left=session.pads_left), chosen)["logits"]
        for number, (row, name) in enumerate(zip(rows, chosen, strict=True)):
            _require_close(together[number, -len(row) :], alone[name][number])
            _require_close(
                session.run({"input_ids": np.array([row])}, name)["logits"][0], alone[name][number]
            )


def test_an_adapter_in_memory_gives_the_rows_of_a_batch_what_each_has_alone(
    base: Path,
    pack: Pack,
    rows: list[list[int]],
    alone: dict[str | None, list[np.ndarray]],
) -> None:
    """Padded on either side, and packed one behind another."""
    model: Any = attach(Phi3ForCausalLM.from_pretrained(base).eval(), pack)
    with torch.no_grad():
        for left in (True, False):
            batch = {name: torch.from_numpy(array) for name, array in pad(rows, 0, left=left).items()}
            together = model(**batch).logits.numpy()
            for logits, mask, expected in zip(
                together, batch["attention_mask"].bool().numpy(), alone["far"], strict=True
            ):
                _require_close(logits[mask], expected)
        joined = _join([{"input_ids": row, "labels": row} for row in rows])
        packed = model(
            input_ids=torch.tensor([joined["input_ids"]]),
            position_ids=torch.tensor([joined["position_ids"]]),
            use_cache=False,
        )
    _require_close(packed.logits[0].numpy(), np.concatenate(alone["far"]))


def test_a_model_without_its_adapters_is_transformers_own_again(base: Path, pack: Pack) -> None:
    model: Any = Phi3ForCausalLM.from_pretrained(base)
    rotary = model.model.rotary_emb
    attach(model, pack)
    assert model.model.rotary_emb is not rotary
    detach(model)
    assert model.model.rotary_emb is rotary
    assert not model.model._forward_pre_hooks


def _expected(folder: Path, row: Sequence[int], count: int) -> list[tuple[int, float]]:
    """The likeliest tokens after a row, each with its log-probability, by transformers with its cache."""
    model = Phi3ForCausalLM.from_pretrained(folder)
    made: Any = model.generate(
        torch.tensor([list(row)]),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    scores = torch.log_softmax(torch.stack(made.scores)[:, 0], -1)
    return [
        (int(token), float(score[token]))
        for token, score in zip(made.sequences[0, len(row) :], scores, strict=True)
    ]


@pytest.fixture(scope="module")
def crossing() -> list[list[int]]:
    rng = np.random.default_rng(6)
    return [rng.integers(3, 96, length).tolist() for length in (*LENGTHS, 30, 40)]


@pytest.fixture(scope="module")
def answers(
    base: Path, merged: Path, crossing: list[list[int]]
) -> list[tuple[str | None, list[tuple[int, float]]]]:
    names = [None, "far", "far", None, "far", None, "far"]
    return [
        (name, _expected(merged if name else base, row, 14))
        for name, row in zip(names, crossing, strict=True)
    ]


@pytest.mark.parametrize("engine", [True, False])
def test_an_answer_is_transformers_own_also_where_it_makes_its_row_a_long_one(
    engine: bool,
    base: Path,
    pack: Pack,
    bundle: Path,
    crossing: list[list[int]],
    answers: Any,
    tmp_path: Path,
) -> None:
    """Log-probabilities of answers to short rows, to long ones, and to such as become long: these are read
    again, as by transformers.
    """
    if not engine:
        bundle = tmp_path / "bundle"
        export(base, [pack], bundle, frontend="mobius", in_place=False)
    session = Session(bundle, "cpu")
    assert session.bundle.decoder == engine
    names = [name for name, _ in answers]
    for _ in range(2):  # the second time the engine knows the prompts
        found = session.generate(crossing, names, max_new_tokens=14, ignore_eos=True, logprobs=0)
        for answer, (_, expected) in zip(found, answers, strict=True):
            assert answer.ids == tuple(token for token, _ in expected)
            np.testing.assert_allclose(
                [choice.logprob for choice in answer.logprobs], [score for _, score in expected], atol=CLOSE
            )


def test_an_engine_reads_a_long_prompt_in_pieces_and_takes_nothing_over_from_a_short_one(
    bundle: Path, base: Path
) -> None:
    """Both begin alike, so that blocks of one would serve the other, were they not of another kind."""
    rng = np.random.default_rng(7)
    long = rng.integers(3, 96, 100).tolist()
    engine = Engine(bundle, "cpu", prefill_budget=7)
    for row in (long[:36], long, long[:38], long[:98]):
        number = engine.add(row, max_new_tokens=4, ignore_eos=True, logprobs=0)
        choices = [
            event.choice for event in _events(engine) if event.request == number and event.choice is not None
        ]
        expected = _expected(base, row, 4)
        assert [choice.token for choice in choices] == [token for token, _ in expected]
        np.testing.assert_allclose(
            [choice.logprob for choice in choices], [score for _, score in expected], atol=CLOSE
        )
    assert engine.rows.reused == 32 + 96  # those of the second short row, and of the second long one


def _events(engine: Engine) -> list[Any]:
    events = []
    while engine.busy:
        events += engine.step()
    return events


def test_beams_that_become_long_are_those_of_transformers(
    bundle: Path, base: Path, crossing: list[list[int]]
) -> None:
    row = crossing[-2][:36]
    made: Any = Phi3ForCausalLM.from_pretrained(base).generate(
        torch.tensor([row]), max_new_tokens=8, num_beams=3, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    (answer,) = Session(bundle, "cpu").generate([row], max_new_tokens=8, num_beams=3, ignore_eos=True)
    assert list(answer.ids) == made[0, len(row) :].tolist()


END = 2


@pytest.fixture(
    scope="module", params=[3, pytest.param(1, marks=pytest.mark.long)], ids=["classes", "reward"]
)
def classifier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose padding is the token at which texts end."""
    set_seed(4)
    folder = tmp_path_factory.mktemp("classifier") / "base"
    config = _config(num_labels=request.param, pad_token_id=END)
    _noisy(Phi3ForSequenceClassification(config)).save_pretrained(folder)
    return folder


def test_a_classifier_gives_each_row_what_it_has_alone_whatever_rows_are_filled_up_with(
    classifier: Path, rows: list[list[int]], tmp_path: Path
) -> None:
    """It pads on the right, has no input for positions, and looks for its last token; of some rows that is
    the one at the end.
    """
    export(classifier, [], tmp_path / "bundle", mode="folded")
    session = Session(tmp_path / "bundle", "cpu")
    ended = [*rows, [*rows[1][:5], END], [*rows[2], END, END]]
    model = Phi3ForSequenceClassification.from_pretrained(classifier)
    with torch.no_grad():
        expected = np.concatenate([model(torch.tensor([row])).logits.numpy() for row in ended])
    for filled in (0, END, 7):
        _require_close(session.run(pad(ended, filled, left=False))["logits"], expected)
        alone = [session.run({"input_ids": np.array([row])})["logits"] for row in ended]
        _require_close(np.concatenate(alone), expected)


@pytest.mark.parametrize("padding", [END, None, -1])
def test_a_classifier_in_memory_does_not_depend_on_padding_either(
    padding: int | None, tmp_path: Path, rows: list[list[int]]
) -> None:
    """Also where the configuration names no padding, as that of Llama, or an id that no token has."""
    set_seed(4)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        num_hidden_layers=1,
        bos_token_id=1,
        eos_token_id=END,
        num_labels=3,
    )
    model = _noisy(LlamaForSequenceClassification(config))
    model.save_pretrained(tmp_path / "base")
    settings = json.loads((tmp_path / "base" / "config.json").read_text("utf-8"))
    (tmp_path / "base" / "config.json").write_text(json.dumps({**settings, "pad_token_id": padding}), "utf-8")
    loaded = load_model(get_task("text-classification"), tmp_path / "base").eval()
    with torch.no_grad():
        together = loaded(
            **{name: torch.from_numpy(array) for name, array in pad(rows, 7, left=False).items()}
        ).logits.numpy()
        _require_close(together, np.concatenate([model(torch.tensor([row])).logits.numpy() for row in rows]))


@pytest.mark.long
def test_dynamic_scaling_is_exported_for_the_context_and_longer_rows_are_refused(
    tmp_path: Path, rows: list[list[int]]
) -> None:
    """Beyond the context its frequencies would be those of the longest row."""
    set_seed(6)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        num_hidden_layers=1,
        pad_token_id=0,
        max_position_embeddings=90,
        rope_parameters=rope,
    )
    model = _noisy(LlamaForCausalLM(config))
    model.save_pretrained(tmp_path / "base")
    export(tmp_path / "base", [], tmp_path / "bundle", mode="folded", frontend="transformers")
    session = Session(tmp_path / "bundle", "cpu")
    assert session.bundle.decoder
    together = session.run(pad(rows[:4], 0, left=True))["logits"]
    for logits, row in zip(together, rows[:4], strict=True):
        with torch.no_grad():
            _require_close(logits[-len(row) :], model(torch.tensor([row])).logits[0].numpy())
    with pytest.raises(RowError, match="a row is longer than the model's context"):
        session.run({"input_ids": np.array([rows[4]])})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_parameters": ROPE, "max_position_embeddings": 256}, SHORT),
        (
            {
                "rope_scaling": {"type": "longrope", "long_factor": [2.0]},
                "original_max_position_embeddings": 4096,
            },
            4096,
        ),
        (
            {
                "text_config": {
                    "rope_parameters": {"full_attention": ROPE, "sliding_attention": {"rope_type": "default"}}
                }
            },
            SHORT,
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}},
            None,
        ),
        ({"rope_scaling": None}, None),
        ({}, None),
    ],
)
def test_the_limit_of_short_rows_is_in_the_configuration(
    config: dict[str, Any], expected: int | None
) -> None:
    assert longrope_length(config) == expected
