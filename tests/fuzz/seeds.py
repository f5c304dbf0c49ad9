"""What is fuzzed from: good inputs of every kind, made in a folder of their own."""

from __future__ import annotations

import io
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import onnxruntime as ort
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from adapterpack.adapter_methods import Site, methods, resolve_configs
from adapterpack.composing.recipe import CompositionRecipe
from adapterpack.io import strict_json
from adapterpack.io.safe_open import TENSORS
from adapterpack.io.safetensors import write
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import build
from adapterpack.peft import layout

sys.path.insert(0, str(Path(__file__).parent.parent / "packs"))
sys.path.insert(0, str(Path(__file__).parent.parent))
import foreign
import make_bad as bad
from test_templates import SHAPES

GOLDEN = Path(__file__).parent.parent / "golden"
SCRATCH = Path(tempfile.mkdtemp(prefix="fuzz-"))
FOLDER, PEFT, METHODS, TOKENIZER = (
    SCRATCH / "pack",
    SCRATCH / "peft",
    SCRATCH / "methods",
    SCRATCH / "tokenizer",
)
FOREIGN: dict[str, foreign.Foreign] = {}
"""By name, once :func:`adapters_of_others` has made them."""


def tensor_files() -> tuple[bytes, ...]:
    rng = np.random.default_rng(0)
    kinds: list[dict[str, Any]] = [
        {
            "a.weight": rng.random((2, 3), np.float32),
            "b": rng.random(5).astype(np.float16),
            "c": np.array(3, np.int64),
        },
        {
            "w": rng.random((3, 2)).astype(ml_dtypes.bfloat16),
            "e": np.zeros((0, 4), np.uint8),
            "mask": np.array([True, False]),
        },
        {
            "q": rng.random(4).astype(ml_dtypes.float8_e4m3fn),
            "r": rng.random(4).astype(ml_dtypes.float8_e5m2),
        },
        {},
    ]
    found = []
    for tensors, metadata in zip(
        kinds, ({"format": "pt"}, None, {"\u00e9": "\u4e2d"}, {"a": "b"}), strict=True
    ):
        buffer = io.BytesIO()
        write(buffer, tensors, metadata)
        found.append(buffer.getvalue())
    return (*found, (GOLDEN / "pack-1.1" / TENSORS).read_bytes())


def gguf_file() -> bytes:
    writer = gguf.GGUFWriter(SCRATCH / "seed.gguf", "llama")
    writer.add_string("general.type", "adapter")
    writer.add_float32("adapter.lora.alpha", 4.0)
    writer.add_array("words", ["a", "b"])
    for name, shape in (("lora_a", (2, 32)), ("lora_b", (16, 2))):
        writer.add_tensor(f"blk.0.attn_v.weight.{name}", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (SCRATCH / "seed.gguf").read_bytes()


def onnx_adapter() -> bytes:
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    values = {
        "a.down": np.ones((3, 2), np.float32),
        "a.up": np.ones((2, 5), np.float16),
        "b.head": np.ones((0, 4), np.float32),
    }
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()})
    adapter.export_adapter(str(SCRATCH / "seed.onnx_adapter"))
    return (SCRATCH / "seed.onnx_adapter").read_bytes()


def _places(shape: tuple[int, ...], wide: int) -> np.ndarray:
    """Different places in a matrix of that width, by row and column or counted row by row."""
    count = np.arange(shape[-1], dtype=np.int32)
    return (
        np.stack(np.divmod(count, wide))
        if len(shape) == 2 and shape[0] == 2
        else np.broadcast_to(count, shape).copy()
    )


def _parameter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers that a parameter may have: places are different ones, groups the first, and all others 1."""
    if "indices" in name:
        return _places(shape, 12)
    return np.zeros(shape, np.int32) if "groups" in name else np.ones(shape, np.float32)


def packs_of_methods() -> tuple[bytes, ...]:
    """A pack of each method, and a composed one; its manifest behind the name of its folder."""
    for name, made_by in methods().items():
        prompt = made_by.kind == "prompt"
        site, cfg = (
            Site("@prompt" if prompt else "net.q", 12, 0 if prompt else 6, made_by.traits.layers[0]),
            made_by.examples[0],
        )
        if hasattr(cfg, "head_dim"):
            cfg = replace(cfg, num_layers=1, num_heads=2, head_dim=3)
        cfg = replace(cfg, baked=True) if hasattr(cfg, "baked") else cfg  # as packs hold it
        cfg = resolve_configs(made_by, [cfg], [site])[0]
        own, shared = (
            made_by.shapes(cfg, site),
            made_by.storage.shared.shapes(cfg, [site]) if made_by.storage.shared else {},
        )
        params, common = (
            {key: _parameter(key, shape) for key, shape in shapes.items()} for shapes in (own, shared)
        )
        pack = build(
            name,
            made_by,
            {site: (cfg, params)},
            shared=common,
            task=m.PackTask("text-generation"),
            base=m.Base("org/base"),
        )
        pack.write(METHODS / name)
    bad.good(METHODS / "tree")
    bad.composed(METHODS / "tree")
    return tuple(
        folder.name.encode() + b"\n" + (folder / m.FILE_NAME).read_bytes()
        for folder in sorted(METHODS.iterdir())
    )


def adapters_of_others() -> tuple[bytes, ...]:
    """The settings of each, behind its name; of PEFT for each method whose pack is there."""
    FOREIGN.update(foreign.write_adapters(SCRATCH / "foreign", METHODS))
    return tuple(name.encode() + b"\n" + one.settings for name, one in FOREIGN.items())


def tokenizers_of_two_kinds() -> tuple[bytes, ...]:
    """A tokenizer of words and one of bytes."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "w1": 1, "w2": 2}, unk_token="[UNK]"))
    words.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[UNK] $A", pair="$A [UNK] $B:1", special_tokens=[("[UNK]", 0)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(
        models.BPE({**{letter: number for number, letter in enumerate(alphabet)}, "ab": 256}, [("a", "b")])
    )
    letters.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\w+|\s"), "isolated"), pre_tokenizers.ByteLevel()]
    )
    letters.decoder = decoders.ByteLevel()
    letters.add_special_tokens(["<end>"])
    return words.to_str().encode(), letters.to_str().encode()


def training_files() -> tuple[bytes, ...]:
    """Configurations with all that YAML has."""
    files = sorted(
        (file.read_bytes() for file in (GOLDEN.parent.parent / "examples").glob("*.yaml")), key=len
    )[:4]
    every = (
        b"a: &a {r: 8, x: [1, 2.5e-4, ~, yes, 0x1f]}\nb: {<<: *a, y: *a}\n'c': |\n  text\n  more\n? d\n: "
        b"!!str 5\n# end\n"
    )
    return (*files, every)


def recipes() -> tuple[bytes, ...]:
    """By a rule, and by a tree."""
    parents = (m.Parent("sha256:" + "0" * 64, "a", 0.5), m.Parent("sha256:" + "1" * 64, "b", 0.5))
    kinds = (
        CompositionRecipe(
            "both", parents, rule="ties", params={"density": 0.5}, options={"rank": 4, "whole": "average"}
        ),
        CompositionRecipe(
            "both",
            parents,
            tree={"sum": [{"member": "a"}, {"member": "b"}]},
            seed=3,
            result="sha256:" + "2" * 64,
        ),
    )
    return tuple(strict_json.canonical(one.to_json()) for one in kinds)


bad.good(FOLDER, bad.GOOD_TEMPLATE)
bad.good(PEFT)
(PEFT / m.FILE_NAME).unlink()
METHODS.mkdir()
TOKENIZER.mkdir()
MANIFEST, CONFIG = (FOLDER / m.FILE_NAME).read_bytes(), (PEFT / layout.CONFIG).read_bytes()
_VERSIONS = ("1.0", "1.1", "1.2", "1.3", "1.3-canary", "1.4-canary", "1.4-composition")
MANIFESTS = (MANIFEST, *((GOLDEN / f"pack-{version}" / m.FILE_NAME).read_bytes() for version in _VERSIONS))
TOKENIZERS = tokenizers_of_two_kinds()
BUNDLE = (Path(__file__).parent / "bundle.json").read_bytes()
ROWS = (
    b'{"text": "w1 [{", "id": 3}\n{"text": "\\u00e9", "id": null}\n',
    b'{"messages": [{"role": "user", "content": "a"}], "more": {"a": [[2.5], [1]]}}\n',
)
TOKENIZER_CONFIG = strict_json.canonical(
    {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "mask_token": None,
        "model_max_length": 10**30,
        "chat_template": [{"name": "default", "template": "{{ messages }}"}],
    }
)
TEMPLATES = tuple(text.encode() for text, _ in SHAPES.values())
