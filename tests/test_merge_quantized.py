"""Merging into quantized checkpoints: every codec by its published layout, against its formula in float64,
and the laws that all obey.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from stored_formats import COLUMNS, FORMATS, PATH, ROWS, Stored, awq, bnb4, gptq, torchao, words
from test_merge import digests
from test_merge_stream import KILLED

import adapterpack
from adapterpack import LoRA
from adapterpack.adapter_methods import Site, get
from adapterpack.base.codecs import layout
from adapterpack.base.codecs.dequantized_checkpoint import DequantizedCheckpoint
from adapterpack.base.codecs.registry import CODECS
from adapterpack.cli.main import main
from adapterpack.errors import FormatError, NonFinite, Unsupported
from adapterpack.io import safetensors as st
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import Pack, build

pytestmark = pytest.mark.fast


def write(folder: Path, stored: Stored) -> Path:
    folder.mkdir()
    norm = np.linspace(0.5, 1.5, COLUMNS, dtype=np.float32)
    parts = {f"{PATH}.{role}": np.asarray(value) for role, value in stored.parts.items()}
    st.write(
        folder / "model.safetensors", {**parts, "norm.weight": norm}, {"format": "pt", **stored.metadata}
    )
    (folder / "config.json").write_text(
        json.dumps({"model_type": "none", "dtype": "float16", "quantization_config": stored.config})
    )
    return folder


def lora(size: float, rows: slice = slice(None)) -> tuple[Pack, np.ndarray]:
    """A pack that changes the rows of the weight in ``rows``, and its change in float64."""
    rng = np.random.default_rng(1)
    down, up = rng.normal(0, 1, (2, COLUMNS)).astype(np.float32), np.zeros((ROWS, 2), np.float32)
    up[rows] = rng.normal(0, size, (ROWS, 2))[rows]
    pack = build(
        "one",
        get("lora"),
        {Site(PATH, COLUMNS, ROWS): (LoRA(r=2, alpha=2), {"lora_A": down, "lora_B": up})},
        task=m.PackTask("text-generation"),
        base=m.Base(),
        weights={PATH: f"{PATH}.weight"},
    )
    return pack, up.astype(float) @ down.astype(float)


@pytest.mark.parametrize("name", FORMATS)
def test_decodes_what_its_layout_says(name: str, tmp_path: Path) -> None:
    """decode(parts) = the format's formula, whole and by rows from odd places; the registry says the weight's
    shape.
    """
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
            assert np.ascontiguousarray(was).tobytes() == np.ascontiguousarray(piece.values).tobytes(), (
                piece.part,
                rows,
            )


@pytest.mark.parametrize("name", FORMATS)
def test_a_merge_comes_as_close_as_the_grid_lets_it(name: str, tmp_path: Path) -> None:
    """The output has the base's layout, decodes near W + D, keeps most of D, and reports the very error that
    it has.
    """
    stored = FORMATS[name]()
    base = write(tmp_path / "base", stored)
    pack, change = lora(0.02)
    report = adapterpack.merge(base, [pack], tmp_path / "out")
    merged, before = DequantizedCheckpoint(tmp_path / "out"), DequantizedCheckpoint(base)
    assert {n: (i.dtype, i.shape) for n, i in merged.stored.items()} == {
        n: (i.dtype, i.shape) for n, i in before.stored.items()
    }
    assert merged.config == before.config
    np.testing.assert_array_equal(merged.read("norm.weight"), before.read("norm.weight"))
    error = float(np.linalg.norm(merged.matrix(f"{PATH}.weight")[:] - (stored.values + change)))
    assert report.requantized is not None
    assert report.requantized[0] == pytest.approx(error, rel=1e-3)
    # A scale that has to grow makes the grid wider by |W + D| / |W| at most in norm, and by a few times in
    # single groups; an offset that double quantization cannot move adds clipping.
    assert error < 4 * report.requantized[1] * (1 + np.linalg.norm(change) / np.linalg.norm(stored.values))
    assert error < np.linalg.norm(change)
    assert report.losses[0].dtype == before.quantized[f"{PATH}.weight"].codec


@pytest.mark.parametrize("name", FORMATS)
def test_with_a_dtype_the_base_is_written_dequantized(name: str, tmp_path: Path) -> None:
    """merge(dtype=float32) = W + D, one plain tensor, and a config without quantization: an adapter loses
    nothing.
    """
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
    """Rows 0-31 do not change, so they decode to the same bits; a tile of fp8 spans rows 0-47 and is left
    out.
    """
    base = write(tmp_path / "base", FORMATS[name]())
    adapterpack.merge(base, [lora(0.02, slice(32, None))[0]], tmp_path / "out")
    before, after = (
        DequantizedCheckpoint(folder).matrix(f"{PATH}.weight")[:] for folder in (base, tmp_path / "out")
    )
    np.testing.assert_array_equal(before[:32], after[:32])
    assert np.any(before[32:] != after[32:])


def test_refusals_name_the_format_and_the_way_out(tmp_path: Path) -> None:
    """Unread forms, heads in place of quantized weights, truncated parts and values that no format holds."""
    pack, _ = lora(0.02)
    cases: list[tuple[Stored, type[Exception], str]] = []
    for key, value, words_ in (
        ("bits", 5, "bits"),
        ("checkpoint_format", "marlin", "checkpoint_format"),
        ("group_size", 7, "group size"),
    ):
        odd = gptq(4, True, False)
        odd.config[key] = value
        cases.append((odd, FormatError if key == "group_size" else Unsupported, words_))
    gemv, short, loop, unknown = awq(), awq(), gptq(4, True, True), torchao("Int4TilePackedTo4dTensor")
    gemv.config["version"] = "gemv"
    short.parts["scales"] = short.parts["scales"][:, :-1]
    loop.parts["g_idx"] = np.full_like(loop.parts["g_idx"], 7)
    cases += [
        (gemv, Unsupported, "version"),
        (short, FormatError, "scales"),
        (loop, FormatError, "g_idx"),
        (unknown, Unsupported, "Int4Tile"),
    ]
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
    np.testing.assert_array_equal(layout.pack(codes, width), words(codes, width))
    np.testing.assert_array_equal(layout.unpack(layout.pack(codes, width), width, 64), codes)


def test_the_command_says_what_requantizing_cost(tmp_path: Path) -> None:
    """``merge --json`` on a quantized base obeys the schema and names the way out; the plain line names both
    errors.
    """
    base, pack = write(tmp_path / "base", bnb4(False)), lora(0.001)[0].write(tmp_path / "pack")
    runner, given = CliRunner(), ["merge", str(base), str(tmp_path / "pack"), "-o"]
    assert pack is not None
    found = runner.invoke(main, [*given, str(tmp_path / "out"), "--json"])
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout)
    jsonschema.validate(
        report, json.loads((Path(adapterpack.__file__).parents[1] / "schemas" / "report.v1.json").read_text())
    )
    assert 0 < report["requantized"]["error"] < report["requantized"]["grid"]
    assert "--dtype float16" in report["advice"]
    shown = runner.invoke(main, [*given, str(tmp_path / "again")])
    assert "requantized fold" in shown.output
    assert f"warning: {report['advice']}" in shown.output
    assert shown.exit_code == 0


def test_every_codec_is_tested() -> None:
    """The formats above cover the registry."""
    assert {make().config["quant_method"] for make in FORMATS.values()} == set(CODECS)


# --- as a process -------------------------------------------------------------------------------------------

TIMES, WEIGHTS = 40, 9


def taller(stored: Stored) -> dict[str, np.ndarray]:
    """The parts of an NF4 or a GPTQ weight with all its rows ``TIMES`` times."""
    if "qweight" in stored.parts:
        return {
            role: value if role == "g_idx" else np.tile(value, (1, TIMES))
            for role, value in stored.parts.items()
        }
    parts = {
        role: np.tile(stored.parts[role], (TIMES, *[1] * (stored.parts[role].ndim - 1)))
        for role in ("weight", "weight.absmax")
    }
    state = "weight.quant_state.bitsandbytes__nf4"
    told = json.loads(bytes(stored.parts[state])) | {"shape": [ROWS * TIMES, COLUMNS]}
    return {**stored.parts, **parts, state: np.frombuffer(json.dumps(told).encode(), np.uint8)}


@pytest.fixture(scope="module", params=["nf4", "gptq 4 act-order"])
def large(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """Nine tall weights whose parts lie in three files, of which two share weights; a pack for them, and the
    merge at one go.
    """
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
        adapters[site] = (
            LoRA(r=2, alpha=2),
            {role: value.astype(np.float32) for role, value in params.items()},
        )
    names = [f"model-{number}-of-3.safetensors" for number in (1, 2, 3)]
    for name, values in zip(names, files, strict=True):
        st.write(base / name, values, {"format": "pt"})
    where = {tensor: name for name, values in zip(names, files, strict=True) for tensor in values}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (base / "config.json").write_text(json.dumps({"quantization_config": stored.config}))
    build(
        "one",
        get("lora"),
        adapters,
        task=m.PackTask("text-generation"),
        base=m.Base(),
        weights={site.path: f"{site.path}.weight" for site in adapters},
    ).write(folder / "pack")
    adapterpack.merge(base, [folder / "pack"], folder / "out")
    return base, folder / "pack", folder / "out"


@pytest.mark.sampled(2)
def test_killed_it_goes_on_to_the_same_bytes(large: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """6 processes killed with SIGKILL at random moments; the same merge asked for again gives the
    uninterrupted merge's bytes each time.
    """
    command = [sys.executable, "-c", KILLED, large[0], large[1], tmp_path, "3", "6"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.split("\n")
    assert lines.count("killed") >= 3  # the others were done first
    assert any(line.startswith("resumed ") and line != "resumed 0" for line in lines)
    assert [digests(tmp_path / str(kill)) == digests(large[2]) for kill in range(6)] == [True] * 6


def test_parts_of_the_work(large: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Two parts, one after the other: files that one weight lies in go to one part, and the last part
    publishes the whole merge's bytes.
    """
    first, second = (
        adapterpack.merge(large[0], [large[1]], tmp_path / "out", shard=f"{index}/2") for index in (1, 2)
    )
    assert (first.jobs_missing > 0, second.jobs_missing) == (True, 0)
    assert digests(tmp_path / "out") == digests(large[2])
    assert second.requantized is not None and len(second.losses) == WEIGHTS


def test_what_codes_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    """No rounding by chance onto a grid, but into a dtype; no way back from codes without the base, and a
    copy with it.
    """
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
