"""A bundle that grows beside its place: a thread of its own writes the weights of its graphs, and goes on where a killed process stood."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..bundle.manifest import graph_file
from ..io import hashing
from ..io.progress import Ticker
from ..io.readable import size
from ..merging import journal, staging
from ..merging.jobs import Share
from ..version import VERSION
from .graph import weights as w

_BUNDLE = "bundle"
"""The folder inside of the staging folder that becomes the output."""
_SECONDS = 2.0
"""Between two words of progress."""


class Growing:
    """What is there of a bundle, in its ``folder``."""

    def __init__(self, folder: Path, written: Future[None], digests: Future[dict[str, str]], close: Callable[[], None]) -> None:
        self.folder = folder
        self._written, self._digests, self._close = written, digests, close

    def wait(self) -> None:
        """Until every weight is in its file."""
        self._written.result()

    def digests(self) -> dict[str, str]:
        """The sha256 of the files of weights, by name."""
        return self._digests.result()

    def close(self) -> None:
        """Notes that the files are changed from here on: whoever goes on after a death writes them anew."""
        self._digests.result()
        self._close()


@contextmanager
def growing(out: Path, place: str, graphs: Mapping[str, Any], made_from: Sequence[str], say: Callable[[str], None]) -> Iterator[Growing]:
    """Stages a bundle at ``place`` in ``out`` with its ``graphs`` by part, and gives ``out`` its name when the block ends well.

    The graphs' weights are moved out of them, and are written while the block runs. ``made_from`` is all that their numbers depend on: an
    export that was killed is gone on with by one whose graphs and ``made_from`` are the same.

    Raises:
        OutputExists: something is at ``out``.
        StorageError: the file system refuses, the disk is full, or another process is at work on the same export.
    """
    weights = [weight for part, model in graphs.items() for weight in w.outlined(model, f"{graph_file(part)}.data")]
    messages = {graph_file(part): ir.to_proto(model).SerializeToString(deterministic=True) for part, model in graphs.items()}
    key = _key(messages, [VERSION, place, *made_from])
    home = staging.folder_for(out, key)
    whole = home / _BUNDLE
    folder = whole / place
    files = dict.fromkeys(weight.file for weight in weights)
    staging.require_space(out, sum(weight.nbytes for weight in weights) - staging.bytes_on_disk(folder))

    names = [str((folder / file).relative_to(home)) for file in files]
    with staging.staged(out, home, lambda home: journal.Journal(home, Share(), names), keep=False) as log:
        done = journal.finished(home, len(weights) + 1)
        known = set[int]() if len(weights) in done else set(done)
        _clear(whole, {folder / file for file in files})
        folder.mkdir(parents=True, exist_ok=True)
        for file, message in messages.items():
            (folder / file).write_bytes(message)
        w.reserve(weights, folder)
        ticker = Ticker(sum(weight.nbytes for weight in weights), _teller(say))
        with ThreadPoolExecutor(1) as thread:
            written = thread.submit(_write, weights, known, folder, ticker, log)
            digests = thread.submit(_digests, folder, list(files), written, ticker)
            if known:
                say(f"go on with what was written before: {size(sum(weights[number].nbytes for number in known))}")
            try:
                yield Growing(folder, written, digests, lambda: log.add(len(weights), None, ()))
                written.result()
            finally:
                ticker.stopped = True
        staging.publish(home, out, lambda home: None, durable=True, file=_BUNDLE)


def _key(messages: Mapping[str, bytes], made_from: Sequence[str]) -> str:
    found = hashlib.sha256()
    for each in (*(part for file, message in messages.items() for part in (file.encode(), message)), *map(str.encode, made_from)):
        found.update(len(each).to_bytes(8, "little") + each)
    return found.hexdigest()


def _clear(whole: Path, kept: set[Path]) -> None:
    """Removes what an earlier run left in the bundle, except its files of weights and the folders that these are in."""
    for path in sorted(whole.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):
                path.rmdir()
        elif path not in kept:
            path.unlink()


def _write(weights: Sequence[w.Weight], known: set[int], folder: Path, ticker: Ticker, log: journal.Journal) -> None:
    ticker.add(sum(weights[number].nbytes for number in known))
    with log.synced():
        for number, weight in enumerate(weights):
            if number not in known:
                ticker.check()
                w.write(weight, folder, ticker.add)
                log.add(number, None, [str((folder / weight.file).relative_to(log.staging))])


def _digests(folder: Path, files: Sequence[str], written: Future[None], ticker: Ticker) -> dict[str, str]:
    """Taken behind the writing, beside whatever else the process does."""
    if written.exception() is not None:
        return {}
    sources = {file: hashing.Source.whole(folder / file) for file in files}
    return {file: digest.hex() for file, digest in hashing.digests(sources, watch=ticker.check).items()}


def _teller(say: Callable[[str], None]) -> Callable[[int, int], None]:
    last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS:
            last = now
            say(f"write {size(done)} of {size(total)}")

    return tell
