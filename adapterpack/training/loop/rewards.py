"""Loads reward functions from a Python file that the user names on the command line; no pack, base or
configuration can name code.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import ConfigError, StorageError, nearest
from ..trainers.kind import TrainerKind

Reward = Callable[..., Sequence[float]]
"""A function that takes completions, and by keyword the prompts and other columns of the rows, and returns a
score for each completion.
"""


def find_reward(text: str) -> Reward:
    """Returns the function that ``file.py:function`` names; runs the file.

    Raises:
        ConfigError: the name has another form, or the file has no such function.
        StorageError: the file is missing.
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
            "there is no such file of rewards",
            where=path,
            remedy="check the path: it starts from the current folder",
        )
    spec = importlib.util.spec_from_file_location(f"adapterpack_rewards_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(
            "the file has no such function",
            where=path,
            found=name,
            remedy=nearest(name, [key for key, value in vars(module).items() if callable(value)]),
        )
    return function  # type: ignore[no-any-return]


def require_rewards(kind: TrainerKind, rewards: Sequence[Reward]) -> None:
    """Raises if a trainer that learns from rewards gets none, or another trainer gets some.

    Raises:
        ConfigError: rewards are missing, or not used.
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
