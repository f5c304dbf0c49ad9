"""How tokens are chosen: distributions equal a dense formula in float64, kept tokens and penalties those of
transformers, for each row.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from adapterpack import Session
from adapterpack.bundle.manifest import read_bundle
from adapterpack.errors import ConfigError, FormatError, NonFinite
from adapterpack.runtime.generation.sampler import SampledToken, Sampler, candidates
from adapterpack.runtime.generation.sampling import Sampling, sampling_of
from adapterpack.tasks.data.rows import RowError
from adapterpack.tasks.task import MAIN

Make = Callable[..., Any]
PROMPT = [3, 5, 5, 7]


def noise(seed: int, *shape: int, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def sample(logits: np.ndarray, rows: Sequence[Sampler]) -> list[SampledToken]:
    """The next token of each row, from ``[rows, vocabulary]``."""
    return [sampler.next(row) for row, sampler in zip(logits, rows, strict=True)]


def dense(logits: np.ndarray, options: Sampling, output: Sequence[int] = ()) -> np.ndarray:
    """The probability of each token after PROMPT and an output, in float64, by sorting all tokens."""
    scores = logits.astype(np.float64)
    for token, bias in options.logit_bias.items():
        scores[token] += bias
    for token in {*PROMPT, *output}:
        scores[token] = (
            scores[token] * options.repetition_penalty
            if scores[token] < 0
            else scores[token] / options.repetition_penalty
        )
    for token, count in Counter(output).items():
        scores[token] -= options.presence_penalty + count * options.frequency_penalty
    scores = scores / options.temperature
    order = np.argsort(-scores, kind="stable")[: options.top_k or None]
    weights = np.exp(scores[order] - scores[order[0]])
    shares = np.cumsum(weights) / weights.sum()
    count = int((shares < options.top_p).sum()) + 1 if options.top_p < 1 else len(order)
    kept = [
        token for token, weight in zip(order[:count], weights[:count], strict=True) if weight >= options.min_p
    ]
    probabilities = np.zeros(len(scores))
    probabilities[kept] = np.exp(scores[kept] - scores[order[0]])
    return probabilities / probabilities.sum()


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_k": 3},
        {"top_p": 0.7},
        {"top_k": 6, "top_p": 0.6},
        {"min_p": 0.2},
        {"top_p": 0.95, "min_p": 0.1},
        {"top_p": 1e-9},
        {"repetition_penalty": 1.7},
        {"presence_penalty": 0.8, "frequency_penalty": -0.5},
        {"logit_bias": {4: 2.5, "1": -100}},
        {
            "repetition_penalty": 0.6,
            "presence_penalty": -1,
            "frequency_penalty": 0.7,
            "logit_bias": {5: 3},
            "top_k": 8,
            "top_p": 0.9,
            "min_p": 0.05,
        },
    ],
    ids=str,
)
def test_draws_follow_the_distribution(fields: dict[str, Any]) -> None:
    """Frequencies of 2500 draws of the third token equal the formula within 0.05, five standard deviations;
    what it leaves out is never drawn.
    """
    options, output = Sampling(temperature=0.8, **fields), [5, 9]
    logits = noise(1, 12, scale=1.5)
    # so that these are the output, whatever the options
    forced = [noise(1, 12) * 0 + 200 * (np.arange(12) == token) for token in output]
    expected = dense(logits, options, output)
    rows = [Sampler(options, PROMPT, stream=row) for row in range(2500)]
    for token, step in zip(output, forced, strict=True):
        assert {choice.token for choice in sample(np.tile(step, (len(rows), 1)), rows)} == {token}
    counts = np.bincount(
        [choice.token for choice in sample(np.tile(logits, (len(rows), 1)), rows)], minlength=12
    ) / len(rows)
    assert (counts[expected == 0] == 0).all()
    np.testing.assert_allclose(counts, expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("size", [7, 700, 60_000])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (0.7, 50, 1.0, 0.0),
        (1.0, 0, 0.9, 0.0),
        (1.0, 0, 1.0, 0.05),
        (0.7, 50, 0.9, 0.02),
        (2.0, 0, 0.999, 0.0),
        (3.0, 5000, 0.5, 0.001),
        (1.0, 1, 1.0, 0.0),
        (0.05, 0, 0.3, 0.0),
        (1.0, 10**6, 1.0, 1.0),
    ],
)
def test_kept_tokens_are_those_of_transformers(
    size: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """The tokens that may be drawn are those that transformers' warpers leave, and their weights are in the
    same proportion.
    """
    logits = noise(size, size)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers.extend([TopKLogitsWarper(top_k)] if top_k else [])
    warpers.extend([TopPLogitsWarper(top_p)] if top_p < 1 else [])
    warpers.extend([MinPLogitsWarper(min_p)] if min_p else [])
    left = warpers(torch.zeros((1, 1), dtype=torch.long), torch.from_numpy(logits)[None].double())[0]
    options = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    places, weights = candidates(logits, options, logits.max())
    assert list(places) == torch.nonzero(left > -torch.inf)[:, 0].tolist()
    np.testing.assert_allclose(weights / weights.sum(), torch.softmax(left, 0).numpy()[places], rtol=2e-5)


def test_equal_tokens_are_kept_together() -> None:
    """Where the last kept token has others as likely, all of them may be drawn: none is preferred for its
    number.
    """
    logits = np.array([1.0, 3.0, 1.0, 0.0, 1.0], np.float32)
    for fields in ({"top_k": 2}, {"top_p": 0.75}, {"min_p": float(np.exp(-2)) - 1e-6}):
        options = Sampling(temperature=1.0, **fields)
        assert list(candidates(logits, options, logits.max())[0]) == [0, 1, 2, 4]


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0, 12.0])
@pytest.mark.parametrize("size", [40, 600, 49_152])
def test_what_top_p_keeps_is_what_sorting_all_tokens_keeps(size: int, scale: float) -> None:
    """However likely the likeliest tokens are: the few that are looked at first, or all."""
    for seed in range(4):
        logits = noise(seed, size, scale=scale)
        weights = np.exp(logits - logits.max())
        ascending = np.sort(weights)
        for top_p in (0.05, 0.5, 0.9, 0.999, 1 - 1e-9):
            spare = (1 - top_p) * float(weights.sum(dtype=np.float64))
            least = ascending[np.searchsorted(np.cumsum(ascending[:-1], dtype=np.float64), spare, "right")]
            places, _ = candidates(logits, Sampling(temperature=1.0, top_p=top_p), logits.max())
            assert np.array_equal(places, np.flatnonzero(weights >= least)), (seed, top_p)


def test_penalties_are_those_of_transformers() -> None:
    """The logits of a row of 3 + 2 tokens, with a bias, a penalty for repetitions, and end tokens that are
    still banned.
    """
    logits, output = noise(2, 50), [11, 12]
    options = Sampling(repetition_penalty=1.3, logit_bias={7: 2.0, 20: -3.5}, min_new_tokens=4)
    sampler = Sampler(options, PROMPT, ends=[2, 30])
    for token in output:
        assert sample((np.arange(50) == token)[None] * np.float32(900), [sampler])[0].token == token
    processors = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor({(7,): 2.0, (20,): -3.5}),
            RepetitionPenaltyLogitsProcessor(1.3),
            MinNewTokensLengthLogitsProcessor(len(PROMPT), 4, [2, 30]),
        ]
    )
    expected = processors(torch.tensor([PROMPT + output]), torch.from_numpy(logits)[None])[0].numpy()
    np.testing.assert_allclose(sampler.process_logits(logits.copy()), expected, rtol=1e-6)
    assert np.isneginf(expected[[2, 30]]).all()


def test_what_may_not_and_must_be_next_is_as_in_transformers() -> None:
    """Random rules over random rows of few different tokens, in transformers' order of processors, at every
    place of a row.
    """
    dice, size = random.Random(3), 14
    for _ in range(150):
        prompt, room = [dice.randrange(size) for _ in range(dice.choice([1, 1, 2, 9]))], dice.randrange(1, 6)
        output = [dice.randrange(4) for _ in range(dice.randrange(room))]

        def some(least: int, most: int) -> list[int]:
            return [dice.randrange(size) for _ in range(dice.randrange(least, most))]

        fields: dict[str, Any] = {
            "no_repeat_ngram_size": dice.choice([1, 2, 2, 3]),
            "bad_words_ids": [[13], *(some(1, 4) for _ in range(8))],
            "min_length": dice.randrange(8),
            "min_new_tokens": dice.randrange(1, room + 1),
            "forced_bos_token_id": dice.randrange(6),
            "forced_eos_token_id": dice.choice([2, [2, 5]]),
            "suppress_tokens": [6 + dice.randrange(8)],
            "begin_suppress_tokens": some(1, 4),
            "repetition_penalty": 1.4,
        }
        fields = {name: value for name, value in fields.items() if dice.random() < 0.5}
        sampler = Sampler(Sampling(**fields, max_new_tokens=room), prompt, ends=[2, 5], room=room)
        for token in output:
            sampler.accept(token)
        right = GenerationMixin._get_logits_processor(
            SimpleNamespace(
                config=SimpleNamespace(is_encoder_decoder=False),
                _merge_criteria_processor_list=lambda made, _: made,
            ),
            generation_config=config_of(fields, len(prompt) + room),
            input_ids_seq_length=len(prompt),
            device="cpu",
        )
        logits = noise(dice.randrange(99), size)
        expected = right(torch.tensor([[*prompt, *output]]), torch.from_numpy(logits.copy())[None])[0].numpy()
        np.testing.assert_allclose(
            sampler.process_logits(logits.copy()), expected, rtol=1e-6, err_msg=f"{prompt} {output} {fields}"
        )


def config_of(fields: dict[str, Any], longest: int) -> GenerationConfig:
    config = GenerationConfig(**fields, max_length=longest, eos_token_id=[2, 5])
    config._eos_token_tensor = torch.tensor([2, 5])
    return config


OPTIONS = [
    Sampling(),
    Sampling(temperature=0.9, seed=4, logprobs=3),
    Sampling(temperature=1.2, top_p=0.95, seed=4),
    Sampling(logprobs=0),
    Sampling(temperature=0.7, top_k=40, min_p=0.01, repetition_penalty=1.2, seed=9),
    Sampling(frequency_penalty=1.5),
    Sampling(
        temperature=1.5, top_k=900, top_p=0.8, presence_penalty=1.0, logprobs=20, logit_bias={5: 4.0}, seed=-3
    ),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows_do_not_depend_on_their_neighbours(dtype: type) -> None:
    """Three tokens of rows with seven kinds of options: bit for bit the same alone, together, in another
    order, in a larger array.
    """
    logits = noise(3, 3, len(OPTIONS), 5003).astype(dtype)
    prompts = [PROMPT * row for row in range(len(OPTIONS))]

    def rows() -> list[Sampler]:
        return [
            Sampler(options, prompt, stream=row)
            for row, (options, prompt) in enumerate(zip(OPTIONS, prompts, strict=True))
        ]

    alone = [
        [sample(step[row : row + 1], [sampler])[0] for step in logits] for row, sampler in enumerate(rows())
    ]
    together, backwards, wide = rows(), rows()[::-1], rows()
    large = np.full((3, 2 * len(OPTIONS), 2 * 5003), np.nan, dtype)
    large[:, ::2, ::2] = logits
    for step in range(3):
        expected = [choices[step] for choices in alone]
        assert sample(logits[step], together) == expected
        assert sample(logits[step, ::-1], backwards) == expected[::-1]
        assert sample(large[step, ::2, ::2], wide) == expected
    assert len({choices[0].token for choices in alone}) > 3


def test_a_row_without_a_next_token_is_an_error() -> None:
    """NaN, infinity, nothing at all, a token that there is not, and parameters that leave none."""
    logits = noise(4, 4, 300)
    logits[1, 17], logits[2, 3], logits[3] = np.nan, np.inf, -np.inf
    for row in logits[1:]:
        with pytest.raises(NonFinite):
            Sampler(Sampling(temperature=1.0)).next(row)
    assert Sampler(Sampling(temperature=1.0)).next(logits[0]).token < 300
    with pytest.raises(ConfigError, match="at logit_bias; expected at most 299, found 300"):
        Sampler(Sampling(logit_bias={300: 1})).next(logits[0])
    with pytest.raises(ConfigError, match="at stop_token_ids"):
        Sampler(Sampling(stop_token_ids=[300]), ends=[300]).next(logits[0])
    logits[0, 7] = 3e38
    with pytest.raises(ConfigError, match="no token is left to choose"):
        Sampler(Sampling(temperature=1.0, repetition_penalty=0.01), [7]).next(logits[0])
    logits[0, :] = np.where(np.arange(300) == 2, 0, -np.inf)
    with pytest.raises(ConfigError, match="no token is left to choose"):
        Sampler(Sampling(min_new_tokens=1), ends=[2]).next(logits[0])
    unlikely = np.array([-np.inf, 1, -3e38, np.nextafter(np.float32(1), np.float32(0))], np.float32)
    assert Sampler(Sampling(temperature=1e-38)).next(unlikely).token == 1


def test_tokens_without_logits_do_no_harm() -> None:
    """A configuration may name an end token that the model does not have, and a prompt may hold tokens that
    are never chosen.
    """
    options = Sampling(min_new_tokens=3, repetition_penalty=1.5, presence_penalty=0.5)
    logits = noise(6, 1, 40)
    assert sample(logits, [Sampler(options, [5, 90], ends=[50256])]) == sample(
        logits, [Sampler(options, [5])]
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_logprobs_are_those_of_the_model(dtype: type) -> None:
    """log_softmax in float64 of the logits as they are, whatever bias, penalty and temperature do to the
    choice; the likeliest first.
    """
    logits = noise(5, 1, 40_000).astype(dtype)
    sampler = Sampler(
        Sampling(temperature=3.0, top_k=50, logprobs=5, repetition_penalty=2.0, logit_bias={8: 50}), [1, 2, 3]
    )
    expected = torch.log_softmax(torch.from_numpy(logits[0].astype(np.float64)), 0).numpy()
    (choice,) = sample(logits, [sampler])
    assert choice.logprob is not None
    assert abs(choice.logprob - expected[choice.token]) < 1e-5
    best = np.argsort(-expected, kind="stable")[:5]
    assert [token for token, _ in choice.top_logprobs] == best.tolist()
    np.testing.assert_allclose([value for _, value in choice.top_logprobs], expected[best], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("max_new_tokens", [0, 1 << 31, 1.5, "8", True]),
        ("min_new_tokens", [-1, 129]),
        ("temperature", [-1.0, float("nan"), 1001, "hot", None]),
        ("top_k", [-1, 0.5]),
        ("top_p", [0, 0.0, 1.5, float("nan")]),
        ("min_p", [-0.1, 1.1]),
        ("repetition_penalty", [0, 1e9]),
        ("presence_penalty", [2.5]),
        ("frequency_penalty", [-2.5]),
        ("seed", [1 << 64, 1.5, -(1 << 64)]),
        ("logprobs", [-1, 21, True]),
        ("ignore_eos", [1, "no"]),
        ("stop_token_ids", [[-1], "2", 2, [2.0], [1 << 32], range(2000)]),
        ("stop", [[1], 5, None]),
        ("no_repeat_ngram_size", [-1, 1.5, None]),
        ("bad_words_ids", [[[]], [5], [[-1]], "x", [[1] * 65], [[1]] * 2000]),
        ("min_length", [-1]),
        ("forced_bos_token_id", [-1, [3], "x"]),
        ("forced_eos_token_id", [-1, [], [1.5], "x"]),
        ("suppress_tokens", [3, [-1], "2"]),
        ("begin_suppress_tokens", [[None]]),
        ("logit_bias", [[1], {1: 101}, {-1: 1}, {"x": 1}, {1: None}, dict.fromkeys(range(2000), 1)]),
    ],
)
def test_parameters_have_bounds(name: str, wrong: list[Any]) -> None:
    for value in wrong:
        with pytest.raises(ConfigError, match=name):
            Sampling(**{name: value})


def test_parameters_of_numpy_and_json() -> None:
    """Numbers of numpy are numbers; the keys of a bias may be texts, as in JSON."""
    options = Sampling(
        temperature=np.float32(0.5),
        top_k=np.int64(4),
        stop_token_ids=[np.int32(3)],
        stop="x",
        logit_bias={"7": 1, 8: -2},
    )
    assert options == Sampling(
        temperature=0.5, top_k=4, stop_token_ids=(3,), stop=("x",), logit_bias={7: 1.0, 8: -2.0}
    )
    assert json.dumps(options.top_k) == "4"
    hash(options)


def test_the_models_own_parameters() -> None:
    """generation_config.json is read as transformers reads it, only if the caller wants it, and gives way to
    what the caller says.
    """
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}
    folder = Path("bundle")
    assert sampling_of({}, config, folder) == Sampling()
    assert sampling_of({"sampling": "greedy"}, config, folder) == Sampling()
    assert sampling_of({"sampling": "model"}, config, folder) == Sampling(
        temperature=0.6, top_p=0.9, top_k=50
    )
    assert sampling_of({"sampling": "model", "temperature": 0, "seed": 3}, config, folder) == Sampling(
        top_p=0.9, top_k=50, seed=3
    )
    assert sampling_of({"sampling": "model"}, {"do_sample": True}, folder) == Sampling(
        temperature=1.0, top_k=50
    )
    quiet = {"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}
    assert sampling_of({"sampling": "model"}, quiet, folder) == Sampling(repetition_penalty=1.1)
    assert sampling_of({"sampling": "model"}, {}, folder) == Sampling()
    rules = {
        "no_repeat_ngram_size": 3,
        "min_length": 56,
        "forced_bos_token_id": 0,
        "forced_eos_token_id": 2,
        "suppress_tokens": [4, 5],
        "begin_suppress_tokens": [220],
        "bad_words_ids": [[7, 8]],
        "min_new_tokens": 9,
    }
    assert sampling_of({}, rules, folder) == Sampling()
    assert sampling_of({"sampling": "model"}, rules, folder) == Sampling(**rules)
    short = sampling_of({"sampling": "model", "max_new_tokens": 5, "suppress_tokens": ()}, rules, folder)
    assert (short.min_new_tokens, short.suppress_tokens) == (5, ())
    # a form says itself where an answer begins and ends
    formed = sampling_of({"sampling": "model", "regex": "a+"}, rules, folder)
    assert formed == Sampling(
        regex="a+", **{name: value for name, value in rules.items() if name[:3] not in ("min", "for")}
    )
    # how long an answer is: with the prompt, or by itself, unless the caller says it
    for config, given, rooms in (
        ({"max_length": 40}, {}, (35, 1)),
        ({"max_length": 40, "max_new_tokens": 9}, {}, (9, 9)),
        ({"max_length": 40}, {"max_new_tokens": 7}, (7, 7)),
        ({"max_new_tokens": 9}, {"max_length": 40}, (35, 1)),
    ):
        options = sampling_of({"sampling": "model", **given}, config, folder)
        assert tuple(map(options.room, (5, 39))) == rooms
    with pytest.raises(ConfigError, match="leaves no room"):
        sampling_of({"sampling": "model"}, {"max_length": 40}, folder).room(40)
    with pytest.raises(FormatError, match=r"generation_config.json#max_length"):
        sampling_of({"sampling": "model"}, {"max_length": -1, "max_new_tokens": None}, folder)
    with pytest.raises(FormatError, match=r"generation_config.json#top_p"):
        sampling_of({"sampling": "model"}, {"do_sample": True, "top_p": 7}, folder)
    with pytest.raises(ConfigError, match="greedy or model"):
        sampling_of({"sampling": "auto"}, {}, folder)
    with pytest.raises(ConfigError, match="did you mean 'min_p'"):
        sampling_of({"minp": 0.1}, {}, folder)


# In a running bundle.


@pytest.fixture(scope="module")
def session(bundle_of: Make) -> Session:
    return Session(bundle_of("llama", "bank"), "cpu")


ROWS: list[list[int]] = [[5, 6, 7, 30, 31], [8, 9], [10, 11, 12, 13, 14, 15, 16]]


def test_generation_with_logprobs(session: Session) -> None:
    """The log-probabilities of each token of an answer are those that a run over prompt and answer gives."""
    answers = session.generate(ROWS, "alpha", max_new_tokens=6, temperature=1.1, logprobs=2)
    for prompt, answer in zip(ROWS, answers, strict=True):
        whole = np.array([[*prompt, *answer.ids]])
        logits = session.run({"input_ids": whole, "attention_mask": np.ones_like(whole)}, ["alpha"])[
            "logits"
        ][0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(torch.from_numpy(logits).double(), 1).numpy()
        assert [choice.token for choice in answer.logprobs] == list(answer.ids)
        np.testing.assert_allclose(
            [choice.logprob for choice in answer.logprobs],
            [row[token] for row, token in zip(expected, answer.ids, strict=True)],
            atol=1e-4,
        )
        assert all(len(choice.top_logprobs) == 2 for choice in answer.logprobs)
    assert session.generate(ROWS, "alpha", max_new_tokens=2)[0].logprobs is None


def test_where_a_row_ends(bundle_of: Make, tmp_path: Path, session: Session) -> None:
    """An end token that greedy decoding meets: ignored, it is a token like others; banned, another one comes;
    others end a row, too.
    """
    plain = session.generate(ROWS, "alpha", max_new_tokens=12)
    end = plain[0].ids[4]
    folder = Path(shutil.copytree(bundle_of("llama", "bank"), tmp_path / "bundle"))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": end, "do_sample": True, "temperature": 1e-6})
    )
    read_bundle(folder).write(folder)
    ending = Session(folder, "cpu")
    first = plain[0].ids.index(end)
    assert ending.generate(ROWS, "alpha", max_new_tokens=12)[0].ids == plain[0].ids[:first]
    assert ending.generate(ROWS, "alpha", max_new_tokens=12, sampling="model")[0].ids == plain[0].ids[:first]
    assert [answer.ids for answer in ending.generate(ROWS, "alpha", max_new_tokens=12, ignore_eos=True)] == [
        row.ids for row in plain
    ]
    longer = ending.generate(ROWS, "alpha", max_new_tokens=12, min_new_tokens=9)[0]
    assert len(longer.ids) >= 9 and longer.ids[:first] == plain[0].ids[:first] and end not in longer.ids[:9]
    (stopped,) = session.generate(ROWS[:1], "alpha", max_new_tokens=12, stop_token_ids=[end, 90])
    assert (stopped.ids, stopped.finish_reason) == (plain[0].ids[:first], "stop")
    (biased,) = session.generate(ROWS[:1], "alpha", max_new_tokens=3, logit_bias={77: 100})
    assert biased.ids == (77, 77, 77)
    (varied,) = session.generate(
        ROWS[:1],
        "alpha",
        max_new_tokens=3,
        logit_bias={77: 50, 78: 50},
        presence_penalty=2,
        frequency_penalty=2,
    )
    assert set(varied.ids) == {77, 78}


def test_a_row_that_fails_is_named(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model gives NaN for a row, the error says which."""
    graph = session.graph(MAIN)
    call = graph.call

    def broken(feeds: Any) -> Any:
        outputs = dict(call(feeds))
        logits = np.array(outputs["logits"].numpy())
        logits[1] = np.nan
        return {**outputs, "logits": ort.OrtValue.ortvalue_from_numpy(logits)}

    monkeypatch.setattr(graph, "call", broken)
    with pytest.raises(RowError, match="not finite") as caught:
        session.generate(ROWS, "alpha", max_new_tokens=4)
    assert caught.value.row == 2
