"""Which bases a pack is used on: every level of knowledge, every kind of variant, through every stage that
takes a base.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from msgspec.structs import replace
from shipped_schemas import fits
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import adapterpack
from adapterpack import LoRA, Pack, adapt, attach, declare, load, save
from adapterpack.base import compatibility
from adapterpack.base import fingerprint as fp
from adapterpack.base.checkpoint import INDEX, Checkpoint
from adapterpack.cli.main import main
from adapterpack.errors import (
    AdapterpackError,
    BaseMismatch,
    NothingToDo,
    OutputExists,
    SiteNotFound,
    Unsupported,
)
from adapterpack.io import safetensors
from adapterpack.manifest import manifest as m
from adapterpack.manifest.structs import Variant
from adapterpack.pack.lineage import MAX_DEPTH
from adapterpack.pack.pack import seal

Tensors = dict[str, np.ndarray]


def tensors_of(base: Path) -> Tensors:
    checkpoint = Checkpoint(base)
    return {name: np.array(checkpoint.read(name)) for name in checkpoint.tensors}


def rewritten(base: Path, out: Path, values: Tensors, shards: int = 1, **config: Any) -> Path:
    """The base with other tensors, in so many files, and its config and tokenizer."""
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    names = (
        ["model.safetensors"] if shards == 1 else [f"model-{number}.safetensors" for number in range(shards)]
    )
    for number, name in enumerate(names):
        safetensors.write(
            out / name, {key: values[key] for key in list(values)[number::shards]}, {"format": "pt"}
        )
    if shards > 1:
        places = {key: names[number % shards] for number, key in enumerate(values)}
        (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    known = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**known, **config}))
    return out


def flipped(values: Tensors, name: str, at: int) -> Tensors:
    """One bit of one weight."""
    raw = np.frombuffer(values[name].tobytes(), np.uint8).copy()
    raw[at] ^= 1
    return {**values, name: raw.view(values[name].dtype).reshape(values[name].shape)}


def bf16(values: Tensors) -> Tensors:
    return {name: value.astype(ml_dtypes.bfloat16) for name, value in values.items()}


def fp8(values: Tensors, block: int = 16) -> Tensors:
    """The layout of transformers' ``fp8``: ``w = q * scale`` for blocks of 16 x 16."""
    out: Tensors = {}
    for name, value in values.items():
        if "proj" not in name:
            out[name] = value
            continue
        rows, columns = (size // block for size in value.shape)
        parts = value.reshape(rows, block, columns, block)
        scale = np.abs(parts).max((1, 3)) / 448
        out[name] = (parts / scale[:, None, :, None]).astype(ml_dtypes.float8_e4m3fn).reshape(value.shape)
        out[name.replace(".weight", ".weight_scale_inv")] = scale.astype(np.float32)
    return out


FP8 = {
    "quantization_config": {
        "quant_method": "fp8",
        "weight_block_size": [16, 16],
        "activation_scheme": "dynamic",
        "dequantize": True,
    }
}
TARGET = "model.layers.1.mlp.down_proj.weight"
"""6,144 bytes, of which the probe sees all; the embedding below is larger than its three samples."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The tiny Llama with an embedding that is larger than the samples of the probe."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("identity") / "base"
    config = LlamaConfig(
        vocab_size=131,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, folder)
    return folder


@pytest.fixture(scope="module")
def bases(wide: Path) -> dict[str, Path]:
    """The base in every form: cast and in three files, in three files, without its prefix, with other names,
    quantized; and other bases.
    """
    values, at = tensors_of(wide), wide.parent
    assert values["model.embed_tokens.weight"].nbytes > 12288
    renamed = {name.replace("self_attn.q_proj", "attn.query"): value for name, value in values.items()}
    swapped = {
        name.replace("layers.0.", "layers.x.")
        .replace("layers.1.", "layers.0.")
        .replace("layers.x.", "layers.1.")
        .replace("model.norm", "model.final_norm"): value
        for name, value in values.items()
    }
    return {
        "same": wide,
        "copied": rewritten(wide, at / "copied", values),
        "resharded": rewritten(wide, at / "resharded", values, 3),
        "cast": rewritten(wide, at / "cast", bf16(values), 3, dtype="bfloat16"),
        "unprefixed": rewritten(
            wide, at / "unprefixed", {name.removeprefix("model."): value for name, value in values.items()}
        ),
        "renamed": rewritten(wide, at / "renamed", renamed),
        "swapped": rewritten(wide, at / "swapped", swapped),
        "quantized": rewritten(wide, at / "quantized", fp8(values), **FP8),
        "one bit": rewritten(wide, at / "one-bit", flipped(values, "model.embed_tokens.weight", 6000)),
        "one sampled bit": rewritten(wide, at / "one-sampled-bit", flipped(values, TARGET, 1000)),
        "one bit of the cast": rewritten(
            wide, at / "one-bit-cast", flipped(bf16(values), TARGET, 1000), dtype="bfloat16"
        ),
        "shorter": rewritten(
            wide, at / "shorter", {**values, "model.norm.weight": values["model.norm.weight"][:-1]}
        ),
    }


@pytest.fixture(scope="module")
def pack(wide: Path) -> Pack:
    """A LoRA on attention and feed-forward sites, clearly not zero, on disk."""
    model = adapt(
        AutoModelForCausalLM.from_pretrained(wide),
        LoRA(r=3, alpha=5, targets=("q_proj", "v_proj", "down_proj")),
        "tickets",
    )
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return save(model, wide.parent / "tickets", base=wide)


@pytest.fixture(scope="module")
def declared(pack: Pack, bases: dict[str, Path]) -> Callable[[str], Pack]:
    """The pack with one more form of its base declared."""
    made = {kind: declare(pack, bases["same"], bases[kind]) for kind in ("cast", "unprefixed", "quantized")}
    return made.__getitem__


def knowing(pack: Pack, base: Path, *levels: str) -> Pack:
    """The pack with these levels of its base's fingerprint and no other."""
    found = Checkpoint(base).fingerprint(files=True)._asdict()
    known = {level: value if level in levels else None for level, value in found.items()}
    manifest = replace(pack.manifest, base=replace(pack.manifest.base, **known))
    return dataclasses.replace(pack, manifest=manifest)


# --- levels x bases


ALL = ("structure", "content", "files", "probe")
LEVELS: list[tuple[tuple[str, ...], str, str, str | None]] = [
    # what the pack knows, the base, the verdict, the words of the refusal
    (ALL, "same", "same", None),
    (ALL, "copied", "same", None),
    (ALL, "resharded", "same", None),
    (ALL, "one bit", "structural", "other weights"),
    (ALL, "one sampled bit", "structural", "other weights"),
    (ALL, "cast", "other", "names, dtypes or shapes"),
    (ALL, "shorter", "other", "names, dtypes or shapes"),
    (("content",), "resharded", "same", None),
    (("content",), "one bit", "other", "other weights"),
    (("files",), "copied", "same", None),
    (("files",), "one bit", "other", "other weights"),
    (("structure", "files"), "resharded", "structural", "no digest of the weights"),
    (("structure", "probe"), "same", "likely", None),
    # a byte that no sample holds: what the level cannot see, and says so
    (("structure", "probe"), "one bit", "likely", None),
    (("structure", "probe"), "one sampled bit", "structural", "other weights"),
    (("probe",), "same", "likely", None),
    (("structure",), "same", "structural", "no digest of the weights"),
    (("structure",), "one bit", "structural", "no digest of the weights"),
    (("structure",), "shorter", "other", "names, dtypes or shapes"),
]


@pytest.mark.parametrize(
    ("levels", "kind", "verdict", "words"), LEVELS, ids=[f"{'+'.join(row[0])}, {row[1]}" for row in LEVELS]
)
def test_the_verdict_on_a_base(
    levels: tuple[str, ...], kind: str, verdict: str, words: str | None, pack: Pack, bases: dict[str, Path]
) -> None:
    """content or files equal: same; samples equal: likely; structure equal: refused unless leave is given;
    else refused always.
    """
    known, base = knowing(pack, bases["same"], *levels), Checkpoint(bases[kind])
    if words is None:
        assert (
            known.require_base(base).name == known.require_base(base, allow_structural=True).name == verdict
        )
    else:
        with pytest.raises(BaseMismatch, match=words) as caught:
            known.require_base(base)
        assert ("--allow-structural-base" in str(caught.value)) == (verdict == "structural")
        if verdict == "structural":
            assert known.require_base(base, allow_structural=True).name == "structural"
        else:
            with pytest.raises(BaseMismatch, match=words):
                known.require_base(base, allow_structural=True)
    assert (
        compatibility.compare(
            known.manifest.base, compatibility.deciding_fingerprint(base, known.manifest.base)
        ).name
        == verdict
    )


def test_a_base_of_another_type_is_no_form_to_declare(
    pack: Pack, bases: dict[str, Path], tmp_path: Path
) -> None:
    """The way out of a mismatch names ``adapterpack declare`` unless the types of the models tell them
    apart.
    """
    other = rewritten(bases["shorter"], tmp_path / "other", tensors_of(bases["shorter"]), model_type="bert")
    for base, advised in ((bases["shorter"], True), (other, False)):
        with pytest.raises(BaseMismatch) as raised:
            pack.require_base(Checkpoint(base))
        assert ("adapterpack declare" in str(raised.value)) == advised


def test_bytes_are_read_only_where_they_can_decide(pack: Pack, bases: dict[str, Path]) -> None:
    """Another structure is refused by headers; without ``content`` no whole tensor is read, unless there is
    no structure to compare.
    """
    for kind, known, content, read in [
        ("shorter", pack, True, False),
        ("same", pack, True, True),
        ("same", pack, False, False),
        ("same", knowing(pack, bases["same"], "content"), False, True),
        ("same", knowing(pack, bases["same"], "structure"), True, False),
    ]:
        base = Checkpoint(bases[kind])
        compatibility.deciding_fingerprint(base, known.manifest.base, content)
        assert ("content" in vars(base)) == read, (kind, content)


def test_a_pack_that_names_no_digest_is_not_held_to_one(pack: Pack, bases: dict[str, Path]) -> None:
    """unknown, and used if its sites fit; a pack that knows another version of the scheme is refused."""
    assert knowing(pack, bases["same"]).require_base(Checkpoint(bases["cast"])).name == "unknown"
    newer = knowing(pack, bases["same"])
    base = replace(newer.manifest.base, content=f"bfp2:{'0' * 64}")
    with pytest.raises(BaseMismatch, match=r"nothing shows that.*no level in common"):
        dataclasses.replace(newer, manifest=replace(newer.manifest, base=base)).require_base(
            Checkpoint(bases["same"])
        )


# --- a model in memory, a running bank


def test_a_model_in_memory_has_every_level_but_files(tmp_path: Path) -> None:
    """structure, content and probe of ``fp.in_memory`` are those of the file with the same tensors; larger
    than the samples too.
    """
    rng = np.random.default_rng(2)
    values = {
        "a": rng.standard_normal((131, 37)).astype(np.float32),
        "b": rng.standard_normal(7).astype(ml_dtypes.bfloat16),
        "c": np.zeros((0, 3), np.float32),
        "d": np.array(3, np.int64),
    }
    found = fp.in_memory(
        [(name, safetensors.dtype_name(v.dtype), v.shape, v.tobytes()) for name, v in values.items()]
    )
    safetensors.write(tmp_path / "model.safetensors", values, {})
    assert found == Checkpoint(tmp_path).fingerprint()


def in_memory(base: Path, **change: Any) -> nn.Module:
    """The model of a base, with nothing left that says where it came from."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", **change)
    model.config._name_or_path = ""
    return model


@pytest.mark.parametrize(("levels", "kind", "words"), [
    (ALL, "same", None), (ALL, "one bit", "other weights"), (ALL, "cast", "names, dtypes or shapes"),
    (("structure", "probe"), "same", None), (("structure", "probe"), "one sampled bit", "other weights"),
    (("structure",), "same", "no digest of the weights"), (("files",), "same", "no level in common"), ((), "cast", None),
])  # fmt: skip
def test_a_model_in_memory_is_compared_like_a_checkpoint(
    levels: tuple[str, ...], kind: str, words: str | None, pack: Pack, bases: dict[str, Path]
) -> None:
    """The same table, for all levels that a model can have; ``check_base=False`` is the leave."""
    known, model = knowing(pack, bases["same"], *levels), in_memory(bases[kind])
    if words is not None:
        with pytest.raises(BaseMismatch, match=words):
            attach(model, known)
    attach(model, known, check_base=words is None)


def test_a_cast_model_in_memory_is_the_declared_cast(
    declared: Callable[[str], Pack], bases: dict[str, Path]
) -> None:
    """A model cast by torch has the content that the checkpoint in bfloat16 has."""
    attach(in_memory(bases["same"]).to(torch.bfloat16), declared("cast"))
    with pytest.raises(BaseMismatch):
        attach(in_memory(bases["one bit of the cast"]), declared("cast"))


# --- declaring


def test_a_declaration_is_a_new_pack_with_its_lineage(
    pack: Pack, bases: dict[str, Path], tmp_path: Path
) -> None:
    """The variant's own digests, the parent by digest, the same tensors and canary; the same bytes twice;
    nothing happens to the pack.
    """
    before = (original := Path(str(pack.path)) / "adapterpack.json").read_bytes()
    one, two = (declare(pack, bases["same"], bases["cast"], tmp_path / name) for name in "ab")
    found, made = Checkpoint(bases["cast"]), load(tmp_path / "a")
    assert made.manifest.base.variants == (Variant("dtype_cast", found.structure, found.content, False),)
    assert replace(made.manifest.base, variants=()) == pack.manifest.base
    lineage = made.manifest.lineage
    assert lineage is not None
    assert (lineage.operation, lineage.parents) == ("declare", (m.Parent(pack.id, pack.name),))
    assert lineage.params == {"relation": "dtype_cast", "variant": found.content}
    assert (made.name, made.manifest.canary, made.manifest.tensors) == (
        pack.name,
        pack.manifest.canary,
        pack.manifest.tensors,
    )
    assert made.id == one.id == two.id != pack.id
    for name in ("adapterpack.json", "adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert original.read_bytes() == before
    again = declare(made, bases["same"], bases["quantized"])
    assert [variant.relation for variant in again.manifest.base.variants] == ["dtype_cast", "quantized"]
    assert again.manifest.lineage is not None
    assert again.manifest.lineage.ancestors == {made.id: (pack.id,)}
    again.write(tmp_path / "c")
    assert adapterpack.validate(tmp_path / "c", bases["quantized"]).state == "valid"


def test_a_declared_pack_names_no_more_generations_than_a_manifest_reaches(
    pack: Pack, bases: dict[str, Path], tmp_path: Path
) -> None:
    ancestors = {f"sha256:{age:064x}": (f"sha256:{age + 1:064x}",) for age in range(1, MAX_DEPTH)}
    lineage = m.Lineage("compose", (m.Parent(f"sha256:{1:064x}", "before"),), {}, ancestors=ancestors)
    old = seal(replace(pack.manifest, lineage=lineage, files=()), pack.tensors, pack.extra)
    declare(old, bases["same"], bases["cast"], tmp_path / "declared")
    assert adapterpack.validate(tmp_path / "declared", bases["cast"]).state == "valid"


def test_what_cannot_be_declared(pack: Pack, bases: dict[str, Path], tmp_path: Path) -> None:
    """No variant; a base that is accepted as it is (copied, in other files, declared); not the pack's own
    base; names that mislead.
    """
    cases: list[tuple[type[AdapterpackError], str, Pack, str, str]] = [
        (BaseMismatch, r"no variant.*model\.embed_tokens\.weight", pack, "same", "one bit"),
        (BaseMismatch, r"no variant.*down_proj", pack, "same", "one bit of the cast"),
        (BaseMismatch, r"no variant.*model\.norm", pack, "same", "shorter"),
        (NothingToDo, "accepted there as it is.*every byte", pack, "same", "copied"),
        (NothingToDo, "accepted there as it is.*every byte", pack, "same", "resharded"),
        (NothingToDo, "declared variant", declare(pack, bases["same"], bases["cast"]), "same", "cast"),
        (BaseMismatch, "names, dtypes or shapes", pack, "cast", "same"),
        (
            BaseMismatch,
            "of the base that a pack names",
            declare(pack, bases["same"], bases["cast"]),
            "cast",
            "quantized",
        ),
        (BaseMismatch, "convert an imported adapter", knowing(pack, bases["same"]), "same", "cast"),
        (SiteNotFound, r"another name.*layers\.0\.self_attn\.q_proj\.weight", pack, "same", "renamed"),
        (Unsupported, r"another tensor has the name.*layers\.0", pack, "same", "swapped"),
    ]
    for error, words, given, base, other in cases:
        with pytest.raises(error, match=words):
            declare(given, bases[base], bases[other], tmp_path / "out")
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputExists):
        declare(pack, bases["same"], bases["cast"], tmp_path / "taken")


def test_files_alone_need_a_reshard_declared(pack: Pack, bases: dict[str, Path]) -> None:
    """A pack that knows its base by its files does not know the new files; declared, it knows them by
    content.
    """
    known = knowing(pack, bases["same"], "files")
    with pytest.raises(BaseMismatch):
        known.require_base(Checkpoint(bases["resharded"]))
    made = declare(known, bases["same"], bases["resharded"])
    assert [variant.relation for variant in made.manifest.base.variants] == ["reshard"]
    verdict = made.require_base(Checkpoint(bases["resharded"]))
    assert (verdict.name, str(verdict)) == ("variant", "variant (reshard): a declared variant of the base")


# --- what a variant is good for


def change_of(pack: Pack, path: str) -> np.ndarray:
    """``s B A`` in float64."""
    adapter = next(adapter for adapter in pack.adapters() if adapter.site.path == path)
    return 5 / 3 * adapter.params["lora_B"].astype(np.float64) @ adapter.params["lora_A"].astype(np.float64)


def dense(base: Path, pack: Pack, ids: torch.Tensor) -> np.ndarray:
    """Logits of the base in float64 with ``W + s B A`` written into its weights."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    with torch.no_grad():
        for adapter in pack.adapters():
            model.get_submodule(adapter.site.path).weight += torch.from_numpy(
                change_of(pack, adapter.site.path)
            )
        return model(ids).logits.numpy()


IDS = torch.tensor([[5, 9, 60, 3, 17], [2, 80, 41, 7, 7]])


def adapted(base: Path, pack: Pack) -> np.ndarray:
    """Logits of the pack attached to the base, in float32."""
    model = attach(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), pack)
    with torch.no_grad():
        return model(IDS).logits.numpy()


@pytest.mark.parametrize("kind", ["resharded", "cast", "unprefixed"])
def test_attach_and_merge_on_a_variant(
    kind: str, pack: Pack, declared: Callable[[str], Pack], bases: dict[str, Path], tmp_path: Path
) -> None:
    """W' = round(W + s B A) of the variant's own W, to half a unit in the last place; logits of the dense
    float64 model.

    bfloat16 keeps 8 bits: half a unit is at most 2^-8 of the number, of float32 2^-24; the sum in float32
    before it adds at most 2^-22 of the largest number. Logits in float32 have been seen within 3e-6 of
    float64.
    """
    known = pack if kind == "resharded" else declared(kind)
    adapterpack.merge(bases[kind], [known], tmp_path / "merged")
    old, new = tensors_of(bases[kind]), tensors_of(tmp_path / "merged")
    assert old.keys() == new.keys()
    gone = "model." if kind == "unprefixed" else ""
    touched = {(adapter.weight or "").removeprefix(gone): adapter.site.path for adapter in pack.adapters()}
    assert len(touched) == 6
    for name, value in new.items():
        before = old[name].astype(np.float64)
        if name not in touched:
            assert np.array_equal(before, value.astype(np.float64))
            continue
        exact = before + change_of(pack, touched[name])
        half = 2.0**-8 if kind == "cast" else 2.0**-24
        assert (
            np.abs(value.astype(np.float64) - exact) <= half * np.abs(exact) + 2.0**-22 * np.abs(exact).max()
        ).all(), name
        assert np.abs(change_of(pack, touched[name])).max() > 0.1
    np.testing.assert_allclose(adapted(bases[kind], known), dense(bases[kind], pack, IDS), rtol=0, atol=2e-5)


def test_the_cast_is_near_the_base_that_was_trained_on(
    pack: Pack, declared: Callable[[str], Pack], bases: dict[str, Path]
) -> None:
    """Against the dense float64 model of the original base: weights of 14 layers are off by up to 2^-8 each;
    seen: 0.043.
    """
    exact = dense(bases["same"], pack, IDS)
    error = np.abs(adapted(bases["cast"], declared("cast")) - exact).max() / np.abs(exact).max()
    assert 1e-3 < error < 0.1


@pytest.mark.parametrize("mode", ["bank", "folded"])
def test_export_on_a_cast(
    mode: str, pack: Pack, declared: Callable[[str], Pack], bases: dict[str, Path], tmp_path: Path
) -> None:
    """The bundle of the cast gives the dense float64 logits (folded: of weights rounded to bfloat16 once
    more), and names the cast.
    """
    bundle = adapterpack.export(
        bases["cast"], [declared("cast")], tmp_path / "bundle", mode=mode, slots=3 if mode == "bank" else None
    )
    assert bundle.base.content == Checkpoint(bases["cast"]).content
    session = adapterpack.Session(tmp_path / "bundle", "cpu")
    inputs = {"input_ids": IDS.numpy(), "attention_mask": np.ones_like(IDS.numpy())}
    exact = dense(bases["cast"], pack, IDS)
    found = session.run(inputs, "tickets")["logits"]
    np.testing.assert_allclose(
        found, exact, rtol=0, atol=5e-5 if mode == "bank" else 2.0**-5 * np.abs(exact).max()
    )
    assert adapterpack.validate(tmp_path / "bundle", bases["cast"]).base.name == "same"  # type: ignore[union-attr]
    wrong = adapterpack.validate(tmp_path / "bundle", bases["same"])
    assert [finding.rule for finding in wrong.findings] == ["AB301"]
    # a running bank compares by the same table: the bundle's base is a variant for the one, another for the
    # other
    if mode == "bank":
        with pytest.raises(BaseMismatch, match="names, dtypes or shapes"):
            session.load(pack, "undeclared")
        assert session.load(declared("cast"), "again") == "again"
        lookalike = knowing(pack, bases["cast"], "structure")
        with pytest.raises(BaseMismatch, match="no digest of the weights"):
            session.load(lookalike, "lookalike")
        session.unload("again")
        assert session.load(lookalike, "lookalike", allow_structural=True) == "lookalike"


def test_a_quantized_variant_takes_adapters_and_a_merge(
    pack: Pack, declared: Callable[[str], Pack], bases: dict[str, Path], tmp_path: Path
) -> None:
    """Attached where adapters know the layers (dequantized on load) and exported (floats of its values, as no
    operator has them): the dense float64 logits. Merged in its format.
    """
    known = declared("quantized")
    np.testing.assert_allclose(
        adapted(bases["quantized"], known), dense(bases["quantized"], pack, IDS), rtol=0, atol=2e-5
    )
    with pytest.raises(BaseMismatch, match="names, dtypes or shapes"):
        attach(AutoModelForCausalLM.from_pretrained(bases["quantized"]), pack)
    report = adapterpack.merge(bases["quantized"], [known], tmp_path / "merged")
    assert report.packs[0].base == "variant" and report.losses[0].dtype == "fp8"
    bundle = adapterpack.export(bases["quantized"], [known], tmp_path / "out", mode="folded")
    assert bundle.quantization["stored"]["fp8"]["held"] == 0
    inputs = {"input_ids": IDS.numpy(), "attention_mask": np.ones_like(IDS.numpy())}
    found = adapterpack.Session(tmp_path / "out", "cpu").run(inputs, "tickets")["logits"]
    np.testing.assert_allclose(found, dense(bases["quantized"], pack, IDS), rtol=0, atol=5e-5)


def test_a_quantized_variant_may_store_its_weights_in_any_form(
    pack: Pack, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Recognized by the names of its tensors, accepted by content though the pack's sites are not in it; no
    merge without settings.
    """
    values = tensors_of(bases["same"])
    stem = TARGET.removesuffix(".weight")
    packed = {f"{stem}.{part}": np.ones(3, np.int32) for part in ("qweight", "qzeros", "scales")}
    base = rewritten(
        bases["same"],
        tmp_path / "packed",
        {**{name: value for name, value in values.items() if name != TARGET}, **packed},
    )
    known = declare(pack, bases["same"], base)
    verdict = known.require_base(Checkpoint(base))
    assert (verdict.name, verdict.to_json()["relation"]) == ("variant", "quantized")
    with pytest.raises(Unsupported, match="form of awq is not read: bits"):
        adapterpack.merge(base, [known], tmp_path / "out")


def test_a_renamed_variant_that_others_declared(pack: Pack, bases: dict[str, Path], tmp_path: Path) -> None:
    """Every stage refuses by name what it cannot find: the first tensor that the pack changes and that has
    another name.
    """
    found = Checkpoint(bases["renamed"])
    base = replace(pack.manifest.base, variants=(Variant("renamed_keys", found.structure, found.content),))
    known = dataclasses.replace(pack, manifest=replace(pack.manifest, base=base))
    model = AutoModelForCausalLM.from_pretrained(bases["same"])
    model.config._name_or_path = str(bases["renamed"])
    for use in (
        lambda: adapterpack.merge(bases["renamed"], [known], tmp_path / "out"),
        lambda: attach(model, known),
        lambda: adapterpack.export(bases["renamed"], [known], tmp_path / "out"),
        lambda: adapterpack.convert(known, tmp_path / "out", to="peft", base=bases["renamed"]),
    ):
        with pytest.raises(
            SiteNotFound,
            match=r"another name.*found model\.layers\.0\.self_attn\.q_proj\.weight.*use the checkpoint",
        ):
            use()
    assert not (tmp_path / "out").exists()


def test_a_module_trained_whole_that_was_renamed(wide: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    """It would otherwise stand beside the tensor that it is to replace."""
    model = adapt(
        AutoModelForCausalLM.from_pretrained(wide),
        LoRA(r=1, targets=("v_proj",), modules_to_save=("model.norm",)),
        "whole",
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    whole = save(model, None, base=wide)
    values = {
        name.replace("model.norm", "model.final_norm"): value for name, value in tensors_of(wide).items()
    }
    other = rewritten(wide, tmp_path / "final", values)
    known = declare(whole, wide, other)
    with pytest.raises(SiteNotFound, match=r"model\.norm\.weight"):
        adapterpack.merge(other, [known], tmp_path / "out")
    unprefixed = declare(whole, wide, bases["unprefixed"])
    adapterpack.merge(bases["unprefixed"], [unprefixed], tmp_path / "out")
    assert np.array_equal(tensors_of(tmp_path / "out")["norm.weight"], whole.params("model.norm")["weight"])


def test_what_is_derived_keeps_the_variants(
    pack: Pack, declared: Callable[[str], Pack], bases: dict[str, Path], tmp_path: Path
) -> None:
    """Quantized and composed packs are of the same base: what any parent declared of it holds, in whatever
    order the parents come.
    """
    quantized = adapterpack.quantize(declared("cast"), tmp_path / "small")
    assert isinstance(quantized, Pack)
    parents = [pack.renamed("a"), declared("cast").renamed("b"), declared("quantized").renamed("c")]
    for made in (quantized, adapterpack.compose(parents), adapterpack.compose(parents[::-1])):
        assert made.require_base(Checkpoint(bases["cast"])).name == "variant"
    assert (
        adapterpack.compose(parents).manifest.base.variants
        == adapterpack.compose([*parents, *parents[1:]]).manifest.base.variants
    )
    with pytest.raises(BaseMismatch):
        adapterpack.compose(parents[:1]).require_base(Checkpoint(bases["cast"]))


# --- leave, and what is told


def call(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], prog_name="adapterpack")


def shown(done: Result) -> Any:
    """The one object on stdout, which fits the schema."""
    value = json.loads(done.stdout)
    assert fits(value, "report.v1")
    return value


def test_leave_is_given_by_name(pack: Pack, bases: dict[str, Path], tmp_path: Path) -> None:
    """merge, export and convert refuse the base with one other bit, and take it with --allow-structural-base;
    merge writes that down.
    """
    folder, base = pack.path, bases["one bit"]
    commands: dict[str, list[Any]] = {
        "merge": ["merge", base, folder, "--verify", "full"],
        "export": ["export", base, folder, "--mode", "folded"],
        "convert": ["convert", folder, "--to", "peft", "--base", base],
    }
    for name, args in commands.items():
        done = call(*args, "-o", tmp_path / name)
        assert (done.exit_code, done.stdout) == (1, "")
        assert "other weights" in done.stderr
        assert "--allow-structural-base" in done.stderr
        assert not (tmp_path / name).exists()
        done = call(*args, "-o", tmp_path / name, "--allow-structural-base", "--json")
        assert done.exit_code == 0, done.output
        shown(done)
    done = call(
        "merge", base, folder, "-o", tmp_path / "again", "--verify", "full", "--allow-structural-base"
    )
    assert "nothing but names and shapes shows that tickets was made for this base" in done.stdout
    note = json.loads((tmp_path / "merge" / "adapterpack.merge.json").read_text())
    assert [one["base"] for one in note["packs"]] == ["structural"]
    for args in commands.values():
        args[args.index(base)] = bases["shorter"]
        assert call(*args, "-o", tmp_path / "none", "--allow-structural-base").exit_code == 1
    assert call("validate", tmp_path / "export", "--base", bases["copied"]).exit_code == 1
    done = call(
        "validate", tmp_path / "export", "--base", bases["copied"], "--allow-structural-base", "--json"
    )
    assert [(one["rule"], one["severity"]) for one in shown(done)["findings"]] == [("AB301", "warning")]


TOLD = [
    ("same", "valid", "same", None, "base: same: every byte of every tensor is equal"),
    ("cast", "valid", "variant", "dtype_cast", "base: variant (dtype_cast): a declared variant of the base"),
    (
        "one bit",
        "invalid",
        "structural",
        None,
        "base: structural: the same names, dtypes and shapes, other weights",
    ),
    ("shorter", "invalid", "other", None, "base: other: names, dtypes or shapes differ"),
]


@pytest.mark.parametrize(("kind", "state", "verdict", "relation", "line"), TOLD, ids=[row[0] for row in TOLD])
def test_validate_tells_the_verdict(
    kind: str,
    state: str,
    verdict: str,
    relation: str | None,
    line: str,
    bases: dict[str, Path],
    declared: Callable[[str], Pack],
    tmp_path: Path,
) -> None:
    """In text and in JSON; a base that has the structure alone is a warning where leave is given."""
    folder = declared("cast").write(tmp_path / "pack").path
    value = shown(call("validate", folder, "--base", bases[kind], "--json"))
    assert (value["state"], value["base"]["verdict"], value["base"]["relation"]) == (state, verdict, relation)
    assert value["base"]["accepted"] == (state == "valid")
    assert line in call("validate", folder, "--base", bases[kind]).stdout.splitlines()
    assert [one["rule"] for one in value["findings"]] == ([] if state == "valid" else ["AP701"])
    value = shown(call("validate", folder, "--base", bases[kind], "--allow-structural-base", "--json"))
    assert value["state"] == ("invalid" if verdict == "other" else "valid")
    severities = {"structural": [("AP701", "warning")], "other": [("AP701", "error")]}
    assert [(one["rule"], one["severity"]) for one in value["findings"]] == severities.get(verdict, [])


def test_validate_tells_likely_and_unknown(pack: Pack, bases: dict[str, Path], tmp_path: Path) -> None:
    """A pack with samples only; a PEFT folder, which names no digest; none at all for a pack that is broken,
    or without a base.
    """

    def told(folder: Path) -> str | None:
        base = adapterpack.validate(folder, bases["same"]).base
        return None if base is None else base.name

    knowing(pack, bases["same"], "structure", "probe").write(tmp_path / "likely")
    adapterpack.convert(pack, tmp_path / "peft", to="peft")
    shutil.copytree(str(pack.path), tmp_path / "broken")
    data = bytearray((tmp_path / "broken" / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(data)
    assert [told(tmp_path / name) for name in ("likely", "peft", "broken")] == ["likely", "unknown", None]
    other = adapterpack.validate(tmp_path / "peft", bases["one bit"]).base
    assert other is not None
    assert (other.name, other.means) == (
        "unknown",
        "no base is named by its content (a folder of PEFT never names one): the weights were not compared",
    )
    assert shown(call("validate", tmp_path / "likely", "--json"))["base"] is None


def test_the_command_declares_and_inspect_shows_it(
    pack: Pack, bases: dict[str, Path], tmp_path: Path
) -> None:
    """``adapterpack declare`` writes what :func:`adapterpack.declare` makes; inspect shows all levels and the
    variants.
    """
    done = call("declare", pack.path, bases["same"], bases["cast"], "-o", tmp_path / "out")
    assert f"declared {bases['cast']} as a variant of base (dtype_cast, every byte compared)" in done.stdout
    value = shown(
        call("declare", pack.path, bases["same"], bases["quantized"], "-o", tmp_path / "json", "--json")
    )
    assert (value["command"], value["lineage"]["operation"]) == ("declare", "declare")
    assert load(tmp_path / "out").id == declare(pack, bases["same"], bases["cast"]).id
    found, cast = Checkpoint(bases["same"]).fingerprint(files=True)._asdict(), Checkpoint(bases["cast"])
    base = shown(call("inspect", tmp_path / "out", "--json"))["base"]
    assert base["variants"] == [
        {"relation": "dtype_cast", "structure": cast.structure, "content": cast.content, "tested": False}
    ]
    assert (base["structure"], base["content"]) == (found["structure"], found["content"])
    assert {level: shown(call("inspect", bases["same"], "--json"))[level] for level in ALL} == found
    text = call("inspect", tmp_path / "out", "--full").stdout
    assert re.search(rf"^base variants +dtype_cast {cast.content}$", text, re.MULTILINE)
