"""Adapters of other tools by their layouts: MLX, AdapterHub, LyCORIS, and PEFT's folders as Unsloth,
mergekit, axolotl and torchtune write them. What the tools themselves write is compared in
``interop/ecosystems``.
"""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_adapterhub import CLOSE, KEPT, MODELS
from transformers import BertConfig, BertModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import adapterpack
from adapterpack.converting.format import formats
from adapterpack.converting.refused import REFUSED
from adapterpack.errors import AdapterpackError, BaseMismatch, FormatError, NonFinite, Unsupported

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))
from foreign import BOTTLENECK, LORA, MLX, read, write_adapters

pytestmark = pytest.mark.fast

DOCS = Path(__file__).parent.parent / "docs" / "formats.md"
RNG = np.random.default_rng(3)
ONE_ROUNDING = 2.0**-23
"""Relative to what the sums add up: a factor, or a weight, is rounded to float32."""


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def folder(path: Path, config: Mapping[str, Any] | None, **files: Mapping[str, np.ndarray]) -> Path:
    """A folder with ``adapter_config.json`` and files of tensors."""
    path.mkdir(parents=True)
    if config is not None:
        (path / "adapter_config.json").write_text(json.dumps(config))
    for name, tensors in files.items():
        save_file(
            {key: np.ascontiguousarray(value) for key, value in tensors.items()}, path / f"{name}.safetensors"
        )
    return path


def converted(source: Path, out: Path, **options: Any) -> adapterpack.Pack:
    return adapterpack.convert(source, out, to="pack", **options).pack


# MLX


def mlx_tensors(rank: int = 3, name: str = "model.layers.0.self_attn.q_proj") -> dict[str, np.ndarray]:
    return {f"{name}.lora_a": normal(7, rank), f"{name}.lora_b": normal(rank, 5)}


def test_mlx_before_0_14(tmp_path: Path) -> None:
    """Its tensors are numpy's arrays, its alpha counts; what is no such file is refused before it takes memory."""
    parameters = {"rank": 3, "scale": 2.5, "dropout": 0.0}
    new = folder(tmp_path / "new", MLX, adapters=mlx_tensors())
    old = folder(tmp_path / "old", {"lora_layers": 2, "lora_parameters": {**parameters, "alpha": 6}})
    tensors = load_file(new / "adapters.safetensors")
    np.savez(old / "adapters.npz", **tensors)
    whole = (old / "adapters.npz").read_bytes()
    packs = [converted(source, tmp_path / f"{source.name}-pack") for source in (new, old)]
    assert all(np.array_equal(packs[0].tensors[name], value) for name, value in packs[1].tensors.items())
    assert [pack.manifest.groups[0].scale for pack in packs] == [2.5, 5.0]
    key = min(tensors)
    for wrong in (
        lambda: np.savez_compressed(old / "adapters.npz", **tensors),
        lambda: np.savez(old / "adapters.npz", **{**tensors, key: np.array([{}], dtype=object)}),
        lambda: (old / "adapters.npz").write_bytes(b"PK"),
        lambda: (old / "adapters.npz").write_bytes(whole.replace(b"(3, 5)", b"(9, 9)")),
    ):
        wrong()
        with pytest.raises(FormatError, match="numpy or MLX"):
            converted(old, tmp_path / "wrong")


def test_mlx_both_ways(tmp_path: Path) -> None:
    """``scale (a b)^T`` in float64, from a file with the header that mlx writes, whose metadata is null; and
    back to the same numbers.
    """
    source, tensors = folder(tmp_path / "a", MLX, adapters=mlx_tensors()), mlx_tensors()
    save_file(tensors, source / "adapters.safetensors")
    data = (source / "adapters.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": None, **json.loads(data[8 : 8 + length])}).encode()
    (source / "adapters.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + data[8 + length :]
    )
    pack = converted(source, tmp_path / "pack")
    [adapter] = pack.adapters()
    wide = {name.rpartition(".")[2]: value.astype(float) for name, value in tensors.items()}
    change = (
        adapter.config.scale * adapter.params["lora_B"].astype(float) @ adapter.params["lora_A"].astype(float)
    )
    assert np.abs(change - 2.5 * (wide["lora_a"] @ wide["lora_b"]).T).max() <= 1e-12
    adapterpack.convert(tmp_path / "pack", tmp_path / "back", to="mlx")
    again = load_file(tmp_path / "back" / "adapters.safetensors")
    assert all(np.array_equal(again[key], value) for key, value in tensors.items())
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {
        "rank": 3,
        "scale": 2.5,
        "dropout": 0.0,
        "keys": ["model.layers.0.self_attn.q_proj"],
    }


@pytest.mark.parametrize(
    ("keys", "alpha", "scale"),
    [
        # since October 2024, whose defaults still had an alpha
        ({"num_layers": 1, "fine_tune_type": "lora"}, 16, 2.5),
        ({"lora_layers": 1}, 16, 2.5 * 16 / 3),  # until May 2024
        ({"lora_layers": 1, "use_dora": False}, 3, 2.5),  # of either, which is the same
    ],
)
def test_mlx_means_by_an_alpha_what_the_version_that_trained_meant(
    tmp_path: Path, keys: dict[str, Any], alpha: int, scale: float
) -> None:
    config = {**keys, "lora_parameters": {"rank": 3, "alpha": alpha, "scale": 2.5, "dropout": 0.0}}
    [adapter] = converted(
        folder(tmp_path / "a", config, adapters=mlx_tensors()), tmp_path / "pack"
    ).adapters()
    assert adapter.config.scale == pytest.approx(scale, rel=1e-15)


def test_mlx_has_one_rank_and_one_scale(tmp_path: Path) -> None:
    """Modules of other ranks and scales are padded with zeros and multiplied: the changes are the same, and
    it is said.
    """
    tensors = {
        f"base_model.model.{name}.lora_{leaf}.weight": normal(*shape)
        for name, rank in (("x.q", 2), ("x.k", 2), ("x.v", 4))
        for leaf, shape in (("A", (rank, 7)), ("B", (5, rank)))
    }
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"v": 4},
        "target_modules": ["q", "k", "v"],
    }
    source = folder(tmp_path / "a", config, adapter_model=tensors)
    done = adapterpack.convert(source, tmp_path / "mlx", to="mlx")
    assert ["padded" in note or "one scale" in note for note in done.notes] == [True, True]
    found = load_file(tmp_path / "mlx" / "adapters.safetensors")
    for name, scale in (("x.q", 2.0), ("x.k", 2.0), ("x.v", 1.0)):
        a, b = (found[f"{name}.lora_{leaf}"].astype(float) for leaf in "ab")
        assert a.shape[1] == b.shape[0] == 4
        A, B = (tensors[f"base_model.model.{name}.lora_{leaf}.weight"].astype(float) for leaf in "AB")
        np.testing.assert_allclose(2 * (a @ b).T, scale * B @ A, rtol=0, atol=ONE_ROUNDING * 40)


@pytest.mark.parametrize(
    ("config", "tensors", "error", "said"),
    [
        ({**MLX, "fine_tune_type": "full"}, mlx_tensors(), Unsupported, "extract"),
        (
            {"lora_layers": 1, "use_dora": False, "lora_parameters": {"rank": 3, "scale": 10.0, "alpha": 16}},
            mlx_tensors(),
            Unsupported,
            "take alpha out",
        ),
        (
            {"lora_parameters": {"rank": 3, "scale": 10.0, "alpha": 16}},
            mlx_tensors(),
            Unsupported,
            "take alpha out",
        ),
        (
            {**MLX, "lora_parameters": {"rank": 3, "scale": 1e400}},
            mlx_tensors(),
            AdapterpackError,
            "finite|JSON",
        ),
        ({**MLX, "fine_tune_type": ["full"]}, mlx_tensors(), Unsupported, "trained the weights"),
        ({**MLX, "lora_parameters": {"rank": 3, "scale": 1e308}}, mlx_tensors(), FormatError, "finite"),
        (MLX, mlx_tensors(2), FormatError, "rank"),
        (MLX, mlx_tensors(name="model.embed_tokens"), Unsupported, "tied"),
        (
            MLX,
            {**mlx_tensors(), "x.gate.lora_a": normal(4, 3, 7), "x.gate.lora_b": normal(4, 5, 3)},
            Unsupported,
            "experts",
        ),
        (MLX, {**mlx_tensors(), "x.q.weight": normal(4, 4)}, Unsupported, "x.q.weight"),
        (MLX, {"x.lora_a": normal(7, 3)}, FormatError, "pair up"),
        (
            MLX,
            {"x.lora_a": normal(7, 3) * np.float32(np.inf), "x.lora_b": normal(3, 5)},
            NonFinite,
            "NaN or infinity",
        ),
    ],
)
def test_what_mlx_holds_beyond_lora_is_refused_by_name(
    tmp_path: Path,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    error: type[AdapterpackError],
    said: str,
) -> None:
    source = folder(tmp_path / "a", config, adapters=tensors)
    with pytest.raises(error, match=said):
        converted(source, tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


# AdapterHub


HUB = {
    ("bert", "houlsby"): {},
    ("bert", "compacter"): {"phm_layer": True, "phm_dim": 2, "reduction_factor": 3, "non_linearity": "gelu"},
    ("bert", "parallel"): {
        "mh_adapter": False,
        "is_parallel": True,
        "scaling": 4.0,
        "reduction_factor": 2,
        "non_linearity": "relu",
    },
    ("llama", "parallel"): {
        "mh_adapter": False,
        "is_parallel": True,
        "scaling": 4.0,
        "reduction_factor": 2,
        "non_linearity": "relu",
    },
    ("llama", "pfeiffer"): {"mh_adapter": False, "original_ln_before": True, "non_linearity": "relu"},
}


def hub_folder(
    path: Path, family: str, name: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> Path:
    saved = {
        "config": config,
        "hidden_size": 12,
        "model_class": "X",
        "model_name": "",
        "model_type": family,
        "name": name,
        "version": "adapters.1.3.0",
    }
    return folder(path, saved, adapter=tensors)


@pytest.mark.parametrize(("family", "name"), HUB)
def test_an_adapterhub_folder_gives_what_its_library_gave(tmp_path: Path, family: str, name: str) -> None:
    """Tensors that the library made, in its own folder: attached to the library's base they give its hidden
    states.
    """
    base: Any = MODELS[family]()
    base.load_state_dict(
        {
            key.removeprefix(f"{family}/base/"): torch.from_numpy(value)
            for key, value in KEPT.items()
            if key.startswith(f"{family}/base/")
        }
    )
    start = f"{family}/{name}/"
    tensors = {key.removeprefix(start): value for key, value in KEPT.items() if key.startswith(start)}
    pack = converted(
        hub_folder(tmp_path / "a", family, name, {**BOTTLENECK, **HUB[family, name]}, tensors),
        tmp_path / "pack",
    )
    adapterpack.attach(base.eval(), pack)
    with torch.no_grad():
        found = base.double()(torch.from_numpy(KEPT["ids"])).last_hidden_state.numpy()
    np.testing.assert_allclose(found, KEPT[f"{family}/out/{name}"], rtol=0, atol=CLOSE)


def test_a_fused_projection_of_adapterhub_is_one_lora(tmp_path: Path) -> None:
    """GPT-2's query and value, adapted apart: their rows hold their products, and the key's are zero; (IA)^3
    leaves the key at one.
    """
    place, down, up = "transformer.h.0.attn.c_attn.loras.a", normal(4, 5), normal(6, 2)
    tensors = {f"{place}.lora_A": down, f"{place}.lora_B": up}
    [adapter] = converted(
        hub_folder(tmp_path / "a", "gpt2", "a", LORA, tensors), tmp_path / "pack"
    ).adapters()
    change = (
        adapter.config.scale * adapter.params["lora_B"].astype(float) @ adapter.params["lora_A"].astype(float)
    )
    parts = [
        1.5 * up[3 * n : 3 * n + 3].astype(float) @ down[2 * n : 2 * n + 2].astype(float) for n in range(2)
    ]
    np.testing.assert_allclose(
        change, np.concatenate([parts[0], np.zeros((3, 5)), parts[1]]), rtol=0, atol=1e-12
    )
    config = {**LORA, "r": 1, "alpha": 1, "composition_mode": "scale", "attn_matrices": ["v"]}
    source = hub_folder(tmp_path / "b", "gpt2", "a", config, {f"{place}.lora_B": up[:3, :1]})
    [adapter] = converted(source, tmp_path / "scaled").adapters()
    assert np.array_equal(adapter.params["ia3_l"][:, 0], [1, 1, 1, 1, 1, 1, *up[:3, 0]])


def test_a_pickle_of_adapterhub_is_read_by_convert_alone(tmp_path: Path) -> None:
    """What the library writes by default, and most of its hub: the same tensors, and a note."""
    place = "transformer.h.0.attn.c_attn.loras.a"
    tensors = {f"{place}.lora_A": normal(4, 5), f"{place}.lora_B": normal(6, 2)}
    safe, pickled = (hub_folder(tmp_path / name, "gpt2", "a", LORA, tensors) for name in ("safe", "pickled"))
    (pickled / "adapter.safetensors").unlink()
    torch.save(
        {key: torch.from_numpy(value) for key, value in tensors.items()}, pickled / "pytorch_adapter.bin"
    )
    done = adapterpack.convert(pickled, tmp_path / "pack", to="pack")
    assert any("pytorch_adapter.bin is a pickle" in note for note in done.notes)
    wanted = converted(safe, tmp_path / "other").tensors
    assert all(np.array_equal(done.pack.tensors[name], value) for name, value in wanted.items())
    with pytest.raises(Unsupported, match="adapterpack convert"):
        adapterpack.inspect(pickled)


def test_a_pack_goes_to_adapterhub_where_its_settings_can_name_it(tmp_path: Path) -> None:
    """LoRA of some layers, with a rank and a scale that differ, and a bottleneck: read back they are the same
    changes, bit for bit where nothing was multiplied; a site that the settings cannot name is refused.
    """
    sizes = {
        "hidden_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 10,
        "vocab_size": 12,
    }
    base = BertModel(BertConfig(**sizes))
    base.save_pretrained(tmp_path / "base")
    model = adapterpack.adapt(base, adapterpack.Bottleneck.houlsby(reduction=5, bias=False), "a")
    pack = adapterpack.save(model, tmp_path / "bottleneck")
    adapterpack.convert(pack, tmp_path / "hub", to="adapterhub", base=tmp_path / "base")
    again = converted(tmp_path / "hub", tmp_path / "back", base=tmp_path / "base")
    back = {adapter.site.path: adapter.params for adapter in again.adapters()}
    assert set(back) == {adapter.site.path for adapter in pack.adapters()}
    for adapter in pack.adapters():
        assert all(
            np.array_equal(back[adapter.site.path][key], value) for key, value in adapter.params.items()
        )
        assert not back[adapter.site.path]["up_bias"].any()
    start = "base_model.model.encoder.layer"
    tensors = {
        f"{start}.{layer}.attention.self.{name}.lora_{leaf}.weight": normal(*shape)
        for layer in (0, 2)
        for name, rank in (("query", 2), ("value", 3))
        for leaf, shape in (("A", (rank, 12)), ("B", (12, rank)))
    }
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"value": 3},
        "target_modules": ["query", "value"],
    }
    source = folder(tmp_path / "lora", config, adapter_model=tensors)
    done = adapterpack.convert(source, tmp_path / "hub-lora", to="adapterhub", base=tmp_path / "base")
    assert json.loads((tmp_path / "hub-lora" / "adapter_config.json").read_text())["config"]["leave_out"] == [
        1
    ]
    assert len(done.notes) == 2
    for adapter in converted(
        tmp_path / "hub-lora", tmp_path / "back-lora", base=tmp_path / "base"
    ).adapters():
        A, B = (
            tensors[f"base_model.model.{adapter.site.path}.lora_{leaf}.weight"].astype(float) for leaf in "AB"
        )
        change = (
            adapter.config.scale
            * adapter.params["lora_B"].astype(float)
            @ adapter.params["lora_A"].astype(float)
        )
        np.testing.assert_allclose(change, 4 / len(A) * B @ A, rtol=0, atol=40 * ONE_ROUNDING)
    tensors |= {
        f"{start}.0.attention.output.dense.lora_{leaf}.weight": normal(*shape)
        for leaf, shape in (("A", (2, 12)), ("B", (12, 2)))
    }
    source = folder(
        tmp_path / "beside", {**config, "target_modules": ["query", "value", "dense"]}, adapter_model=tensors
    )
    with pytest.raises(Unsupported, match="no such layer"):
        adapterpack.convert(source, tmp_path / "no", to="adapterhub", base=tmp_path / "base")


def test_a_lora_of_an_older_adapterhub_has_the_alpha_that_it_was_trained_with(tmp_path: Path) -> None:
    """Its own library reads folders of versions before 1.1 so: they took no notice of alpha."""
    for version, scale in (("adapters.1.0.1", 1.0), ("adapters.1.1.0", 1.5), ("3.2.1", 1.5)):
        source = hub_folder(tmp_path / version, "bert", "a", LORA, PAIR)
        saved = json.loads((source / "adapter_config.json").read_text())
        (source / "adapter_config.json").write_text(json.dumps({**saved, "version": version}))
        [group] = converted(source, tmp_path / f"pack-{version}").manifest.groups
        assert group.scale == scale


def test_folders_of_others_are_looked_at_as_they_are(tmp_path: Path) -> None:
    """inspect and validate, without a base; a broken one is invalid; beside PEFT's tensors it is a folder of
    PEFT's.
    """
    hub = hub_folder(tmp_path / "hub", "bert", "a", LORA, PAIR)
    mlx = folder(tmp_path / "mlx", MLX, adapters=mlx_tensors())
    for source, form in ((hub, "adapterhub"), (mlx, "mlx")):
        found = adapterpack.inspect(source)
        assert (found["kind"], found["format"], found["sites"]) == ("adapter", form, 1)
        assert adapterpack.validate(source).state == "valid"
    (mlx / "adapters.safetensors").write_bytes(b"x")
    assert adapterpack.validate(mlx).state == "invalid"
    save_file(peft_tensors(), hub / "adapter_model.safetensors")
    (hub / "adapter_config.json").write_text(json.dumps(WRITTEN_BY["axolotl"]))
    assert adapterpack.load(hub).method.name == "lora"


Q = "bert.encoder.layer.0.attention.self.query.loras.a"
PAIR = {f"{Q}.lora_A": normal(2, 5), f"{Q}.lora_B": normal(5, 2)}
DOWN = {
    f"bert.encoder.layer.0.output.adapters.a.{name}": value
    for name, value in (
        ("adapter_down.0.weight", normal(3, 12)),
        ("adapter_down.0.bias", normal(3)),
        ("adapter_up.weight", normal(12, 3)),
        ("adapter_up.bias", normal(12)),
    )
}


@pytest.mark.parametrize(
    ("family", "config", "tensors", "said"),
    [
        ("bert", {**BOTTLENECK, "original_ln_before": True, "mh_adapter": False}, DOWN, "normalizes last"),
        ("bert", {**BOTTLENECK, "use_gating": True}, DOWN, "use_gating"),
        ("bert", {**BOTTLENECK, "new_option": 1}, DOWN, "new_option"),
        ("bert", {**BOTTLENECK, "reduction_factor": 5}, DOWN, "wrong shape"),
        ("bert", {**BOTTLENECK, "scaling": "learned"}, DOWN, "finite number"),
        ("bert", {**BOTTLENECK, "inv_adapter": "nice"}, DOWN, "inv_adapter"),
        ("t5", BOTTLENECK, DOWN, "not known here"),
        ("bert", LORA, {**PAIR, "bert.prompt_tunings.a.x": normal(1)}, "prompt_tunings"),
        ("bert", {**LORA, "use_dora": True}, PAIR, "use_dora"),
        ("bert", {**LORA, "r": 3}, PAIR, "rank"),
        ("bert", {"architecture": "prefix_tuning"}, PAIR, "prefix"),
    ],
)
def test_what_adapterhub_has_and_no_method_here_is_refused_by_name(
    tmp_path: Path, family: str, config: dict[str, Any], tensors: dict[str, np.ndarray], said: str
) -> None:
    source = hub_folder(tmp_path / "a", family, "a", config, tensors)
    with pytest.raises((Unsupported, FormatError), match=said):
        converted(source, tmp_path / "pack")


def test_a_head_of_adapterhub_is_a_module_trained_whole(tmp_path: Path) -> None:
    """Its layers have the names of the classifier of transformers, and its labels are the pack's; another
    head is refused.
    """
    source = hub_folder(tmp_path / "a", "bert", "a", LORA, PAIR)
    head = {
        "config": {
            "head_type": "classification",
            "layers": 2,
            "num_labels": 2,
            "activation_function": "tanh",
            "bias": True,
            "use_pooler": False,
            "label2id": {"no": 0, "yes": 1},
        },
        "name": "a",
        "model_type": "bert",
    }
    tensors = {
        "heads.a.1.weight": normal(12, 12),
        "heads.a.1.bias": normal(12),
        "heads.a.4.weight": normal(2, 12),
        "heads.a.4.bias": normal(2),
    }
    save_file(tensors, source / "model_head.safetensors")
    (source / "head_config.json").write_text(json.dumps(head))
    pack = converted(source, tmp_path / "pack")
    assert (pack.manifest.task.type, pack.manifest.task.labels) == ("text-classification", ("no", "yes"))
    assert np.array_equal(pack.full()["classifier"]["weight"], tensors["heads.a.4.weight"])
    assert np.array_equal(pack.full()["bert.pooler.dense"]["bias"], tensors["heads.a.1.bias"])
    head["config"]["layers"] = 3
    (source / "head_config.json").write_text(json.dumps(head))
    with pytest.raises(Unsupported, match="without the files of the head"):
        converted(source, tmp_path / "other")


ODD: tuple[Any, ...] = (None, True, -1, 2**63, 1e308, "x", ["full"], {"a": 1})
"""Values of other kinds than the settings have."""


def test_settings_of_another_kind_are_named(tmp_path: Path) -> None:
    """Every setting of every tool, with a value of each kind in its place: a pack or an error by name."""
    (tmp_path / "packs").mkdir()
    refused = 0
    for one in write_adapters(tmp_path / "adapters", tmp_path / "packs").values():
        value = json.loads(one.settings)
        for holder, key in list(places(value)):
            kept = holder[key]
            for odd in ODD:
                holder[key] = odd
                one.put(json.dumps(value).encode())
                try:
                    read(one.path)
                except AdapterpackError:
                    refused += 1
            holder[key] = kept
        one.put(one.settings)
    assert refused > 300


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """The holder and the key of everything in a JSON value."""
    for key in (
        list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    ):
        yield value, key
        yield from places(value[key])


# LyCORIS


LAYERS: dict[str, tuple[int, ...]] = dict.fromkeys(
    ("a.lora", "a.dora", "a.loha", "a.lokr", "a.glora", "a.ia3", "a.full"), (10, 6)
)
LAYERS |= {"c.locon": (6, 4, 3, 3), "c.tucker": (6, 4, 3, 3), "c.loha": (6, 4, 3, 3), "c.lokr": (6, 4, 3, 3)}


def lycoris(weights: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A file with a module of every form, and the weights that it stands for, by LyCORIS' formulas in
    float64.
    """
    tensors: dict[str, np.ndarray] = {}
    wanted: dict[str, np.ndarray] = {}

    def add(path: str, new: Any, **leaves: np.ndarray) -> None:
        shown = {leaf.replace("__", "."): value for leaf, value in leaves.items()}
        tensors.update({f"lora_te_{path.replace('.', '_')}.{leaf}": value for leaf, value in shown.items()})
        wide = {leaf: value.astype(float) for leaf, value in leaves.items()}
        wanted[path] = new(weights[path].astype(float), **wide)

    alpha, tucker = np.array(3.0, np.float32), "ijhw,io,jc->ochw"

    def decomposed(W: Any, lora_up__weight: Any, lora_down__weight: Any, dora_scale: Any, alpha: Any) -> Any:
        moved = W + 1.5 * lora_up__weight @ lora_down__weight
        return moved * dora_scale / np.linalg.norm(moved, axis=1, keepdims=True)

    add(
        "a.lora",
        lambda W, lora_up__weight, lora_down__weight, alpha: W + 1.5 * lora_up__weight @ lora_down__weight,
        lora_up__weight=normal(10, 2),
        lora_down__weight=normal(2, 6),
        alpha=alpha,
    )
    add(
        "a.dora",
        decomposed,
        lora_up__weight=normal(10, 2),
        lora_down__weight=normal(2, 6),
        alpha=alpha,
        dora_scale=normal(10, 1) + 4,
    )
    add(
        "a.loha",
        lambda W, hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b, alpha: (
            W + 1.5 * (hada_w1_a @ hada_w1_b) * (hada_w2_a @ hada_w2_b)
        ),
        hada_w1_a=normal(10, 2),
        hada_w1_b=normal(2, 6),
        hada_w2_a=normal(10, 2),
        hada_w2_b=normal(2, 6),
        alpha=alpha,
    )
    add(
        "a.lokr",
        lambda W, lokr_w1, lokr_w2_a, lokr_w2_b, alpha: W + 3.0 * np.kron(lokr_w1, lokr_w2_a @ lokr_w2_b),
        lokr_w1=normal(2, 2),
        lokr_w2_a=normal(5, 1),
        lokr_w2_b=normal(1, 3),
        alpha=alpha,
    )
    add(
        "a.glora",
        lambda W, a1__weight, a2__weight, b1__weight, b2__weight, alpha: (
            W + 1.5 * (W @ a1__weight @ a2__weight + b1__weight @ b2__weight)
        ),
        a1__weight=normal(6, 2),
        a2__weight=normal(2, 6),
        b1__weight=normal(10, 2),
        b2__weight=normal(2, 6),
        alpha=alpha,
    )
    add("a.ia3", lambda W, weight, on_input: W * (1 + weight), weight=normal(6), on_input=np.array(1))
    add("a.full", lambda W, diff: W + diff, diff=normal(10, 6))
    add(
        "c.locon",
        lambda W, lora_up__weight, lora_down__weight, alpha: (
            W
            + 1.5
            * np.einsum("or,richw->oichw", lora_up__weight[:, :, 0, 0], lora_down__weight[:, None])[:, 0]
        ),
        lora_up__weight=normal(6, 2, 1, 1),
        lora_down__weight=normal(2, 4, 3, 3),
        alpha=alpha,
    )
    add(
        "c.tucker",
        lambda W, lora_up__weight, lora_mid__weight, lora_down__weight, alpha: (
            W
            + 1.5
            * np.einsum(
                "or,rshw,sc->ochw",
                lora_up__weight[:, :, 0, 0],
                lora_mid__weight,
                lora_down__weight[:, :, 0, 0],
            )
        ),
        lora_up__weight=normal(6, 2, 1, 1),
        lora_mid__weight=normal(2, 2, 3, 3),
        lora_down__weight=normal(2, 4, 1, 1),
        alpha=alpha,
    )
    add(
        "c.loha",
        lambda W, hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b, hada_t1, hada_t2, alpha: (
            W
            + 1.5
            * np.einsum(tucker, hada_t1, hada_w1_a, hada_w1_b)
            * np.einsum(tucker, hada_t2, hada_w2_a, hada_w2_b)
        ),
        hada_w1_a=normal(2, 6),
        hada_w1_b=normal(2, 4),
        hada_w2_a=normal(2, 6),
        hada_w2_b=normal(2, 4),
        hada_t1=normal(2, 2, 3, 3),
        hada_t2=normal(2, 2, 3, 3),
        alpha=alpha,
    )
    add(
        "c.lokr",
        lambda W, lokr_w1, lokr_w2, alpha: (
            W + np.einsum("ab,cdhw->acbdhw", lokr_w1, lokr_w2).reshape(W.shape)
        ),
        # alpha means nothing where neither factor is split
        lokr_w1=normal(2, 2),
        lokr_w2=normal(3, 2, 3, 3),
        alpha=alpha,
    )
    return tensors, wanted


def test_every_form_of_lycoris_is_the_weight_that_it_stands_for(tmp_path: Path) -> None:
    """One file with all of them, merged into the base: LyCORIS' formulas in float64, within the rounding of
    factors and weights.
    """
    weights = {path: normal(*shape) for path, shape in LAYERS.items()}
    tensors, wanted = lycoris(weights)
    norm = {"n.weight": normal(5), "n.bias": normal(5)}
    tensors |= {"lora_te_n.w_norm": normal(5), "lora_te_n.b_norm": normal(5)}
    base = tmp_path / "base"
    base.mkdir()
    save_file(
        {**{f"{path}.weight": value for path, value in weights.items()}, **norm}, base / "model.safetensors"
    )
    (base / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))
    save_file(tensors, tmp_path / "a.safetensors")
    pack = converted(tmp_path / "a.safetensors", tmp_path / "pack", base=base)
    assert {method.name for method in pack.methods} == {"lora", "dora", "loha", "lokr", "ia3"}
    adapterpack.merge(base, [tmp_path / "pack"], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for path, new in wanted.items():
        np.testing.assert_allclose(
            merged[f"{path}.weight"], new, rtol=0, atol=8 * ONE_ROUNDING * np.abs(new).max(), err_msg=path
        )
        assert np.abs(new - weights[path]).max() > 0.1
    for leaf, name in (("weight", "w_norm"), ("bias", "b_norm")):
        assert np.array_equal(merged[f"n.{leaf}"], norm[f"n.{leaf}"] + tensors[f"lora_te_n.{name}"])


def test_what_is_no_lora_goes_back_to_kohya_as_it_came(tmp_path: Path) -> None:
    """DoRA, LoKr and (IA)^3 of inputs beside a LoRA: the same tensors, the factors of (IA)^3 but for the
    rounding of 1 + w.
    """
    weights = {path: normal(*shape) for path, shape in LAYERS.items()}
    published = {
        key.replace("lora_te_", "lora_te_text_model_", 1): value for key, value in lycoris(weights)[0].items()
    }
    tensors = {key: value for key, value in published.items() if re.search(r"_a_(lora|dora|lokr|ia3)\.", key)}
    base = tmp_path / "base"
    base.mkdir()
    save_file({f"{path}.weight": value for path, value in weights.items()}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))
    save_file(tensors, tmp_path / "a.safetensors")
    converted(tmp_path / "a.safetensors", tmp_path / "pack", base=base)
    adapterpack.convert(tmp_path / "pack", tmp_path / "b.safetensors", to="kohya")
    found = load_file(tmp_path / "b.safetensors")
    assert found.keys() == tensors.keys()
    for key, value in tensors.items():
        assert found[key].shape == value.shape
        assert np.abs(found[key] - value).max() <= (4 * ONE_ROUNDING if key.endswith("ia3.weight") else 0), (
            key
        )


def test_a_file_of_differences_alone_is_a_valid_pack(tmp_path: Path) -> None:
    """It has no adapter, so nothing that PEFT would load; it is loaded and merged like any other."""
    base = tmp_path / "base"
    base.mkdir()
    weight, change = normal(5, 3), normal(5, 3)
    save_file({"q.weight": weight}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))
    save_file({"lora_te_q.diff": change}, tmp_path / "a.safetensors")
    converted(tmp_path / "a.safetensors", tmp_path / "pack", base=base)
    assert not (tmp_path / "pack" / "adapter_config.json").exists()
    adapterpack.merge(base, [adapterpack.load(tmp_path / "pack")], tmp_path / "merged")
    assert np.array_equal(load_file(tmp_path / "merged" / "model.safetensors")["q.weight"], weight + change)


@pytest.mark.parametrize(
    ("leaves", "error", "said"),
    [
        ({"lokr_w1": normal(5, 3), "lokr_w2": normal(2, 2)}, Unsupported, "unbalanced"),
        ({"lokr_w1": normal(2, 2), "lokr_w2": normal(3, 3)}, BaseMismatch, "another shape"),
        ({"weight": normal(10), "on_input": np.array(0)}, Unsupported, "without the bias"),
        ({"diff": normal(10, 5)}, BaseMismatch, "another shape"),
        ({"diff": normal(10, 6) * np.float32(np.nan)}, NonFinite, "NaN"),
        ({"hada_w1_a": normal(10, 2)}, FormatError, "pair up"),
        ({"weight": normal(10), "on_input": np.array(7)}, FormatError, "0 or 1"),
    ],
)
def test_what_lycoris_has_and_no_method_here_is_refused_by_name(
    tmp_path: Path, leaves: dict[str, np.ndarray], error: type[AdapterpackError], said: str
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file({"q.weight": normal(10, 6), "q.bias": normal(10)}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))
    save_file({f"lora_te_q.{leaf}": value for leaf, value in leaves.items()}, tmp_path / "a.safetensors")
    with pytest.raises(error, match=said):
        converted(tmp_path / "a.safetensors", tmp_path / "pack", base=base)


# PEFT's folders as other tools write them


PEFT = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "inference_mode": True,
    "bias": "none",
}
WRITTEN_BY = {
    "unsloth": {
        **PEFT,
        "auto_mapping": {
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama",
            "unsloth_fixed": True,
        },
        "base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit",
        "target_modules": "(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp).*?\\.(?:q_proj|k_proj))|(?:\\bmodel\\.layers"
        "\\.[\\d]{1,}\\.(?:self_attn|mlp)\\.(?:(?:q_proj|k_proj)))",
        "lora_bias": False,
        "use_rslora": False,
        "loftq_config": {},
        "eva_config": None,
        "corda_config": None,
        "qalora_group_size": 16,
        "target_parameters": None,
        "unsloth_fused_expert_lora": {
            "lora_A_layout": "grouped_by_expert",
            "parameters": {"gate_up_proj": {"lora_B_layout": "rank_major", "num_experts": 4}},
        },
        "lora_B_layout": "rank_major",
    },
    "mergekit": {
        "base_model_name_or_path": "org/base",
        "peft_type": "LORA",
        "use_rslora": False,
        "target_modules": ["q_proj", "k_proj"],
        "modules_to_save": [],
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 2,
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
    },
    "axolotl": {
        **PEFT,
        "fan_in_fan_out": None,
        "target_modules": ["k_proj", "q_proj"],
        "modules_to_save": None,
        "layers_to_transform": None,
        "megatron_config": None,
        "init_lora_weights": True,
        "layer_replication": None,
        "peft_version": "0.19.1",
    },
    "torchtune": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "k_proj"],
        "peft_type": "LORA",
        "base_model_name_or_path": "a/b",
    },
}


def peft_tensors(**more: np.ndarray) -> dict[str, np.ndarray]:
    start = "base_model.model.model.layers.0.self_attn"
    return {
        **{
            f"{start}.{name}.lora_{leaf}.weight": normal(*shape)
            for name in ("q_proj", "k_proj")
            for leaf, shape in (("A", (2, 7)), ("B", (5, 2)))
        },
        **{f"{start}.{name}": value for name, value in more.items()},
    }


@pytest.mark.parametrize("tool", WRITTEN_BY)
def test_a_folder_of_peft_is_read_whoever_wrote_it(tmp_path: Path, tool: str) -> None:
    """The sites, the scale that PEFT would give them, and nothing said of options; ``load`` reads it
    alike.
    """
    tensors = peft_tensors()
    source = folder(tmp_path / "a", WRITTEN_BY[tool], adapter_model=tensors)
    done = adapterpack.convert(source, tmp_path / "pack", to="pack")
    scale = WRITTEN_BY[tool]["lora_alpha"] / 2
    assert {group.path: group.scale for group in done.pack.manifest.groups} == {
        f"model.layers.0.self_attn.{name}": scale for name in ("k_proj", "q_proj")
    }
    assert done.notes == ()
    assert adapterpack.load(source).tensors.keys() == done.pack.tensors.keys()


def test_what_tinkers_service_calls_the_output_layer(tmp_path: Path) -> None:
    tensors = {f"base_model.model.model.unembed_tokens.lora_{s}.weight": normal(2, 2) for s in "AB"}
    source = folder(tmp_path / "a", {**PEFT, "target_modules": "all-linear"}, adapter_model=tensors)
    assert [group.path for group in adapterpack.load(source).manifest.groups] == ["lm_head"]


def test_experts_of_tinkers_service_are_split(tmp_path: Path) -> None:
    """Each expert gets its own product of the factors, of which one may be shared; a merge adds it to its matrix."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {
        "vocab_size": 16,
        "moe_intermediate_size": 6,
        "num_experts": 3,
        "intermediate_size": 6,
        "head_dim": 4,
    }
    base, path = tmp_path / "base", "base_model.model.model.layers.0.mlp.experts"
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).save_pretrained(base)
    tensors = {
        f"{path}.w1.lora_A.weight": normal(1, 2, 8),
        f"{path}.w1.lora_B.weight": normal(3, 6, 2),
        f"{path}.w2.lora_A.weight": normal(3, 2, 6),
        f"{path}.w2.lora_B.weight": normal(1, 8, 2),
        f"{path}.w3.lora_A.weight": normal(3, 2, 0),
        f"{path}.w3.lora_B.weight": normal(3, 0, 2),
    }
    config = {**PEFT, "r": 2, "lora_alpha": 6, "target_modules": "all-linear"}
    source = folder(tmp_path / "a", config, adapter_model=tensors)
    with pytest.raises(Unsupported, match=r"Tinker.*adapterpack convert"):
        adapterpack.load(source)
    done = adapterpack.convert(source, tmp_path / "pack", base=base)
    assert any("Tinker" in note for note in done.notes)
    adapterpack.merge(base, [tmp_path / "pack"], tmp_path / "merged")
    before, after = (load_file(one / "model.safetensors") for one in (base, tmp_path / "merged"))
    for matrix, name in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        down, up = (tensors[f"{path}.{matrix}.lora_{side}.weight"] for side in "AB")
        for expert in range(3):
            key = f"model.layers.0.mlp.experts.{expert}.{name}.weight"
            change = 0 if matrix == "w3" else 3 * up[expert % len(up)] @ down[expert % len(down)]
            np.testing.assert_allclose(after[key], before[key] + change, atol=1e-5)
    odd = {**tensors, f"{path}.w1.lora_A.weight": normal(2, 2, 8)}
    with pytest.raises(FormatError, match="do not fit each other"):
        adapterpack.convert(folder(tmp_path / "odd", config, adapter_model=odd), tmp_path / "none", to="pack")


def test_what_would_be_read_otherwise_than_it_was_meant_is_refused(tmp_path: Path) -> None:
    """Torchtune's DoRA, whose config says LoRA."""
    source = folder(
        tmp_path / "dora",
        WRITTEN_BY["torchtune"],
        adapter_model=peft_tensors(**{"q_proj.lora_magnitude_vector": normal(5)}),
    )
    with pytest.raises(Unsupported, match="torchtune"):
        adapterpack.load(source)


def test_a_value_head_is_left_where_it_is_and_said(tmp_path: Path) -> None:
    """TRL writes it beside PEFT's folder as a pickle, which is not opened."""
    source = folder(
        tmp_path / "a", {**PEFT, "target_modules": ["q_proj", "k_proj"]}, adapter_model=peft_tensors()
    )
    (source / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    [note] = adapterpack.convert(source, tmp_path / "pack", to="pack").notes
    assert "pytorch_model.bin" in note
    assert "value head" in note


# What is never read, and the page


def test_what_is_known_and_never_read_says_what_to_do(tmp_path: Path) -> None:
    """Archives and pickles of NeMo, torchtune and others, a distributed checkpoint."""
    tar = bytearray(1024)
    tar[257:262] = b"ustar"
    (tmp_path / "a.nemo").write_bytes(tar)
    (tmp_path / "adapter_0.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "b.pt").write_bytes(b"PK\x03\x04")
    for name in ("context", "weights"):
        (tmp_path / "nemo2" / name).mkdir(parents=True)
    for name, said in (
        ("a.nemo", "hf-peft"),
        ("adapter_0.pt", "adapterpack convert FOLDER --base BASE"),
        ("b.pt", "with the tool that wrote it"),
        ("nemo2", "hf-peft"),
    ):
        with pytest.raises(Unsupported, match=re.escape(said)):
            converted(tmp_path / name, tmp_path / "pack")
    with pytest.raises(Unsupported, match="convert SRC --to pack"):
        adapterpack.load(folder(tmp_path / "mlx", MLX, adapters=mlx_tensors()))


def test_the_page_has_every_format_and_whether_it_is_written() -> None:
    """The first table of the page is the registry, and the second what is refused."""
    page = DOCS.read_text("utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]* \| yes \| (yes|-) \|", page, re.MULTILINE))
    assert rows == {name: "yes" if form.write is not None else "-" for name, form in formats().items()}
    assert set(re.findall(r"^\| `(\w+)` \| [^|]* \|[^|]*\|$", page, re.MULTILINE)) == {
        kind.name for kind in REFUSED
    }
