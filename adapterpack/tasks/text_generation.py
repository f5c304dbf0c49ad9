"""Text generation by a causal language model: the continuation of a prompt or a chat."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..chat.template import ChatTemplate
from ..errors import ConfigError
from ..library_errors import library_errors
from .rows import Row, map_rows, prompt_of
from .session import Arrays, Session
from .task import DECODER, IGNORED, MAIN, TASKS, Part, Task, Training

log = logging.getLogger(__name__)


def answer(session: Session, rows: Sequence[Row], adapters: Sequence[str | None], sampling: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``completion``, why it ended, and how many tokens prompt and completion have."""
    return completions(session, map_rows(rows, prompt_of), adapters, sampling)


def completions(
    session: Session, prompts: Sequence[Any], adapters: Sequence[str | None], sampling: Mapping[str, Any], inputs: Arrays | None = None
) -> list[dict[str, Any]]:
    """The answers to prompts, to ``inputs`` such as audio features in their place, or to both; with the tokens' log-probabilities, or
    several sequences of a beam search and their scores, if ``sampling`` asks for them.
    """
    return [described(completion, session) for completion in session.generate(prompts, adapters, given=inputs, **sampling)]


def described(completion: Any, session: Session) -> dict[str, Any]:
    """What a result says of an answer, which is a ``Generation``."""
    return {"completion": completion.text, "finish_reason": completion.finish_reason, "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": len(completion.ids), **_logprobs(completion.logprobs, session), **_sequences(completion.sequences)}


def _sequences(sequences: Sequence[Any]) -> dict[str, Any]:
    """The best sequences of a beam search, where there are several."""
    if len(sequences) < 2:
        return {}
    return {"sequences": [{"completion": one.text, "score": one.score, "finish_reason": one.finish_reason} for one in sequences]}


def _logprobs(choices: Sequence[Any] | None, session: Session) -> dict[str, Any]:
    """The tokens of an answer in the form of the OpenAI API, with their ids."""
    if choices is None:
        return {}

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"id": token, "token": session.tokenizer.decode([token]), "logprob": logprob}

    return {"logprobs": [{**entry(choice.token, choice.logprob), "top_logprobs": [entry(*pair) for pair in choice.top_logprobs]}
                         for choice in choices]}


class DataFormat(NamedTuple):
    """A form of training data: its columns, and how a row becomes (prompt, completion), the prompt as chat messages."""

    name: str
    columns: frozenset[str]
    split: Callable[[Row], tuple[list[dict[str, str]], str]]


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": _text(text)}]


def _conversation(row: Row) -> tuple[list[dict[str, str]], str]:
    *before, last = row["messages"]
    if last["role"] != "assistant":
        raise ValueError("the last message is not the assistant's")
    return before, last["content"]


DATA_FORMATS = (
    DataFormat("messages", frozenset({"messages"}), _conversation),
    DataFormat("prompt-completion", frozenset({"prompt", "completion"}), lambda row: (_user(row["prompt"]), row["completion"])),
    DataFormat("alpaca", frozenset({"instruction", "output"}),
         lambda row: (_user("\n\n".join(filter(None, [row["instruction"], row.get("input")]))), row["output"])),
    DataFormat("text", frozenset({"text"}), lambda row: ([], row["text"])),
)


def encode(rows: Any, tokenizer: Any, max_length: int, where: object, labels: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Token ids and labels for causal language modelling: the loss is on the completion alone; the end token is learned.

    A chat template, where the tokenizer has one, renders the prompt. Rows longer than ``max_length`` tokens are cut at the end; those of
    which only the prompt would be left are left out, with a warning.

    Raises:
        ConfigError: a row that is not of its columns' form; no row is left; or the tokenizer has no end token.
    """
    form = _format_of(rows.column_names, where)
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end token, so the model could not learn where to stop", where=where,
                          remedy="use the tokenizer of a generating model")
    encoded = []
    for number, row in enumerate(rows):
        with library_errors("transformers", f"a row is not of the form {form.name}", where=f"{where}, row {number + 1}", kind=ConfigError):
            messages, completion = form.split(row)
            prompt = _prompt_ids(messages, tokenizer)
            learned = tokenizer(_text(completion), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(prompt) < max_length:
            encoded.append({"input_ids": (prompt + learned)[:max_length], "labels": ([IGNORED] * len(prompt) + learned)[:max_length]})
    left_out = len(rows) - len(encoded)
    if not encoded:
        raise ConfigError("every prompt is longer than max_length, so there is nothing to learn", where=where,
                          found=f"max_length {max_length}", remedy="raise max_length")
    if left_out:
        log.warning("%s: %d of %d rows are left out, their prompts fill max_length (%d)", where, left_out, len(rows), max_length)
    return encoded


def _format_of(columns: Sequence[str], where: object) -> DataFormat:
    for form in DATA_FORMATS:
        if form.columns <= set(columns):
            return form
    formats = "; ".join(" + ".join(sorted(form.columns)) for form in DATA_FORMATS)
    raise ConfigError("these columns are of no known form", where=where, expected=formats, found=", ".join(columns))


def _prompt_ids(messages: list[dict[str, str]], tokenizer: Any) -> list[int]:
    """The ids of a prompt, rendered by the chat template if there is one; of no messages, those that begin every text.

    The end token that some tokenizers put behind every text is taken off: here an answer follows.
    """
    if messages and tokenizer.chat_template:
        source = tokenizer.chat_template  # several by name, or one
        template = ChatTemplate(source if isinstance(source, str) else source.get("default", ""))
        rendered: list[int] = tokenizer(template.render(messages, tokenizer.special_tokens_map), add_special_tokens=False)["input_ids"]
        return rendered
    ids: list[int] = tokenizer("\n".join(_text(message["content"]) for message in messages))["input_ids"]
    begins = len(ids) == 1 and tokenizer.bos_token_id == tokenizer.eos_token_id  # some models begin with the token with which they end
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and not begins else ids


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"text was expected, found {value!r}")  # becomes a ConfigError that names the row
    return value


TASKS.register(Task(
    "text-generation", "AutoModelForCausalLM", answer, ("ForCausalLM", "LMHeadModel"), parts=(Part(MAIN, "decoder", DECODER),),
    prompt=prompt_of, training=Training(encode), peft_type="CAUSAL_LM",
))
