"""Graphs in float16: slots and caches in their type, factors of any scale, tolerances of their own, and every
mode against torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from architecture_proofs import prove
from architectures import ARCHITECTURES

from adapterpack import Session, export, quantize, validate
from adapterpack.adapter_methods import get
from adapterpack.bundle.manifest import FILE_NAME, GRAPH, parse_bundle, read_bundle
from adapterpack.errors import ParityError, UnknownName, Unsupported
from adapterpack.exporting.frontends import FRONTENDS, ExportSource, Frontend
from adapterpack.pack.pack import build
from adapterpack.pack.validate.validation import load
from adapterpack.slots.precision import ABSENT, NONE_BELOW, PRECISIONS, balance, convert

Make = Callable[..., Any]
BY_NAME = {one.name: one for one in ARCHITECTURES}


@pytest.fixture(scope="module")
def half(
    base_of: Make, pack_of: Make, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    made: dict[tuple[str, str], Path] = {}

    def get(kind: str, mode: str) -> Path:
        if (kind, mode) not in made:
            folder = tmp_path_factory.mktemp("half") / f"{kind}-{mode}"
            packs = [pack_of(kind, name) for name in ("alpha", "beta")]
            export(
                base_of(kind), packs[:1] if mode == "folded" else packs, folder, mode=mode, dtype="float16"
            )
            made[kind, mode] = folder
        return made[kind, mode]

    return get


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("llama", "bank"),
        ("llama", "inputs"),
        ("llama", "folded"),
        ("vit", "bank"),
        pytest.param("bert", "inputs", marks=pytest.mark.long),
    ],
)
def test_every_mode_against_torch_in_float64(name: str, mode: str, tmp_path: Path) -> None:
    """A decoder with every kind of adapter, an encoder and images: rows alone, padded, mixed and on caches,
    within the type's tolerance.
    """
    assert prove(BY_NAME[name], mode, tmp_path, dtype="float16")


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "mode"), [("llama", "bank"), ("llama", "inputs"), ("llama", "folded"), ("vit", "bank")]
)
def test_every_mode_in_bfloat16(name: str, mode: str, tmp_path: Path) -> None:
    """As above, with casts where the CPU provider has no kernel in this type."""
    assert prove(BY_NAME[name], mode, tmp_path, dtype="bfloat16")


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("kind", "mode"), [("llama", "bank"), ("bert", "bank"), ("llama", "inputs")])
def test_slots_caches_and_weights_are_halves(kind: str, mode: str, half: Make) -> None:
    bundle, graph = read_bundle(half(kind, mode)), ir.load(half(kind, mode) / GRAPH).graph
    assert bundle.dtype == "float16"
    assert {port.dtype for port in bundle.io.slots if port.name != "token_type_ids"} == {"float16"}
    assert {port.dtype for port in bundle.io.inputs if port.name.startswith("past_")} <= {"float16"}
    for path, site in bundle.sites.items():
        assert site.dtype == "float16", path
        assert site.members or graph.initializers[site.weight].dtype == ir.DataType.FLOAT16, path
    tensors = [value.const_value for value in graph.initializers.values()]
    floats = {tensor.dtype: sum(t.nbytes for t in tensors if t.dtype == tensor.dtype) for tensor in tensors}
    # constants of a mask, perhaps
    assert floats.get(ir.DataType.FLOAT, 0) < floats[ir.DataType.FLOAT16] / 100


def test_the_report_says_the_tolerance_and_the_error_of_the_type(half: Make) -> None:
    parity = read_bundle(half("llama", "bank")).parity
    assert parity["tolerance"] == PRECISIONS["float16"].tolerance
    errors = list(parity["max_relative"].values())
    # float32 would be nearer: halves were really computed with
    assert all(1e-6 < error < parity["tolerance"] for error in errors)


def test_a_graph_beyond_the_tolerance_is_not_published(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mobius = FRONTENDS["mobius"]

    def built(source: ExportSource) -> Any:
        graph = mobius.build(source)
        value = graph.model.graph.initializers["model.layers.1.self_attn.v_proj.weight_t"]
        value.const_value = ir.tensor(value.const_value.numpy() * np.float16(1.2), name=value.name)
        return graph

    monkeypatch.setattr(
        "adapterpack.exporting.build.FRONTENDS", {"crooked": Frontend("crooked", mobius.supports, built)}
    )
    with pytest.raises(ParityError, match="no frontend made a graph that agrees"):
        export(tiny_llama, [], tmp_path / "bundle", mode="folded", dtype="float16")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    "scale",
    [2.0**-14, pytest.param(1.0, marks=pytest.mark.long), pytest.param(2.0**13, marks=pytest.mark.long)],
)
def test_factors_of_any_scale(scale: float, tiny_llama: Path, pack_of: Make, tmp_path: Path) -> None:
    """One product, one factor small and the other large, as alpha and an init may leave them: as near as with
    factors of one size.
    """
    plain = load(pack_of("llama", "alpha"))
    adapters = {
        adapter.site: (
            adapter.config,
            {
                **adapter.params,
                "lora_A": adapter.params["lora_A"] * np.float32(scale),
                "lora_B": adapter.params["lora_B"] / np.float32(scale),
            },
        )
        for adapter in plain.adapters()
    }
    lopsided = build("lopsided", get("lora"), adapters, base=plain.manifest.base, task=plain.manifest.task)
    written = lopsided.write(tmp_path / "lopsided")
    found = export(tiny_llama, [written, plain], tmp_path / "bundle", mode="bank", dtype="float16").parity[
        "max_relative"
    ]
    assert found["lopsided"] <= 1.01 * found["alpha"]
    values = [
        value.const_value.numpy()
        for name, value in ir.load(tmp_path / "bundle" / GRAPH).graph.initializers.items()
        if name.endswith((".down", ".up"))
    ]
    assert all(np.abs(array).max() < 64 for array in values)


@pytest.mark.fast
def test_balanced_factors_have_the_same_product() -> None:
    rng = np.random.default_rng(0)
    down, up = (rng.standard_normal(shape).astype(np.float32) for shape in ((7, 3), (3, 5)))
    found = balance(
        {
            "a.down": down * 1024,
            "a.up": up / 4096,
            "b.down": down,
            "c.up": up,
            "d.down": 0 * down,
            "d.up": up,
        },
        "down",
        "up",
    )
    assert np.array_equal(found["a.down"] @ found["a.up"], (down * 1024) @ (up / 4096))
    sizes = [np.abs(found[name]).max() for name in ("a.down", "a.up")]
    assert max(sizes) <= 4 * min(sizes)
    assert np.array_equal(found["b.down"], down)
    assert np.array_equal(found["c.up"], up)
    assert np.array_equal(found["d.up"], up)


@pytest.mark.fast
def test_numbers_in_another_type() -> None:
    """What is absent stays so; a number that does not fit is refused by name; what is no number was none
    before.
    """
    found = convert(np.array([ABSENT, 1.5, -3.0], np.float32), "float16", "a.head_bias")
    assert found.dtype == np.float16
    assert found.tolist() == [PRECISIONS["float16"].absent, 1.5, -3.0]
    assert found[0] < NONE_BELOW < found[2]
    with pytest.raises(Unsupported, match="too large for float16") as caught:
        convert(np.array([7e4], np.float32), "float16", "a.up")
    assert "a.up" in str(caught.value)
    assert convert(np.array([np.nan], np.float32), "float16", "a.up").dtype == np.float16


def test_a_pack_is_loaded_into_a_bank_of_halves(
    tiny_llama: Path, pack_of: Make, tmp_path: Path, half: Make
) -> None:
    export(
        tiny_llama,
        [pack_of("llama", "alpha")],
        tmp_path / "bank",
        mode="bank",
        dtype="float16",
        slots=3,
        max_rank=8,
    )
    session, known = Session(tmp_path / "bank", "cpu"), Session(half("llama", "bank"), "cpu")
    name = session.load(pack_of("llama", "beta"))
    batch = session.encode(["one two three", "four five"])
    found, right = (
        session.run(batch, [name, "alpha"])["logits"],
        known.run(batch, ["beta", "alpha"])["logits"],
    )
    assert found.dtype == np.float32  # whatever the graph computes in
    assert np.abs(found - right).max() <= 2e-3 * np.abs(right).max()
    assert [one.ids for one in session.generate(["one two", "three"], [name, "alpha"], max_new_tokens=6)] == [
        one.ids for one in known.generate(["one two", "three"], ["beta", "alpha"], max_new_tokens=6)
    ]


def test_plain_onnxruntime_takes_the_adapter_files(half: Make) -> None:
    folder = half("llama", "inputs")
    parameters = ort.AdapterFormat.read_adapter(
        str(folder / "adapters" / "alpha.onnx_adapter")
    ).get_parameters()
    assert {value.data_type() for value in parameters.values()} == {"tensor(float16)"}


@pytest.mark.long
def test_labels_that_a_row_has_not_stay_absent(tiny_bert: Path, pack_of: Make, half: Make) -> None:
    """Heads of different widths in one batch, in a type that has no -1e9."""
    session = Session(half("bert", "bank"), "cpu")
    batch = session.encode(["one two", "three four five"])
    logits = session.run(batch, ["alpha", "beta"])["logits"]
    widths = [len(session.labels(name) or ()) for name in ("alpha", "beta")]
    for row, width in zip(logits, widths, strict=True):
        assert (row[:width] > NONE_BELOW).all()
        assert (row[width:] < NONE_BELOW).all()
        assert np.isfinite(row).all()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("kind", "mode"), [("llama", "bank"), ("bert", "inputs")])
def test_canaries_pass_on_halves_and_find_another_base(kind: str, mode: str, half: Make) -> None:
    report = validate(half(kind, mode), full=True)
    assert not report.findings
    assert read_bundle(half(kind, mode)).parity["canary"]["replayed"]


def test_halves_are_quantized(half: Make, tmp_path: Path) -> None:
    found = quantize(half("llama", "bank"), tmp_path / "int8", scheme="int8")
    assert isinstance(found.quantization, dict)
    assert found.dtype == "float16"
    assert max(found.quantization["max_error"].values()) > 0
    assert not validate(tmp_path / "int8", full=True).findings


def test_what_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="graphs are not made in this type") as caught:
        export(tiny_llama, [], tmp_path / "bundle", dtype="float61")
    assert "float16" in str(caught.value)


def test_a_bundle_that_does_not_say_is_of_float32(bundle_of: Make) -> None:
    """As those of earlier versions."""
    path = bundle_of("llama", "bank") / FILE_NAME
    told = json.loads(path.read_text("utf-8"))
    del told["dtype"]
    for site in told["sites"].values():
        del site["dtype"]
    assert parse_bundle(json.dumps(told).encode(), path) == read_bundle(path.parent)
