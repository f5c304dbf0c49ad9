"""The target ``model-package``: what ONNX Runtime's own reader finds in the folder.

That ONNX Runtime 1.32 opens such folders, and gives what torch gives with two adapters, is shown in
``tests/interop/model_package.py``, in an environment of its own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
from architecture_proofs import make_base
from architectures import ARCHITECTURES
from test_export import BATCHES, assert_close, batch_of, logits_of

from adapterpack import Session, export, quantize, validate
from adapterpack.bundle.manifest import bundle_in
from adapterpack.errors import ConfigError

Make = Callable[..., Any]


def published_digest(folder: Path) -> str:
    """The rule of ``model_package/README.md``: a line for each file, sorted by path, hashed as a whole."""
    files = sorted(
        (path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file()
    )
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n" for name, path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def variants_of(package: Path, component: str = "model") -> dict[str, Any]:
    """What the manifest says of each provider's variant."""
    told = json.loads((package / "manifest.json").read_text())
    assert told["schema_version"] == "1.0"
    return dict(told["components"][component]["variants"])


def test_variants_share_the_bundle_by_its_digest(
    base_of: Make, pack_of: Make, dense_of: Make, tmp_path: Path
) -> None:
    """Exported from a checkpoint: a bundle like any other, with the config of onnxruntime-genai, where the
    manifest says; each provider's graph is there.
    """
    out, names = tmp_path / "package", ("alpha", "beta")
    packs = [pack_of("llama", name) for name in names]
    export(base_of("llama"), packs, out, mode="inputs", target="model-package")
    (asset,) = (out / "shared_assets").iterdir()
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "shared_assets"]
    assert asset.name == f"sha256-{published_digest(asset)}"
    variant = {
        "variant_directory": f"shared_assets/{asset.name}",
        "executor_info": {"ort": {"model_file": "model.onnx"}},
    }
    assert variants_of(out) == {
        "cpu": {"ep": "CPUExecutionProvider", **variant},
        "cuda": {"ep": "CUDAExecutionProvider", **variant},
    }
    assert bundle_in(out) == asset
    assert not validate(asset, base_of("llama"), full=True).findings
    decoder = json.loads((asset / "genai_config.json").read_text())["model"]["decoder"]
    assert (decoder["filename"], decoder["num_hidden_layers"]) == ("model.onnx", 2)
    batch, session = batch_of("llama", BATCHES["ragged"]), Session(asset, "cpu")
    for name in (None, *names):
        assert_close(
            session.run(batch, name)["logits"],
            logits_of(dense_of("llama", name), batch),
            batch["attention_mask"],
        )


def test_a_provider_without_a_kernel_has_no_variant(bundle_of: Make, tmp_path: Path) -> None:
    """CUDA does not multiply unsigned bytes. A bank has no config for onnxruntime-genai, which has one
    adapter for all rows; the same bundle gives the same package.
    """
    bank = bundle_of("llama", "bank")
    quantize(bank, tmp_path / "w8a8", scheme="w8a8")
    found = {}
    for name, bundle in (("bank", bank), ("again", bank), ("bytes", tmp_path / "w8a8")):
        export(bundle, [], tmp_path / name, target="model-package")
        found[name] = list(variants_of(tmp_path / name))
        assert not (bundle_in(tmp_path / name) / "genai_config.json").exists()
    assert found == {"bank": ["cpu", "cuda"], "again": ["cpu", "cuda"], "bytes": ["cpu"]}
    assert len({(tmp_path / name / "manifest.json").read_bytes() for name in ("bank", "again")}) == 1


@pytest.mark.long  # three graphs, traced
def test_each_graph_of_a_task_is_a_component(tiny_bert: Path, tmp_path: Path) -> None:
    """An encoder beside its decoder; not the engine's graph, which ONNX Runtime alone does not drive."""
    (architecture,) = (each for each in ARCHITECTURES if each.name == "t5")
    base, out = make_base(architecture, tmp_path / "base"), tmp_path / "package"
    for path in tiny_bert.glob("*token*"):
        shutil.copyfile(path, base / path.name)
    export(base, [], out, mode="folded", target="model-package", proof="none", in_place=True)
    assert (bundle_in(out) / "decoder.onnx").is_file()
    components = json.loads((out / "manifest.json").read_text())["components"]
    assert set(components) == {"encoder", "model"}
    for name in components:
        told = variants_of(out, name)["cpu"]
        graph = out / told["variant_directory"] / told["executor_info"]["ort"]["model_file"]
        assert ort.InferenceSession(graph, providers=[told["ep"]]).get_outputs()


def test_data_is_not_split(bundle_of: Make, tmp_path: Path) -> None:
    """The size of data files belongs to sites for browsers."""
    with pytest.raises(ConfigError, match=r"model-package.*--target web"):
        export(bundle_of("llama", "bank"), [], tmp_path / "out", target="model-package", split=1 << 20)
    assert not list(tmp_path.iterdir())
