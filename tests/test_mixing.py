"""Several adapters in one row: the sum of their changes, each times a weight, whatever the other rows of the
batch have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import adapterpack as ap
from adapterpack.errors import BaseMismatch, ConfigError, UnknownAdapter, Unsupported
from adapterpack.runtime.engine.engine import DecoderEngine
from adapterpack.runtime.generation.sampling import Sampling
from adapterpack.slots.sums import NotASum

Make = Callable[..., Any]
KINDS: dict[str, Any] = {
    "lora": ap.LoRA(r=3, alpha=5),
    "loha": ap.LoHa(r=2),
    "lokr": ap.LoKr(r=2),
    "ia3": ap.IA3(),
    "oft": ap.OFT(block_size=4),
    "bottleneck": ap.Bottleneck(targets="all-blocks", reduction=8),
    "activated": ap.ALoRA(r=3, alpha=5, alora_invocation_tokens=(7, 8)),
    "dora": ap.DoRA(r=2),
    "soft": ap.PromptTuning(num_virtual_tokens=3),
    "attention": ap.LLaMAAdapter(adapter_len=3),
}
REFUSED = {"dora", "soft", "attention"}
"""Their changes have no sum: a scale of a sum, a prompt, a softmax."""
PROMPT = [5, 9, 7, 8, 11, 6, 12]


@pytest.fixture(scope="module")
def engine(base_of: Make, pack_of: Make, tmp_path_factory: pytest.TempPathFactory) -> DecoderEngine:
    """Three LoRAs of ranks 3, 5 and 2 at different layers."""
    folder = tmp_path_factory.mktemp("mixing") / "bundle"
    ap.export(
        base_of("llama"),
        [pack_of("llama", name) for name in ("alpha", "beta", "gamma")],
        folder,
        mode="bank",
        in_place=True,
    )
    engine = ap.Engine(folder, "cpu", max_rows=6)
    assert isinstance(engine, DecoderEngine)
    return engine


def logits(
    engine: DecoderEngine, adapters: Sequence[Any], prompt: Sequence[int] = PROMPT, token: int = 7
) -> np.ndarray:
    """The logits after the prompt and after a token more, of rows that run together: ``[rows, 2,
    vocabulary]``.
    """
    rows = [
        engine.row(prompt, engine.adapters.of_row(adapter), Sampling()).sequences[0] for adapter in adapters
    ]
    for row in rows:
        engine.rows.admit(row)
    first = []
    for row in rows:
        engine.rows.next_to_read()
        first.append(engine.rows.prefill(len(prompt) - row.num_computed_tokens).copy())
        row.next_token = token
    second = engine.rows.decode()
    for row in rows:
        engine.rows.remove(row)
        engine.discard(row)
    return np.stack([np.stack(first), second], 1)


def near(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(one - other).max() <= 1e-4 * np.abs(other).max())


def test_a_mix_is_the_sum_of_the_changes(engine: DecoderEngine, base_of: Make, dense_of: Make) -> None:
    """The model in float64 with the weighted changes written into its weights; alone, and beside the base,
    one adapter and other weights. Prompts that are one prefix are not mixed up: each mix has keys of its own.
    """
    mixes: list[Mapping[str, float]] = [
        {"alpha": 0.7, "beta": -1.3},
        {"alpha": 0.7, "beta": -1.2},
        {"gamma": 2.5},
        {"beta": 1.0, "gamma": 0.5, "alpha": 1e-3},
    ]
    long = [3 + (5 * place) % 40 for place in range(35)]
    for prompt in (PROMPT, long, long):
        ids = torch.tensor([[*prompt, 7]])
        together = logits(engine, [*mixes, None, "beta"], prompt)
        for place, mix in enumerate([*mixes, {}, {"beta": 1.0}]):
            model = AutoModelForCausalLM.from_pretrained(base_of("llama")).double().eval()
            base = dict(dense_of("llama", None).named_parameters())
            with torch.no_grad():
                for name, weight in mix.items():
                    for key, value in dense_of("llama", name).named_parameters():
                        model.get_parameter(key).add_(weight * (value - base[key]))
                expected = model(ids).logits[0, -2:].numpy()
            assert near(together[place], expected), (place, len(prompt))
    alone = logits(engine, [mixes[0]])
    assert near(alone[0], logits(engine, [*mixes, None, "beta"])[0])


@pytest.fixture(scope="module")
def kinds(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> DecoderEngine:
    """One adapter of each kind, and each once more under another name."""
    folder = tmp_path_factory.mktemp("kinds")
    for seed, (name, config) in enumerate(KINDS.items()):
        model = ap.adapt(AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), config, name)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise))
        ap.save(model, folder / name, base=tiny_llama)
    ap.export(tiny_llama, [folder / name for name in KINDS], folder / "bundle", mode="bank", in_place=True)
    engine = ap.Engine(folder / "bundle", "cpu", max_rows=3)
    assert isinstance(engine, DecoderEngine)
    for name in KINDS:
        engine.adapters.load(folder / name, f"{name}2")
    return engine


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", KINDS)
def test_shares_of_an_adapter_add_up_to_it(name: str, kinds: DecoderEngine) -> None:
    """A quarter and three quarters, and twice less once, are the adapter, and nothing of it is the base; or
    the kind is refused.
    """
    shares = [{name: 0.25, f"{name}2": 0.75}, {name: 2.0, f"{name}2": -1.0}]
    if name in REFUSED:
        for mix in [*shares, {name: 0.5, "lora": 1.0}]:
            with pytest.raises(NotASum, match=name):
                logits(kinds, [mix])
        return
    whole, base = logits(kinds, [name])[0], logits(kinds, [None])[0]
    assert not near(base, whole)
    for mix in shares:
        assert near(logits(kinds, [mix, None])[0], whole), mix
    assert near(logits(kinds, [{name: 0.0}])[0], base)


def test_what_is_no_mix_is_refused(kinds: DecoderEngine) -> None:
    """Names that are not there, weights out of range, products of changes, positions that differ; nothing
    stays in memory.
    """
    before = kinds.adapters.digests
    for mix, error, what in (
        ({"lora": 1.0, "nobody": 1.0}, UnknownAdapter, "nobody"),
        ({}, ConfigError, "1 to 8"),
        ({"lora": float("nan")}, ConfigError, "nan"),
        ({"lora": -10.1}, ConfigError, "-10"),
        ({"lora": 1.0, "ia3": 1.0}, NotASum, "scale"),
        ({"lora": 1.0, "activated": 1.0}, NotASum, "positions"),
        (dict.fromkeys((*KINDS,)[:9], 1.0), ConfigError, "1 to 8"),
    ):
        with pytest.raises(error, match=what):
            kinds.add(PROMPT, mix)
    assert kinds.adapters.digests == before
    assert not kinds.busy


def test_a_refused_mix_leaves_nothing_behind(kinds: DecoderEngine) -> None:
    """The weights of a mix are whatever a client makes up."""
    for number in range(20):
        with pytest.raises(NotASum):
            kinds.add(PROMPT, {"lora": 1.0, "ia3": 0.5 + number / 100})
    assert not kinds.adapters._reading


def test_mixes_take_no_packs_place(engine: DecoderEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither while they run nor afterwards: a client that makes up mixes costs others no reading of their
    adapters.
    """
    packs = {engine.adapters.pack(name).id for name in ("alpha", "beta", "gamma")}
    for name in ("alpha", "beta", "gamma"):
        engine.adapters.release(engine.adapters.acquire(engine.adapters.pack(name)))
    size = sum(one.nbytes for one in engine.adapters._resident.values() if one.digest in packs)
    monkeypatch.setattr(engine.adapters, "budget", size)
    for number in range(12):
        engine.add(PROMPT, {"alpha": 0.1 * number + 0.05, "beta": -1.0}, max_new_tokens=2)
        assert packs <= set(engine.adapters.digests)
        while engine.busy and number % 3 == 2:
            engine.step()
    assert engine.adapters.nbytes <= size


def test_mixes_live_as_long_as_their_adapters(kinds: DecoderEngine, tmp_path: Path) -> None:
    """A mix is kept for later rows, one for each weight, and given up when one of its adapters is unloaded; a
    row that runs has it still. One adapter with the weight 1 is itself.
    """
    pack = kinds.adapters.pack("lora").called("passing")
    other = kinds.adapters.pack("loha")
    kinds.adapters.load(ap.load(pack.path).renamed("passing"))
    request = kinds.add(PROMPT, {"passing": 0.5, "loha": 0.5}, max_new_tokens=3)
    digest = f"{other.id}*0.5+{kinds.adapters.pack('passing').id}*0.5"
    events = kinds.step()
    kinds.adapters.unload("passing")
    while kinds.busy:
        events += kinds.step()
    assert {event.adapter for event in events if event.request == request} == {digest}
    assert events[-1].finish_reason in ("length", "stop")
    assert digest not in kinds.adapters.digests
    for weight in (0.5, 0.25, 0.5):
        kinds.adapters.release(kinds.adapters.acquire(kinds.adapters.of_row({"lora": weight, "loha": 1.0})))  # type: ignore[arg-type]
    assert sum("*" in one for one in kinds.adapters.digests) >= 2
    assert kinds.adapters.of_row({"lora": 1.0}) is kinds.adapters.pack("lora")


def test_sessions_mix_as_engines_do(
    engine: DecoderEngine, base_of: Make, pack_of: Make, tmp_path: Path
) -> None:
    """A row of ``generate`` may name several; on a bundle without the engine's graph that is an error."""
    session = ap.Session(engine.bundle.folder, "cpu")
    mix = {"alpha": 0.5, "beta": 2.0}
    answers = session.generate([PROMPT] * 3, [mix, None, "beta"], max_new_tokens=4)
    request = engine.add(PROMPT, mix, max_new_tokens=4)
    events = []
    while engine.busy:
        events += engine.step()
    assert answers[0].text == [event.text for event in events if event.request == request][-1]
    assert [answer.adapter for answer in answers] == ["alpha*0.5+beta*2.0", None, "beta"]
    assert session.generate([PROMPT], mix, max_new_tokens=4)[0].ids == answers[0].ids
    ap.export(base_of("llama"), [pack_of("llama", "alpha")], tmp_path / "plain", mode="bank", in_place=False)
    with pytest.raises(Unsupported, match="static-cache"):
        ap.Session(tmp_path / "plain", "cpu").generate([PROMPT], {"alpha": 0.5}, max_new_tokens=4)
    with pytest.raises(BaseMismatch):
        engine.add(PROMPT, ap.load(pack_of("bert", "alpha")))


def test_rows_of_all_kinds_answer_as_alone(kinds: DecoderEngine) -> None:
    """As rows come and go, ride along with the prompts of others and read ahead together, where their adapters
    can be in one pass, and where they cannot.
    """
    names = [None, "lora", "lora2", *KINDS, "lora", "activated", None, "lora2"]
    prompts = [[3 + (7 * number + place) % 5 for place in range(4 + number)] for number in range(len(names))]

    def answers(rows: Sequence[int]) -> dict[int, list[tuple[int, float]]]:
        number_of = {
            kinds.add(prompts[number], names[number], max_new_tokens=8, ignore_eos=True, logprobs=0): number
            for number in rows
        }
        found: dict[int, list[tuple[int, float]]] = {number: [] for number in rows}
        while kinds.busy:
            for event in kinds.step():
                assert event.error is None and event.choice is not None
                found[number_of[event.request]].append((event.choice.token, event.choice.logprob or 0.0))
        return found

    together = answers(range(len(names)))
    for number, name in enumerate(names):
        (alone,) = answers([number]).values()
        assert [token for token, _ in alone] == [token for token, _ in together[number]], name
        assert np.abs(np.array(alone) - np.array(together[number])).max() < 1e-4, name
