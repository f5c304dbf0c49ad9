"""The canary of a pack on a right and on a wrong model, in torch and under ONNX Runtime: each fault has its
error.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import noise
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from msgspec.structs import replace
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
)

from adapterpack import LoRA, Pack, Session, adapt, attach, export, load, save, validate
from adapterpack.bundle.manifest import FILE_NAME, GRAPH, read_bundle
from adapterpack.cli.commands.export import command
from adapterpack.errors import AdapterpackError, BaseMismatch, FormatError, NothingToDo, ParityError
from adapterpack.manifest.structs import Canary
from adapterpack.pack import canary
from adapterpack.quantizing.graphs.options import quantization
from adapterpack.quantizing.graphs.quantize_bundle import quantize_bundle
from adapterpack.runtime import canary as replay
from adapterpack.torch_adapters.canaries.canary import coarse, verify_canary
from adapterpack.torch_adapters.layers.active import adapter_names

Make = Callable[..., Any]
CLASSES = {"llama": AutoModelForCausalLM, "bert": AutoModelForSequenceClassification, "encoder": AutoModel}
SAME = 1e-5
"""Of logits of size 1 to 10: float32 on another runtime, or in another order, moves them by about 1e-6."""


def shake(model: torch.nn.Module, size: float) -> torch.nn.Module:
    return noise.shake(model, size, 3)


@pytest.fixture(scope="module")
def base_at(tiny_llama: Path, tiny_bert: Path) -> Make:
    return {"llama": tiny_llama, "bert": tiny_bert, "encoder": tiny_bert}.__getitem__


@pytest.fixture(scope="module")
def model_of(base_at: Make) -> Make:
    """A decoder, a classifier whose head is new with every model, or an encoder, in training mode as a user
    may have it.
    """

    def make(kind: str, **kwargs: Any) -> Any:
        more = {"num_labels": 3} if kind == "bert" else {}
        return CLASSES[kind].from_pretrained(base_at(kind), **more, **kwargs).train()

    return make


@pytest.fixture(scope="module")
def pack_for(model_of: Make) -> Make:
    """Kind -> an adapter of it, packed; the classifier's with the head that it was trained with."""

    @cache
    def make(kind: str) -> Pack:
        whole = ("classifier",) if kind == "bert" else ()
        return save(shake(adapt(model_of(kind), LoRA(r=3, modules_to_save=whole), "p"), 0.05), None)

    return make


def changed(pack: Pack, change: Callable[[np.ndarray], np.ndarray]) -> Pack:
    """The pack with other B, and the canary of the right ones."""
    return dataclasses.replace(
        pack,
        tensors={name: change(array) if "lora_B" in name else array for name, array in pack.tensors.items()},
    )


# --- in torch, when it is attached


@pytest.mark.fast
@pytest.mark.parametrize("kind", CLASSES)
def test_attach_replays_the_canary(
    kind: str, model_of: Make, pack_for: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the right base it passes, on four tiny passes in evaluation mode; the model is left in its mode, the
    adapter active.
    """
    pack, model, modes = pack_for(kind), model_of(kind), []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, *a, **k: modes.append(self.training) or forward(self, *a, **k)
    )
    attach(model, pack)
    assert modes == [False] * 4
    assert all(module.training for module in model.modules())
    assert verify_canary(model, pack) <= SAME


@pytest.mark.fast
@pytest.mark.parametrize(
    ("change", "error"), [(np.zeros_like, NothingToDo), (lambda B: B * np.float32(1.2), ParityError)]
)
@pytest.mark.parametrize("kind", CLASSES)
def test_attach_refuses_an_adapter_that_is_not_the_recorded_one(
    kind: str,
    change: Callable[[np.ndarray], np.ndarray],
    error: type[Exception],
    model_of: Make,
    pack_for: Make,
) -> None:
    """B zero: no effect. B a fifth larger: other logits. After it the model is the one that it was; asked not
    to look, attach does not.
    """
    pack, model = changed(pack_for(kind), change), model_of(kind)
    before = {path: (id(module), module.training) for path, module in model.named_modules()}
    with pytest.raises(error):
        attach(model, pack)
    assert {path: (id(module), module.training) for path, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    for leave_out in ({"check_canary": False}, {"check_base": False}):
        assert adapter_names(attach(model_of(kind), pack, **leave_out)) == ["p"]


@pytest.mark.fast
@pytest.mark.parametrize("kind", CLASSES)
def test_attach_refuses_a_base_that_was_changed_after_it_was_loaded(
    kind: str, model_of: Make, pack_for: Make
) -> None:
    """One weight of one layer is another: the checkpoint that the model came from is right, the model is
    not.
    """
    model = model_of(kind)
    ends = ("layers.0.mlp.up_proj.weight", "layer.0.output.dense.weight")
    weight = next(value for name, value in model.named_parameters() if name.endswith(ends))
    with torch.no_grad():
        weight[3, 5] += 4
    with pytest.raises(BaseMismatch, match="not the base"):
        attach(model, pack_for(kind))
    assert adapter_names(model) == []


@pytest.mark.fast
def test_a_head_that_was_not_saved_is_told(model_of: Make) -> None:
    """A classifier's adapter packed without its new head cannot be right on another one, whose head is drawn
    anew. ``adapt`` trains such heads whole where it knows the checkpoint.
    """
    model = model_of("bert")
    folder, model.config._name_or_path = model.config._name_or_path, ""
    pack = save(
        shake(adapt(model, LoRA(r=2, targets=("query", "value")), "headless"), 0.05), None, base=folder
    )
    with pytest.raises(BaseMismatch, match="head that was not saved"):
        attach(model_of("bert"), pack)


@pytest.mark.fast
def test_another_class_of_model_is_not_asked(
    model_of: Make, tiny_llama: Path, pack_for: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """A decoder's adapter in a classifier over the same decoder: its canary says nothing of those logits, and
    the log says so.
    """
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama)
    with caplog.at_level("INFO"):
        attach(model, pack_for("llama"))
    assert "recorded on LlamaForCausalLM, this is LlamaForSequenceClassification" in caplog.text


@pytest.mark.fast
@pytest.mark.parametrize("kind", CLASSES)
def test_half_precision(kind: str, model_of: Make, pack_for: Make) -> None:
    """A float32 canary passes in bfloat16, and one recorded in bfloat16 passes in float32, though both differ
    by more than float32 does; an adapter without effect is still seen.
    """
    pack, half = pack_for(kind), {"dtype": torch.bfloat16}
    assert verify_canary(attach(model_of(kind, **half), pack), pack) > 1e-4
    with pytest.raises(NothingToDo):
        attach(model_of(kind, **half), changed(pack, np.zeros_like))
    whole = ("classifier",) if kind == "bert" else ()
    coarser = save(shake(adapt(model_of(kind, **half), LoRA(r=3, modules_to_save=whole), "half"), 0.05), None)
    assert coarser.manifest.canary is not None
    assert coarser.manifest.canary.dtype == "bfloat16"
    assert verify_canary(attach(model_of(kind), coarser), coarser) > 1e-4


@pytest.mark.fast
def test_an_encoder_s_canary_holds_components_at_fixed_places(model_of: Make, pack_for: Make) -> None:
    """Evenly spaced components of the last hidden state at the last position, the same for base and adapter;
    of the pooled output, behind the 24 of the hidden state, where only that one is adapted.
    """
    recorded = pack_for("encoder").manifest.canary
    places = [0, 3, 7, 10, 13, 16, 20, 23]
    assert all(row["ids"] == places for row in (*recorded.base, *recorded.adapter))
    with torch.no_grad():
        for ids, row in zip(recorded.input_ids, recorded.base, strict=True):
            hidden = model_of("encoder").eval()(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            np.testing.assert_allclose(row["logits"], hidden[places].numpy(), atol=SAME)
    pooled = save(
        shake(adapt(model_of("encoder"), LoRA(r=2, targets=("pooler.dense",)), "pooled"), 0.1), None
    )
    assert all(row["ids"] == [24 + place for place in places] for row in pooled.manifest.canary.adapter)
    attach(model_of("encoder"), pooled)
    with pytest.raises(NothingToDo):
        attach(model_of("encoder"), changed(pooled, np.zeros_like))


@pytest.mark.fast
def test_a_token_classifier_s_canary(tiny_bert: Path) -> None:
    """Its rows are the labels' logits of the last token."""

    def tagger() -> Any:
        return AutoModelForTokenClassification.from_pretrained(tiny_bert, num_labels=5).train()

    pack = save(shake(adapt(tagger(), LoRA(r=2, modules_to_save=("classifier",)), "t"), 0.05), None)
    assert sorted(pack.manifest.canary.adapter[0]["ids"]) == [0, 1, 2, 3, 4]
    model = attach(tagger(), pack).eval()
    with torch.no_grad():
        last = model(input_ids=torch.tensor([pack.manifest.canary.input_ids[0]])).logits[0, -1].numpy()
    row = pack.manifest.canary.adapter[0]
    np.testing.assert_allclose(row["logits"], last[row["ids"]], atol=SAME)
    with pytest.raises(NothingToDo):
        attach(tagger(), changed(pack, np.zeros_like))


@pytest.mark.fast
def test_dropout_does_not_reach_the_canary(tmp_path: Path) -> None:
    """A model that drops half of everything while it trains: recorded and replayed without."""
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=20,
            hidden_dropout_prob=0.5,
            attention_probs_dropout_prob=0.5,
        )
    ).save_pretrained(tmp_path / "bert")
    pack = save(
        shake(adapt(AutoModel.from_pretrained(tmp_path / "bert").train(), LoRA(r=2, dropout=0.5), "d"), 0.1),
        None,
    )
    assert verify_canary(attach(AutoModel.from_pretrained(tmp_path / "bert").train(), pack), pack) <= SAME


@pytest.mark.fast
def test_how_coarse_a_model_is(model_of: Make) -> None:
    """Eight roundings of the coarsest float, or of what torch makes of float32; half of the largest logit for
    integers, or where the configuration says quantized.
    """
    assert coarse(model_of("llama")) == 2.0**-20
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert coarse(model_of("llama")) == 2.0**-7
    finally:
        torch.set_float32_matmul_precision(before)
    model = model_of("llama", dtype=torch.bfloat16)
    model.model.norm.float()
    assert coarse(model) == 2.0**-4
    model.config.quantization_config = {"quant_method": "any"}
    assert coarse(model) == 0.5
    layer = torch.nn.Module()
    layer.codes = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    assert coarse(torch.nn.Sequential(layer, torch.nn.Linear(2, 2))) == 0.5


@pytest.mark.fast
def test_at_any_tolerance_a_visible_effect_must_be_there() -> None:
    """Rows that are equal with and without the adapter pass only if what was recorded may be lost in
    bfloat16's rounding (2^-7).
    """
    rows = [np.array([8.0, 1.0, -3.0], np.float32)]
    for effect, passes in ((0.05, True), (0.1, False)):  # 2^-7 of 8 is 0.0625
        recorded = canary.record(Canary(((1,),), (), (), 0.0), rows, [rows[0] - np.float32(effect)])
        wide = canary.widen(recorded, coarse=0.5, moved=0.25)
        assert wide.tolerance == pytest.approx(4.25)
        if passes:
            assert canary.check(wide, rows, rows, "here") == pytest.approx(effect, rel=1e-3)
        else:
            with pytest.raises(NothingToDo):
                canary.check(wide, rows, rows, "here")


# --- under ONNX Runtime


@pytest.fixture(scope="module")
def bundle_at(
    bundle_of: Make, base_at: Make, pack_for: Make, tmp_path_factory: pytest.TempPathFactory
) -> Make:
    """Kind and mode -> a bundle: the shared ones of two adapters (folded: one), and one of the encoder."""

    @cache
    def make(kind: str, mode: str) -> Path:
        if kind != "encoder":
            return bundle_of(kind, mode)
        folder = tmp_path_factory.mktemp("canary") / mode
        export(base_at(kind), [pack_for(kind)], folder, mode=mode)
        return folder

    return make


BUNDLES = [
    ("llama", "bank"),
    ("llama", "inputs"),
    ("llama", "folded"),
    ("bert", "bank"),
    ("bert", "inputs"),
    ("bert", "folded"),
    ("encoder", "bank"),
]
RUNNING = [(kind, mode) for kind, mode in BUNDLES if mode != "folded"]


@pytest.fixture
def copied(bundle_at: Make, tmp_path: Path) -> Make:
    """A copy of a bundle, to be spoiled."""
    return lambda kind, mode: Path(shutil.copytree(bundle_at(kind, mode), tmp_path / f"{kind}-{mode}"))


def rewritten(folder: Path, change: Callable[[str, np.ndarray], np.ndarray | None]) -> Path:
    """The bundle with other numbers in its graph, as an export that went wrong would have written it."""
    graph = ir.load(folder / GRAPH)
    touched = 0
    for name, value in list(graph.graph.initializers.items()):
        new = change(name, np.array(value.const_value.numpy()))
        if new is not None:
            value.const_value, touched = ir.tensor(new, name=name), touched + 1
    assert touched
    ir.save(graph, folder / "new.onnx", external_data="new.onnx.data")
    # the names of external data are in the graph, so both are written once more under theirs
    for suffix in ("", ".data"):
        (folder / f"{GRAPH}{suffix}").unlink(missing_ok=True)
    ir.save(ir.load(folder / "new.onnx"), folder / GRAPH, external_data=f"{GRAPH}.data")
    for suffix in ("", ".data"):
        (folder / f"new.onnx{suffix}").unlink()
    read_bundle(folder).write(folder)
    return folder


def readapted(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """The bundle with other ``up`` factors: in a bank's first slot, or in the first adapter's file."""
    bundle = read_bundle(folder)
    if bundle.mode == "bank":

        def slot(name: str, array: np.ndarray) -> np.ndarray | None:
            if name.rpartition(".")[0] not in bundle.sites or not name.endswith(".up"):
                return None
            array[1] = change(array[1])
            return array

        return rewritten(folder, slot)
    path = folder / f"{bundle.adapters[0].path}.onnx_adapter"
    # its values are gone when it is, and a value borrows its array
    before = ort.AdapterFormat.read_adapter(str(path))
    values = {name: np.array(value.numpy()) for name, value in before.get_parameters().items()}
    arrays = {
        name: np.ascontiguousarray(change(array) if name.endswith(".up") else array)
        for name, array in values.items()
    }
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()})
    path.unlink()
    adapter.export_adapter(str(path))
    bundle.write(folder)
    return folder


def failure(folder: Path) -> AdapterpackError:
    """The error of the replay, which is also the one finding of the validator when it is asked for all."""
    with pytest.raises(AdapterpackError) as caught:
        replay.verify(Session(folder, "cpu"))
    report = validate(folder, full=True)
    expected = [("AB401", caught.value.sentence, caught.type)]
    assert [(finding.rule, finding.message, finding.error) for finding in report.findings] == expected
    assert validate(folder).valid  # without being asked it is not run
    return caught.value


def error_of_canary(folder: Path) -> AdapterpackError:
    """What the canary finds where nothing else is compared; a session that verifies finds other values in a
    slot before, and so does the validator, which needs no session for it.
    """
    with pytest.raises(AdapterpackError) as caught:
        replay.verify(Session(folder, "cpu", verify="off"))
    with pytest.raises(FormatError, match="do not hold the adapter") as refused:
        Session(folder, "cpu")
    (finding,) = validate(folder).findings
    assert (finding.rule, finding.message) == ("AB202", refused.value.sentence)
    return caught.value


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("kind", "mode"), BUNDLES)
def test_every_bundle_replays_the_canaries_of_its_packs(kind: str, mode: str, bundle_at: Make) -> None:
    """What export wrote down is what a fresh session gives: every pack, within float32 of what torch
    recorded; so says the validator.
    """
    folder = bundle_at(kind, mode)
    recorded, names = (
        read_bundle(folder).parity["canary"],
        {adapter.name for adapter in read_bundle(folder).adapters},
    )
    assert set(recorded["replayed"]) == names
    assert recorded["not_replayed"] == {}
    assert all(one["max_abs"] <= SAME < one["tolerance"] for one in recorded["replayed"].values())
    again = replay.verify(Session(folder, "cpu"))["replayed"]
    assert set(again) == names
    # sums may be taken in another order in another session, so the differences alone are not the same bits
    for name, one in again.items():
        assert one["max_abs"] <= SAME
        assert one["tolerance"] == recorded["replayed"][name]["tolerance"]
    report = validate(folder, full=True)
    assert (report.findings, report.not_checked[0]) == ((), "base: none was named (--base)")
    assert [text.partition(":")[0] for text in report.not_checked[1:]] == [
        "who made the graphs, and that they compute nothing else than the base and its adapters"
    ]


@pytest.mark.parametrize(("kind", "mode"), RUNNING)
def test_the_base_of_a_canary_has_the_pack_s_head_on(kind: str, mode: str, bundle_at: Make) -> None:
    """The rows without the adapter are those that torch gave with the adapters off and the head of the pack
    on.
    """
    session = Session(bundle_at(kind, mode), "cpu")
    for name, rows in replay.replay(session).items():
        for row, recorded in zip(rows.base, session.packs[name].manifest.canary.base, strict=True):
            np.testing.assert_allclose(row[recorded["ids"]], recorded["logits"], atol=SAME)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("kind", "mode"), BUNDLES)
def test_a_graph_with_one_other_base_weight(kind: str, mode: str, copied: Make) -> None:
    """One entry of one weight: BaseMismatch; where the adapter is folded in there is no base to tell it from:
    ParityError.
    """
    folder = copied(kind, mode)
    sites = read_bundle(folder).sites
    ends = (
        "layers.0.mlp.up_proj",
        "layer.0.attention.self.value",
        "layers.0.self_attn.q_proj",
        "layer.0.attention.self.query",
    )
    weight = next(site.weight for path, site in sites.items() if path.endswith(ends))

    def other(name: str, array: np.ndarray) -> np.ndarray | None:
        if name != weight:
            return None
        array[5, 3] += 4
        return array

    assert type(failure(rewritten(folder, other))) is (ParityError if mode == "folded" else BaseMismatch)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("kind", "mode"), RUNNING)
def test_a_graph_with_another_adapter(kind: str, mode: str, copied: Make) -> None:
    """All ``up`` of an adapter zero: NothingToDo; a tenth larger: ParityError."""
    folder = copied(kind, mode)
    assert type(error_of_canary(readapted(folder, lambda up: up * np.float32(1.1)))) is ParityError
    assert type(error_of_canary(readapted(folder, np.zeros_like))) is NothingToDo


def test_a_folded_graph_without_its_adapter(copied: Make, tiny_llama: Path, tmp_path: Path) -> None:
    """The base's own graph under the name of an adapter: NothingToDo."""
    folder = copied("llama", "folded")
    export(tiny_llama, [], tmp_path / "plain", mode="folded")
    for path in (tmp_path / "plain").glob(f"{GRAPH}*"):
        shutil.copyfile(path, folder / path.name)
    read_bundle(folder).write(folder)
    assert type(failure(folder)) is NothingToDo


def test_export_publishes_nothing_whose_canary_fails(
    tiny_llama: Path, pack_for: Make, tmp_path: Path
) -> None:
    """A canary with other base rows, and one with other rows of the adapter, are the errors of a replay; a
    pack without one passes.
    """
    right = pack_for("llama")
    recorded = right.manifest.canary

    def holding(changed: Any) -> Pack:
        return dataclasses.replace(right, manifest=replace(right.manifest, canary=changed))

    def moved(rows: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple({**row, "logits": [value + 1 for value in row["logits"]]} for row in rows)

    for rows, error in (
        ({"base": moved(recorded.base)}, BaseMismatch),
        ({"adapter": moved(recorded.adapter)}, ParityError),
    ):
        with pytest.raises(error, match="canary"):
            export(
                tiny_llama,
                [holding(replace(recorded, **rows))],
                tmp_path / "out",
                mode="bank",
                frontend="mobius",
            )
        assert not (tmp_path / "out").exists()
    export(tiny_llama, [holding(None)], tmp_path / "out", mode="bank")
    assert read_bundle(tmp_path / "out").parity["canary"] == {
        "replayed": {},
        "not_replayed": {"p": "the pack carries none"},
    }
    assert "canary of p: the pack carries none" in validate(tmp_path / "out", full=True).not_checked


def test_adapters_folded_together_have_no_canary(tiny_llama: Path, pack_of: Make, tmp_path: Path) -> None:
    """Both are in the weights: neither's own logits are there to be seen; the command says so."""
    packs = [str(pack_of("llama", name)) for name in ("alpha", "beta")]
    done = CliRunner().invoke(
        command, [str(tiny_llama), *packs, "-o", str(tmp_path / "out"), "--mode", "folded"]
    )
    reason = "it is folded together with others"
    assert f"the canary of beta was not replayed: {reason}" in done.output
    assert read_bundle(tmp_path / "out").parity["canary"] == {
        "replayed": {},
        "not_replayed": {"alpha": reason, "beta": reason},
    }


# --- quantized graphs


@pytest.fixture(scope="module")
def int8(bundle_at: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("canary") / "int8"
    quantize_bundle(bundle_at("llama", "bank"), out, quantization("int8", accuracy="exact"))
    return out


def test_a_quantized_graph_is_allowed_what_was_measured(int8: Path, bundle_at: Make) -> None:
    """``moved`` is the largest difference to the float graph in what a canary compares, with and without the
    adapter; it is allowed.
    """
    recorded = read_bundle(int8).parity["canary"]
    exact, found = (replay.replay(Session(folder, "cpu")) for folder in (bundle_at("llama", "bank"), int8))
    for name, one in found.items():
        kept = [row["ids"] for row in (*one.recorded.base, *one.recorded.adapter)]
        pairs = zip(kept, [*exact[name].base, *exact[name].adapter], [*one.base, *one.adapter], strict=True)
        moved = max(float(np.abs(a[ids] - b[ids]).max()) for ids, a, b in pairs)
        assert moved > 1e-3
        assert recorded["moved"][name] == pytest.approx(moved)
        entry = recorded["replayed"][name]
        assert entry["tolerance"] == pytest.approx(one.recorded.tolerance + recorded["moved"][name])
        assert 1e-3 < entry["max_abs"] <= entry["tolerance"]
    assert validate(int8, full=True).findings == ()


def test_a_quantized_graph_still_needs_its_adapters(int8: Path, tmp_path: Path) -> None:
    """At the wider tolerance too: an adapter that is not there is NothingToDo, a base of other weights
    BaseMismatch.
    """
    folder = Path(shutil.copytree(int8, tmp_path / "nothing"))
    assert type(error_of_canary(readapted(folder, np.zeros_like))) is NothingToDo
    norm = next(name for name in ir.load(int8 / GRAPH).graph.initializers if name.endswith("norm.weight"))
    folder = Path(shutil.copytree(int8, tmp_path / "base"))
    assert (
        type(failure(rewritten(folder, lambda name, array: array * np.float32(2) if name == norm else None)))
        is BaseMismatch
    )


def test_a_bundle_cannot_allow_itself_anything(int8: Path, tmp_path: Path) -> None:
    """A claimed difference of more than half of the logits, or none at all: the canary is not replayed, and
    that is said.
    """
    for number, (claim, reason) in enumerate(((1e9, "half of their size"), (None, "not known"))):
        folder = Path(shutil.copytree(int8, tmp_path / str(number)))
        value = json.loads((folder / FILE_NAME).read_text())
        moved = value["parity"]["canary"]["moved"]
        moved.update({"alpha": claim}) if claim else moved.pop("alpha")
        (folder / FILE_NAME).write_text(json.dumps(value))
        report = validate(folder, full=True)
        assert any(
            question.startswith("canary of alpha: ") and reason in question for question in report.not_checked
        )


def test_a_graph_that_does_not_run_is_a_finding(copied: Make) -> None:
    """A graph with an operator that nobody has, listed with its own digest: what ONNX Runtime says of it is
    the finding.
    """
    folder = copied("llama", "bank")
    graph = onnx.load(str(folder / GRAPH), load_external_data=False)
    graph.graph.node[-1].op_type = "NoSuchOperator"
    (folder / GRAPH).write_bytes(graph.SerializeToString())
    read_bundle(folder).write(folder)
    (finding,) = validate(folder, full=True).findings
    assert (finding.rule, finding.where) == ("AB401", GRAPH)
    assert "cannot open the graph" in finding.message


def test_bytes_that_are_no_graph_are_a_finding(copied: Make) -> None:
    """Listed with their own digest; nothing tries to run them."""
    folder = copied("llama", "bank")
    (folder / GRAPH).write_bytes(b"no graph")
    read_bundle(folder).write(folder)
    assert [(finding.rule, finding.where) for finding in validate(folder, full=True).findings] == [
        ("AB105", GRAPH)
    ]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_pack_says_where_its_canary_is_replayed(pack_for: Make, tmp_path: Path) -> None:
    """Validating a pack runs no model; the report names what does."""
    pack_for("llama").write(tmp_path / "p")
    (question,) = (
        text for text in validate(tmp_path / "p", full=True).not_checked if text.startswith("canary")
    )
    assert all(word in question for word in ("attach", "export", "validate --full"))
    assert load(tmp_path / "p").manifest.canary == pack_for("llama").manifest.canary
