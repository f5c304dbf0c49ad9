"""Lets several functions run in turns, one at a time, each with random numbers of its own."""

from __future__ import annotations

import contextvars
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .resuming import Stopping

Pause = Callable[[], None]
"""Lets the others have their turn; returns when the caller's has come again."""
T = TypeVar("T")


def in_turns(works: Sequence[Callable[[Pause], T]], stop: Callable[[], None]) -> list[T]:
    """Runs functions alternately, in their order, each until it calls the function that it is given; returns
    what they return.

    Each has a thread, of which one runs at a time: what it does is what it would do alone, since it finds the
    generators of random numbers, and what accelerate keeps for a process, as it left them. After the first
    error ``stop`` is called; it is raised when the others have come to their ends, with the notes of their
    errors.

    Example:
        >>> said = []
        >>> def count(pause, name, to):
        ...     for number in range(to):
        ...         said.append(f"{name}{number}")
        ...         pause()
        ...     return to
        >>> in_turns([lambda pause: count(pause, "a", 1), lambda pause: count(pause, "b", 3)],
        ...     lambda: None), said
        ([1, 3], ['a0', 'b0', 'b1', 'b2'])
    """
    before = _Globals.taken()
    threads = [_Turn(work, before) for work in works]
    left, errors = list(threads), list[BaseException]()
    try:
        while left:
            for thread in list(left):
                thread.go_on()
                if thread.ended:
                    left.remove(thread)
                    if thread.error is not None:
                        errors.append(thread.error)
                        stop()
    except BaseException:  # a second Ctrl-C: nobody waits for the end of a step
        for thread in left:
            thread.abandon()
        raise
    finally:
        before.put()
    if errors:
        for note in (note for error in errors[1:] for note in getattr(error, "__notes__", ())):
            errors[0].add_note(note)
        raise errors[0]
    return [thread.result for thread in threads]


class Turns(TrainerCallback):  # type: ignore[misc]
    """Gives the others a turn before each step. A run that is to stop, and has done nothing that a checkpoint
    could keep, ends there.
    """

    def __init__(self, pause: Pause, stopping: Stopping) -> None:
        self._pause, self._stopping, self._first = pause, stopping, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """A run that goes on has steps behind it already."""
        self._first = state.global_step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """A step with its evaluation and its checkpoint is one turn.

        Raises:
            KeyboardInterrupt: it is to stop before its first step.
        """
        self._pause()
        if self._stopping.wanted and state.global_step == self._first:
            raise KeyboardInterrupt


class _Turn:
    """One of the functions, in its thread."""

    def __init__(self, work: Callable[[Pause], Any], found: _Globals) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended, self._abandoned, self._globals = False, False, found
        self._mine, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._run, work), daemon=True
        )

    def go_on(self) -> None:
        """Lets it run until it pauses or ends."""
        self._globals.put()
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._mine.release()
        self._back.acquire()
        self._globals = _Globals.taken()

    def abandon(self) -> None:
        """Ends it where it is, or where it pauses next."""
        self._abandoned = True
        if self._thread.ident is not None:
            self._mine.release()
            self._thread.join()

    def _run(self, work: Callable[[Pause], Any]) -> None:
        try:
            self.result = work(self._pause)
        except BaseException as error:  # it is raised where all of them have ended
            self.error = error
        self.ended = True
        self._back.release()

    def _pause(self) -> None:
        if not self._abandoned:
            self._back.release()
            self._mine.acquire()
        if self._abandoned:
            raise KeyboardInterrupt


_STATES = (PartialState, AcceleratorState, GradientState)
"""Classes of accelerate whose objects are all one: its precision, and how far the data of a trainer are."""


class _Globals(NamedTuple):
    """What a training finds in its process and changes: the generators of random numbers, and accelerate's
    states.
    """

    python: Any
    numpy: Any
    torch: torch.Tensor
    devices: Sequence[torch.Tensor]
    accelerate: Sequence[dict[str, Any]]

    @classmethod
    def taken(cls) -> _Globals:
        """As they are."""
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(
            random.getstate(),
            np.random.get_state(),
            torch.get_rng_state(),
            devices,
            [dict(state._shared_state) for state in _STATES],
        )

    def put(self) -> None:
        """Puts them back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.devices:
            torch.cuda.set_rng_state_all(list(self.devices))
        for state, values in zip(_STATES, self.accelerate, strict=True):
            state._shared_state.clear()
            state._shared_state.update(values)
