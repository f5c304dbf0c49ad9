"""Keeps the checkpoints of a run beside its output until that is whole, and finds what an interrupted run left there."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ...errors import NonFinite, OutputExists
from ...io import strict_json

RUN = "run.json"
"""What a run is: another one does not go on from its checkpoints."""
_STATE = "trainer_state.json"
"""The last file of a checkpoint: where it can be read, all others are there."""


class RunFolder:
    """The folder ``OUT.checkpoints`` of a run that ``description`` tells from others."""

    def __init__(self, out: str, description: Mapping[str, Any]) -> None:
        self.path = Path(f"{out.rstrip('/')}.checkpoints")
        self._description = strict_json.canonical(description)

    def begin(self) -> Path | None:
        """The last whole checkpoint of the same run; None where there is none, and what a run left that never got to one is replaced.

        Raises:
            OutputExists: the checkpoints of another run are there.
        """
        last = self.last()
        if last is not None and self._described() != self._description:
            raise OutputExists("the checkpoints of another run are in the place of this one's", where=self.path,
                               remedy="go on with that run by its own configuration, or remove the folder")
        for partial in self._checkpoints():
            if not _is_whole(partial):
                shutil.rmtree(partial)
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / RUN).write_bytes(self._description)
        return last

    def last(self) -> Path | None:
        """The last checkpoint that is whole."""
        return max(filter(_is_whole, self._checkpoints()), key=_step, default=None)

    def end(self) -> None:
        """Removes the checkpoints; what reports there are stays."""
        for checkpoint in self._checkpoints():
            shutil.rmtree(checkpoint)
        (self.path / RUN).unlink(missing_ok=True)
        with suppress(OSError):  # reports of metrics are kept
            self.path.rmdir()

    def _checkpoints(self) -> list[Path]:
        return [path for path in self.path.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]

    def _described(self) -> bytes:
        try:
            return (self.path / RUN).read_bytes()
        except OSError:
            return b""


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _STATE).read_bytes())
    except (OSError, ValueError):
        return False
    return True


class Patience(EarlyStoppingCallback):  # type: ignore[misc]
    """Early stopping that goes on with the evaluations which an interrupted run has waited already."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any) -> None:
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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Between two steps all that a run goes on from belongs together."""
        if self.wanted:
            control.should_save, control.should_training_stop = args.save_strategy != SaveStrategy.NO, True


@contextmanager
def kept(folder: RunFolder) -> Iterator[None]:
    """Says of an error inside that the same command goes on from a checkpoint, if there is one; else nothing is left. Nobody goes on with a
    run that diverged.
    """
    try:
        yield
    except BaseException as error:
        last = folder.last()
        if last is None or isinstance(error, NonFinite):
            folder.end()
        else:
            error.add_note(f"the checkpoint of step {_step(last)} is kept in {folder.path}: the same command goes on there")
        raise


@contextmanager
def interruptible(stopping: Stopping, alone: bool) -> Iterator[None]:
    """Lets Ctrl-C end the run inside with a checkpoint; a second one ends it at once. Only one process ``alone`` can do that, as several
    would stop at different steps.

    Raises:
        KeyboardInterrupt: after the checkpoint.
    """
    def stop(number: int, frame: FrameType | None) -> None:
        if stopping.wanted:
            raise KeyboardInterrupt
        stopping.stop()

    ours = alone and threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    before = signal.signal(signal.SIGINT, stop) if ours else None
    try:
        yield
        if stopping.wanted:
            raise KeyboardInterrupt
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)
