"""The base fingerprint: what each level sees and does not see, what a verdict takes, and how one checkpoint
relates to another.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterpack.base import checkpoint as checkpoint_module
from adapterpack.base import fingerprint as fp
from adapterpack.base.checkpoint import INDEX, Checkpoint, shards_in
from adapterpack.base.compatibility import BaseVariant, match
from adapterpack.base.quantization import read_quantization
from adapterpack.base.recast import cast, cast_digests
from adapterpack.base.variants import relation, variant
from adapterpack.errors import BaseMismatch, FormatError, NothingToDo, StorageError
from adapterpack.io import hashing, safetensors

pytestmark = pytest.mark.fast

Values = Mapping[str, np.ndarray]


def save(
    folder: Path,
    *shards: Values,
    metadata: dict[str, str] | None = None,
    config: dict[str, object] | None = None,
) -> Path:
    """A checkpoint of one file, or of several with an index, its tensors in the order given."""
    folder.mkdir(parents=True)
    names = (
        ["model.safetensors"] if len(shards) == 1 else [f"model-{i}.safetensors" for i in range(len(shards))]
    )
    for name, values in zip(names, shards, strict=True):
        headers = [(key, safetensors.dtype_name(value.dtype), value.shape) for key, value in values.items()]
        header, _ = safetensors.plan(headers, metadata)
        (folder / name).write_bytes(header + b"".join(value.tobytes() for value in values.values()))
    if len(shards) > 1:
        weight_map = {key: name for name, values in zip(names, shards, strict=True) for key in values}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def model(seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors of odd sizes and several dtypes: larger than the three samples, larger than a block, empty,
    scalar.
    """
    rng = np.random.default_rng(seed)
    return {
        "model.embed.weight": rng.standard_normal((1031, 257)).astype(np.float32),
        "model.layers.0.proj.weight": rng.standard_normal((123, 77)).astype(np.float32),
        "model.layers.0.norm.weight": np.ones(77, np.float32),
        "model.layers.1.proj.weight": rng.standard_normal((123, 77)).astype(ml_dtypes.bfloat16),
        "model.layers.1.norm.weight": np.ones(77, np.float32),
        "model.positions": np.arange(5001, dtype=np.int64),
        "model.empty": np.zeros((0, 3), np.float32),
        "model.scalar": np.array(rng.standard_normal(), np.float32),
    }


def split(values: Values, count: int) -> list[dict[str, np.ndarray]]:
    names = list(values)
    return [{name: values[name] for name in names[i::count]} for i in range(count)]


def levels(folder: Path) -> tuple[str, str, str]:
    base = Checkpoint(folder)
    return base.structure, base.content, base.probe


# ------------------------------------------------------------------------------------------------------------
# the four levels


def framed(*fields: str) -> bytes:
    return b"".join(len(raw).to_bytes(8, "little") + raw for raw in (field.encode() for field in fields))


def test_every_level_is_the_documented_hash(tmp_path: Path) -> None:
    """files = H(sorted (path, size, sha256)); probe = H(sorted H(header, sha256(first, middle, last 4
    KiB))).
    """
    base = Checkpoint(save(tmp_path / "base", *split(model(), 2)))
    paths = sorted(path for path in base.folder.iterdir())
    entries = [
        framed(path.name, str(path.stat().st_size), hashlib.sha256(path.read_bytes()).hexdigest())
        for path in paths
    ]
    assert (
        fp.files(base.file_entries)
        == "bfp1:" + hashlib.sha256(b"bfp1:files\0" + b"".join(entries)).hexdigest()
    )
    leaves = []
    for name in sorted(base.tensors):
        info, data = base.tensors[name], base.read(name).tobytes()
        if len(data) > 12288:
            middle = (len(data) - 4096) // 16 * 8
            data = data[:4096] + data[middle : middle + 4096] + data[-4096:]
        header = framed(name, info.dtype, ",".join(map(str, info.shape)))
        leaves.append(hashlib.sha256(b"bfp1:sample\0" + header + hashlib.sha256(data).digest()).digest())
    assert base.probe == "bfp1:" + hashlib.sha256(b"bfp1:probe\0" + b"".join(leaves)).hexdigest()
    assert base.fingerprint(files=True) == fp.Fingerprint(
        base.structure, base.content, fp.files(base.file_entries), base.probe
    )
    assert base.fingerprint(content=False) == fp.Fingerprint(base.structure, None, None, base.probe)


@settings(max_examples=25, deadline=None)
@given(
    st.permutations(list(model())),
    st.integers(1, 4),
    st.dictionaries(st.text("abc", min_size=1), st.text(max_size=5), max_size=2),
)
def test_shards_order_and_metadata_do_not_count(
    order: list[str], count: int, metadata: dict[str, str]
) -> None:
    """structure, content and probe are functions of the set of (name, dtype, shape, bytes) alone."""
    values = model()
    with tempdir() as folder:
        plain = save(folder / "plain", values)
        other = save(
            folder / "other", *split({name: values[name] for name in order}, count), metadata=metadata
        )
        assert levels(plain) == levels(other)
        kind = relation(Checkpoint(plain), Checkpoint(other)).kind
        same_files = (
            Checkpoint(plain).fingerprint(files=True).files == Checkpoint(other).fingerprint(files=True).files
        )
        assert kind == ("same" if same_files else "reshard")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_flipped_byte_changes_content_and_a_sampled_one_the_probe(data: st.DataObject) -> None:
    """content sees every byte; probe exactly those within its spans; structure none; files all."""
    values = model()
    name = data.draw(st.sampled_from([name for name, value in values.items() if value.nbytes]))
    at, mask = data.draw(st.integers(0, values[name].nbytes - 1)), data.draw(st.integers(1, 255))
    raw = np.frombuffer(values[name].tobytes(), np.uint8).copy()
    raw[at] ^= mask
    with tempdir() as folder:
        before = Checkpoint(save(folder / "before", values))
        after = Checkpoint(
            save(folder / "after", {**values, name: raw.view(values[name].dtype).reshape(values[name].shape)})
        )
        assert after.structure == before.structure
        assert after.content != before.content
        assert fp.files(after.file_entries) != fp.files(before.file_entries)
        assert (after.probe != before.probe) == any(
            start <= at < start + n for start, n in fp.spans(values[name].nbytes)
        )
        found = relation(before, after)
        assert found.kind == "other" and name in found.detail


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_the_probe_touches_every_tensor(where: str, tmp_path: Path) -> None:
    """A change of one sampled byte in any one tensor, also one between untouched norms, changes the probe."""
    values = model()
    before = Checkpoint(save(tmp_path / "before", values)).probe
    for i, name in enumerate(name for name in values if values[name].nbytes):
        raw = np.frombuffer(values[name].tobytes(), np.uint8).copy()
        raw[{"first": 0, "middle": raw.size // 2, "last": -1}[where]] ^= 1
        changed = {**values, name: raw.view(values[name].dtype).reshape(values[name].shape)}
        assert Checkpoint(save(tmp_path / str(i), changed)).probe != before


@given(st.integers(0, 10**13))
def test_spans_stay_within_the_tensor_and_never_overlap(nbytes: int) -> None:
    """At most 12 KiB; ordered, disjoint, from first to last byte; the middle one at a multiple of 8, within 8
    bytes of the middle.
    """
    found = fp.spans(nbytes)
    assert found[0][0] == 0 and sum(found[-1]) == nbytes
    assert all(sum(a) <= b[0] for a, b in pairwise(found))
    assert sum(length for _, length in found) == min(nbytes, 12288)
    if len(found) == 3:
        assert found[1][0] % 8 == 0 and abs(found[1][0] + 2048 - nbytes / 2) <= 8


def test_a_head_that_is_stored_or_left_out_is_a_difference(tmp_path: Path) -> None:
    """A tied lm_head that one file spells out changes every level, and the relation names it."""
    values = model()
    tied = Checkpoint(save(tmp_path / "tied", values))
    stored = Checkpoint(save(tmp_path / "stored", {**values, "lm_head.weight": values["model.embed.weight"]}))
    assert not set(tied.fingerprint(files=True)) & set(stored.fingerprint(files=True))
    assert "only the second has lm_head.weight" in relation(tied, stored).detail
    assert "only the first has lm_head.weight" in relation(stored, tied).detail


NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
HEADERS = st.lists(
    st.tuples(
        NAMES, st.sampled_from(["F32", "F", "3", ""]), st.lists(st.integers(0, 99), max_size=3).map(tuple)
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda header: header[0],
)


@settings(max_examples=300)
@given(HEADERS, HEADERS)
def test_different_headers_have_different_structures(one: list[fp.Header], other: list[fp.Header]) -> None:
    """structure is one-to-one on sets of headers, whatever characters the names hold, and does not know their
    order.
    """
    assert (fp.structure(one) == fp.structure(other)) == (sorted(one) == sorted(other))
    assert fp.structure(reversed(one)) == fp.structure(one)


def test_fields_cannot_flow_into_each_other() -> None:
    """Names with separators, digits, NUL, or what the next field begins with: each header has its own hash;
    NFC and NFD are two names.
    """
    names = ["a", "a\0", "a,1", "aF32", "\u00e9", "e\u0301", "\u202e", "\U0001f40d", "a\n", '"', " a"]
    headers: list[fp.Header] = [
        (name, dtype, shape)
        for name in names
        for dtype in ("F32", "", "F321")
        for shape in ((), (1, 2), (2,), (12,), (1, 2, 1))
    ]
    assert len({fp.structure([header]) for header in headers}) == len(headers)
    assert len({fp.content([(*header, bytes(32))]) for header in headers}) == len(headers)
    joined = framed("a", "F32", "1,2").decode("utf-8")
    assert fp.structure([(joined, "F32", (1, 2))]) != fp.structure(
        [("a", "F32", (1, 2)), (joined, "F32", (1, 2))]
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda: fp.structure([("a", "F32", ()), ("a", "F16", ())]),
        lambda: fp.probe([("a", "F32", (), b""), ("a", "F32", (), b"")]),
        lambda: fp.content([("a", "U8", (1,), bytes(32)), ("a", "U8", (1,), bytes(32))]),
        lambda: fp.in_memory([("a", "U8", (1,), b"x"), ("a", "U8", (1,), b"y")]),
        lambda: fp.files([("a", 1, "0" * 64), ("a", 2, "0" * 64)]),
        lambda: fp.files([("a", -1, "0" * 64)]),
        lambda: fp.files([("a", 1, "0" * 63)]),
        lambda: fp.files([("a", 1, "A" * 64)]),
        lambda: fp.structure([("\ud800", "F32", ())]),
        lambda: shards_in({"weight_map": {"w": "../a"}}, "index"),
    ],
)
def test_what_is_no_header_or_digest_is_refused(call: Callable[[], object]) -> None:
    """FormatError instead of a hash of something that no base can be."""
    with pytest.raises(FormatError):
        call()


def test_structure_and_files_of_a_remote_base_cost_no_weights(tmp_path: Path) -> None:
    """The first bytes of each shard give structure; a listing of sizes and digests gives files: both equal
    those of the downloaded base.
    """
    base = Checkpoint(save(tmp_path / "base", *split(model(), 3)))
    headers, entries, downloaded = [], [], 0
    for shard in shards_in(json.loads((base.folder / INDEX).read_text()), INDEX):
        path = base.folder / shard
        with path.open("rb") as file:  # a range request: the length, then the header
            length = int.from_bytes(file.read(8), "little")
            file.seek(0)
            prefix = file.read(8 + length)
        downloaded += len(prefix)
        infos, _ = safetensors.parse_header(io.BytesIO(prefix), path.stat().st_size, shard)
        headers += [(info.name, info.dtype, info.shape) for info in infos.values()]
    for path in base.folder.iterdir():
        entries.append((path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()))
    assert fp.structure(headers) == base.structure
    assert fp.files(entries) == fp.files(base.file_entries)
    assert downloaded < 2000


# ------------------------------------------------------------------------------------------------------------
# verdicts

WANTED = fp.Fingerprint("bfp1:s", "bfp1:c", "bfp1:f", "bfp1:p")
BF16 = BaseVariant("dtype_cast", fp.Fingerprint("bfp1:s2", "bfp1:c2", "bfp1:f2", "bfp1:p2"), tested=True)
VERDICTS: dict[str, tuple[fp.Fingerprint, str, bool]] = {
    "all equal": (WANTED, "same", True),
    "content equal, files not": (WANTED._replace(files="bfp1:x"), "same", True),
    "files equal, content not known": (WANTED._replace(content=None), "same", True),
    "files equal, content not": (WANTED._replace(content="bfp1:x"), "structural", False),
    "files alone": (fp.Fingerprint(None, None, "bfp1:f"), "same", True),
    "probe equal, content not known": (fp.Fingerprint("bfp1:s", None, None, "bfp1:p"), "likely", True),
    "probe equal, files not": (fp.Fingerprint("bfp1:s", None, "bfp1:x", "bfp1:p"), "likely", True),
    "probe equal, content not": (fp.Fingerprint("bfp1:s", "bfp1:x", None, "bfp1:p"), "structural", False),
    "probe equal, structure not": (fp.Fingerprint("bfp1:x", None, None, "bfp1:p"), "other", False),
    "structure only": (fp.Fingerprint("bfp1:s", None), "structural", False),
    "structure equal, probe not": (fp.Fingerprint("bfp1:s", None, None, "bfp1:x"), "structural", False),
    "variant by content": (fp.Fingerprint("bfp1:s2", "bfp1:c2"), "variant", True),
    "variant by files": (fp.Fingerprint("bfp1:s2", None, "bfp1:f2"), "variant", True),
    "variant by headers only": (fp.Fingerprint("bfp1:s2", None), "structural", False),
    "variant by probe only": (fp.Fingerprint("bfp1:s2", None, None, "bfp1:p2"), "structural", False),
    "variant's headers, other content": (fp.Fingerprint("bfp1:s2", "bfp1:x"), "other", False),
    "content alone, another": (fp.Fingerprint(None, "bfp1:x"), "other", False),
    "variant's files, other content": (fp.Fingerprint("bfp1:s2", "bfp1:x", "bfp1:f2"), "other", False),
    "nothing equal": (fp.Fingerprint("bfp1:x", "bfp1:x", "bfp1:x", "bfp1:x"), "other", False),
    "nothing known": (fp.Fingerprint(None, None), "unknown", False),
    "another version of the scheme": (
        fp.Fingerprint("bfp2:s", "bfp2:c", "bfp2:f", "bfp2:p"),
        "unknown",
        False,
    ),
}


@pytest.mark.parametrize("label", VERDICTS)
def test_the_verdict_follows_the_strongest_level_that_both_know(label: str) -> None:
    """content, else files: same; declared: variant; else probe: likely; else structure: structural; an
    unknown level is no difference.
    """
    found, name, accepted = VERDICTS[label]
    verdict = match(WANTED, found, [BF16])
    assert (verdict.name, verdict.accepted) == (name, accepted)
    assert verdict.variant == (BF16 if "variant" in label and name != "other" else None)


# ------------------------------------------------------------------------------------------------------------
# relations


@pytest.mark.parametrize("dtype", ["F64", "F16", "BF16", "F8_E5M2", "F8_E4M3"])
@pytest.mark.parametrize("source", ["F64", "F32", "BF16"])
def test_a_cast_is_the_one_that_torch_makes(source: str, dtype: str, tmp_path: Path) -> None:
    """The bytes of ``tensor.to(dtype)`` for every size of number; the digests of tensors and samples are
    those of torch's file.
    """
    import torch

    if source == dtype:
        return
    kinds = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E4M3": torch.float8_e4m3fn,
    }
    wide = torch.randn(300_001, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    wide *= 10.0 ** torch.linspace(-9, 2, wide.numel(), dtype=torch.float64)
    start = wide.to(kinds[source])
    expected = start.to(kinds[dtype]).view(torch.uint8).numpy()
    values = start.view(torch.uint8).numpy().view(safetensors.DTYPES[source])
    assert np.array_equal(cast(values, dtype).view(np.uint8), expected)
    ids = np.arange(7, dtype=np.int64)
    a = Checkpoint(save(tmp_path / "a", {"w": values, "ids": ids}))
    b = Checkpoint(save(tmp_path / "b", {"ids": ids}, {"w": expected.view(safetensors.DTYPES[dtype])}))
    dtypes = {"w": dtype, "ids": "I64"}
    assert cast_digests(a, dtypes) == b.digests
    assert cast_digests(a, dtypes, samples=True) == b.samples
    found = relation(a, b)
    assert (found.kind, found.proven, found.detail) == (
        "dtype_cast",
        True,
        f"{source} to {dtype} in 1 tensors",
    )


def test_a_dtype_without_infinity_saturates() -> None:
    """e4m3 holds at most 448; NaN stays NaN."""
    values = cast(np.array([449, 1e5, -1e5, np.inf, np.nan], np.float32), "F8_E4M3").astype(np.float32)
    assert np.array_equal(values, np.array([448, 448, -448, 448, np.nan], np.float32), equal_nan=True)


def test_a_cast_with_one_other_number_is_another_base(tmp_path: Path) -> None:
    """One unit in the last place of one element, outside every sample, is enough."""
    values = model()
    lower = {
        name: value.astype(ml_dtypes.bfloat16) if value.dtype == np.float32 else value
        for name, value in values.items()
    }
    a = Checkpoint(save(tmp_path / "a", values))
    assert relation(a, Checkpoint(save(tmp_path / "b", lower))).kind == "dtype_cast"
    raw = lower["model.embed.weight"].view(np.uint16).copy()
    raw[300, 100] += 1
    spoilt = Checkpoint(save(tmp_path / "c", {**lower, "model.embed.weight": raw.view(ml_dtypes.bfloat16)}))
    found = relation(a, spoilt)
    assert found.kind == "other" and "other values: model.embed.weight" in found.detail
    assert Checkpoint(tmp_path / "b").probe == spoilt.probe
    with pytest.raises(BaseMismatch, match=r"model\.embed\.weight"):
        variant(a, spoilt)


def test_new_names_for_equal_tensors_are_found_and_paired(tmp_path: Path) -> None:
    """renamed_keys with the map; equal norms pair layer with layer; other bytes are another base."""
    values = model()
    a = Checkpoint(save(tmp_path / "a", values))
    for label, rename in {
        "prefix gone": lambda n: n.removeprefix("model."),
        "inner": lambda n: n.replace("layers", "h"),
        "some": lambda n: n.replace("embed", "wte"),
    }.items():
        names = {name: rename(name) for name in values}
        b = Checkpoint(save(tmp_path / label, *split({names[n]: values[n] for n in reversed(values)}, 2)))
        found = relation(a, b)
        assert (found.kind, found.proven) == ("renamed_keys", True)
        assert found.names == {old: new for old, new in names.items() if old != new}
    other = {f"x.{name}": value for name, value in model(1).items()}
    assert relation(a, Checkpoint(save(tmp_path / "other", other))).kind == "other"


CONFIGS: dict[str, tuple[dict[str, object], str | None]] = {
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4, "desc_act": True}}, "gptq"),
    "awq": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "bitsandbytes",
    ),
    "bitsandbytes, unnamed": (
        {"quantization_config": {"load_in_8bit": True, "load_in_4bit": False}},
        "bitsandbytes",
    ),
    "torchao": (
        {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": {}}}},
        "torchao",
    ),
    "in the text part": ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
    "unknown": ({"quantization_config": {"bits": 3}}, "unnamed"),
    "none": ({"hidden_size": 3, "text_config": {}}, None),
    "odd": ({"quantization_config": "yes", "text_config": 3}, None),
}


@pytest.mark.parametrize("label", CONFIGS)
def test_a_config_declares_its_quantization(label: str) -> None:
    """quantization_config of the model or of its text part; a method that we do not know is named as it names
    itself.
    """
    config, expected = CONFIGS[label]
    assert read_quantization(config) == expected


QUANTIZED = {
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "bitsandbytes": ("weight.absmax", "weight.quant_map"),
    "torchao": ("_weight_qdata", "_weight_scale"),
}


@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize("by", ["config", "names"])
def test_a_quantized_base_is_declared_not_proven(scheme: str, by: str, tmp_path: Path) -> None:
    """quantized where config or names say so and what was left in floating point, cast or not, is the base's;
    never proven.
    """
    values = model()
    rest = {name: value for name, value in values.items() if "layers.0.proj" not in name}
    rest["model.embed.weight"] = rest["model.embed.weight"].astype(np.float16)
    parts = {f"model.layers.0.proj.{ending}": np.arange(5, dtype=np.uint8) for ending in QUANTIZED[scheme]}
    config: dict[str, object] = {"quantization_config": {"quant_method": scheme}}
    if by == "config":
        parts = {"model.layers.0.proj.weight": np.arange(5, dtype=np.uint8)}
    a = Checkpoint(save(tmp_path / "a", values))
    b = Checkpoint(save(tmp_path / "b", {**rest, **parts}, config=config if by == "config" else {}))
    found = relation(a, b)
    assert (found.kind, found.proven) == (
        "quantized",
        False,
    ) and f"declared: {scheme}; 5 of the 5" in found.detail
    declaration = variant(a, b)
    assert declaration == BaseVariant("quantized", b.fingerprint(files=True), tested=False)
    assert match(a.fingerprint(), b.fingerprint(), [declaration]).name == "variant"
    assert match(a.fingerprint(), b.fingerprint()).name == "other"
    unlike = {name: value + np.ones_like(value) for name, value in rest.items()}
    assert relation(a, Checkpoint(save(tmp_path / "c", {**unlike, **parts}, config=config))).kind == "other"


def test_variants_are_declared_by_their_own_digests(tmp_path: Path) -> None:
    """A new sharding is a variant with the same content; the base itself is none; other shapes and dtypes are
    said.
    """
    values = model()
    a = Checkpoint(save(tmp_path / "a", values))
    assert variant(a, Checkpoint(save(tmp_path / "b", *split(values, 2))), tested=True).relation == "reshard"
    with pytest.raises(NothingToDo, match="same files"):
        variant(a, Checkpoint(save(tmp_path / "c", values)))
    positions = values["model.positions"]
    changes = {"other shapes": positions[:-1], "other dtypes": positions.astype(np.int32)}
    for label, value in changes.items():
        assert (
            f"{label}: model.positions"
            in relation(a, Checkpoint(save(tmp_path / label, {**values, "model.positions": value}))).detail
        )


# ----------------------------------------------------------------------------------------------------------
# files, threads, memory


def tempdir() -> _Folder:
    """A folder of its own for each example of a property."""
    return _Folder()


class _Folder:
    def __enter__(self) -> Path:
        import tempfile

        self.held = tempfile.TemporaryDirectory()
        return Path(self.held.name)

    def __exit__(self, *_: object) -> None:
        self.held.cleanup()


def test_a_file_that_changes_under_a_reader_is_an_error(tmp_path: Path) -> None:
    """StorageError that names the file if it is replaced, rewritten, cut or made a pipe after opening; a new
    hard link is no change.
    """
    for label in ("replaced", "rewritten", "cut", "pipe"):
        path = save(tmp_path / label, model()) / "model.safetensors"
        base = Checkpoint(path.parent)
        data = path.read_bytes()
        if label in {"replaced", "pipe"}:
            path.unlink()
        if label == "pipe":
            os.mkfifo(path)
        else:
            path.write_bytes(data[: -1 if label == "cut" else None])
            os.utime(path, ns=(0, 0))  # the clock may not have ticked since
        for read in (
            lambda base=base: base.content,
            lambda base=base: base.probe,
        ):
            with pytest.raises(StorageError, match=r"changed.*model\.safetensors"):
                read()
    path = save(tmp_path / "linked", model()) / "model.safetensors"
    base = Checkpoint(path.parent)
    (tmp_path / "link").hardlink_to(path)
    assert base.content == Checkpoint(path.parent).content


def test_digests_are_kept_only_while_times_can_tell_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file just written is read again each time, so that a change within the same tick of the clock is
    seen; later it is read once.
    """
    kept: dict[hashing.Identity, dict[str, bytes]] = {}
    monkeypatch.setattr(checkpoint_module, "_DIGESTS", kept)
    folder = save(tmp_path / "base", *split(model(), 2))
    first = Checkpoint(folder).content
    assert kept == {}
    monkeypatch.setattr(hashing, "_SETTLED", 50_000_000)
    time.sleep(0.1)
    assert Checkpoint(folder).content == first
    assert len(kept) == 2
    assert Checkpoint(folder).content == first  # from what is kept
    path = folder / "model-0.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    stat = path.stat()
    path.write_bytes(raw)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the size and the time of last change as before
    assert Checkpoint(folder).content != first


def test_a_file_is_settled_once_both_of_its_times_are_past() -> None:
    """settled = more than two seconds since the later of both times; a time in the future is not past."""
    now, old = time.time_ns(), time.time_ns() - 10_000_000_000
    expected = {(old, old): True, (now, old): False, (old, now): False, (old, now + 10**12): False}
    assert {times: hashing.Identity(1, 2, 3, *times).settled for times in expected} == expected


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=12), st.integers(1, 5))
def test_any_number_of_threads_gives_the_same_digests(sizes: list[int], threads: int) -> None:
    """The sha256 of each range of a file, and of the same bytes in memory in parts, for ranges below, at and
    above a block.
    """
    data = np.random.default_rng(0).bytes(sum(sizes) + 1)
    with tempdir() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "BLOCK", 1000)
        patch.setattr(hashing, "_MUCH", 0)
        patch.setattr(hashing, "cores", lambda: threads)
        path = folder / "file"
        path.write_bytes(data)
        seen = hashing.identity(path)
        starts = np.cumsum([0, *sizes]).tolist()
        ranges = dict(enumerate(zip(starts, sizes, strict=False)))
        sources: dict[object, hashing.HashedSource | hashing.Parts] = {
            i: hashing.HashedSource(path, seen, (each,)) for i, each in ranges.items()
        }
        sources |= {
            f"{i} in memory": [data[at : at + size // 2], memoryview(data)[at + size // 2 : at + size]]
            for i, (at, size) in ranges.items()
        }
        made = hashing.digests(sources)
    expected = [hashlib.sha256(data[start:end]).digest() for start, end in pairwise(starts)]
    assert made == dict(enumerate(expected)) | {f"{i} in memory": digest for i, digest in enumerate(expected)}


def test_an_error_in_one_thread_stops_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes out, and the rest of the work is left undone."""
    monkeypatch.setattr(hashing, "_MUCH", 0)
    monkeypatch.setattr(hashing, "cores", lambda: 3)
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    sources = {
        str(i): hashing.HashedSource(path, hashing.identity(path), ((0, 1000 - i),)) for i in range(200)
    }
    done, stops = list[str](), list[threading.Event]()
    monkeypatch.setattr(hashing, "Event", lambda: stops.append(threading.Event()) or stops[-1])

    def each(name: str, blocks: object) -> bytes:
        if name == "2":  # of the third thread, while the others have one each
            raise KeyboardInterrupt
        assert stops[-1].wait(120)
        done.append(name)
        return b""

    with pytest.raises(KeyboardInterrupt):
        hashing.digests(sources, each)
    assert sorted(done) == ["0", "1"]


MEASURE = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # each core has blocks of its own
from adapterpack.base.recast import cast_digests
from adapterpack.base.checkpoint import Checkpoint
def high():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
base = Checkpoint(sys.argv[1])
before = high()
assert base.fingerprint(files=True).content and cast_digests(base, dict.fromkeys(base.stored, "BF16"))
print(high() - before)
"""


def test_memory_does_not_grow_with_the_base(tmp_path: Path) -> None:
    """All four levels and a cast of 96 MB raise the resident peak, mapped pages included, by less than 24 MB:
    a few blocks a thread.
    """
    rng = np.random.default_rng(0)
    folder = save(
        tmp_path / "base", {f"{i}.weight": rng.standard_normal((3000, 2000), np.float32) for i in range(4)}
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert int(done.stdout) < 24 << 20


@pytest.mark.parametrize("shards", [1, 3])
def test_both_digests_at_once_are_those_of_each_alone(shards: int, tmp_path: Path) -> None:
    """Files and contents asked together give what each gives alone, for one file and for several with an
    index.
    """
    rng = np.random.default_rng(5)
    parts = [
        {f"w{part}.{number}": rng.normal(size=(number + 1, 301)).astype(np.float32) for number in range(4)}
        for part in range(shards)
    ]
    names = ["model.safetensors"] if shards == 1 else [f"model-{part}.safetensors" for part in range(shards)]
    for name, tensors in zip(names, parts, strict=True):
        safetensors.write(tmp_path / name, tensors, {"format": "pt"})
    if shards > 1:
        weight_map = {key: name for name, tensors in zip(names, parts, strict=True) for key in tensors}
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    both, alone = Checkpoint(tmp_path).fingerprint(files=True), Checkpoint(tmp_path)
    apart = (alone.fingerprint(content=False, files=True).files, alone.fingerprint().content)
    assert (both.files, both.content) == apart
    assert {entry.path: entry.sha256 for entry in Checkpoint(tmp_path).file_entries} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()
    }
