"""Merges into models of llama.cpp: every type of block against the ``gguf`` package, every file read back by
it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as TensorType
from gguf.constants import GGML_QUANT_SIZES

import adapterpack
from adapterpack import DoRA, LoRA
from adapterpack.adapter_methods import Site, get
from adapterpack.base.checkpoint import Checkpoint
from adapterpack.base.gguf import names
from adapterpack.base.gguf.ggml import TYPES, weight
from adapterpack.base.gguf.header import read_header
from adapterpack.base.gguf.tensor_types import TENSOR_TYPES
from adapterpack.errors import AdapterpackError, BaseMismatch, FormatError, SiteNotFound, Unsupported
from adapterpack.manifest import manifest as m
from adapterpack.merging.gguf.base_model import GGUFBase
from adapterpack.pack.pack import Pack, build

HIDDEN, INNER, HEADS, GROUPS, WORDS = 256, 512, 4, 2, 96
BY_PACKAGE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""Types that the package can quantize too."""
PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


# --- types --------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_sizes_and_names_are_the_packages() -> None:
    """Sizes of all types, and llama.cpp's name of every module that is known, in every family."""
    assert {number: (kind.name, kind.block, kind.size) for number, kind in TENSOR_TYPES.items()}.items() <= {
        int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()
    }.items()
    architectures = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    for family in names.FAMILIES.values():
        theirs = gguf.get_tensor_name_map(architectures[family.name], 2)
        found = 0
        for module, (_, name) in theirs.mapping.items():
            path = names.module_of(family, name)
            if path == module:
                found += 1
                assert theirs.get_name(path) == name
        assert found >= 15, family  # two layers; the gemmas share a table with their head


def random_blocks(kind: str, rng: np.random.Generator, rows: int = 5, blocks: int = 3) -> np.ndarray:
    """Any bytes, but for scales that are numbers of a fair size."""
    size = TYPES[kind].fields.itemsize
    raw = rng.integers(0, 256, (rows, blocks * size), dtype=np.uint8)
    view = raw.view(TYPES[kind].fields)
    for name in {"d", "m", "dmin"} & set(view.dtype.names or ()):
        view[name] = rng.normal(0, 0.01, view.shape)
    return raw


@pytest.mark.fast
@pytest.mark.parametrize("kind", TYPES)
def test_blocks_decode_as_the_package_decodes_them(kind: str) -> None:
    """Bit by bit; what was decoded encodes to the same bytes; and quantizing is as good as the package's, or
    a step's ``width^2 / 12``.
    """
    rng = np.random.default_rng(2)
    raw = random_blocks(kind, rng)
    one = weight("w", kind, (5, 3 * gguf.GGML_QUANT_SIZES[TensorType[kind]][0]))
    values = one.decode({"codes": raw}, slice(0, 5))
    np.testing.assert_array_equal(values, gguf.quants.dequantize(raw, TensorType[kind]))
    ((piece,), after, _) = one.encode({"codes": raw}, slice(0, 5), values)
    assert np.array_equal(piece.values, raw)
    wanted = rng.normal(0, 0.02, values.shape).astype(np.float32)
    ((piece,), after, _) = one.encode({"codes": np.zeros_like(raw)}, slice(0, 5), wanted)
    np.testing.assert_array_equal(
        gguf.quants.dequantize(np.ascontiguousarray(piece.values), TensorType[kind]), after
    )
    error = np.linalg.norm(after - wanted)
    _, _, noise = one.encode({"codes": piece.values}, slice(0, 5), after)
    theirs = (
        gguf.quants.dequantize(gguf.quants.quantize(wanted, TensorType[kind]), TensorType[kind])
        if kind in BY_PACKAGE
        else wanted
    )
    limit = np.linalg.norm(theirs - wanted)
    assert error <= max(1.001 * limit, 1.1 * noise**0.5)


# --- files --------------------------------------------------------------------------------------------------


def swapped(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of queries and keys."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def own_name(name: str) -> str:
    module, _, ending = name.rpartition(".")
    found = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2).get_name(module)
    assert found is not None
    return f"{found}.{ending}"


def packed(value: np.ndarray, kind: str) -> np.ndarray:
    """Values in blocks of a type, by the package where it can."""
    if kind in BY_PACKAGE:
        return np.asarray(gguf.quants.quantize(value, TensorType[kind]))
    size = GGML_QUANT_SIZES[TensorType[kind]]
    empty = np.zeros((len(value), value.shape[1] // size[0] * size[1]), np.uint8)
    ((piece,), *_) = weight("w", kind, value.shape).encode({"codes": empty}, slice(0, len(value)), value)
    return np.ascontiguousarray(piece.values)


def as_gguf(checkpoint: Path, out: Path, kind: str, arch: str = "llama") -> Path:
    """A checkpoint as llama.cpp's converter would write it, with matrices in one type."""
    base, writer = Checkpoint(checkpoint), gguf.GGUFWriter(out, arch)
    writer.add_type("model")
    writer.add_name("tiny one")
    for key, value in (
        ("block_count", 1),
        ("attention.head_count", HEADS),
        ("attention.head_count_kv", GROUPS),
        ("context_length", 64),
        ("embedding_length", HIDDEN),
        ("feed_forward_length", INNER),
        ("rope.dimension_count", HIDDEN // HEADS),
        ("vocab_size", WORDS),
    ):
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32(f"{arch}.rope.freq_base", 10000.0)
    writer.add_file_type(3)
    writer.add_array("tokenizer.ggml.tokens", [f"w{number}" for number in range(WORDS)])
    for name in sorted(base.tensors):
        value = np.array(base.read(name))
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            value = swapped(value, HEADS if "q_proj" in name else GROUPS)
        if value.ndim == 1:
            writer.add_tensor(own_name(name), value.astype(np.float32))
        elif kind in PLAIN:
            cast = value.astype(PLAIN[kind])
            raw = {"raw_dtype": TensorType.BF16} if kind == "BF16" else {}
            writer.add_tensor(own_name(name), cast.view(np.uint8) if raw else cast, **raw)
        else:
            writer.add_tensor(own_name(name), packed(value, kind), raw_dtype=TensorType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        rms_norm_eps=1e-6,
    )
    folder = tmp_path_factory.mktemp("llama") / "base"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def file_of(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("gguf")

    def make(kind: str) -> Path:
        path = folder / f"{kind}.gguf"
        return path if path.exists() else as_gguf(llama, path, kind)

    return make


def pack_on(
    base: Path, method: str = "lora", size: float = 0.01, only: tuple[str, ...] = ("_proj.weight",)
) -> Pack:
    checkpoint, rng, adapters = Checkpoint(base), np.random.default_rng(7), {}
    for name, info in checkpoint.tensors.items():
        if name.endswith(only):
            rows, columns = info.shape
            params = {"lora_A": rng.normal(0, 1, (3, columns)), "lora_B": rng.normal(0, size, (rows, 3))}
            if method == "dora":
                params["lora_magnitude_vector"] = np.linalg.norm(checkpoint.read(name), axis=1) * rng.uniform(
                    0.9, 1.1, rows
                )
            config = LoRA(r=3, alpha=3) if method == "lora" else DoRA(r=3, alpha=3)
            adapters[Site(name.removesuffix(".weight"), columns, rows)] = (
                config,
                {k: v.astype(np.float32) for k, v in params.items()},
            )
    return build(
        "one",
        get(method),
        adapters,
        task=m.PackTask("text-generation"),
        base=m.Base(
            "base", structure=checkpoint.structure, content=checkpoint.content, probe=checkpoint.probe
        ),
        weights={site.path: f"{site.path}.weight" for site in adapters},
    )


def changed(pack: Pack) -> dict[str, np.ndarray]:
    """``s B A`` of each site, float64."""
    return {
        f"{each.site.path}.weight": each.params["lora_B"].astype(np.float64) @ each.params["lora_A"]
        for each in pack.adapters()
    }


def held(path: Path) -> dict[str, tuple[np.ndarray, bytes, str]]:
    """Values, bytes and type of each tensor as the package reads them."""
    return {
        one.name: (
            np.asarray(gguf.quants.dequantize(one.data, one.tensor_type), np.float64),
            bytes(one.data),
            one.tensor_type.name,
        )
        for one in gguf.GGUFReader(path).tensors
    }


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", [*PLAIN, *TYPES])
def test_a_merge_keeps_every_type(
    kind: str, llama: Path, file_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Every changed tensor lies no further from ``W + s B A`` (float64) than rounding to its type explains;
    all else keeps its bytes.
    """
    pack, source = pack_on(llama), file_of(kind)
    report = adapterpack.merge(source, [pack], tmp_path / "out.gguf", checkpoint=llama)
    before, after, deltas = (
        held(source),
        held(tmp_path / "out.gguf"),
        {own_name(name): (name, d) for name, d in changed(pack).items()},
    )
    assert list(before) == list(after)
    for name, (values, raw, stored) in after.items():
        assert stored == before[name][2]
        if name not in deltas:
            assert raw == before[name][1]
            continue
        path, delta = deltas[name]
        if path.endswith(("q_proj.weight", "k_proj.weight")):
            delta = swapped(delta, HEADS if "q_proj" in path else GROUPS)
        exact = before[name][0] + delta
        error, size = np.linalg.norm(values - exact), np.linalg.norm(exact)
        if kind in PLAIN:  # one rounding, after sums in float32
            assert error <= size * {"F32": 2.0**-22, "F16": 2.0**-11, "BF16": 2.0**-8}[kind]
        else:
            fresh = np.linalg.norm(held_of(packed(exact.astype(np.float32), kind), kind) - exact)
            assert error <= 1.001 * fresh  # scales kept or fitted, whichever errs less
    fields, old = gguf.GGUFReader(tmp_path / "out.gguf").fields, gguf.GGUFReader(source).fields
    assert set(fields) == {*old, "adapterpack.merge"}
    assert [fields[key].contents() for key in old if not key.startswith("GGUF.")] == [
        old[key].contents() for key in old if not key.startswith("GGUF.")
    ]
    assert report.notes and report.packs[0].base == "variant"


def held_of(raw: np.ndarray, kind: str) -> np.ndarray:
    return np.asarray(gguf.quants.dequantize(raw, TensorType[kind]), np.float64)


def test_transformers_runs_the_merged_file(
    llama: Path, file_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """The file of float32, merged, loaded by transformers from GGUF, gives the logits of the merged
    checkpoint (1e-5 of the largest): DoRA reads the weight, so its rows of queries and keys must be put in
    order before they are looked at.
    """
    from transformers import AutoModelForCausalLM

    pack = pack_on(llama, "dora", 0.05)
    adapterpack.merge(file_of("F32"), [pack], tmp_path / "out.gguf", checkpoint=llama)
    adapterpack.merge(llama, [pack], tmp_path / "merged")
    ids = torch.arange(12)[None] * 7 % WORDS
    with torch.no_grad():
        theirs = (
            AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32)
            .eval()(ids)
            .logits
        )
        ours, plain = (
            AutoModelForCausalLM.from_pretrained(each).eval()(ids).logits
            for each in (tmp_path / "merged", llama)
        )
    assert (ours - plain).abs().max() > 1e-3
    torch.testing.assert_close(theirs, ours, atol=1e-5 * float(ours.abs().max()), rtol=0)


def test_with_a_dtype_what_has_rows_is_written_plain(
    llama: Path, file_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """float16 of the exact fold; norms stay float32; the file says what it is mostly made of."""
    pack = pack_on(llama)
    adapterpack.merge(file_of("Q4_K"), [pack], tmp_path / "out.gguf", checkpoint=llama, dtype="float16")
    found, before = held(tmp_path / "out.gguf"), held(file_of("Q4_K"))
    assert {name: kind for name, (_, _, kind) in found.items()} == {
        name: "F32" if values.ndim == 1 else "F16" for name, (values, _, _) in before.items()
    }
    for path, delta in changed(pack).items():
        name = own_name(path)
        turned = (
            swapped(delta, HEADS if "q_proj" in path else GROUPS)
            if path.endswith(("q_proj.weight", "k_proj.weight"))
            else delta
        )
        np.testing.assert_allclose(found[name][0], before[name][0] + turned, rtol=2.0**-11, atol=1e-6)
    assert gguf.GGUFReader(tmp_path / "out.gguf").fields["general.file_type"].contents() == 1
    np.testing.assert_allclose(
        found["token_embd.weight"][0], before["token_embd.weight"][0], rtol=2.0**-11, atol=1e-7
    )


def test_an_embedding_in_codes_is_folded(llama: Path, file_of: Callable[[str], Path], tmp_path: Path) -> None:
    """LoRA on the table of words, which lies in blocks along the words' numbers: rows that no adapter touches
    keep their bytes.
    """
    rng = np.random.default_rng(1)
    params = {
        "lora_A": np.zeros((2, WORDS), np.float32),
        "lora_B": rng.normal(0, 0.1, (HIDDEN, 2)).astype(np.float32),
    }
    params["lora_A"][:, 5] = 1
    site = Site("model.embed_tokens", WORDS, HIDDEN, "embedding")
    pack = build(
        "one",
        get("lora"),
        {site: (LoRA(r=2, alpha=2), params)},
        task=m.PackTask("text-generation"),
        base=m.Base(),
    )
    adapterpack.merge(file_of("Q8_0"), [pack], tmp_path / "out.gguf")
    (after, raw, _), (before, old, _) = (
        held(path)["token_embd.weight"] for path in (tmp_path / "out.gguf", file_of("Q8_0"))
    )
    row = len(raw) // WORDS
    assert [raw[i * row : (i + 1) * row] == old[i * row : (i + 1) * row] for i in range(WORDS)] == [
        i != 5 for i in range(WORDS)
    ]
    exact = before[5] + params["lora_B"].astype(np.float64).sum(1)
    np.testing.assert_allclose(after[5], exact, rtol=0, atol=np.abs(exact).max() / 250)


def test_refusals(llama: Path, file_of: Callable[[str], Path], tmp_path: Path) -> None:
    """A wrong or unproven base, a type that is not written, an adapter as a base: by name, before anything is
    written.
    """
    pack, out = pack_on(llama), tmp_path / "out.gguf"
    with pytest.raises(BaseMismatch, match=r"nothing shows .*--base CHECKPOINT"):
        adapterpack.merge(file_of("Q8_0"), [pack], out)
    assert (
        adapterpack.merge(file_of("Q8_0"), [pack], out, allow_structural=True).packs[0].base == "structural"
    )
    out.unlink()
    from safetensors.numpy import load_file, save_file

    other = tmp_path / "other"
    other.mkdir()
    save_file(
        {name: np.roll(value, 1, axis=0) for name, value in load_file(llama / "model.safetensors").items()},
        other / "model.safetensors",
    )
    with pytest.raises(BaseMismatch, match="no form of this checkpoint"):
        adapterpack.merge(file_of("Q8_0"), [pack], out, checkpoint=other, allow_structural=True)
    rare = as_rare(file_of("Q4_0"), tmp_path / "rare.gguf")
    with pytest.raises(Unsupported, match=r"IQ4_NL can be read and not written.*merge with --dtype"):
        adapterpack.merge(rare, [pack], out, allow_structural=True)
    adapterpack.merge(rare, [pack], out, allow_structural=True, dtype="float16")
    name = "blk.0.ffn_down.weight"
    np.testing.assert_allclose(
        held(out)[name][0],
        held(rare)[name][0] + changed(pack)["model.layers.0.mlp.down_proj.weight"],
        rtol=2**-10,
        atol=1e-6,
    )
    out.unlink()
    deeper = {
        Site("model.layers.7.mlp.up_proj", HIDDEN, INNER): (
            LoRA(r=1),
            {"lora_A": np.ones((1, HIDDEN), np.float32), "lora_B": np.ones((INNER, 1), np.float32)},
        )
    }
    # only who knows its base knows that it is another
    for known, error in ((m.Base(), SiteNotFound), (pack.manifest.base, BaseMismatch)):
        lora = build("two", get("lora"), deeper, task=m.PackTask("text-generation"), base=known)
        with pytest.raises(
            error, match="another model than this file's" if error is BaseMismatch else "layers.7"
        ):
            adapterpack.merge(file_of("Q8_0"), [lora], out, allow_structural=True)
    adapterpack.convert(pack, tmp_path / "lora.gguf", to="gguf", base=llama)
    with pytest.raises(Unsupported, match="no model"):
        adapterpack.merge(tmp_path / "lora.gguf", [pack], out)
    assert not list(tmp_path.glob(".out*")) and not out.exists()
    assert adapterpack.inspect(file_of("Q6_K"))["dtypes"] == {"F32": 3, "Q6_K": 9}


def as_rare(source: Path, out: Path) -> Path:
    """The same file, whose blocks of Q4_0 say that they are IQ4_NL, which is as long."""
    data = bytearray(source.read_bytes())
    header = read_header(bytes(data), source)
    for name, tensor in header.tensors.items():
        if tensor.type.name == "Q4_0":
            at = (
                data.index(len(name).to_bytes(8, "little") + name.encode())
                + 8
                + len(name)
                + 4
                + 8 * len(tensor.shape)
            )
            assert data[at : at + 4] == (2).to_bytes(4, "little")
            data[at : at + 4] = (20).to_bytes(4, "little")
    out.write_bytes(data)
    return out


@pytest.mark.fast
def test_a_strangers_header_is_refused_before_anything_is_allocated(
    llama: Path, file_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Cut anywhere in its header, with counts beyond the file, or with tensors over each other: an error by
    name.
    """
    data = file_of("Q8_0").read_bytes()
    start = read_header(data, tmp_path).start
    counts: dict[str, Any] = {f"cut at {at}": data[:at] for at in range(5, start, 97)}
    counts["tensors"] = data[:8] + (1 << 60).to_bytes(8, "little") + data[16:]
    counts["keys"] = data[:16] + (1 << 60).to_bytes(8, "little") + data[24:]
    counts["a row short"] = data[:-64]
    at = data.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4
    counts["extent"] = data[:at] + (1 << 50).to_bytes(8, "little") + data[at + 8 :]
    for name, raw in counts.items():
        path = tmp_path / "bad.gguf"
        path.write_bytes(raw)
        with pytest.raises(AdapterpackError):
            GGUFBase(path)
            pytest.fail(name)
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(FormatError):
        GGUFBase(tmp_path / "empty.gguf")
