"""Attacks on merges: a base that is exchanged or altered while it is read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from attack import Attacks

import adapterpack


def exchanged(path: Path) -> None:
    """Another file takes the name."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-64] + bytes(64))
    other.replace(path)


def written_into(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))


def written_into_secretly(path: Path) -> None:
    """With its time set back."""
    before = path.stat()
    written_into(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def removed(path: Path) -> None:
    path.unlink()


def linked_elsewhere(path: Path) -> None:
    other = path.parent.parent / "elsewhere.safetensors"
    path.rename(other)
    path.symlink_to(other)
    os.utime(other)


ALTERED = (exchanged, written_into, written_into_secretly, grown, removed, linked_elsewhere)


def merged(
    alter: Callable[[Path], None], base: Path, pack: Path, out: Path, verify: str, resume: bool
) -> None:
    """A merge whose base is altered when its first bytes are written: after every check of the base."""
    done: list[int] = []

    def progress(bytes_done: int, _: int) -> None:
        if not done:
            alter(base / "model.safetensors")
        done.append(bytes_done)

    adapterpack.merge(base, [pack], out, verify=verify, resume=resume, progress=progress)


@pytest.mark.parametrize("verify", ["full", "structure"])
@pytest.mark.parametrize("resume", [False, True], ids=["afresh", "to be resumed"])
@pytest.mark.parametrize("alter", ALTERED)
def test_a_base_that_is_altered_while_it_is_merged(
    alter: Callable[[Path], None], resume: bool, verify: str, base: Path, attacks: Attacks
) -> None:
    out = attacks.work / "out"
    done = attacks.call(merged, alter, base, attacks.work / "pack", out, verify, resume).held()
    # samples of the base are not asked of a file whose time stays
    if alter is not written_into_secretly or verify == "full":
        done.refused(absent=out)
        assert not list(attacks.work.glob(".out*")), "nothing of another base is gone on with"


def extracted(alter: Callable[[Path], None], tuned: Path, base: Path, out: Path) -> None:
    done: list[int] = []

    def progress(bytes_done: int, _: int) -> None:
        if not done:
            alter(base / "model.safetensors")
        done.append(bytes_done)

    adapterpack.extract(tuned, base, out=out, progress=progress)


@pytest.mark.parametrize("alter", [exchanged, written_into, removed])
def test_a_base_that_is_altered_while_it_is_compared(
    alter: Callable[[Path], None], base: Path, attacks: Attacks
) -> None:
    attacks.call(extracted, alter, attacks.work / "tuned", base, attacks.work / "out").refused(
        absent=attacks.work / "out"
    )


def exported(alter: Callable[[Path], None], base: Path, pack: Path, out: Path) -> None:
    def progress(text: str) -> None:
        if text.startswith("attach"):
            alter(base / "model.safetensors")

    adapterpack.export(base, [pack], out, progress=progress)


@pytest.mark.parametrize("alter", [exchanged, written_into, removed])
def test_a_base_that_is_altered_while_it_is_exported(
    alter: Callable[[Path], None], base: Path, attacks: Attacks
) -> None:
    attacks.call(exported, alter, base, attacks.work / "pack", attacks.work / "out").refused(
        absent=attacks.work / "out"
    )


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "chat_template.jinja"])
def test_a_file_that_becomes_a_link_while_its_base_is_merged(name: str, base: Path, attacks: Attacks) -> None:
    (base / name).write_text("{}")
    attacks.call(
        relinked, name, base, attacks.work / "pack", attacks.work / "out", attacks.outside / "secret.txt"
    ).refused(name, "leads out", absent=attacks.work / "out")


def relinked(name: str, base: Path, pack: Path, out: Path, secret: Path) -> None:
    def progress(*_: int) -> None:
        (base / name).unlink(missing_ok=True)
        (base / name).symlink_to(secret)

    adapterpack.merge(base, [pack], out, progress=progress)


def test_the_base_itself_stays_as_it_was(base: Path, attacks: Attacks) -> None:
    shutil.copytree(base, attacks.work / "before")
    attacks.command("merge", "causal", "pack", "-o", "out").harmless()
    for path in (attacks.work / "before").iterdir():
        assert path.read_bytes() == (base / path.name).read_bytes()
