"""The validator: bad packs by rule, altered bytes, budgets, swapped files, the forms of its report."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click.testing
import jsonschema
import numpy as np
import pytest
from format_schemas import canary_schema, manifest_schema
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterpack import LoRA
from adapterpack.adapter_methods import Site, get
from adapterpack.base.checkpoint import Checkpoint
from adapterpack.cli.main import main
from adapterpack.errors import FormatError
from adapterpack.io import hashing, safetensors, typed_json
from adapterpack.io.safe_open import LARGE
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import build
from adapterpack.pack.validate.checks import folder as files
from adapterpack.pack.validate.checks.context import Budget, Spent
from adapterpack.pack.validate.checks.template import template_findings
from adapterpack.pack.validate.checks.text import looks_like, unsafe
from adapterpack.pack.validate.registry import RULES
from adapterpack.pack.validate.sarif import sarif
from adapterpack.pack.validate.validation import examine, load, validate
from adapterpack.resources import schema

sys.path.insert(0, str(Path(__file__).parent / "packs"))
import make_bad as bad
from test_pack import PLACES, make_pack
from test_pack import VALUE as GOOD

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parent.parent
CASES = {case.name: case for case in bad.BAD}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid pack that a test may spoil."""
    bad.good(tmp_path / "tickets")
    return tmp_path / "tickets"


def errors(folder: Path, **options: Any) -> list[str]:
    """The ids of the rules that are broken."""
    return [finding.rule for finding in validate(folder, **options).findings if finding.severity == "error"]


# ------------------------------------------------------------------------------------------------------------
# bad packs


def test_there_are_sixty_bad_packs_with_names_of_their_own() -> None:
    """At least 60, and every rule whose breach is an error and needs no base is triggered by at least one."""
    assert len(bad.BAD) >= 60
    assert len(CASES) == len(bad.BAD)
    # tests/test_pack.py and below
    known_elsewhere = {"AP000", "AP201", "AP206", "AP404", "AP603", "AP701", "AP702"}
    assert {rule.id for rule in RULES.values() if rule.severity == "error"} - {
        case.rule for case in bad.BAD
    } == known_elsewhere


@pytest.fixture(scope="module")
def uncollected() -> Iterator[None]:
    """What thousands of tests before left alive is not looked through again: it would be counted as a
    validation's time.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("name", CASES)
def test_a_bad_pack_is_refused_by_its_rule_quickly(name: str, tmp_path: Path, uncollected: None) -> None:
    """The first error is of the rule; load refuses; in seconds; under 64 MB more of memory at the peak than
    before.
    """
    folder = bad.make(CASES[name], tmp_path / "tickets")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    report = validate(folder)
    taken, grown = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert [finding.rule for finding in report.findings if finding.severity == "error"][:1] == [
        CASES[name].rule
    ], report.findings
    assert report.state == "invalid"
    assert taken < 10
    assert grown < 64 << 10  # kilobytes
    with pytest.raises(Exception, match=CASES[name].rule):
        load(folder)


def test_the_good_pack_of_which_they_are_made_is_valid(folder: Path, tmp_path: Path) -> None:
    """With and without a template: no finding at all; so each bad pack is bad by its own fault."""
    assert validate(folder).findings == ()
    bad.good(tmp_path / "templated", bad.GOOD_TEMPLATE)
    assert validate(tmp_path / "templated").findings == ()
    load(tmp_path / "templated").write(tmp_path / "copy")
    assert (tmp_path / "copy" / bad.TEMPLATE).read_text() == bad.GOOD_TEMPLATE
    assert validate(tmp_path / "copy").findings == ()


def test_bad_packs_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    """The generator is deterministic."""
    for name in ("tensor_name_twice", "zip_archive", "template_swapped", "lineage_too_deep"):
        one, two = (
            bad.make(CASES[name], tmp_path / f"{name}-1"),
            bad.make(CASES[name], tmp_path / f"{name}-2"),
        )
        assert {path.name: path.read_bytes() for path in one.iterdir()} == {
            path.name: path.read_bytes() for path in two.iterdir()
        }


def places(folder: Path, count: int) -> Iterator[tuple[Path, bytes, int]]:
    """Random positions over all bytes of the pack."""
    contents = [(path, path.read_bytes()) for path in sorted(folder.iterdir())]
    chance = random.Random(7)
    for _ in range(count):
        position = chance.randrange(sum(len(data) for _, data in contents))
        for path, data in contents:
            if position < len(data):
                yield path, data, position
                break
            position -= len(data)


def test_two_hundred_flipped_bytes_are_all_found(folder: Path) -> None:
    """A byte of any file with one or more bits flipped: the pack is invalid."""
    chance = random.Random(8)
    for path, data, position in places(folder, 200):
        changed = bytearray(data)
        changed[position] ^= chance.randrange(1, 256)
        path.write_bytes(changed)
        assert errors(folder), (path.name, position)
        path.write_bytes(data)
    assert not errors(folder)


def test_two_hundred_truncations_are_all_found(folder: Path) -> None:
    """Any file cut at any position is invalid."""
    for path, data, position in places(folder, 200):
        path.write_bytes(data[:position])
        assert errors(folder), (path.name, position)
        path.write_bytes(data)
    assert not errors(folder)


# ------------------------------------------------------------------------------------------------------------
# time of check, use


def test_files_swapped_after_they_were_read_change_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between reading and checking every file is replaced by another pack's: report and tensors are those of
    the bytes that were read.
    """
    expected = load(folder)
    real = files.read_files

    def read_files(*args: Any) -> dict[str, bytes]:
        contents = real(*args)
        for path in folder.iterdir():
            path.unlink()
            path.write_bytes(b"\x80\4 swapped")
        return contents

    monkeypatch.setattr(files, "read_files", read_files)
    report, pack = examine(folder)
    assert (report.findings, report.id) == ((), expected.id)
    assert pack is not None
    assert all(np.array_equal(pack.tensors[name], value) for name, value in expected.tensors.items())


def test_a_link_put_in_place_of_a_file_is_not_followed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the folder and the reading, the tensor file becomes a link to the same bytes:
    refused.
    """
    real = files.closed_file_list

    def swapped(*args: Any) -> Any:
        found = [*real(*args)]
        (folder / bad.TENSORS).rename(tmp_path / "elsewhere")
        (folder / bad.TENSORS).symlink_to(tmp_path / "elsewhere")
        return found

    monkeypatch.setattr(files, "closed_file_list", swapped)
    assert errors(folder) == ["AP001"]


# ------------------------------------------------------------------------------------------------------------
# budgets


def test_a_budget_that_runs_out_is_not_fully_checked(folder: Path) -> None:
    """No time, or no memory for the files: neither valid nor invalid, what is open is named, exit code 3, and
    nothing is loaded.
    """
    for budget, words in ((Budget(seconds=0), "time"), (Budget(memory=100), "bytes")):
        report = validate(folder, budget=budget)
        assert report.state == "not fully checked"
        assert words in report.not_checked[0]
    (folder / bad.MANIFEST).unlink()  # what PEFT wrote is held as well
    for budget, words in ((Budget(seconds=0), "time"), (Budget(memory=100), "bytes")):
        report = validate(folder, budget=budget)
        assert (report.kind, report.state) == ("peft", "not fully checked")
        assert words in report.not_checked[0]
    for option in (["--max-seconds", "0"], ["--max-bytes", "100"]):
        done = click.testing.CliRunner().invoke(main, ["validate", str(folder), *option])
        assert done.exit_code == 3
        assert "is not fully checked" in done.output


def test_full_needs_a_base_and_asks_the_second_reader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a base a full validation is open; the reference reader is asked and agrees; one that does not
    is AP603.
    """
    assert validate(folder, full=True).state == "not fully checked"
    assert validate(folder).state == "valid"
    assert click.testing.CliRunner().invoke(main, ["validate", str(folder), "--full"]).exit_code == 3
    import safetensors

    monkeypatch.setattr(safetensors, "deserialize", lambda data: [])
    assert errors(folder, full=True) == ["AP603"]


def test_the_second_reader_reads_a_large_pack(tmp_path: Path) -> None:
    """A tensor file of more than 64 MiB, which is mapped: the reference reader agrees on it, and refuses one
    that it does not read.
    """
    wide = (LARGE >> 4) + 64
    factors = {"lora_A": np.full((4, wide), 0.5, np.float32), "lora_B": np.full((4, 4), 0.5, np.float32)}
    pack = build(
        "large",
        get("lora"),
        {Site("net.q", wide, 4): (LoRA(r=4), factors)},
        task=m.PackTask("text-generation"),
        base=m.Base(),
    )
    pack.write(tmp_path / "large")
    assert (tmp_path / "large" / bad.TENSORS).stat().st_size > LARGE
    report = validate(tmp_path / "large", full=True)
    assert report.findings == ()
    assert not any("second reader" in text for text in report.not_checked)
    short = validate(tmp_path / "large", full=True, budget=Budget(memory=2 * LARGE))
    assert short.state == "not fully checked"
    assert "the second reader: " in short.not_checked[0]


def test_what_was_not_checked_is_said_of_this_pack(folder: Path, tmp_path: Path) -> None:
    """Each question that was not asked, and how to ask it; nothing is said of what the pack does not have or
    what was checked.
    """
    said = validate(folder).not_checked
    assert [text.partition(":")[0] for text in said] == ["base", "canary", "second reader", "lineage"]
    assert "second reader" not in " ".join(validate(folder, full=True).not_checked)
    (folder / "adapterpack.sig.json").write_text("{}")
    report = validate(folder)
    assert report.valid
    assert f"signature: not verified (adapterpack verify {folder} --key KEY)" in report.not_checked
    assert (
        "signature: not verified" in click.testing.CliRunner().invoke(main, ["validate", str(folder)]).output
    )
    bad.put(folder, "license", to="Apache-2.0")
    bad.put(folder, "metrics", to=[{"name": "accuracy", "value": 0.5}])
    bad.put(folder, "lineage", to=None)
    assert validate(folder).not_checked[-1] == "claims: metrics, license cannot be checked"
    assert not any(text.startswith("lineage") for text in validate(folder).not_checked)


def test_an_error_outweighs_what_was_not_checked(folder: Path) -> None:
    """invalid, exit code 1, also with --full and no base."""
    bad.values(folder, bad.A, float("nan"))
    assert validate(folder, full=True).state == "invalid"


# ------------------------------------------------------------------------------------------------------------
# reports, warnings


def test_every_finding_has_a_place_for_programs(tmp_path: Path) -> None:
    """JSON: rule, severity, where, message, fix, and file, pointer or offset; the pointer leads to a value of
    the manifest.
    """
    for name in ("scale_tampered", "digest_of_another_tensor", "auto_map", "zip_archive", "unknown_field"):
        folder = bad.make(CASES[name], tmp_path / name)
        finding = validate(folder).findings[0].to_json()
        assert finding["file"] or finding["pointer"]
        if finding["pointer"] and finding["pointer"] != "/":
            value = json.loads((folder / bad.MANIFEST).read_text())
            for part in finding["pointer"].split("/")[1:]:
                key = part.replace("~1", "/").replace("~0", "~")
                value = value[int(key)] if isinstance(value, list) else value[key]


def test_sarif_has_the_structure_of_2_1_0(tmp_path: Path) -> None:
    """Version, one run, a driver with rules, results whose ruleIndex is their rule's, levels and locations of
    the standard.
    """
    for number, name in enumerate(("digest_of_another_tensor", "scale_tampered", "file_.env")):
        folder = bad.make(CASES[name], tmp_path / name)
        out = tmp_path / f"{number}.sarif"
        done = click.testing.CliRunner().invoke(main, ["validate", str(folder), "--sarif", str(out)])
        assert done.exit_code == 1
        log = json.loads(out.read_text())
        assert log == sarif(validate(folder), log["runs"][0]["tool"]["driver"]["version"])
        assert (log["version"], len(log["runs"])) == ("2.1.0", 1)
        assert log["$schema"].startswith("https://")
        (run,) = log["runs"]
        rules = run["tool"]["driver"]["rules"]
        assert len({rule["id"] for rule in rules}) == len(rules)
        assert all(isinstance(invocation["executionSuccessful"], bool) for invocation in run["invocations"])
        assert run["results"]
        for result in run["results"]:
            assert rules[result["ruleIndex"]]["id"] == result["ruleId"] == CASES[name].rule
            assert result["level"] in {"none", "note", "warning", "error"}
            assert result["message"]["text"]
            (location,) = result["locations"]
            physical = location["physicalLocation"]
            assert re.fullmatch(r"[\w.%-]+", physical["artifactLocation"]["uri"])
            assert physical.get("region", {"byteOffset": 0})["byteOffset"] >= 0
            assert location["logicalLocations"][0]["fullyQualifiedName"]


def test_the_page_of_rules_is_the_registry() -> None:
    """docs/validator.md holds every rule, in order."""
    head = "| rule | severity | what must hold | what to do |\n| --- | --- | --- | --- |\n"
    rows = (
        f"| {rule.id} | {rule.severity} | {rule.holds} | {rule.fix} |\n" for rule in sorted(RULES.values())
    )
    assert head + "".join(rows) in (ROOT / "docs" / "validator.md").read_text("utf-8")


@pytest.mark.parametrize(("value", "rule"), [(2e4, "AP303"), (3e3, "AP304")])
def test_values_that_will_not_survive_are_warned_of(value: float, rule: str, folder: Path) -> None:
    """A value above 1e4; two factors of 3000: 1.5 * 2 * 3000 * 3000 is beyond float16."""
    bad.values(folder, bad.A, value)
    bad.values(folder, bad.B, value)
    report = validate(folder)
    assert report.valid
    assert rule in [finding.rule for finding in report.findings]


def test_look_alike_owners_and_unsafe_addresses() -> None:
    """One letter, a swap or a look-alike digit away is told; the owners themselves and strangers are not."""
    assert [
        looks_like(owner)
        for owner in ("meta-lIama", "rnistralai", "micorsoft", "Gooogle", "HuggingFaceTB", "acme")
    ] == ["meta-llama", "mistralai", "microsoft", "google", None, None]
    assert unsafe("https://example.org/a?b=c") is None
    for address in (
        "https://localhost/",
        "https://10.0.0.1",
        "https://[::1]/",
        "https://0x7f.1/",
        "https://a.internal/",
        "ftp://example.org",
        "https://example.org:22/",
        "https://ex\u0430mple.org/",
        "https://a@b.org",
        "https://[x",
    ):
        assert unsafe(address), address


def test_templates_of_real_models_pass() -> None:
    """What chat templates do: loops, filters, namespaces, slices, raise_exception, generation marks."""
    text = """{%- set ns = namespace(found=false) -%}{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m['role'] }}
{% if m.content is string %}{{ m.content | trim }}{% else %}{{ m.content | map(attribute='text') | join(' ') }}{% endif %}
{% generation %}{{ m['content'][::-1] | tojson }}{% endgeneration %}{% if loop.last %}{% break %}{% endif %}{% endfor %}
{% if not ns.found %}{{ raise_exception('no') }}{% endif %}"""
    assert [*template_findings(text.encode(), "t")] == []
    assert [finding.rule for finding in template_findings(b"see https://example.org", "t")] == ["AP856"]


# ------------------------------------------------------------------------------------------------------------
# with a base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny tied base with a tokenizer and a chat template."""
    from adapterpack.io import safetensors

    (tmp_path / "base").mkdir()
    tensors = {
        "net.q.weight": np.ones((7, 5), np.float32),
        "net.v.weight": np.ones((3, 5), np.float32),
        "head.weight": np.ones((20, 30), np.float32),
    }
    safetensors.write(tmp_path / "base" / "model.safetensors", tensors)
    (tmp_path / "base" / "config.json").write_text('{"tie_word_embeddings": true}')
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({"chat_template": bad.GOOD_TEMPLATE}))
    return tmp_path / "base"


def test_the_template_is_compared_with_the_base(base: Path, tmp_path: Path) -> None:
    """The same: nothing. Another: a warning with a unified diff. Said to be the same and is not: an error."""
    bad.good(tmp_path / "same", bad.GOOD_TEMPLATE)
    assert validate(tmp_path / "same", base).findings == ()
    assert validate(tmp_path / "same", base, full=True).state == "valid"
    bad.good(tmp_path / "other", bad.GOOD_TEMPLATE + "Be brief.")
    (finding,) = validate(tmp_path / "other", base).findings
    assert (finding.rule, finding.severity) == ("AP705", "warning")
    assert "+{% endfor %}Be brief." in finding.message
    shown = (
        click.testing.CliRunner()
        .invoke(main, ["validate", str(tmp_path / "other"), "--base", str(base)])
        .output
    )
    assert "\n  +{% endfor %}Be brief.\n" in shown
    bad.put(tmp_path / "other", "tokenizer", "chat_template", to="same-as-base")
    assert errors(tmp_path / "other", base=base) == ["AP702"]


def test_tokenizer_digests_are_compared_with_the_base(base: Path, tmp_path: Path) -> None:
    """A digest that is not the base's file's, or not its template's, is AP702; same-as-base and the right
    digest are not.
    """
    for field, value, expected in (
        ("tokenizer_json", "0" * 64, ["AP702"]),
        ("added_tokens", "0" * 64, ["AP702"]),
        ("chat_template", "0" * 64, ["AP702"]),
        ("tokenizer_json", "same-as-base", []),
        ("tokenizer_json", "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a", []),
    ):
        folder = tmp_path / f"{field}-{value[:4]}"
        bad.good(folder)
        bad.put(
            folder,
            "tokenizer",
            to={"tokenizer_json": None, "added_tokens": None, "chat_template": None, field: value},
        )
        assert errors(folder, base=base) == expected, field


def test_a_change_of_one_tied_partner_and_a_pack_as_large_as_its_base_are_warned_of(
    base: Path, tmp_path: Path
) -> None:
    """The base ties lm_head to its embeddings; the pack trains lm_head alone, with as many parameters as the
    base: AP703, AP704.
    """
    site = {
        Site("net.q", 5, 7): (
            LoRA(r=1),
            {"lora_A": np.ones((1, 5), np.float32), "lora_B": np.ones((7, 1), np.float32)},
        )
    }
    build(
        "x",
        get("lora"),
        site,
        task=m.PackTask("text-generation"),
        base=m.Base(),
        full={"lm_head": {"weight": np.ones((20, 30), np.float32)}},
    ).write(tmp_path / "x")
    assert [finding.rule for finding in validate(tmp_path / "x", base).findings] == ["AP703", "AP704"]


# ------------------------------------------------------------------------------------------------------------
# folders of PEFT


def test_a_folder_of_peft_with_leftovers_is_imported_with_warnings(folder: Path) -> None:
    """A pickle beside it is never opened: a warning, and a note where it is a trainer's; a key that loads code is
    an error; so is a template that breaks out.
    """
    (folder / bad.MANIFEST).unlink()
    for name in ("training_args.bin", "rng_state_0.pth", "value.pkl"):
        (folder / name).write_bytes(b"\x80\4")
    report = validate(folder)
    assert report.valid
    assert any("rng_state_0.pth, training_args.bin" in note for note in report.not_checked)
    assert [(finding.rule, finding.severity) for finding in report.findings] == [("AP106", "warning")]
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": "x.Y"}}))
    assert errors(folder) == ["AP110"]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ x.__class__ }}"}))
    assert errors(folder) == ["AP852"]


# ------------------------------------------------------------------------------------------------------------
# the schema, quickly

VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(-3, 3)
    | st.sampled_from(["", "a", "lora", "1.1", "0" * 64, "a\n"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "name", "x_a"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def full(value: Any) -> set[str]:
    """The places of all violations of the manifest's schema, as JSON pointers, by a full implementation of
    JSON Schema.
    """

    def pattern(_: Any, expression: str, instance: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
        # Python's "$" lets a newline pass
        if isinstance(instance, str) and not re.fullmatch(expression, instance):
            yield jsonschema.ValidationError("pattern")

    def every(error: jsonschema.ValidationError) -> Iterator[str]:
        yield "".join(f"/{typed_json.escape_key(part)}" for part in error.absolute_path)
        for inner in error.context or ():
            yield from every(inner)

    # 1.0 is none to us
    whole = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: type(value) is int
    )
    strict = jsonschema.validators.extend(
        jsonschema.Draft202012Validator, {"pattern": pattern}, type_checker=whole
    )
    return {place for error in strict(schema("manifest.v1")).iter_errors(value) for place in every(error)}


FIRST = {"integrity", "format_version"}
"""What is looked at before the structs: the first is compared with the bytes, the other decides on the fields
that there are.
"""


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_reader_agrees_with_the_schema(data: st.DataObject) -> None:
    """Any value at any place of a good manifest: the structs take it if JSON Schema does; and where they find
    it wrong, so does that.
    """
    forged = json.loads(json.dumps(GOOD))
    *path, last = data.draw(st.sampled_from([place for place in PLACES if place[0] not in FIRST]))
    here = forged
    for key in path:
        here = here[key]
    if isinstance(here, list) or data.draw(st.booleans()):
        here[last] = data.draw(VALUE)
    else:
        del here[last]
    expected = full(forged)
    del forged["integrity"]
    manifest = typed_json.read(forged, m.Manifest)
    assert isinstance(manifest, typed_json.Misfit) == bool(expected)
    assert not isinstance(manifest, typed_json.Misfit) or manifest.pointer in expected


def test_the_published_schema_is_made_from_the_structs() -> None:
    """python tests/format_schemas.py manifest > schemas/manifest.v1.json"""
    assert schema("manifest.v1") == manifest_schema()
    assert schema("canary.v1") == canary_schema()


def test_a_valid_pack_is_validated_without_heavy_imports(folder: Path) -> None:
    """The command imports neither torch nor ONNX Runtime, nor jsonschema: that would be most of its time."""
    code = (
        "import sys; from adapterpack.cli.main import main\n"
        f"try: main(['validate', {str(folder)!r}])\nexcept SystemExit as done: print(done.code, *sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    code, *modules = done.stdout.splitlines()[-1].split()
    assert code == "0"
    assert "adapterpack.pack.validate.registry" in modules
    unwanted = {"torch", "transformers", "peft", "jsonschema", "jinja2", "onnxruntime"}
    assert not unwanted & set(modules)


def test_the_time_is_looked_at_while_a_pack_is_hashed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that runs out between two tensors ends the hashing there, and the report says what was left
    undone.
    """
    look = Budget.require_time

    def spent(self: Budget, what: str) -> None:
        if what == "the digests of the files and tensors":
            raise Spent(f"{what}: the time ran out")
        look(self, what)

    monkeypatch.setattr(Budget, "require_time", spent)
    report = validate(folder)
    assert report.incomplete
    assert "the digests of the files and tensors: the time ran out" in report.not_checked


def test_load_refuses_what_is_incomplete(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack too large for the memory budget is not loaded half-checked."""
    monkeypatch.setattr("adapterpack.pack.validate.validation.Budget", lambda: Budget(memory=10))
    with pytest.raises(FormatError, match="checked to the end"):
        load(folder)


def test_the_time_is_looked_at_while_the_base_is_hashed(tmp_path: Path) -> None:
    """A base of many blocks, and a clock that runs out at the third: the hashing ends there, long before the
    end.
    """
    folder = tmp_path / "base"
    folder.mkdir()
    safetensors.write(
        folder / "model.safetensors", {"w": np.zeros((64, 1 << 18), np.float32)}, {"format": "pt"}
    )
    base, looks = Checkpoint(folder), []

    def watch() -> None:
        looks.append(None)
        if len(looks) >= 3:
            raise Spent("the bytes of the base: the time ran out")

    with pytest.raises(Spent, match="bytes of the base"), base.watched(watch):
        _ = base.content
    assert 3 <= len(looks) <= 3 + hashing.cores()
    assert base.content == Checkpoint(folder).content, "the watch is gone with the block"


def test_a_finding_says_its_remedy_and_its_place_once(tmp_path: Path) -> None:
    """What a command line prints of a wrong base: one way out, not the error's and the rule's. Of a manifest
    that was edited: where.
    """

    def told(rule: str, *args: str) -> str:
        said = click.testing.CliRunner().invoke(main, ["validate", str(tmp_path / "pack"), *args])
        (line,) = [text for text in said.output.splitlines() if rule in text]
        return line

    make_pack().write(tmp_path / "pack")
    (tmp_path / "base").mkdir()
    safetensors.write(
        tmp_path / "base" / "model.safetensors",
        {"other.weight": np.zeros((3, 4), np.float32)},
        {"format": "pt"},
    )
    assert told("AP701", "--base", str(tmp_path / "base")).count("To fix it:") == 1
    path = tmp_path / "pack" / m.FILE_NAME
    path.write_text(path.read_text().replace('"tickets"', '"another"'))
    assert told("AP001").count(m.FILE_NAME) == 1
    with pytest.raises(FormatError) as raised:
        load(tmp_path / "pack")
    assert str(raised.value).count(m.FILE_NAME) == 1
