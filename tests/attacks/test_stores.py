"""Attacks on the store of packs: links and strangers' files where its own folders should be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from attack import Attacks

from adapterpack import Store


def stored(root: Path, pack: Path) -> None:
    Store(root).add(pack)


def collected(root: Path) -> None:
    Store(root).gc(keep=[], dry_run=False)


def read(root: Path, identity: str) -> None:
    Store(root).get(identity)


def counted(root: Path) -> None:
    Store(root).gc(keep=[], dry_run=True)


@pytest.fixture
def store(base: Path, attacks: Attacks) -> Path:
    """A store with one pack in it."""
    Store(attacks.work / "store").add(attacks.work / "pack")
    return attacks.work / "store"


def identity_in(store: Path) -> str:
    return next((store / "packs").iterdir()).name


@pytest.mark.parametrize("name", ["blobs", "packs", "tmp", "quarantine"])
@pytest.mark.parametrize("action", [stored, collected, counted, read])
def test_a_folder_of_a_store_that_is_a_link(action: object, name: str, store: Path, attacks: Attacks) -> None:
    identity = identity_in(store)
    (store / name).rename(attacks.work / "moved")
    (attacks.outside / "folder" / "inside").mkdir(parents=True)
    (attacks.outside / "folder" / "inside" / "file").write_text("mine")
    (store / name).symlink_to(attacks.outside / "folder")
    arguments = {stored: (attacks.work / "pack",), read: (identity,)}.get(action, ())  # type: ignore[call-overload]
    attacks.call(action, store, *arguments).refused("link")  # type: ignore[arg-type]


@pytest.mark.parametrize("action", [stored, collected, counted])
@pytest.mark.parametrize("place", ["shelf", "blob", "pack", "file"])
def test_links_deeper_in_a_store(place: str, action: object, store: Path, attacks: Attacks) -> None:
    """Whatever is done there, nothing outside is written, and what is read back is the pack."""
    (attacks.outside / "folder").mkdir()
    (attacks.outside / "folder" / "file").write_text("mine")
    shelf = next(path for path in sorted((store / "blobs").iterdir()))
    blob, pack = next(shelf.iterdir()), next((store / "packs").iterdir())
    path = {"shelf": shelf, "blob": blob, "pack": pack, "file": pack / "adapterpack.json"}[place]
    path.rename(attacks.work / "moved")
    path.symlink_to(attacks.outside / ("folder" if place in ("shelf", "pack") else "secret.txt"))
    attacks.call(action, store, *([attacks.work / "pack"] if action is stored else [])).held()  # type: ignore[arg-type]


def test_a_pipe_for_a_blob(store: Path, attacks: Attacks) -> None:
    for blob in sorted((store / "blobs").glob("*/*")):
        blob.unlink()
        os.mkfifo(blob)
    attacks.call(stored, store, attacks.work / "pack").held()
    attacks.call(collected, store).held()


def test_a_folder_of_somebody_else_is_no_store(attacks: Attacks) -> None:
    (attacks.work / "mine").mkdir()
    (attacks.work / "mine" / "file").write_text("mine")
    attacks.call(collected, attacks.work / "mine").refused("other things")
    assert (attacks.work / "mine" / "file").read_text() == "mine"


def test_a_lock_that_is_a_link(store: Path, attacks: Attacks) -> None:
    (store / ".lock").unlink()
    (store / ".lock").symlink_to(attacks.outside / "new")
    attacks.call(stored, store, attacks.work / "pack").refused("lock")


def test_a_lock_that_is_a_pipe(store: Path, attacks: Attacks) -> None:
    (store / ".lock").unlink()
    os.mkfifo(store / ".lock")
    attacks.call(collected, store).held()
