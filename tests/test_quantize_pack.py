"""Int8 packs: the bound of every row, the error in the change, the round trip, and what a validator says of altered ones."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from msgspec.structs import replace

from adapterpack import LoRA
from adapterpack.adapter_methods import Site, fold, get
from adapterpack.errors import NothingToDo, UnknownName
from adapterpack.manifest import manifest as m
from adapterpack.manifest.entries import entry_of
from adapterpack.pack.pack import Pack, build, sealed
from adapterpack.pack.validate.validation import load, validate
from adapterpack.quantizing.packs import int8_rows, quantize_pack, schemes

sys.path.insert(0, str(Path(__file__).parent / "packs"))
from make_bad import sealed_json

pytestmark = pytest.mark.fast

SITES = (Site("layers.0.q_proj", 133, 67), Site("layers.0.v_proj", 132, 40, bias=True))


def pack(dtype: Any = np.float32, zero: bool = False) -> Pack:
    rng = np.random.default_rng(3)
    cfg = LoRA(r=5, alpha=9)
    adapters = {}
    for site in SITES:
        A, B = rng.standard_normal((5, site.in_features)).astype(dtype), rng.standard_normal((site.out_features, 5)).astype(dtype)
        A[2], B[::7] = 0, 0
        adapters[site] = (cfg, {"lora_A": A, "lora_B": 0 * B if zero else B})
    head = {"weight": rng.standard_normal((3, 17)).astype(np.float32), "bias": rng.standard_normal(3).astype(np.float32)}
    return build("tickets", get("lora"), adapters, task=m.Task("text-classification", None, ("a", "b", "c")), base=m.Base("acme/base"),
                 full={"classifier": head}, metrics=({"name": "accuracy", "value": 0.9},))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("size", [1e-40, 1e-5, 1.0, 1e4])
def test_every_row_is_within_half_a_step(dtype: Any, size: float) -> None:
    """|x - q s| <= s / 2 for every entry, with the float32 scale that is stored; the largest entry of a row has |q| = 127."""
    value = (size * np.random.default_rng(0).standard_normal((41, 23))).astype(dtype)
    value[5] = 0
    q, s = int8_rows(value)
    assert (q.dtype, s.dtype, q.shape, s.shape) == (np.int8, np.float32, (41, 23), (41, 1))
    exact = value.astype(np.float64)
    # One part in 10^12: the quotient and the product are taken in float64.
    assert (np.abs(exact - q.astype(np.float64) * s) <= s.astype(np.float64) / 2 * (1 + 1e-12)).all()
    assert not q[5].any()
    assert (s > 0).all()
    if s.min() > np.finfo(np.float32).tiny:
        assert set(np.abs(q).max(axis=1)) <= {0, 127}


def test_tensors_of_more_axes_have_one_scale_a_row() -> None:
    """[rows, a, b] has scales [rows, 1, 1]."""
    value = np.random.default_rng(0).standard_normal((4, 3, 2))
    q, s = int8_rows(value)
    assert s.shape == (4, 1, 1)
    assert (np.abs(value - q * s.astype(np.float64)) <= s / 2 * (1 + 1e-12)).all()


def dense(found: Pack) -> dict[str, np.ndarray]:
    """scale * B A in float64, from the stored integers and scales where there are any."""
    changes = {}
    for group in found.manifest.groups:
        if group.role == "adapter":
            factors = []
            for param in ("lora_B", "lora_A"):
                name = f"base_model.model.{group.path}.{param}.weight"
                factors.append(found.tensors[name].astype(np.float64) * found.tensors.get(f"{name}.scales", np.ones(1)).astype(np.float64))
            assert group.scale is not None
            changes[group.path] = group.scale * factors[0] @ factors[1]
    return changes


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_stated_error_is_that_of_the_change(dtype: Any) -> None:
    """max_error = max |D_q - D|, relative_error = |D_q - D|_F / |D|_F over all sites, against the dense formula."""
    exact, small = pack(dtype), quantize_pack(pack(dtype))
    stated = small.manifest.quantization
    assert stated is not None
    wanted, found = dense(exact), dense(small)
    errors = [found[path] - wanted[path] for path in wanted]
    relative = math.sqrt(sum(float((error**2).sum()) for error in errors) / sum(float((delta**2).sum()) for delta in wanted.values()))
    assert stated["scheme"] == "int8"
    # Pack.params multiplies integers and scales in float32: one rounding, 6e-8, on errors of 1e-2.
    assert stated["relative_error"] == pytest.approx(relative, rel=1e-4)
    assert stated["max_error"] == pytest.approx(max(float(np.abs(error).max()) for error in errors), rel=1e-4)
    assert 1e-4 < relative < 0.02


def test_a_change_of_zero_has_no_error() -> None:
    """B = 0: the change is zero before and after, and the relative error is 0, not 0 / 0."""
    assert quantize_pack(pack(zero=True)).manifest.quantization == {"scheme": "int8", "max_error": 0.0, "relative_error": 0.0}


def test_the_round_trip_is_valid_smaller_and_says_what_it_is(tmp_path: Path) -> None:
    """Written and read: the same id, valid, smaller, the head untouched, no PEFT config, the parent named, the parent unchanged."""
    exact = pack()
    before = exact.id
    exact.write(tmp_path / "exact")
    small = quantize_pack(load(tmp_path / "exact")).write(tmp_path / "small")
    report = validate(tmp_path / "small")
    assert report.valid, report.findings
    back = load(tmp_path / "small")
    assert back.id == small.id == quantize_pack(exact).id
    assert (back.name, exact.id, load(tmp_path / "exact").id) == ("tickets-int8", before, before)
    assert back.manifest.must_understand == ("int8",)
    assert back.manifest.lineage == m.Lineage("quantize", (m.Parent(before, "tickets"),), {"scheme": "int8"})
    assert (back.manifest.canary, back.manifest.metrics) == (None, ())
    assert sorted(file.name for file in (tmp_path / "small").iterdir()) == ["adapter_model.safetensors", "adapterpack.json"]
    bytes_of = {name: (tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("exact", "small")}
    assert bytes_of["small"] < 0.6 * bytes_of["exact"]
    for param, value in exact.full()["classifier"].items():
        np.testing.assert_array_equal(back.full()["classifier"][param], value)


def test_params_are_given_back_as_floats() -> None:
    """What a stage reads of an int8 pack is q s, float32, with the method's own parameter names and shapes."""
    exact, small = pack(), quantize_pack(pack())
    for one, two in zip(exact.adapters(), small.adapters(), strict=True):
        assert one.params.keys() == two.params.keys()
        for name, value in two.params.items():
            stored = f"base_model.model.{two.site.path}.{name}.weight"
            q, s = small.tensors[stored], small.tensors[f"{stored}.scales"]
            assert (q.dtype, value.dtype, value.shape) == (np.int8, np.float32, one.params[name].shape)
            np.testing.assert_array_equal(value, q.astype(np.float32) * s)


def test_folding_an_int8_pack_is_within_its_stated_error() -> None:
    """Whoever folds the pack into a weight moves no entry by more than max_error from the float pack."""
    exact, small = pack(), quantize_pack(pack())
    assert small.manifest.quantization is not None
    limit = small.manifest.quantization["max_error"]
    for one, two in zip(exact.adapters(), small.adapters(), strict=True):
        weight = np.random.default_rng(1).standard_normal((one.site.out_features, one.site.in_features)).astype(np.float32)
        first, second = (fold(exact.method, part.config, part.params, part.site, weight, None)[0] for part in (one, two))
        # The folds themselves round in float32: entries of up to 40, a few units of 6e-8 each.
        assert np.abs(first.astype(np.float64) - second).max() <= limit + 4e-5


def test_refusals() -> None:
    """Quantizing twice and unknown schemes are errors."""
    with pytest.raises(NothingToDo, match="quantized already"):
        quantize_pack(quantize_pack(pack()))
    with pytest.raises(UnknownName, match="did you mean 'int8'"):
        quantize_pack(pack(), scheme="int9")
    assert quantize_pack(pack(), name="small").name == "small"
    assert list(schemes()) == ["int8"]


Q = "base_model.model.layers.0.q_proj.lora_A.weight"
FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "scales that are not there": ("AP205", lambda x: x["tensors"][Q].update(scales="nowhere")),
    "integers taken for values": ("AP205", lambda x: x["tensors"][Q].update(scales=None)),
    "scales of another site": ("AP205", lambda x: x["tensors"][Q].update(scales=Q.replace("q_proj", "v_proj") + ".scales")),
    "scales that are a bias": ("AP205", lambda x: x["tensors"][Q].update(scales="base_model.model.classifier.bias")),
    "floats with scales": ("AP205", lambda x: x["tensors"]["base_model.model.classifier.weight"].update(scales=Q + ".scales")),
    "not said to be quantized": ("AP207", lambda x: x.update(quantization=None)),
    "a reader is not warned": ("AP207", lambda x: x.update(must_understand=[])),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_altered_int8_packs_are_invalid(tmp_path: Path, fault: str) -> None:
    """Integers are never taken for values, nor scales for others: the validator names the rule, and does not fall over."""
    quantize_pack(pack()).write(tmp_path / "small")
    rule, alter = FAULTS[fault]
    path = tmp_path / "small" / "adapterpack.json"
    manifest = json.loads(path.read_bytes())
    alter(manifest)
    path.write_bytes(sealed_json(manifest))
    assert rule in {finding.rule for finding in validate(tmp_path / "small").findings}


def test_a_scale_that_overflows_is_invalid(tmp_path: Path) -> None:
    """127 times the scale must be a float32."""
    exact = pack()
    for value in exact.tensors.values():
        value.flags.writeable = True
    exact.tensors[Q][1] = 3e38
    quantized = quantize_pack(exact)
    assert np.isfinite(quantized.params("layers.0.q_proj")["lora_A"]).all()
    quantized.tensors[f"{Q}.scales"][1] = 3e38
    entries = {**quantized.manifest.tensors}
    old = entries[f"{Q}.scales"]
    entries[f"{Q}.scales"] = entry_of(quantized.tensors[f"{Q}.scales"], old.group, old.param)
    sealed(replace(quantized.manifest, tensors=entries), quantized.tensors).write(tmp_path / "small")
    assert [finding.rule for finding in validate(tmp_path / "small").findings] == ["AP301"]
