"""Adapters of older versions of PEFT, in environments of their own, against what this package makes of them:
``python peft_versions.py [FOLDER [VERSION...]]``.

Each version gets the transformers of its time, and shares the torch of this environment, since no torch of
that time is needed for its numbers. What is compared is in ``ecosystems/make_peft.py`` and
``ecosystems/compare.py``.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "ecosystems"))
import compare
import torch

VERSIONS = {
    "0.4.0": ("transformers==4.31.0", "tokenizers==0.13.3", "accelerate==0.21.0", "huggingface-hub==0.16.4"),
    "0.6.0": ("transformers==4.35.2", "tokenizers==0.15.0", "accelerate==0.24.1", "huggingface-hub==0.19.4"),
    "0.8.0": ("transformers==4.37.2", "tokenizers==0.15.1", "accelerate==0.26.1", "huggingface-hub==0.20.3"),
    "0.10.0": ("transformers==4.39.3", "tokenizers==0.15.2", "accelerate==0.28.0", "huggingface-hub==0.22.2"),
    "0.14.0": ("transformers==4.47.1", "tokenizers==0.21.0", "accelerate==1.2.1", "huggingface-hub==0.27.0"),
}
"""A version of PEFT -> what it runs with."""


def python_with(folder: Path, version: str) -> Path:
    """The interpreter of an environment with a version of PEFT, which is made unless it is there."""
    place = folder / f"peft-{version}"
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
        packages = (f"peft=={version}", "numpy==1.26.4", *VERSIONS[version])
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *packages], check=True)
        library = Path(sysconfig.get_path("purelib", vars={"base": str(place)}))
        (library / "shared.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return python


def main(folder: Path, versions: list[str]) -> int:
    """How many versions differ."""
    wrong = 0
    for version in versions or VERSIONS:
        compare.say(f"PEFT {version}")
        wrong += compare.main("peft", str(python_with(folder, version)))
    return wrong


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(main(Path([*sys.argv[1:], scratch][0]), sys.argv[2:]))
