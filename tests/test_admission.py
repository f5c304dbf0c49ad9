"""What every pack passes before rows of an open bundle run with it: signature, base, task, slots, canary."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from architecture_proofs import make_base, make_pack
from architectures import ARCHITECTURES, KINDS
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from encoder_packs import packed
from msgspec.structs import replace

from adapterpack import Engine, Pack, Session, export, load, serve
from adapterpack.errors import (
    AdapterpackError,
    BaseMismatch,
    FormatError,
    ParityError,
    Revoked,
    TrustError,
    Unsupported,
)
from adapterpack.pack.trust.sign import Signers
from adapterpack.quantizing.graphs.options import quantization
from adapterpack.quantizing.graphs.quantize_bundle import quantize_bundle
from adapterpack.serving.adapters.adapter_control import AdapterControl
from adapterpack.serving.adapters.adapter_source import InFolder, PackFolder
from adapterpack.serving.adapters.startup import StartupAdapters

Make = Callable[..., Any]
Loads = Callable[[Path, Pack], object]


@pytest.fixture(scope="module")
def decoders(base_of: Make, pack_of: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of two adapters, with room for two, and with the engine's graph."""
    folder = tmp_path_factory.mktemp("admission") / "decoders"
    packs = [pack_of("llama", name) for name in ("alpha", "beta")]
    export(base_of("llama"), packs, folder, slots=5, max_rank=6, in_place=True)
    return folder


@pytest.fixture(scope="module")
def tags(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head for the tokens of a text, of the width and on the base of the classifiers' bank, with an adapter
    at its sites.
    """
    folder = tmp_path_factory.mktemp("packs")
    return packed(
        tiny_bert,
        folder,
        "token-classification",
        "tags",
        ["x", "y", "z"],
        r=3,
        alpha=5,
        modules_to_save=("classifier",),
    )


def by_session(bundle: Path, pack: Pack) -> object:
    return Session(bundle, "cpu").load(pack)


def by_engine(bundle: Path, pack: Pack) -> object:
    return Engine(bundle, "cpu").adapters.load(pack)


def by_request(bundle: Path, pack: Pack) -> object:
    return Engine(bundle, "cpu").add("w1 w2", pack)


def by_server(bundle: Path, pack: Pack) -> object:
    return control_of(Engine(bundle, "cpu")).add(pack)


WAYS: dict[str, Loads] = {
    "session": by_session,
    "engine": by_engine,
    "request": by_request,
    "server": by_server,
}


def control_of(engine: Engine, *sources: PackFolder, signers: Signers | None = None) -> AdapterControl:
    return AdapterControl(engine.adapters, "base", sources, signers or Signers(), lambda change, code: None)


@pytest.mark.parametrize("way", WAYS)
def test_a_pack_of_another_task_is_refused_by_whatever_runs_it(way: str, bundle_of: Make, tags: Path) -> None:
    """A head for tokens is never put on the one vector of a text, though all its shapes fit."""
    with pytest.raises(Unsupported, match=r"head for another task.*classifier; .*text-.*found token-class"):
        WAYS[way](bundle_of("bert", "bank"), load(tags))


def test_a_pack_of_another_task_is_refused_at_start_by_a_watch_and_by_an_operator(
    bundle_of: Make,
    tags: Path,
) -> None:
    """The watch remembers it as refused, and what is loaded goes on."""
    engine, place = Engine(bundle_of("bert", "bank"), "cpu"), InFolder(tags)
    with pytest.raises(Unsupported, match="another task"):
        StartupAdapters.of([tags]).load(control_of(engine), changing=False, watched=False)
    control = control_of(engine, PackFolder(tags.parent))
    assert control.follow(place)
    assert [(refusal.place, refusal.reason) for refusal in control.refused] == [(place, "unsupported")]
    with pytest.raises(Unsupported, match="another task"):
        control.load("tags", "mine")
    assert engine.adapters.names == ["alpha", "beta"]


def test_export_takes_no_head_for_another_task_though_the_task_is_named(
    tiny_bert: Path,
    tags: Path,
    tmp_path: Path,
) -> None:
    """Who names a task chooses it for the adapters of other tasks, whose sites it has, and not for their
    heads.
    """
    with pytest.raises(Unsupported, match="a head for another task"):
        export(tiny_bert, [tags], tmp_path / "bundle", task="text-classification")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.long
def test_a_bundle_for_another_task_than_its_packs_takes_more_of_them(
    tiny_bert: Path,
    pack_of: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Their canaries were recorded on another graph, which is said; one with a head is refused there, too."""
    bundle, gamma = tmp_path / "bundle", pack_of("bert", "gamma")
    export(tiny_bert, [gamma], bundle, task="token-classification", slots=3, max_rank=4)
    session = Session(bundle, "cpu")
    assert session.load(load(gamma).renamed("more")) == "more"
    assert "the canary of 'more' is not replayed: it is for text-classification" in caplog.text
    with pytest.raises(Unsupported, match="a head for another task"):
        session.load(pack_of("bert", "alpha"))


@pytest.fixture
def other_canary(pack_of: Make) -> Pack:
    """A pack whose canary was recorded with another adapter."""
    right, wrong = load(pack_of("llama", "gamma")), load(pack_of("llama", "alpha"))
    return dataclasses.replace(right, manifest=replace(right.manifest, canary=wrong.manifest.canary))


@pytest.mark.parametrize("bundle", ["ordinary", "engine"])
def test_a_session_replays_the_canary_of_what_it_loads(
    bundle: str,
    bundle_of: Make,
    decoders: Path,
    pack_of: Make,
    other_canary: Pack,
) -> None:
    """On the graph that it has open; where the canary fails the session is as it was."""
    session = Session(decoders if bundle == "engine" else bundle_of("llama", "bank"), "cpu")
    with pytest.raises(ParityError, match="canary"):
        session.load(other_canary)
    assert session.adapters == ["alpha", "beta"]
    assert session.load(pack_of("llama", "gamma")) == "gamma"
    assert set(session._opened) & {"model", "decoder"} == ({"decoder"} if bundle == "engine" else {"model"})


def test_a_pack_that_comes_with_a_request_is_admitted_once(
    decoders: Path, pack_of: Make, other_canary: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its canary is replayed before its first row, and not again; one that fails has no row."""
    engine = Engine(decoders, "cpu")
    with pytest.raises(ParityError, match="canary"):
        engine.add([5, 6], other_canary)
    assert not engine.busy
    replayed, replay = list[str](), engine.adapters._replay
    monkeypatch.setattr(
        engine.adapters, "_replay", lambda pack, adapter: replayed.append(pack.name) or replay(pack, adapter)
    )
    gamma = load(pack_of("llama", "gamma"))
    for _ in range(3):
        engine.add([5, 6], gamma, max_new_tokens=1)
    assert replayed == ["gamma"]


@pytest.mark.parametrize("way", ["session", "engine", "server"])
def test_a_canary_that_no_graph_of_the_task_can_replay_is_a_refusal(
    way: str,
    decoders: Path,
    pack_of: Make,
) -> None:
    """One whose rows are not one to one, and one of images."""
    pack = load(pack_of("llama", "gamma"))
    recorded = pack.manifest.canary
    assert recorded is not None

    def holding(canary: Any) -> Pack:
        return dataclasses.replace(pack, manifest=replace(pack.manifest, canary=canary))

    with pytest.raises(FormatError, match=r"the canary cannot be replayed: .*one to one"):
        WAYS[way](decoders, holding(replace(recorded, base=recorded.base[:1])))
    with pytest.raises(Unsupported, match=r"cannot be replayed: .*does not take.*found decoder_input_ids"):
        WAYS[way](decoders, holding(replace(recorded, decoder_input_ids=recorded.input_ids)))


def test_why_a_canary_is_not_replayed_is_said(
    decoders: Path, pack_of: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On a quantized graph, and on a base of other weights that the caller accepts; a pack without a canary
    is not worth a warning.
    """
    pack = load(pack_of("llama", "gamma"))
    quantize_bundle(decoders, tmp_path / "int8", quantization("int8", accuracy="exact"))
    content = f"{str(pack.manifest.base.content).partition(':')[0]}:{'0' * 64}"
    other = replace(pack.manifest.base, content=content, files=None, probe=None)
    moved = dataclasses.replace(pack, manifest=replace(pack.manifest, base=other))
    bare = dataclasses.replace(pack, manifest=replace(pack.manifest, canary=None))
    with caplog.at_level(logging.INFO):
        Engine(tmp_path / "int8", "cpu").adapters.load(pack)
        with pytest.raises(BaseMismatch):
            Session(decoders, "cpu").load(moved)
        Session(decoders, "cpu").load(moved, allow_structural=True)
        Session(decoders, "cpu").load(bare)
    said = {
        record.getMessage().partition("is not replayed: ")[2]: record.levelno for record in caplog.records
    }
    assert said.pop("the pack carries none") == logging.INFO
    assert {reason.partition(",")[0]: level for reason, level in said.items() if reason} == {
        "the graph is quantized": logging.WARNING,
        "the graph's base has other bytes than the one that it was recorded on": logging.WARNING,
    }


@pytest.mark.long
def test_the_engine_replays_a_canary_of_texts_with_images(tmp_path: Path) -> None:
    """Its rows are read with the features of their images, as those of requests are."""
    llava = next(one for one in ARCHITECTURES if one.name == "llava")
    base = make_base(llava, tmp_path / "base")
    pack = make_pack(llava._replace(targets=("language_model.layers.0.self_attn.q_proj",)), base, KINDS[0])
    assert pack.manifest.canary is not None and pack.manifest.canary.pixels is not None
    export(base, [pack], tmp_path / "bundle", slots=4, max_rank=8, in_place=True)
    for load_it in (by_session, by_engine):
        assert load_it(tmp_path / "bundle", pack.renamed("more"))


def test_a_pack_of_another_tokenizer_is_said(
    decoders: Path,
    pack_of: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is loaded, since another file may hold the same words."""
    pack = load(pack_of("llama", "gamma"))
    tokenizer = pack.manifest.tokenizer
    assert tokenizer is not None
    other = replace(pack.manifest, tokenizer=replace(tokenizer, tokenizer_json="0" * 64))
    Session(decoders, "cpu").load(dataclasses.replace(pack, manifest=other))
    assert "trained with another tokenizer.json" in caplog.text


def test_what_is_revoked_is_not_served(
    bundle_of: Make,
    pack_of: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither at the start, nor by a watch, nor by an operator, nor in a bundle; what was loaded before is not loaded
    again.
    """
    bundle, packs = bundle_of("bert", "bank"), tmp_path / "packs"
    load(pack_of("bert", "alpha")).renamed("gamma").write(packs / "gamma")
    tensor = next(iter(load(packs / "gamma").manifest.tensors.values())).sha256
    control = control_of(Engine(bundle, "cpu"), PackFolder(packs))
    control.add(load(packs / "gamma"))
    entries = {f"sha256:{tensor}": "it leaks names"}
    value = {"format": "adapterpack.revoked", "version": 1, "entries": entries}
    (tmp_path / "revoked.json").write_text(json.dumps(value))
    engine = Engine(bundle, "cpu")
    monkeypatch.setenv("ADAPTERPACK_REVOKED", str(tmp_path / "revoked.json"))
    refused = pytest.raises(Revoked, match=r"the tensor .* is revoked: it leaks names")
    with refused:
        control.load("gamma", "gamma", replace=True)
    with refused:
        StartupAdapters.of([packs / "gamma"]).load(control_of(engine), changing=False, watched=False)
    watched = control_of(engine, PackFolder(packs))
    assert watched.follow(InFolder(packs / "gamma"))
    assert [refusal.reason for refusal in watched.refused] == ["revoked"]
    with refused:
        watched.load("gamma", "mine")
    with refused:  # alpha, which the bundle holds, has the tensor, too
        serve(bundle, port=0)


def test_nothing_of_a_pack_without_its_signature_is_looked_at(
    bundle_of: Make,
    tags: Path,
    tmp_path: Path,
) -> None:
    """Whose signature is missing hears of that alone, whatever else would be refused."""
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "key.pem").write_bytes(key.public_bytes(*form))
    engine = Engine(bundle_of("bert", "bank"), "cpu")
    with pytest.raises(TrustError):
        control_of(engine, signers=Signers([tmp_path / "key.pem"])).add(load(tags))


def test_the_gate_is_asked_before_the_name(bundle_of: Make, pack_of: Make, tmp_path: Path) -> None:
    """A pack of another base hears of its base, though its name is taken as well."""
    folder = Path(shutil.copytree(pack_of("llama", "alpha"), tmp_path / "alpha"))
    for load_it in (by_session, by_engine):
        with pytest.raises(AdapterpackError, match="another base") as caught:
            load_it(bundle_of("bert", "bank"), load(folder))
        assert type(caught.value) is BaseMismatch
