"""Quantized packs: the bounds of codes, the error in the change, the round trip, and what a validator says of
altered ones.
"""

from __future__ import annotations

import json
import math
import shutil
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
from adapterpack.errors import ConfigError, NothingToDo, UnknownName
from adapterpack.manifest import manifest as m
from adapterpack.manifest.digests import entry_of
from adapterpack.manifest.structs import Run
from adapterpack.pack.pack import Pack, build, seal
from adapterpack.pack.quantized_tensors import decode, encode
from adapterpack.pack.validate.validation import load, validate
from adapterpack.quantizing.packs import quantize_pack, schemes

sys.path.insert(0, str(Path(__file__).parent / "packs"))
from make_bad import sealed_json

pytestmark = pytest.mark.fast

SITES = (Site("layers.0.q_proj", 133, 67), Site("layers.0.v_proj", 132, 40, bias=True))


def pack(dtype: Any = np.float32, zero: bool = False) -> Pack:
    rng = np.random.default_rng(3)
    cfg = LoRA(r=5, alpha=9)
    adapters = {}
    for site in SITES:
        A, B = (
            rng.standard_normal((5, site.in_features)).astype(dtype),
            rng.standard_normal((site.out_features, 5)).astype(dtype),
        )
        A[2], B[::7] = 0, 0
        adapters[site] = (cfg, {"lora_A": A, "lora_B": 0 * B if zero else B})
    head = {
        "weight": rng.standard_normal((3, 17)).astype(np.float32),
        "bias": rng.standard_normal(3).astype(np.float32),
    }
    return build(
        "tickets",
        get("lora"),
        adapters,
        task=m.PackTask("text-classification", None, ("a", "b", "c")),
        base=m.Base("acme/base"),
        full={"classifier": head},
        metrics=({"name": "accuracy", "value": 0.9},),
    )


GOLDEN = Path(__file__).parent / "golden" / "pack-1.4-int8"


def values_of(packed: Any, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What packed bytes stand for, and the scale of each number, float64: bit by bit from the format's
    description.
    """
    rows, columns = packed.shape[0], math.prod(packed.shape[1:])
    count, length = (rows, columns) if packed.axis == 0 else (columns, rows)
    groups = math.ceil(length / packed.group)
    raw, codes = data.tobytes(), [run.code for run in packed.runs for _ in range(run.count)]
    bits_of = {"int8": 8, "fp8": 8, "int4": 4, "int2": 2}
    values, scales, at = np.empty((count, length)), np.empty((count, length)), 2 * count * groups
    for direction, code in enumerate(codes):
        bits, size = bits_of[code], math.ceil(length * bits_of[code] / 8)
        for place in range(length):
            number = raw[at + place * bits // 8] >> (place * bits % 8) & (2**bits - 1)
            float8 = float(np.array(number, np.uint8).view(ml_dtypes.float8_e4m3fn))
            value = {
                "int8": number - 256 * (number > 127),
                "int4": number - 8,
                "int2": number - 1.5,
                "fp8": float8,
            }[code]
            half = raw[2 * (direction * groups + place // packed.group) :][:2]
            scale = np.frombuffer(b"\0\0" + half, "<f4")[0]
            values[direction, place], scales[direction, place] = value * float(scale), scale
        at += size
    assert at == len(raw)
    return tuple(part if packed.axis == 0 else part.T for part in (values, scales))  # type: ignore[return-value]


@pytest.mark.parametrize("code", ["int8", "fp8", "int4", "int2"])
@pytest.mark.parametrize(
    ("axis", "group", "shape"), [(0, None, (5, 23)), (1, 7, (23, 5)), (0, 64, (3, 5, 2))]
)
def test_codes_are_read_as_the_format_says(
    code: str, axis: int, group: int | None, shape: tuple[int, ...]
) -> None:
    """Against a reader bit by bit: equal to a rounding of float32; no int8 number is off by more than half
    its scale, and of the others the error of each direction is at most what the scale that clips nothing
    would make.
    """
    for dtype, size in (
        (np.float64, 1e-5),
        (np.float32, 1e-40),
        (np.float16, 1.0),
        (ml_dtypes.bfloat16, 1e4),
    ):
        value = (size * np.random.default_rng(0).standard_normal(shape)).astype(dtype)
        exact = value.astype(np.float64).reshape(len(value), -1)
        exact[..., 1] = 0  # a whole direction, or a number of each
        data, packed = encode(exact.reshape(shape), [Run(exact.shape[axis], code)], axis, group)
        read, scales = values_of(packed, data)
        np.testing.assert_allclose(decode(data, packed).reshape(exact.shape), read, rtol=2**-23, atol=1e-45)
        off = np.abs(read - exact)
        if code == "int8":
            assert (off <= scales / 2 * (1 + 1e-12)).all()  # the quotient is taken in float64
        peak = np.abs(exact).max(axis=1 - axis, keepdims=True)
        # fp8's steps are widest at the top
        step = {"int8": peak / 127, "fp8": peak / 14, "int4": peak / 7, "int2": peak / 1.5}[code]
        least = np.finfo(np.float32).tiny  # as far as scales go
        length = exact.shape[1 - axis]
        assert (
            np.sqrt(np.square(off).sum(axis=1 - axis, keepdims=True))
            <= np.sqrt(length) * (step / 2 * 1.01 + least)
        ).all()


def dense(found: Pack) -> dict[str, np.ndarray]:
    """scale * B A in float64, from the stored codes and scales where there are any."""
    changes = {}
    for group in found.manifest.groups:
        if group.role == "adapter":
            factors = []
            for param in ("lora_B", "lora_A"):
                name = f"base_model.model.{group.path}.{param}.weight"
                packed = found.manifest.packed.get(name)
                factors.append(
                    found.tensors[name].astype(np.float64)
                    if packed is None
                    else values_of(packed, found.tensors[name])[0]
                )
            assert group.scale is not None
            changes[group.path] = group.scale * factors[0] @ factors[1]
    return changes


@pytest.mark.parametrize(
    ("scheme", "dtype", "most"),
    [
        ("int8", np.float32, 0.02),
        ("int8", np.float16, 0.02),
        ("fp8", np.float32, 0.06),
        ("int4", np.float32, 0.2),
        ("mixed", np.float32, 0.3),
    ],
)
def test_the_stated_error_is_that_of_the_change(scheme: str, dtype: Any, most: float) -> None:
    """max_error = max |D_q - D|, relative_error = |D_q - D|_F / |D|_F over all sites and at each, against the
    dense formula.
    """
    exact, small = pack(dtype), quantize_pack(pack(dtype), scheme=scheme)
    stated = small.manifest.quantization
    assert stated is not None
    wanted, found = dense(exact), dense(small)
    errors = {path: found[path] - wanted[path] for path in wanted}
    relative = math.sqrt(
        sum(float((error**2).sum()) for error in errors.values())
        / sum(float((d**2).sum()) for d in wanted.values())
    )
    assert stated["scheme"] == scheme
    # Values are decoded in float32: one rounding, 6e-8, on errors of 1e-2.
    assert stated["relative_error"] == pytest.approx(relative, rel=1e-4)
    assert stated["max_error"] == pytest.approx(
        max(float(np.abs(error).max()) for error in errors.values()), rel=1e-4
    )
    for path, error in errors.items():
        assert stated["sites"][path] == pytest.approx(
            float(np.linalg.norm(error) / np.linalg.norm(wanted[path])), rel=1e-4
        )
    assert 1e-4 < relative < most


@pytest.mark.parametrize(
    ("scheme", "rank", "most"), [("int8", 8, 0.27), ("fp8", 8, 0.27), ("int4", 8, 0.15), ("int4", 16, 0.15)]
)
def test_files_are_as_small_as_promised(tmp_path: Path, scheme: str, rank: int, most: float) -> None:
    """At a layer of MiniLM's width: the whole tensor file, scales and header included, as a share of
    float32's.
    """
    rng = np.random.default_rng(0)
    factors = {
        "lora_A": rng.standard_normal((rank, 384)).astype(np.float32),
        "lora_B": rng.standard_normal((384, rank)).astype(np.float32),
    }
    exact = build(
        "a",
        get("lora"),
        {Site("encoder.layer.0.attention.self.query", 384, 384): (LoRA(r=rank), factors)},
        task=m.PackTask("feature-extraction"),
        base=m.Base("acme/base"),
    )
    whole, small = (
        sum(file.size for file in one.manifest.files if file.role == "tensors")
        for one in (exact, quantize_pack(exact, scheme=scheme))
    )
    assert small <= most * whole


def test_ranks_are_cut_within_their_budget() -> None:
    """Of singular values 8, 4, 2, 1, 0.5 a budget of 0.3 leaves two, since sqrt((4 + 1 + 0.25) / 85.25) is
    0.25 and one would leave 0.5.
    """
    rng = np.random.default_rng(0)
    Q, P = (np.linalg.qr(rng.standard_normal((width, 5)))[0] for width in (67, 133))
    factors = {"lora_A": P.T.astype(np.float32), "lora_B": (Q * [8, 4, 2, 1, 0.5]).astype(np.float32)}
    exact = build(
        "a",
        get("lora"),
        {SITES[0]: (LoRA(r=5, alpha=5), factors)},
        task=m.PackTask("feature-extraction"),
        base=m.Base("acme/base"),
    )
    small = quantize_pack(exact, rank_budget=0.3)
    assert [group.rank for group in small.manifest.groups] == [2]
    stated = small.manifest.quantization
    assert stated is not None
    # int8 adds its 0.005 squared
    assert stated["relative_error"] == pytest.approx(math.sqrt(5.25 / 85.25), rel=1e-3)
    with pytest.raises(ConfigError, match="rank budget"):
        quantize_pack(exact, rank_budget=1.0)


def test_a_change_of_zero_has_no_error() -> None:
    """B = 0: the change is zero before and after, and the relative error is 0, not 0 / 0."""
    stated = quantize_pack(pack(zero=True)).manifest.quantization
    assert stated is not None
    assert (stated["max_error"], stated["relative_error"], set(stated["sites"].values())) == (0.0, 0.0, {0.0})


def test_the_round_trip_is_valid_smaller_and_says_what_it_is(tmp_path: Path) -> None:
    """Written and read: the same id, valid, smaller, the head untouched, no PEFT config, the parent named,
    the parent unchanged.
    """
    exact = pack()
    before = exact.id
    exact.write(tmp_path / "exact")
    small = quantize_pack(load(tmp_path / "exact")).write(tmp_path / "small")
    report = validate(tmp_path / "small")
    assert report.valid, report.findings
    back = load(tmp_path / "small")
    assert back.id == small.id == quantize_pack(exact).id
    assert (back.name, exact.id, load(tmp_path / "exact").id) == ("tickets-int8", before, before)
    assert back.manifest.must_understand == ("packed",)
    assert back.manifest.lineage == m.Lineage("quantize", (m.Parent(before, "tickets"),), {"scheme": "int8"})
    assert (back.manifest.canary, back.manifest.metrics) == (None, ())
    assert sorted(file.name for file in (tmp_path / "small").iterdir()) == [
        "adapter_model.safetensors",
        "adapterpack.json",
    ]
    bytes_of = {
        name: (tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("exact", "small")
    }
    assert bytes_of["small"] < 0.6 * bytes_of["exact"]
    for param, value in exact.full()["classifier"].items():
        np.testing.assert_array_equal(back.full()["classifier"][param], value)


def test_params_are_given_back_as_floats() -> None:
    """What a stage reads of a quantized pack is float32, with the method's own parameter names and shapes."""
    exact, small = pack(), quantize_pack(pack())
    for one, two in zip(exact.adapters(), small.adapters(), strict=True):
        shapes = {name: (value.dtype, value.shape) for name, value in two.params.items()}
        assert shapes == {name: (np.dtype("f4"), value.shape) for name, value in one.params.items()}


def test_packs_of_the_older_form_are_read_as_they_were() -> None:
    """Int8 by rows, with scales in tensors of their own, as 1.4 wrote it before there were codes: integers
    times scales.
    """
    old = load(GOLDEN)
    assert old.manifest.must_understand == ("int8",)
    for one, two in zip(pack().adapters(), old.adapters(), strict=True):
        for name, value in two.params.items():
            stored = f"base_model.model.{two.site.path}.{name}.weight"
            q, s = old.tensors[stored], old.tensors[f"{stored}.scales"]
            np.testing.assert_array_equal(value, q.astype(np.float32) * s)
            assert (np.abs(value - one.params[name]) <= s * 0.51).all()


def test_folding_an_int8_pack_is_within_its_stated_error() -> None:
    """Whoever folds the pack into a weight moves no entry by more than max_error from the float pack."""
    exact, small = pack(), quantize_pack(pack())
    assert small.manifest.quantization is not None
    limit = small.manifest.quantization["max_error"]
    for one, two in zip(exact.adapters(), small.adapters(), strict=True):
        weight = (
            np.random.default_rng(1)
            .standard_normal((one.site.out_features, one.site.in_features))
            .astype(np.float32)
        )
        first, second = (
            fold(exact.method, part.config, part.params, part.site, weight, None)[0] for part in (one, two)
        )
        # The folds themselves round in float32: entries of up to 40, a few units of 6e-8 each.
        assert np.abs(first.astype(np.float64) - second).max() <= limit + 4e-5


def test_refusals() -> None:
    """Quantizing twice and unknown schemes are errors."""
    with pytest.raises(NothingToDo, match="quantized already"):
        quantize_pack(quantize_pack(pack()))
    with pytest.raises(UnknownName, match="did you mean 'int8'"):
        quantize_pack(pack(), scheme="int9")
    assert quantize_pack(pack(), name="small").name == "small"
    assert list(schemes()) == ["fp8", "int4", "int8", "mixed"]


Q = "base_model.model.layers.0.q_proj.lora_A.weight"
FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "scales that are not there": ("AP205", lambda x: x["tensors"][Q].update(scales="nowhere")),
    "integers taken for values": ("AP205", lambda x: x["tensors"][Q].update(scales=None)),
    "scales of another site": (
        "AP205",
        lambda x: x["tensors"][Q].update(scales=Q.replace("q_proj", "v_proj") + ".scales"),
    ),
    "scales that are a bias": (
        "AP205",
        lambda x: x["tensors"][Q].update(scales="base_model.model.classifier.bias"),
    ),
    "floats with scales": (
        "AP205",
        lambda x: x["tensors"]["base_model.model.classifier.weight"].update(scales=Q + ".scales"),
    ),
    "not said to be quantized": ("AP207", lambda x: x.update(quantization=None)),
    "a reader is not warned": ("AP207", lambda x: x.update(must_understand=[])),
}


def packed(x: dict[str, Any], **values: Any) -> None:
    x["quantization"]["packed"][Q].update(values)


CODED: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "bytes taken for values": ("AP207", lambda x: x["quantization"].pop("packed")),
    "codes of another tensor's size": ("AP205", lambda x: packed(x, shape=[5, 135])),
    "a code that nobody knows": ("AP205", lambda x: packed(x, runs=[{"count": 5, "code": "int3"}])),
    "more numbers than a layer has": ("AP001", lambda x: packed(x, shape=[5, 1 << 32])),
    "runs of other directions": ("AP001", lambda x: packed(x, runs=[{"count": 6, "code": "int4"}])),
    "no numbers under a scale": ("AP001", lambda x: packed(x, group=0)),
    "codes of no tensor": (
        "AP205",
        lambda x: x["quantization"]["packed"].update(nowhere=x["quantization"]["packed"][Q]),
    ),
    "a reader is not warned of codes": ("AP207", lambda x: x.update(must_understand=[])),
}


@pytest.mark.parametrize("fault", [*FAULTS, *CODED])
def test_altered_quantized_packs_are_invalid(tmp_path: Path, fault: str) -> None:
    """Integers are never taken for values, nor scales for others: the validator names the rule, and does not
    fall over.
    """
    if fault in FAULTS:
        shutil.copytree(GOLDEN, tmp_path / "small")
    else:
        quantize_pack(pack(), scheme="int4").write(tmp_path / "small")
    rule, alter = (FAULTS | CODED)[fault]
    path = tmp_path / "small" / "adapterpack.json"
    manifest = json.loads(path.read_bytes())
    alter(manifest)
    path.write_bytes(sealed_json(manifest))
    assert rule in {finding.rule for finding in validate(tmp_path / "small").findings}


def altered(found: Pack, name: str, change: Callable[[np.ndarray], None]) -> Pack:
    """The pack with one tensor changed, under a manifest that knows."""
    tensors = {key: np.array(value) for key, value in found.tensors.items()}
    change(tensors[name])
    old = found.manifest.tensors[name]
    entries = {**found.manifest.tensors, name: entry_of(tensors[name], old.group, old.param)}
    return seal(replace(found.manifest, tensors=entries), tensors)


def test_a_scale_that_overflows_is_invalid(tmp_path: Path) -> None:
    """127 times the scale must be a float32, in the older form too; and no code of fp8 may be NaN."""

    def overflow(scales: np.ndarray) -> None:
        scales[1] = 3e38

    def to_no_number(data: np.ndarray) -> None:
        data[1], data[0] = 0x7F, 0xC0  # a scale

    def to_nan(data: np.ndarray) -> None:
        data[-1] = 0x7F  # a code

    faults = (
        (load(GOLDEN), f"{Q}.scales", overflow, "AP301"),
        (quantize_pack(pack()), Q, to_no_number, "AP205"),
        (quantize_pack(pack(), scheme="fp8"), Q, to_nan, "AP205"),
    )
    for number, (found, name, change, rule) in enumerate(faults):
        altered(found, name, change).write(tmp_path / str(number))
        assert [finding.rule for finding in validate(tmp_path / str(number)).findings] == [rule]
    exact = pack()
    for value in exact.tensors.values():
        value.flags.writeable = True
    exact.tensors[Q][1] = 3e38
    assert np.isfinite(quantize_pack(exact).params("layers.0.q_proj")["lora_A"]).all()
