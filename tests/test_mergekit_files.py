"""Files of mergekit: real ones give a pack, a checkpoint or a refusal with its reason; and the numbers are those
of the formulas in float64, at every tensor with its own weights. ``interop/mergekit_merges.py`` compares with
mergekit itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

import adapterpack
from adapterpack import LoRA, compose, load
from adapterpack.adapter_methods import Site, get
from adapterpack.base.checkpoint import Checkpoint
from adapterpack.cli.commands.compose import command
from adapterpack.composing.mergekit_file import read as read_file
from adapterpack.composing.recipe import recipe_of
from adapterpack.errors import ConfigError
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import build

pytestmark = pytest.mark.fast

PUBLISHED = yaml.safe_load(Path(__file__).with_name("mergekit_files.yaml").read_text())
LAYERS, WIDTH, INNER = 3, 10, 14
SHAPES = {
    "model.embed_tokens.weight": (12, WIDTH),
    **{
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(LAYERS)
        for name, shape in {
            "self_attn.q_proj": (WIDTH, WIDTH),
            "mlp.up_proj": (INNER, WIDTH),
            "input_layernorm": (WIDTH,),
        }.items()
    },
}
ADAPTED = [name for name in SHAPES if "_proj" in name]
ROUNDED = 2e-6
"""Some roundings of float32 of numbers of about 1."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three models tuned from it, three adapters of it, and the base with each adapter merged."""
    made, rng = tmp_path_factory.mktemp("mergekit"), np.random.default_rng(0)
    base = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    config = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    for name, scale in {"base": 0.0, "a": 0.5, "b": 0.5, "c": 0.5}.items():
        (made / name).mkdir()
        tuned = {key: value + scale * rng.normal(size=value.shape) for key, value in base.items()}
        tensors = {key: value.astype(np.float32) for key, value in tuned.items()}
        tensors["model.positions"] = np.arange(4)
        save_file(tensors, made / name / "model.safetensors")
        (made / name / "config.json").write_text(config)
    of = Checkpoint(made / "base")
    stated = m.Base("base", structure=of.structure, probe=of.probe)
    for name in "abc":
        adapters = {}
        for weight in ADAPTED:
            out, into = SHAPES[weight]
            site = Site(weight.removesuffix(".weight"), into, out)
            values = {"lora_A": rng.normal(size=(2, into)), "lora_B": rng.normal(size=(out, 2))}
            adapters[site] = LoRA(r=2, alpha=2), {k: v.astype(np.float32) for k, v in values.items()}
        task = m.PackTask("text-generation")
        build(f"lora-{name}", get("lora"), adapters, task=task, base=stated).write(made / f"lora-{name}")
        adapterpack.merge(made / "base", [made / f"lora-{name}"], made / f"merged-{name}", durable=False)
    return made


def ran(folder: Path, file: Any, out: Path, *options: str) -> Result:
    """The command on a file, in the folder of the models."""
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(file))
    runner = CliRunner()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return runner.invoke(command, [str(path), "-o", str(out), *options])


def merged(folder: Path, file: Any, out: Path, *options: str) -> dict[str, np.ndarray]:
    """The tensors of what a file gives; a pack is merged into the base."""
    result = ran(folder, file, out, *options)
    assert result.exit_code == 0, (result.output, result.exception)
    if (out / "adapterpack.json").is_file():
        adapterpack.merge(folder / "base", [out], out := out.with_name(f"{out.name}-merged"), durable=False)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("source", PUBLISHED)
def test_published_files(folder: Path, tmp_path: Path, source: str) -> None:
    """Each gives what is written beside it, in the dtype that it names; what is left out is said."""
    case = PUBLISHED[source]
    file, out = case["file"], tmp_path / "out"
    result = ran(folder, file, out)
    if case["gives"] not in {"models", "pack"}:
        said = str(result.exception) if result.exception is not None else result.output
        assert result.exit_code and case["gives"] in said and not out.exists(), said
        return
    assert result.exit_code == 0, (result.output, result.exception)
    notes = " ".join(read_file(out.with_suffix(".yaml")).notes)
    assert ("left out" in notes) == bool(
        {"tokenizer", "tokenizer_source", "chat_template", "out_path"} & file.keys()
        or "int8_mask" in file.get("parameters", {})
        or source.endswith("does not take")
    )
    if case["gives"] == "pack":
        assert load(out).manifest.lineage.params["by_site"]
        return
    expected = {"float16": np.float16, "float32": np.float32}.get(file.get("out_dtype", file["dtype"]))
    tensors, base = load_file(out / "model.safetensors"), load_file(folder / "base" / "model.safetensors")
    assert tensors.keys() == base.keys() and (tensors["model.positions"] == base["model.positions"]).all()
    assert expected is None or {tensors[name].dtype for name in SHAPES} == {np.dtype(expected)}
    assert json.loads((out / "config.json").read_text())["dtype"] == (file.get("out_dtype") or file["dtype"])


def test_values_over_layers_and_by_filter(folder: Path, tmp_path: Path) -> None:
    """TIES in float64 at tensors of the first, the middle and the last layer, with the density and the weight
    that the file gives each model there.
    """
    file = PUBLISHED["arcee-ai/mergekit, examples/mega.yml, second document"]["file"]
    found = merged(folder, {**file, "dtype": "float32"}, tmp_path / "out")
    base, a, b = (load_file(folder / name / "model.safetensors") for name in ("base", "a", "b"))
    for layer, density in enumerate((1.0, 0.7, 0.1)):
        for module, weight in {"self_attn.q_proj": 0.0, "mlp.up_proj": 0.5}.items():
            name = f"model.layers.{layer}.{module}.weight"
            votes = np.stack(
                [
                    share * trimmed((tuned[name] - base[name]).astype(np.float64), kept)
                    for tuned, kept, share in ((a, density, 1.0), (b, 0.33, weight))
                ]
            )
            agree = np.sign(votes) == np.where(votes.sum(axis=0) >= 0, 1, -1)
            total = (agree * np.array([1.0, weight])[:, None, None]).sum(axis=0)
            wanted = base[name] + (votes * agree).sum(axis=0) / np.where(total == 0, 1, total)
            np.testing.assert_allclose(found[name], wanted, atol=ROUNDED)


def trimmed(change: np.ndarray, density: float) -> np.ndarray:
    """The largest entries, as many as the density counts, rounded down."""
    count = max(1, int(density * change.size))
    return np.where(np.abs(change) >= np.sort(np.abs(change), axis=None)[-count], change, 0)


def arc(t: float, one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Spherical interpolation of two tensors as vectors."""
    angle = np.arccos(np.sum(one * two) / np.linalg.norm(one) / np.linalg.norm(two))
    return (np.sin((1 - t) * angle) * one + np.sin(t * angle) * two) / np.sin(angle)


@pytest.mark.parametrize(
    ("extra", "formula"),
    [
        ({"merge_method": "linear"}, lambda w, a, b: (2 * a + b) / 3),
        ({"merge_method": "linear", "parameters": {"normalize": False}}, lambda w, a, b: 2 * a + b),
        (
            {"merge_method": "task_arithmetic", "base_model": "base", "parameters": {"lambda": 0.5}},
            lambda w, a, b: w + 0.5 * (2 * (a - w) + b - w),
        ),
        ({"merge_method": "nuslerp"}, lambda w, a, b: arc(1 / 3, a, b)),
        ({"merge_method": "nuslerp", "base_model": "base"}, lambda w, a, b: w + arc(1 / 3, a - w, b - w)),
        (
            {"merge_method": "nuslerp", "parameters": {"nuslerp_flatten": False}},
            lambda w, a, b: np.stack([arc(1 / 3, *rows) for rows in zip(a, b, strict=True)]),
        ),
        (
            {
                "merge_method": "nuslerp",
                "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
            },
            lambda w, a, b: np.stack([arc(1 / 3, *rows) for rows in zip(a.T, b.T, strict=True)], 1),
        ),
    ],
)
def test_full_models_by_their_formulas(
    folder: Path, tmp_path: Path, extra: dict[str, Any], formula: Callable[..., np.ndarray]
) -> None:
    """Weights 2 and 1."""
    models = [{"model": "a", "parameters": {"weight": 2}}, {"model": "b", "parameters": {"weight": 1}}]
    found = merged(folder, {"models": models, **extra}, tmp_path / "out")
    given = [load_file(folder / name / "model.safetensors") for name in ("base", "a", "b")]
    for name, shape in SHAPES.items():
        tensors = [np.atleast_2d(each[name].astype(np.float64)) for each in given]
        if name.endswith("layernorm.weight") and "nuslerp_row_wise" in extra.get("parameters", {}):
            wanted = arc(1 / 3, *tensors[1:])  # a vector is one line, whichever lines are asked for
        else:
            wanted = formula(*tensors)
        np.testing.assert_allclose(found[name], wanted.reshape(shape), atol=3 * ROUNDED)


@pytest.mark.parametrize(
    ("method", "own", "shared"),
    [
        ("linear", {"weight": [0.3, 0.7]}, {}),
        (
            "task_arithmetic",
            {"weight": [{"filter": "mlp", "value": [0, 1]}, {"value": -0.5}]},
            {"lambda": 0.3},
        ),
        ("ties", {"weight": [0.2, 0.5], "density": [1, 0.5]}, {}),
        ("breadcrumbs", {"weight": 0.4, "density": 0.7, "gamma": 0.1}, {"lambda": 0.5}),
        ("sce", {}, {"select_topk": 0.5}),
        ("nuslerp", {"weight": [0.2, 0.5]}, {"nuslerp_flatten": False}),
        ("multislerp", {"weight": [0.2, 0.5]}, {}),
        ("model_stock", {}, {"filter_wise": True}),
    ],
)
def test_adapters_give_what_their_merged_models_give(
    folder: Path, tmp_path: Path, method: str, own: dict[str, Any], shared: dict[str, Any]
) -> None:
    """A pack of full rank, merged, is the checkpoint that the same file gives of the merged models."""
    first, second = {"parameters": own}, {"parameters": {**own, "weight": 0.6} if "weight" in own else own}
    file = {"merge_method": method, "base_model": "base", "parameters": shared}
    if method == "linear":
        del file["base_model"]
    cut = ["--rank", str(WIDTH)] if method in {"ties", "breadcrumbs", "sce"} else []
    pack = [{"model": "base+lora-a", **first}, {"model": "base+lora-b", **second}]
    full = [{"model": "merged-a", **first}, {"model": "merged-b", **second}]
    found = merged(folder, {**file, "models": pack}, tmp_path / "pack", *cut)
    wanted = merged(folder, {**file, "models": full}, tmp_path / "full")
    base = load_file(folder / "base" / "model.safetensors")
    for name in ADAPTED:
        largest = np.abs(wanted[name] - base[name]).max()
        # the changes of the merged models are rounded to float32 beside the base
        np.testing.assert_allclose(found[name], wanted[name], atol=ROUNDED + 1e-5 * largest)
        assert largest > 0.01


def test_values_of_sites_are_in_the_recipe(folder: Path, tmp_path: Path) -> None:
    """The pack is made again from its recipe; a value for no site, or of the wrong kind, is refused."""
    packs = [load(folder / f"lora-{name}") for name in "ab"]
    site = ADAPTED[0].removesuffix(".weight")
    values = {site: {"weight": [1.0, 0.0], "density": [0.5, 1.0]}}
    pack = compose(packs, rule="ties", params={"scope": "tensor"}, rank=4, by_site=values, name="x")
    recipe_of(pack).write(tmp_path / "recipe.json")
    assert compose(packs[::-1], recipe=tmp_path / "recipe.json", name="x").id == pack.id
    alone = compose(packs[:1], rule="ties", params={"scope": "tensor", "density": 0.5}, rank=4, name="x")
    ours, theirs = (next(each for each in one.adapters() if each.site.path == site) for one in (pack, alone))
    for name in ("lora_A", "lora_B"):
        np.testing.assert_array_equal(ours.wide[name], theirs.wide[name])
    for wrong, words in (
        ({"nowhere": {"weight": [1.0, 1.0]}}, "values of packs"),
        ({site: {"lam": [1.0, 1.0]}}, "values of packs"),
        ({site: {"weight": [1.0]}}, "values of packs"),
        ({site: {"density": [2.0, 1.0]}}, "cannot have this value"),
    ):
        with pytest.raises(ConfigError, match=words):
            compose(packs, rule="ties", params={"scope": "tensor"}, rank=4, by_site=wrong)
    with pytest.raises(ConfigError, match="all sites together"):
        compose(packs, rule="ties", rank=4, by_site=values)
