"""Merging into quantized checkpoints: every codec by its published layout, against its formula in float64, and the laws that all obey."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from test_merge import digests
from test_merge_stream import KILLED

import adapterpack
from adapterpack import LoRA
from adapterpack.adapter_methods import Site, get
from adapterpack.base.codecs import bits
from adapterpack.base.codecs.dequantized_checkpoint import DequantizedCheckpoint
from adapterpack.base.codecs.registry import CODECS
from adapterpack.cli.main import main
from adapterpack.errors import FormatError, NonFinite, Unsupported
from adapterpack.io import safetensors as st
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import Pack, build

pytestmark = pytest.mark.fast
ROWS, COLUMNS, GROUP = 64, 96, 32
PATH = "model.layers.0.mlp.up_proj"
NF4 = np.float32([-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0, 0.0795803, 0.1609302, 0.2461123, 0.3379152,
                  0.4407098, 0.5626170, 0.7229568, 1])


class Stored:
    """Parts of one weight, the config that goes with them, and its values in float64, made from the layout that the format publishes."""

    def __init__(self, config: dict[str, Any], parts: dict[str, np.ndarray], values: np.ndarray, metadata: dict[str, str] | None = None):
        self.config, self.parts, self.values, self.metadata = config, parts, values, metadata or {}


def words(codes: np.ndarray, width: int) -> np.ndarray:
    """Integers ``[n, k]`` as a run of bits, the lowest first, cut into 32-bit words."""
    run = (codes[:, :, None] >> np.arange(width) & 1).reshape(len(codes), -1, 32).astype(np.uint64)
    return (run << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32).view(np.int32)


def bnb4(double: bool, block: int = 64) -> Stored:
    rng = np.random.default_rng(3)
    codes, blocks = rng.integers(0, 16, (ROWS, COLUMNS)), ROWS * COLUMNS // block
    flat = codes.reshape(-1)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": [ROWS, COLUMNS]}
    parts = {"weight": (flat[::2] << 4 | flat[1::2]).astype(np.uint8)[:, None], "weight.quant_map": NF4}
    if double:
        absmax, offset = rng.integers(100, 256, blocks).astype(np.uint8), 0.05
        second, table = np.float32([0.04]), np.linspace(-1, 1, 256).astype(np.float32)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        parts |= {"weight.absmax": absmax, "weight.nested_absmax": second, "weight.nested_quant_map": table}
        scales = table.astype(float)[absmax] * float(second[0]) + offset
    else:
        parts["weight.absmax"] = rng.uniform(0.02, 0.1, blocks).astype(np.float32)
        scales = parts["weight.absmax"].astype(float)
    parts["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    values = (NF4.astype(float)[flat].reshape(blocks, block) * scales[:, None]).reshape(ROWS, COLUMNS)
    return Stored({"quant_method": "bitsandbytes", "load_in_4bit": True}, parts, values)


def bnb8() -> Stored:
    rng = np.random.default_rng(4)
    codes, scale = rng.integers(-127, 128, (ROWS, COLUMNS)).astype(np.int8), rng.uniform(0.02, 0.1, ROWS).astype(np.float32)
    return Stored({"quant_method": "bitsandbytes", "load_in_8bit": True}, {"weight": codes, "SCB": scale, "weight_format": np.uint8(0)},
                  codes * scale.astype(float)[:, None] / 127)


def gptq(width: int, sym: bool, act_order: bool, version: str = "gptq") -> Stored:
    rng = np.random.default_rng(5)
    top, groups, less = 2**width - 1, COLUMNS // GROUP, int(version == "gptq")
    codes = rng.integers(0, top + 1, (COLUMNS, ROWS))
    zeros = np.full((groups, ROWS), 2 ** (width - 1)) if sym else rng.integers(1, top + 1, (groups, ROWS))
    scales = rng.uniform(0.005, 0.02, (groups, ROWS)).astype(np.float16)
    index = np.arange(COLUMNS) // GROUP
    index = rng.permutation(index) if act_order else index
    parts = {"qweight": words(codes.T, width).T, "qzeros": words(zeros - less, width), "scales": scales, "g_idx": index.astype(np.int32)}
    config = {"quant_method": "gptq", "bits": width, "group_size": GROUP, "sym": sym, "desc_act": act_order, "checkpoint_format": version}
    return Stored(config, parts, (scales.astype(float)[index] * (codes - zeros[index])).T)


def awq() -> Stored:
    rng = np.random.default_rng(6)
    codes, zeros = rng.integers(0, 16, (COLUMNS, ROWS)), rng.integers(0, 16, (COLUMNS // GROUP, ROWS))
    scales, order = rng.uniform(0.005, 0.02, zeros.shape).astype(np.float16), [0, 2, 4, 6, 1, 3, 5, 7]
    mixed = [words(each.reshape(len(each), -1, 8)[:, :, order].reshape(each.shape), 4) for each in (codes, zeros)]
    index = np.arange(COLUMNS) // GROUP
    return Stored({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
                  {"qweight": mixed[0], "qzeros": mixed[1], "scales": scales}, (scales.astype(float)[index] * (codes - zeros[index])).T)


def torchao(kind: str) -> Stored:
    rng = np.random.default_rng(7)
    wide = {"Int8Tensor": COLUMNS, "Float8Tensor": COLUMNS}.get(kind, GROUP)
    data: dict[str, Any] = {"block_size": [1, wide]}
    scale = rng.uniform(0.001, 0.01, (ROWS, COLUMNS // wide)).astype(np.float32)
    parts = {"_weight_scale": scale}
    if kind == "Float8Tensor":
        parts["_weight_qdata"] = rng.normal(0, 20, (ROWS, COLUMNS)).astype(ml_dtypes.float8_e4m3fn)
    else:
        half = 8 if kind == "IntxUnpackedToInt8Tensor" else 128
        parts["_weight_qdata"] = rng.integers(-half, half, (ROWS, COLUMNS)).astype(np.int8)
        parts["_weight_zero_point"] = np.zeros(scale.shape, np.int8)
        if half == 8:
            data["target_dtype"] = {"_type": "torch.dtype", "_data": "int4"}
    values = parts["_weight_qdata"].astype(float) * np.repeat(scale.astype(float), wide, 1)
    return Stored({"quant_method": "torchao", "quant_type": {}}, parts, values,
                  {f"{PATH}.weight": json.dumps({"_type": kind, "_data": data})})


def compressed(kind: str, sym: bool = True) -> Stored:
    rng = np.random.default_rng(8)
    weights: dict[str, Any] = {"num_bits": 4 if kind == "packed" else 8, "type": "float" if kind == "float" else "int",
                               "symmetric": sym, "strategy": "group" if kind == "packed" else "channel",
                               "group_size": GROUP if kind == "packed" else None}
    wide = GROUP if kind == "packed" else COLUMNS
    scale = rng.uniform(0.001, 0.01, (ROWS, COLUMNS // wide)).astype(ml_dtypes.bfloat16)
    zero = np.zeros(scale.shape, int) if sym else rng.integers(-8, 8, scale.shape)
    if kind == "packed":
        codes = rng.integers(-8, 8, (ROWS, COLUMNS))
        parts = {"weight_packed": words(codes + 8, 4), "weight_shape": np.array([ROWS, COLUMNS])}
        if not sym:
            parts["weight_zero_point"] = words((zero + 8).T, 4).T
    elif kind == "float":
        codes = rng.normal(0, 20, (ROWS, COLUMNS)).astype(ml_dtypes.float8_e4m3fn)
        parts = {"weight": codes}
    else:
        codes = rng.integers(-128, 128, (ROWS, COLUMNS)).astype(np.int8)
        parts = {"weight": codes}
    values = (codes.astype(float) - np.repeat(zero, wide, 1)) * np.repeat(scale.astype(float), wide, 1)
    return Stored({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}},
                  {**parts, "weight_scale": scale}, values)


def fp8() -> Stored:
    """Tiles of 48 by 40: neither divides its side."""
    rng = np.random.default_rng(9)
    codes, scale = rng.normal(0, 40, (ROWS, COLUMNS)).astype(ml_dtypes.float8_e4m3fn), rng.uniform(0.001, 0.01, (2, 3)).astype(np.float32)
    spread = np.repeat(np.repeat(scale.astype(float), 48, 0), 40, 1)[:ROWS, :COLUMNS]
    return Stored({"quant_method": "fp8", "weight_block_size": [48, 40]}, {"weight": codes, "weight_scale_inv": scale},
                  codes.astype(float) * spread)


FORMATS: dict[str, Callable[[], Stored]] = {
    "nf4": lambda: bnb4(False), "nf4 double": lambda: bnb4(True), "nf4 odd blocks": lambda: bnb4(False, 256), "int8": bnb8,
    **{f"gptq {w}{' sym' if s else ''}{' act-order' if a else ''}": (lambda w=w, s=s, a=a: gptq(w, s, a))
       for w, s, a in ((2, False, False), (3, True, True), (4, True, True), (4, False, True), (4, True, False), (8, False, False))},
    "gptq v2": lambda: gptq(4, False, False, "gptq_v2"), "awq": awq,
    **{f"torchao {kind}": (lambda kind=kind: torchao(kind)) for kind in ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")},
    "packed": lambda: compressed("packed"), "packed with zero points": lambda: compressed("packed", False),
    "ints": lambda: compressed("int"), "floats": lambda: compressed("float"), "fp8": fp8,
}


def write(folder: Path, stored: Stored) -> Path:
    folder.mkdir()
    norm = np.linspace(0.5, 1.5, COLUMNS, dtype=np.float32)
    parts = {f"{PATH}.{role}": np.asarray(value) for role, value in stored.parts.items()}
    st.write(folder / "model.safetensors", {**parts, "norm.weight": norm}, {"format": "pt", **stored.metadata})
    (folder / "config.json").write_text(json.dumps({"model_type": "none", "dtype": "float16", "quantization_config": stored.config}))
    return folder


def lora(size: float, rows: slice = slice(None)) -> tuple[Pack, np.ndarray]:
    """A pack that changes the rows of the weight in ``rows``, and its change in float64."""
    rng = np.random.default_rng(1)
    down, up = rng.normal(0, 1, (2, COLUMNS)).astype(np.float32), np.zeros((ROWS, 2), np.float32)
    up[rows] = rng.normal(0, size, (ROWS, 2))[rows]
    pack = build("one", get("lora"), {Site(PATH, COLUMNS, ROWS): (LoRA(r=2, alpha=2), {"lora_A": down, "lora_B": up})},
                 task=m.Task("text-generation"), base=m.Base(), weights={PATH: f"{PATH}.weight"})
    return pack, up.astype(float) @ down.astype(float)


@pytest.mark.parametrize("name", FORMATS)
def test_decodes_what_its_layout_says(name: str, tmp_path: Path) -> None:
    """decode(parts) = the format's formula, whole and by rows from odd places; the registry says the weight's shape."""
    stored = FORMATS[name]()
    base = DequantizedCheckpoint(write(tmp_path / "base", stored))
    matrix = base.matrix(f"{PATH}.weight")
    assert base.tensors[f"{PATH}.weight"].shape == (ROWS, COLUMNS)
    np.testing.assert_allclose(matrix[:], stored.values, rtol=3e-7, atol=1e-8)  # two float32 roundings
    np.testing.assert_array_equal(matrix[5:37], matrix[:][5:37])


@pytest.mark.parametrize("name", FORMATS)
def test_encoding_what_was_decoded_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    """encode(decode(parts)) = parts, byte for byte, whatever the blocks of rows."""
    base = DequantizedCheckpoint(write(tmp_path / "base", FORMATS[name]()))
    weight, parts = base.quantized[f"{PATH}.weight"], base.parts(f"{PATH}.weight")
    for start in range(0, ROWS, weight.step):
        rows = slice(start, min(ROWS, start + weight.step))
        pieces, values, _ = weight.encode(parts, rows, weight.decode(parts, rows))
        np.testing.assert_array_equal(values, weight.decode(parts, rows))
        for piece in pieces:
            old = parts[piece.part]
            flat = old.reshape(-1) if old.ndim == 2 and old.shape[1] == 1 and piece.values.ndim == 1 else old
            was = flat[piece.rows] if piece.columns is None else flat[piece.rows, piece.columns]
            assert np.ascontiguousarray(was).tobytes() == np.ascontiguousarray(piece.values).tobytes(), (piece.part, rows)


@pytest.mark.parametrize("name", FORMATS)
def test_a_merge_comes_as_close_as_the_grid_lets_it(name: str, tmp_path: Path) -> None:
    """The output has the base's layout, decodes near W + D, keeps most of D, and reports the very error that it has."""
    stored = FORMATS[name]()
    base = write(tmp_path / "base", stored)
    pack, change = lora(0.02)
    report = adapterpack.merge(base, [pack], tmp_path / "out")
    merged, before = DequantizedCheckpoint(tmp_path / "out"), DequantizedCheckpoint(base)
    assert {n: (i.dtype, i.shape) for n, i in merged.stored.items()} == {n: (i.dtype, i.shape) for n, i in before.stored.items()}
    assert merged.config == before.config
    np.testing.assert_array_equal(merged.read("norm.weight"), before.read("norm.weight"))
    error = float(np.linalg.norm(merged.matrix(f"{PATH}.weight")[:] - (stored.values + change)))
    assert report.requantized is not None
    assert report.requantized[0] == pytest.approx(error, rel=1e-3)
    # A scale that has to grow makes the grid wider by |W + D| / |W| at most in norm, and by a few times in single groups; an offset that
    # double quantization cannot move adds clipping.
    assert error < 4 * report.requantized[1] * (1 + np.linalg.norm(change) / np.linalg.norm(stored.values))
    assert error < np.linalg.norm(change)
    assert report.losses[0].dtype == before.quantized[f"{PATH}.weight"].codec


@pytest.mark.parametrize("name", FORMATS)
def test_with_a_dtype_the_base_is_written_dequantized(name: str, tmp_path: Path) -> None:
    """merge(dtype=float32) = W + D, one plain tensor, and a config without quantization: an adapter loses nothing."""
    stored = FORMATS[name]()
    pack, change = lora(0.02)
    adapterpack.merge(write(tmp_path / "base", stored), [pack], tmp_path / "out", dtype="float32")
    merged = DequantizedCheckpoint(tmp_path / "out")
    assert not merged.quantized
    assert sorted(merged.stored) == [f"{PATH}.weight", "norm.weight"]
    assert "quantization_config" not in merged.config
    np.testing.assert_allclose(merged.read(f"{PATH}.weight"), stored.values + change, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "fp8"])
def test_rows_that_no_adapter_touches_keep_their_bytes(name: str, tmp_path: Path) -> None:
    """Rows 0-31 do not change, so they decode to the same bits; a tile of fp8 spans rows 0-47 and is left out."""
    base = write(tmp_path / "base", FORMATS[name]())
    adapterpack.merge(base, [lora(0.02, slice(32, None))[0]], tmp_path / "out")
    before, after = (DequantizedCheckpoint(folder).matrix(f"{PATH}.weight")[:] for folder in (base, tmp_path / "out"))
    np.testing.assert_array_equal(before[:32], after[:32])
    assert np.any(before[32:] != after[32:])


def test_refusals_name_the_format_and_the_way_out(tmp_path: Path) -> None:
    """Unread forms, heads in place of quantized weights, truncated parts and values that no format holds."""
    pack, _ = lora(0.02)
    cases: list[tuple[Stored, type[Exception], str]] = []
    for key, value, words_ in (("bits", 5, "bits"), ("checkpoint_format", "marlin", "checkpoint_format"), ("group_size", 7, "group size")):
        odd = gptq(4, True, False)
        odd.config[key] = value
        cases.append((odd, FormatError if key == "group_size" else Unsupported, words_))
    gemv, short, loop, unknown = awq(), awq(), gptq(4, True, True), torchao("Int4TilePackedTo4dTensor")
    gemv.config["version"] = "gemv"
    short.parts["scales"] = short.parts["scales"][:, :-1]
    loop.parts["g_idx"] = np.full_like(loop.parts["g_idx"], 7)
    cases += [(gemv, Unsupported, "version"), (short, FormatError, "scales"), (loop, FormatError, "g_idx"),
              (unknown, Unsupported, "Int4Tile")]
    for number, (stored, error, text) in enumerate(cases):
        with pytest.raises(error, match=text):
            adapterpack.merge(write(tmp_path / f"base{number}", stored), [pack], tmp_path / "out")
    broken, _ = lora(1e38)  # finite factors whose product is not
    with np.errstate(all="ignore"), pytest.raises(NonFinite, match="cannot hold"):
        adapterpack.merge(write(tmp_path / "whole", awq()), [broken], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_words(width: int) -> None:
    """pack = the run of bits cut into words; unpack undoes it."""
    codes = np.random.default_rng(0).integers(0, 2**width, (5, 64))
    np.testing.assert_array_equal(bits.pack(codes, width), words(codes, width))
    np.testing.assert_array_equal(bits.unpack(bits.pack(codes, width), width, 64), codes)


def test_the_command_says_what_requantizing_cost(tmp_path: Path) -> None:
    """``merge --json`` on a quantized base obeys the schema and names the way out; the plain line names both errors."""
    base, pack = write(tmp_path / "base", bnb4(False)), lora(0.001)[0].write(tmp_path / "pack")
    runner, given = CliRunner(), ["merge", str(base), str(tmp_path / "pack"), "-o"]
    assert pack is not None
    found = runner.invoke(main, [*given, str(tmp_path / "out"), "--json"])
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout)
    jsonschema.validate(report, json.loads((Path(adapterpack.__file__).parents[1] / "schemas" / "report.v1.json").read_text()))
    assert 0 < report["requantized"]["error"] < report["requantized"]["grid"]
    assert "bfloat16" in report["advice"]
    shown = runner.invoke(main, [*given, str(tmp_path / "again")])
    assert "requantized fold" in shown.output
    assert shown.exit_code == 0


def test_every_codec_is_tested() -> None:
    """The formats above cover the registry."""
    assert {make().config["quant_method"] for make in FORMATS.values()} == set(CODECS)


# --- as a process ------------------------------------------------------------------------------------------------------------------------

TIMES, WEIGHTS = 40, 9


def taller(stored: Stored) -> dict[str, np.ndarray]:
    """The parts of an NF4 or a GPTQ weight with all its rows ``TIMES`` times."""
    if "qweight" in stored.parts:
        return {role: value if role == "g_idx" else np.tile(value, (1, TIMES)) for role, value in stored.parts.items()}
    parts = {role: np.tile(stored.parts[role], (TIMES, *[1] * (stored.parts[role].ndim - 1))) for role in ("weight", "weight.absmax")}
    state = "weight.quant_state.bitsandbytes__nf4"
    told = json.loads(bytes(stored.parts[state])) | {"shape": [ROWS * TIMES, COLUMNS]}
    return {**stored.parts, **parts, state: np.frombuffer(json.dumps(told).encode(), np.uint8)}


@pytest.fixture(scope="module", params=["nf4", "gptq 4 act-order"])
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Nine tall weights whose parts lie in three files, of which two share weights; a pack for them, and the merge at one go."""
    folder, rng = tmp_path_factory.mktemp("large"), np.random.default_rng(2)
    base, stored = folder / "base", FORMATS[request.param]()
    base.mkdir()
    files: list[dict[str, np.ndarray]] = [{}, {}, {}]
    adapters = {}
    for number in range(WEIGHTS):
        path = f"layers.{number}.up_proj"
        for place, (role, value) in enumerate(taller(stored).items()):
            apart = number in (0, 3) and not place
            files[1 - number // 3 if apart else number // 3][f"{path}.{role}"] = value
        params = {"lora_A": rng.normal(0, 1, (2, COLUMNS)), "lora_B": rng.normal(0, 0.02, (ROWS * TIMES, 2))}
        site = Site(path, COLUMNS, ROWS * TIMES)
        adapters[site] = (LoRA(r=2, alpha=2), {role: value.astype(np.float32) for role, value in params.items()})
    names = [f"model-{number}-of-3.safetensors" for number in (1, 2, 3)]
    for name, values in zip(names, files, strict=True):
        st.write(base / name, values, {"format": "pt"})
    where = {tensor: name for name, values in zip(names, files, strict=True) for tensor in values}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (base / "config.json").write_text(json.dumps({"quantization_config": stored.config}))
    build("one", get("lora"), adapters, task=m.Task("text-generation"), base=m.Base(),
          weights={site.path: f"{site.path}.weight" for site in adapters}).write(folder / "pack")
    adapterpack.merge(base, [folder / "pack"], folder / "out")
    return base, folder / "pack", folder / "out"


def test_killed_it_goes_on_to_the_same_bytes(large: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """6 processes killed with SIGKILL at random moments; the same merge asked for again gives the uninterrupted merge's bytes each time."""
    command = [sys.executable, "-c", KILLED, large[0], large[1], tmp_path, "3", "6"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.split("\n")
    assert lines.count("killed") >= 3  # the others were done first
    assert any(line.startswith("resumed ") and line != "resumed 0" for line in lines)
    assert [digests(tmp_path / str(kill)) == digests(large[2]) for kill in range(6)] == [True] * 6


def test_parts_of_the_work(large: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Two parts, one after the other: files that one weight lies in go to one part, and the last part publishes the whole merge's bytes."""
    first, second = (adapterpack.merge(large[0], [large[1]], tmp_path / "out", shard=f"{index}/2") for index in (1, 2))
    assert (first.jobs_missing > 0, second.jobs_missing) == (True, 0)
    assert digests(tmp_path / "out") == digests(large[2])
    assert second.requantized is not None and len(second.losses) == WEIGHTS


def test_what_codes_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    """No rounding by chance onto a grid, but into a dtype; no way back from codes without the base, and a copy with it."""
    base, (pack, _) = write(tmp_path / "base", awq()), lora(0.02)
    with pytest.raises(Unsupported, match="least error"):
        adapterpack.merge(base, [pack], tmp_path / "out", stochastic_rounding=1)
    report = adapterpack.merge(base, [pack], tmp_path / "float", stochastic_rounding=1, dtype="bfloat16")
    assert report.kept == pytest.approx(1, abs=0.02)
    adapterpack.merge(base, [pack], tmp_path / "out", safe=True)
    with pytest.raises(Unsupported, match="chosen anew"):
        adapterpack.unmerge(tmp_path / "out", tmp_path / "again", packs=[pack])
    assert adapterpack.unmerge(tmp_path / "out", tmp_path / "again", base=base).way == "copied"
    assert digests(tmp_path / "again") == digests(base)
