"""Running bundles: hot load and unload, threads, errors, the validator, rows in and out, what is imported,
and CUDA.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from ml_dtypes import bfloat16
from msgspec.structs import replace
from transformers import AutoModelForCausalLM

from adapterpack import DoRA, LoRA, Session, active, adapt, export, load, run, save, validate
from adapterpack._native import row_lora
from adapterpack.adapter_methods import Site, get
from adapterpack.base.checkpoint import Checkpoint
from adapterpack.bundle import DECODER, graph_file, proofs
from adapterpack.bundle.manifest import FILE_NAME, GRAPH, read_bundle
from adapterpack.cli.main import main
from adapterpack.errors import (
    AdapterpackError,
    BaseMismatch,
    ConfigError,
    FormatError,
    ProviderError,
    StorageError,
    UnknownAdapter,
    Unsupported,
)
from adapterpack.io import file_hashes, hashing, strict_json
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import Pack, build
from adapterpack.pack.validate import validation
from adapterpack.pack.validate.checks.context import Budget
from adapterpack.runtime import open_bundle
from adapterpack.runtime.padding import pad
from adapterpack.runtime.providers import builtin
from adapterpack.slots.precision import ABSENT
from adapterpack.slots.values import pack_values

Make = Callable[..., Any]
WORDS = ("w1 w2 w3 w9", "w5 w6", "w7 w8 w30 w31 w32 w33")


def batch_of(lengths: tuple[int, ...] = (5, 9, 3), left: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(8)
    return pad([list(map(int, rng.integers(3, 96, length))) for length in lengths], 0, left=left)


def expect(dense_of: Make, batch: dict[str, np.ndarray], names: list[str | None]) -> list[np.ndarray]:
    """Each row's real logits by the float64 model of its adapter."""
    inputs = {key: torch.from_numpy(value) for key, value in batch.items()}
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return [
            dense_of("llama", name)(**inputs).logits[row].numpy()[batch["attention_mask"][row] > 0]
            for row, name in enumerate(names)
        ]


def check(
    session: Session, dense_of: Make, names: list[str | None], called: dict[str, str] | None = None
) -> None:
    """The session's rows equal the float64 model's within 5e-5 on logits of size 3; ``called`` gives the
    names that it knows.
    """
    batch = batch_of()
    found = session.run(batch, [(called or {}).get(name or "", name) for name in names])["logits"]
    for row, expected in enumerate(expect(dense_of, batch, names)):
        np.testing.assert_allclose(found[row][batch["attention_mask"][row] > 0], expected, rtol=0, atol=5e-5)


def pack_for(
    base: Path, path: str, wide: int, out: int, rank: int = 1, name: str = "odd", known: bool = True
) -> Pack:
    """A pack with one site; ``known``: it carries the fingerprint of the base."""
    params = {
        "lora_A": np.full((rank, wide), 0.1, np.float32),
        "lora_B": np.full((out, rank), 0.1, np.float32),
    }
    finger = Checkpoint(base).fingerprint() if known else (None, None)
    return build(
        name,
        get("lora"),
        {Site(path, wide, out): (LoRA(r=rank), params)},
        task=m.PackTask("text-generation"),
        base=m.Base("tiny", None, None, *finger),
    )


# Hot load and unload.


def test_a_third_pack_into_a_running_bank(bundle_of: Make, pack_of: Make, dense_of: Make) -> None:
    """Load, mix, unload, load into the freed slot: every row equals its own float64 model at every moment."""
    session = Session(bundle_of("llama", "bank"), "cpu")
    check(session, dense_of, ["alpha", None, "beta"])
    assert session.load(pack_of("llama", "gamma")) == "gamma"
    assert session.adapters == ["alpha", "beta", "gamma"]
    check(session, dense_of, ["gamma", "alpha", "beta"])
    check(session, dense_of, [None, "gamma", None])
    session.unload("alpha")
    with pytest.raises(UnknownAdapter, match="'alpha'"):
        session.run(batch_of(), "alpha")
    check(session, dense_of, ["beta", None, "gamma"])
    assert session.load(load(pack_of("llama", "alpha")), "again") == "again"
    check(session, dense_of, ["alpha", "gamma", "beta"], {"alpha": "again"})
    session.unload("gamma")
    session.load(pack_of("llama", "beta"), "twin")
    # a name given here is no other adapter
    assert session.packs["twin"].id == load(pack_of("llama", "beta")).id
    check(session, dense_of, ["beta", None, "beta"], {"beta": "twin"})
    # the bundle itself is untouched
    check(Session(bundle_of("llama", "bank"), "cpu"), dense_of, ["alpha", None, "beta"])


def test_a_headless_pack_into_a_bank_of_classifiers(bundle_of: Make, pack_of: Make, dense_of: Make) -> None:
    """A pack without a head of its own gets the base's: two labels, the rest switched off."""
    session = Session(bundle_of("bert", "bank"), "cpu")
    session.load(pack_of("bert", "gamma"))
    batch = batch_of(left=False)
    found = session.run(batch, "gamma")["logits"]
    with torch.no_grad():
        expected = dense_of("bert", "gamma")(
            **{key: torch.from_numpy(value) for key, value in batch.items()}
        ).logits.numpy()
    np.testing.assert_allclose(found[:, :2], expected, rtol=0, atol=5e-5)
    assert (found[:, 2:] == ABSENT).all()
    assert session.labels("gamma") == ("LABEL_0", "LABEL_1")


def test_what_a_running_bank_refuses(bundle_of: Make, pack_of: Make, base_of: Make) -> None:
    """No free slot, too large a rank, another base, an unknown site, a taken name, too many labels: errors by
    name, and nothing changes.
    """
    session = Session(bundle_of("llama", "bank"), "cpu")
    llama, bert = base_of("llama"), base_of("bert")
    site, before = (
        "model.layers.0.self_attn.q_proj",
        session.run(batch_of(), ["alpha", None, "beta"])["logits"],
    )
    with pytest.raises(AdapterpackError, match="already has an adapter of that name"):
        session.load(pack_of("llama", "alpha"))
    with pytest.raises(
        Unsupported, match=r"does not fit.*q_proj\.down.*at most 6 on axis 1, found 7.*--max-rank"
    ):
        session.load(pack_for(llama, site, 32, 32, rank=7))
    with pytest.raises(BaseMismatch, match="another base"):
        session.load(pack_of("bert", "gamma"))
    with pytest.raises(BaseMismatch, match="another base"):
        session.load(pack_for(bert, site, 32, 32))
    with pytest.raises(Unsupported, match=r"no slot.*lm_head\.down"):
        session.load(pack_for(llama, "lm_head", 32, 96))
    with pytest.raises(BaseMismatch, match="another width"):  # a pack without digests is told by its shapes
        session.load(pack_for(llama, site, 16, 32, known=False))
    with pytest.raises(StorageError):
        session.load("no/such/pack")
    assert session.adapters == ["alpha", "beta"]
    session.load(pack_of("llama", "gamma"))
    with pytest.raises(Unsupported, match=r"no slot is free.*at most 3 adapters"):
        session.load(pack_of("llama", "gamma"), "fourth")
    with pytest.raises(UnknownAdapter, match="did you mean 'gamma'"):
        session.unload("gama")
    assert np.array_equal(session.run(batch_of(), ["alpha", None, "beta"])["logits"], before)


def test_a_folded_bundle_takes_no_packs(bundle_of: Make, pack_of: Make) -> None:
    """It says which mode does."""
    session = Session(bundle_of("llama", "folded"), "cpu")
    with pytest.raises(Unsupported, match="--mode bank"):
        session.load(pack_of("llama", "gamma"))
    with pytest.raises(Unsupported, match="folded into the weights"):
        session.unload("alpha")


def test_a_pack_into_a_graph_with_inputs(bundle_of: Make, pack_of: Make, dense_of: Make) -> None:
    """It gives what it gives in torch, among the others; a name is taken once, and one that is unloaded is
    gone.
    """
    session = Session(bundle_of("llama", "inputs"), "cpu")
    session.load(pack_of("llama", "gamma"))
    check(session, dense_of, ["gamma", None, "beta"])
    with pytest.raises(AdapterpackError, match="already has"):
        session.load(pack_of("llama", "gamma"))
    session.unload("alpha")
    assert session.adapters == ["beta", "gamma"]
    with pytest.raises(UnknownAdapter, match="beta"):
        session.run(batch_of(), "alpha")


def test_runs_keep_right_while_slots_change(bundle_of: Make, pack_of: Make, dense_of: Make) -> None:
    """Two threads run mixed batches while a third loads and unloads the free slot under changing contents: no
    row is ever another's.
    """
    session = Session(bundle_of("llama", "bank"), "cpu", threads=1)
    batch = batch_of()
    right = {name: expect(dense_of, batch, [name] * 3) for name in (None, "alpha", "beta", "gamma")}
    stop, wrong, runs = threading.Event(), [], [0, 0, 0]

    def watch(number: int, names: list[str | None]) -> None:
        while not stop.is_set():
            try:
                found = session.run(batch, names)["logits"]
            except UnknownAdapter:
                continue  # "extra" is not there at this moment, which is what we are told
            except Exception as error:
                wrong.append(error)
                return
            runs[number] += 1
            for row, name in enumerate(names):
                wanted = right["gamma" if name == "extra" else name][row]
                error = np.abs(found[row][batch["attention_mask"][row] > 0] - wanted).max()
                if error > 5e-5:
                    wrong.append((names, row, error))

    jobs: list[list[str | None]] = [
        ["alpha", None, "beta"],
        ["beta", "alpha", "beta"],
        ["extra", "alpha", "extra"],
    ]
    threads = [threading.Thread(target=watch, args=(number, names)) for number, names in enumerate(jobs)]
    for thread in threads:
        thread.start()
    gamma, beta = load(pack_of("llama", "gamma")), load(pack_of("llama", "beta"))
    for turn in range(1, 31):
        session.load(gamma, "extra")
        while min(runs) < turn and not wrong:
            threading.Event().wait(0.001)
        session.unload("extra")
        session.load(beta, "other")  # the same slot, filled with something else
        session.unload("other")
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert min(runs) >= 30
    assert session.adapters == ["alpha", "beta"]


def test_a_pack_that_reads_the_weights_has_the_graph_parsed_once(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many sites it has, and whether or not the bank was filled before: hot loads find the graph as
    it was parsed for the first.
    """
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    packs = [
        save(adapt(model, DoRA(r=2), name), None, adapter=name, base=tiny_llama, name=name)
        for name in ("one", "two", "three")
    ]
    assert len(list(packs[0].adapters())) == 14
    export(tiny_llama, packs[:1], tmp_path / "bank", slots=4)
    real, parsed = ir.load, list[Path]()
    monkeypatch.setattr(ir, "load", lambda path, *more: parsed.append(path) or real(path, *more))
    session = Session(tmp_path / "bank", "cpu")
    for pack in packs[1:]:
        session.load(pack)
    for_operator = [graph_file(DECODER)] if row_lora.LIBRARY else []
    assert parsed == [tmp_path / "bank" / name for name in (*for_operator, GRAPH)]
    batch = batch_of()
    with torch.no_grad():
        known = active(model, "three")(input_ids=torch.from_numpy(batch["input_ids"][1:2])).logits[0].numpy()
    np.testing.assert_allclose(
        session.run({"input_ids": batch["input_ids"][1:2]}, "three")["logits"][0], known, rtol=0, atol=5e-5
    )


class Slow(str):
    """A name that takes its time to be compared, so that other threads get their turn in the middle of what
    is done with it.
    """

    __slots__ = ()

    def __ne__(self, other: object) -> bool:
        time.sleep(0.02)
        return str.__ne__(self, other)


def test_no_slot_is_lost_among_threads(bundle_of: Make, pack_of: Make) -> None:
    """While one thread unloads, another loads: what it loaded is there, and afterwards every slot can be
    filled again.
    """
    session, pack = Session(bundle_of("llama", "bank"), "cpu"), load(pack_of("llama", "alpha"))
    session.unload("beta")
    for turn in range(8):
        session.load(pack, "old")
        thread = threading.Thread(target=session.unload, args=(Slow("old"),))
        thread.start()
        session.load(pack, f"new-{turn}")
        thread.join()
        assert session.adapters == ["alpha", f"new-{turn}"]
        session.unload(f"new-{turn}")
    for name in ("beta", "gamma"):
        session.load(pack, name)
    with pytest.raises(Unsupported, match="no slot is free"):
        session.load(pack, "surplus")


def test_what_has_begun_keeps_what_it_began_with(bundle_of: Make, pack_of: Make) -> None:
    """A generation whose adapter is unloaded, and whose slot is filled anew, between two tokens ends as if
    nothing had happened.
    """
    for mode in ("bank", "inputs"):
        session = Session(bundle_of("llama", mode), "cpu")
        prompts = [[5, 6, 7], [8, 9]]
        expected = [answer.ids for answer in session.generate(prompts, ["alpha", "beta"], max_new_tokens=8)]
        seen: list[int] = []

        def change(
            row: int,
            token: int,
            text: str,
            session: Session = session,
            mode: str = mode,
            seen: list[int] = seen,
        ) -> None:
            seen.append(row)
            if len(seen) == 3:
                session.unload("alpha")
                if mode == "bank":
                    session.load(pack_of("llama", "gamma"))

        found = session.generate(prompts, ["alpha", "beta"], max_new_tokens=8, emit=change)
        assert [answer.ids for answer in found] == expected
        assert "alpha" not in session.adapters


# Errors of a session.


def test_providers_are_chosen_and_checked(bundle_of: Make) -> None:
    """An unknown provider is named with what there is; cpu is cpu."""
    folder = bundle_of("llama", "bank")
    with pytest.raises(ProviderError, match=r"'tpu'.*cpu, cuda"):
        Session(folder, "tpu")
    assert Session(folder, "cpu").provider == "CPUExecutionProvider"


@pytest.mark.parametrize("believed", [False, True])
def test_cuda_never_becomes_cpu_silently(
    believed: bool, bundle_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no device, asking for CUDA is an error: at once, or, were a device believed in, by what
    the session really runs on.
    """
    if builtin.has_device():
        assert Session(bundle_of("llama", "bank"), "cuda").provider == "CUDAExecutionProvider"
        return
    if believed:
        monkeypatch.setattr(builtin, "has_device", lambda: True)
    with pytest.raises(ProviderError, match="cpu"):
        Session(bundle_of("llama", "bank"), "cuda")
    if not believed:
        assert Session(bundle_of("llama", "bank")).provider == "CPUExecutionProvider"


def test_device_bindings_give_the_same(bundle_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that keeps a cache on its device, taken here with the CPU as the device: same logits, same
    cache, slots honoured.
    """
    session = Session(bundle_of("llama", "bank"), "cpu")
    names = ["alpha", None, "beta"]
    expected = session.run(batch_of(), names)
    calls = []
    bound = session.graph("model")._bound
    opened = session.graph("model")._ort
    monkeypatch.setattr(opened, "run_with_ort_values", lambda outputs, feeds: calls.append(1) or bound(feeds))
    found = session.run(batch_of(), names)
    assert calls == [1]
    assert set(found) == set(expected)
    assert all(np.array_equal(found[key], value) for key, value in expected.items())


def test_adapters_of_a_run(bundle_of: Make) -> None:
    """Unknown names come with the nearest; the number of names is the number of rows; names are texts."""
    session = Session(bundle_of("llama", "bank"), "cpu")
    with pytest.raises(UnknownAdapter, match=r"'alhpa'.*did you mean 'alpha'"):
        session.run(batch_of(), ["alhpa", None, None])
    with pytest.raises(ConfigError, match="expected 3, found 2"):
        session.run(batch_of(), ["alpha", None])
    for odd in (5, ["alpha"], b"alpha"):
        with pytest.raises(ConfigError, match="named by a text"):
            session.run(batch_of(), [odd, None, None])
    folded = Session(bundle_of("llama", "folded"), "cpu")
    with pytest.raises(Unsupported, match="no base"):
        folded.run(batch_of(), ["alpha", None, "alpha"])
    with pytest.raises(Unsupported, match="no base"):
        folded.run(batch_of(), [None, None, None])
    assert np.array_equal(folded.run(batch_of())["logits"], folded.run(batch_of(), "alpha")["logits"])
    assert (folded.default, session.default) == ("alpha", None)


def test_inputs_of_a_run(bundle_of: Make) -> None:
    """Missing, unknown and ill-shaped inputs are named, the graph's own words included."""
    session, batch = Session(bundle_of("llama", "bank"), "cpu"), batch_of()
    ids = batch["input_ids"]
    bad: list[tuple[dict[str, Any], str]] = [
        ({}, "inputs are missing.*input_ids"),
        ({"attention_mask": ids}, "input_ids.*found attention_mask"),
        ({"input_ids": ids, "token_type_ids": ids}, "does not take.*found token_type_ids"),
        ({"input_ids": ids, "adapter_ids": np.zeros(3, np.int64)}, "adapters="),
        ({"input_ids": ids[0]}, r"\(9,\)"),
        ({"input_ids": ids[:0]}, r"\(0, 9\)"),
        ({"input_ids": ids[:, :0]}, r"\(3, 0\)"),
        ({"input_ids": ids, "attention_mask": ids[:, 1:]}, r"expected \(3, 9\), found \(3, 8\)"),
        ({"input_ids": np.full((1, 3), 96)}, "ONNX Runtime could not run.*config"),
        (
            {"input_ids": ids, "past_key_values.0.key": np.zeros((3, 2, 1, 9), np.float32)},
            "expected|could not run",
        ),
    ]
    for inputs, text in bad:
        with pytest.raises(AdapterpackError, match=text):
            session.run(inputs)
    small = {"input_ids": ids.astype(np.int32), "attention_mask": batch["attention_mask"].astype(bool)}
    assert np.array_equal(session.run(small)["logits"], session.run(batch)["logits"])


def test_a_folder_that_is_no_bundle(tmp_path: Path, pack_of: Make) -> None:
    """A pack, an empty folder, a broken manifest: FormatError, which names the file."""
    for folder in (tmp_path, pack_of("llama", "alpha"), tmp_path / "none"):
        with pytest.raises(FormatError, match=FILE_NAME):
            Session(folder, "cpu")
    (tmp_path / FILE_NAME).write_text("{}")
    with pytest.raises(FormatError, match="schema"):
        Session(tmp_path, "cpu")


@pytest.fixture
def copied(bundle_of: Make, tmp_path: Path) -> Callable[[str, str], Path]:
    def copy(kind: str, mode: str) -> Path:
        return Path(shutil.copytree(bundle_of(kind, mode), tmp_path / f"{kind}-{mode}"))

    return copy


def flip(path: Path, at: int) -> None:
    """Changes one byte of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_altered_adapters_do_not_start(copied: Make, pack_of: Make) -> None:
    """A pack with one byte changed, another good pack in its place, and a changed or missing .onnx_adapter:
    FormatError at the start.
    """
    folder = copied("llama", "bank")
    flip(folder / "adapters/alpha/adapter_model.safetensors", -1)
    with pytest.raises(FormatError):
        Session(folder, "cpu")
    shutil.rmtree(folder / "adapters/alpha")
    load(pack_of("llama", "gamma")).renamed("alpha").write(folder / "adapters/alpha")
    read_bundle(folder).write(folder)  # with the digests of what is there now
    with pytest.raises(FormatError, match="another adapter"):
        Session(folder, "cpu")
    folder = copied("llama", "inputs")
    file = folder / "adapters/beta.onnx_adapter"
    flip(file, -5)
    with pytest.raises(FormatError, match=r"beta\.onnx_adapter"):
        Session(folder, "cpu")
    file.unlink()
    with pytest.raises(FormatError, match=r"beta\.onnx_adapter"):
        Session(folder, "cpu")


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("model.onnx", lambda path: flip(path, -1), r"expected sha256 [0-9a-f]{64}, found [0-9a-f]{64}"),
        ("model.onnx.data", lambda path: flip(path, 50), r"expected sha256 [0-9a-f]{64}, found [0-9a-f]{64}"),
        (
            "model.onnx.data",
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            r"expected [0-9]+ bytes, found [0-9]+ bytes",
        ),
        ("tokenizer.json", lambda path: flip(path, 20), r"expected sha256"),
        ("config.json", lambda path: path.unlink(), r"expected [0-9]+ bytes, found no file"),
        ("chat_template.jinja", lambda path: path.write_text("{{ messages }}"), "does not list"),
    ],
)
def test_altered_files_do_not_start(
    name: str, change: Callable[[Path], Any], told: str, copied: Make
) -> None:
    """A graph, its weights, the tokenizer or a template that was altered, cut, taken away or added:
    FormatError, which names the file, what the manifest lists and what is there.
    """
    folder = copied("llama", "bank")
    Session(folder, "cpu")
    change(folder / name)
    with pytest.raises(FormatError, match=rf"{re.escape(name)}.*{told}|{told}.*{re.escape(name)}"):
        Session(folder, "cpu")


def test_an_adapter_file_that_is_written_over_changes_no_answer(copied: Make) -> None:
    """In inputs mode the file of one adapter is exchanged for that of another while the session is open: what
    was verified answers.
    """
    folder, batch = copied("llama", "inputs"), batch_of()
    session, names = Session(folder, "cpu"), ["alpha", None, "beta"]
    right = session.run(batch, names)["logits"]
    alpha, beta = (folder / f"adapters/{name}.onnx_adapter" for name in ("alpha", "beta"))
    with alpha.open("r+b") as file:
        file.write(beta.read_bytes())
    assert np.array_equal(session.run(batch, names)["logits"], right)
    with pytest.raises(FormatError, match=r"not the one that its manifest lists.*alpha\.onnx_adapter"):
        Session(folder, "cpu")


def test_a_graph_of_a_stranger_is_opened_in_a_sandbox_first_and_once(
    copied: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was exported here is opened at once; a manifest that was never seen has its graph tried first, and
    not again.
    """
    tried: list[str] = []
    real = open_bundle.try_opening
    monkeypatch.setattr(
        open_bundle,
        "try_opening",
        lambda path, *rest, **more: tried.append(path.name) or real(path, *rest, **more),
    )
    folder = copied("llama", "bank")
    Session(folder, "cpu")
    assert not tried
    monkeypatch.setenv("ADAPTERPACK_CACHE", str(tmp_path / "cache"))
    manifest = json.loads((folder / FILE_NAME).read_text())
    manifest["base"]["name"] = "another"
    (folder / FILE_NAME).write_bytes(strict_json.canonical(manifest))
    for _ in range(2):
        Session(folder, "cpu")
        assert tried == [GRAPH]


def test_the_packs_of_a_bundle_are_validated_once(
    copied: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle that this user's cache knows as proved opens without its packs' checks, in another process,
    too, with the same tensors; where the cache knows nothing, or a byte is another, it does not.
    """
    examined: list[Path] = []
    real = validation.examine
    monkeypatch.setattr(
        validation, "examine", lambda folder, *rest: examined.append(folder) or real(folder, *rest)
    )
    monkeypatch.setenv("ADAPTERPACK_CACHE", str(tmp_path / "cache"))
    folder, batch = copied("llama", "bank"), batch_of()
    manifest = json.loads((folder / FILE_NAME).read_text())
    manifest["base"]["name"] = "seen-nowhere"
    (folder / FILE_NAME).write_bytes(strict_json.canonical(manifest))
    first = Session(folder, "cpu")
    assert {path.name for path in examined} == set(first.packs)
    examined.clear()
    for known in (proofs._KNOWN, set[str]()):  # this process, and another one
        monkeypatch.setattr(proofs, "_KNOWN", known)
        again = Session(folder, "cpu")
        assert not examined
        assert again.packs.keys() == first.packs.keys()
        for name, pack in again.packs.items():
            assert (pack.id, pack.extra) == (first.packs[name].id, first.packs[name].extra)
            assert all(
                np.array_equal(pack.tensors[key], first.packs[name].tensors[key]) for key in pack.tensors
            )
        names = [*first.packs][:2]
        assert np.array_equal(
            again.run(batch, [*names, None])["logits"], first.run(batch, [*names, None])["logits"]
        )
    monkeypatch.setattr(proofs, "_KNOWN", set[str]())
    monkeypatch.setenv("ADAPTERPACK_CACHE", str(tmp_path / "another"))
    Session(folder, "cpu")
    assert examined
    flip(folder / "adapters/alpha/adapter_model.safetensors", -1)
    with pytest.raises(FormatError):
        Session(folder, "cpu")


def test_ways_to_verify_a_bundle(copied: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that has not changed since it was hashed is not hashed again, in this process or, if it is
    large, in another; one whose time of last change was set back is; ``full`` hashes all, ``off`` none.
    """
    hashed: list[str] = []
    real = file_hashes.digests
    monkeypatch.setattr(
        file_hashes, "digests", lambda sources, **more: hashed.extend(sources) or real(sources, **more)
    )
    monkeypatch.setattr(file_hashes, "_HASHES", {})
    monkeypatch.setattr(file_hashes, "LARGE", 1 << 14)
    monkeypatch.setattr(hashing, "_SETTLED", 50_000_000)
    monkeypatch.setenv("ADAPTERPACK_CACHE", str(tmp_path / "cache"))
    folder = copied("llama", "bank")
    time.sleep(0.1)
    listed = {entry.path: entry.size for entry in read_bundle(folder).files}

    def opened(verify: str = "cached") -> set[str]:
        hashed.clear()
        Session(folder, "cpu", verify=verify)
        return set(hashed)

    assert opened() == set(listed)
    assert opened() == set()
    assert opened("full") == set(listed)
    file_hashes._HASHES.clear()  # as another process has it
    large = {path for path, size in listed.items() if size >= 1 << 14}
    assert "model.onnx.data" in large
    assert opened() == set(listed) - large
    data = folder / "model.onnx.data"
    stat = data.stat()
    flip(data, 50)
    os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(FormatError, match=r"model\.onnx\.data"):
        opened()
    assert opened("off") == set()
    with pytest.raises(ConfigError, match="cached"):
        opened("cashed")


def test_the_validator_of_bundles(copied: Make, bundle_of: Make, base_of: Make) -> None:
    """Every bundle as exported is valid; each change is one finding with its rule and place."""
    for kind, mode in (("llama", "bank"), ("llama", "inputs"), ("bert", "folded")):
        report = validate(bundle_of(kind, mode), base_of(kind))
        assert (report.valid, report.findings) == (True, ())
        assert validate(bundle_of(kind, mode)).not_checked

    def found(folder: Path, base: Path | None = None) -> set[tuple[str, str]]:
        report = validate(folder, base)
        assert not report.valid
        return {(finding.rule, finding.where) for finding in report.findings}

    assert found(bundle_of("llama", "bank"), base_of("bert")) == {("AB301", "base")}
    folder = copied("llama", "bank")
    flip(folder / "model.onnx.data", 50)
    assert found(folder) == {("AB104", "model.onnx.data")}
    (folder / "model.onnx.data").unlink()
    assert found(folder) == {("AB103", "model.onnx.data")}
    (folder / "extra.bin").write_bytes(b"?")
    (folder / "link").symlink_to("/etc/hosts")
    assert {("AB102", "extra.bin"), ("AB101", "link")} <= found(folder)
    altered = copied("llama", "inputs")
    flip(altered / "adapters/alpha/adapter_model.safetensors", -1)
    rules = found(altered)
    assert ("AB104", "adapters/alpha/adapter_model.safetensors") in rules
    assert any(where.startswith("adapters/alpha/") and rule != "AB104" for rule, where in rules), (
        "the pack's own validator says so, too"
    )
    value = json.loads((altered / FILE_NAME).read_text())
    (altered / FILE_NAME).write_text(json.dumps({**value, "mode": "banc"}))
    assert found(altered) == {("AB001", FILE_NAME)}


def test_the_validator_of_bundles_keeps_to_its_budget(
    bundle_of: Make, base_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No time, or too little for one more block, or no memory for a pack: not fully checked, exit code 3, and
    what is open is named.
    """
    folder = bundle_of("llama", "bank")
    report = validate(folder, budget=Budget(seconds=0))
    assert (report.state, report.findings) == ("not fully checked", ())
    assert "the list of files: the time ran out" in report.not_checked
    report = validate(folder, budget=Budget(memory=100))
    assert report.state == "not fully checked"
    assert {text.partition(":")[0] for text in report.not_checked} >= {
        "adapters/alpha",
        "adapters/beta",
        "base",
        "graph and canaries",
    }
    for option in (["--max-seconds", "0"], ["--max-bytes", "100"]):
        assert CliRunner().invoke(main, ["validate", str(folder), *option]).exit_code == 3
    assert validate(folder, full=True).state == "not fully checked"
    assert validate(folder, base_of("llama"), full=True).state == "valid"
    real = Budget.require_time
    monkeypatch.setattr(
        Budget,
        "require_time",
        lambda self, what: real(Budget(seconds=0) if "digests" in what else self, what),
    )
    assert "the digests of the files: the time ran out" in validate(folder).not_checked


def test_a_link_in_a_bundle_is_told_and_not_followed(copied: Make) -> None:
    """Once something irregular lies there no other file is opened: neither what the link names nor a listed
    file behind it.
    """
    folder = copied("llama", "bank")
    (folder / "model.onnx.data").unlink()
    os.mkfifo(folder / "pipe")
    (folder / "model.onnx.data").symlink_to(folder / "pipe")
    report = validate(folder)
    assert {(finding.rule, finding.where) for finding in report.findings} == {
        ("AB101", "model.onnx.data"),
        ("AB101", "pipe"),
    }


def test_the_manifest_round_trips(bundle_of: Make, tmp_path: Path) -> None:
    """read(write(bundle)) == bundle, byte for byte."""
    for kind in ("bert", "llama"):
        folder = bundle_of(kind, "bank")
        data = (folder / FILE_NAME).read_bytes()
        bundle = read_bundle(folder)
        copy = Path(shutil.copytree(folder, tmp_path / kind))
        bundle.write(copy)
        assert (copy / FILE_NAME).read_bytes() == data


def test_the_runtime_needs_no_torch(bundle_of: Make) -> None:
    """Opening, running, generating and loading a pack import neither torch nor transformers."""
    program = (
        "import sys, numpy as np, adapterpack\n"
        "import adapterpack.runtime.sessions.generate, adapterpack.runtime.sessions.validation\n"
        "session = adapterpack.Session(sys.argv[1], 'cpu')\n"
        "session.generate(['w1 w2'], ['alpha'], max_new_tokens=2)\n"
        "session.load(sys.argv[2], 'more')\n"
        "print(session.run({'input_ids': np.array([[3, 4]])}, 'more')['logits'].shape)\n"
        "assert adapterpack.validate(sys.argv[1], full=True).valid\n"
        "print(sorted({'torch', 'transformers', 'peft', 'mobius'} & set(sys.modules)))\n"
    )
    folder = bundle_of("llama", "bank")
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(folder / "adapters/beta")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(1, 2, 96)", "[]"]


# Rows in, rows out.


def test_rows_of_a_classifier(bundle_of: Make) -> None:
    """One result a row, in order, over several batches: the label is that of the largest score, the pack's
    digest stands beside.
    """
    folder = bundle_of("bert", "bank")
    session = Session(folder, "cpu")
    names = ("beta", None, "alpha")
    rows: list[dict[str, Any]] = [
        {"text": text, "adapter": name, "id": f"{text}-{name}"} for text in WORDS for name in names
    ]
    found = list(run(folder, iter(rows), provider="cpu", batch_size=4))
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    for row in found:
        if row["adapter"] is None:
            assert (row["label"], row["pack"]) == (None, None), "the base has no trained head"
            continue
        assert row["pack"] == session.packs[row["adapter"]].id
        logits = session.run(session.encode([row["text"]]), row["adapter"])["logits"][0].astype(np.float64)
        labels = session.labels(row["adapter"])
        shares = np.exp(logits[: len(labels)]) / np.exp(logits[: len(labels)]).sum()
        assert row["label"] == labels[int(shares.argmax())]
        assert list(row["scores"]) == list(labels)
        # six digits are told
        np.testing.assert_allclose(list(row["scores"].values()), shares, rtol=0, atol=2e-6)
    # PEFT's folders hold a head and no names for its labels: transformers numbers them
    named = session.packs["beta"]
    unnamed = dataclasses.replace(
        named, manifest=replace(named.manifest, task=m.PackTask("text-classification"))
    )
    assert session.head(unnamed).labels == tuple(
        f"LABEL_{place}" for place in range(len(session.labels("beta")))
    )
    assert session.head(unnamed).trained


def test_rows_that_name_no_adapter(bundle_of: Make) -> None:
    """They run with each of ``adapters`` in turn, with the base if there are none, with what is folded in a
    folded bundle.
    """
    rows = [{"text": WORDS[0]}, {"text": WORDS[1], "adapter": "beta"}]
    found = list(run(bundle_of("bert", "inputs"), rows, adapters=["alpha", "beta"], provider="cpu"))
    assert [(row["text"], row["adapter"]) for row in found] == [
        (WORDS[0], "alpha"),
        (WORDS[0], "beta"),
        (WORDS[1], "beta"),
    ]
    assert [
        row["adapter"] for row in run(bundle_of("bert", "bank"), [{"prompt": WORDS[0]}], provider="cpu")
    ] == [None]
    (folded,) = run(bundle_of("bert", "folded"), [{"text": WORDS[0]}], provider="cpu")
    (single,) = run(bundle_of("bert", "bank"), [{"text": WORDS[0], "adapter": "alpha"}], provider="cpu")
    assert (folded["adapter"], folded["pack"], folded["label"]) == ("alpha", single["pack"], single["label"])
    with pytest.raises(Unsupported, match="no base"):
        list(run(bundle_of("bert", "folded"), [{"text": WORDS[0], "adapter": None}], provider="cpu"))


def test_rows_of_a_decoder(bundle_of: Make) -> None:
    """Text, prompt, messages and ids; each completion is that of ``generate`` for the row alone."""
    folder = bundle_of("llama", "bank")
    session = Session(folder, "cpu")
    rows: list[dict[str, Any]] = [
        {"prompt": WORDS[0], "adapter": "alpha"},
        {"text": WORDS[1]},
        {"messages": [{"role": "user", "content": WORDS[2]}], "adapter": "beta"},
        {"prompt": [5, 6, 7], "adapter": "alpha"},
    ]
    found = list(run(folder, rows, provider="cpu", max_new_tokens=6, batch_size=3))
    for row, result in zip(rows, found, strict=True):
        prompt = row.get("messages") or row.get("prompt") or row["text"]
        (alone,) = session.generate([prompt], [row.get("adapter")], max_new_tokens=6)
        assert {key: result[key] for key in row} == row
        assert (result["completion"], result["finish_reason"]) == (alone.text, alone.finish_reason)
        assert (result["prompt_tokens"], result["completion_tokens"]) == (alone.prompt_tokens, len(alone.ids))
        assert result["pack"] == (session.packs[row["adapter"]].id if row.get("adapter") else None)


def test_rows_that_cannot_be_run(bundle_of: Make) -> None:
    """An unknown form names the row; an unknown adapter or option the name; before the row is run."""
    bert, llama = bundle_of("bert", "bank"), bundle_of("llama", "bank")
    bad: list[tuple[Path, list[Any], dict[str, Any], type[AdapterpackError], str]] = [
        (bert, [{"text": "w1"}, {"txt": "w1"}], {}, ConfigError, "row 2.*txt"),
        (bert, [{}], {}, ConfigError, "an empty row"),
        (bert, [{"text": 5}], {}, ConfigError, "row 1"),
        (bert, ["w1"], {}, ConfigError, "row 1.*str"),
        (bert, [{"messages": [{"role": "user", "content": "w1"}]}], {}, ConfigError, "needs text"),
        (bert, [{"text": ""}], {}, ConfigError, "no tokens"),
        (bert, [{"text": "w1", "adapter": "alfa"}], {}, UnknownAdapter, "did you mean 'alpha'"),
        (bert, [{"text": "w1", "adapter": 3}], {}, ConfigError, "named by a text"),
        (bert, [{"text": "w1"}], {"adapters": ["gamma"]}, UnknownAdapter, "'gamma'"),
        (bert, [{"text": "w1"}], {"batch_size": 0}, ConfigError, "batch_size"),
        (bert, [{"text": "w1"}], {"max_new_tokens": 3}, ConfigError, "max_new_tokens"),
        (llama, [{"text": "w1"}], {"max_tokens": 3}, ConfigError, "did you mean 'max_new_tokens'"),
        (llama, [{"messages": ["w1"]}], {}, ConfigError, "list of messages"),
        (llama, [{"prompt": []}], {}, ConfigError, "no tokens"),
        (llama, [{"prompt": ""}], {}, ConfigError, "no tokens"),
    ]
    for folder, rows, options, error, text in bad:
        with pytest.raises(error, match=text):
            list(run(folder, rows, provider="cpu", **options))


def test_features_are_means_over_real_tokens(tiny_bert: Path, tmp_path: Path) -> None:
    """A bundle without a head gives, for each text, the mean of its hidden states, whatever it is padded
    with.
    """
    export(tiny_bert, [], tmp_path / "bundle", mode="inputs", task="feature-extraction")
    together = list(run(tmp_path / "bundle", [{"text": text} for text in WORDS], provider="cpu"))
    for text, row in zip(WORDS, together, strict=True):
        (alone,) = run(tmp_path / "bundle", [{"text": text}], provider="cpu")
        np.testing.assert_allclose(row["embedding"], alone["embedding"], rtol=0, atol=1e-5)
        session = Session(tmp_path / "bundle", "cpu")
        hidden = session.run(session.encode([text]))["last_hidden_state"][0]
        np.testing.assert_allclose(row["embedding"], hidden.mean(0), rtol=0, atol=1e-5)


def test_a_bundle_is_no_base(bundle_of: Make) -> None:
    """Exporting a bundle again is refused, with the way out."""
    with pytest.raises(ConfigError, match=r"exported already.*--base"):
        export(bundle_of("llama", "bank"), [], Path("never"), mode="folded")


# On a GPU.


@pytest.mark.gpu
def test_a_bank_on_cuda_equals_torch(bundle_of: Make, pack_of: Make, dense_of: Make) -> None:
    """Mixed rows on CUDA equal the float64 models within 2e-2 of TF32 on logits of size 3, after a hot load,
    too.
    """
    session, batch = Session(bundle_of("llama", "bank"), "cuda"), batch_of()
    assert session.provider == "CUDAExecutionProvider"
    session.load(pack_of("llama", "gamma"))
    for names in (["alpha", None, "beta"], ["gamma", "beta", "gamma"]):
        found = session.run(batch, names)["logits"]
        for row, expected in enumerate(expect(dense_of, batch, names)):
            np.testing.assert_allclose(
                found[row][batch["attention_mask"][row] > 0], expected, rtol=0, atol=2e-2
            )


@pytest.mark.gpu
def test_tokens_on_cuda_equal_the_cpus(bundle_of: Make) -> None:
    """Greedy tokens of a mixed batch are the same on both devices, in bank and in inputs mode."""
    for mode in ("bank", "inputs"):
        here, there = (Session(bundle_of("llama", mode), provider) for provider in ("cpu", "cuda"))
        prompts, names = [[5, 6, 7], [8, 9], [10, 11, 12, 13]], ["alpha", None, "beta"]
        expected, found = (session.generate(prompts, names, max_new_tokens=12) for session in (here, there))
        assert [answer.ids for answer in found] == [answer.ids for answer in expected]


def test_half_precision_factors_are_widened_before_they_are_scaled() -> None:
    """A bfloat16 pack's ``up`` slot is ``s B`` computed in float32: in bfloat16 the product with s = 1/3
    would lose 2^-9 of it.
    """
    rng = np.random.default_rng(5)
    site, cfg = Site("net.q", 7, 5), LoRA(r=3, alpha=1)
    params = {
        "lora_A": rng.standard_normal((3, 7)).astype(bfloat16),
        "lora_B": rng.standard_normal((5, 3)).astype(bfloat16),
    }
    pack = build(
        "half", get("lora"), {site: (cfg, params)}, task=m.PackTask("feature-extraction"), base=m.Base()
    )
    expected = params["lora_B"].astype(np.float64).T / 3
    np.testing.assert_allclose(pack_values(pack)["net.q.up"], expected, rtol=2**-23)
