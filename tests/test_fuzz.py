"""Some inputs of the fuzzer, and proof that it would find what it looks for; ``make fuzz`` runs it for ten
minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FUZZ = ROOT / "tests" / "fuzz" / "fuzz.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{FUZZ.parent}", "OMP_NUM_THREADS": "1"}


def fuzz(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """A run of the fuzzer in a process of its own, after the statements ``before``."""
    imports = (
        "import sys, time, fuzz\nfrom adapterpack.io import safetensors\nfrom adapterpack.manifest import "
        "manifest"
    )
    code = f"{imports}\n{before}\nsys.argv[1:] = {list(arguments)!r}\nfuzz.main()"
    return subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=800,
    )


def test_a_hundred_inputs_of_each_find_nothing() -> None:
    """Named errors and true answers only, no input takes a second or 64 MB; every target is reached, and some
    inputs are accepted.
    """
    done = fuzz("--runs", "100", "--seed", "11")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 findings" in done.stdout
    lines = {line.split()[0]: line for line in done.stdout.splitlines()[:-1]}
    assert set(lines) == {
        "tensor_file",
        "manifest",
        "pack",
        "method",
        "foreign",
        "template",
        "peft",
        "gguf_file",
        "onnx_adapter",
        "bundle",
        "yaml",
        "recipe",
        "tokenizer",
        "tokenizer_config",
        "rows",
    }
    assert not any(" 0 accepted" in lines[name] for name in ("tensor_file", "manifest", "template", "peft"))


def test_what_guided_fuzzing_kept_finds_nothing() -> None:
    """Inputs that reached code which no seed reaches (``make guided``)."""
    done = fuzz("--corpus", str(FUZZ.parent / "corpus"))
    assert done.returncode == 0, done.stdout + done.stderr
    count, _, rest = done.stdout.partition(" inputs, ")
    assert (int(count) > 300, rest) == (True, "0 findings\n")


def test_what_the_kept_inputs_reach_is_printed_by_module() -> None:
    """Of the readers that are asked for, and of no other."""
    script = FUZZ.parent / "reached.py"
    command = [sys.executable, str(script), "--target", "yaml", "--target", "gguf_file"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    found = {words[0]: int(words[-2]) for words in map(str.split, done.stdout.splitlines())}
    assert found["adapterpack/io/plain_yaml.py"] > 60 and found["adapterpack/base/gguf/header.py"] > 80
    assert "adapterpack/bundle/manifest.py" not in found


FAULTS = {
    "another error": "real = safetensors._entry\ndef _entry(name, *rest):\n    return "
    "{}[name] if name[-1:] == 'x' else "
    "real(name, *rest)\n"
    "safetensors._entry = _entry",
    "a reader that is too kind": "import json, types\nkind = lambda data, *_: "
    "json.loads(data.decode('utf-8', 'replace'))\n"
    "safetensors.strict_json = types.SimpleNamespace(loads=kind)",
    "hang": "real = safetensors._naturals\ndef _naturals(value):\n    while value == [0]: pass\n    return "
    "real(value)\n"
    "safetensors._naturals = _naturals",
    "memory": "real = safetensors._naturals\ndef _naturals(value):\n    if value == [0]: bytearray(1 << "
    "27).replace(b'a', b'b')\n"
    "    return real(value)\nsafetensors._naturals = _naturals",
    "memory of numpy": "import numpy\nreal = safetensors._naturals\ndef _naturals(value):\n   "
    " if value == [0]: numpy.ones(1 "
    "<< 24, 'f8')\n"
    "    return real(value)\nsafetensors._naturals = _naturals",
}


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_it_finds_a_fault(fault: str, tmp_path: Path) -> None:
    """A reader that raises another error, reads what the reference refuses, hangs, or takes memory: a finding
    that can be replayed.
    """
    done = fuzz(
        "--target",
        "tensor_file",
        "--first",
        "--seed",
        "1",
        "--findings",
        str(tmp_path),
        before=FAULTS[fault],
    )
    assert done.returncode == 1, done.stdout + done.stderr
    kept = sorted(tmp_path.iterdir())
    assert kept
    assert fuzz("--replay", str(kept[0]), before=FAULTS[fault]).returncode == 1
    assert fuzz("--replay", str(kept[0])).returncode == 0
