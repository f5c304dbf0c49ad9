"""Attacks on a running session: adapters that are exchanged under one name, and files that are exchanged
after they were verified.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attack import Attacks

Make = Callable[[str, str], Path]
ROW = [5, 7, 8, 30, 31]
"""With an invocation of the activated adapter in it."""


@pytest.fixture(scope="module")
def packs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    import torch
    from transformers import AutoModelForCausalLM

    import adapterpack as ap

    configs: dict[str, Any] = {
        "lora": ap.LoRA(r=3),
        "other": ap.LoRA(r=2),
        "prefix": ap.PrefixTuning(num_virtual_tokens=5),
        "soft": ap.PromptTuning(num_virtual_tokens=3),
        "activated": ap.ALoRA(r=3, alpha=5, alora_invocation_tokens=(7, 8)),
    }
    folder = tmp_path_factory.mktemp("session-packs")
    for seed, (name, config) in enumerate(configs.items()):
        model = ap.adapt(AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), config, name)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.5 * torch.randn(parameter.shape, generator=noise))
        ap.save(model, folder / name, base=tiny_llama)
    return {name: str(folder / name) for name in configs}


@pytest.fixture(scope="module")
def bank(packs: Mapping[str, str], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from adapterpack import export

    folder = tmp_path_factory.mktemp("session-bundles") / "bank"
    export(tiny_llama, [packs["activated"]], folder, slots=6, max_rank=3, in_place=True)
    return folder


def exchanged(
    session: Any, one: str, two: str, answer: Callable[[Any], Any], equal: Callable[[Any, Any], bool]
) -> None:
    """Two packs take turns under one name while four threads run rows: each answer is that of one of them, or
    an error says that there is none at the moment.
    """
    from adapterpack.errors import UnknownAdapter

    known = []
    for pack in (one, two):
        session.load(pack, "name")
        known.append(answer(session))
        session.unload("name")
    assert not equal(*known), "the two packs must differ"
    stop, wrong, count = threading.Event(), [], [0, 0]

    def run() -> None:
        while not stop.is_set():
            try:
                found = answer(session)
            except UnknownAdapter:
                time.sleep(0.001)
                continue
            places = [place for place, other in enumerate(known) if equal(found, other)]
            if not places:
                wrong.append(found)
                stop.set()
            else:
                count[places[0]] += 1

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(6):
        for place, pack in enumerate((one, two)):
            before = count[place]
            session.load(pack, "name")
            while count[place] == before and not stop.is_set():  # other rows are in the middle of theirs then
                time.sleep(0.001)
            session.unload("name")
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong, f"an answer of neither: {wrong[0]}"
    assert all(count), f"both answered: {count}"


def logits(folder: str, one: str, two: str) -> None:
    from adapterpack import Session, load

    exchanged(
        Session(folder, "cpu"),
        load(one),
        load(two),
        lambda session: session.run({"input_ids": np.array([ROW])}, "name")["logits"],
        lambda a, b: bool(np.abs(a - b).max() < 1e-4),
    )


def tokens(folder: str, one: str, two: str) -> None:
    from adapterpack import Session, load

    exchanged(
        Session(folder, "cpu"),
        load(one),
        load(two),
        lambda session: session.generate([ROW], "name", max_new_tokens=6)[0].ids,
        lambda a, b: a == b,
    )


def run_row(session: Any, row: Mapping[str, Any], **sampling: Any) -> Any:
    """The result of one row as ``run`` gives it."""
    from adapterpack.runtime.sessions.run import RowRunner

    (outcome,) = RowRunner(session, (), 1, sampling).outcomes([(1, row)])
    if outcome.error is not None:
        raise outcome.error
    return outcome.result


def results(folder: str, one: str, two: str) -> None:
    """As ``run`` gives them: with the id of the pack that answered."""
    from adapterpack import Session, load

    def answer(session: Any) -> Any:
        result = run_row(session, {"prompt": "w1 w2 w3", "adapter": "name"}, max_new_tokens=3)
        return result["pack"], result["completion"]

    exchanged(Session(folder, "cpu"), load(one), load(two), answer, lambda a, b: a == b)


def labels(folder: str, one: str, two: str) -> None:
    """The labels of a row are those of the adapter that answered."""
    from adapterpack import Session, load

    def answer(session: Any) -> Any:
        result = run_row(session, {"text": "w1 w2 w3", "adapter": "name"})
        return result["pack"], result["label"], sorted(result["scores"])

    exchanged(Session(folder, "cpu"), load(one), load(two), answer, lambda a, b: a == b)


CASES: list[tuple[Any, tuple[str, str]]] = [
    (logits, ("prefix", "lora")),
    (logits, ("soft", "prefix")),
    (logits, ("lora", "other")),
    (logits, ("activated", "lora")),
    (logits, ("activated", "prefix")),
]
CASES += [(tokens, ("soft", "prefix")), (tokens, ("activated", "prefix")), (results, ("prefix", "lora"))]


@pytest.mark.parametrize(
    ("what", "pair"), CASES, ids=[f"{what.__name__}-{one}-{two}" for what, (one, two) in CASES]
)
def test_two_adapters_in_turn_under_one_name(
    attacks: Attacks, bank: Path, packs: Mapping[str, str], what: Any, pair: tuple[str, str]
) -> None:
    attacks.call(what, str(bank), *(packs[name] for name in pair)).harmless()


def test_two_classifiers_in_turn_under_one_name(attacks: Attacks, bundle_of: Make, pack_of: Make) -> None:
    attacks.call(
        labels, str(bundle_of("bert", "bank")), str(pack_of("bert", "alpha")), str(pack_of("bert", "beta"))
    ).harmless()


def unloaded_meanwhile(folder: str, pack: str) -> None:
    """The adapter of a row is unloaded, and another takes its slot and name, at every token of its answer in
    turn.
    """
    from adapterpack import Session, load

    one = load(pack)
    session = Session(folder, "cpu")
    session.load(one, "row")
    right = session.generate([ROW], "row", max_new_tokens=6)[0].ids
    for moment in range(1, 6):
        count = [0]

        def emit(row: int, token: int, text: str, count: list[int] = count, moment: int = moment) -> None:
            count[0] += 1
            if count[0] == moment:
                session.unload("row")

        found = session.generate([ROW], "row", max_new_tokens=6, emit=emit)[0].ids
        assert found == right, f"unloaded at token {moment}: {found}, not {right}"
        session.load(one, "row")


@pytest.mark.parametrize("name", ["prefix", "soft", "lora", "activated"])
def test_an_adapter_unloaded_while_its_row_answers(
    attacks: Attacks, bank: Path, packs: Mapping[str, str], name: str
) -> None:
    attacks.call(unloaded_meanwhile, str(bank), packs[name]).harmless()


def file_exchanged(folder: str, name: str, other: str, adapter: str, in_place: bool, first: bool) -> None:
    """Opens a session, exchanges a file, and runs a row, which answers as before or not at all; ``first``:
    nothing ran before.
    """
    from adapterpack import Session

    right = Session(folder, "cpu").generate([ROW], adapter, max_new_tokens=4)[0].ids
    session = Session(folder, "cpu")
    if not first:
        session.generate([ROW], adapter, max_new_tokens=4)
    path = Path(folder, name)
    data = Path(other).read_bytes() if other else b"\0" * path.stat().st_size
    if in_place:
        with path.open("r+b") as file:
            file.write(data)
            file.truncate()
    else:
        path.with_name("new").write_bytes(data)
        path.with_name("new").rename(path)
    found = session.generate([ROW], adapter, max_new_tokens=4)[0].ids
    assert found == right, f"{found}, not {right}"


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("in_place", [True, False], ids=["written over", "exchanged"])
def test_an_adapter_file_of_a_running_session(
    attacks: Attacks, bundle_of: Make, in_place: bool, first: bool
) -> None:
    folder = shutil.copytree(bundle_of("llama", "inputs"), attacks.work / "bundle")
    outcome = attacks.call(
        file_exchanged,
        str(folder),
        "adapters/alpha.onnx_adapter",
        str(folder / "adapters/beta.onnx_adapter"),
        "alpha",
        in_place,
        first,
    )
    if first:  # the first row has more files read, and with them all are looked at again
        outcome.refused("not the one that its manifest lists")
    else:
        outcome.harmless()


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "generation_config.json", "step.onnx"])
def test_a_file_that_is_read_later(attacks: Attacks, bank: Path, name: str) -> None:
    """What a session reads when it first needs it is what was verified when it was opened, or refused."""
    folder = shutil.copytree(bank, attacks.work / "bundle")
    if not (folder / name).exists():
        name = "tokenizer.json"
    attacks.call(file_exchanged, str(folder), name, "", "activated", False, True).refused()


def read_later(folder: str, name: str, adapter: str) -> None:
    """A file is exchanged after the tokenizer was opened, and before what the file says of it is needed."""
    from adapterpack import Session

    session = Session(folder, "cpu")
    session.tokenizer.encode("w1")
    Path(folder, name).write_text("{}")
    session.generate([ROW], adapter, max_new_tokens=4)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_what_else_is_said_of_texts(attacks: Attacks, bank: Path, name: str) -> None:
    folder = shutil.copytree(bank, attacks.work / "bundle")
    attacks.call(read_later, str(folder), name, "activated").refused("not the one that its manifest lists")


def weights_exchanged(folder: str, pack: str) -> None:
    """Weights that another pack is computed with are exchanged before it is loaded."""
    from adapterpack import Session, load

    session, loaded = Session(folder, "cpu"), load(pack)
    path = Path(folder, "model.onnx.data")
    path.with_name("new").write_bytes(b"\0" * path.stat().st_size)
    path.with_name("new").rename(path)
    session.load(loaded, "late")


def test_weights_exchanged_before_a_prompt_is_loaded(
    attacks: Attacks, bank: Path, packs: Mapping[str, str]
) -> None:
    folder = shutil.copytree(bank, attacks.work / "bundle")
    attacks.call(weights_exchanged, str(folder), packs["soft"]).refused("not the one that its manifest lists")
