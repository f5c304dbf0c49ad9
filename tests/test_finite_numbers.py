"""Numbers that are none: no pack has them, however it is stored, and no merge writes them, unless the base
held them or a dtype is too narrow for them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from msgspec.structs import replace
from test_merge import lora_pack, tensors, write_base
from test_merge_onnx import base_at, graph_of, linear_values
from test_merge_onnx import lora as lora_of
from test_quantize_pack import SITES, Q, altered, pack

import adapterpack
from adapterpack import DoRA
from adapterpack.adapter_methods import Site, get
from adapterpack.base.checkpoint import Checkpoint
from adapterpack.errors import FormatError, NonFinite
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import Pack, build
from adapterpack.pack.shared_factors import SharedFactors
from adapterpack.pack.validate.validation import load, validate
from adapterpack.quantizing.packs import quantize_pack
from adapterpack.slots.values import pack_values

pytestmark = [pytest.mark.fast, pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")]

WIDE = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8", "mixed"])
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 8e37])
def test_codes_under_a_scale_that_overflows_are_no_numbers(scheme: str, scale: float, tmp_path: Path) -> None:
    """A scale that fits a float32 is too large where its codes times it do not: on disk, in memory, merged,
    composed, in slots.
    """

    def spoil(data: np.ndarray) -> None:
        data[:2] = np.frombuffer(np.array(scale, "<f4").tobytes()[2:], np.uint8)

    spoilt = altered(quantize_pack(pack(), scheme=scheme), Q, spoil)
    at = spoilt.write(tmp_path / "spoilt").path
    assert at is not None
    assert [finding.rule for finding in validate(at).findings] == ["AP205"]
    with pytest.raises(FormatError):
        load(at)
    weights = {
        f"{site.path}.weight": np.ones((site.out_features, site.in_features), np.float32) for site in SITES
    }
    base = write_base(tmp_path / "base", {**weights, "layers.0.v_proj.bias": np.ones(40, np.float32)})
    headless = _headless(spoilt)
    for make in (
        lambda: adapterpack.merge(base, [headless], tmp_path / "out"),
        lambda: adapterpack.compose([headless, headless]),
        lambda: pack_values(headless),
    ):
        with pytest.raises(FormatError, match="codes"):
            make()
    assert not (tmp_path / "out").exists()


def _headless(found: Pack) -> Pack:
    """The pack without its head, for any base."""
    groups = tuple(group for group in found.manifest.groups if group.role == "adapter")
    kept = {
        name: entry
        for name, entry in found.manifest.tensors.items()
        if entry.group in {group.path for group in groups}
    }
    manifest = replace(
        found.manifest,
        groups=groups,
        tensors=kept,
        task=m.PackTask("feature-extraction"),
        base=m.Base("base"),
    )
    return Pack(manifest, {name: found.tensors[name] for name in kept})


@pytest.mark.parametrize("stored", WIDE)
@pytest.mark.parametrize("way", ["factors", "chain"])
def test_a_change_beyond_float32_is_never_merged(stored: str, way: str, tmp_path: Path) -> None:
    """1e30 times 1e30, and a magnitude of 3e38 over a norm of 1e-7: no dtype is to blame for that
    infinity.
    """
    base = write_base(
        tmp_path / "base", {"layer.weight": np.full((3, 4), 2, WIDE[stored]), "other": np.ones(2, np.float32)}
    )
    huge = (
        lora_pack(base, sites={"layer": (3, 4)}, r=1, alpha=1, size=1e30)
        if way == "factors"
        else dora_pack(base)
    )
    with pytest.raises(NonFinite, match=r"layer\.weight"):
        adapterpack.merge(base, [huge], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def dora_pack(base: Path, first: float = -1.9999999) -> Pack:
    """What ``first`` leaves of a row of twos has next to no norm, or none, and the magnitude is divided by
    it.
    """
    checkpoint = Checkpoint(base)
    params = {
        "lora_A": np.ones((1, 4), np.float32),
        "lora_B": np.zeros((3, 1), np.float32),
        "lora_magnitude_vector": np.full(3, 3e38, np.float32),
    }
    params["lora_B"][0] = first
    return build(
        "huge",
        get("dora"),
        {Site("layer", 4, 3): (DoRA(r=1, alpha=1), params)},
        task=m.PackTask("feature-extraction"),
        base=m.Base("base", structure=checkpoint.structure, content=checkpoint.content),
        weights={"layer": "layer.weight"},
    )


def test_what_the_base_held_stays_and_a_narrow_dtype_may_overflow(tmp_path: Path) -> None:
    """An infinity of the base is the base's; 1e30 is infinite in float16, but NaN is no overflow."""
    values = np.ones((3, 4), np.float32)
    values[1, 2] = np.inf
    base = write_base(tmp_path / "base", {"layer.weight": values, "other": np.ones(2, np.float32)})
    adapterpack.merge(base, [lora_pack(base, sites={"layer": (3, 4)})], tmp_path / "out")
    merged = tensors(tmp_path / "out")["layer.weight"]
    assert np.isinf(merged[1, 2])
    assert np.isfinite(np.delete(merged.reshape(-1), 6)).all()
    narrow = write_base(
        tmp_path / "narrow", {"layer.weight": np.full((3, 4), 2, np.float16), "other": np.ones(2, np.float16)}
    )
    adapterpack.merge(narrow, [lora_pack(narrow, sites={"layer": (3, 4)}, size=1e10)], tmp_path / "infinite")
    assert np.isinf(tensors(tmp_path / "infinite")["layer.weight"]).all()
    with pytest.raises(NonFinite):
        adapterpack.merge(narrow, [dora_pack(narrow, -2)], tmp_path / "nan")


def test_a_graph_gets_no_number_beyond_float32(tmp_path: Path) -> None:
    values = linear_values()
    base = base_at(tmp_path / "base", values)
    graph = graph_of(tmp_path / "g" / "model.onnx", values)
    with pytest.raises(NonFinite, match=r"q\.weight"):
        adapterpack.merge(
            graph, [lora_of(base, {"q": (9, 14)}, size=1e30)], tmp_path / "out", checkpoint=base
        )
    assert not (tmp_path / "out").exists()


def test_slots_get_no_number_beyond_float32() -> None:
    """The scale of an adapter goes into its ``up``: 1e9 times 1e33."""
    site = Site("layer", 4, 3)
    params = {"lora_A": np.ones((1, 4), np.float32), "lora_B": np.full((3, 1), 1e27, np.float32)}
    found = build(
        "huge",
        get("lora"),
        {site: (adapterpack.LoRA(r=1, alpha=1e9), params)},
        task=m.PackTask("feature-extraction"),
        base=m.Base("base"),
    )
    assert all(np.isfinite(value).all() for value in pack_values(found).values())
    params["lora_B"] *= 1e6
    huge = build(
        "huge",
        get("lora"),
        {site: (adapterpack.LoRA(r=1, alpha=1e9), params)},
        task=m.PackTask("feature-extraction"),
        base=m.Base("base"),
    )
    with pytest.raises(NonFinite, match=r"layer\.up"):
        pack_values(huge)


SCALES: dict[str, Callable[[], Any]] = {
    "NaN": lambda: np.full((2, 1), np.nan, np.float32),
    "overflow": lambda: np.full((2, 1), 1e37, np.float32),
}


@pytest.mark.parametrize("kind", SCALES)
def test_the_core_of_a_fleet_is_of_numbers(kind: str) -> None:
    core = SharedFactors(
        "a",
        np.ones((2, 4), np.float32),
        np.ones((3, 2), np.float32),
        np.full((2, 2), 127, np.int8),
        SCALES[kind](),
    )
    with pytest.raises(NonFinite):
        _ = core.core
