"""ONNX Runtime's model package: one folder from which ONNX Runtime 1.32 takes the graph for the execution
provider of a session.

``OUT/manifest.json``, and the bundle as an asset that the variants of all providers share by its digest:
``OUT/shared_assets/sha256-DIGEST``. Format: https://github.com/microsoft/onnxruntime,
model_package/README.md.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ...bundle import FILE_NAME, MODES, Bundle, graph_file, read_bundle
from ...errors import Unsupported
from ...io import sha256_of, sha256_of_text, strict_json
from ...onnx_graph import GraphFile
from ...runtime.providers import PROVIDERS, kernels_of, nodes_without_kernel
from ...tasks import get_task
from .base import TARGETS, Target
from .ort_genai import ort_genai


def _write(folder: Path, bundle: Bundle) -> None:
    if bundle.mode in ort_genai.modes and ort_genai.serves(get_task(bundle.task)):
        # onnxruntime-genai opens packages, too; what it cannot run needs no config of its own
        with suppress(Unsupported):
            ort_genai.write(folder, bundle)


def _finish(folder: Path, split: int | None) -> None:
    bundle = read_bundle(folder)
    graphs = {part: graph_file(part) for part in bundle.parts}
    models = [GraphFile(folder / graph).model for graph in graphs.values()]
    asset = f"shared_assets/sha256-{asset_digest(folder, bundle)}"
    variants = {
        name: {"ep": provider.runtime_name, "variant_directory": asset}
        for name, provider in PROVIDERS.items()
        if name == "cpu"
        or ((table := kernels_of(name)) and not any(any(nodes_without_kernel(one, table)) for one in models))
    }
    components = {
        part: {
            "variants": {
                name: {**variant, "executor_info": {"ort": {"model_file": graph}}}
                for name, variant in variants.items()
            }
        }
        for part, graph in graphs.items()
    }
    package = folder.parent
    (package / "shared_assets").mkdir()
    folder.rename(package / asset)
    (package / "manifest.json").write_bytes(
        strict_json.canonical({"schema_version": "1.0", "components": components})
    )


def asset_digest(folder: Path, bundle: Bundle) -> str:
    """Returns the digest by which packages name a bundle's folder: the sha256 of the digests and paths of all
    its files, as ONNX Runtime's ``ModelPackage.compute_directory_hash`` defines it.

    Raises:
        FormatError, StorageError: the manifest of the bundle cannot be read.
    """
    files = {entry.path: entry.sha256 for entry in bundle.files}
    files[FILE_NAME] = sha256_of(folder / FILE_NAME)
    return sha256_of_text("".join(f"{files[path]}  {path}\n" for path in sorted(files)))


model_package = TARGETS.register(
    Target(
        "model-package",
        "ONNX Runtime's model package: variants by provider, each the bundle, which they share by its digest",
        frozenset(MODES),
        "",
        lambda task: True,
        engine=True,
        place=lambda bundle: "bundle",
        write=_write,
        finish=_finish,
    )
)
