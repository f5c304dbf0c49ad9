"""What other packages bring: found by entry point, listed and used; a package that fails hurts nobody
else.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import safetensors.numpy
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

import adapterpack
from adapterpack import LoRA, Session
from adapterpack.adapter_methods import Site, get
from adapterpack.bundle.manifest import read_bundle
from adapterpack.errors import FormatError, Unsupported
from adapterpack.exporting.frontends import FRONTENDS, ExportSource
from adapterpack.manifest.structs import Base, PackTask
from adapterpack.pack.pack import build
from adapterpack.tasks.task import get_task

ROOT = Path(__file__).parents[1]
ENTRIES = {
    "rules": "clipped = new_rule:clipped",
    "nodes": "loudest = new_node:loudest",
    "targets": "docker = new_target:docker",
    "tasks": "text-ranking = new_task:ranking",
    "frontends": "ready = new_frontend:ready",
    "codecs": "quanto = new_codec:quanto",
}
SITE = Site("layers.0.fc", 9, 7)


def install(site: Path, name: str, entries: dict[str, str]) -> None:
    """A distribution with these entry points, as pip leaves it."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "".join(f"[adapterpack.{group}]\n{entry}\n" for group, entry in entries.items())
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the examples installed, and another package whose module does not
    import.
    """
    site = tmp_path_factory.mktemp("site")
    install(site, "good", ENTRIES)
    install(site, "broken", dict.fromkeys(ENTRIES, "broken = broken_module:value"))
    (site / "broken_module.py").write_text("raise OSError('no driver here')\n")
    for example in ("new_rule", "new_node", "new_target", "new_task", "new_frontend", "new_codec"):
        shutil.copy(ROOT / "examples" / f"{example}.py", site)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}


@pytest.fixture(scope="module")
def cli(installed: dict[str, str]) -> Callable[..., Any]:
    """The command line of such a process."""

    def call(*arguments: Any, code: int = 0) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "adapterpack", *map(str, arguments), "--json"],
            env=installed,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout)

    return call


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three random LoRAs on one site, the second ten times as large as the others."""
    folder = tmp_path_factory.mktemp("packs")
    for seed, (name, size) in enumerate({"a": 1.0, "b": 10.0, "c": 1.5}.items()):
        rng = np.random.default_rng(seed)
        params = {
            "lora_A": rng.normal(size=(2, 9)).astype(np.float32),
            "lora_B": (size * rng.normal(size=(7, 2))).astype(np.float32),
        }
        build(
            name,
            get("lora"),
            {SITE: (LoRA(r=2, alpha=2), params)},
            task=PackTask("text-generation"),
            base=Base(),
        ).write(folder / name)
    return {name: folder / name for name in "abc"}


def change(path: Path) -> np.ndarray:
    """The dense change of a pack, in float64."""
    [adapter] = adapterpack.load(path).adapters()
    A, B = (adapter.params[name].astype(np.float64) for name in ("lora_A", "lora_B"))
    scaled: np.ndarray = adapter.config.scale * (B @ A)
    return scaled


@pytest.mark.fast
def test_a_rule_of_another_package_composes(
    cli: Callable[..., Any], packs: dict[str, Path], tmp_path: Path
) -> None:
    """It is listed with its parameter, and gives what its formula says; the package that fails to import is
    left out.
    """
    listed = {rule["name"]: rule for rule in cli("rules")["rules"]}
    assert "factor" in json.dumps(listed["clipped"])
    assert "broken" not in listed
    cli(
        "compose",
        *packs.values(),
        "-o",
        tmp_path / "out",
        "--rule",
        "clipped",
        "--weight",
        "1",
        "--weight",
        "1",
        "--weight",
        "1",
    )
    changes = [change(path) for path in packs.values()]
    sizes = [np.linalg.norm(one) for one in changes]
    expected = sum(one * min(1.0, np.median(sizes) / size) for one, size in zip(changes, sizes, strict=True))
    assert np.linalg.norm(change(tmp_path / "out") - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.fast
def test_a_node_of_another_package_is_composed(
    cli: Callable[..., Any], packs: dict[str, Path], tmp_path: Path
) -> None:
    """A tree of its kind becomes a pack, whose merge has the loudest member's change."""
    assert "loudest" in {node["name"] for node in cli("methods")["nodes"]}
    cli("compose", packs["a"], packs["b"], "-o", tmp_path / "tree", "--tree", "loudest(a, b)")


@pytest.mark.fast
def test_a_quantized_format_of_another_package_is_merged_into(
    cli: Callable[..., Any], packs: dict[str, Path], tmp_path: Path
) -> None:
    """The merged codes decode to W + B A within half a step, in the base's own layout; with a dtype the
    result is plain and exact.
    """
    base, path = tmp_path / "base", SITE.path
    base.mkdir()
    rng = np.random.default_rng(3)
    codes, scale = (
        rng.integers(-127, 128, (7, 9)).astype(np.int8),
        rng.uniform(0.01, 0.1, (7, 1)).astype(np.float32),
    )
    safetensors.numpy.save_file(
        {f"{path}.weight._data": codes, f"{path}.weight._scale": scale}, base / "model.safetensors"
    )
    (base / "config.json").write_text(
        json.dumps({"model_type": "none", "quantization_config": {"quant_method": "quanto"}})
    )
    expected = codes * scale.astype(np.float64) + change(packs["a"])
    cli("merge", base, packs["a"], "-o", tmp_path / "out")
    merged = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert {name: value.dtype for name, value in merged.items()} == {
        f"{path}.weight._data": np.int8,
        f"{path}.weight._scale": np.float32,
    }
    steps = merged[f"{path}.weight._scale"].astype(np.float64)
    assert np.all(np.abs(merged[f"{path}.weight._data"] * steps - expected) <= 0.5001 * steps)
    cli("merge", base, packs["a"], "-o", tmp_path / "plain", "--dtype", "float32")
    plain = safetensors.numpy.load_file(tmp_path / "plain" / "model.safetensors")
    np.testing.assert_allclose(plain[f"{path}.weight"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.long
def test_a_target_of_another_package_gets_its_files(
    cli: Callable[..., Any], tiny_llama: Path, pack_of: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """The folder of a bundle exported for it holds what its ``write`` adds."""
    cli("export", tiny_llama, pack_of("llama", "alpha"), "-o", tmp_path / "bundle", "--target", "docker")
    assert "text-generation: alpha" in (tmp_path / "bundle" / "Dockerfile").read_text()


WHOLE_LINE = """
import json, sys, adapterpack
folder, base, config, rows = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
adapterpack.train(config)
adapterpack.export(base, [f"{folder}/ranks"], f"{folder}/bundle")
scores = [row["score"] for row in adapterpack.run(f"{folder}/bundle", rows, adapters=["ranks"])]
try:
    list(adapterpack.run(f"{folder}/bundle", [{"text": "w1"}]))
except adapterpack.errors.ConfigError as error:
    print(json.dumps({"scores": scores, "error": error.what}))
"""


@pytest.mark.long
def test_a_task_of_another_package_is_trained_exported_and_run(
    installed: dict[str, str], tiny_bert: Path, tmp_path: Path
) -> None:
    """Ranking, the whole line: a pack of that task, a bundle whose graph was proved, and scores that are the
    sigmoid of torch's logits.

    Where the package is not installed, the bundle's task is unknown.
    """
    rng = np.random.default_rng(0)
    rows = [
        {"query": f"w{first}", "document": f"w{second} w{second + 1}", "score": float(first == second)}
        for first, second in rng.integers(1, 4, (16, 2)).tolist()
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model_name_or_path": str(tiny_bert),
        "task": "text-ranking",
        "train_file": str(tmp_path / "rows.jsonl"),
        "method": "lora",
        "r": 2,
        "output_dir": str(tmp_path / "ranks"),
        "max_steps": 2,
        "learning_rate": 0.1,
    }
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            WHOLE_LINE,
            str(tmp_path),
            str(tiny_bert),
            json.dumps(config),
            json.dumps(rows),
        ],
        env=installed,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    result, pack = json.loads(done.stdout.splitlines()[-1]), adapterpack.load(tmp_path / "ranks")
    assert (pack.manifest.task.type, pack.manifest.task.labels) == ("text-ranking", None)
    assert json.loads((tmp_path / "ranks" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    model = BertForSequenceClassification.from_pretrained(tiny_bert, num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    adapterpack.attach(model, pack, check_canary=False)
    with torch.no_grad():
        expected = [float(model(**_pair(tokenizer, row)).logits.double().sigmoid()) for row in rows]
    np.testing.assert_allclose(result["scores"], expected, rtol=0, atol=1e-5)
    assert len({round(score, 4) for score in result["scores"]}) > 1
    assert "needs query and document" in result["error"]
    with pytest.raises(FormatError, match=r"'text-ranking'.*not installed"):
        Session(tmp_path / "bundle")


def _pair(tokenizer: Any, row: dict[str, Any]) -> dict[str, Any]:
    pair: dict[str, Any] = tokenizer(
        row["query"], row["document"], return_tensors="pt", return_token_type_ids=True
    )
    return pair


@pytest.mark.long
def test_a_frontend_of_another_package_makes_the_graph(
    cli: Callable[..., Any], tiny_llama: Path, pack_of: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """A checkpoint that it supports is exported from its graph, and proved."""
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    ir.save(
        FRONTENDS["mobius"].build(ExportSource(base, get_task("text-generation"))).model,
        base / "ready.onnx",
    )
    cli("export", base, pack_of("llama", "alpha"), "-o", tmp_path / "bundle")
    bundle = read_bundle(tmp_path / "bundle")
    assert bundle.frontend == "ready 1.0"
    assert 0 < bundle.parity["max_relative"]["alpha"] < 1e-4


@pytest.mark.fast
def test_a_package_that_fails_is_named_when_it_is_looked_up(
    cli: Callable[..., Any], packs: dict[str, Path], tmp_path: Path
) -> None:
    """Asking for its rule says which entry point failed and why; a misspelled rule gets the nearest name and
    the failure as a hint.
    """
    error = cli("compose", *packs.values(), "-o", tmp_path / "out", "--rule", "broken", code=1)["error"]
    assert "no driver here" in error["what"]
    assert "broken_module" in error["where"]
    error = cli("compose", *packs.values(), "-o", tmp_path / "out", "--rule", "cliped", code=1)["error"]
    assert "did you mean 'clipped'" in error["remedy"]
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_kind_of_adapter_of_another_package_passes_its_own_tests(tmp_path: Path) -> None:
    """ShadowPEFT, with a second model beside the layers: a method, and modules of its own in the model."""
    example = ROOT / "examples" / "shadow_peft"
    project = tomllib.loads((example / "pyproject.toml").read_text())["project"]
    groups = {
        group.removeprefix("adapterpack."): "\n".join(f"{name} = {value}" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    }
    install(tmp_path, "adapterpack_shadow", groups)
    options = ("-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(example)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, example, ROOT))),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


@pytest.mark.fast
def test_a_folder_of_a_method_that_a_package_brings_says_where_it_is(tmp_path: Path) -> None:
    """ShadowPEFT's folders are refused where the example is not installed, with the way out."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "SHADOW"}))
    safetensors.numpy.save_file({"a": np.zeros(1, np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(Unsupported, match=r"not installed here.*examples/shadow_peft"):
        adapterpack.load(tmp_path)
