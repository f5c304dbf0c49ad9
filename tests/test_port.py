"""Packs carried to the next version of their base: against dense float64 formulas where the truth is known, on
real models, and refused where the weights are others.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from shipped_schemas import fits
from transformers import AutoModelForCausalLM

import adapterpack
from adapterpack import LoRA
from adapterpack.adapter_methods import Site, get
from adapterpack.base import Checkpoint
from adapterpack.cli.main import main
from adapterpack.composing.as_factors import represent
from adapterpack.converting.base import BaseModel
from adapterpack.errors import AdapterpackError, BaseMismatch, OutputExists, Unsupported
from adapterpack.io import safetensors
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import Pack, build
from adapterpack.porting import pipeline
from adapterpack.porting.units import closest

pytestmark = pytest.mark.fast
Arrays = Mapping[str, np.ndarray]
WIDTH, HIDDEN, LAYERS = 33, 47, 4
SHAPES = {"q_proj": (WIDTH, WIDTH), "up_proj": (HIDDEN, WIDTH), "down_proj": (WIDTH, HIDDEN)}


def weights(seed: int = 0, layers: int = LAYERS) -> dict[str, np.ndarray]:
    """Odd widths, one bias."""
    rng = np.random.default_rng(seed)
    found = {
        f"model.layers.{i}.{name}.weight": rng.standard_normal(shape).astype(np.float32)
        for i in range(layers)
        for name, shape in SHAPES.items()
    }
    return found | {"model.layers.0.q_proj.bias": rng.standard_normal(WIDTH).astype(np.float32)}


def further(tensors: Arrays, part: float = 0.01) -> dict[str, np.ndarray]:
    """Every weight moved by a part of its norm."""
    rng = np.random.default_rng(9)
    return {
        name: value + (part * np.std(value) * rng.standard_normal(value.shape)).astype(np.float32)
        for name, value in tensors.items()
    }


def in_layers(tensors: Arrays, sources: list[int]) -> dict[str, np.ndarray]:
    """A base whose layers are these of the old one."""
    return {
        f"model.layers.{new}.{name.split('.', 3)[3]}": value
        for new, old in enumerate(sources)
        for name, value in tensors.items()
        if name.startswith(f"model.layers.{old}.")
    }


def saved(folder: Path, tensors: Arrays, **config: Any) -> Path:
    folder.mkdir()
    safetensors.write(folder / "model.safetensors", dict(tensors))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return saved(tmp_path / "old", weights())


@pytest.fixture
def pack(old: Path) -> Pack:
    rng = np.random.default_rng(1)
    adapters = {
        Site(f"model.layers.{i}.{name}", columns, rows, bias=(i, name) == (0, "q_proj")): (
            LoRA(r=3, alpha=6.0),
            {
                "lora_A": rng.standard_normal((3, columns)).astype(np.float32),
                "lora_B": rng.standard_normal((rows, 3)).astype(np.float32),
            },
        )
        for i in range(LAYERS)
        for name, (rows, columns) in SHAPES.items()
    }
    base = BaseModel(Checkpoint(old)).identity()
    return build("tickets", get("lora"), adapters, task=m.PackTask("other"), base=base)


def dense(pack: Pack) -> dict[str, np.ndarray]:
    return {one.site.path: represent(one).factors.dense().astype(np.float64) for one in pack.adapters()}


def test_a_base_that_was_trained_further_gets_the_change_as_it_is(
    pack: Pack, old: Path, tmp_path: Path
) -> None:
    """Bit by bit, and the distance is the relative norm of what training did; with a rank the change is the best
    of that rank.
    """
    new = saved(tmp_path / "new", further(weights()))
    ported = adapterpack.port(pack, old, new, out=tmp_path / "out")
    said, before = ported.manifest.lineage.params, dense(pack)
    assert said["verdict"] == "carried"
    assert (ported.manifest.lineage.parents[0].digest, ported.name) == (pack.id, "out")
    for path, change in dense(adapterpack.load(tmp_path / "out")).items():
        np.testing.assert_array_equal(change, before[path])
        old_weight, new_weight = (
            Checkpoint(base).read(f"{path}.weight").astype(np.float64) for base in (old, new)
        )
        distance = np.linalg.norm(new_weight - old_weight) / np.linalg.norm(new_weight)
        assert said["sites"][path]["distance"] == pytest.approx(distance, rel=1e-5)
        assert said["sites"][path]["share"] == pytest.approx(1)
    adapterpack.load(tmp_path / "out").require_base(Checkpoint(new))
    for path, change in dense(adapterpack.port(pack, old, new, rank=1)).items():
        u, s, vt = np.linalg.svd(before[path])
        np.testing.assert_allclose(change, s[0] * np.outer(u[:, 0], vt[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kept", [HIDDEN, 31], ids=["reordered", "removed"])
def test_units_that_moved_take_their_changes_along(pack: Pack, old: Path, tmp_path: Path, kept: int) -> None:
    """The change is P D Q of float64, and the share that is left is its norm's."""
    tensors, order = further(weights()), np.random.default_rng(2).permutation(HIDDEN)[:kept]
    for i in range(LAYERS):
        for name, axis in (("up_proj", 0), ("down_proj", 1)):
            tensors[f"model.layers.{i}.{name}.weight"] = tensors[f"model.layers.{i}.{name}.weight"].take(
                order, axis
            )
    ported = adapterpack.port(pack, old, saved(tmp_path / "new", tensors))
    said, before = ported.manifest.lineage.params, dense(pack)
    assert said["verdict"] == "carried"
    for path, change in dense(ported).items():
        axes = {"up_proj": 0, "down_proj": 1}
        axis = axes.get(path.rpartition(".")[2])
        expected = before[path] if axis is None else before[path].take(order, axis)
        np.testing.assert_allclose(change, expected, rtol=1e-6, atol=1e-6)
        share = np.linalg.norm(expected) / np.linalg.norm(before[path])
        assert said["sites"][path]["share"] == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("sources", [[0, 2, 3], [0, 1, 2, 1, 2, 3]], ids=["removed", "repeated"])
def test_layers_are_found_by_their_weights(pack: Pack, old: Path, tmp_path: Path, sources: list[int]) -> None:
    """A layer that is gone is listed, and the verdict is doubtful; one that was repeated has the change twice."""
    new = saved(tmp_path / "new", in_layers(further(weights()), sources))
    ported = adapterpack.port(pack, old, new)
    said, before = ported.manifest.lineage.params, dense(pack)
    found = dense(ported)
    assert len(found) == len(sources) * len(SHAPES)
    for path, change in found.items():
        head, number, name = path.rsplit(".", 2)
        source = f"{head}.{sources[int(number)]}.{name}"
        assert said["sites"][path]["source"] == source
        np.testing.assert_array_equal(change, before[source])
    gone = [f"model.layers.{i}.{name}" for i in range(LAYERS) if i not in sources for name in sorted(SHAPES)]
    assert said["missing"] == gone
    assert said["verdict"] == ("doubtful" if gone else "carried")


def test_what_moved_too_far_is_left_out(pack: Pack, old: Path, tmp_path: Path) -> None:
    """A weight beyond the first bound makes the whole doubtful; one beyond the last is refused, by name."""
    tensors = weights()
    near, far = "model.layers.1.q_proj", "model.layers.2.up_proj"
    tensors |= further({f"{near}.weight": tensors[f"{near}.weight"]}, 0.1)
    tensors[f"{far}.weight"] = weights(seed=5)[f"{far}.weight"]
    ported = adapterpack.port(pack, old, saved(tmp_path / "new", tensors))
    said = ported.manifest.lineage.params
    assert (said["verdict"], said["missing"]) == ("doubtful", [far])
    assert {path for path, site in said["sites"].items() if site["verdict"] == "doubtful"} == {near}
    assert far not in dense(ported)


@pytest.mark.parametrize(
    ("tensors", "config", "error", "said"),
    [
        (weights(seed=7), {}, BaseMismatch, "does not continue the old one"),
        (
            {name.replace("proj", "other"): value for name, value in weights().items()},
            {},
            BaseMismatch,
            "0 sites",
        ),
        (further(weights()), {"model_type": "qwen2"}, Unsupported, "different architectures"),
        (further(weights()), {"quantization_config": {"quant_method": "awq"}}, Unsupported, "quantized"),
    ],
    ids=["trained apart", "other names", "another architecture", "quantized"],
)
def test_what_no_method_can_do_is_refused(
    pack: Pack,
    old: Path,
    tmp_path: Path,
    tensors: Arrays,
    config: dict[str, Any],
    error: type[AdapterpackError],
    said: str,
) -> None:
    """In one sentence, and nothing is written."""
    new = saved(tmp_path / "new", tensors, **config)
    with pytest.raises(error, match=said):
        adapterpack.port(pack, old, new, out=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new"}


def test_limits_and_interrupts_leave_nothing(
    pack: Pack, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wrong base, a folder that is taken, a weight above the limit, and a user who stops it."""
    new = saved(tmp_path / "new", further(weights()))
    with pytest.raises(BaseMismatch):
        adapterpack.port(pack, new, old, out=tmp_path / "out")
    with pytest.raises(OutputExists):
        adapterpack.port(pack, old, new, out=new)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapterpack.port(pack, old, new, out=tmp_path / "out", progress=stop)
    monkeypatch.setattr(pipeline, "_MOST", 4 * WIDTH * WIDTH)
    with pytest.raises(Unsupported, match="too large"):
        adapterpack.port(pack, old, new, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_of_other_widths_have_nothing_in_common() -> None:
    """Where neither side has its width, no unit is matched, and the distance is 1."""
    distance, units = closest(np.ones((3, 5)), np.ones((2, 7)), 0.1)
    assert (distance, units.rows.tolist(), units.columns.max()) == (1.0, [-1, -1], -1)


def trained_further(base: Path, folder: Path) -> Path:
    """A copy of a base whose weights have moved a little."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    file = safetensors.SafetensorsFile(base / "model.safetensors")
    moved = further({name: np.array(file.read(name)) for name in file.tensors})
    safetensors.write(folder / "model.safetensors", moved)
    return folder


@torch.no_grad()
def adapted(base: Path, folder: Path, **fields: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    adapterpack.adapt(model, LoRA(r=2, targets="all-linear", **fields), "t")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    adapterpack.save(model, folder, base=base)
    return folder


@torch.no_grad()
def test_a_reordered_model_answers_as_before(tiny_llama: Path, tmp_path: Path) -> None:
    """The hidden units of a real model in another order are the same function; with the ported pack it is the
    same one as before with the pack, and the canary holds on it.
    """
    pack, new = adapted(tiny_llama, tmp_path / "pack"), tmp_path / "new"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for layer in model.model.layers:
        order = torch.randperm(model.config.intermediate_size, generator=torch.Generator().manual_seed(3))
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
            part.weight.data = part.weight.data[order]
        layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, order]
    model.save_pretrained(new)
    ported = adapterpack.port(pack, tiny_llama, new, out=tmp_path / "out")
    assert ported.manifest.lineage.params["verdict"] == "carried"
    assert ported.manifest.canary is not None
    assert adapterpack.validate(tmp_path / "out", base=new).valid
    ids = torch.tensor([[5, 17, 40, 8, 9, 9, 50, 2]])
    before, after = (
        adapterpack.load_for(one, base)(input_ids=ids).logits
        for one, base in ((pack, tiny_llama), (tmp_path / "out", new))
    )
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)(input_ids=ids).logits
    assert (before - plain).abs().max() > 0.1
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_modules_that_were_trained_whole(tiny_llama: Path, tmp_path: Path) -> None:
    """One of the base would undo what the new base has learned, so it is refused."""
    pack = adapted(tiny_llama, tmp_path / "pack", modules_to_save=("lm_head",))
    new = trained_further(tiny_llama, tmp_path / "new")
    with pytest.raises(Unsupported, match="trained whole"):
        adapterpack.port(pack, tiny_llama, new, out=tmp_path / "out")


def test_the_command_measures_both_bases(
    base_of: Callable[[str], Path], pack_of: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """The head comes along; with --data the report has the figures of both (the base has no head of its own)."""
    old = base_of("bert")
    new = trained_further(old, tmp_path / "new")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"w{i}", "label": "xyz"[i % 3]}) + "\n" for i in range(12)))
    words = ["port", pack_of("bert", "alpha"), old, new, "-o", tmp_path / "out", "--data", data, "--json"]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.stderr
    value = json.loads(done.stdout)
    assert fits(value, "report.v1")
    assert [[model["name"] for model in one["models"]] for one in value["evaluations"]] == [
        ["alpha"],
        ["out"],
    ]
    assert value["lineage"]["params"]["verdict"] == "carried"
    text = CliRunner().invoke(main, [str(word) for word in [*words[:5], tmp_path / "again"]]).stdout
    assert "0 left out; carried: the weights are up to 0.01" in text
