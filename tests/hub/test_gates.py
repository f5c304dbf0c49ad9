"""The gates in ``examples/ci``: the steps of the workflow as a runner runs them, and the hooks under the real
pre-commit.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hubs import READ, Hub, make_pack

import adapterpack

pytestmark = pytest.mark.fast
EXAMPLES = Path(__file__).parents[2] / "examples" / "ci"


@pytest.fixture
def project(hub: Hub, client_environment: dict[str, str], tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A git repository with a pack and a lock file that pins one on the hub, and the environment of whoever
    works in it.
    """
    folder = tmp_path / "project"
    (folder / "packs").mkdir(parents=True)
    make_pack().write(folder / "packs" / "tick ets")
    adapterpack.push(make_pack(), "hf://org/gated")
    adapterpack.pull("hf://org/gated", lock=folder / "adapterpack.lock")
    script = tmp_path / "bin" / "adapterpack"  # the program that a user has installed
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m adapterpack "$@"\n')
    script.chmod(0o755)
    return folder, {
        **client_environment,
        "HF_TOKEN": READ,
        "PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}",
        "PRE_COMMIT_HOME": str(tmp_path / "pre-commit"),
        "GIT_CONFIG_GLOBAL": os.devnull,
    }


def steps() -> list[dict[str, Any]]:
    workflow = yaml.safe_load((EXAMPLES / "github-workflow.yml").read_text())
    found: list[dict[str, Any]] = [step for step in workflow["jobs"]["gate"]["steps"] if "run" in step]
    assert found[0]["run"] == "pip install adapterpack", "is installed here already"
    return found[1:]


def outcome(step: dict[str, Any], folder: Path, environment: dict[str, str]) -> int:
    """As a runner does: bash, and the first failure ends the step."""
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", step["run"]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert READ not in done.stdout + done.stderr
    return done.returncode


def spoil(pack: Path) -> None:
    tensors = pack / "adapter_model.safetensors"
    tensors.chmod(0o644)
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"!")


def test_the_workflow_lets_sound_adapters_pass_and_stops_others(
    hub: Hub, project: tuple[Path, dict[str, str]]
) -> None:
    folder, environment = project
    packs, audit = steps()
    assert [outcome(packs, folder, environment), outcome(audit, folder, environment)] == [0, 0]
    assert (folder / "adapters.sarif").is_file()
    hub.arm("other digest")
    assert outcome(audit, folder, environment) == 1, "the hub tells of another file than the manifest lists"
    hub.arm()
    lock = folder / "adapterpack.lock"
    lock.write_text(lock.read_text().replace(make_pack().id, f"sha256:{'0' * 64}"))
    assert outcome(audit, folder, environment) == 1, "another artifact than is pinned"
    spoil(folder / "packs" / "tick ets")
    assert outcome(packs, folder, environment) == 1


def test_the_hooks_under_pre_commit(hub: Hub, project: tuple[Path, dict[str, str]]) -> None:
    folder, environment = project
    (folder / ".pre-commit-config.yaml").write_bytes((EXAMPLES / "pre-commit-config.yaml").read_bytes())

    def commit() -> subprocess.CompletedProcess[str]:
        subprocess.run(["git", "add", "-A"], cwd=folder, env=environment, check=True)
        return subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "x"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    subprocess.run(["git", "init", "-q"], cwd=folder, env=environment, check=True)
    subprocess.run(
        [sys.executable, "-m", "pre_commit", "install"],
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
    )
    done = commit()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("Passed") == 2
    spoil(folder / "packs" / "tick ets")
    done = commit()
    assert (done.returncode, done.stderr.count("Failed")) == (1, 1)
    assert "packs/tick ets is not valid" in done.stderr
    assert READ not in done.stdout + done.stderr
