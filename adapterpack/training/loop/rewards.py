"""Reward functions out of a Python file that the user names on the command line; no pack, base or
configuration can name one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...errors import ConfigError, StorageError, nearest
from ..trainers.kind import TrainerKind

Reward = Callable[..., Sequence[float]]
"""(completions, and by name the prompts and the other columns of the rows) -> a score for each completion."""


def find_reward(text: str) -> Reward:
    """The function that ``file.py:function`` names; the file is run.

    Raises:
        ConfigError: it is not of this form, or the file has no such function.
        StorageError: there is no such file.
    """
    file, colon, name = text.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise ConfigError(
            "a reward is named by its file and its function",
            where="--reward",
            expected="file.py:function",
            found=repr(text),
        )
    path = Path(file)
    if not path.is_file():
        raise StorageError(
            "there is no such file of rewards", where=path, remedy="paths are taken from the current folder"
        )
    spec = importlib.util.spec_from_file_location(f"adapterpack_rewards_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(
            "the file has no such function",
            where=path,
            found=name,
            remedy=nearest(name, [key for key, value in vars(module).items() if callable(value)]),
        )
    return function  # type: ignore[no-any-return]


def require_rewards(kind: TrainerKind, rewards: Sequence[Reward]) -> None:
    """Checks that a kind of training which learns from rewards is given some, and no other is.

    Raises:
        ConfigError: it is not so.
    """
    if kind.rewards and not rewards:
        raise ConfigError(
            f"the trainer {kind.name} learns from rewards, and there is no function that gives any",
            where="trainer",
            remedy=(
                "name one on the command line: --reward file.py:function, or train(..., rewards=[function])"
            ),
        )
    if rewards and not kind.rewards:
        raise ConfigError(
            f"the trainer {kind.name} does not learn from rewards",
            where="--reward",
            remedy="leave it out, or choose trainer: grpo",
        )
