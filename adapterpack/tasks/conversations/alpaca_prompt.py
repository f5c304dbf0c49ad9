"""Instructions in Alpaca's original prompt (https://github.com/tatsu-lab/stanford_alpaca), regardless of the
chat template, as axolotl does for ``type: alpaca``.
"""

from __future__ import annotations

from ..data.rows import Row
from .form import FORMS, Conversation, DataForm, make_message, text_of

_ANSWER = "Write a response that appropriately completes the request."
_ALONE = f"Below is an instruction that describes a task. {_ANSWER}"
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    f"{_ANSWER}"
)


def read(row: Row) -> Conversation:
    """Returns the full prompt and the answer."""
    more = row.get("input")
    parts = [
        _WITH_INPUT if more else _ALONE,
        f"### Instruction:\n{text_of(row['instruction'])}",
        *([f"### Input:\n{text_of(more)}"] if more else []),
        "### Response:\n",
    ]
    return Conversation(
        [make_message("user", "\n\n".join(parts)), make_message("assistant", row["output"])], verbatim=True
    )


FORMS.register(
    DataForm(
        "alpaca-prompt",
        frozenset({"instruction", "output"}),
        read,
        frozenset({"input"}),
        remark="in Alpaca's prompt, without the chat template; run such prompts with --raw",
    )
)
