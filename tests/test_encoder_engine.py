"""The engine of encoders: requests of any length, adapter and head run together, and each is what it would be
alone.
"""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_packs import LONG, packed, words

from adapterpack import Engine, Session, export, load, run
from adapterpack.bundle.manifest import GRAPH
from adapterpack.errors import (
    AdapterpackError,
    BaseMismatch,
    ConfigError,
    FormatError,
    UnknownAdapter,
    Unsupported,
)
from adapterpack.runtime.engine.encoder_batch import Bounds, EncoderRow, Padding, next_batch
from adapterpack.runtime.engine.encoder_engine import EncoderEngine
from adapterpack.runtime.engine.requests import Event
from adapterpack.tasks.one_pass import PreparedRow
from adapterpack.tasks.session import RowHead

Make = Callable[..., Any]


def finished(engine: Engine) -> dict[int, Event]:
    return {event.request: event for event in drained(engine)}


def drained(engine: Engine) -> Iterator[Event]:
    while engine.busy:
        yield from engine.step()


def probabilities(logits: np.ndarray) -> np.ndarray:
    """The softmax, or the logistic of one logit alone."""
    shares: np.ndarray = np.exp(logits - logits.max())
    return shares / shares.sum() if len(logits) > 1 else 1 / (1 + np.exp(-logits))


@pytest.fixture(scope="module")
def bank(bundle_of: Make) -> Path:
    """Classifiers with a bank of three adapters beside the base."""
    folder: Path = bundle_of("bert", "bank")
    return folder


@pytest.fixture(scope="module")
def features(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings, with two adapters as inputs."""
    folder = tmp_path_factory.mktemp("features")
    packs = [
        packed(tiny_bert, folder, "feature-extraction", name, r=rank)
        for name, rank in (("one", 2), ("another", 3))
    ]
    export(tiny_bert, packs, folder / "bundle", mode="inputs", task="feature-extraction")
    return folder / "bundle"


def test_every_request_is_what_it_is_alone(
    bank: Path, pack_of: Make, tiny_bert: Path, tmp_path: Path
) -> None:
    """500 requests in any order among steps, cancellations, bad rows, loads, unloads and exchanges, on a bank
    of three slots for four adapters with heads of one, two, three and five labels: scores are those of a run
    of the row by itself, by its own labels alone, and the digest is that of the pack that had the name when
    the request was added.
    """
    delta = packed(
        tiny_bert,
        tmp_path,
        "text-classification",
        "delta",
        ["relevant"],
        r=1,
        modules_to_save=("classifier",),
    )
    engine, session, dice = Engine(bank, "cpu", max_rows=6), Session(bank, "cpu"), random.Random(3)
    for pack in (pack_of("bert", "gamma"), delta):
        engine.adapters.load(pack)
    session.load(delta)
    packs = {name: engine.adapters.pack(name) for name in ("alpha", "beta", "gamma", "delta")}
    engine.adapters.load(packs["alpha"].called("turn"))
    now: dict[str, str | None] = {**{name: name for name in packs}, "turn": "alpha"}
    added, bad, refused = dict[int, tuple[dict[str, str], str | None]](), set[int](), 0
    events: dict[int, list[Event]] = {}

    def take(batch: list[Event]) -> None:
        for event in batch:
            events.setdefault(event.request, []).append(event)

    while len(added) + len(bad) < 500:
        action = dice.random()
        if action < 0.75:
            name = dice.choice([None, *now])
            row = dice.choice(
                [{"text": words(dice)}, {"text": words(dice, LONG // 2), "text_pair": words(dice, LONG // 2)}]
            )
            if name is not None and now[name] is None:
                with pytest.raises(UnknownAdapter):
                    engine.add(row, name)
                refused += 1
            else:
                added[engine.add(row, name)] = row, None if name is None else now[name]
        elif action < 0.79:
            bad.add(engine.add([5, 10**6], dice.choice([None, "beta"])))
        elif action < 0.82:
            with pytest.raises(ConfigError):
                engine.add(dice.choice(["", "w1 " * (LONG + 1), {"question": "w1"}, [], ["w1"]]), "beta")
            refused += 1
        elif action < 0.86 and added:
            engine.cancel(dice.choice(list(added)))
        elif action < 0.88:
            now["turn"] = dice.choice([*packs])
            engine.adapters.load(packs[now["turn"]].called("turn"), replace=True)
        elif action < 0.9:
            if now["gamma"] is None:
                engine.adapters.load(packs["gamma"])
                now["gamma"] = "gamma"
            else:
                engine.adapters.unload("gamma")
                now["gamma"] = None
        else:
            take(engine.step())
    take(list(drained(engine)))
    assert events.keys() == added.keys() | bad
    assert refused
    assert all(
        event.finish_reason == "error" and "ONNX Runtime" in str(event.error)
        for number in bad
        for event in events[number]
    )
    cancelled = 0
    for number, (row, name) in added.items():
        (event,) = events[number]
        assert event.adapter == (None if name is None else packs[name].id)
        if event.finish_reason == "cancelled":
            cancelled += 1
            continue
        assert (event.finish_reason, event.prompt_tokens) == ("stop", len(" ".join(row.values()).split()))
        labels = packs[name].manifest.task.labels if name else None
        if labels is None:
            assert event.result == {"label": None, "note": "the base has no trained head for this task"}
            continue
        inputs = (
            session.encode_pairs([(row["text"], row["text_pair"])])[0]
            if "text_pair" in row
            else session.encode([row["text"]])
        )
        shares = probabilities(session.run(inputs, name)["logits"][0, : len(labels)])
        assert list(event.result["scores"]) == list(labels)
        np.testing.assert_allclose(list(event.result["scores"].values()), shares, rtol=0, atol=1e-5)
        assert event.result["label"] == labels[int(shares.argmax())]
    assert 5 < cancelled < 100
    assert all(adapter.users == 0 for adapter in engine.adapters._resident.values())
    assert engine.padding.share < 0.1
    assert engine.padding.rows == len(added) - cancelled


def test_mixes_take_no_packs_slot(tiny_bert: Path, tmp_path: Path) -> None:
    """A client that makes up mixes costs others' adapters one slot of three, in one batch or in many."""
    names = ("alpha", "beta", "gamma")
    packs = [packed(tiny_bert, tmp_path, "feature-extraction", name, r=2) for name in names]
    export(tiny_bert, packs, tmp_path / "bank", mode="bank", task="feature-extraction", max_rank=4)
    engine = EncoderEngine(tmp_path / "bank", "cpu")

    def slots() -> set[str]:
        return {name for name in names if engine.adapters.pack(name).id in engine._batches._slots}  # type: ignore[attr-defined]

    for together in (False, True):
        for name in names:
            engine.add("w1 w2", name)
            finished(engine)
        assert slots() == {*names}
        for number in range(9):
            engine.add("w1 w2", {"alpha": 0.5, "beta": 1 + number / 8})
            if not together:
                finished(engine)
        assert all(event.finish_reason == "stop" for event in finished(engine).values())
        assert slots() == {"beta", "gamma"}


def test_threads_add_and_load_while_one_steps(bank: Path, pack_of: Make) -> None:
    """Two threads add requests, a third loads, replays the canary of, and unloads a pack that takes slots
    from those of running rows.
    """
    engine, session = Engine(bank, "cpu", max_rows=4), Session(bank, "cpu")
    gamma, ended, rows = load(pack_of("bert", "gamma")), dict[int, Event](), dict[int, tuple[str, str]]()
    assert gamma.manifest.canary is not None

    def add(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(60):
            text, name = words(dice), dice.choice(["alpha", "beta"])
            rows[engine.add(text, name)] = text, name

    def change() -> None:
        for number in range(20):
            engine.adapters.load(gamma, f"g{number}")
            engine.add("w1 w2", f"g{number}")
            engine.adapters.unload(f"g{number}")

    threads = [
        threading.Thread(target=add, args=(1,)),
        threading.Thread(target=add, args=(2,)),
        threading.Thread(target=change),
    ]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 600
    while (any(thread.is_alive() for thread in threads) or engine.busy) and time.monotonic() < until:
        ended |= {event.request: event for event in engine.step()}
    assert len(ended) == 140
    assert sum(event.adapter == gamma.id for event in ended.values()) == 20
    for number, (text, name) in rows.items():
        shares = probabilities(
            session.run(session.encode([text]), name)["logits"][0, : len(session.labels(name) or ())]
        )
        np.testing.assert_allclose(list(ended[number].result["scores"].values()), shares, rtol=0, atol=1e-5)
        assert ended[number].adapter == session.pack(name).id
    assert gamma.id not in engine.adapters.digests


def test_embeddings_are_pooled_cut_and_normalized(features: Path, tiny_bert: Path, tmp_path: Path) -> None:
    """On adapters as inputs: the mean over a row's own tokens, as the row has it alone, of the length 1 where
    that is wanted.
    """
    engine, session, dice = (
        Engine(features, "cpu", max_padding=0.25),
        Session(features, "cpu"),
        random.Random(4),
    )
    wanted = {}
    for _ in range(60):
        text, name = words(dice), dice.choice([None, "one", "another"])
        options = dice.choice([{}, {"normalize": True}, {"dimensions": 7}])
        wanted[engine.add(text, name, **options)] = text, name, options
    passes = 0
    for number, event in finished(engine).items():
        text, name, options = wanted[number]
        vector = session.run(session.encode([text]), name)["last_hidden_state"][0].mean(0)[
            : options.get("dimensions")
        ]
        expected = vector / np.linalg.norm(vector) if options else vector
        np.testing.assert_allclose(event.result["embedding"], expected, rtol=0, atol=1e-5)
        assert event.adapter == (None if name is None else session.pack(name).id)
        passes += 1
    assert passes == 60
    assert engine.padding.passes < 60 / 3
    for options, match in (
        ({"dimensions": 25}, "at most 24"),
        ({"dimensions": 0}, "from 1"),
        ({"normalize": 1}, "must be true or false"),
        ({"dimension": 3}, "did you mean 'dimensions'"),
    ):
        with pytest.raises(ConfigError, match=match):
            engine.add("w1", **options)
    strange = packed(tiny_bert, tmp_path, "feature-extraction", "strange", r=1)
    with pytest.raises(Unsupported, match="at export"):
        engine.adapters.load(strange)


def test_batches_keep_to_their_bounds_and_to_the_oldest() -> None:
    """Rows of random lengths, two forms and five adapters of which three go together: whatever is formed has
    the row that has waited longest, no more rows, positions and padding than allowed, and adapters that fit.
    """
    dice, bounds = random.Random(6), Bounds(8, 300, 0.2)
    adapters = [None, *(object() for _ in range(4))]
    waiting = []
    for number in range(400):
        array = np.ones((1, 400 if number == 9 else dice.randrange(1, 100)), np.int64)
        inputs = {"input_ids": array, **({"token_type_ids": array} if dice.random() < 0.3 else {})}
        waiting.append(
            EncoderRow(number, PreparedRow(inputs), None, RowHead(False, None), dice.choice(adapters))
        )
    padding, sizes = Padding(), []
    while waiting:
        batch = next_batch(waiting, bounds, lambda together: len(together) <= 3)
        assert batch[0] is waiting[0]
        assert len({row.form for row in batch}) == 1
        assert len({row.adapter for row in batch}) <= 3
        one = Padding()
        one.count(batch)
        assert len(batch) <= 8
        assert one.share <= 0.2
        assert one.tokens + one.padding <= 300 or len(batch) == 1
        padding.count(batch)
        sizes.append(len(batch))
        waiting = [row for row in waiting if row not in batch]
    assert (sum(sizes), padding.rows, padding.passes) == (400, 400, len(sizes))
    assert np.mean(sizes) > 4


def test_rows_in_files_of_any_length_come_back_in_order(bank: Path) -> None:
    """``run`` reads some batches ahead and puts rows of about one length together; what stops it is said
    behind the rows before, with the number of the row; a batch of one reads nothing ahead.
    """
    dice, session, read = random.Random(7), Session(bank, "cpu"), []

    def rows(count: int) -> Iterator[dict[str, Any]]:
        for number in range(count):
            read.append(number)
            yield {"text": words(dice, 20), "adapter": dice.choice([None, "alpha", "beta"]), "id": number}

    found = list(run(bank, rows(90), provider="cpu", batch_size=4))
    assert [row["id"] for row in found] == list(range(90))
    for row in found:
        assert row["pack"] == (None if row["adapter"] is None else session.pack(row["adapter"]).id)
        if row["adapter"] is not None:
            logits = session.run(session.encode([row["text"]]), row["adapter"])["logits"][
                0, : len(row["scores"])
            ]
            np.testing.assert_allclose(list(row["scores"].values()), probabilities(logits), rtol=0, atol=1e-5)
    read.clear()
    assert next(run(bank, rows(9), provider="cpu", batch_size=1))["id"] == 0
    assert read == [0]
    broken = run(bank, [*rows(5), {"text": "", "adapter": "beta"}, *rows(5)], provider="cpu", batch_size=4)
    assert [next(broken)["id"] for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match=r"no tokens \(at row 6"):
        next(broken)


def test_what_is_refused(bank: Path, pack_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind of engine follows the task's answer; adapters of other bases and names that are taken get no
    name; a file of the bundle that is written after it was opened is not read.
    """
    engine = Engine(bank, "cpu")
    assert isinstance(engine, EncoderEngine)
    for options in ({"max_rows": 0}, {"max_tokens": 0}, {"max_padding": 1.0}):
        with pytest.raises(ConfigError, match="at least one row"):
            Engine(engine.bundle, **options)
    with pytest.raises(BaseMismatch):
        engine.adapters.load(pack_of("llama", "alpha"))
    with pytest.raises(BaseMismatch, match="another base"):
        engine.add("w1", load(pack_of("llama", "alpha")))
    with pytest.raises(AdapterpackError, match="already has an adapter"):
        engine.adapters.load(pack_of("bert", "alpha"))
    assert engine.adapters.names == ["alpha", "beta"]
    monkeypatch.setattr(engine.bundle, "task", replace(engine.bundle.task, answer=lambda *batch: []))
    with pytest.raises(Unsupported, match="no engine runs this task"):
        Engine(engine.bundle)
    with pytest.raises(Unsupported, match="one pass"):
        EncoderEngine(engine.bundle)
    altered = Engine(shutil.copytree(bank, tmp_path / "altered"), "cpu")
    with (tmp_path / "altered" / GRAPH).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(FormatError):
        altered.add("w1", "alpha")
