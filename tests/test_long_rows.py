"""Rows longer than a model's windows and chunks are what transformers makes of each alone, however it is
run.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import noise
import numpy as np
import peft
import pytest
import torch
import transformers

import adapterpack as ap
from adapterpack import Session, export, merge
from adapterpack.bundle.manifest import PAST
from adapterpack.engine_graph.compare import takes_much
from adapterpack.errors import ParityError
from adapterpack.runtime.engine.engine import Engine
from adapterpack.runtime.generation.sampling import Sampling

Make = Callable[..., Any]
WINDOW = 40
LENGTHS = (1, 39, 41, 90, 200)
NAMES: list[str | None] = [None, "one", "two", None, "one"]
STEPS = 3
"""Tokens behind each row: those of 39 and 41 go on across the threshold."""
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = {**SIZES, "head_dim": 8, "sliding_window": WINDOW}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
CHUNKED = {
    **SIZES,
    "head_dim": 8,
    "attention_chunk_size": WINDOW,
    "no_rope_layers": [1, 0],
    "moe_layers": [],
    "intermediate_size_mlp": 48,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "mistral": lambda: transformers.MistralConfig(**WIDE),
    "gemma2": lambda: transformers.Gemma2Config(**WIDE, query_pre_attn_scalar=8),
    "olmo3": lambda: transformers.Olmo3Config(**WIDE, **MIXED),
    "qwen2": lambda: transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "exaone4": lambda: transformers.Exaone4Config(**WIDE, **MIXED),
    "llama4": lambda: transformers.Llama4TextConfig(**CHUNKED),
    "llama4-scaled": lambda: transformers.Llama4TextConfig(**CHUNKED, floor_scale=64),
}
TRACED = ("exaone4", "llama4", "llama4-scaled")
"""Families whose graphs are traced in torch, which takes its time."""
PADDED = ("llama4-scaled",)
"""Families of which transformers itself counts padding: it scales queries by how far they are from the first
place, not token.
"""


class Made(NamedTuple):
    """A base of a family, its packs, and their bundle."""

    base: Path
    packs: dict[str, Path]
    bundle: Path


def causal(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def base_in(folder: Path, family: str) -> Path:
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    noise.shake(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    @cache
    def make(family: str) -> Made:
        root = tmp_path_factory.mktemp(family)
        base, packs = base_in(root / "base", family), {}
        for path in tiny_llama.glob("*token*"):
            shutil.copy(path, base)
        for seed, (name, rank) in enumerate((("one", 3), ("two", 2))):
            model = noise.shake(
                ap.adapt(causal(base), ap.LoRA(r=rank, targets=("q_proj", "v_proj", "down_proj")), name),
                0.2,
                seed,
            )
            ap.save(model, root / name, base=base, name=name)
            packs[name] = root / name
        export(base, list(packs.values()), root / "bundle", mode="bank")
        return Made(base, packs, root / "bundle")

    return make


@cache
def rows() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, SIZES["vocab_size"], length + STEPS) for length in LENGTHS]


@torch.no_grad()
def _alone(model: Any, ids: np.ndarray) -> np.ndarray:
    return model(input_ids=torch.from_numpy(ids[None]), use_cache=False).logits[0].numpy()


@pytest.fixture(scope="module")
def expected(made: Make) -> Callable[[str], list[np.ndarray]]:
    """What transformers, with PEFT for the adapters, gives for each row by itself, ``[tokens,
    vocabulary]``.
    """

    @cache
    def make(family: str) -> list[np.ndarray]:
        base, packs, _ = made(family)
        models = {None: causal(base)}
        models |= {
            name: peft.PeftModel.from_pretrained(causal(base), folder).eval()
            for name, folder in packs.items()
        }
        return [_alone(models[name], ids) for name, ids in zip(NAMES, rows(), strict=True)]

    return make


def require_close(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    scale = max(np.abs(one).max() for one in expected)
    for length, one, other in zip(LENGTHS[-len(found) :], found, expected, strict=True):
        assert np.abs(one - other[-len(one) :]).max() <= 1e-4 * scale, length


def padded(ids: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    width = max(map(len, ids))
    return {
        "input_ids": np.stack([np.pad(row, (width - len(row), 0)) for row in ids]),
        "attention_mask": np.stack([np.pad(np.ones_like(row), (width - len(row), 0)) for row in ids]),
    }


def by_engine(bundle: Path, names: Sequence[str | None]) -> list[np.ndarray]:
    """The engine's logits after each row's prompt, and after each of the tokens behind it."""
    engine = Engine(bundle, "cpu", max_rows=len(LENGTHS))
    requests = [
        engine.row(
            ids[:-STEPS].tolist(), None if name is None else engine.bundle.pack(name), Sampling()
        ).sequences[0]
        for ids, name in zip(rows(), names, strict=True)
    ]
    found: list[list[np.ndarray]] = []
    for row in requests:
        engine.rows.admit(row)
    for row in requests:
        while row.num_computed_tokens < len(row.prompt):
            last = engine.rows.prefill(min(37, len(row.prompt) - row.num_computed_tokens)).copy()
        found.append([last])
    for step in range(STEPS):
        for row, ids in zip(requests, rows(), strict=True):
            row.next_token = int(ids[len(ids) - STEPS + step])
        for logits, one in zip(engine.rows.decode(), found, strict=True):
            one.append(logits.copy())
    return [np.stack(one) for one in found]


by_family = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.long] if name in TRACED else []) for name in FAMILIES]
)


@pytest.mark.sampled(2)
@by_family
def test_a_session_s_rows_are_what_each_is_alone(family: str, made: Make, expected: Make) -> None:
    session = Session(made(family).bundle, "cpu")
    batch = padded(rows())
    together = session.run(batch, NAMES)["logits"]
    require_close(
        [logits[mask > 0] for logits, mask in zip(together, batch["attention_mask"], strict=True)],
        expected(family),
    )
    require_close(
        [
            session.run({"input_ids": ids[None]}, name)["logits"][0]
            for ids, name in zip(rows(), NAMES, strict=True)
        ],
        expected(family),
    )


@by_family
def test_an_engine_s_rows_are_what_each_is_alone(family: str, made: Make, expected: Make) -> None:
    """Side by side, their prompts in pieces, and steps that cross the threshold."""
    require_close(by_engine(made(family).bundle, NAMES), expected(family))


@by_family
@torch.no_grad()
def test_rows_of_an_attached_model_are_what_each_is_alone(family: str, made: Make, expected: Make) -> None:
    base, packs, _ = made(family)
    model = causal(base)
    for folder in packs.values():
        ap.attach(model, ap.load(folder))
    batch = padded(rows())
    if family in PADDED:
        batch = {name: array[-1:] for name, array in batch.items()}
    with ap.using(model, adapters=NAMES[-len(batch["input_ids"]) :]):
        together = model(**{key: torch.from_numpy(value) for key, value in batch.items()}).logits.numpy()
    found = [logits[mask > 0] for logits, mask in zip(together, batch["attention_mask"], strict=True)]
    require_close(found, expected(family)[-len(found) :])
    alone = []
    for name, ids in zip(NAMES, rows(), strict=True):
        with ap.using(model, name):
            alone.append(_alone(model, ids))
    require_close(alone, expected(family))


@by_family
def test_rows_of_a_merged_model_are_those_of_the_adapter(
    family: str, made: Make, expected: Make, tmp_path: Path
) -> None:
    base, packs, _ = made(family)
    models = {None: causal(base)}
    for name, folder in packs.items():
        merge(base, [folder], tmp_path / name)
        models[name] = causal(tmp_path / name)
    require_close(
        [_alone(models[name], ids) for name, ids in zip(NAMES, rows(), strict=True)], expected(family)
    )


def _without_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder as it is: its graph of Mistral looks back over everything."""
    monkeypatch.setattr(
        importlib.import_module("adapterpack.exporting.frontends.mobius"),
        "_look_back",
        lambda graph, config: None,
        raising=False,
    )


def test_a_graph_that_loses_the_window_is_not_published(
    made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_windows(monkeypatch)
    with pytest.raises(ParityError, match=r"sliding_window 40"):
        export(made("mistral").base, [], tmp_path / "out", frontend="mobius")
    assert list(tmp_path.iterdir()) == []


def test_a_window_too_long_for_the_whole_model_is_proved_on_few_layers(
    made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy goes through the same frontend, and a graph that loses the window fails there."""
    monkeypatch.setattr("adapterpack.base.thresholds._MOST_WHOLE", 1)
    base, told = base_of_four_layers(tmp_path / "base"), list[str]()
    report = export(base, [], tmp_path / "out", frontend="mobius", progress=told.append).parity["long_rows"]
    assert "prove rows of up to 56 tokens on 2 of 4 layers" in told
    assert report["few_layers"] == {"layers": 2, "rows": [40, 56]}
    _without_windows(monkeypatch)
    with pytest.raises(ParityError, match=r"sliding_window 40"):
        export(base, [], tmp_path / "wrong", frontend="mobius")


def base_of_four_layers(folder: Path) -> Path:
    torch.manual_seed(5)
    config = transformers.Qwen2Config(
        **{**SIZES, "num_hidden_layers": 4},
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["full_attention", "sliding_attention"] * 2,
    )
    noise.shake(transformers.AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    return folder


def test_rows_with_too_many_scores_are_proved_in_pieces(
    made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapterpack.engine_graph.compare._MOST", 1)
    monkeypatch.setattr("adapterpack.engine_graph.compare._PIECE", 16)
    base, packs, _ = made("mistral")
    parity = export(base, [packs["one"]], tmp_path / "out", frontend="mobius").parity
    assert 0 < parity["long_rows"]["max_relative"] < 1e-5
    assert 0 < parity["decoder"]["max_relative"] < 1e-5
    _without_windows(monkeypatch)
    with pytest.raises(ParityError, match=r"sliding_window 40"):
        export(base, [], tmp_path / "wrong", frontend="mobius")


def test_keys_of_an_indexer_have_no_heads() -> None:
    """Only keys and values count when scores are."""
    caches = {"key": ["batch", 2, "past", 8], "indexer_key": ["batch", "past", 8]}
    inputs = {f"{PAST}0.{name}": SimpleNamespace(shape=shape) for name, shape in caches.items()}
    session: Any = SimpleNamespace(config={}, inputs=inputs)
    assert [takes_much(session, 2, tokens) for tokens in (1 << 10, 1 << 14)] == [False, True]


def test_lengths_that_cost_too_much_are_said(
    made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapterpack.base.thresholds._MOST_WHOLE", 1)
    monkeypatch.setattr("adapterpack.base.thresholds._MOST_FEW", 1)
    told: list[str] = []
    report = export(made("qwen2").base, [], tmp_path / "out", progress=told.append).parity["long_rows"]
    assert report["left_out"] == {"sliding_window": "rows of 56 tokens take this model too long"}
    assert any(text.startswith("no row of the proof reaches past sliding_window") for text in told)


def test_kinds_of_layers_that_only_the_class_knows_reach_the_engine_s_graph(
    made: Make, tmp_path: Path
) -> None:
    """Configurations of Gemma 2 on the Hub name a window and no kinds of layers: every second one looks back
    over it.
    """
    base = shutil.copytree(made("gemma2").base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["layer_types"]
    (base / "config.json").write_text(json.dumps(config))
    export(base, [], tmp_path / "out")
    model = causal(base)
    require_close(by_engine(tmp_path / "out", [None] * len(LENGTHS)), [_alone(model, ids) for ids in rows()])


def test_what_a_builder_warns_of_is_told(made: Make, tmp_path: Path) -> None:
    told: list[str] = []
    export(made("mistral").base, [], tmp_path / "out", progress=told.append)
    assert any(text.startswith("mobius warns: Model declares a uniform sliding window") for text in told)
