"""What a run takes up again lies under a name that others can foresee: it is the user's own, holds no links,
and one process works there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from adapterpack.errors import StorageError
from adapterpack.merging.checkpoint.jobs import JobShare
from adapterpack.merging.checkpoint.journal import FOLDER, Journal
from adapterpack.merging.checkpoint.staging import open_staging
from adapterpack.offline.growing_file import growing_file

pytestmark = pytest.mark.fast

KEY = "0123456789abcdef"


def merging(out: Path) -> AbstractContextManager[Any]:
    return open_staging(out, place(out.parent), lambda folder: Journal(folder, JobShare(1, 1), ()), keep=True)


def place(folder: Path) -> Path:
    return folder / f".out.{KEY}.partial"


WORK: dict[str, tuple[Callable[[Path], AbstractContextManager[Any]], tuple[str, ...]]] = {
    "answers": (lambda out: growing_file(out, KEY), ("rows", "steps")),
    "a merge": (merging, (f"{FOLDER}/1-of-1.jsonl", "model.safetensors")),
}


@pytest.mark.parametrize("work", WORK)
def test_nothing_is_written_through_a_link_in_a_folder_that_is_kept(tmp_path: Path, work: str) -> None:
    """Where one is planted there is an error, and the file that it leads to stays as it is."""
    begin, names = WORK[work]
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in names:
        planted = place(tmp_path) / name
        planted.parent.mkdir(parents=True, exist_ok=True)
        planted.symlink_to(victim)
        said = f"follows no link.*found a link to {victim}"
        with pytest.raises(StorageError, match=said), begin(tmp_path / "out"):
            pass
        planted.unlink()
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("work", WORK)
def test_what_another_user_left_is_not_taken_up(
    tmp_path: Path, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder where everybody may write somebody else can have made it."""
    begin, names = WORK[work]
    (place(tmp_path) / names[0]).parent.mkdir(parents=True)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(StorageError, match="another user"), begin(tmp_path / "out"):
        pass


@pytest.mark.parametrize("work", WORK)
def test_nobody_else_may_write_where_a_run_works(tmp_path: Path, work: str) -> None:
    """A folder that was made under a wide umask is gone on with, and closed to others."""
    begin, _ = WORK[work]
    place(tmp_path).mkdir()
    place(tmp_path).chmod(0o777)
    with begin(tmp_path / "out"):
        assert place(tmp_path).stat().st_mode & 0o777 == 0o755
