"""Prompts that a configuration writes out, in place of a chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from ...errors import ConfigError
from ...io import FrozenStruct
from ..data import Row


class WrittenPrompt(FrozenStruct, forbid_unknown_fields=True):
    """The text of a prompt, in which ``{column}`` is what a row has there.

    Args:
        format: the prompt of a row with ``input``, and of every row if ``no_input_format`` is empty.
        no_input_format: the prompt of a row without ``input``.
        system_format: the text that comes first, made of ``{system}``.
        system_prompt: what ``{system}`` is for rows that have none.
        no_input_system_prompt: the same for rows without ``input``.
        answer_format: the answer, made of ``{answer}``.
    """

    format: str
    no_input_format: str = ""
    system_format: str = "{system}"
    system_prompt: str = ""
    no_input_system_prompt: str = ""
    answer_format: str = "{answer}"

    @property
    def columns(self) -> frozenset[str]:
        """The columns that the prompt names."""
        return frozenset(re.findall(r"\{(\w+)\}", self.format + self.no_input_format))

    def prompt(self, row: Row) -> str:
        """Returns the prompt of a row.

        Example:
            >>> WrittenPrompt("Q: {question} A:", system_prompt="Be brief. ").prompt({"question": "Who?"})
            'Be brief. Q: Who? A:'
        """
        with_input = bool(row.get("input"))
        usual = self.system_prompt if with_input else self.no_input_system_prompt or self.system_prompt
        system = row.get("system") or usual
        text = self.format if with_input else self.no_input_format or self.format
        before = _fill(self.system_format, {"system": system}) if system else ""
        return before + _fill(text, row)

    def answer(self, text: str) -> str:
        """Returns the text of an answer."""
        return _fill(self.answer_format, {"answer": text})


def written_prompt(given: Mapping[str, str]) -> WrittenPrompt:
    """Returns the prompt that a mapping of a configuration describes.

    Raises:
        ConfigError: it has another key, or a value that is no text.
    """
    try:
        return msgspec.convert(dict(given), WrittenPrompt)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"a prompt is not written as one: {error}",
            where="form",
            expected=", ".join(WrittenPrompt.__struct_fields__),
        ) from error


def _fill(text: str, values: Row) -> str:
    """Puts values in the place of their names, and of nothing else: str.format would read attributes."""

    def value(found: re.Match[str]) -> str:
        filled = values.get(found[1], found[0])
        if not isinstance(filled, str):
            raise ValueError(f"text was expected in {found[1]}, found {filled!r:.80}")
        return filled

    return re.sub(r"\{(\w+)\}", value, text)
