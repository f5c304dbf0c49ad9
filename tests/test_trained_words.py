"""Words that an adapter trains in graphs: rows of the embedding, and of the head that is tied to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from adapterpack import LoRA, Pack, Session, TrainableTokens, adapt, export, merge, save
from adapterpack.runtime.engine.engine import Engine
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.models.load import load_model

ROWS = np.array([[5, 7, 3, 9, 11, 5], [1, 12, 3, 4, 6, 8], [40, 9, 9, 2, 5, 70]])
CLOSE = 1e-4
"""The share of the largest logit that two ways of computing it may differ by."""
CONFIGS: dict[str, Any] = {
    "words": TrainableTokens(token_indices=(5, 7, 9)),
    "both": [LoRA(r=2, targets=("q_proj", "down_proj")), TrainableTokens(token_indices=(12, 9))],
    "plain": LoRA(r=2, targets=("q_proj", "v_proj")),
    "other": TrainableTokens(token_indices=(3, 40)),
}


class Made:
    """A base, packs of it by name, and models of transformers with a pack merged into them."""

    def __init__(self, folder: Path, tied: bool) -> None:
        self.folder, self.base = folder, folder / "base"
        set_seed(2)
        config = LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            num_hidden_layers=1,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
        )
        _moved(LlamaForCausalLM(config)).save_pretrained(self.base)
        self.packs: dict[str, Pack] = {}
        self.expected: dict[str | None, np.ndarray] = {None: _logits(self.base)}
        for name, config_of_pack in CONFIGS.items():
            model = adapt(load_model(get_task("text-generation"), self.base), config_of_pack, name)
            self.packs[name] = save(_moved(model), folder / name, base=self.base, name=name)
            merge(self.base, [self.packs[name]], folder / f"merged-{name}")
            self.expected[name] = _logits(folder / f"merged-{name}")


def _moved(model: Any) -> Any:
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def _logits(folder: Path) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = LlamaForCausalLM.from_pretrained(folder)(torch.from_numpy(ROWS)).logits.numpy()
    return logits


@pytest.fixture(
    scope="module", params=[True, pytest.param(False, marks=pytest.mark.long)], ids=["tied", "untied"]
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("words"), request.param)


@pytest.mark.parametrize("mode", ["bank", "inputs"])
def test_rows_have_the_logits_of_the_merged_model(mode: str, made: Made, tmp_path: Path) -> None:
    """Each row with other words, with words beside a low-rank change, or with none."""
    export(
        made.base,
        [made.packs[name] for name in ("words", "both", "plain")],
        tmp_path / "bundle",
        mode=mode,
        in_place=False,
    )
    session = Session(tmp_path / "bundle", "cpu")
    for names in (["words", "both", "plain"], [None, "words", "both"], ["both", None, "words"]):
        logits = session.run({"input_ids": ROWS}, names)["logits"]
        for row, name in enumerate(names):
            expected = made.expected[name][row]
            assert np.abs(logits[row] - expected).max() <= CLOSE * np.abs(expected).max()


def test_an_engine_answers_with_them_and_loads_more_while_it_runs(made: Made, tmp_path: Path) -> None:
    """The tokens and their log-probabilities are those of transformers on the merged model."""
    export(
        made.base,
        [made.packs[name] for name in ("words", "both")],
        tmp_path / "bundle",
        slots=5,
        in_place=True,
    )
    engine = Engine(tmp_path / "bundle", "cpu")
    engine.adapters.load(made.packs["other"])
    session = Session(tmp_path / "bundle", "cpu")
    session.load(made.packs["other"])
    names = ["words", "both", "other", None]
    numbers = {
        name: engine.add(ROWS[0].tolist(), name, max_new_tokens=6, ignore_eos=True, logprobs=0)
        for name in names
    }
    events = []
    while engine.busy:
        events += engine.step()
    for name in names:
        found = [
            event.choice for event in events if event.request == numbers[name] and event.choice is not None
        ]
        folder = made.base if name is None else made.folder / f"merged-{name}"
        result: Any = LlamaForCausalLM.from_pretrained(folder).generate(
            torch.from_numpy(ROWS[:1]),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_scores=True,
        )
        tokens = result.sequences[0, ROWS.shape[1] :].tolist()
        scores = torch.log_softmax(torch.stack(result.scores)[:, 0], -1)[range(6), tokens].numpy()
        assert [choice.token for choice in found] == tokens
        np.testing.assert_allclose([choice.logprob for choice in found], scores, atol=CLOSE)
        logits = session.run({"input_ids": ROWS}, name)["logits"]
        assert np.abs(logits - made.expected[name]).max() <= CLOSE * np.abs(made.expected[name]).max()
