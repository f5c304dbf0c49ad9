"""The engine: rows come and go, and each is what it would be alone."""

from __future__ import annotations

import gc
import math
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from architecture_proofs import make_base, make_pack
from architectures import ARCHITECTURES, KINDS
from transformers import AutoModelForCausalLM

from adapterpack import LoRA, Session, adapt, export, load, save
from adapterpack.bundle.decoder_graph import DECODER
from adapterpack.bundle.manifest import GRAPH, PAST
from adapterpack.errors import (
    AdapterpackError,
    BaseMismatch,
    ConfigError,
    FormatError,
    UnknownAdapter,
    Unsupported,
)
from adapterpack.io import pinned_files as open_files
from adapterpack.io.safe_open import TENSORS
from adapterpack.io.streamed_tensors import Streamed
from adapterpack.runtime.engine import model_runner
from adapterpack.runtime.engine.adapter_feeds import ResidentAdapter
from adapterpack.runtime.engine.adapter_table import AdapterTable
from adapterpack.runtime.engine.engine import Engine
from adapterpack.runtime.engine.kv_pool import DeviceBuffer, HostBuffer, KVPool
from adapterpack.runtime.engine.requests import Event
from adapterpack.runtime.generation.sampling import Sampling
from adapterpack.runtime.providers.device import Device
from adapterpack.runtime.providers.resolved_device import resolve

Make = Callable[..., Any]
NAMES: list[str | None] = [None, "alpha", "beta", "gamma"]


@pytest.fixture(scope="module")
def bundle(base_of: Make, pack_of: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("engine") / "bundle"
    export(
        base_of("llama"),
        [pack_of("llama", name) for name in NAMES if name],
        folder,
        mode="bank",
        in_place=True,
    )
    return folder


@pytest.fixture
def engine(bundle: Path) -> Engine:
    return Engine(bundle, "cpu", max_rows=3, prefill_budget=4)


def finished(engine: Engine) -> dict[int, Event]:
    """The last event of every request, once all have ended."""
    return {event.request: event for event in drained(engine) if event.finish_reason}


def drained(engine: Engine) -> Iterator[Event]:
    while engine.busy:
        yield from engine.step()


def ids(seed: int, most: int = 20) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(3, 60) for _ in range(dice.randrange(1, most))]


@pytest.mark.parametrize("name", [None, "beta"])
def test_prompts_are_scored(
    bundle: Path, base_of: Make, pack_of: Make, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log-probability of every token of a prompt, and the likeliest in its place, are those of torch,
    whether a pass reads four tokens or gives logits for two; a row before it that began alike has read it in
    vain. One that is not scored takes that over, and says how much.
    """
    import torch

    from adapterpack import attach

    model = AutoModelForCausalLM.from_pretrained(base_of("llama")).eval()
    if name is not None:
        attach(model, pack_of("llama", name))
    prompt = [3 + (7 * place) % 50 for place in range(37)]
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([prompt])).logits[0, :-1].double(), -1).numpy()
    for most in (model_runner.LOGITS, 2 * expected.shape[1]):
        monkeypatch.setattr(model_runner, "LOGITS", most)
        engine = Engine(bundle, "cpu", max_rows=3, prefill_budget=4)
        for scores in (None, 2):
            (end,) = finished_of(engine, prompt, name, prompt_logprobs=scores)
        assert end.reused == 0 and [one.token for one in end.scored] == prompt
        assert end.scored[0] == (prompt[0], None, ())
        for place, (token, logprob, top) in enumerate(end.scored[1:]):
            assert logprob == pytest.approx(expected[place, token], abs=2e-5)
            assert [one for one, _ in top] == list(np.argsort(-expected[place], kind="stable")[:2])
            assert [value for _, value in top] == pytest.approx(np.sort(-expected[place])[:2] * -1, abs=2e-5)
        (end,) = finished_of(engine, prompt, name)
        assert (end.reused, end.scored) == (32, [])


def test_sessions_and_engines_take_any_rank(bundle: Path, base_of: Make, tmp_path: Path) -> None:
    """An adapter of a rank that the bank's slots do not hold is loaded by both, and both answer as the bundle
    does that was exported with it; the bank alone refuses to run it.
    """
    import torch

    model = AutoModelForCausalLM.from_pretrained(base_of("llama"))
    wide = adapt(model, LoRA(r=13, alpha=40), "wide")
    torch.manual_seed(3)
    for parameter in wide.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
    save(wide, tmp_path / "wide", base=base_of("llama"))
    export(base_of("llama"), [tmp_path / "wide"], tmp_path / "own", mode="bank")
    session, prompt = Session(bundle, "cpu"), ids(7)
    (expected,) = Session(tmp_path / "own", "cpu").generate([prompt], "wide", max_new_tokens=8)
    assert session.load(tmp_path / "wide") == "wide"
    (answer,) = session.generate([prompt], "wide", max_new_tokens=8)
    assert answer.ids == expected.ids != session.generate([prompt], max_new_tokens=8)[0].ids
    engine = Engine(bundle, "cpu")
    engine.adapters.load(tmp_path / "wide")
    engine.add(prompt, "wide", max_new_tokens=8)
    assert tuple(event.token for event in drained(engine) if event.token is not None) == expected.ids
    batch = {"input_ids": np.array([prompt])}
    with pytest.raises(Unsupported, match=r"does not fit its slot.*found 13"):
        session.run(batch, ["wide"])
    before = session.run(batch, ["alpha"])["logits"]
    session.unload("wide")
    assert np.array_equal(session.run(batch, ["alpha"])["logits"], before)


def finished_of(engine: Engine, prompt: list[int], name: str | None, **options: Any) -> list[Event]:
    engine.add(prompt, name, max_new_tokens=3, **options)
    return list(finished(engine).values())


def test_every_row_says_what_it_says_alone(bundle: Path) -> None:
    """Hundreds of adds, steps and cancellations in any order, on three rows and prompts longer than a step
    reads: text, reason and digest of each request are those of a run by itself, and nothing is left at the
    end.
    """
    engine, session, dice = (
        Engine(bundle, "cpu", max_rows=3, prefill_budget=5),
        Session(bundle, "cpu"),
        random.Random(5),
    )
    asked: dict[int, tuple[list[int], str | None, int]] = {}
    events: dict[int, list[Event]] = {}
    cancelled: set[int] = set()
    for _ in range(600):
        action = dice.random()
        if action < 0.25 and len(asked) < 120:
            prompt, name, most = ids(dice.randrange(10**6)), dice.choice(NAMES), dice.randrange(1, 12)
            asked[engine.add(prompt, name, max_new_tokens=most)] = prompt, name, most
        elif action < 0.3 and asked:
            number = dice.choice(list(asked))
            engine.cancel(number)
            cancelled.add(number)
        else:
            for event in engine.step():
                events.setdefault(event.request, []).append(event)
    for event in drained(engine):
        events.setdefault(event.request, []).append(event)
    assert len(asked) == 120
    assert events.keys() == asked.keys()
    broken = 0
    for number, (prompt, name, most) in asked.items():
        *before, last = events[number]
        assert all(event.finish_reason is None for event in before)
        assert {event.adapter for event in events[number]} == {
            None if name is None else session.pack(name).id
        }
        (alone,) = session.generate([prompt], [name], max_new_tokens=most)
        made = tuple(event.token for event in events[number] if event.token is not None)
        if last.finish_reason == "cancelled":
            assert number in cancelled
            assert made == alone.ids[: len(made)]
            broken += 1
        else:
            assert (made, last.text, last.finish_reason) == (alone.ids, alone.text, alone.finish_reason)
    assert broken
    assert not engine.rows.running and not engine.rows.reading
    assert all(adapter.users == 0 for adapter in engine.adapters._resident.values())


def test_logits_of_rows_among_others_are_those_of_rows_alone(bundle: Path) -> None:
    """float32 products of one row and of several round otherwise: 1e-5 of the largest logit."""
    together, alone = (Engine(bundle, "cpu", max_rows=count) for count in (4, 1))
    prompts = [ids(number) for number in range(4)]
    requests = [
        together.row(prompt, None if name is None else together.bundle.pack(name), Sampling())
        for prompt, name in zip(prompts, NAMES, strict=True)
    ]
    for request in requests:
        together.rows.admit(request.sequences[0])
    first = [together.rows.prefill(len(prompt)).copy() for prompt in prompts]
    for request in requests:
        request.sequences[0].next_token = 7
    second = together.rows.decode()
    for place, (prompt, name) in enumerate(zip(prompts, NAMES, strict=True)):
        single = alone.row(prompt, None if name is None else alone.bundle.pack(name), Sampling())
        alone.rows.admit(single.sequences[0])
        assert (
            np.abs(alone.rows.prefill(len(prompt)) - first[place]).max() <= 1e-5 * np.abs(first[place]).max()
        )
        single.sequences[0].next_token = 7
        assert np.abs(alone.rows.decode()[0] - second[place]).max() <= 1e-5 * np.abs(second[place]).max()
        alone.rows.remove(single.sequences[0])


def test_a_deterministic_row_has_its_bits_whatever_runs_beside_it(bundle: Path) -> None:
    """Tokens and log-probabilities of rows that come and go in any order, beside adapters of other ranks and
    prompts of several pieces, are to the last bit those of a row alone.
    """
    engine, dice = (
        Engine(bundle, "cpu", max_rows=5, max_length=64, prefill_budget=7, deterministic=True),
        random.Random(3),
    )
    asked = [(ids(seed, 30), dice.choice(NAMES)) for seed in range(10)]

    def answers(numbers: list[int]) -> dict[int, list[tuple[Any, ...]]]:
        waiting, of, found = [*numbers], dict[int, int](), {number: list[Any]() for number in numbers}
        while waiting or engine.busy:
            while waiting and dice.random() < 0.6:
                prompt, name = asked[waiting[-1]]
                of[engine.add(prompt, name, max_new_tokens=8, ignore_eos=True, logprobs=3)] = waiting.pop()
            for event in engine.step():
                found[of[event.request]].append(event.choice)
        return found

    alone = {number: answers([number])[number] for number in range(10)}
    assert all(len(one) == 8 for one in alone.values())
    for _ in range(30):
        together = answers(dice.sample(range(10), dice.randrange(2, 11)))
        assert together == {number: alone[number] for number in together}


def test_a_row_at_fault_ends_alone(engine: Engine) -> None:
    """ONNX Runtime refuses a token that the model does not have: in a prompt, and in the middle of a
    batch.
    """
    good = [engine.add(ids(1), "alpha", max_new_tokens=6), engine.add(ids(2), None, max_new_tokens=6)]
    bad = engine.row([5, 10**6], None, Sampling())
    engine.submit(bad)
    ends = finished(engine)
    assert ends[bad.number].finish_reason == "error" and "ONNX Runtime" in str(ends[bad.number].error)
    assert {ends[number].finish_reason for number in good} <= {"length", "stop"}
    requests = [
        engine.row([5, 6 + number], engine.bundle.pack("beta"), Sampling(max_new_tokens=9))
        for number in range(3)
    ]
    for request in requests:
        engine.submit(request)
    for _ in range(2):  # each reads two prompts
        engine.step()
    requests[1].sequences[0].next_token = 10**6
    ends = finished(engine)
    assert ends[requests[1].number].finish_reason == "error"
    session = Session(engine.bundle.folder, "cpu")
    for request in (requests[0], requests[2]):
        (alone,) = session.generate([list(request.sequences[0].prompt)], ["beta"], max_new_tokens=9)
        assert (ends[request.number].text, ends[request.number].finish_reason, request.answer.ids) == (
            alone.text,
            alone.finish_reason,
            alone.ids,
        )


def test_what_is_refused_before_a_row_begins(
    engine: Engine, bundle_of: Make, pack_of: Make, tmp_path: Path
) -> None:
    with pytest.raises(UnknownAdapter):
        engine.add("hello", "nobody")
    with pytest.raises(BaseMismatch):
        engine.add("hello", load(pack_of("bert", "alpha")))
    altered = Engine(shutil.copytree(engine.bundle.folder, tmp_path / "altered"), "cpu")
    with (tmp_path / "altered" / GRAPH).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(FormatError):
        altered.add([5], "alpha")
    with pytest.raises(ConfigError, match="context"):
        engine.add([5] * 1000)
    with pytest.raises(ConfigError, match="no tokens"):
        engine.add([])
    with pytest.raises(ConfigError, match="unknown sampling parameter"):
        engine.add("hello", warmth=3)
    with pytest.raises(ConfigError, match="longer than the engine's rows"):
        Engine(engine.bundle, max_length=8).add([5] * 9)
    with pytest.raises(ConfigError, match="not enough memory for the keys and values"):
        Engine(engine.bundle, max_rows=1 << 50)
    with pytest.raises(ConfigError, match="at least one row"):
        Engine(engine.bundle, max_rows=0)
    with pytest.raises(Unsupported, match="no graph for the engine"):
        Engine(bundle_of("llama", "bank"), "cpu")
    assert not engine.busy
    assert engine.adapters.nbytes == 0


def test_prompts_are_read_in_pieces_between_steps(bundle: Path) -> None:
    """A long prompt does not stop a row that is running: it gets a token in the pass over each piece, or without
    the operator for that in every other step.
    """
    engine, session = Engine(bundle, "cpu", max_rows=2, prefill_budget=3), Session(bundle, "cpu")
    prompt = next(
        prompt
        for prompt in map(ids, range(99))
        if len(session.generate([prompt], max_new_tokens=20)[0].ids) == 20
    )
    running = engine.add(prompt, max_new_tokens=20)
    while not engine.rows.running:
        engine.step()
    engine.add([9] * 31, "beta", max_new_tokens=2)
    steps = 1 if engine.rows.graph.ragged else 2
    for _ in range(10):
        assert sum(len(engine.step()) for _ in range(steps)) == 1
    assert running + 1 in {event.request for _ in range(2) for event in engine.step()}


def test_a_first_token_does_not_wait_for_the_prompts_behind_it(bundle: Path) -> None:
    """Of three prompts that come together each is read in a step of its own, unless they are short or the
    whole batch is what counts.
    """
    for length, together, first in ((40, False, 1), (40, True, 3), (10, False, 3)):
        engine = Engine(bundle, "cpu", max_rows=3, prefill_budget=200, prompts_together=together)
        asked = [engine.add([3 + number] * length, NAMES[number], max_new_tokens=3) for number in range(3)]
        steps = list[set[int]]()
        while engine.busy:
            steps.append({event.request for event in engine.step()})
        assert steps[0] == set(asked[:first])
        assert set().union(*steps[: 2 * 3]) == set(asked)


def test_rows_take_the_memory_of_what_is_written(bundle: Path) -> None:
    """A pool of 190 MB, of which a row of a few tokens takes a page for each of its heads."""
    pool = KVPool(Engine(bundle, "cpu").bundle.graph(DECODER), 8, 1 << 18)
    assert sum(math.prod(window[3]) for _, window in pool.windows(0, 8)) * 4 > 150 << 20
    pages = Path("/proc/self/statm")
    before = int(pages.read_text().split()[1])
    for name, window in pool.windows(0, 1):
        assert name.startswith(PAST) and window[3][0] == 1
    pool.write(0, [array + 1 for array in pool.read(0, 0, 20)])
    assert (int(pages.read_text().split()[1]) - before) * resource.getpagesize() < 8 << 20


@pytest.mark.parametrize("heads", [1, 2])
def test_what_is_read_of_a_pool_stays_as_it_was(heads: int) -> None:
    """Blocks of keys and values that are kept for later rows do not change with the row that they were read
    of.
    """
    value = SimpleNamespace(type="tensor(float)", shape=["rows", heads, "length", 8])
    graph = SimpleNamespace(
        memory=("cpu", 0), resolved=resolve(Device(provider="cpu")), inputs={f"{PAST}0.key": value}
    )
    pool = KVPool(graph, 2, 64)
    pool.write(1, [np.ones((heads, 32, 8), np.float32)])
    [block] = pool.read(1, 16, 32)
    pool.write(1, [np.zeros((heads, 32, 8), np.float32)])
    assert block.shape == (heads, 16, 8) and (block == 1).all()


def test_rows_of_a_device_are_copied_as_those_of_the_host() -> None:
    """By graphs, which run on any device: one row after another, or several at once."""
    made = (5, 2, 3, 4), np.dtype(np.float32)
    found = []
    for one in (HostBuffer(*made), DeviceBuffer(*made, resolve(Device(provider="cpu")))):
        for row in range(5):
            one.write(row, np.full((2, 2, 4), row + 1, np.float32), 1)
        one.move(1, 3, 3, rows=2)
        one.move(4, 0, 3)
        found.append([one.read(row, 0, 3) for row in range(5)])
    np.testing.assert_array_equal(*found)
    assert [int(row.max()) for row in found[0]] == [3, 2, 3, 2, 3]


def test_every_kind_of_slot_has_its_place(tmp_path: Path) -> None:
    """Rows with prompts, blocks, scales, rotations, routers ... in one batch, beside the ordinary graph's
    answers.
    """
    base = make_base(next(one for one in ARCHITECTURES if one.name == "llama"), tmp_path / "base")
    packs = [
        make_pack(next(one for one in ARCHITECTURES if one.name == "llama"), base, kind) for kind in KINDS
    ]
    bundle = export(base, packs, tmp_path / "bundle", mode="bank", task="text-generation", in_place=True)
    assert bundle.parity["decoder"]["max_relative"] < 1e-5
    assert len(packs) > 5


def test_adapters_come_go_and_are_exchanged_while_rows_run(bundle: Path, pack_of: Make) -> None:
    """Under one name two packs take turns, and others come and go: each request has the answer and the digest
    of the pack that had the name when it was added.
    """
    engine, session, dice = (
        Engine(bundle, "cpu", max_rows=3, adapter_budget=0),
        Session(bundle, "cpu"),
        random.Random(8),
    )
    packs = {name: session.pack(name).called("turn") for name in ("alpha", "beta")}
    engine.adapters.load(packs["alpha"])
    now, asked = "alpha", dict[int, tuple[list[int], str, int]]()
    events: dict[int, list[Event]] = {}
    for _ in range(300):
        action = dice.random()
        if action < 0.1:
            now = dice.choice(["alpha", "beta"])
            engine.adapters.load(packs[now], replace=True)
        elif action < 0.2 and "gamma" in engine.adapters.names:
            engine.adapters.unload("gamma")
        elif action < 0.25 and "gamma" not in engine.adapters.names:
            engine.adapters.load(session.pack("gamma"))
        elif action < 0.5:
            name, prompt = dice.choice(["turn", "gamma"]), ids(dice.randrange(10**6))
            if name == "gamma" and "gamma" not in engine.adapters.names:
                with pytest.raises(UnknownAdapter):
                    engine.add(prompt, name)
                continue
            asked[engine.add(prompt, name, max_new_tokens=5)] = prompt, now if name == "turn" else "gamma", 5
        else:
            for event in engine.step():
                events.setdefault(event.request, []).append(event)
    for event in drained(engine):
        events.setdefault(event.request, []).append(event)
    assert len(asked) > 40
    for number, (prompt, name, most) in asked.items():
        (alone,) = session.generate([prompt], [name], max_new_tokens=most)
        assert {event.adapter for event in events[number]} == {session.pack(name).id}
        assert events[number][-1].text == alone.text
    assert engine.adapters.digests == []  # no budget, no running row


def test_loading_is_proved_by_the_canary_and_leaks_nothing(
    engine: Engine, base_of: Make, pack_of: Make, tmp_path: Path
) -> None:
    """A pack whose canary fails gets no name; a thousand loads and unloads leave nothing."""
    pack = engine.bundle.pack("alpha")
    other = make_pack(
        next(one for one in ARCHITECTURES if one.name == "llama"),
        make_base(next(one for one in ARCHITECTURES if one.name == "llama"), tmp_path / "other"),
        KINDS[0],
    )
    with pytest.raises(BaseMismatch):
        engine.adapters.load(other)
    with pytest.raises(AdapterpackError, match="already has an adapter"):
        engine.adapters.load(pack)
    assert engine.adapters.load(pack, "later", pin=True) == pack.id
    engine.adapters.budget = 0
    assert engine.adapters.digests == [pack.id]
    engine.adapters.unpin("later")
    engine.adapters.unload("later")
    before = engine.adapters.nbytes
    for number in range(1000):
        engine.adapters.load(pack, f"n{number % 7}", replace=True)
        if number % 3 == 0:
            engine.adapters.unload(f"n{number % 7}")
    assert engine.adapters.nbytes == before == 0
    assert not engine.adapters._reading


def test_packs_that_no_row_runs_with_are_on_the_disk_alone(bundle: Path, tmp_path: Path) -> None:
    """A bundle's pack costs no memory until a row needs it; one that was changed meanwhile is refused, and
    the row that runs does not notice.
    """
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    engine, session, prompt = (
        Engine(folder, "cpu", max_rows=2, adapter_budget=0),
        Session(bundle, "cpu"),
        ids(3),
    )
    assert all(isinstance(engine.adapters.pack(name).tensors, Streamed) for name in engine.adapters.names)
    alone = {name: session.generate([prompt], [name], max_new_tokens=4)[0].text for name in ("alpha", "beta")}
    engine.add(prompt, "alpha", max_new_tokens=4)
    assert [event.text for event in drained(engine) if event.finish_reason] == [alone["alpha"]]
    engine.add(prompt, "beta", max_new_tokens=4)
    path = engine.adapters.pack("alpha").path / TENSORS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="not the one that its manifest lists"):
        engine.add(prompt, "alpha", max_new_tokens=4)
    assert [event.text for event in drained(engine) if event.finish_reason] == [alone["beta"]]


def test_packs_that_are_loaded_stay_what_they_are_though_their_folders_do_not(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pack that was loaded is on the disk alone, and its rows run on when its folder is removed; where the
    process may have no more files open its tensors stay in memory. Files are closed when packs are unloaded.
    """
    session, prompt = Session(bundle, "cpu"), ids(3)
    gc.collect()
    held = len(open_files._held)
    for room in (1, 0):
        monkeypatch.setattr(open_files, "room", lambda room=room: room)
        engine = Engine(bundle, "cpu", max_rows=2, adapter_budget=0)
        folder = tmp_path / f"pack{room}"
        shutil.copytree(session.pack("alpha").path, folder)
        engine.adapters.load(folder, "mine")
        assert isinstance(engine.adapters.pack("mine").tensors, Streamed) == bool(room)
        assert len(open_files._held) == held + room
        shutil.rmtree(folder)
        engine.add(prompt, "mine", max_new_tokens=4)
        (alone,) = session.generate([prompt], ["alpha"], max_new_tokens=4)
        assert [event.text for event in drained(engine) if event.finish_reason] == [alone.text]
        engine.adapters.unload("mine")
        gc.collect()
        assert len(open_files._held) == held


def resident(name: str, size: int) -> ResidentAdapter:
    return ResidentAdapter(name, name, {"slot": np.zeros(size, np.int8)}, {})


class Named:
    """What the table needs of a pack."""

    def __init__(self, name: str) -> None:
        self.id = name


@pytest.mark.fast
def test_the_table_gives_up_the_least_recently_used() -> None:
    read: list[str] = []

    def reader(pack: Any) -> ResidentAdapter:
        read.append(pack.id)
        return resident(pack.id, 10)

    a, b, c = (Named(name) for name in "abc")
    bundle: Any = SimpleNamespace(packs={name.id: name for name in (a, b, c)})
    table = AdapterTable(bundle, reader, lambda pack, adapter: None, budget=25)
    held = table.acquire(a)  # type: ignore[arg-type]
    table.release(table.acquire(b))  # type: ignore[arg-type]
    table.release(table.acquire(c))  # type: ignore[arg-type]
    assert table.digests == ["a", "c"]  # a row runs with the oldest
    table.pin("c")
    table.release(held)
    table.release(table.acquire(b))  # type: ignore[arg-type]
    assert table.digests == ["c", "b"]
    assert read == ["a", "b", "c", "b"]
    table.unload("c")
    assert table.digests == ["b"]
    assert table.nbytes == 10
    assert table.names == ["a", "b"]


def test_a_name_that_is_replaced_while_it_is_unloaded_leaves_no_pin(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pack that comes just when the one before is taken away is taken away whole: without a name nothing
    stays in memory for good.
    """
    table, other = engine.adapters, engine.adapters.pack("beta")
    table.unload("beta")
    lock = table._lock

    class Late:
        """The lock, just before which somebody else replaces the pack."""

        def __enter__(self) -> None:
            monkeypatch.setattr(table, "_lock", lock)
            table.load(other, "alpha", replace=True, pin=True)
            lock.acquire()

        def __exit__(self, *error: object) -> None:
            lock.release()

    monkeypatch.setattr(table, "_lock", Late())
    table.unload("alpha")
    assert "alpha" not in table.names
    assert (table._pinned, table.digests) == (set(), [])


def test_no_adapter_gets_a_name_that_another_has(engine: Engine) -> None:
    with pytest.raises(AdapterpackError, match="already has an adapter"):
        engine.adapters.rename("alpha", "beta")
    assert engine.adapters.pack("alpha").id != engine.adapters.pack("beta").id
    engine.adapters.rename("alpha", "omega")
    assert "alpha" not in engine.adapters.names
    engine.adapters.rename("omega", "omega")
    assert engine.adapters.pack("omega").name == "omega"
