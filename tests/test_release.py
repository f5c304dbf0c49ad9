"""``.ci/release``: a tag, the version, the changelog, images and the files are of one release, or it says
which are not.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adapterpack.version import VERSION

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[1]


def release(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "release"), *args],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_release_is_of_one_piece(tmp_path: Path) -> None:
    """The notes are the section of the changelog and no more; each thing that does not fit is refused by its
    name.
    """
    (tmp_path / "adapterpack").mkdir()
    for name in ("pyproject.toml", "adapterpack/version.py", "CHANGELOG.md"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    assert "has no section" in release(tmp_path, f"v{VERSION}").stderr
    log = tmp_path / "CHANGELOG.md"
    head, _, rest = log.read_text("utf-8").partition("## [Unreleased]")
    assert rest.strip()
    made = f"## [{VERSION}] - 2026-12-01\n\n### Added\n\n- a thing\n\n"
    log.write_text(f"{head}## [Unreleased]\n\n{made}## [0.0.1] - 2026-01-01\n\n- old\n", "utf-8")
    done = release(tmp_path, f"v{VERSION}")
    assert (done.returncode, done.stdout) == (0, "### Added\n\n- a thing\n"), done.stderr
    dist = tmp_path / "dist"
    dist.mkdir()
    assert "not nothing" in release(tmp_path, f"v{VERSION}", "dist").stderr
    for name in (f"adapterpack-{VERSION}.tar.gz", f"adapterpack-{VERSION}-py3-none-any.whl"):
        (dist / name).touch()
    assert release(tmp_path, f"v{VERSION}", "dist").returncode == 0
    (dist / "adapterpack-9.9.tar.gz").touch()
    assert "adapterpack-9.9.tar.gz" in release(tmp_path, f"v{VERSION}", "dist").stderr
    (dist / "adapterpack-9.9.tar.gz").unlink()
    (tmp_path / "examples").mkdir()
    for image, code in ((VERSION, 0), ("9.9.9-cuda", 1)):
        (tmp_path / "examples" / "compose.yaml").write_text(f"image: adapterpack:{image}\n", "utf-8")
        done = release(tmp_path, f"v{VERSION}", "dist")
        assert (done.returncode, "examples/compose.yaml" in done.stderr) == (code, bool(code))
    assert "must be the same" in release(tmp_path, "v9.9.9").stderr
    (tmp_path / "adapterpack" / "version.py").write_text('VERSION = "9.9.9"\n', "utf-8")
    assert "must be the same" in release(tmp_path, f"v{VERSION}").stderr


def test_the_workflows_run_scripts_that_there_are() -> None:
    """Each script of ``.ci`` that a workflow or the page on releases names is there and can be started."""
    texts = [
        path.read_text("utf-8")
        for path in (*ROOT.glob(".github/workflows/*.yml"), ROOT / "docs" / "releasing.md")
    ]
    named = {name for text in texts for name in re.findall(r"\.ci/[a-z-]+", text)}
    assert len(named) > 6
    assert [name for name in sorted(named) if not (ROOT / name).stat().st_mode & 0o111] == []
