"""A bundle's manifest: written and read back, its limits, what older ones lack, and its JSON Schema."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from format_schemas import bundle_schema
from jsonschema import Draft202012Validator

from adapterpack.bundle.manifest import (
    OPTIONAL,
    Bundle,
    BundledAdapter,
    BundleFile,
    Heads,
    MappedSite,
    parse_bundle,
    read_bundle,
)
from adapterpack.bundle.signature import GraphSignature, Port, signature_of
from adapterpack.errors import FormatError, Unsupported
from adapterpack.io import strict_json
from adapterpack.manifest.manifest import Base

pytestmark = pytest.mark.fast

SCHEMA = json.loads((Path(__file__).parent.parent / "schemas" / "bundle.v1.json").read_text("utf-8"))
HEX = "0" * 64
SITE = MappedSite(
    "layers.0.q",
    "node",
    "x",
    "y",
    "w",
    None,
    "in_out",
    8,
    4,
    3,
    fields=("down", "up", "route0_abs_keys"),
    ranks={"rank": 2},
    heads=Heads("q", "k", "v", ("a", "b"), 4, 2, 8, 0.5),
)
BUNDLE = Bundle(
    "bank",
    "text-generation",
    Base("tiny", structure=f"bfp1:{HEX}"),
    "mobius",
    {"layers.0.q": SITE},
    (BundledAdapter("alpha", f"sha256:{HEX}", "adapters/alpha", 1, ("no", "yes")),),
    (BundleFile("model.onnx", 7, HEX, "graph"),),
    slots=2,
    max_rank=2,
    quantization={
        "scheme": "int8",
        "block_size": 32,
        "quantized": 3,
        "max_error": {"base": 0.5},
        "label_agreement": {"base": 1.0},
    },
    parity={
        "tolerance": 1e-4,
        "canary": {"replayed": {"alpha": {"max_abs": 0.0, "tolerance": 1.0}}, "not_replayed": {}},
    },
    io=GraphSignature((Port("input_ids", "int64", ("batch", None, 3)),)),
    io_before={"encoder": GraphSignature()},
)


def read(value: Any) -> Bundle:
    return parse_bundle(strict_json.canonical(value), "here")


def test_a_bundle_is_read_as_it_was_written() -> None:
    """Field for field and byte for byte; the schema that ships is the one that is made, and has it as
    valid.
    """
    data = strict_json.canonical(BUNDLE.to_json())
    assert parse_bundle(data, "here") == BUNDLE
    assert strict_json.canonical(parse_bundle(data, "here").to_json()) == data
    assert bundle_schema() == SCHEMA, "python tests/format_schemas.py bundle writes it anew"
    Draft202012Validator.check_schema(SCHEMA)
    assert list(Draft202012Validator(SCHEMA).iter_errors(BUNDLE.to_json())) == []


def test_an_older_bundle_lacks_what_came_later() -> None:
    """Without any of the later fields it is a valid bundle of their defaults, for the reader and by the
    schema.
    """
    value = BUNDLE.to_json()
    for part, owner in (
        ("Bundle", value),
        ("Base", value["base"]),
        ("MappedSite", value["sites"]["layers.0.q"]),
    ):
        for field in OPTIONAL[part]:
            del owner[field]
    assert list(Draft202012Validator(SCHEMA).iter_errors(value)) == []
    site = dataclasses.replace(SITE, ranks={}, heads=None)
    assert read(value) == dataclasses.replace(
        BUNDLE, sites={"layers.0.q": site}, io=GraphSignature(), io_before={}
    )


def test_a_site_of_the_first_bundles_is_read() -> None:
    """What came later has a default, whatever it is: of no new field may the bundles that are there lack."""
    first = {
        "path",
        "node",
        "input",
        "output",
        "weight",
        "bias",
        "layout",
        "in_features",
        "out_features",
        "rank",
        "role",
        "fields",
    }
    value = BUNDLE.to_json()
    value["sites"] = {path: {name: site[name] for name in first} for path, site in value["sites"].items()}
    assert read(value).sites["layers.0.q"] == dataclasses.replace(SITE, ranks={}, heads=None)
    assert list(Draft202012Validator(SCHEMA).iter_errors(value)) == []


@pytest.mark.parametrize(
    "cache",
    [{"type": "int8"}, {"type": "int8", "relative": 0.1, "max_relative": 0.2, "label_agreement": 1.0}],
)
def test_a_report_may_lack_what_was_not_measured(cache: Any) -> None:
    """A float graph's caches in eight bits, before the graph itself is quantized; for the reader and by the
    schema.
    """
    value = {**BUNDLE.to_json(), "parity": {"decoder": {"steps": 2, "cache": cache}}}
    assert read(value).parity["decoder"]["cache"] == cache
    assert list(Draft202012Validator(SCHEMA).iter_errors(value)) == []


@pytest.mark.parametrize(
    ("pointer", "wrong"),
    [
        ("/mode", "banks"),
        ("/format", "adapterpack"),
        ("/format_version", "2.0"),
        ("/task", "Text"),
        ("/slots", 5000),
        ("/max_rank", -1),
        ("/dtype", "float64"),
        ("/padding", "up"),
        ("/pooling", "max"),
        ("/in_place", 1),
        ("/base/content", "abc"),
        ("/base/surprise", 1),
        ("/sites/layers.0.q/layout", "rows"),
        ("/sites/layers.0.q/in_features", 0),
        ("/sites/layers.0.q/fields", ["down", "down"]),
        ("/sites/layers.0.q/fields/1", "sideways"),
        ("/sites/layers.0.q/ranks/rank", 2_000_000),
        ("/sites/layers.0.q/part", "Model"),
        ("/sites/layers.0.q/heads/norm", ["a"]),
        ("/sites/layers.0.q/heads/count", 0),
        ("/sites/layers.0.q/surprise", None),
        ("/adapters/0/path", "../alpha"),
        ("/adapters/0/pack", "sha256:1"),
        ("/adapters/0/slot", 0),
        ("/adapters/0/labels", []),
        ("/files/0/path", "a/b/c/d/e"),
        ("/files/0/role", "weights"),
        ("/files/0/size", -1),
        ("/io/inputs/0/shape", [1] * 9),
        ("/io/inputs/0/dtype", "Float"),
        ("/io_before/Encoder", {}),
        ("/quantization/scheme", "Int 2"),
        ("/quantization/surprise", 1),
        ("/quantization/accuracy", "quick"),
        ("/quantization/error_by_accuracy", {"quick": 0.1}),
        ("/parity/canary/replayed/alpha/max_abs", -1.0),
        ("/parity/canary/surprise", 1),
        ("/surprise", 1),
    ],
)
def test_what_is_out_of_bounds_is_refused(pointer: str, wrong: Any) -> None:
    """By its place, or that of what holds it; by the schema, too."""
    value: Any = copy.deepcopy(BUNDLE.to_json())
    *path, last = [int(key) if key.isdigit() else key for key in pointer.split("/")[1:]]
    owner = value
    for key in path:
        owner = owner[key]
    owner[last] = wrong
    with pytest.raises(FormatError, match="does not fit its schema") as caught:
        read(value)
    assert pointer.startswith(str(caught.value.where).removeprefix("here#").rstrip("/") or "/")
    assert not Draft202012Validator(SCHEMA).is_valid(value)


@pytest.mark.parametrize("name", ["mode", "sites", "files", "format", "quantization", "parity"])
def test_what_every_bundle_has_is_not_left_out(name: str) -> None:
    value = BUNDLE.to_json()
    del value[name]
    with pytest.raises(FormatError, match="missing"):
        read(value)


def test_a_graph_with_an_output_of_no_type_is_refused_by_its_name() -> None:
    """What a builder makes that does not fit together: another frontend is tried then."""
    graph = ir.Graph([], [ir.Value(name="logits")], nodes=[], opset_imports={"": 21})
    with pytest.raises(Unsupported, match="type of an output") as error:
        signature_of(ir.Model(graph, ir_version=10))
    assert error.value.where == "logits"


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("config.json", r"To fix it: make a bundle of it: adapterpack export '.*a base' -o BUNDLE\.$"),
        (
            "adapterpack.json",
            r"To fix it: make a bundle of it: adapterpack export BASE '.*a base' -o BUNDLE\.$",
        ),
        ("other.json", r"To fix it: name the folder that export wrote\.$"),
    ],
)
def test_who_names_what_a_bundle_is_made_of_is_given_the_command(
    file: str, remedy: str, tmp_path: Path
) -> None:
    """A base or a pack; of any other folder none can be made."""
    (tmp_path / "a base").mkdir()
    (tmp_path / "a base" / file).write_text("{}")
    with pytest.raises(FormatError, match=remedy):
        read_bundle(tmp_path / "a base")
