"""Keeps the checkpoints of a run beside its output until that is whole, and finds what an interrupted run
left there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import SaveStrategy

from ...errors import AdapterpackError, FormatError, NonFinite, OutputExists, StorageError, storage_errors
from ...io import strict_json
from ...io.atomic import refuse_existing
from ...io.hashing import sha256_of
from ...io.working_folders import hold_folder, open_own_file
from ...library_errors import reason
from ...signals import taken

RUN = "run.json"
"""What a run is: another one does not go on from its checkpoints."""
_STATE = "trainer_state.json"
"""The last file that a trainer writes of a checkpoint."""
_SEAL = "seal.json"
"""The last file of a checkpoint: of which run it is, and the digests of all others. Where it can be read, all
others are there.
"""

_SIGNS = ("/gloo/", "Connection closed by peer", "Connection reset by peer")
"""What is in torch's errors about another process, where they have no class of their own."""
_MORE = 1 << 20
"""Bytes of room that a file which could not be written wanted at least."""


class RunFolder:
    """The folder ``OUT.checkpoints`` of a run that ``description`` tells from others: this user's, without
    links, and locked from :meth:`begin` until :meth:`end` or :meth:`release`.
    """

    def __init__(self, out: str, description: Mapping[str, Any]) -> None:
        self.path = Path(f"{out.rstrip('/')}.checkpoints")
        self._out, self._description = Path(out), strict_json.canonical(description)
        self._lock: int | None = None

    def begin(self) -> Path | None:
        """The last whole checkpoint of the same run; None where there is none, and what a run left that never
        got to one is replaced.

        Raises:
            OutputExists: the checkpoints of another run are there, or the output is by now.
            FormatError: the last checkpoint is not as the run wrote it.
            StorageError: the file system refuses, another process trains into this output, or something there
                is a link or another user's.
        """
        new = not self.path.exists()
        self._lock = hold_folder(self.path)
        try:
            # whoever was at work there may have finished meanwhile
            refuse_existing(self._out, "output_dir=...")
            same = self._described() == self._description
            if not same and self._checkpoints():
                raise OutputExists(
                    "the checkpoints of another run are in the place of this one's",
                    where=self.path,
                    remedy="go on with that run by its own configuration, or remove the folder",
                )
            with storage_errors(self.path):
                self.remove_partial()
                if not same:
                    self._describe()
            last = self.last()
            if last is not None:
                self._require_unchanged(last)
        except BaseException as error:
            if new or (isinstance(error, StorageError) and self.last() is None):
                self.end()
            self.release()
            raise
        return last

    def release(self) -> None:
        """Frees the folder for other processes."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove_partial(self) -> None:
        """Removes checkpoints that were not written to their end."""
        for checkpoint in self._checkpoints():
            if not _is_whole(checkpoint):
                shutil.rmtree(checkpoint, ignore_errors=True)

    def last(self) -> Path | None:
        """The last checkpoint that is whole."""
        return max(filter(_is_whole, self._checkpoints()), key=_step, default=None)

    def kept_note(self) -> str:
        """Which checkpoint the same command goes on from; empty where there is none."""
        last = self.last()
        if last is None:
            return ""
        return f"the checkpoint of step {_step(last)} is kept in {self.path}: the same command goes on there"

    def end(self) -> None:
        """Removes the checkpoints; what reports there are stays."""
        for checkpoint in self._checkpoints():
            shutil.rmtree(checkpoint, ignore_errors=True)
        with suppress(OSError):  # reports of metrics are kept
            (self.path / RUN).unlink(missing_ok=True)
            self.path.rmdir()
        self.release()

    def _checkpoints(self) -> list[Path]:
        return [path for path in self.path.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]

    def _described(self) -> bytes:
        try:
            return (self.path / RUN).read_bytes()
        except OSError:
            return b""

    def _describe(self) -> None:
        with os.fdopen(open_own_file(self.path / RUN, os.O_WRONLY | os.O_CREAT), "wb") as file:
            file.truncate()
            file.write(self._description)

    def _require_unchanged(self, checkpoint: Path) -> None:
        """Checks that a checkpoint is one of this run, with the files that it wrote.

        Raises:
            FormatError: it is not.
        """
        sealed, found = json.loads((checkpoint / _SEAL).read_bytes()), _seal_of(checkpoint)
        if sealed != found:
            files, before = found["files"], sealed.get("files") if isinstance(sealed, dict) else None
            before = before if isinstance(before, dict) else files
            others = sorted(name for name in {*files, *before} if files.get(name) != before.get(name))
            remedy = f"remove {checkpoint} to go on from the one before it, or {self.path} to start anew"
            raise FormatError(
                "the checkpoint is not as this run wrote it",
                where=checkpoint,
                found=", ".join(others[:3]) or None,
                remedy=remedy,
            )


def seal(checkpoint: Path) -> None:
    """Finishes a checkpoint: notes of which run it is, and the digests of its files, by which a later run
    knows it again.
    """
    text = strict_json.canonical(_seal_of(checkpoint))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with storage_errors(checkpoint), os.fdopen(open_own_file(checkpoint / _SEAL, flags), "wb") as file:
        file.write(text)


def _seal_of(checkpoint: Path) -> dict[str, Any]:
    files = {
        path.relative_to(checkpoint).as_posix(): sha256_of(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path != checkpoint / _SEAL
    }
    run = checkpoint.parent / RUN  # not there where somebody uses the trainer without a run
    return {"run": sha256_of(run) if run.exists() else None, "files": files}


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    try:
        for name in (_STATE, _SEAL):
            json.loads((checkpoint / name).read_bytes())
    except (OSError, ValueError):
        return False
    return True


class Patience(EarlyStoppingCallback):  # type: ignore[misc]
    """Early stopping that goes on with the evaluations which an interrupted run has waited already."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """What the checkpoint knows; trainers take up such things only if every callback does."""
        super().on_train_begin(args, state, control, **options)
        kept_state = state.stateful_callbacks.get(type(self).__name__, self.state())
        self.early_stopping_patience_counter = kept_state["attributes"]["early_stopping_patience_counter"]
        control.should_training_stop |= self.early_stopping_patience_counter >= self.early_stopping_patience


class Stopping(TrainerCallback):  # type: ignore[misc]
    """Ends runs at the next step, with a checkpoint if they have some, when it is asked to."""

    wanted = False

    def stop(self) -> None:
        """Asks for it."""
        self.wanted = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Between two steps all that a run goes on from belongs together."""
        if self.wanted:
            control.should_save, control.should_training_stop = args.save_strategy != SaveStrategy.NO, True


@contextmanager
def keep_checkpoint(folder: RunFolder, writes: bool = True) -> Iterator[None]:
    """Says of an error inside that the same command goes on from a checkpoint, if there is one; else nothing
    is left. Nobody goes on with a run that diverged. Only the process that ``writes`` the checkpoints removes
    any.
    """
    try:
        yield
    except BaseException as error:
        if writes:
            useless = folder.last() is None or isinstance(error, NonFinite)
            folder.end() if useless else folder.remove_partial()
            folder.release()
        if (note := folder.kept_note()) and not isinstance(error, NonFinite):
            error.add_note(note)
        raise


@contextmanager
def interruptible(stopping: Stopping, alone: bool) -> Iterator[None]:
    """Lets Ctrl-C, and what else ends a process, end the run inside with a checkpoint; a second one ends it
    at once. Only one process ``alone`` can do that, as several would stop at different steps.

    Raises:
        KeyboardInterrupt: after the checkpoint.
    """
    signals: list[Callable[[], None]] = []

    def stop(end: Callable[[], None]) -> None:
        if stopping.wanted:
            end()
        signals.append(end)
        stopping.stop()

    with taken(stop) if alone else nullcontext():
        try:
            yield
            if stopping.wanted:
                raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            with add_notes(getattr(interrupt, "__notes__", ())):
                for end in signals:  # says which signal it was
                    end()
            raise


@contextmanager
def add_notes(notes: Iterable[str]) -> Iterator[None]:
    """Adds notes to what is raised inside."""
    try:
        yield
    except BaseException as error:
        for note in notes:
            error.add_note(note)
        raise


@contextmanager
def other_processes(count: int) -> Iterator[None]:
    """Turns what torch says where another of ``count`` processes does not answer into an error that says so:
    it is no fault of this one.

    Raises:
        AdapterpackError: another process has ended, or cannot be reached.
    """
    try:
        yield
    except RuntimeError as error:
        if count == 1 or not (
            isinstance(error, torch.distributed.DistError) or any(sign in str(error) for sign in _SIGNS)
        ):
            raise
        raise AdapterpackError(
            f"another process of this training has ended, or cannot be reached: {reason(error)}",
            remedy="see what the others said before, and whether one was killed, as for want of memory",
        ) from error


@contextmanager
def written_checkpoints(folder: str) -> Iterator[None]:
    """Turns what keeps a checkpoint of the run in ``folder`` from being written inside into a named error.

    Raises:
        StorageError: the disk is full, or the file system refuses. torch and safetensors have errors of their
            own for that, and torch's do not say so: whether it was the disk tells one more try, for as much
            room.
    """
    with storage_errors(folder):
        try:
            yield
        except (RuntimeError, SafetensorError):
            _take_room(Path(folder))
            raise


def _take_room(folder: Path) -> None:
    """Takes as much room on the disk as the largest file there, and some more, and gives it back.

    Raises:
        OSError: there is not that much.
    """
    largest = max((file.stat().st_size for file in folder.rglob("*") if file.is_file()), default=0)
    with TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, largest + _MORE)
        else:
            file.write(bytes(_MORE))
