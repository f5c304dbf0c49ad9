"""Keeps a run's checkpoints next to its output until that is complete, and resumes from what an interrupted
run left.
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
from ...io import hold_folder, open_own_file, refuse_existing, sha256_of, strict_json
from ...library_errors import reason
from ...signals import taken

RUN = "run.json"
"""The description of a run; only a run with an equal one resumes from its checkpoints."""
_STATE = "trainer_state.json"
"""The last file that a trainer writes into a checkpoint."""
_SEAL = "seal.json"
"""The file that completes a checkpoint: its run, and the digests of all other files. If it is readable, the
others were complete.
"""

_SIGNS = ("/gloo/", "Connection closed by peer", "Connection reset by peer")
"""Parts of torch's messages about another process, where they have no error class of their own."""
_MORE = 1 << 20
"""The least bytes of free space that a failed write must have needed."""


class RunFolder:
    """The folder ``OUT.checkpoints`` of a run.

    ``description`` distinguishes the run from others; with ``replace``, what another run left there and its
    pack in ``out`` give way. The folder belongs to this user, contains no links, and
    is locked from :meth:`begin` until :meth:`end` or :meth:`release`.
    """

    def __init__(self, out: str, description: Mapping[str, Any], replace: bool = False) -> None:
        self.path = Path(f"{out.rstrip('/')}.checkpoints")
        self._out = Path(out)
        self._description = strict_json.canonical(description)
        self._replace = replace
        self._lock: int | None = None

    def begin(self) -> Path | None:
        """Locks the folder and returns the last complete checkpoint of the same run, or None.

        Replaces what another run left if that never completed a checkpoint.

        Raises:
            OutputExists: the folder has checkpoints of another run, or the output exists by now.
            FormatError: the last checkpoint is not as the run wrote it.
            StorageError: the file system refuses, another process trains into this output, or the folder
                contains links or another user's files.
        """
        new = not self.path.exists()
        self._lock = hold_folder(self.path)
        try:
            # Another process may have finished while this one waited for the lock.
            refuse_existing(self._out, "output_dir=...", self._replace)
            same = self._described() == self._description
            if not same and self._replace:
                self._remove(self._checkpoints())
            if not same and self._checkpoints():
                raise OutputExists(
                    "checkpoints of another run lie where this one writes its own",
                    where=self.path,
                    remedy="continue that run with its own configuration, or remove the folder",
                )
            with storage_errors(self.path):
                self.remove_partial()
                if not same:
                    self._describe()
            last = self.last()
            if last is not None:
                self._require_unchanged(last)
        except BaseException as error:
            # Remove a folder that this call created, or that has no complete checkpoint worth keeping.
            if new or (isinstance(error, StorageError) and self.last() is None):
                self.end()
            self.release()
            raise
        return last

    def release(self) -> None:
        """Unlocks the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove_partial(self) -> None:
        """Removes incomplete checkpoints."""
        self._remove(path for path in self._checkpoints() if not _is_whole(path))

    def last(self) -> Path | None:
        """Returns the last complete checkpoint, or None."""
        return max(filter(_is_whole, self._checkpoints()), key=_step, default=None)

    def kept_note(self) -> str:
        """Returns a note for errors, which says from which checkpoint the same command resumes; empty if
        there is none.
        """
        last = self.last()
        if last is None:
            return ""
        return f"the checkpoint of step {_step(last)} is kept in {self.path}: the same command goes on there"

    def end(self) -> None:
        """Removes the checkpoints; reports of metrics in the folder stay."""
        self._remove(self._checkpoints())
        # Fails if reports of metrics remain, which keeps them.
        with suppress(OSError):
            (self.path / RUN).unlink(missing_ok=True)
            self.path.rmdir()
        self.release()

    @staticmethod
    def _remove(checkpoints: Iterable[Path]) -> None:
        for checkpoint in checkpoints:
            shutil.rmtree(checkpoint, ignore_errors=True)

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
        """Raises unless a checkpoint is this run's, with the files that it wrote.

        Raises:
            FormatError: it is another run's, or a file has changed.
        """
        sealed = json.loads((checkpoint / _SEAL).read_bytes())
        found = _seal_of(checkpoint)
        if sealed != found:
            files = found["files"]
            before = sealed.get("files") if isinstance(sealed, dict) else None
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
    """Completes a checkpoint by recording its run and the digests of its files."""
    text = strict_json.canonical(_seal_of(checkpoint))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with storage_errors(checkpoint), os.fdopen(open_own_file(checkpoint / _SEAL, flags), "wb") as file:
        file.write(text)


def _seal_of(checkpoint: Path) -> dict[str, Any]:
    """Returns the run and the digests of the files of a checkpoint."""
    files = {
        path.relative_to(checkpoint).as_posix(): sha256_of(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path != checkpoint / _SEAL
    }
    # Missing if the trainer is used without a run.
    run = checkpoint.parent / RUN
    return {"run": sha256_of(run) if run.exists() else None, "files": files}


def _step(checkpoint: Path) -> int:
    """Returns the step of a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete."""
    try:
        for name in (_STATE, _SEAL):
            json.loads((checkpoint / name).read_bytes())
    except (OSError, ValueError):
        return False
    return True


class Patience(EarlyStoppingCallback):  # type: ignore[misc]
    """Early stopping that continues to count where an interrupted run stopped."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Restores the count from the checkpoint: trainers restore callbacks themselves only if every
        callback supports it.
        """
        super().on_train_begin(args, state, control, **options)
        kept_state = state.stateful_callbacks.get(type(self).__name__, self.state())
        self.early_stopping_patience_counter = kept_state["attributes"]["early_stopping_patience_counter"]
        control.should_training_stop |= self.early_stopping_patience_counter >= self.early_stopping_patience


class Stopping(TrainerCallback):  # type: ignore[misc]
    """Ends a run at the next step when asked to, with a checkpoint if the run has checkpoints."""

    wanted = False
    """Whether the run is asked to end."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ends the run between two steps, when everything that a checkpoint holds is consistent."""
        if self.wanted:
            control.should_save = args.save_strategy != SaveStrategy.NO
            control.should_training_stop = True


@contextmanager
def keep_checkpoint(folder: RunFolder, writes: bool = True) -> Iterator[None]:
    """Adds a note to errors inside the block that the same command resumes from a checkpoint, or removes the
    folder if there is none.

    A run that diverged is not resumed. Only the process that ``writes`` the checkpoints removes any.
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
    """Lets signals such as Ctrl-C end the run inside the block with a checkpoint; a second signal ends it at
    once.

    Only a process ``alone`` does so, since several would stop at different steps.

    Raises:
        KeyboardInterrupt: after the checkpoint.
    """
    signals = []

    def stop(end: Callable[[], None]) -> None:
        if stopping.wanted:
            end()
        signals.append(end)
        stopping.wanted = True

    with taken(stop) if alone else nullcontext():
        try:
            yield
            if stopping.wanted:
                raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            try:
                # Raises the exception that names the signal.
                for end in signals:
                    end()
            except BaseException as error:
                for note in getattr(interrupt, "__notes__", ()):
                    error.add_note(note)
                raise
            raise


@contextmanager
def other_processes(count: int) -> Iterator[None]:
    """Turns torch's errors about another of ``count`` processes into one that says so: this process is not at
    fault.

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
            remedy="see what the others said before, and whether one was killed, such as for lack of memory",
        ) from error


_UNWRITTEN = ("iostream error", "inline_container")
"""Parts of torch's messages where a file cannot be written."""


@contextmanager
def written_checkpoints(folder: str) -> Iterator[None]:
    """Turns failures to write a checkpoint into ``folder`` into a named error.

    torch and safetensors raise their own errors for a full disk, and torch's do not mention the disk. Trying
    to reserve as much space again shows whether that was the cause.

    Raises:
        StorageError: the disk is full, or the file system refuses.
    """
    with storage_errors(folder):
        try:
            yield
        except (RuntimeError, SafetensorError) as error:
            _take_room(Path(folder))
            if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _UNWRITTEN):
                raise
            raise StorageError(
                f"the checkpoint cannot be written: {reason(error)}", where=folder, remedy="check the disk"
            ) from error


def _take_room(folder: Path) -> None:
    """Reserves as much disk space as the largest file there and some more, and frees it again.

    Raises:
        OSError: there is not enough space.
    """
    largest = max((file.stat().st_size for file in folder.rglob("*") if file.is_file()), default=0)
    with TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, largest + _MORE)
        else:
            file.write(bytes(_MORE))
