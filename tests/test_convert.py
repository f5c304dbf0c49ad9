"""Interchange formats: what other tools wrote is read, what we write they read, and the change is the same in
float64.
"""

from __future__ import annotations

import ast
import json
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import peft
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from click.testing import CliRunner
from safetensors import safe_open
from shipped_schemas import fits
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import adapterpack
from adapterpack import LoRA
from adapterpack import validate as validate_any
from adapterpack.adapter_methods import Site, get
from adapterpack.cli.main import main
from adapterpack.converting.factors import site_factors
from adapterpack.converting.flatbuffer import read_parameters
from adapterpack.converting.format import formats
from adapterpack.converting.formats.gguf import FAMILIES, common_alpha
from adapterpack.converting.gguf_file import read_gguf
from adapterpack.converting.numbers import scale_factor
from adapterpack.errors import (
    AdapterpackError,
    BaseMismatch,
    ConfigError,
    FormatError,
    NonFinite,
    NothingToDo,
    OutputExists,
    SiteNotFound,
    UnknownName,
    Unsupported,
)
from adapterpack.io.hashing import sha256_of
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import Pack, build
from adapterpack.pack.validate.validation import load, validate
from adapterpack.quantizing.packs import quantize_pack

pytestmark = pytest.mark.fast

WRITTEN = [
    name for name, form in formats().items() if form.write is not None and name not in ("xlora", "adapterhub")
]
"""X-LoRA takes composed packs alone, and AdapterHub has no place for an adapter of Llama's o_proj."""

EXACT = 1e-12
"""Absolute, float64: sums of at most 40 products of numbers of about one."""
ONE_ROUNDING = 2.0**-24
"""Relative: a factor, or an alpha, is rounded once to float32."""
BF16 = np.dtype(ml_dtypes.bfloat16)
LEAVES = ("lora_A", "lora_B")


def pack_on(
    shapes: Mapping[str, tuple[int, int]],
    config: Callable[[int], LoRA] = lambda _: LoRA(r=3, alpha=6),
    seed: int = 0,
    dtype: Any = np.float32,
    **rest: Any,
) -> Pack:
    """A random pack on modules of shape ``(out, in)``; ``config`` gives each site's by its number."""
    rng, adapters = np.random.default_rng(seed), {}
    for number, (path, (rows, columns)) in enumerate(shapes.items()):
        cfg = config(number)
        params = {
            "lora_A": rng.normal(size=(cfg.r, columns)).astype(dtype),
            "lora_B": rng.normal(size=(rows, cfg.r)).astype(dtype),
        }
        adapters[Site(path, columns, rows)] = (cfg, params)
    rest = {"task": m.PackTask("feature-extraction"), "base": m.Base(), **rest}
    return build("example", get("lora"), adapters, **rest)


def changes(pack: Pack) -> dict[str, np.ndarray]:
    """``s B A`` of every site, from the manifest's own scale, in float64."""
    scales = {group.path: group.scale for group in pack.manifest.groups}
    return {
        a.site.path: scales[a.site.path]
        * a.params["lora_B"].astype(np.float64)
        @ a.params["lora_A"].astype(np.float64)
        for a in pack.adapters()
    }


def same_changes(one: Pack, two: Pack, relative: float = 0.0) -> None:
    """The same sites, and the same changes within a rounding of each factor relative to what the sums add
    up.
    """
    ours, theirs = changes(one), changes(two)
    assert list(ours) and ours.keys() == theirs.keys()
    for adapter in one.adapters():
        path, scale = adapter.site.path, abs(adapter.config.scale)
        size = (
            scale
            * np.abs(adapter.params["lora_B"].astype(np.float64))
            @ np.abs(adapter.params["lora_A"].astype(np.float64))
        )
        assert (np.abs(ours[path] - theirs[path]) <= EXACT + relative * size).all(), path


LLAMA = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
MLP = {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}


def llama_sites() -> dict[str, tuple[int, int]]:
    """Every linear layer of the tiny Llama."""
    sites = {}
    for layer in range(2):
        sites |= {f"model.layers.{layer}.self_attn.{name}": shape for name, shape in LLAMA.items()}
        sites |= {f"model.layers.{layer}.mlp.{name}": shape for name, shape in MLP.items()}
    return sites


def dotted(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any] | None = None,
    name: str = "model",
) -> Path:
    """A base with weights of these shapes."""
    folder.mkdir(parents=True)
    tensors = {f"{path}.weight": np.ones(shape, np.float32) for path, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, folder / f"{name}.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "clip_text_model"}))
    return folder


UNET = {
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": (7, 5),
    "mid_block.attentions.0.proj_in": (5, 9),
    "up_blocks.1.attn2.to_out.0": (11, 3),
}


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    """A model of diffusers, with a convolution and odd sizes."""
    return dotted(
        tmp_path / "unet",
        {**UNET, "conv_in": (4, 3, 3, 3)},
        {"_class_name": "UNet2DConditionModel"},
        "diffusion_pytorch_model",
    )


# PEFT


def llama(tied: bool = False) -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def tied_llama() -> torch.nn.Module:
    return llama(tied=True)


def bert() -> torch.nn.Module:
    config = BertConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


PEFT_CASES = {
    "lora": (llama, {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}),
    "rslora": (llama, {"r": 5, "lora_alpha": 7, "use_rslora": True, "target_modules": ["v_proj"]}),
    "patterns": (
        llama,
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 5},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 9},
        },
    ),
    "modules_to_save": (
        bert,
        {
            "r": 3,
            "lora_alpha": 6,
            "target_modules": ["query", "value"],
            "modules_to_save": ["classifier"],
            "task_type": "SEQ_CLS",
        },
    ),
    "head and embeddings": (
        llama,
        {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "tied head": (tied_llama, {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied embeddings": (
        tied_llama,
        {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", PEFT_CASES)
def test_peft_to_pack_to_peft_is_byte_equal(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    """PEFT -> pack -> PEFT: the same names, dtypes, shapes and bytes; and PEFT's model of it gives the same
    logits, bit for bit.
    """
    make, options = PEFT_CASES[case]
    torch.manual_seed(3)
    model = make()
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                value.copy_(torch.randn_like(value))
    adapted.to(dtype).save_pretrained(tmp_path / "theirs")
    adapterpack.convert(tmp_path / "theirs", tmp_path / "pack", to="pack")
    assert validate(tmp_path / "pack").valid
    done = adapterpack.convert(tmp_path / "pack", tmp_path / "ours", to="peft")
    assert (done.source, done.target, sorted(path.name for path in (tmp_path / "ours").iterdir())) == (
        "pack",
        "peft",
        ["adapter_config.json", "adapter_model.safetensors"],
    )
    files = [safe_open(tmp_path / side / "adapter_model.safetensors", "pt") for side in ("theirs", "ours")]
    assert sorted(files[0].keys()) == sorted(files[1].keys())
    for key in files[0].keys():  # noqa: SIM118 - not a mapping
        one, two = (file.get_tensor(key) for file in files)
        assert one.dtype == two.dtype == dtype
        assert one.shape == two.shape
        assert one.view(torch.uint8).numpy().tobytes() == two.view(torch.uint8).numpy().tobytes()
    outputs = []
    for side in ("theirs", "ours"):
        fresh = make()
        fresh.load_state_dict(plain)
        loaded = peft.PeftModel.from_pretrained(fresh.to(dtype), tmp_path / side).eval()
        with torch.no_grad():
            outputs.append(loaded(input_ids=torch.tensor([[3, 1, 4, 1, 5]])).logits)
    assert torch.equal(*outputs)


def test_labels_are_named_and_the_form_follows_the_ending(tmp_path: Path) -> None:
    """PEFT's folder becomes a pack whose head has names, a pack a folder of PEFT, a ``.gguf`` llama.cpp's;
    wrong names are refused.
    """
    make, options = PEFT_CASES["modules_to_save"]
    peft.get_peft_model(make(), peft.LoraConfig(**options)).save_pretrained(tmp_path / "theirs")
    plain = adapterpack.convert(tmp_path / "theirs", tmp_path / "plain")
    assert (plain.target, plain.pack.manifest.task.labels) == ("pack", None)
    width = next(iter(plain.pack.full()["classifier"].values())).shape[0]
    assert any(f"{width} labels" in note and "--labels" in note for note in plain.notes)
    names = [f"a, {number}" for number in range(width)]
    line = ",".join(f'"{name}"' for name in names)
    done = CliRunner().invoke(
        main, ["convert", str(tmp_path / "theirs"), "-o", str(tmp_path / "pack"), "--labels", line, "--json"]
    )
    assert done.exit_code == 0, done.stderr
    assert load(tmp_path / "pack").manifest.task.labels == tuple(names)
    assert validate(tmp_path / "pack").valid
    again = adapterpack.convert(tmp_path / "pack", tmp_path / "again", labels=names[::-1])
    assert (again.target, again.pack.manifest.task.labels) == ("pack", tuple(names[::-1]))
    assert [parent.digest for parent in load(tmp_path / "again").manifest.lineage.parents] == [
        load(tmp_path / "pack").id
    ]
    assert adapterpack.convert(tmp_path / "pack", tmp_path / "theirs again").target == "peft"
    for wrong in (names[1:], names[:-1] + names[:1], [*names[1:], ""], [*names[1:], "x" * 201]):
        with pytest.raises(ConfigError, match="labels do not fit"):
            adapterpack.convert(tmp_path / "theirs", tmp_path / "x", labels=wrong)
    with pytest.raises(Unsupported, match="no place for label names"):
        adapterpack.convert(tmp_path / "theirs", tmp_path / "x.onnx_adapter", labels=names)
    with pytest.raises(Unsupported, match="head of its own"):
        adapterpack.convert(pack_on({"q_proj": (4, 4)}), tmp_path / "x", labels=["a"])
    with pytest.raises(ConfigError, match=r"diffusers or kohya|kohya or diffusers"):
        adapterpack.convert(tmp_path / "pack", tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="needs the base model"):
        adapterpack.convert(tmp_path / "pack", tmp_path / "x.gguf")
    assert not list(tmp_path.glob("x*"))


# GGUF


def gguf_changes(path: Path) -> dict[str, np.ndarray]:
    """What llama.cpp adds to each tensor, read with the gguf package: ``alpha / r * B A``, float64, in its
    order of rows.
    """
    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    found: dict[str, dict[str, np.ndarray]] = {}
    for tensor in reader.tensors:
        name, _, role = tensor.name.rpartition(".")
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        found.setdefault(name, {})[role] = value.reshape([int(extent) for extent in tensor.shape][::-1])
    return {
        name: (alpha / pair["lora_a"].shape[0] if alpha else 1.0) * pair["lora_b"] @ pair["lora_a"]
        for name, pair in found.items()
    }


def in_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Each head's halves interleaved, row by row, written as a loop."""
    size = rows.shape[0] // heads
    order = [
        head * size + half * (size // 2) + i
        for head in range(heads)
        for i in range(size // 2)
        for half in (0, 1)
    ]
    return rows[order]


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CONFIGS: dict[str, Callable[[int], LoRA]] = {
    "one scale": lambda _: LoRA(r=3, alpha=6),
    "rslora": lambda _: LoRA(r=5, alpha=7, use_rslora=True),
    "ranks with one alpha": lambda n: LoRA(r=1 + n % 4, alpha=8),
    "scales a power of two apart": lambda n: LoRA(r=4, alpha=2.0 ** (n % 3)),
    "scales of all kinds": lambda n: LoRA(r=1 + n % 3, alpha=3 + n / 7, use_rslora=bool(n % 2)),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_gguf_holds_the_same_change(tmp_path: Path, tiny_llama: Path, kind: str, dtype: Any) -> None:
    """``alpha / r * lora_b lora_a`` by the gguf package == ``s B A``, rows of q and k in llama.cpp's order;
    and reading gives it back.

    Within one rounding to float32 of alpha or of a scaled factor; to the last bit of float64 sums where
    nothing needs rounding.
    """
    pack = pack_on(llama_sites(), CONFIGS[kind], dtype=dtype)
    done = adapterpack.convert(pack, tmp_path / "a.gguf", to="gguf", base=tiny_llama)
    found, relative = (
        gguf_changes(tmp_path / "a.gguf"),
        0.0 if kind in ("one scale", "ranks with one alpha") else 2 * ONE_ROUNDING,
    )
    assert len(found) == 14
    for path, change in changes(pack).items():
        _, _, layer, *rest = path.split(".")
        name, heads = GGUF_NAMES[".".join(rest)], {"q_proj": 4, "k_proj": 2}.get(rest[-1])
        wanted = change if heads is None else in_pairs(change, heads)
        assert (
            np.abs(found[f"blk.{layer}.{name}.weight"] - wanted).max()
            <= EXACT + relative * np.abs(wanted).max() * 20
        )
    exact = kind in ("one scale", "ranks with one alpha", "scales a power of two apart")
    kept = {value.tensor_type.name for value in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    if exact:
        assert kept == {{"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[np.dtype(dtype).name]}
    assert bool(done.notes) == kind.startswith("scales")
    back = adapterpack.convert(tmp_path / "a.gguf", tmp_path / "back", to="pack", base=tiny_llama)
    assert validate(tmp_path / "back", tiny_llama).valid
    same_changes(pack, load(tmp_path / "back"), relative)
    lineage = back.pack.manifest.lineage
    assert lineage is not None
    assert lineage.parents[0].digest == f"sha256:{sha256_of(tmp_path / 'a.gguf')}"


FULL_DISK = """
import json, resource, sys
from pathlib import Path
import adapterpack
folder, base, sizes = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
for form, size in sizes.items():
    for limit in (0, 100, size // 2, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        try:
            adapterpack.convert(folder / "pack", folder / f"out.{form}", to=form, base=base)
            said = "done"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        left = sorted(path.name for path in folder.iterdir())
        print(json.dumps([form, limit, said, left]))
"""


def test_a_full_disk_ends_every_format_with_an_error_and_without_a_file(
    tmp_path: Path, tiny_llama: Path
) -> None:
    """In a process that may write no more than so many bytes to a file, be it the header, the last byte or
    half of the file.
    """
    pack_on(llama_sites()).write(tmp_path / "pack")
    sizes = {}
    for form in sorted(set(WRITTEN) - {"pack"}):
        adapterpack.convert(tmp_path / "pack", tmp_path / form, to=form, base=tiny_llama)
        made = [tmp_path / form] if (tmp_path / form).is_file() else [*(tmp_path / form).iterdir()]
        sizes[form] = max(file.stat().st_size for file in made)
        shutil.rmtree(tmp_path / form) if (tmp_path / form).is_dir() else (tmp_path / form).unlink()
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(tiny_llama), json.dumps(sizes)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 4 * len(sizes) >= 20
    for form, limit, said, left in map(json.loads, lines):
        assert said.startswith("StorageError: ") and str(tmp_path / f"out.{form}") in said, (
            form,
            limit,
            said,
        )
        assert left == ["pack"], (form, limit)


def test_gguf_keys_are_those_of_an_adapter(tmp_path: Path, tiny_llama: Path) -> None:
    """The keys that llama.cpp asks for have the values that it asks for; two writings are the same bytes."""
    pack = pack_on(llama_sites())
    for name in ("a", "b"):
        adapterpack.convert(pack, tmp_path / f"{name}.gguf", to="gguf", base=tiny_llama)
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    wanted = {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
        "general.name": "example",
        "adapterpack.pack": pack.id,
    }
    assert {key: fields[key].contents() for key in wanted} == wanted
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_the_order_of_rows_is_the_one_that_rotary_embeddings_need(tmp_path: Path, tiny_llama: Path) -> None:
    """Halves rotated (the model) and neighbours rotated (llama.cpp) give the same ``q . k`` with the adapter
    in, in float64.
    """
    pack = pack_on(llama_sites(), seed=5)
    adapterpack.convert(pack, tmp_path / "a.gguf", to="gguf", base=tiny_llama)
    theirs, ours, rng = gguf_changes(tmp_path / "a.gguf"), changes(pack), np.random.default_rng(6)
    size, (x, y) = 8, rng.normal(size=(2, 32))
    angle = 3.0 / 10000.0 ** (np.arange(size // 2) / (size // 2))

    def halves(v: np.ndarray, turn: np.ndarray) -> np.ndarray:
        a, b = v[:, : size // 2], v[:, size // 2 :]
        return np.concatenate([a * np.cos(turn) - b * np.sin(turn), b * np.cos(turn) + a * np.sin(turn)], 1)

    def neighbours(v: np.ndarray, turn: np.ndarray) -> np.ndarray:
        a, b = v[:, 0::2], v[:, 1::2]
        return np.stack(
            [a * np.cos(turn) - b * np.sin(turn), b * np.cos(turn) + a * np.sin(turn)], 2
        ).reshape(v.shape)

    q, k = (
        ours[f"model.layers.1.self_attn.{name}"] @ vector for name, vector in (("q_proj", x), ("k_proj", y))
    )
    q2, k2 = (theirs[f"blk.1.{name}.weight"] @ vector for name, vector in (("attn_q", x), ("attn_k", y)))
    scores = np.einsum(
        "hd,hd->h", halves(q.reshape(4, size), angle), np.repeat(halves(k.reshape(2, size), 4 * angle), 2, 0)
    )
    other = np.einsum(
        "hd,hd->h",
        neighbours(q2.reshape(4, size), angle),
        np.repeat(neighbours(k2.reshape(2, size), 4 * angle), 2, 0),
    )
    assert np.abs(scores).min() > 1e-3
    # sums of some 1e3 products of about 10
    assert np.abs(scores - other).max() <= 1e-9 * np.abs(scores).max()


def test_a_model_whose_rows_keep_their_order(tmp_path: Path, tiny_bert: Path) -> None:
    """BERT: other names, and no row moves."""
    sites = {
        f"encoder.layer.{n}.attention.self.{name}": (24, 24)
        for n in range(2)
        for name in ("query", "key", "value")
    }
    pack = pack_on({**sites, "encoder.layer.1.intermediate.dense": (40, 24)})
    adapterpack.convert(pack, tmp_path / "a.gguf", to="gguf", base=tiny_bert)
    found, wanted = gguf_changes(tmp_path / "a.gguf"), changes(pack)
    assert (
        np.abs(found["blk.1.attn_q.weight"] - wanted["encoder.layer.1.attention.self.query"]).max() <= EXACT
    )
    assert np.abs(found["blk.1.ffn_up.weight"] - wanted["encoder.layer.1.intermediate.dense"]).max() <= EXACT
    adapterpack.convert(tmp_path / "a.gguf", tmp_path / "back", to="pack", base=tiny_bert)
    same_changes(pack, load(tmp_path / "back"))


def test_every_family_is_one_that_the_gguf_package_knows() -> None:
    """Each name of the table is an architecture, and has a name for the queries of its first layer."""
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    for family in FAMILIES.values():
        names = gguf.get_tensor_name_map(known[family.name], 2)
        paths = (
            "model.layers.1.self_attn.q_proj",
            "model.layers.1.self_attn.qkv_proj",
            "encoder.layer.1.attention.self.query",
        )
        assert any(names.get_name(path) in ("blk.1.attn_q", "blk.1.attn_qkv") for path in paths), family


def foreign_gguf(
    path: Path, tensors: Mapping[str, np.ndarray], raw: Any = None, arch: str = "llama", **keys: Any
) -> Path:
    """A file that the gguf package wrote."""
    writer = gguf.GGUFWriter(path, arch)
    values = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0, **keys}
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    for name, value in tensors.items():
        if raw is None:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(
    rows: int = 16, columns: int = 32, r: int = 2, name: str = "blk.0.attn_v.weight"
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(8)
    return {
        f"{name}.lora_a": rng.normal(size=(r, columns)).astype(np.float32),
        f"{name}.lora_b": rng.normal(size=(rows, r)).astype(np.float32),
    }


@pytest.mark.parametrize("alpha", [0.0, None])
def test_a_gguf_without_alpha_has_scale_one(tmp_path: Path, tiny_llama: Path, alpha: float | None) -> None:
    """As llama.cpp has it; and it is said."""
    tensors = pair()
    path = foreign_gguf(tmp_path / "a.gguf", tensors, **{"adapter.lora.alpha": alpha})
    done = adapterpack.convert(path, tmp_path / "pack", to="pack", base=tiny_llama)
    (change,) = changes(done.pack).values()
    assert (
        np.abs(
            change
            - tensors["blk.0.attn_v.weight.lora_b"].astype(float) @ tensors["blk.0.attn_v.weight.lora_a"]
        ).max()
        <= EXACT
    )
    assert any("states no alpha" in note for note in done.notes)


def test_a_q8_0_gguf_is_read_with_the_values_that_the_gguf_package_gives(
    tmp_path: Path, tiny_llama: Path
) -> None:
    """The blocks' float32 values, bit for bit, and the reading says so."""
    tensors = pair(r=32)
    path = foreign_gguf(tmp_path / "a.gguf", tensors, gguf.GGMLQuantizationType.Q8_0)
    done = adapterpack.convert(path, tmp_path / "pack", to="pack", base=tiny_llama)
    (adapter,) = done.pack.adapters()
    for tensor in gguf.GGUFReader(path).tensors:
        leaf = LEAVES[tensor.name.endswith("lora_b")]
        assert np.array_equal(adapter.params[leaf], gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    assert any("Q8_0" in note for note in done.notes)


GGUF_REFUSED: dict[str, tuple[Callable[[], Mapping[str, Any]], type[AdapterpackError], str]] = {
    "a whole model": (
        lambda: {"keys": {"general.type": "model"}},
        Unsupported,
        "a model, not an adapter.*adapterpack inspect",
    ),
    "a control vector": (lambda: {"keys": {"adapter.type": "control_vector"}}, FormatError, "adapter.type"),
    "another family": (lambda: {"arch": "qwen2"}, BaseMismatch, "qwen2"),
    "activated by tokens": (
        lambda: {"keys": {"adapter.alora.invocation_tokens": [1, 2]}},
        Unsupported,
        "activated LoRA",
    ),
    "a norm": (
        lambda: {"tensors": {**pair(), "blk.0.attn_norm.weight": np.ones(32, np.float32)}},
        Unsupported,
        "attn_norm",
    ),
    "half a pair": (lambda: {"tensors": dict(list(pair().items())[:1])}, FormatError, "pair up"),
    "an unknown tensor": (lambda: {"tensors": pair(name="blk.7.attn_v.weight")}, SiteNotFound, "blk.7"),
    "an embedding": (lambda: {"tensors": pair(96, 32, name="token_embd.weight")}, SiteNotFound, "token_embd"),
    "another width": (lambda: {"tensors": pair(16, 31)}, BaseMismatch, "another shape"),
    "ranks that differ": (
        lambda: {
            "tensors": {
                "blk.0.attn_v.weight.lora_a": np.ones((2, 32), np.float32),
                "blk.0.attn_v.weight.lora_b": np.ones((16, 3), np.float32),
            }
        },
        FormatError,
        "fit each other",
    ),
    "NaN": (lambda: {"tensors": {k: v * np.nan for k, v in pair().items()}}, NonFinite, "NaN"),
    "an infinite alpha": (lambda: {"keys": {"adapter.lora.alpha": float("inf")}}, FormatError, "alpha"),
}


@pytest.mark.parametrize("kind", GGUF_REFUSED)
def test_what_a_pack_cannot_hold_of_a_gguf_is_refused_by_name(
    tmp_path: Path, tiny_llama: Path, kind: str
) -> None:
    """Nothing is left behind, and the error names it."""
    make, error, said = GGUF_REFUSED[kind]
    parts = make()
    path = foreign_gguf(
        tmp_path / "a.gguf",
        parts.get("tensors", pair()),
        arch=parts.get("arch", "llama"),
        **parts.get("keys", {}),
    )
    with pytest.raises(error, match=said):
        adapterpack.convert(path, tmp_path / "pack", to="pack", base=tiny_llama)
    assert not (tmp_path / "pack").exists()


def test_what_gguf_cannot_hold_of_a_pack_is_refused_by_name(tmp_path: Path, tiny_llama: Path) -> None:
    """A head, a tied output layer, a module without a tensor, an unknown family, no base, a scale of zero."""

    def refused(pack: Pack, error: type[AdapterpackError], said: str, base: Path | None = tiny_llama) -> None:
        with pytest.raises(error, match=said):
            adapterpack.convert(pack, tmp_path / "a.gguf", to="gguf", base=base)
        assert not list(tmp_path.glob("*gguf*"))

    sites = {"model.layers.0.self_attn.v_proj": (16, 32)}
    refused(
        pack_on(sites, full={"score": {"weight": np.ones((3, 32), np.float32)}}), Unsupported, "found score"
    )
    refused(pack_on({"lm_head": (96, 32)}), SiteNotFound, "lm_head")
    refused(pack_on({"model.embed_tokens": (96, 32)}), Unsupported, "embed_tokens")
    refused(pack_on(sites), ConfigError, "--base", None)
    refused(pack_on(sites, lambda _: LoRA(r=2, alpha=0)), Unsupported, "zero")
    refused(pack_on({"model.layers.0.self_attn.v_proj": (17, 32)}), BaseMismatch, "another shape")
    refused(
        pack_on(sites, lambda _: LoRA(r=2, alpha=1)),
        Unsupported,
        "clip_text_model",
        dotted(tmp_path / "odd", {"model.layers.0.self_attn.v_proj": (16, 32)}),
    )


def test_one_alpha_for_all() -> None:
    """The alpha of most sites; a scale that float32 cannot hold in the factor is refused, one that it can is
    rounded once at most.
    """
    pack = pack_on({f"s{n}": (3, 5) for n in range(5)}, lambda n: LoRA(r=2, alpha=[4, 4, 4, 6, 0][n]))
    assert common_alpha(list(site_factors(pack, "gguf")))[0] == 4
    up = np.array([[1.5, -3.0]], np.float32)
    assert scale_factor(up, 1 + 1e-9, "s") is up
    assert scale_factor(up.astype(BF16), 0.5, "s").dtype == BF16
    assert scale_factor(up.astype(np.float16), 1e6, "s").dtype == np.float32
    assert np.abs(scale_factor(up, 1 / 3, "s") / (up.astype(float) / 3) - 1).max() <= ONE_ROUNDING
    for ratio in (1e38 * 5, 1e-46):
        with pytest.raises(Unsupported, match="range of float32"):
            scale_factor(up, ratio, "s")


def hostile(data: bytes, seed: int) -> Iterator[bytes]:
    """The bytes cut at 60 places, and with 200 bytes altered one at a time, most of them in the first 600."""
    rng = np.random.default_rng(seed)
    yield from (data[:end] for end in rng.integers(0, len(data), 60))
    for position in (*rng.integers(0, min(600, len(data)), 150), *rng.integers(0, len(data), 50)):
        altered = bytearray(data)
        altered[position] ^= int(rng.integers(1, 256))
        yield bytes(altered)


def test_a_damaged_gguf_is_an_error_and_never_a_crash(tmp_path: Path, tiny_llama: Path) -> None:
    """Cut anywhere it is refused; an altered byte is refused with a named error, or changes a value and
    nothing else.
    """
    adapterpack.convert(pack_on(llama_sites()), tmp_path / "a.gguf", to="gguf", base=tiny_llama)
    data, path, refused = (tmp_path / "a.gguf").read_bytes(), tmp_path / "b.gguf", 0
    for altered in hostile(data, 9):
        path.write_bytes(altered)
        try:
            read_gguf(path)
        except AdapterpackError:
            refused += 1
        else:
            assert len(altered) == len(data)
    assert refused >= 100


@pytest.mark.parametrize(("at", "value"), [(8, 2**63), (16, 2**63), (8, 50_001), (24, 2**62)])
def test_a_gguf_that_promises_too_much_is_refused_before_anything_is_allocated(
    tmp_path: Path, at: int, value: int
) -> None:
    """Counts of tensors, of keys, and the length of the first key."""
    data = bytearray(foreign_gguf(tmp_path / "a.gguf", pair()).read_bytes())
    data[at : at + 8] = struct.pack("<Q", value)
    (tmp_path / "b.gguf").write_bytes(data)
    with pytest.raises(FormatError, match="too many or too long"):
        read_gguf(tmp_path / "b.gguf")


# kohya and diffusers


@pytest.mark.parametrize("kind", CONFIGS)
def test_kohya_both_ways(tmp_path: Path, unet: Path, kind: str) -> None:
    """``alpha / r * up down`` of the file == ``s B A`` in float64 with the factors' own bytes; pack and file
    come back.
    """
    pack = pack_on(UNET, CONFIGS[kind])
    adapterpack.convert(pack, tmp_path / "a.safetensors", to="kohya", base=unet)
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    assert len(tensors) == 9
    for path, change in changes(pack).items():
        name = f"lora_unet_{path.replace('.', '_')}"
        down, up, alpha = (
            tensors[f"{name}.{leaf}"] for leaf in ("lora_down.weight", "lora_up.weight", "alpha")
        )
        assert np.array_equal(down, pack.params(path)["lora_A"])
        assert alpha.shape == ()
        assert (
            np.abs(float(alpha) / down.shape[0] * up.astype(float) @ down.astype(float) - change).max()
            <= EXACT
        )
    done = adapterpack.convert(tmp_path / "a.safetensors", tmp_path / "pack", to="pack", base=unet)
    assert (done.source, done.notes) == ("kohya", ())
    assert validate(tmp_path / "pack").valid
    same_changes(pack, load(tmp_path / "pack"))
    adapterpack.convert(tmp_path / "pack", tmp_path / "b.safetensors", to="kohya")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def kohya(path: Path, modules: Mapping[str, tuple[int, int]], **more: np.ndarray) -> Path:
    """A file such as kohya's scripts write, without alpha."""
    rng, tensors = np.random.default_rng(4), dict(more)
    for name, (rows, columns) in modules.items():
        tensors |= {
            f"{name}.lora_down.weight": rng.normal(size=(2, columns)).astype(np.float16),
            f"{name}.lora_up.weight": rng.normal(size=(rows, 2)).astype(np.float16),
        }
    safetensors.numpy.save_file(tensors, path, {"ss_network_module": "networks.lora"})
    return path


PROJ = "lora_unet_mid_block_attentions_0_proj_in"


def test_kohya_without_alpha_has_scale_one_and_says_so(tmp_path: Path, unet: Path) -> None:
    """Missing alpha means alpha = r, for those modules alone."""
    path = kohya(
        tmp_path / "a.safetensors",
        {PROJ: (5, 9), "lora_unet_up_blocks_1_attn2_to_out_0": (11, 3)},
        **{f"{PROJ}.alpha": np.array(1.0, np.float32)},
    )
    done = adapterpack.convert(path, tmp_path / "pack", to="pack", base=unet)
    assert {group.path: group.scale for group in done.pack.manifest.groups} == {
        "mid_block.attentions.0.proj_in": 0.5,
        "up_blocks.1.attn2.to_out.0": 1.0,
    }
    assert "no alpha for 1 module (lora_unet_up_blocks_1_attn2_to_out_0)" in done.notes[0]


def test_kohya_of_several_models_is_read_one_by_one(tmp_path: Path, unet: Path) -> None:
    """A pack belongs to one base: the parts are named, and one is chosen; what is left out is said."""
    path = kohya(
        tmp_path / "a.safetensors",
        {PROJ: (5, 9), "lora_te1_text_model_q": (4, 3), "lora_te2_text_model_q": (4, 3)},
    )
    with pytest.raises(
        Unsupported, match=r"lora_te1 \(1 module\), lora_te2 \(1 module\), lora_unet \(1 module\)"
    ):
        adapterpack.convert(path, tmp_path / "pack", to="pack", base=unet)
    with pytest.raises(UnknownName, match="lora_te3"):
        adapterpack.convert(path, tmp_path / "pack", to="pack", base=unet, part="lora_te3")
    done = adapterpack.convert(path, tmp_path / "unet-pack", to="pack", base=unet, part="lora_unet")
    assert "left out: lora_te1, lora_te2" in done.notes[0]
    text = dotted(tmp_path / "text", {"text_model.q": (4, 3)})
    adapterpack.convert(path, tmp_path / "text-pack", to="pack", base=text, part="lora_te2")
    adapterpack.convert(tmp_path / "text-pack", tmp_path / "b.safetensors", to="kohya")
    assert all(
        key.startswith("lora_te2_text_model_q.")
        for key in safetensors.numpy.load_file(tmp_path / "b.safetensors")
    )


@pytest.mark.parametrize("published", [False, True], ids=["names of transformers 5", "published names"])
@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_text_encoders_have_the_names_that_are_published(form: str, published: bool, tmp_path: Path) -> None:
    """Of a CLIP that transformers 5 saved, without ``text_model.``, or one from before: read, attached as ``W
    + s B A`` says, and written again under the very keys.
    """
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=30, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    CLIPTextModel(config).save_pretrained(tmp_path / "base")
    if published:
        file = tmp_path / "base" / "model.safetensors"
        tensors = {f"text_model.{name}": value for name, value in safetensors.torch.load_file(file).items()}
        safetensors.torch.save_file(tensors, file, {"format": "pt"})
    path, rng = "text_model.encoder.layers.0.self_attn.q_proj", np.random.default_rng(2)
    down, up = (rng.normal(size=size).astype(np.float32) for size in ((2, 8), (8, 2)))
    keys = {
        "kohya": {
            f"lora_te_{path.replace('.', '_')}.{leaf}": value
            for leaf, value in {
                "lora_down.weight": down,
                "lora_up.weight": up,
                "alpha": np.array(2, np.float32),
            }.items()
        },
        "diffusers": {
            f"text_encoder.{path}.lora_{leaf}.weight": value for leaf, value in {"A": down, "B": up}.items()
        },
    }[form]
    safetensors.numpy.save_file(keys, tmp_path / "a.safetensors")
    pack = adapterpack.convert(
        tmp_path / "a.safetensors", tmp_path / "pack", to="pack", base=tmp_path / "base"
    ).pack
    model, fresh = (CLIPTextModel.from_pretrained(tmp_path / "base").eval() for _ in range(2))
    adapterpack.attach(model, pack)
    with torch.no_grad():
        fresh.encoder.layers[0].self_attn.q_proj.weight += torch.from_numpy(up @ down)
        ids = torch.arange(10)[None]
        torch.testing.assert_close(
            model(ids).last_hidden_state, fresh(ids).last_hidden_state, atol=1e-5, rtol=0
        )
    for source, base in ((pack, tmp_path / "base"), (pack, None)):
        out = tmp_path / f"{base is None}.safetensors"
        adapterpack.convert(source, out, to=form, base=base)
        assert safetensors.numpy.load_file(out).keys() == keys.keys()


def test_what_kohya_and_packs_cannot_say_to_each_other_is_refused_by_name(tmp_path: Path, unet: Path) -> None:
    """No base, an unknown or ambiguous name, half of a LoHa, DoRA by columns, a head, two paths with one
    name, NaN.
    """

    def refused(path: Path, error: type[AdapterpackError], said: str, base: Path | None = unet) -> None:
        with pytest.raises(error, match=said):
            adapterpack.convert(path, tmp_path / "pack", to="pack", base=base)
        assert not (tmp_path / "pack").exists()

    one = kohya(tmp_path / "1.safetensors", {PROJ: (5, 9)})
    refused(one, ConfigError, "--base", None)
    refused(
        one,
        Unsupported,
        r"a\.b_mid|mid_block",
        dotted(
            tmp_path / "twice",
            {"mid_block.attentions.0.proj_in": (5, 9), "mid.block.attentions_0.proj.in": (5, 9)},
        ),
    )
    refused(
        kohya(tmp_path / "2.safetensors", {"lora_unet_mid_block_nothing": (5, 9)}),
        SiteNotFound,
        "mid_block_nothing",
    )
    refused(
        kohya(tmp_path / "4.safetensors", {}, **{f"{PROJ}.hada_w1_a": np.ones((5, 2), np.float32)}),
        FormatError,
        "hada_w1_a",
    )
    refused(
        kohya(tmp_path / "3.safetensors", {}, **{f"{PROJ}.oft_blocks": np.ones((5, 2, 2), np.float32)}),
        Unsupported,
        "oft_blocks",
    )
    columns = {f"{PROJ}.dora_scale": np.ones((1, 9), np.float32)}
    refused(kohya(tmp_path / "5.safetensors", {PROJ: (5, 9)}, **columns), Unsupported, "dora_scale")
    refused(kohya(tmp_path / "6.safetensors", {PROJ: (6, 9)}), BaseMismatch, "another shape")
    refused(
        kohya(tmp_path / "7.safetensors", {PROJ: (5, 9)}, **{f"{PROJ}.alpha": np.array(np.nan, np.float32)}),
        NonFinite,
        "alpha",
    )
    refused(
        kohya(tmp_path / "8.safetensors", {PROJ: (5, 9)}, **{f"{PROJ}.alpha": np.ones(2, np.float32)}),
        FormatError,
        "alpha",
    )
    refused(
        kohya(tmp_path / "9.safetensors", {}, **{f"{PROJ}.lora_up.weight": np.ones((5, 2), np.float32)}),
        FormatError,
        "pair up",
    )
    for form in ("kohya", "diffusers"):
        with pytest.raises(Unsupported, match="score"):
            adapterpack.convert(
                pack_on(UNET, full={"score": {"weight": np.ones((2, 3), np.float32)}}),
                tmp_path / "x",
                to=form,
            )
    with pytest.raises(Unsupported, match="one name"):
        adapterpack.convert(pack_on({"a.b_c": (2, 3), "a_b.c": (2, 3)}), tmp_path / "x", to="kohya")


@pytest.mark.parametrize("kind", CONFIGS)
def test_diffusers_both_ways(tmp_path: Path, unet: Path, kind: str) -> None:
    """The metadata makes a configuration of PEFT under which PEFT's scaling and the factors give ``s B A``;
    and the pack comes back.
    """
    pack = pack_on(UNET, CONFIGS[kind])
    adapterpack.convert(pack, tmp_path / "a.safetensors", to="diffusers")
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        stated = json.loads(file.metadata()["lora_adapter_metadata"])
    config = peft.LoraConfig(**{key.removeprefix("unet."): value for key, value in stated.items()})
    model = torch.nn.Module()
    for path, (rows, columns) in UNET.items():
        owner = model
        for name in path.split(".")[:-1]:
            if not hasattr(owner, name):
                owner.add_module(name, torch.nn.Module())
            owner = getattr(owner, name)
        owner.add_module(path.rpartition(".")[2], torch.nn.Linear(columns, rows, bias=False))
    injected = peft.inject_adapter_in_model(config, model)
    for path, change in changes(pack).items():
        A, B = (tensors[f"unet.{path}.{leaf}.weight"].astype(float) for leaf in LEAVES)
        layer = injected.get_submodule(path)
        assert layer.lora_A["default"].weight.shape == A.shape
        assert np.abs(layer.scaling["default"] * B @ A - change).max() <= EXACT
    done = adapterpack.convert(tmp_path / "a.safetensors", tmp_path / "pack", to="pack")
    assert (done.source, done.notes) == ("diffusers", ())
    same_changes(pack, load(tmp_path / "pack"))
    adapterpack.convert(tmp_path / "pack", tmp_path / "b.safetensors", to="diffusers", base=unet)
    same_changes(
        pack, adapterpack.convert(tmp_path / "b.safetensors", tmp_path / "again", to="pack", base=unet).pack
    )


def test_a_model_of_diffusers_is_merged_into(tmp_path: Path, unet: Path) -> None:
    """Under the names that diffusers reads, rounded to float32, and back; of a whole pipeline, one of its
    folders has to be named.
    """
    pack = pack_on(UNET)
    adapterpack.merge(unet, [pack], tmp_path / "merged")
    assert {path.name for path in unet.iterdir()} <= {path.name for path in (tmp_path / "merged").iterdir()}
    assert (tmp_path / "merged" / "config.json").read_bytes() == (unet / "config.json").read_bytes()
    name = "diffusion_pytorch_model.safetensors"
    before, after = (safetensors.numpy.load_file(folder / name) for folder in (unet, tmp_path / "merged"))
    for path, change in changes(pack).items():
        assert np.abs(after[f"{path}.weight"] - before[f"{path}.weight"] - change).max() <= 1e-6
    assert np.array_equal(after["conv_in.weight"], before["conv_in.weight"])
    adapterpack.unmerge(tmp_path / "merged", tmp_path / "back", base=unet)
    assert (tmp_path / "back" / name).read_bytes() == (unet / name).read_bytes()
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(Unsupported, match="name the folder of one of them"):
        adapterpack.merge(tmp_path, [pack], tmp_path / "pipeline")


def test_diffusers_alpha_of_keys_and_of_nobody(tmp_path: Path) -> None:
    """An ``.alpha`` counts; without it and without metadata alpha = r, and that is said. PEFT's prefix
    without its config reads alike.
    """
    for before in ("transformer.", "base_model.model.", ""):
        tensors = {
            f"{before}{name}.{leaf}.weight": np.ones((2, 5) if leaf == "lora_A" else (7, 2), np.float32)
            for name in ("x.to_q", "x.to_k")
            for leaf in LEAVES
        }
        tensors[f"{before}x.to_q.alpha"] = np.array(8.0, np.float32)
        path = tmp_path / f"{before}a.safetensors"
        safetensors.numpy.save_file(tensors, path)
        done = adapterpack.convert(path, tmp_path / f"{before}pack", to="pack")
        assert {group.path: group.scale for group in done.pack.manifest.groups} == {
            "x.to_k": 1.0,
            "x.to_q": 4.0,
        }
        assert len(done.notes) == 1
        assert "no alpha for 1 module (x.to_k)" in done.notes[0]


def test_keys_of_diffusers_before_0_22(tmp_path: Path) -> None:
    """Attention processors, text encoders under two names; a module under an old and a new name is refused."""
    old = {
        "unet.mid.attn1.processor.to_q_lora": "mid.attn1.to_q",
        "unet.mid.attn1.processor.to_out_lora": "mid.attn1.to_out.0",
        "unet.mid.attn2.to_k.lora": "mid.attn2.to_k",
        "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora": "encoder.layers.0.self_attn.out_proj",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer": "encoder.layers.0.mlp.fc1",
    }
    shapes = {"down": (2, 5), "up": (7, 2)}
    tensors = {
        f"{key}.{end}.weight": np.ones(shape, np.float32) for key in old for end, shape in shapes.items()
    }
    safetensors.numpy.save_file(tensors, path := tmp_path / "a.safetensors")
    found = set()
    for part in ("unet", "text_encoder"):
        pack = adapterpack.convert(path, tmp_path / part, to="pack", part=part).pack
        found |= {group.path.removeprefix("text_model.") for group in pack.manifest.groups}
    assert found == set(old.values())
    tensors["unet.mid.attn1.to_q.lora_A.weight"] = np.ones((2, 5), np.float32)
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(FormatError, match="two tensors"):
        adapterpack.convert(path, tmp_path / "twice", to="pack", part="unet")


def test_what_diffusers_files_hold_beyond_plain_lora_is_refused_by_name(tmp_path: Path) -> None:
    """DoRA, a stated option, two models, a convolution, a false rank, metadata that is no JSON."""
    good = {
        "unet.q.lora_A.weight": np.ones((2, 5), np.float32),
        "unet.q.lora_B.weight": np.ones((7, 2), np.float32),
    }

    def refused(
        number: int,
        error: type[AdapterpackError],
        said: str,
        more: Mapping[str, np.ndarray],
        metadata: str | None = None,
    ) -> None:
        path = tmp_path / f"{number}.safetensors"
        safetensors.numpy.save_file(
            {**good, **more}, path, {"lora_adapter_metadata": metadata} if metadata else None
        )
        with pytest.raises(error, match=said):
            adapterpack.convert(path, tmp_path / "pack", to="pack")

    refused(1, Unsupported, "magnitude", {"unet.q.lora_magnitude_vector": np.ones(7, np.float32)})
    refused(2, Unsupported, "use_dora", {}, json.dumps({"unet.r": 2, "unet.use_dora": True}))
    refused(3, Unsupported, "text_encoder", {f"text_encoder.{key[5:]}": value for key, value in good.items()})
    refused(4, Unsupported, "not linear", {"unet.q.lora_A.weight": np.ones((2, 5, 3, 3), np.float32)})
    refused(5, FormatError, "rank", {}, json.dumps({"unet.r": 3, "unet.lora_alpha": 3}))
    refused(6, FormatError, "lora_adapter_metadata", {}, "{")
    refused(7, FormatError, "not usable", {}, json.dumps({"unet.r": "many"}))


# ONNX Runtime


def graph_with_slots(path: Path, slots: Mapping[str, tuple[str, str]], turned: str = "") -> None:
    """A graph of another tool: the factors of each module are inputs of a dtype and rank, and ``y`` is the sum of
    ``x A B`` over them. Those of the module ``turned`` are transposed first.
    """
    inputs, lines, sums = ["float[N, 5] x"], list[str](), list[str]()
    for number, (module, (dtype, rank)) in enumerate(slots.items()):
        for name, shape in (("A", ("5", rank)), ("B", (rank, "7"))):
            value, lies = f"model.{module}.lora_{name}.default.weight", shape
            op = "Identity"
            if module == turned:
                lies, op = shape[::-1], "Transpose"
            inputs.append(f'{dtype}[{", ".join(lies)}] "{value}"')
            lines.append(f'{name}{number}s = {op}("{value}")\n{name}{number} = Cast<to = 1>({name}{number}s)')
        lines.append(f"low{number} = MatMul(x, A{number})\ny{number} = MatMul(low{number}, B{number})")
        sums.append(f"y{number}")
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
slots ({", ".join(inputs)}) => (float[N, 7] y) {{
{chr(10).join(lines)}
y = Sum({", ".join(sums)})
}}"""
    ir.save(ir.from_onnx_text(text), path)


def test_an_adapter_for_a_graph_of_another_tool(tmp_path: Path) -> None:
    """The graph decides names, ranks, dtypes and which way factors lie; modules without the adapter get zeros. Against
    ``x (s B A)^T`` in float64.
    """
    q, v = "layers.0.attn.q_proj", "layers.1.attn.q_proj"
    slots = {q: ("float", "4"), v: ("float16", "R"), "layers.1.attn.k_proj": ("float", "3")}
    graph_with_slots(tmp_path / "model.onnx", slots, turned=q)
    names = {"model.layers.0.self_attn.q_proj": (7, 5), "model.layers.1.self_attn.q_proj": (7, 5)}
    pack = pack_on(names, lambda number: LoRA(r=3, alpha=5))
    done = adapterpack.convert(pack, tmp_path / "a.onnx_adapter", graph=tmp_path / "model.onnx")
    assert done.notes == ("2 inputs of the graph are zeros: the adapter leaves their modules",)
    file = ort.AdapterFormat.read_adapter(str(tmp_path / "a.onnx_adapter"))
    values = {name: value.numpy() for name, value in file.get_parameters().items()}
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x, **values})
    wanted = sum(x.astype(np.float64) @ change.T for change in changes(pack).values())
    np.testing.assert_allclose(y, wanted, atol=2e-3 * np.abs(wanted).max())  # one of them is in half floats


def test_an_adapter_that_a_graph_cannot_take(tmp_path: Path) -> None:
    """Its rank is larger than the graph's, or a module of it has no input there; nothing is written."""
    graph_with_slots(tmp_path / "model.onnx", {"layers.0.attn.q_proj": ("float", "2")})
    refused = {
        "does not fit its slot": pack_on(
            {"model.layers.0.self_attn.q_proj": (7, 5)}, lambda number: LoRA(r=3)
        ),
        "no slot for a part": pack_on({"model.layers.0.self_attn.o_proj": (7, 5)}, lambda number: LoRA(r=2)),
    }
    for said, pack in refused.items():
        with pytest.raises(Unsupported, match=said):
            adapterpack.convert(pack, tmp_path / "a.onnx_adapter", graph=tmp_path / "model.onnx")
    with pytest.raises(Unsupported, match="not made for a graph"):
        adapterpack.convert(pack, tmp_path / "peft", to="peft", graph=tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["f32", "bf16"])
def test_onnx_adapter_both_ways(tmp_path: Path, dtype: Any) -> None:
    """ONNX Runtime reads ``down up == (s B A)^T`` from the file within one rounding of each slot, and the
    head's own numbers.
    """
    head = {
        "weight": np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32),
        "bias": np.array([1, 2, 3], np.float32),
    }
    pack = pack_on(
        {"encoder.q": (7, 5), "encoder.v": (3, 9)},
        CONFIGS["scales of all kinds"],
        dtype=dtype,
        full={"classifier": head},
    )
    adapterpack.convert(pack, tmp_path / "a.onnx_adapter", to="onnx_adapter")
    theirs = ort.AdapterFormat.read_adapter(str(tmp_path / "a.onnx_adapter")).get_parameters()
    values = {name: value.numpy() for name, value in theirs.items()}
    assert {name.rpartition(".")[2] for name in values} == {"down", "up", "head", "head_bias"}
    for path, change in changes(pack).items():
        down, up = (values[f"{path}.{field}"].astype(float) for field in ("down", "up"))
        assert (
            np.abs((down @ up).T - change) <= EXACT + 2 * ONE_ROUNDING * (np.abs(down) @ np.abs(up)).T
        ).all()
    assert np.array_equal(values["classifier.head"], head["weight"].T)
    done = adapterpack.convert(tmp_path / "a.onnx_adapter", tmp_path / "pack", to="pack")
    assert validate(tmp_path / "pack").valid
    back = load(tmp_path / "pack")
    same_changes(pack, back, 2 * ONE_ROUNDING)
    assert {group.scale for group in back.manifest.groups if group.role == "adapter"} == {1.0}
    assert all(np.array_equal(back.full()["classifier"][name], value) for name, value in head.items())
    assert any("alpha = r" in note for note in done.notes)


def adapter_file(path: Path, values: Mapping[str, np.ndarray]) -> Path:
    """A file that ONNX Runtime wrote."""
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()})
    adapter.export_adapter(str(path))
    return path


def test_our_reader_agrees_with_onnx_runtime(tmp_path: Path) -> None:
    """The same names, dtypes, shapes and numbers, empty and scalar ones too."""
    rng = np.random.default_rng(2)
    values = {
        f"p{n}": rng.normal(size=shape).astype(dtype)
        for n, (shape, dtype) in enumerate(
            [((3, 5), np.float32), ((0, 4), np.float32), ((7,), np.float64), ((2, 3, 5), np.float16)]
        )
    }
    path = adapter_file(tmp_path / "a.onnx_adapter", values)
    ours, theirs = read_parameters(path), ort.AdapterFormat.read_adapter(str(path)).get_parameters()
    assert ours.keys() == theirs.keys() == values.keys()
    for name, value in values.items():
        assert ours[name].dtype == value.dtype
        assert np.array_equal(ours[name], value)
        assert np.array_equal(theirs[name].numpy(), value)


def test_an_empty_shape_that_no_array_can_have_is_refused(tmp_path: Path) -> None:
    """Zero bytes by one axis, more than can be addressed by the others: a named error in GGUF and in
    .onnx_adapter.
    """
    data = foreign_gguf(tmp_path / "a.gguf", {"w.lora_a": np.ones((3, 7, 32), np.float32)}).read_bytes()
    extents = struct.pack("<QQQ", 32, 7, 3)
    assert data.count(extents) == 1
    (tmp_path / "b.gguf").write_bytes(
        data.replace(extents, struct.pack("<QQQ", 2**40, 2**40, 0))[: -3 * 7 * 32 * 4]
    )
    with pytest.raises(FormatError, match="no array can have"):
        read_gguf(tmp_path / "b.gguf")
    data = adapter_file(tmp_path / "a.onnx_adapter", {"w.down": np.ones((0, 5, 3), np.float32)}).read_bytes()
    extents = struct.pack("<qqq", 0, 5, 3)
    assert data.count(extents) == 1
    (tmp_path / "b.onnx_adapter").write_bytes(data.replace(extents, struct.pack("<qqq", 0, 2**40, 2**40)))
    with pytest.raises(FormatError, match="no array can have"):
        read_parameters(tmp_path / "b.onnx_adapter")


@pytest.mark.parametrize(
    ("values", "error", "said"),
    [
        ({"model.layers.0.attn.qkv_proj.lora_A.MatMul.weight": np.ones((3, 2))}, FormatError, "pair up"),
        ({"model.layers.0.attn.qkv_proj.lora_magnitude": np.ones(3)}, Unsupported, "another tool"),
        ({"down": np.ones((3, 2))}, Unsupported, "another tool"),
        ({"a.down": np.ones((3, 2))}, FormatError, "pair up.*|down and up"),
        ({"a.down": np.ones((3, 2)), "a.up": np.ones((4, 5))}, FormatError, "fit each other"),
        ({"a.down": np.ones((3, 0)), "a.up": np.ones((0, 5))}, FormatError, "empty"),
        ({"a.scale": np.ones(3)}, Unsupported, "a.scale"),
        ({"a.down": np.ones((3, 2)), "a.up": np.ones((2, 5)), "b.scale": np.ones(3)}, Unsupported, "b.scale"),
        ({"a.head_bias": np.ones(3)}, FormatError, "pair up"),
        ({"a.head": np.ones((3, 2)), "a.head_bias": np.ones(3)}, FormatError, "fit each other"),
        ({"a.down": np.full((3, 2), np.inf), "a.up": np.ones((2, 5))}, NonFinite, "infinity"),
        ({"a.head": np.full((3, 2), np.nan)}, NonFinite, "infinity"),
        (
            {"a.down": np.ones((3, 2)), "a.up": np.ones((2, 5)), "a.head": np.ones((3, 5))},
            FormatError,
            "both",
        ),
    ],
)
def test_what_is_no_slot_of_ours_is_refused_by_name(
    tmp_path: Path, values: dict[str, np.ndarray], error: Any, said: str
) -> None:
    """Somebody else's names, half a pair, another method, shapes that do not fit, numbers that are none."""
    path = adapter_file(
        tmp_path / "a.onnx_adapter", {name: value.astype(np.float32) for name, value in values.items()}
    )
    with pytest.raises(error, match=said):
        adapterpack.convert(path, tmp_path / "pack", to="pack")
    assert not (tmp_path / "pack").exists()


def test_a_damaged_onnx_adapter_is_an_error_and_never_a_crash(tmp_path: Path) -> None:
    """As for GGUF; a shape that promises more than the bytes hold is refused before it is made."""
    adapterpack.convert(
        pack_on({"a.q": (7, 5), "a.v": (3, 9)}), tmp_path / "a.onnx_adapter", to="onnx_adapter"
    )
    data, path, refused = (tmp_path / "a.onnx_adapter").read_bytes(), tmp_path / "b.onnx_adapter", 0
    for altered in hostile(data, 10):
        path.write_bytes(altered)
        try:
            read_parameters(path)
        except AdapterpackError:
            refused += 1
    assert refused >= 80
    wide = data.replace(struct.pack("<qq", 5, 3), struct.pack("<qq", 2**40, 2**40))
    assert wide != data
    path.write_bytes(wide)
    with pytest.raises(FormatError, match="does not fit its bytes"):
        read_parameters(path)


# All formats


def target(form: str) -> str:
    return "out" if formats()[form].folder else f"out.{form}"


@pytest.mark.parametrize("form", WRITTEN)
def test_a_quantized_pack_is_written_as_the_floats_that_it_stands_for(
    tmp_path: Path, tiny_llama: Path, form: str
) -> None:
    """int8 values times their scales, in float64, whatever the format; and it is said."""
    pack = pack_on(llama_sites())
    small = quantize_pack(pack).write(tmp_path / "small")
    done = adapterpack.convert(small.path, tmp_path / target(form), to=form, base=tiny_llama)
    assert any("quantized" in note and "float32" in note for note in done.notes)
    if form == "gguf":
        found = gguf_changes(tmp_path / target(form))
        assert (
            np.abs(found["blk.0.attn_v.weight"] - changes(small)["model.layers.0.self_attn.v_proj"]).max()
            <= EXACT
        )
        return
    again = tmp_path / target(form)
    back = (
        load(again)
        if form in ("pack", "peft")
        else adapterpack.convert(again, tmp_path / "back", to="pack", base=tiny_llama).pack
    )
    same_changes(small, back, 2 * ONE_ROUNDING if form == "onnx_adapter" else 0.0)
    assert back.manifest.quantization is None


def test_a_base_makes_the_pack_name_it_by_content(tmp_path: Path, tiny_llama: Path) -> None:
    """With a base the imported pack is bound to its digests and names its tensors; another base is refused
    afterwards.
    """
    pack_on(llama_sites(), full=None).write(tmp_path / "p")
    adapterpack.convert(tmp_path / "p", tmp_path / "peft", to="peft")
    adapterpack.convert(tmp_path / "peft", tmp_path / "bound", to="pack", base=tiny_llama)
    bound = load(tmp_path / "bound")
    assert bound.manifest.base.content is not None
    assert {group.weight for group in bound.manifest.groups} == {f"{path}.weight" for path in llama_sites()}
    assert validate(tmp_path / "bound", tiny_llama).valid
    with pytest.raises(AdapterpackError):
        adapterpack.convert(
            tmp_path / "bound", tmp_path / "x.gguf", to="gguf", base=dotted(tmp_path / "other", llama_sites())
        )


def test_wrong_requests_are_named(tmp_path: Path) -> None:
    """An unknown format, the same format, a taken output, a part where there is none, a pickle, noise, a
    broken file, nothing there.
    """
    pack = pack_on({"a.q": (7, 5)})
    pack.write(tmp_path / "pack")
    with pytest.raises(UnknownName, match="did you mean 'gguf'"):
        adapterpack.convert(pack, tmp_path / "x", to="ggfu")
    with pytest.raises(NothingToDo, match="already"):
        adapterpack.convert(tmp_path / "pack", tmp_path / "x", to="pack")
    with pytest.raises(OutputExists):
        adapterpack.convert(pack, tmp_path / "pack", to="kohya")
    with pytest.raises(Unsupported, match="parts"):
        adapterpack.convert(pack, tmp_path / "x", to="kohya", part="lora_unet")
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(Unsupported, match="pickle"):
        adapterpack.convert(tmp_path / "a.pt", tmp_path / "x", to="pack")
    (tmp_path / "noise").write_bytes(b"hello world")
    with pytest.raises(FormatError, match="not an adapter in a known format"):
        adapterpack.convert(tmp_path / "noise", tmp_path / "x", to="pack")
    (tmp_path / "broken.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}trailing")
    with pytest.raises(FormatError, match="after the last tensor"):
        adapterpack.convert(tmp_path / "broken.safetensors", tmp_path / "x", to="pack")
    with pytest.raises(AdapterpackError, match="no such file or folder"):
        adapterpack.convert(tmp_path / "nothing", tmp_path / "x", to="pack")
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".*partial"))


def test_the_command_prints_what_was_done(tmp_path: Path, tiny_llama: Path) -> None:
    """One object that fits the schema; sentences for people; an error is an exit code and a sentence."""
    pack_on(llama_sites(), CONFIGS["scales of all kinds"]).write(tmp_path / "pack")
    args = ["convert", str(tmp_path / "pack"), "--to", "gguf", "--base", str(tiny_llama)]
    done = CliRunner().invoke(main, [*args, "-o", str(tmp_path / "a.gguf"), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert fits(report, "report.v1")
    assert (report["from"], report["to"], report["sites"]) == ("pack", "gguf", 14)
    assert report["bytes"] == (tmp_path / "a.gguf").stat().st_size
    told = CliRunner().invoke(main, [*args, "-o", str(tmp_path / "b.gguf")])
    assert "14 sites" in told.stdout
    assert "one alpha" in told.stdout
    failed = CliRunner().invoke(
        main, ["convert", str(tmp_path / "pack"), "--to", "gguf", "-o", str(tmp_path / "c.gguf"), "--json"]
    )
    assert failed.exit_code == 1
    assert fits(json.loads(failed.stdout), "report.v1")


def test_the_converters_import_what_one_format_needs_for_it_alone() -> None:
    """No transformers and no peft at all; torch, onnxruntime and gguf inside a function of the one file that
    needs each.
    """
    for file in (Path(adapterpack.__file__).parent / "converting").rglob("*.py"):
        tree = ast.parse(file.read_text("utf-8"))
        top, anywhere = (
            {name for node in nodes for name in _imported(node)} for nodes in (tree.body, ast.walk(tree))
        )
        needed = {"peft_decomposition.py": "torch", "onnx_adapter.py": "onnxruntime", "gguf.py": "gguf"}
        assert not anywhere & {"transformers", "peft"}
        assert not top & set(needed.values())
        assert anywhere & set(needed.values()) <= {needed.get(file.name, "")}


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    return (
        [(node.module or "").partition(".")[0]] if isinstance(node, ast.ImportFrom) and not node.level else []
    )


# Looking at a file


LAST = Counter(path.rpartition(".")[2] for path in llama_sites())


@pytest.mark.parametrize("form", [name for name, form in formats().items() if not form.folder])
def test_a_single_file_is_looked_at_without_its_base(tmp_path: Path, tiny_llama: Path, form: str) -> None:
    """inspect of the file and of the pack: the same sites, parameters, ranks and scales, as far as the format
    keeps them; validate says that it is well formed, and with its base that it fits; both print objects that
    fit the schema.
    """
    pack = pack_on(llama_sites(), CONFIGS["ranks with one alpha"]).write(tmp_path / "pack")
    path = tmp_path / ("out.safetensors" if form in ("kohya", "diffusers") else target(form))
    adapterpack.convert(pack, path, to=form, base=tiny_llama)
    ours, found = adapterpack.inspect(tmp_path / "pack"), adapterpack.inspect(path)
    assert (found["kind"], found["format"], found["name"]) == ("adapter", form, "out")
    assert found["file_bytes"] == path.stat().st_size
    for key in ("method", "sites", "parameters", "ranks", "modules_to_save"):
        assert found[key] == ours[key], key
    assert found["scales"] == ({"1": 14} if form == "onnx_adapter" else ours["scales"])
    called = {
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    called = {
        "gguf": called,
        "kohya": {name: f"self_attn_{name}" if name in LLAMA else f"mlp_{name}" for name in LAST},
    }.get(form, {})
    assert found["sites_by_module"] == {called.get(name, name): count for name, count in LAST.items()}
    assert found["base"]["model_type"] == ("llama" if form == "gguf" else None)
    for base in ((), ("--base", str(tiny_llama))):
        for command in ("inspect", "validate"):
            done = CliRunner().invoke(
                main, [command, str(path), *(base if command == "validate" else ()), "--json"]
            )
            assert done.exit_code == 0, done.output
            assert fits(json.loads(done.stdout), "report.v1")
    assert validate_any(path).not_checked[0].startswith("base")
    assert validate_any(path, full=True).state == "not fully checked"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(AdapterpackError):
        adapterpack.inspect(path)
    assert validate_any(path).state == "invalid"


def test_a_file_of_several_models_is_looked_at_as_a_whole(tmp_path: Path) -> None:
    """All sites, and a sentence that counts them by model."""
    path = kohya(
        tmp_path / "a.safetensors",
        {PROJ: (5, 9), "lora_te1_text_model_q": (4, 3), "lora_te1_text_model_k": (4, 3)},
    )
    found = adapterpack.inspect(path)
    assert (found["format"], found["sites"], found["parameters"]) == ("kohya", 3, 2 * (5 + 9 + 2 * 7))
    assert found["sites_by_module"]["proj_in"] == 1
    assert "lora_te1 (2 modules), lora_unet (1 module)" in found["notes"][0]
    tensors = {
        f"{part}.mid.to_q.lora_{leaf}.weight": np.ones(shape, np.float32)
        for part in ("unet", "text_encoder")
        for leaf, shape in (("A", (2, 5)), ("B", (7, 2)))
    }
    safetensors.numpy.save_file(tensors, tmp_path / "b.safetensors")
    found = adapterpack.inspect(tmp_path / "b.safetensors")
    assert (found["format"], found["sites"], found["sites_by_module"]) == ("diffusers", 2, {"to_q": 2})
    assert "text_encoder (1 module), unet (1 module)" in found["notes"][0]


def test_a_file_that_is_no_adapter(tmp_path: Path, tiny_llama: Path) -> None:
    """A pickle, any other file, and a base's weights: an error that says so, and no report of them as
    valid.
    """
    (tmp_path / "a.bin").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "b.txt").write_text("hello")
    for path, said in (
        (tmp_path / "a.bin", "pickle"),
        (tmp_path / "b.txt", "known format"),
        (tiny_llama / "model.safetensors", "known format"),
    ):
        with pytest.raises(AdapterpackError, match=said):
            adapterpack.inspect(path)
        assert not validate_any(path).valid
    with pytest.raises(Unsupported, match="only packs and bundles"):
        adapterpack.quantize(tmp_path / "b.txt", tmp_path / "out")
