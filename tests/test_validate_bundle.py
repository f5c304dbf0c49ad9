"""``validate BUNDLE`` says what a session would: what that refuses is not valid, and what it takes is."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from adapterpack import Session, export, load, validate
from adapterpack.bundle.decoder_graph import DECODER
from adapterpack.bundle.manifest import FILE_NAME, GRAPH, graph_file, read_bundle
from adapterpack.cli.commands.validate import command
from adapterpack.errors import AdapterpackError, FormatError

Make = Callable[..., Any]
Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def decoders(base_of: Make, pack_of: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of two adapters with the engine's graph beside the ordinary one."""
    folder = tmp_path_factory.mktemp("validated") / "decoders"
    export(base_of("llama"), [pack_of("llama", name) for name in ("alpha", "beta")], folder, in_place=True)
    return folder


@pytest.fixture(scope="module")
def bare(base_of: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without packs, and so without a canary."""
    folder = tmp_path_factory.mktemp("validated") / "bare"
    export(base_of("llama"), [], folder, slots=3, max_rank=4, in_place=True)
    return folder


def copied(bundle: Path, folder: Path, spoil: Spoil) -> Path:
    """A copy that was changed, and whose manifest was written anew, so that every digest is right."""
    shutil.copytree(bundle, folder)
    spoil(folder)
    read_bundle(folder).write(folder)
    return folder


def rules(folder: Path, **options: Any) -> list[tuple[str, str]]:
    findings = validate(folder, **options).findings
    return [(finding.rule, finding.where) for finding in findings if finding.severity == "error"]


def exchanged_slots(folder: Path) -> None:
    manifest = json.loads((folder / FILE_NAME).read_text())
    one, two = manifest["adapters"]
    one["slot"], two["slot"] = two["slot"], one["slot"]
    (folder / FILE_NAME).write_text(json.dumps(manifest, separators=(",", ":"), sort_keys=True))


def exchanged_files(folder: Path) -> None:
    one, two = (folder / "adapters" / f"{name}.onnx_adapter" for name in ("alpha", "beta"))
    other = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(other)


@pytest.mark.parametrize(("mode", "spoil"), [("bank", exchanged_slots), ("inputs", exchanged_files)])
def test_adapters_of_two_tenants_exchanged_are_not_valid(
    mode: str,
    spoil: Spoil,
    bundle_of: Make,
    tmp_path: Path,
) -> None:
    """Found without opening a session, and by a session, in the same words."""
    folder = copied(bundle_of("llama", mode), tmp_path / "bundle", spoil)
    with pytest.raises(FormatError) as refused:
        Session(folder, "cpu")
    findings = validate(folder).findings
    assert {(finding.rule, finding.where) for finding in findings} == {
        ("AB202", "adapters/alpha"),
        ("AB202", "adapters/beta"),
    }
    assert refused.value.sentence in {finding.message for finding in findings}
    assert CliRunner().invoke(command, [str(folder)]).exit_code == 1


def test_a_base_slot_that_holds_an_adapter_is_not_valid_though_there_are_no_packs(
    bare: Path,
    tmp_path: Path,
) -> None:
    """Rows of the base would be answered by it."""

    def spoil(folder: Path) -> None:
        model = onnx.load(str(folder / GRAPH))
        slot = next(one for one in model.graph.initializer if one.name.endswith(".up"))
        values = np.array(onnx.numpy_helper.to_array(slot))
        values[0] = 1
        slot.CopyFrom(onnx.numpy_helper.from_array(values, slot.name))
        onnx.save(model, str(folder / GRAPH))

    folder = copied(bare, tmp_path / "bundle", spoil)
    with pytest.raises(FormatError, match="slots change the base"):
        Session(folder, "cpu")
    assert rules(folder) == [("AB202", GRAPH)]


BOMB = "{% set x = 'xx' %}" + "{% set x = x ~ x %}" * 40 + "{{ x }}"
EACH = (
    "{% set ns = namespace(x=messages[0].content) %}"
    "{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
)


OTHER = {"name": "rag", "template": "x"}


def written(name: str, text: str) -> Spoil:
    return lambda folder: (folder / name).write_text(text)


def configured(name: str, **changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(value | changes))

    return spoil


WORDS, CHATS = "tokenizer.json", "tokenizer_config.json"
UNUSABLE: dict[str, tuple[str, Spoil]] = {
    "a template that doubles a text": ("tokenizer.json", written("chat_template.jinja", BOMB)),
    "a template that doubles a message": ("tokenizer.json", written("chat_template.jinja", EACH)),
    "a template that is no template": ("tokenizer.json", written("chat_template.jinja", "{% for %}")),
    "a template that is a number": (WORDS, configured(CHATS, chat_template=[1])),
    "templates without a default": (WORDS, configured(CHATS, chat_template=[OTHER])),
    "a special token that is a number": (WORDS, configured(CHATS, chat_template="a", bos_token=5)),
    "an inline bomb": (WORDS, configured(CHATS, chat_template=BOMB)),
    "no tokenizer": ("tokenizer.json", written("tokenizer.json", "{}")),
    "a configuration that is a list": ("config.json", written("config.json", "[]")),
    "a context of no length": ("config.json", configured("config.json", max_position_embeddings=-1)),
    "sampling that is a list": ("generation_config.json", written("generation_config.json", "[]")),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_no_prompt_can_be_read_with_is_not_valid(name: str, bundle_of: Make, tmp_path: Path) -> None:
    """A session refuses the first prompt; the validator needs none."""
    where, spoil = UNUSABLE[name]
    folder = copied(bundle_of("llama", "bank"), tmp_path / "bundle", spoil)
    with pytest.raises(AdapterpackError):
        Session(folder, "cpu").generate(["w1"], sampling="model", max_new_tokens=1)
    assert rules(folder) == [("AB106", where)]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content[0].text }}{% endfor %}",
        "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}w1",
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    ],
    ids=["parts", "a system message", "texts"],
)
def test_a_template_that_takes_some_form_of_messages_is_valid(
    template: str,
    bundle_of: Make,
    tmp_path: Path,
) -> None:
    """Not every model has messages that are one text."""
    spoil = written("chat_template.jinja", template)
    assert validate(copied(bundle_of("llama", "bank"), tmp_path / "bundle", spoil)).valid


def other_weights(name: str) -> Spoil:
    """One weight of a graph with another sign, in a file of its own."""

    def spoil(folder: Path) -> None:
        graph = ir.load(folder / name)
        value = next(value for key, value in graph.graph.initializers.items() if "down_proj.weight" in key)
        value.const_value = ir.tensor(-np.array(value.const_value.numpy()), name=value.name)
        data = "other.onnx.data" if name == GRAPH else f"{name}.data"
        ir.save(graph, folder / "other.onnx", external_data=data)
        (folder / "other.onnx").replace(folder / name)

    return spoil


@pytest.mark.parametrize("name", [GRAPH, graph_file(DECODER)])
def test_every_graph_of_a_bundle_has_the_weights_of_its_base(
    name: str,
    decoders: Path,
    bare: Path,
    base_of: Make,
    tmp_path: Path,
) -> None:
    """The engine's graph is what ``run`` and ``serve`` use. With the base it is told by its weights, and
    without by the canaries.
    """
    for bundle in (decoders, bare):
        folder = copied(bundle, tmp_path / bundle.name, other_weights(name))
        assert rules(folder, base=base_of("llama"), full=True) == [("AB302", name)]
    assert rules(tmp_path / "decoders", full=True)[0][0] == "AB401"


def unknown_operator(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        graph = onnx.load(str(folder / name), load_external_data=False)
        graph.graph.node[-1].op_type = "NoSuchOperator"
        (folder / name).write_bytes(graph.SerializeToString())

    return spoil


@pytest.mark.parametrize("name", [GRAPH, graph_file(DECODER)])
def test_a_graph_that_no_runtime_opens_is_not_valid(
    name: str,
    bare: Path,
    base_of: Make,
    tmp_path: Path,
) -> None:
    """With ``full`` every graph is opened, also the one that only some calls need, and of which no canary
    tells.
    """
    folder = copied(bare, tmp_path / "bundle", unknown_operator(name))
    assert CliRunner().invoke(command, [str(folder), "--full"]).exit_code == 1
    (finding,) = validate(folder, base=base_of("llama"), full=True).findings
    assert (finding.rule, "cannot open the graph" in finding.message) == ("AB401", True)
    assert finding.where == name


def test_texts_are_those_of_the_base(decoders: Path, base_of: Make, tmp_path: Path) -> None:
    """Two words exchanged in the tokenizer, and a template that the base has not: with the base named they
    are errors; that the packs were trained with other words is said without it.
    """

    def other_words(folder: Path) -> None:
        value = json.loads((folder / "tokenizer.json").read_text())
        words = value["model"]["vocab"]
        words["w1"], words["w2"] = words["w2"], words["w1"]
        (folder / "tokenizer.json").write_text(json.dumps(value))

    words = copied(decoders, tmp_path / "words", other_words)
    assert rules(words, base=base_of("llama")) == [("AB303", "tokenizer.json")]
    findings = validate(words).findings
    assert [(finding.rule, finding.severity) for finding in findings] == [("AB203", "warning")] * 2
    template = copied(decoders, tmp_path / "template", written("chat_template.jinja", "evil"))
    assert rules(template, base=base_of("llama")) == [("AB303", "chat template")]
    assert rules(decoders, base=base_of("llama"), full=True) == []


def test_what_was_not_compared_is_said(bundle_of: Make, base_of: Make) -> None:
    """Folded weights are the base's no more, and slots that are made with the base's weights are compared in
    a session.
    """
    assert (
        "the weights of the graphs against the base's: adapters are folded into them"
        in validate(bundle_of("llama", "folded"), base=base_of("llama"), full=True).not_checked
    )
    report = validate(bundle_of("llama", "bank"), base=base_of("llama"), full=True)
    assert not any("weights" in text for text in report.not_checked)


def test_a_canary_that_was_taken_out_is_said(
    bundle_of: Make,
    pack_of: Make,
    base_of: Make,
    tmp_path: Path,
) -> None:
    """A pack without one is another pack, so the bundle's manifest names another; who asks for all hears that
    none was replayed.
    """
    pack = load(pack_of("llama", "alpha"))
    bare = dataclasses.replace(pack, manifest=replace(pack.manifest, canary=None))
    export(base_of("llama"), [bare], tmp_path / "bundle", in_place=False)
    report = validate(tmp_path / "bundle", base=base_of("llama"), full=True)
    assert report.valid
    assert "canary of alpha: the pack carries none" in report.not_checked

    def exchanged(folder: Path) -> None:
        target = folder / "adapters" / "alpha"
        shutil.rmtree(target)
        shutil.copytree(tmp_path / "bundle" / "adapters" / "alpha", target)

    folder = copied(bundle_of("llama", "bank"), tmp_path / "exchanged", exchanged)
    assert rules(folder) == [("AB201", "adapters/alpha")]
